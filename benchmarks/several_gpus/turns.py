"""Rates of two shapes under each launch file (`rates.py`): all load their libraries at once, and compute in turn."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from job import Keep
from launching import POLL_SECONDS, Launch

from recover.base.artifacts import read_jsonl

SCRIPT = "benchmarks/several_gpus/rates.py"
ONE = ("7B", "0.5B", "0.5B+kernels")
WHOLE_AND_SHARED = ("7B", "7B+shards", "0.5B", "0.5B+shards")
NOTHING = 1e8  # bytes
WHOLE = ("7B", "0.5B")  # ZeRO-3 shares out all weights by itself


def turns(out: Path, processes: int, engines: Sequence[str], go: Path | None, more: Sequence[str], keep: Keep) -> None:
    """`go`: computing begins when this file is there; `more`: for all of rates.py. A launch that fails is a row too."""
    out.mkdir(parents=True, exist_ok=True)
    launches = [Launch("one", gpu=0), *(Launch(engine, processes) for engine in order(engines))]
    names = ["one GPU", *(f"{processes} x {each.engine}" for each in launches[1:])]
    files = [[out / f"turn-{number}.{kind}" for kind in ("jsonl", "go", "log")] for number in range(len(launches))]
    started = []
    for name, launch, (rows, turn, log) in zip(names, launches, files, strict=True):
        rows.unlink(missing_ok=True)
        turn.unlink(missing_ok=True)
        wanted = ONE if launch.engine == "one" else WHOLE if launch.engine == "zero3" else WHOLE_AND_SHARED
        words = [SCRIPT, "--rows", str(rows), "--launch", name, "--after", str(turn), *more, *wanted]
        started.append(launch.start(words, log))
    while go is not None and not go.exists():
        time.sleep(POLL_SECONDS)
    for name, process, (rows, turn, log) in zip(names, started, files, strict=True):
        turn.touch()
        kept = 0
        while True:
            ended = process.poll() is not None  # asked before rows are read: none comes after it
            found = read_jsonl(rows) if rows.exists() else []
            for row in found[kept:]:
                keep(row)
            kept = len(found)
            if ended:
                break
            time.sleep(POLL_SECONDS)
        if process.returncode != os.EX_OK:
            end = log.read_text(errors="replace")[-1500:]
            keep({"row": name, "what": "", "error": f"exit code {process.returncode}: {end}"})


def order(engines: Sequence[str]) -> list[str]:
    """What differs most from one another first: time may end before the last."""
    return sorted(engines, key=["gpu", "zero3", "zero2"].index)


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """Efficiency: to one GPU's row of the same shape, as one GPU trains by itself, and kernel by kernel."""
    alone = {row["what"]: row for row in found if row.get("processes") == 1}
    lines = [
        "| training | tokens/s | x one GPU | efficiency | to one kernel by kernel | ms | peak GB a GPU | first loss |",
        "|---|" + "---:|" * 7,
    ]
    for row in found:
        if "error" in row:
            lines.append(f"| {row['row']} | {row['error'][-200:]!r} |" + " |" * 6)
            continue
        shape, rate = row["what"].split("+")[0], row["tokens_per_second"]
        times = [rate / base["tokens_per_second"] for base in (alone.get(shape), alone.get(f"{shape}+kernels")) if base]
        shown = [f"{times[0]:.2f}", *(f"{each / row['processes']:.1%}" for each in times)] if times else []
        peak = ", ".join(f"{value / 1e9:.1f}" for value in row["peak_bytes"])
        if row["before_bytes"] > NOTHING:
            peak += f" ({row['before_bytes'] / 1e9:.1f} of them left over from the row before)"
        cells = [row["row"], f"{rate:,.0f}", *shown, *[""] * (3 - len(shown)), f"{row['seconds'] * 1e3:,.0f}", peak]
        lines.append(f"| {' | '.join(cells)} | {row['losses'][0]:.6g} |")
    return lines
