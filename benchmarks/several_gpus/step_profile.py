"""Where the time of a training step goes, on this process: kernels, transfers between GPUs, gaps, the host's part.

The GPU's side is read off a trace. The host's is sampled beside it: what the threads that train were at, a thousand
times a second, by the innermost function of each package and with the functions that it was called from.
"""

from __future__ import annotations

import collections
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
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
    where = next((place for place, part in enumerate(parts) if part in PACKAGES), max(0, len(parts) - 2))
    return f"{'/'.join(parts[where:])}:{frame.f_code.co_qualname}"


def events_of(tracer: profile) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        tracer.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return [event for event in events if "dur" in event]


def of_trace(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds: `computing` and `between_gpus` as unions of intervals, `only_between_gpus` where no kernel runs."""
    gpu = [event for event in events if event.get("cat") in ON_GPU]
    span = max(end(event) for event in gpu) - min(event["ts"] for event in gpu)
    between = [event for event in gpu if is_between(event)]
    computing = [event for event in gpu if not is_between(event)]
    busy, moved, computed = covered(gpu), covered(between), covered(computing)
    return {
        "milliseconds": span / 1e3,
        "computing": computed / 1e3,
        "between_gpus": moved / 1e3,
        "only_between_gpus": (busy - computed) / 1e3,
        "idle": (span - busy) / 1e3,
        "kernels": len(gpu),
        "launches": collections.Counter(e["name"] for e in events if e.get("cat") == "cuda_runtime").most_common(8),
        "top": top(gpu),
    }


def is_between(event: dict[str, Any]) -> bool:
    name = event["name"]
    return name.startswith("nccl") or "PtoP" in name or "P2P" in name


def end(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]


def covered(events: Iterable[dict[str, Any]]) -> float:
    """Microseconds in which at least one of them runs."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event["ts"]):
        total += max(0.0, end(event) - max(until, event["ts"]))
        until = max(until, end(event))
    return total


def top(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = {}
    for event in events:
        times.setdefault(event["name"][:110], []).append(event["dur"])
    longest = sorted(times.items(), key=lambda item: -sum(item[1]))[:TOP]
    return [{"name": name, "calls": len(each), "milliseconds": sum(each) / 1e3} for name, each in longest]
