"""Where the time of a training's steps goes: GPU time by launch and by kernel, and what the host did while it was idle.

Two traces of the steady state: one without Python's frames, whose times are nearly those of the training, and one with
them, which is slower and only tells what ran during the gaps. On a CPU the same tables are of operators: they nest, so
their times add up to more than the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from step_cost import GROUPS, group_of
from torch.profiler import ProfilerActivity, profile, record_function
from trace_events import ON_GPU, Event, events_of

from recover.train.trainer import RecoverTrainer

STEPS = 6  # that figures are of; one before them is traced too, whose first kernels were launched earlier
FRAMES_STEPS = 3
LONG_GAP = 200  # microseconds
TOP, TOP_SINGLE, TOP_GAPS = 30, 20, 20
STEP = "a step of the training"
POINTS = 9  # at which a gap is looked at


class StepProfile:
    """Traces steps of the training that runs inside `watched`, from step `first` on; `text` says what was found."""

    def __init__(self, first: int, device: str) -> None:
        self.device = device
        frames = first + STEPS + 2
        self.spans = {first: (STEPS, False), frames: (FRAMES_STEPS, True)}
        self.last = frames + FRAMES_STEPS + 1
        self.found: dict[bool, list[Event]] = {}
        self.step = 0
        self._tracer: profile | None = None
        self._ends, self._frames = 0, False
        self._mark: Any = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        begin, this = RecoverTrainer.get_batch_samples, self

        def get_batch_samples(self: Any, *arguments: Any, **named: Any) -> Any:
            this.next_step()
            return begin(self, *arguments, **named)

        with patch.object(RecoverTrainer, "get_batch_samples", get_batch_samples):
            yield
        self._end()

    def next_step(self) -> None:
        """A step of the training ends, and one begins."""
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None
        if self._tracer is not None and self.step >= self._ends:
            self._end()
        if self.step in self.spans:
            count, self._frames = self.spans[self.step]
            self._ends = self.step + 1 + count
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device == "cuda" else [])]
            self._tracer = profile(activities=kinds, with_stack=self._frames)
            self._tracer.start()
        if self._tracer is not None:
            self._mark = record_function(STEP)
            self._mark.__enter__()
        self.step += 1

    def _end(self) -> None:
        if self._tracer is None:
            return
        if self.device == "cuda":
            torch.cuda.synchronize()
        self._tracer.stop()
        self.found[self._frames] = events_of(self._tracer)
        self._tracer = None

    def text(self) -> str:
        """All tables; raises ValueError if the training had too few steps for both traces."""
        if len(self.found) < 2:
            raise ValueError(f"the training ended at step {self.step}; a profile needs {self.last} steps or more")
        return "\n".join([*summary(self.found[False], self.device), "", *idle(self.found[True], self.device)]) + "\n"


def steady(events: Sequence[Event]) -> tuple[list[Event], float, float]:
    """The marks of all steps but the first, and when the second one begins and the last one ends."""
    marks = [event for event in events if event["name"] == STEP and event["cat"] == "user_annotation"][1:]
    return marks, marks[0]["ts"], marks[-1]["ts"] + marks[-1]["dur"]


def on_device(events: Sequence[Event], device: str, begin: float, end: float) -> list[Event]:
    kinds = ON_GPU if device == "cuda" else {"cpu_op"}
    return [event for event in events if event["cat"] in kinds and begin <= event["ts"] < end]


def summary(events: Sequence[Event], device: str) -> list[str]:
    """Lines: time of a step, busy and idle, by launch, by group and by kernel."""
    marks, begin, end = steady(events)
    kernels, steps = on_device(events, device, begin, end), len(marks)
    holes = gaps_of(kernels, begin, end)
    whole, idle_time = (end - begin) / steps / 1e3, sum(after - before for before, after in holes) / steps / 1e3
    long = sum(after - before for before, after in holes if after - before > LONG_GAP) / steps / 1e3
    lines = [
        f"{steps} steps, milliseconds a step: {whole:.2f}; device busy {whole - idle_time:.2f}, idle {idle_time:.2f}, "
        f"of that {long:.2f} in gaps of more than {LONG_GAP / 1e3:g} ms",
    ]
    launched, single = by_launch(events, kernels, steps)
    lines += [
        "",
        "by launch: ms a step, kernels a step",
        *(f"{ms:9.3f} {count:7.1f}  {name}" for name, ms, count in launched),
    ]
    groups = dict.fromkeys(GROUPS, 0.0)
    for kernel in kernels:
        groups[group_of(kernel["name"])] += kernel["dur"]
    lines += ["", "by kind: ms a step", *(f"{value / steps / 1e3:9.3f}  {name}" for name, value in groups.items())]
    lines += ["", "longest kernels: ms a step, times a step", *table(kernels, steps, TOP)]
    lines += ["", "longest kernels that no graph holds: ms a step, times a step", *table(single, steps, TOP_SINGLE)]
    return lines


def by_launch(
    events: Sequence[Event], kernels: Sequence[Event], steps: int
) -> tuple[list[tuple[str, float, float]], list[Event]]:
    """(launch, ms a step, kernels a step) of each graph in its turn within a step, and of the kernels that none holds.

    Graphs are told apart by how many kernels they hold.
    """
    calls = {event["args"]["correlation"]: event for event in events if event["cat"] == "cuda_runtime"}
    held: dict[Any, list[Event]] = {}
    single = []
    for kernel in kernels:
        number = kernel.get("args", {}).get("correlation")
        if number in calls and "GraphLaunch" in calls[number]["name"]:
            held.setdefault(number, []).append(kernel)
        else:
            single.append(kernel)
    graphs: dict[int, list[list[Event]]] = {}
    for number in sorted(held, key=lambda number: calls[number]["ts"]):
        graphs.setdefault(len(held[number]), []).append(held[number])
    rows = [
        (
            f"graph of {size} kernels, {len(replays) / steps:.1f} times a step",
            sum(kernel["dur"] for replay in replays for kernel in replay) / steps / 1e3,
            size * len(replays) / steps,
        )
        for size, replays in graphs.items()
    ]
    rest = ("launched one by one", sum(kernel["dur"] for kernel in single) / steps / 1e3, len(single) / steps)
    return [*rows, rest], single


def table(kernels: Sequence[Event], steps: int, top: int) -> list[str]:
    times: dict[str, list[float]] = {}
    for kernel in kernels:
        times.setdefault(kernel["name"], []).append(kernel["dur"])
    longest = sorted(times.items(), key=lambda item: -sum(item[1]))[:top]
    return [f"{sum(each) / steps / 1e3:9.3f} {len(each) / steps:7.1f}  {name[:110]}" for name, each in longest]


def idle(events: Sequence[Event], device: str) -> list[str]:
    """Lines: the longest gaps of the trace with Python's frames, when they were, and what the host ran meanwhile."""
    marks, begin, end = steady(events)
    holes = gaps_of(on_device(events, device, begin, end), begin, end)
    chosen = sorted((hole for hole in holes if hole[1] - hole[0] > LONG_GAP), key=lambda hole: hole[0] - hole[1])
    lines = [f"gaps of more than {LONG_GAP / 1e3:g} ms in {len(marks)} steps, with frames (slower): {len(chosen)}"]
    lines.append("ms, ms after the step's begin, what ran most of the time <- in which of recover's own functions")
    thread = [event for event in events if event["tid"] == marks[0]["tid"]]
    for before, after in chosen[:TOP_GAPS]:
        start = max((mark["ts"] for mark in marks if mark["ts"] <= before), default=begin)
        inner, own = running(thread, before, after)
        lines.append(f"{(after - before) / 1e3:8.2f} {(before - start) / 1e3:8.2f}  {inner} <- {own}")
    return lines


