"""Tokens a second and memory of a 7B shape's training: one GPU, and several under each file of launch/, row by row."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job import Keep
from launching import Launch

from recover.base.artifacts import read_json

SCRIPT = "benchmarks/several_gpus/training_rate.py"


@dataclass(frozen=True)
class Row:
    """`options` of training_rate.py; efficiency is to the one-GPU row of the same ones, whose weights are whole."""

    launch: Launch
    options: tuple[str, ...] = ()
    sharded: bool = False

    @property
    def name(self) -> str:
        one = self.launch.engine == "one"
        where = "one GPU" if one else f"{self.launch.processes} x {self.launch.engine}"
        return " ".join([where, *self.options, *self.shards])

    @property
    def shards(self) -> list[str]:
        return ["--shard-weights"] if self.sharded else []


ALL, CUT = (), ("--blocks", "after_cut")


def rows(processes: int, engines: Sequence[str]) -> list[Row]:
    found: list[Row] = []
    for options in (ALL, CUT):
        found.append(Row(Launch("one", gpu=0), options))
        for engine in engines:
            found.append(Row(Launch(engine, processes), options))
            if engine != "zero3":  # which shares out all weights by itself
                found.append(Row(Launch(engine, processes), options, sharded=True))
    return found


def speed(out: Path, processes: int, engines: Sequence[str], seconds: float, more: Sequence[str], keep: Keep) -> None:
    """Each row, as long as there is time; a row that fails is a result too. `more`: for all of training_rate.py."""
    started = time.monotonic()
    for number, row in enumerate(rows(processes, engines)):
        if time.monotonic() - started > seconds:
            break
        file = out / f"rate-{number}.json"
        try:
            row.launch.run([SCRIPT, "--out", str(file), *row.options, *row.shards, *more], out / f"rate-{number}.log")
            keep({"row": row.name, "options": row.options, **read_json(file)})
        except RuntimeError as error:
            keep({"row": row.name, "options": row.options, "error": str(error)})
        print(f"{time.monotonic() - started:5.0f} s: {row.name}", flush=True)
    if time.monotonic() - started < seconds:
        side_by_side(out, processes, more, keep)


def side_by_side(out: Path, processes: int, more: Sequence[str], keep: Keep) -> None:
    """Trainings that know nothing of one another, one a GPU, at once: what sharing the machine alone costs."""
    files = [out / f"beside-{gpu}.json" for gpu in range(processes)]
    started = [
        Launch("one", gpu=gpu).start([SCRIPT, "--out", str(file), *more], file.with_suffix(".log"))
        for gpu, file in enumerate(files)
    ]
    codes = [process.wait() for process in started]
    for gpu, (file, code) in enumerate(zip(files, codes, strict=True)):
        if code == os.EX_OK:
            keep({"row": f"one GPU, number {gpu}, beside others", "options": ALL, **read_json(file)})


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    alone = {row["options"]: row for row in found if row.get("processes") == 1 and "beside" not in row["row"]}
    lines = [
        "| training | tokens/s | x one GPU | efficiency | ms | peak GB a GPU | loss, step 1 |",
        "|---|" + "---:|" * 6,
    ]
    for row in found:
        if "error" in row:
            lines.append(f"| {row['row']} | {row['error'][-200:]!r} | | | | | |")
            continue
        base = alone.get(row["options"])
        times = None if base is None else row["tokens_per_second"] / base["tokens_per_second"]
        peak = ", ".join(f"{value / 1e9:.1f}" for value in row["peak_bytes"])
        shown = ["", ""] if times is None else [f"{times:.2f}", f"{times / row['processes']:.1%}"]
        cells = [row["row"], f"{row['tokens_per_second']:,.0f}", *shown, f"{row['seconds'] * 1e3:,.0f}", peak]
        lines.append(f"| {' | '.join(cells)} | {row['losses'][0]:.6g} |")
    return lines
