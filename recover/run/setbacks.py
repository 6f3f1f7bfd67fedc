"""What a recovery has made worse, found after each epoch: held against the pruned model, and the epochs before it.

Models are compared item by item, on the items that both were measured on, and only what is beyond noise counts
(`maths/score.py`). A record here has `measure` and `drift` as a line of epochs.jsonl has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, TypedDict

from recover.config.tasks import KINDS, USES
from recover.maths.score import Change, mean, of_means, of_ratio
from recover.report.data import EpochDrift, EpochLine, MeasureRecord, Setback


class Compared(TypedDict):
    """What a comparison reads of the pruned model, and of a line of epochs.jsonl."""

    measure: MeasureRecord
    drift: EpochDrift


def setbacks(now: Compared, pruned: Compared, epochs: Sequence[EpochLine]) -> list[Setback]:
    """What is worse `now` than in the pruned model, and than in the best of the `epochs` before.

    Against the pruned model: each use that is measured, perplexity, and KL along the dense model's own texts. Against
    epochs: generation by that which generated best, KL by that where it was lowest. A record of an earlier version,
    which holds no single items, is compared with nothing.
    """
    found = [_use(use, pruned, now, "pruned") for use in USES]
    found += [_perplexity(pruned, now, "pruned"), _kl(pruned, now, "pruned")]
    scored = [each for each in epochs if each.get("score") is not None]
    if scored:
        best = max(scored, key=lambda each: each["score"] or 0.0)
        found.append(_use("generation", best, now, f"epoch {best['epoch']}"))
    known = [each for each in epochs if _mean_kl(each) is not None]
    if known:
        lowest = min(known, key=lambda each: _mean_kl(each) or 0.0)
        found.append(_kl(lowest, now, f"epoch {lowest['epoch']}"))
    return [each for each in found if each is not None]


def _use(use: str, before: Compared, now: Compared, against: str) -> Setback | None:
    """Of a use, where more is better: the mean over its tasks."""
    pairs = list(_paired(before, now, lambda kind: KINDS[kind].use == use))
    change = of_means(pairs) if pairs else None
    if change is None or not change.fell:
        return None
    was, is_ = (mean([mean(pair[side]) for pair in pairs]) for side in (0, 1))
    return _setback(use, against, was, is_, change)


def _perplexity(before: Compared, now: Compared, against: str) -> Setback | None:
    """In nats per token, pooled over all texts, as the headline is."""
    pairs = list(_paired(before, now, lambda kind: kind == "perplexity"))
    was, is_ = (list(chain.from_iterable(pair[side] for pair in pairs)) for side in (0, 1))
    return _ratio("perplexity", was, is_, against)


def _kl(before: Compared, now: Compared, against: str) -> Setback | None:
    was, is_ = ((each.get("drift") or {}).get("each") or [] for each in (before, now))
    return _ratio("kl", was, is_, against)


def _ratio(figure: str, before: Sequence[Any], now: Sequence[Any], against: str) -> Setback | None:
    change = of_ratio(before, now)
    if change is None or not change.rose:
        return None
    was, is_ = (sum(each[0] for each in side) / sum(each[1] for each in side) for side in (before, now))
    return _setback(figure, against, was, is_, change)


def _paired(before: Compared, now: Compared, wanted: Any) -> Iterator[tuple[list[Any], list[Any]]]:
    """Of each task of a wanted kind, the main figures of the items that both measured, which are the first ones."""
    tasks = before["measure"]["tasks"]
    for name, task in now["measure"]["tasks"].items():
        if wanted(task["kind"]):
            sides = (tasks.get(name) or {}).get("each") or [], task.get("each") or []
            items = min(map(len, sides))
            yield sides[0][:items], sides[1][:items]


def _mean_kl(record: Compared) -> float | None:
    each = (record.get("drift") or {}).get("each")
    return sum(kl for kl, _ in each) / sum(positions for _, positions in each) if each else None


def _setback(figure: str, against: str, before: float, now: float, change: Change) -> Setback:
    return {
        "figure": figure,
        "against": against,
        "before": before,
        "now": now,
        "interval": [change.low, change.high],
        "items": change.items,
    }
