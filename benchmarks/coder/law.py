"""What KL along the dense model's own texts says of generation kept, by the length of answers; and how KL falls.

    python benchmarks/coder/law.py OUT [--results FILE] [--other NAME FILE-OR-RUN ...] [--other ...]

OUT is the folder of experiments.py, as for decisive.py. `--other`: another model's name, then its results.jsonl or run
folders; of these the figures alone are read. Only recovered models count.

1. By task: c of kept = exp(-c KL), beside the mean length of dense's answers. Of a choice, kept is above chance.
2. By length within a task: the items that dense gets right in three equal parts, shortest first, and c of each.
3. kept = exp(-k KL length) of generation as a whole: k of each model, how far runs of the other lie off, and how far
   each pruning's runs lie off where k is fitted without it.
4. KL against tokens: the power between budgets of one pruning.
5. What the first twentieth of a training foretells of KL at its end: error on prunings left out of the fit.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from decisive import decay, power_law, table
from experiments import DONE, read_rows
from judged import Judged, judged
from rows import Row, read_row

from recover.base.artifacts import read_jsonl
from recover.config.defaults import KEPT_BAND
from recover.run.directory import RunDirectory

CHANCE = 0.25  # of ARC, which has four options
PARTS = 3  # by length
EARLY = (0.025, 0.05)  # share of the tokens: behind the first half of warm-up
ASIDE = "+full"  # variants that are measured on more tasks: their generation is not that of the others


@dataclass(frozen=True)
class Point:
    """A recovered model: KL in nats a token, the share of dense generation kept, mean tokens of dense's answers."""

    model: str
    pruning: str
    kl: float
    kept: float
    length: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of run directories")
    parser.add_argument("--results", type=Path, help="default: OUT/results.jsonl")
    parser.add_argument("--other", nargs="+", action="append", default=[], metavar="NAME", help="name, files, folders")
    given = parser.parse_args()
    rows = finished(read_rows(given.results or given.out / "results.jsonl"))
    models = {given.out.name: rows}
    models |= {name: [row for path in paths for row in rows_at(Path(path))] for name, *paths in given.other}
    runs = [judged(given.out / row["run"], row) for row in rows]
    points = [point for name, found in models.items() for row in found if (point := point_of(name, row))]
    parts = [by_task(models), by_length(runs), by_model(points), powers(rows), early(rows, given.out)]
    print("\n".join(part for part in parts if part))


def finished(rows: Sequence[Row]) -> list[Row]:
    """Those with a recovered model and its KL."""
    return [row for row in rows if row.get("status", DONE) == DONE and "kl" in row.get("recovered", {})]


def rows_at(path: Path) -> list[Row]:
    """Of a results.jsonl; or the one of a run, with the KL of its best epoch where the recovered model has no probe."""
    if path.is_file():
        return finished(read_rows(path))
    row = {"run": path.name, "pruning": path.name.partition("-")[0], "seed": path.name, **read_row(path)}
    best = max(row["epochs"], key=lambda each: (each["score"], -each["epoch"]))
    row["recovered"].setdefault("kl", best["kl"])
    return finished([row])


def point_of(model: str, row: Row) -> Point | None:
    """Of generation as a whole, tasks alike; None where tasks were added to the usual ones."""
    tasks = {name: task for name, task in row["dense"]["tasks"].items() if "length" in task}
    if ASIDE in row.get("variant", ""):
        tasks = {name: task for name, task in tasks.items() if name in ("gsm8k", "humaneval")}
    if not tasks:
        return None
    dense, own = (np.mean([row[view]["tasks"][name]["value"] for name in tasks]) for view in ("dense", "recovered"))
    length = float(np.mean([task["length"] for task in tasks.values()]))
    return Point(model, row["pruning"] or "base", row["recovered"]["kl"]["mean"], float(own / dense), length)


def errors(points: Sequence[Point], k: float) -> np.ndarray:
    """Foretold less what is kept, of each."""
    return np.array([math.exp(-k * each.kl * each.length) - each.kept for each in points])


