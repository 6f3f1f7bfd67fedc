"""What came of the trials: a file that is rewritten as they come, and a table."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fault_dealing import Outcome, Row

from recover.base.artifacts import write_json

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "safetensors", "hypothesis")
FAILURES = 20  # of a row, whose text is kept
SHOWN = 300  # characters of a failure that are printed where a file keeps all of them
WRITE_SECONDS = 3


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "cores": len(os.sched_getaffinity(0))}


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


class Report:
    """Counts of each row; `out`, if given, always holds a whole state, at most seconds old."""

    def __init__(self, rows: dict[str, Row], out: Path | None, options: dict[str, Any], started: float) -> None:
        self.rows, self.out, self.started, self.written = rows, out, started, 0.0
        self.head = {"machine": machine(), "versions": versions(), **options}
        self.tried: Counter[str] = Counter()
        self.survived: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.longest: Counter[str] = Counter()
        self.failures: dict[str, list[str]] = {name: [] for name in rows}
        self.measured: dict[str, dict[str, float]] = {name: {} for name in rows}
        self.write()

    def keep(self, outcome: Outcome) -> None:
        name = outcome.row
        self.tried[name] += 1
        self.survived[name] += outcome.problem is None
        self.seconds[name] += outcome.seconds  # type: ignore[assignment]
        self.longest[name] = max(self.longest[name], outcome.seconds)  # type: ignore[assignment]
        for what, value in outcome.measured.items():
            self.measured[name][what] = max(value, self.measured[name].get(what, -math.inf))
        if outcome.problem is not None:
            self.failures[name].append(f"trial {outcome.number}: {outcome.problem}")
            text = self.failures[name][-1]
            print(f"{name}: {text if self.out is None else text[:SHOWN]}", file=sys.stderr, flush=True)
        if time.time() - self.written > WRITE_SECONDS:
            self.write()

    def fine(self) -> bool:
        return self.survived == self.tried

    def row(self, name: str) -> dict[str, Any]:
        return {
            "what": self.rows[name].what,
            "survived": self.survived[name],
            "tried": self.tried[name],
            "intended": self.rows[name].times,
            "seconds": round(self.seconds[name], 1),
            "longest_seconds": round(self.longest[name], 1),
            "longest": {what: round(value, 2) for what, value in self.measured[name].items()},
            "failed": len(self.failures[name]),
            "failures": self.failures[name][:FAILURES],
        }

    def write(self) -> None:
        self.written = time.time()
        if self.out is not None:
            seconds = round(self.written - self.started, 1)
            rows = {name: self.row(name) for name in self.rows}
            write_json(self.out, {**self.head, "seconds": seconds, "rows": rows})

    def table(self) -> str:
        """In Markdown."""
        lines = [
            f"{self.head['machine']['cpu']}, {self.head['machine']['cores']} cores, {self.head['jobs']} jobs, "
            f"{time.time() - self.started:.0f} s",
            "",
            "| row | fault | survived | seconds of work |",
            "|---|---|---|---|",
        ]
        for name in self.rows:
            row = self.row(name)
            counts = f"{row['survived']:,} of {row['tried']:,} (of {row['intended']:,})"
            longest = "".join(f"; {what}: at most {value:.1f}" for what, value in row["longest"].items())
            lines.append(f"| {name} | {row['what']}{longest} | {counts} | {row['seconds']:.0f} |")
        return "\n".join(lines)
