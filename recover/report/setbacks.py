"""What a recovery has made worse: found after each epoch, and in words, with what to try instead.

An epoch is held against the pruned model and the epochs before it. Models are compared item by item, on the items that
both were measured on, and only what is beyond noise counts (`maths/score.py`). A record here has `measure` and `drift`
as a line of epochs.jsonl has them. The words have the figures with the interval of their change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, TypedDict

from recover.config.tasks import KINDS, USES
from recover.maths.score import Change, mean, of_means, of_ratio
from recover.report import words
from recover.report.data import Epoch, EpochDrift, EpochLine, Json, MeasureRecord, Setback


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


USUAL_RATE = 2e-3  # the highest that any recipe here trains adapters with
NAMES = {"kl": "KL along the dense model's own texts"}


def sentence(found: Setback) -> str:
    """`perplexity is worse than pruned: 20.9, now 24.1 (+15% [+12%, +18%], 100 items)`."""
    figure, before, now, (low, high) = found["figure"], found["before"], found["now"], found["interval"]
    items = f"{found['items']:,} {'texts' if figure in ('kl', 'perplexity') else 'items'}"
    change = now - before
    if figure == "perplexity":
        shown = [words.number(_exp(value)) for value in (before, now)]
        by, ends = _signed_percent(math.expm1(change)), [_signed_percent(math.expm1(end)) for end in (low, high)]
    elif figure == "kl":
        shown = [words.number(value) for value in (before, now)]
        by, ends = f"{change:+.3g}", [f"{end:+.3g}" for end in (low, high)]
    else:
        shown = [words.percent(value, 1) for value in (before, now)]
        by, ends = f"{100 * change:+.1f} points", [f"{100 * end:+.1f}" for end in (low, high)]
    name, whose = NAMES.get(figure, figure), _whose(found["against"])
    return f"{name} is worse than {whose}: {shown[0]}, now {shown[1]} ({by} [{', '.join(ends)}], {items})"


def _whose(against: str) -> str:
    return "the pruned model's" if against == "pruned" else f"after {against}"


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))


def _signed_percent(share: float) -> str:
    return f"{100 * share:+.3g}%"


def advice(found: Sequence[Setback], recipe: Json, rate: float | None = None) -> list[str]:
    """What to change in the recipe, each a sentence; none where nothing became worse.

    `rate`: the highest learning rate of the training, where the recipe says `auto`.
    """
    train = recipe.get("train") or {}
    figures = {each["figure"] for each in found}
    texts = figures & {"choice", "retrieval", "perplexity"}
    lines = []
    if figures:
        lines.append(_rate(words.finite(train.get("lr")) or rate, auto=train.get("lr") == "auto"))
    if texts and (train.get("loss") or {}).get("scored", "completion") == "completion":
        lines.append("`train.loss.scored: all` learns the prompts too, which holds perplexity nearer to dense.")
    if texts:
        lines.append(
            f"Another blend of train.data: text of the kind that {' and '.join(sorted(texts))} "
            f"{'is' if len(texts) == 1 else 'are'} measured on, beside that of generation."
        )
    if figures & {"generation", "kl"}:
        tokens = words.finite(train.get("tokens"))
        more = f" (train.tokens, now {words.count(tokens)})" if tokens else ""
        lines.append(f"More text, and of more kinds{more}: what is learnt from a little holds for that alone.")
    return lines


def _rate(rate: float | None, *, auto: bool) -> str:
    trials = "" if auto else ", or train.lr=auto, which tries a few"
    if rate is None:
        return f"A lower learning rate (train.lr){trials}."
    lower = min(rate / 2, USUAL_RATE)
    return f"A lower learning rate: train.lr={lower:.2g} instead of {rate:.2g}{trials}."


def told(epochs: Sequence[Epoch], recipe: Json, rate: float | None = None) -> list[str]:
    """For the report: what the kept epoch made worse, what other epochs lost, and what to change; none if nothing."""
    lines = []
    counted: list[Setback] = []
    for row in epochs:
        for found in row["setbacks"]:
            if row["best"] or found["against"] != "pruned":
                kept = ", which is kept" if row["best"] else ""
                lines.append(f"Epoch {row['epoch']}{kept}: {sentence(found)}.")
                counted.append(found)
    return [*lines, *(["What may help. " + " ".join(advice(counted, recipe, rate))] if counted else [])]
