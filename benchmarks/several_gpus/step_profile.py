"""Where the time of a training step goes, on this process: kernels, transfers between GPUs, gaps, the host's part.

The GPU's side is read off a trace. The host's is sampled beside it: what the threads that train were at, a thousand
times a second: in which function, and within which others.
"""

from __future__ import annotations

import collections
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from trace_events import ON_GPU, Event, events_of, gaps, longest, span
from transformers import TrainerCallback

SAMPLE_SECONDS = 1e-3
TOP = 25
PACKAGES = ("deepspeed", "recover", "accelerate", "transformers", "trl", "peft", "torch")


class StepProfile(TrainerCallback):
    """Two steps of process 0, numbered from 1: the first sampled on the host, the second traced on the GPU."""

    engine = None  # for `caught_by`

    def __init__(self, sampled: int) -> None:
        self.sampled, self.found = sampled, dict[str, Any]()
        self.sampler: Sampler | None = None
        self.tracer: profile | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.sampled - 1:
            self.sampler = Sampler()
            self.sampler.start()
        elif state.global_step == self.sampled and torch.cuda.is_available():
            torch.cuda.synchronize()
            self.tracer = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            self.tracer.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.sampler is not None:
            self.found["host"] = self.sampler.stop()
            self.sampler = None
        if self.tracer is not None:
            torch.cuda.synchronize()
            self.tracer.stop()
            self.found["gpu"] = of_trace(events_of(self.tracer))
            self.tracer = None


class Sampler(threading.Thread):
    """Stacks of all other threads of Python, as often as the interpreter lets it look."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.going = True
        self.inner: collections.Counter[str] = collections.Counter()
        self.within: collections.Counter[str] = collections.Counter()
        self.samples = 0
        self.seconds = time.perf_counter()

    def run(self) -> None:
        while self.going:
            frames = sys._current_frames()
            for thread in threading.enumerate():
                if thread is not self and thread.ident in frames and not thread.daemon:
                    self.count(frames[thread.ident])
            for ident in frames.keys() - {thread.ident for thread in threading.enumerate()}:
                self.count(frames[ident])  # autograd's own threads, which Python has not started
            self.samples += 1
            time.sleep(SAMPLE_SECONDS)

    def count(self, frame: FrameType | None) -> None:
        names = []
        while frame is not None:
            names.append(name_of(frame))
            frame = frame.f_back
        self.inner[names[0]] += 1
        self.within.update(set(names))

    def stop(self) -> dict[str, Any]:
        self.going = False
        self.join()
        return {
            "seconds": time.perf_counter() - self.seconds,
            "samples": self.samples,
            "innermost": self.inner.most_common(TOP),
            "within": self.within.most_common(3 * TOP),
        }


def name_of(frame: FrameType) -> str:
    parts = Path(frame.f_code.co_filename).parts
    packages = [place for place, part in enumerate(parts) if part in PACKAGES]
    where = packages[-1] if packages else max(0, len(parts) - 2)
    return f"{'/'.join(parts[where:])}:{frame.f_code.co_qualname}"


def of_trace(events: Sequence[Event]) -> dict[str, Any]:
    """Milliseconds: `computing` and `between_gpus` as unions of intervals, `only_between_gpus` where no kernel runs."""
    gpu = [event for event in events if event.get("cat") in ON_GPU]
    busy, moved = covered(gpu), covered([event for event in gpu if is_between(event)])
    computed = covered([event for event in gpu if not is_between(event)])
    return {
        "milliseconds": span(gpu) / 1e3,
        "computing": computed / 1e3,
        "between_gpus": moved / 1e3,
        "only_between_gpus": (busy - computed) / 1e3,
        "idle": sum(gaps(gpu)) / 1e3,
        "kernels": len(gpu),
        "launches": collections.Counter(e["name"] for e in events if e.get("cat") == "cuda_runtime").most_common(8),
        "top": [
            {"name": name, "calls": len(times), "milliseconds": sum(times) / 1e3} for name, times in longest(gpu, TOP)
        ],
    }


def is_between(event: Event) -> bool:
    name = event["name"]
    return name.startswith("nccl") or "PtoP" in name or "P2P" in name


def covered(events: Sequence[Event]) -> float:
    """Microseconds in which at least one of them runs."""
    return span(events) - sum(gaps(events))
