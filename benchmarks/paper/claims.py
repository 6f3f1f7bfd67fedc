"""What the paper claims beside what the rows show: figures only, the reader judges.

The paper's figures are read from its tables and vector figures (arXiv 2603.24652); its models are 50 times larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from table import ordered, title, uses

from recover.probe.tasks import rank_correlation

Row = dict[str, Any]
Rows = dict[str, Row]

STEPS = 48  # the paper's decoding steps
BITS = ("int4", "int6")
MOST = ("attention-8", "mlp-4", "block-3", "wanda-4of8")


def claims(rows: list[Row]) -> str:
    """A Markdown table: claim, the paper's figures, ours; a claim whose rows are missing is left out."""
    found = {row["row"]: row for row in ordered(rows)}
    lines = ["| claim | paper | here |", "|---|---|---|"]
    for claim, paper, here in CLAIMS:
        shown = "; ".join(here(found)) if "dense" in found else ""
        if shown:
            lines.append(f"| {claim} | {paper} | {shown} |")
    return "\n".join(lines) + "\n"


def _use(kind: str, names: tuple[str, ...]) -> Callable[[Rows], Iterator[str]]:
    """Scores of one use: dense, then each row."""

    def here(rows: Rows) -> Iterator[str]:
        for name in ("dense", *names):
            if name in rows and kind in uses(rows[name]):
                value, low, high = uses(rows[name])[kind]
                yield f"{title(rows[name])} {value:.1%} [{100 * low:.0f}, {100 * high:.0f}]"

    return here


def _paired(rows: Rows) -> Iterator[str]:
    """Accuracy less dense on the same questions. Only a changed choice changes it, which bounds its spread: 95%."""
    for name in ("attention-8", "attention-10", "mlp-2", "mlp-4", "block-2", "block-6", *BITS):
        asked = rows[name]["choice"] if name in rows else None
        if asked:
            accuracy, changed = asked["likelihood"]["accuracy"], 1 - asked["likelihood"]["same_choice"]
            less = accuracy["pruned"] - accuracy["dense"]
            half = 1.96 * math.sqrt(max(changed - less**2, 0.0) / asked["items"])
            yield f"{title(rows[name])} {100 * less:+.1f} ± {100 * half:.1f}, {changed:.0%} of answers changed"


def _cliff(rows: Rows) -> Iterator[str]:
    """The first count at which generation is at most half of the dense model's, and choice there."""
    for family in ("attention", "mlp", "block"):
        series = [row for row in rows.values() if row["family"] == family]
        half = uses(rows["dense"]).get("generate", (0.0,))[0] / 2
        fallen = next((row for row in series if uses(row).get("generate", (1.0,))[0] <= half), None)
        if fallen is not None and "choice" in uses(fallen):
            choice, dense = uses(fallen)["choice"][0], uses(rows["dense"])["choice"][0]
            yield f"generation is halved at {title(fallen)}, with choice {choice:.1%} of {dense:.1%}"


def _spaces(rows: Rows) -> Iterator[str]:
    for name in MOST:
        if name in rows:
            final = rows[name]["drift"]["final"]
            h, z, p = (f"{final[space]['mean']:.3f}" for space in ("embedding", "logit", "probability"))
            yield f"{title(rows[name])} {h} / {z} / {p}"


def _hierarchy(rows: Rows) -> Iterator[str]:
    """In how many blocks p drifts less than h, of those in which anything drifts."""
    for name in MOST:
        blocks = rows[name]["drift"].get("blocks", []) if name in rows else []
        moved = [block for block in blocks if block["embedding"]["mean"] > 0]
        if moved:
            less = sum(block["probability"]["mean"] < block["embedding"]["mean"] for block in moved)
            yield f"{title(rows[name])}: in {less} of {len(moved)} blocks"


def _last(rows: Rows) -> Iterator[str]:
    """In how many rows p drifts more than h at the last layer: by their means, and at the median position."""
    finals = [row["drift"]["final"] for row in rows.values() if row["family"] != "dense"]
    for tail, words in (("mean", "means"), ("p50", "medians")):
        more = [final["probability"][tail] > final["embedding"][tail] for final in finals]
        if more:
            yield f"{words}: in {sum(more)} of {len(more)} rows"


def _ranks(rows: Rows) -> Iterator[str]:
    """Rank correlation of each space's drift with the scores of each use, over all rows but the dense one."""
    others = [row for row in rows.values() if row["family"] != "dense"]
    for use in uses(rows["dense"]) if len(others) > 2 else ():
        scores = torch.tensor([uses(row)[use][0] for row in others])
        found = []
        for metric, short in (("embedding", "h"), ("logit", "z"), ("probability", "p"), ("kl", "KL")):
            drift = torch.tensor([row["drift"]["final"][metric]["mean"] for row in others])
            found.append(f"{short} {rank_correlation(drift, scores):.2f}")
        yield f"{use}: {', '.join(found)}"


def _growth(rows: Rows) -> Iterator[str]:
    """The direct error at the first token, and early and late."""
    for name in (*MOST, *BITS):
        steps = rows[name]["drift"].get("steps", {}) if name in rows else {}
        if "forced" in steps:
            parts = [_mean(steps["forced"], "kl", *span) for span in ((0, 1), (1, 8), (8, STEPS), (STEPS, 64))]
            yield f"{title(rows[name])} {' / '.join('–' if math.isnan(part) else f'{part:.3g}' for part in parts)}"


