"""Where the time of recover's writing goes: phases of a run, then its kernels and the gaps between them.

On a CPU the same tables are of operators instead of kernels: they nest, so shares add up to more than the whole.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from trace_events import ON_GPU, events_of, gaps, longest, span

from recover.base import console
from recover.text import decode
from recover.text.decode import Writing, write

PHASES = {
    "_read_group": "prompts read",
    "_record": "graphs recorded (within steps)",
    "_advance": "steps",
    "_shrink": "rows given up",
}
TRACED_TOKENS = 64  # a text: a trace holds every kernel
TOP = 14
ON_DEVICE = {"cuda": ON_GPU, "cpu": {"cpu_op"}}  # categories of a trace
LAUNCHES = ("cudaGraphLaunch", "cudaLaunchKernel", "cudaStreamSynchronize", "cudaMemcpyAsync")


def profile(model: Any, prompts_ids: Sequence[list[int]], how: Writing) -> dict[str, Any]:
    """Prints and returns phases (with a wait for the device around each), busy shares, top kernels, and gaps.

    The second half of a trace is steady decoding: there, a device that is busy all the time is bound by the kernels
    in the table, one that is not by what the host does between them.
    """
    phases = _phases(model, prompts_ids, how)
    console.table("phases, one pass over one batch", ["phase", "calls", "seconds", "share"], phases)
    events = _trace(model, prompts_ids, dataclasses.replace(how, limit=min(how.limit, TRACED_TOKENS)))
    found: dict[str, Any] = {"phases": phases}
    for part, chosen in {"whole": events, "second half": _second_half(events, model.device.type)}.items():
        found[part] = _summary(chosen, model.device.type)
        _show(part, found[part])
    return found


def _phases(model: Any, prompts_ids: Sequence[list[int]], how: Writing) -> list[list[Any]]:
    spent: dict[str, list[float]] = {name: [] for name in PHASES}
    with _watched(spent):
        start = _now()
        for _ in write(model, prompts_ids, how):
            pass
        whole = _now() - start
    rows = [[PHASES[name], len(calls), sum(calls), f"{sum(calls) / whole:.1%}"] for name, calls in spent.items()]
    return [*rows, ["whole pass", 1, whole, "100.0%"]]


@contextmanager
def _watched(spent: dict[str, list[float]]) -> Iterator[None]:
    """The writer's methods, timed."""

    def timed(method: Callable[..., Any], calls: list[float]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = _now()
            found = method(*arguments)
            calls.append(_now() - start)
            return found

        return call

    homes = {name: decode.Recorder if name == "_record" else decode._Writer for name in spent}
    own = {name: getattr(home, name) for name, home in homes.items()}
    for name, home in homes.items():
        setattr(home, name, timed(own[name], spent[name]))
    try:
        yield
    finally:
        for name, home in homes.items():
            setattr(home, name, own[name])


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _trace(model: Any, prompts_ids: Sequence[list[int]], how: Writing) -> list[dict[str, Any]]:
    """The events of a pass, each with `name`, `cat`, `ts` and `dur` in microseconds, by start."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (model.device.type == "cuda")
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in write(model, prompts_ids, how):
            pass
        _now()
    return events_of(profiler)


def _second_half(events: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    on_device = [event for event in events if event.get("cat") in ON_DEVICE[device]]
    middle = (on_device[0]["ts"] + on_device[-1]["ts"]) / 2
    return [event for event in events if event["ts"] >= middle]


def _summary(events: list[dict[str, Any]], device: str) -> dict[str, Any]:
    on_device = [event for event in events if event.get("cat") in ON_DEVICE[device]]
    idle, whole = gaps(on_device), span(on_device)
    return {
        "milliseconds": whole / 1e3,
        "busy": 1 - sum(idle) / whole,
        "kernels": len(on_device),
        "gaps_over_20_us": len([gap for gap in idle if gap > 20]),
        "milliseconds_in_them": sum(gap for gap in idle if gap > 20) / 1e3,
        "launches": {name: sum(event["name"] == name for event in events) for name in LAUNCHES},
        "top": [
            {"name": name, "calls": len(times), "us": sum(times) / len(times), "share": sum(times) / whole}
            for name, times in longest(on_device, TOP)
        ],
    }


def _show(part: str, found: dict[str, Any]) -> None:
    console.say(
        f"{part} of a trace: {found['milliseconds']:.1f} ms, device busy {found['busy']:.1%}, {found['kernels']:,} "
        f"kernels; {found['gaps_over_20_us']:,} gaps over 20 us take {found['milliseconds_in_them']:.1f} ms; from the "
        f"host: " + ", ".join(f"{count:,} {name}" for name, count in found["launches"].items())
    )
    rows = [[f"{top['share']:.1%}", top["calls"], round(top["us"], 1), top["name"][:90]] for top in found["top"]]
    console.table(f"top kernels, {part}", ["share", "calls", "us each", "kernel"], rows)
