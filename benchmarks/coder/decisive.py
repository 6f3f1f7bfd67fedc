"""What decides whether generation comes back, read off finished runs item by item.

    python benchmarks/coder/decisive.py OUT [--vote RUN RUN RUN]

OUT is the folder of experiments.py: results.jsonl and, of each run, recipe.yaml, dense/ and after/ with measure.json,
generations.json and probe.json. Run with `measure.samples` no less than the items of a task, or code has no verdicts.

1. Each run: the share of dense kept, task by task, with a 95% interval of a bootstrap over items, the same items drawn
   of both; how many of dense's right items are held, and how many others are new.
2. Each run: how long texts stay the dense model's, KL and top token along the dense texts, length, and the rate
   r = -ln(kept) / length: kept = exp(-r length), as if each token could end an answer.
3. Rank correlation over runs of each figure with what is kept.
4. kept = exp(-c KL) over all runs, KL the mean along the dense texts: c, and how far each pruning's runs lie off where
   c is fitted without them.
5. Figures against tokens, where runs differ in nothing else: y = a tokens^b, b, and how far runs lie off.
6. Votes: the answer that most runs give, against dense.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from experiments import DONE, read_rows
from judged import Judged, judged
from rows import kept

RESAMPLES = 2000
TOKENS = "train.tokens="
Pairs = Sequence[tuple[Sequence[bool], Sequence[bool]]]  # of each task (dense, other) of the same items


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of run directories")
    parser.add_argument("--results", type=Path, help="default: OUT/results.jsonl")
    parser.add_argument(
        "--vote", nargs="+", metavar="RUN", help="runs that vote (default: all that have dense's items)"
    )
    given = parser.parse_args()
    rows = [row for row in read_rows(given.results or given.out / "results.jsonl") if row["status"] == DONE]
    runs = [judged(given.out / row["run"], row) for row in rows if "recovered" in row]
    if not runs:
        raise SystemExit(f"{given.out}: no finished run with figures of the recovered model")
    unknown = set(given.vote or ()) - {run.name for run in runs}
    if unknown:
        raise SystemExit(
            f"--vote {sorted(unknown)[0]}: no finished run; there are {', '.join(run.name for run in runs)}"
        )
    print(report(runs, given.vote))


def report(runs: Sequence[Judged], vote: Sequence[str] | None = None) -> str:
    """All tables."""
    figures = {run.name: figures_of(run) for run in runs}
    voters = [run for run in runs if vote is None or run.name in vote]
    parts = [shares(runs), texts(figures), correlations(figures), foretold(runs), laws(runs, figures), votes(voters)]
    return "\n".join(part for part in parts if part)


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [f"{title}\n", f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)]) + "\n"


def share_kept(pairs: Pairs) -> tuple[float, float, float] | None:
    """(share, low, high): mean over tasks of what is right, over dense's; 95%, items drawn anew in each task.

    None where dense has nothing right.
    """
    if not pairs or not any(any(dense) for dense, _ in pairs):
        return None
    random = np.random.default_rng(0)
    sums_2R = np.zeros((2, RESAMPLES))
    whole_2 = np.zeros(2)
    for dense, other in pairs:
        right_2N = np.array([dense, other], dtype=np.float64)
        drawn_RN = random.integers(right_2N.shape[1], size=(RESAMPLES, right_2N.shape[1]))
        sums_2R += right_2N[:, drawn_RN].mean(axis=2)
        whole_2 += right_2N.mean(axis=1)
    drawn_R = sums_2R[1][sums_2R[0] > 0] / sums_2R[0][sums_2R[0] > 0]
    low, high = np.percentile(drawn_R, [2.5, 97.5])
    return float(whole_2[1] / whole_2[0]), float(low), float(high)


def shares(runs: Sequence[Judged]) -> str:
    """Of each run and task: right, kept, held and new."""
    rows = []
    for run in runs:
        found = {task: pair for task in run.right.get("recovered", {}) if (pair := run.both(task))}
        for task, (dense, own) in found.items():
            held = sum(a and b for a, b in zip(dense, own, strict=True))
            counts = [f"{sum(own)} of {len(own)}", sum(dense), held, sum(own) - held]
            rows.append([run.name, task, *counts, _interval(share_kept([(dense, own)]))])
        writing = [pair for task, pair in found.items() if task in run.writing]
        if len(writing) > 1 and len(writing) == len(run.writing):
            rows.append([run.name, "generation", "", "", "", "", _interval(share_kept(writing))])
    heads = ["run", "task", "right", "dense right", "held", "new", "kept [95%]"]
    return table("## What is kept", heads, rows)


def figures_of(run: Judged) -> dict[str, float]:
    """Name -> figure of a run, those that it has."""
    found: dict[str, float] = {}
    share, length = kept(run.row, "recovered"), run.length("dense")
    if share is not None:
        found["kept"] = share
    if run.row.get("tokens"):
        found["tokens"] = run.row["tokens"]
    parted = [each for task in run.writing for each in run.parts_at(task)]
    if parted:
        found["parts at (median)"] = float(np.median([at for at, _ in parted]))
        found["equal texts"] = float(np.mean([same for _, same in parted]))
        found["length"] = run.length("recovered") or 0.0
    if share is not None and share > 0 and length:
        found["r"] = -math.log(share) / length
    found |= run.drift
    training = (run.row["epochs"] or [{}])[-1].get("train") or {}
    if "loss" in training:
        found["training loss"] = training["loss"]
    perplexity = run.row["recovered"].get("perplexity")
    return found if perplexity is None else {**found, "perplexity": perplexity}


def texts(figures: dict[str, dict[str, float]]) -> str:
    """The figures of each run."""
    names = list(dict.fromkeys(name for found in figures.values() for name in found))
    rows = [[run, *(_short(name, found.get(name)) for name in names)] for run, found in figures.items()]
    return table("## Texts and drift", ["run", *names], rows)


def _short(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name in ("kept", "equal texts", "top1"):
        return f"{value:.1%}"
    return f"{value:,.0f}" if name in ("tokens", "length") else f"{value:.4g}"


def ranks(values: Sequence[float]) -> np.ndarray:
    """From 1; equal ones share the mean of theirs."""
    array_N = np.asarray(values)
    return np.array([(array_N < value).sum() + ((array_N == value).sum() + 1) / 2 for value in array_N])


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's; None where one of them is constant."""
    ranks_2N = np.array([ranks(a), ranks(b)])
    return None if (ranks_2N.std(axis=1) == 0).any() else float(np.corrcoef(ranks_2N)[0, 1])


