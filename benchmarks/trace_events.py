"""What a trace of torch's profiler holds: events with `name`, `cat`, and `ts` and `dur` in microseconds, by start."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.profiler import profile

Event = dict[str, Any]

ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories


def events_of(tracer: profile) -> list[Event]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        tracer.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return sorted((event for event in events if "dur" in event), key=lambda event: event["ts"])


def span(events: Sequence[Event]) -> float:
    """From the first one's start to the end of the last to end; 0 for none."""
    return max(event["ts"] + event["dur"] for event in events) - events[0]["ts"] if events else 0.0


def gaps(events: Sequence[Event]) -> list[float]:
    """Stretches in which nothing runs."""
    found, end = [], events[0]["ts"] if events else 0.0
    for event in events:
        if event["ts"] > end:
            found.append(event["ts"] - end)
        end = max(end, event["ts"] + event["dur"])
    return found


def longest(events: Sequence[Event], count: int) -> list[tuple[str, list[float]]]:
    """(name, durations) of the names that take most time together."""
    times: dict[str, list[float]] = {}
    for event in events:
        times.setdefault(event["name"], []).append(event["dur"])
    return sorted(times.items(), key=lambda item: -sum(item[1]))[:count]
