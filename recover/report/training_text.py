"""A training in words: how far the loss fell, how fast, what generation made of it, and what went wrong."""

from __future__ import annotations

from recover.config.loss import TERMS
from recover.report import words
from recover.report.curve import weights
from recover.report.data import Curve, Epoch, PageData

MANY = 0.01  # share of steps skipped from which the reader is told to mend the recipe


def label(name: str) -> str:
    """Of the loss or a term of it; of one whose package is not there, the name that the recipe gives it."""
    return TERMS[name].label if name in TERMS else name


def learnt(data: PageData) -> list[str]:
    """Sentences, each made of measured figures; none where no step was made."""
    if data["curve"] is None:
        return []
    curve = data["curve"]
    found = [_fall(data, curve), _last_epoch(data), _generation(data, curve), _fades(data), _gap(curve)]
    return [sentence for sentence in found if sentence]


def judged(data: PageData) -> str:
    """What tells whether the training still learns: the loss, or KL where the loss falls by fading alone."""
    return "kl" if _until(data) and (data["curve"] or {"ends": {}})["ends"].get("kl") else "loss"


def _fall(data: PageData, found: Curve) -> str:
    """From where to where, at what rate and in how much memory."""
    name = judged(data)
    first, last = found["ends"][name]
    if first is None or last is None:
        return "No step was in order: nothing was learnt."
    pace = "".join(
        part
        for part in (
            f", at {words.count(found['tokens_per_second'])} tokens/s" if found["tokens_per_second"] else "",
            f", peak GPU memory {words.size(found['peak_memory_bytes'])}" if found["peak_memory_bytes"] else "",
        )
    )
    what = label(name)
    steps = found["ends_steps"]
    over = "(the first and the last step)" if steps == 1 else f"(means over the first and the last {steps:,} steps)"
    if last < first:
        how = f"{what} fell from {words.number(first)} to {words.number(last)} per token"
    else:
        how = f"{what} did not fall: {words.number(first)} per token, then {words.number(last)}"
    return f"{how[0].upper()}{how[1:]} {over}{pace}."


def _last_epoch(data: PageData) -> str:
    """Said where the last epoch brought no lower loss than the one before it."""
    name = judged(data)
    means = [mean for row in data["epochs"] if (mean := words.finite(row["train"].get(name))) is not None]
    if len(means) < 2 or means[-1] < means[-2]:
        return ""
    before, last = words.number(means[-2]), words.number(means[-1])
    return f"Over the last epoch {label(name)} did not fall: its mean is {last}, that of the epoch before {before}."


def _generation(data: PageData, curve: Curve) -> str:
    """Said where the loss fell on while generation fell: after the epoch that is kept, or below the pruned model."""
    rows = [row for row in data["epochs"] if words.finite(row["headline"].get("generation")) is not None]
    best = next((row for row in rows if row["best"]), None)
    if best is None:
        return ""
    last, name = rows[-1], judged(data)
    before, after = (words.finite(row["train"].get(name)) for row in (best, last))
    kept, score = (row["headline"]["generation"] or 0.0 for row in (best, last))
    if score < kept and before is not None and after is not None and after < before:
        return (
            f"After epoch {best['epoch']}, which is kept, {label(name)} fell on from {words.number(before)} to "
            f"{words.number(after)} while generation fell from {words.percent(kept)} to {words.percent(score)}"
            f"{_items(last)}."
        )
    return _below_pruned(data, curve, best)


def _below_pruned(data: PageData, curve: Curve, best: Epoch) -> str:
    pruned = ((data["headline"]["pruned"] or {}).get("generation") or {}).get("value")
    first, last = curve["ends"][judged(data)]
    score = words.finite(best["headline"].get("generation")) or 0.0
    if pruned is None or score >= pruned or first is None or last is None or last >= first:
        return ""
    return (
        f"Generation did not follow: {words.percent(score)} after the best epoch{_items(best)}, and "
        f"{words.percent(pruned)} before the training."
    )


def _items(row: Epoch) -> str:
    """How many items an epoch's generation is measured on, since few tell little."""
    known = [items for items in (row["items"] or {}).values() if items]
    return f" (on {words.count(min(known))} items a task)" if known else ""


def _until(data: PageData) -> float | None:
    return words.finite(((data["recipe"].get("train") or {}).get("loss") or {}).get("variance_until"))


def _fades(data: PageData) -> str:
    until = _until(data)
    if not until or "variance" not in weights(data["recipe"]):
        return ""
    return f"The weight of the variance fades over {words.percent(until)} of the steps, and part of the loss with it."


def _gap(found: Curve) -> str:
    first = found["first_step"]
    return f"Of the steps before {first:,} no line is left." if first > 1 else ""


def notes(data: PageData) -> list[str]:
    """One sentence for each thing that went wrong and was dealt with; none if the training was in order."""
    training = data["training"] or {}
    skipped, rollbacks = training.get("skipped") or 0, training.get("rollbacks") or 0
    steps = data["epochs"][-1]["step"] if data["epochs"] else None
    found = []
    if skipped:
        of = f" of {steps:,}" if steps else ""
        text = f"{skipped:,}{of} training step{'s were' if skipped > 1 else ' was'} not finite and left out"
        if steps:
            text += f" ({words.percent(skipped / steps)})"
        advice = ": lower train.lr, or train in float32 or bfloat16" if steps and skipped / steps >= MANY else ""
        found.append(f"{text}; {'they' if skipped > 1 else 'it'} changed no weight{advice}.")
    if rollbacks:
        times = "once" if rollbacks == 1 else f"{rollbacks} times"
        found.append(f"Training went back to a checkpoint {times}, because too many steps in a row were not finite.")
    if training and not training.get("finished", True) and data["epochs"]:
        found.append("Training is not finished: what is shown is as far as it came.")
    return found
