"""All rows of the benchmark as one Markdown table, in the order of their families and not of their making."""

from __future__ import annotations

import math
from typing import Any

FAMILIES = ("dense", "attention", "mlp", "block", "wanda", "rounded")
NAMES: dict[str, str] = {"attention": "attentions", "mlp": "MLPs", "block": "blocks"}
WANDA: dict[str, str] = {"wanda-50": "Wanda 50%", "wanda-4of8": "Wanda 4:8", "wanda-2of4": "Wanda 2:4"}
ROUNDED: dict[str, str] = {"int4": "4 bits, to nearest", "int6": "6 bits, to nearest"}
KINDS = {"generate": "exact_match", "choice": "accuracy", "retrieval": "score"}  # of a task -> its score
COLUMNS = (
    "KL",
    "Var_p/2",
    "1−cos h",
    "1−cos z",
    "1−cos p",
    "same top token",
    "KL, own texts",
    "KL in options",
    "KL at options, vocabulary",
    "same choice",
)


def ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by family, then by count, then as they were made; of a row made twice the last."""
    last = {row["row"]: row for row in rows}
    return sorted(last.values(), key=lambda row: (FAMILIES.index(row["family"]), row["count"] or 0))


def title(row: dict[str, Any]) -> str:
    """What a reader calls it."""
    if row["count"]:
        name = NAMES[row["family"]].removesuffix("s") if row["count"] == 1 else NAMES[row["family"]]
        return f"{row['count']} {name}"
    return str((WANDA | ROUNDED).get(row["row"], row["row"]))


def scored(tasks: dict[str, Any]) -> dict[str, tuple[float, list[float]]]:
    """(score, its 95% interval) of each task that has a share of right items."""
    return {
        name: (record[KINDS[record["kind"]]], record["interval95"])
        for name, record in tasks.items()
        if record["kind"] in KINDS
    }


def uses(row: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """(score, low, high) of each use: the mean of its tasks, half widths of their 95% intervals added in squares."""
    found = {}
    for kind in KINDS:
        values = [value for name, value in scored(row["tasks"]).items() if row["tasks"][name]["kind"] == kind]
        if values:
            mean = sum(value for value, _ in values) / len(values)
            low = math.hypot(*(value - interval[0] for value, interval in values)) / len(values)
            high = math.hypot(*(interval[1] - value for value, interval in values)) / len(values)
            found[kind] = (mean, max(mean - low, 0.0), min(mean + high, 1.0))
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table; what was not measured is a dash."""
    rows = ordered(rows)
    tasks = list(scored(rows[0]["tasks"]))
    head = ["", "in blocks", "non-zero", *tasks, "perplexity", *COLUMNS]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    lines += ["| " + " | ".join(_cells(row, tasks)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any], tasks: list[str]) -> list[str]:
    found, final, asked = scored(row["tasks"]), row["drift"]["final"], row["choice"] or {}
    cells = [title(row), _spans(row["dropped"]), f"{row['nonzero']:.1%}"]
    cells += [_percent(*found[name]) if name in found else "–" for name in tasks]
    cells.append(_number(row["headline"]["perplexity"]))
    cells += [_number(final[name]["mean"]) for name in ("kl", "kl_predicted", "embedding", "logit", "probability")]
    cells.append(f"{final['top1']['mean']:.1%}")
    cells.append(_number(_own(row)))
    cells += [_number((asked.get(part) or {}).get("kl", {}).get("mean")) for part in ("drift", "vocabulary")]
    same = (asked.get("likelihood") or {}).get("same_choice")
    return [*cells, "–" if same is None else f"{same:.1%}"]


def _own(row: dict[str, Any]) -> float | None:
    """Mean KL where each view has read its own text, over all positions."""
    total = row["drift"].get("steps", {}).get("total")
    if total is None:
        return None
    return sum(kl * n for kl, n in zip(total["kl"]["mean"], total["n"], strict=True)) / sum(total["n"])


def _percent(value: float, interval: list[float]) -> str:
    return f"{value:.1%} [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


def _number(value: float | None) -> str:
    """Three digits, and what is no more than rounding as 0."""
    if value is None:
        return "–"
    return "0" if abs(value) < 1e-8 else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _spans(blocks: list[int]) -> str:
    """Runs of neighbours, such as 3, 5-7."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and runs[-1][-1] == block - 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs) or "–"
