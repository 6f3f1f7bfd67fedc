"""Where the time of a run goes: seconds of each stage by part, written to `times.jsonl` as stages end.

@part("verifying")                        with stage_clock() as clock:
def verify(...): ...                          work()
                                          clock.seconds, clock.parts

What a part does inside another one counts as its own: the parts of a stage add up to the stage. A GPU is not waited
for: its time counts where the program waits for what it computes. Beside them the most memory that the main process
held at once in the stage, its own and of its GPU, where the system tells.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from recover.base import artifacts, earlier

FILE = "times.jsonl"
OTHER = "other"
_clock = time.perf_counter


@dataclass
class Clock:
    """Seconds of one stage, in all and by part in the order in which they first ended; bytes at most, by PLACES."""

    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)


@dataclass
class _Open:
    name: str
    since: float


class StageTime(TypedDict):
    """What a stage took, by part; `calls`: so many times it was begun until it was done. `memory`: bytes at most."""

    stage: str
    seconds: float
    calls: int
    parts: dict[str, float]
    memory: NotRequired[dict[str, int]]


class TimeLine(TypedDict):
    """A line of times.jsonl; `done`: False of a stage that was stopped or failed."""

    stage: str
    done: bool
    seconds: float
    parts: dict[str, float]
    memory: NotRequired[dict[str, int]]


_open: list[_Open] = []
_running: list[Clock] = []


@contextmanager
def stage_clock() -> Iterator[Clock]:
    """Parts inside the body are counted on the clock given here; the time outside of parts as OTHER."""
    clock, began = Clock(), _clock()
    outer = _open[:], _running[:]
    for other in outer[1]:
        other.memory = _larger(other.memory, _peaks())
    _forget_peaks()
    _open.clear()
    _running[:] = [clock]
    try:
        with part(OTHER):
            yield clock
    finally:
        clock.seconds = _clock() - began
        clock.memory = _larger(clock.memory, _peaks())
        _open[:], _running[:] = outer


PLACES = ("process", "gpu")
HIGHEST = re.compile(r"^VmHWM:\s*(\d+) kB$", re.MULTILINE)  # of /proc/self/status
_tells: list[bool] = []  # whether the system forgets a process's peak when it is asked to


def _forget_peaks() -> None:
    """From here on the peaks are those of what follows. A system that cannot do that is not asked for them."""
    _tells[:] = [False]
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        _tells[:] = [True]
    if (torch := _torch_with_gpu()) is not None:
        torch.cuda.reset_peak_memory_stats()


def _peaks() -> dict[str, int]:
    """Bytes at most since `_forget_peaks`, of the places that tell."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError):
        highest = HIGHEST.search(Path("/proc/self/status").read_text()) if _tells == [True] else None
        found |= {"process": int(highest[1]) * 1024} if highest else {}
    if (torch := _torch_with_gpu()) is not None:
        found["gpu"] = int(torch.cuda.max_memory_allocated())
    return found


def _torch_with_gpu() -> Any:
    """torch, if something has imported it and uses a GPU: it is not imported for this."""
    torch: Any = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None


def _larger(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {place: max(one.get(place, 0), other.get(place, 0)) for place in PLACES if place in {**one, **other}}


@contextmanager
def part(name: str) -> Iterator[None]:
    """Inside the body (or the function decorated), time counts for this part; without a stage, for none."""
    _pause()
    _open.append(_Open(name, _clock()))
    try:
        yield
    finally:
        _pause()
        _open.pop()
        if _open:
            _open[-1].since = _clock()


def _pause() -> None:
    """Count what the innermost part took since it began, or went on."""
    if _open and _running:
        now, parts, here = _clock(), _running[-1].parts, _open[-1]
        parts[here.name] = parts.get(here.name, 0.0) + now - here.since
        here.since = now


def note(root: Path, stage: str, clock: Clock, *, done: bool) -> None:
    """Put a stage's seconds on record, those of one that was stopped or failed too."""
    record: TimeLine = {"stage": stage, "done": done, "seconds": clock.seconds, "parts": clock.parts}
    if clock.memory:
        record["memory"] = clock.memory
    artifacts.append_jsonl(root / FILE, record)


def spent(root: Path) -> list[StageTime]:
    """What each stage took that was begun, in the order of a run.

    A stage that was stopped and went on took what all those calls did; one that is done again only what this took.
    """
    path = root / FILE
    lines: list[TimeLine] = artifacts.read_jsonl(path) if path.is_file() else []
    found: dict[str, StageTime] = {}
    done: set[str] = set()
    for line in lines:
        stage, parts = earlier.current(line["stage"]), line["parts"]
        before = found.get(stage) if stage not in done else None
        if before is None:
            before = StageTime(stage=stage, seconds=0.0, calls=0, parts={})
        known = {name: before["parts"].get(name, 0.0) for name in {**before["parts"], **parts}}
        found[stage] = {
            "stage": stage,
            "seconds": before["seconds"] + line["seconds"],
            "parts": {name: seconds + parts.get(name, 0.0) for name, seconds in known.items()},
            "calls": before["calls"] + 1,
        }
        if memory := _larger(before.get("memory", {}), line.get("memory", {})):
            found[stage]["memory"] = memory
        done = done | {stage} if line["done"] else done - {stage}
    return list(found.values())