def correlations(figures: dict[str, dict[str, float]]) -> str:
    """Of each figure with `kept`, over the runs that have both; at least four."""
    rows = []
    for name in dict.fromkeys(name for found in figures.values() for name in found if name not in ("kept", "r")):
        both = [(found[name], found["kept"]) for found in figures.values() if name in found and "kept" in found]
        value = rank_correlation(*zip(*both, strict=True)) if len(both) >= 4 else None
        if value is not None:
            rows.append([name, len(both), f"{value:+.2f}"])
    return table("## Rank correlation with what is kept", ["figure", "runs", "rho"], rows) if rows else ""


def decay(kl: Sequence[float], share: Sequence[float]) -> float:
    """c of share = exp(-c KL), by least squares of the logarithm."""
    kl_N, log_N = np.asarray(kl), -np.log(np.maximum(share, 1e-3))
    return float((kl_N * log_N).sum() / np.square(kl_N).sum())


def foretold(runs: Sequence[Judged]) -> str:
    """What KL says of what is kept, of recovered models and of those that were not trained; by pruning."""
    found = {
        view: [
            (run.row["pruning"] or "base", run.row[view]["kl"]["mean"], share)
            for run in runs
            if "kl" in run.row.get(view, {}) and (share := kept(run.row, view)) is not None
        ]
        for view in ("recovered", "pruned")
    }
    recovered = found["recovered"]
    prunings = list(dict.fromkeys(pruning for pruning, _, _ in recovered))
    if len(prunings) < 3:
        return ""
    whole = decay([kl for _, kl, _ in recovered], [share for _, _, share in recovered])
    rows = []
    for view, points in found.items():
        for pruning in dict.fromkeys(each for each, _, _ in points):
            others = [(kl, share) for each, kl, share in recovered if each != pruning]
            c = decay(*zip(*others, strict=True))
            mine = [(kl, share) for each, kl, share in points if each == pruning]
            off = sorted({f"{math.exp(-c * kl) - share:+.1%}" for kl, share in mine}, key=lambda text: float(text[:-1]))
            shown = off if len(off) < 4 else [off[0], off[-1]]
            rows.append([view, pruning, len(mine), f"{c:.2f}", " to ".join(shown) if len(off) > 3 else ", ".join(off)])
    errors = [math.exp(-whole * kl) - share for _, kl, share in recovered]
    root = np.sqrt(np.mean(np.square(errors)))
    said = f"c = {whole:.2f}, {len(errors)} recovered runs: root mean square error {root:.1%}"
    heads = ["models", "pruning", "runs", "c of the others", "foretold, less what is kept"]
    return table(f"## kept = exp(-c KL): {said}", heads, rows)


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, list[float]]:
    """(a, b, residuals) of y = a x^b by least squares of logarithms; residuals: ln(y) - ln(a x^b)."""
    log_x, log_y = np.log(x), np.log(y)
    slope, intercept = np.polyfit(log_x, log_y, 1)
    return math.exp(intercept), float(slope), [float(each) for each in log_y - intercept - slope * log_x]