def _options(rows: Rows) -> Iterator[str]:
    for name in (*MOST, *BITS):
        asked = rows[name]["choice"] if name in rows else None
        if asked and asked["subspace"]:
            inside, whole = (asked[part]["kl"]["mean"] for part in ("drift", "vocabulary"))
            same = asked["likelihood"]["same_choice"]
            yield f"{title(rows[name])} {inside:.3g} of {whole:.3g}, same choice {same:.1%}"
    asked = rows["dense"]["choice"]
    if asked and asked["subspace"]:
        yield f"mass on the option tokens, dense: {asked['mass']['dense']['mean']:.2g}"


def _steps(rows: Rows) -> Iterator[str]:
    for name in (*BITS, "attention-8", "wanda-4of8"):
        steps = rows[name]["drift"].get("steps", {}) if name in rows else {}
        if "total" in steps:
            kl, var = _mean(steps["forced"], "kl"), 2 * _mean(steps["forced"], "kl_predicted")
            own, total = _mean(steps["own"], "kl"), _mean(steps["total"], "kl")
            yield (
                f"{title(rows[name])}: KL {kl:.3g}, Var_p {var:.3g}, KL {own:.3g} on its own text and {total:.3g} "
                "with each on its own"
            )


def _mean(steps: dict[str, Any], metric: str, first: int = 0, end: int = STEPS) -> float:
    """Over all positions of these steps; NaN where no text is so long."""
    n, values = steps["n"][first:end], steps[metric]["mean"][first:end]
    return sum(value * count for value, count in zip(values, n, strict=True)) / sum(n) if n else math.nan


def _predictors(rows: Rows) -> Iterator[str]:
    finals = [row["drift"]["final"] for row in rows.values() if row["family"] != "dense"]
    if len(finals) < 3:
        return
    for metric, words in (("kl", "KL by Var_p / 2"), ("probability", "1 − cos p by Var_r / 2")):
        predicted, exact = ([final[f"{metric}{tail}"]["mean"] for final in finals] for tail in ("_predicted", ""))
        ratios = sorted(a / b for a, b in zip(predicted, exact, strict=True) if b > 0)
        order = rank_correlation(torch.tensor(predicted), torch.tensor(exact))
        yield f"{words}: x{ratios[0]:.2g} to x{ratios[-1]:.2g} over {len(ratios)} rows, rank correlation {order:.2f}"


def _parting(rows: Rows) -> Iterator[str]:
    for name in (*MOST, *BITS):
        found = rows[name]["drift"].get("divergence") if name in rows else None
        if found:
            first = "–" if found["first"]["p50"] is None else f"{found['first']['p50']:.0f}"
            yield f"{title(rows[name])}: {found['never']:.0%} never part, the others at token {first} (median)"


CLAIMS: tuple[tuple[str, str, Callable[[Rows], Iterator[str]]], ...] = (
    (
        "choice stands when attention goes",
        "Mistral-7B, 8 of 32: MMLU 62.1 to 62.0, five-task mean 69.3 to 69.8",
        _use("choice", ("attention-4", "attention-8", "attention-12")),
    ),
    ("... choice against dense, points, on the same questions", "not reported", _paired),
    (
        "generation does not",
        "GSM8K 48.4 to 36.2, HumanEval 4.9 to 0",
        _use("generate", ("attention-4", "attention-8", "attention-12")),
    ),
    (
        "it falls off a cliff",
        "Qwen2.5-7B, attentions: GSM8K 75.6, 56.8 (3), 30.0 (4), 0 (5); MMLU 68.7 (5)",
        _cliff,
    ),
    (
        "choice without MLPs",
        "Mistral-7B, 8: MMLU 59.1; Qwen2.5-7B: 74.2, 62.0 (4), 33.0 (8)",
        _use("choice", ("mlp-4", "mlp-8")),
    ),
    ("generation without MLPs", "Mistral-7B, 8: GSM8K 48.4 to 0", _use("generate", ("mlp-4", "mlp-8"))),
    (
        "retrieval holds",
        "E5-Mistral, BEIR nDCG: 58.9; 53.4 (8 attentions), 56.8 (8 MLPs)",
        _use("retrieval", ("attention-8", "mlp-4", "mlp-8")),
    ),
    ("h and z drift little, p more: 1 − cos h / z / p", "shown as cosines by layer", _spaces),
    ("... in every block", "p drifts less than h in 10 of 28 (means)", _hierarchy),
    ("... at the last layer", "not reported", _last),
    ("drift tells what is left: rank correlation with scores", "not reported", _ranks),
    ("the options' subspace drifts less than the vocabulary: KL", "shown for one question", _options),
    (
        "4 bits follow the dense text, pruning does not",
        f"{STEPS} steps, AWQ: KL .03, Var .13; Var of dropped attention 3.8, of Wanda 4:8 .9",
        _steps,
    ),
    (
        f"the error grows along the text: KL, both on the dense text, steps 0 / 1-7 / 8-{STEPS - 1} / {STEPS}-63",
        "shown by step",
        _growth,
    ),
    ("variance under p and r predicts drift", "second-order theory", _predictors),
    ("texts part early", "not reported", _parting),
)