def per_nat(points: Sequence[Point]) -> float:
    """k of kept = exp(-k KL length)."""
    return decay([each.kl * each.length for each in points], [each.kept for each in points])


def root(values: np.ndarray) -> str:
    return f"{np.sqrt(np.mean(np.square(values))):.1%}"


def by_task(models: dict[str, list[Row]]) -> str:
    lines = []
    for model, rows in models.items():
        for task in dict.fromkeys(name for row in rows for name in row["recovered"]["tasks"]):
            found = [row for row in rows if task in row["dense"]["tasks"] and task in row["recovered"]["tasks"]]
            first = found[0]["dense"]["tasks"][task]
            choice = "accuracy_normalised" in first
            if not (choice or "length" in first):
                continue
            chance = CHANCE if choice else 0.0
            kl = [row["recovered"]["kl"]["mean"] for row in found]
            kept = [
                (row["recovered"]["tasks"][task]["value"] - chance) / (row["dense"]["tasks"][task]["value"] - chance)
                for row in found
            ]
            c, length = decay(kl, kept), first.get("length", 0.0)
            off = root(np.exp(-c * np.asarray(kl)) - np.asarray(kept))
            share = f"{c / length:.3f}" if length else "–"
            cells = [f"{length:.0f}", len(found), f"{min(kl):.3f} to {max(kl):.3f}", f"{c:.2f}", share, off]
            lines.append([f"{model}, {task}", *cells])
    heads = ["task", "length of answers", "runs", "KL", "c", "c / length", "error (rms)"]
    return table("## c by task", heads, lines)


def by_length(runs: Sequence[Judged]) -> str:
    """All runs that have dense's items of a task; parts of equal numbers of items that dense gets right."""
    lines = []
    for task in dict.fromkeys(name for run in runs for name in run.writing):
        pairs = [(run, both) for run in runs if task in run.writing and (both := run.both(task))]
        if len(pairs) < 3:
            continue
        length_N = np.array([len(ids) for ids in pairs[0][0].ids["dense"][task]])
        right_N = np.array(pairs[0][1][0])
        edges = [0, *np.quantile(length_N[right_N], np.arange(1, PARTS) / PARTS), math.inf]
        for low, high in itertools.pairwise(edges):
            part_N = (length_N >= low) & (length_N < high)
            kl = [run.row["recovered"]["kl"]["mean"] for run, _ in pairs]
            kept = [(np.array(own) & part_N).sum() / (right_N & part_N).sum() for _, (_, own) in pairs]
            c, middle = decay(kl, kept), float(np.median(length_N[part_N & right_N]))
            items, right = int(part_N.sum()), int((part_N & right_N).sum())
            lines.append([task, f"{middle:.0f}", items, right, f"{c:.2f}", f"{c / middle:.3f}"])
    heads = ["task", "median length", "items", "dense right", "c", "c / length"]
    return table("## c by the length of dense's answers, within a task", heads, lines) if lines else ""


def by_model(points: Sequence[Point]) -> str:
    lines = []
    for model in dict.fromkeys(point.model for point in points):
        own, others = ([p for p in points if (p.model == model) == same] for same in (True, False))
        off = errors(own, per_nat(others)) if others else np.zeros(0)
        told = [root(off), f"{np.abs(off).max():.1%}"] if len(off) else ["–", "–"]
        length = np.mean([point.length for point in own])
        lines.append([f"{model}, {len(own)} runs", f"{length:.0f}", f"{per_nat(own):.4f}", *told])
    left_out = []
    for which in dict.fromkeys((point.model, point.pruning) for point in points):
        mine, rest = ([p for p in points if ((p.model, p.pruning) == which) == same] for same in (True, False))
        if rest:
            left_out += [*errors(mine, per_nat(rest))]
    inside = float(np.mean(np.abs(left_out) <= KEPT_BAND)) if left_out else math.nan
    said = f"k = {per_nat(points):.4f}; prunings left out: error {root(np.array(left_out))}, {inside:.0%} within "
    heads = ["model", "length of answers", "k", "error by the others' k (rms)", "largest"]
    return table(f"## kept = exp(-k KL length): {said}{100 * KEPT_BAND:.0f} points", heads, lines)