def laws(runs: Sequence[Judged], figures: dict[str, dict[str, float]]) -> str:
    """Power laws over tokens of runs that differ in tokens and seed alone, three budgets or more."""
    groups: dict[tuple[str, ...], list[Judged]] = defaultdict(list)
    for run in runs:
        groups[tuple(each for each in run.row["overrides"] if not each.startswith(TOKENS))].append(run)
    rows = []
    for group in groups.values():
        for name in ("r", "kl mean", "kl p99", "training loss"):
            points = [(run, figures[run.name]) for run in group if figures[run.name].get(name, 0) > 0]
            points = [(run, found) for run, found in points if "tokens" in found]
            if len({round(math.log10(found["tokens"]), 1) for _, found in points}) < 3:
                continue
            a, b, off = power_law([found["tokens"] for _, found in points], [found[name] for _, found in points])
            shown = ", ".join(
                f"{run.row['variant']} {math.exp(each) - 1:+.1%}" for (run, _), each in zip(points, off, strict=True)
            )
            at = {tokens: a * tokens**b for tokens in (1e8, 1e9)}
            rows.append([name, len(points), f"{b:+.3f}", *(f"{value:.3g}" for value in at.values()), shown])
    heads = ["figure", "runs", "exponent", "at 100M", "at 1,000M", "off the line"]
    return table("## Against tokens", heads, rows) if rows else ""


def majority(answers: Sequence[str | None]) -> str | None:
    """The answer that most give; of equally many the one that was given first; no answer does not count."""
    counts = Counter(answer for answer in answers if answer is not None)
    return counts.most_common(1)[0][0] if counts else None


def votes(runs: Sequence[Judged]) -> str:
    """Of each task with answers: one run in the mean, the vote, right in one or more, right in all, dense."""
    rows = []
    for task in dict.fromkeys(task for run in runs for task in run.answers.get("recovered", {})):
        voters = [run for run in runs if run.both(task) and task in run.answers.get("recovered", {})]
        voters = [run for run in voters if len(run.both(task)[1]) == len(voters[0].both(task)[1])]  # type: ignore[index]
        if len(voters) < 3:
            continue
        rights = np.array([run.right["recovered"][task] for run in voters])
        given = [run.answers["recovered"][task] for run in voters]
        dense = voters[0].right["dense"][task]
        voted = []
        for item in range(rights.shape[1]):
            chosen = majority([answers[item] for answers in given])
            voted.append(any(bool(rights[run, item]) for run in range(len(voters)) if given[run][item] == chosen))
        counts = [f"{rights.sum(axis=1).mean():.1f}", sum(voted), int(rights.any(axis=0).sum())]
        counts += [int(rights.all(axis=0).sum()), sum(dense)]
        rows.append([task, len(voters), rights.shape[1], *counts, _interval(share_kept([(dense, voted)]))])
    heads = ["task", "runs", "items", "one run", "vote", "in any", "in all", "dense", "vote keeps [95%]"]
    return table("## Votes: right items", heads, rows) if rows else ""


def _interval(found: tuple[float, float, float] | None) -> str:
    return "" if found is None else "{:.1%} [{:.1%}, {:.1%}]".format(*found)


if __name__ == "__main__":
    main()