def running(thread: Sequence[Event], before: float, after: float) -> tuple[str, str]:
    """The innermost call at most points of the time between, and the innermost one of recover's own code."""
    kinds = {"python_function", "cpu_op", "cuda_runtime", "cuda_driver"}
    near = [event for event in thread if event["ts"] <= after and event["ts"] + event["dur"] >= before]
    near = [event for event in near if event["cat"] in kinds]
    inner: Counter[str] = Counter()
    own: Counter[str] = Counter()
    for point in (before + (after - before) * (number + 0.5) / POINTS for number in range(POINTS)):
        there = [event["name"] for event in near if event["ts"] <= point <= event["ts"] + event["dur"]]
        inner[there[-1] if there else "nothing traced"] += 1  # by start: the last one is the innermost
        own[next((name for name in reversed(there) if "recover/" in name), "-")] += 1
    return inner.most_common(1)[0][0][:90], own.most_common(1)[0][0][-90:]


def gaps_of(kernels: Sequence[Event], begin: float, end: float) -> list[tuple[float, float]]:
    """Stretches between `begin` and `end` in which nothing runs."""
    found, until = [], begin
    for kernel in kernels:
        if kernel["ts"] > until:
            found.append((until, kernel["ts"]))
        until = max(until, kernel["ts"] + kernel["dur"])
    return [*found, (until, end)] if until < end else found


def write(folder: Path, name: str, text: str) -> Path:
    """Put a profile on record; where it lies."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.txt"
    path.write_text(text)
    return path