def powers(rows: Sequence[Row]) -> str:
    """Of each pruning with two budgets or more, over all of its runs."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if ASIDE not in row.get("variant", ""):
            groups[row["pruning"] or "base"].append(row)
    lines = []
    for pruning, group in groups.items():
        budgets = sorted({round(row["tokens"] / 1e5) / 10 for row in group})
        if len(budgets) < 2:
            continue
        _, b, off = power_law([row["tokens"] for row in group], [row["recovered"]["kl"]["mean"] for row in group])
        shown = ", ".join(f"{each:g}M" for each in budgets)
        lines.append([pruning, len(group), shown, f"{b:+.2f}", f"{math.exp(max(map(abs, off))) - 1:.0%}"])
    return (
        table("## KL against tokens", ["pruning", "runs", "budgets", "power", "farthest off"], lines) if lines else ""
    )


def early(rows: Sequence[Row], out: Path) -> str:
    """ln KL(end) from the logarithms of: KL of the pruned model, tokens, training KL over EARLY of the tokens.

    Prunings weigh alike, and each is foretold by a fit without it.
    """
    found = [(row, loss) for row in rows if (loss := _early_kl(out / row["run"])) is not None]
    found = [(row, loss) for row, loss in found if "kl" in row["pruned"] and ASIDE not in row["variant"]]
    prunings = np.array([row["pruning"] or "base" for row, _ in found])
    if len(set(prunings)) < 5:
        return ""
    known = np.log([[row["pruned"]["kl"]["mean"], row["tokens"], loss] for row, loss in found])
    end = np.log([row["recovered"]["kl"]["mean"] for row, _ in found])
    weights = np.array([1 / math.sqrt((prunings == each).sum()) for each in prunings])[:, None]
    lines = []
    for name, columns in {
        "pruned KL and tokens, no training": [0, 1],
        "first twentieth and tokens": [1, 2],
        "pruned KL, first twentieth, tokens": [0, 1, 2],
    }.items():
        design, off = np.c_[np.ones(len(end)), known[:, columns]], {}
        for pruning in dict.fromkeys(prunings):
            rest, mine = prunings != pruning, prunings == pruning
            fit = np.linalg.lstsq(design[rest] * weights[rest], end[rest] * weights[rest, 0], rcond=None)[0]
            off[pruning] = design[mine] @ fit - end[mine]
        middle = math.exp(np.sqrt(np.mean([np.mean(np.square(each)) for each in off.values()]))) - 1
        means = sorted((math.exp(each.mean()) - 1, pruning) for pruning, each in off.items())
        worst = ", ".join(f"{pruning} {value:+.0%}" for value, pruning in (means[0], means[-1]))
        lines.append([name, len(end), f"{middle:.0%}", worst])
    return table("## KL at the end, foretold", ["from", "runs", "error (rms of prunings)", "from, to"], lines)


def _early_kl(run: Path) -> float | None:
    """Mean KL per token of the steps in EARLY of the tokens; None without a log of steps."""
    path = RunDirectory(run).train / "steps.jsonl"
    steps = read_jsonl(path) if path.is_file() else []
    if not steps:
        return None
    tokens = np.array([step["tokens"] for step in steps], dtype=float)
    scored, kl = np.diff(tokens, prepend=0.0), np.array([step.get("kl", math.nan) for step in steps])
    part = np.isfinite(kl) & (tokens > EARLY[0] * tokens[-1]) & (tokens <= EARLY[1] * tokens[-1])
    return float((kl[part] * scored[part]).sum() / scored[part].sum()) if part.any() else None


if __name__ == "__main__":
    main()
