"""What a recovery made worse, in words: the figures with the interval of their change, and what to try instead."""

from __future__ import annotations

import math
from collections.abc import Sequence

from recover.report import words
from recover.report.data import Epoch, Json, Setback

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
