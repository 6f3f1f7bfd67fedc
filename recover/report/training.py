"""A training: the curve of its steps, thinned to what a picture can show; in words how it went; and what it made worse.

The curve is `train/steps.jsonl`, a line for each optimizer step. The words say how far the loss fell, how fast, what
generation made of it, and what went wrong.

What it made worse (setbacks) is found after each epoch, held against the pruned model and the epochs before it. Models
are compared item by item, on the items that both were measured on, and only what is beyond noise counts
(`maths/score.py`). A record here has `measure` and `drift` as a line of epochs.jsonl has them. The words have the
figures with the interval of their change, and what to try instead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict, cast

from recover.base import artifacts
from recover.base.errors import ArtifactError
from recover.config import defaults
from recover.config.loss import TERMS
from recover.config.tasks import KINDS, USES
from recover.maths.score import Change, mean, of_means, of_ratio
from recover.report import words
from recover.report.data import Curve, Epoch, Json, PageData, Points
from recover.report.run_files import EpochDrift, EpochLine, MeasureRecord, Setback, Task
from recover.report.words import finite

POINTS = 120  # at most; report.json stays small, however long the training
WINDOW = 8  # steps whose text is sorted by length (train/data.py): a point of fewer shows long text as high loss
LEAST = 16  # points, before a point may stand for more steps than one
ENDS = 0.05  # share of the scored steps at either end that "from" and "to" are means over
BAND = (0.1, 0.9)  # quantiles
BANDS = {"grad_norm": (0.0, 1.0)}  # up to the highest, since one outlier there is worth seeing

Line = Json  # of the file, with its `weight`


def curve(path: Path, recipe: Json) -> Curve | None:
    """What a training's picture is drawn from; None where there is no file (older runs have none), or no line in it.

    A point stands for `steps_a_point` consecutive lines, the last one for what is left; there are at most POINTS, and
    in a training of 128 steps or more each but the last stands for a multiple of 8. `points` holds their columns:
    `step`, the last of the point; `tokens` scored and `seconds` trained up to its end; its `lr`; and how many of the
    point's steps were `skipped`. Loss, terms and `grad_norm` are {mean, low, high} over the steps that were not, null
    where none is left. Of loss and terms a step weighs as many tokens as it scored, so that the mean is that per token;
    low and high are the tenth and the ninetieth percentile, weighed alike. Of the norm each step weighs the same, and
    low and high are its lowest and highest.

    `ends`: for loss and terms, the means per token over the first and the last `ends_steps` scored steps. Terms are KL
    and those that the recipe gives a weight. Raises ArtifactError if the file is damaged.
    """
    lines = _lines(path)
    if not lines:
        return None
    names = ["loss", *(name for name in terms(recipe) if any(name in line for line in lines))]
    scored = [line for line in lines if not _skipped(line)]
    size = _steps_a_point(len(lines))
    groups = [lines[start : start + size] for start in range(0, len(lines), size)]
    number = max(1, round(ENDS * len(scored)))
    ends = {name: [_mean(_values(part, name)) for part in (scored[:number], scored[-number:])] for name in names}
    tokens, seconds = lines[-1]["tokens"], lines[-1]["seconds"]
    return {
        "first_step": lines[0]["step"],
        "last_step": lines[-1]["step"],
        "skipped": len(lines) - len(scored),
        "steps_a_point": size,
        "points": _columns(groups, [*names, "grad_norm"]),
        "ends": ends,
        "ends_steps": number,
        "tokens_per_second": _short(tokens / seconds) if seconds > 0 else None,
        "peak_memory_bytes": max((finite(line.get("peak_memory_bytes")) or 0 for line in lines), default=0) or None,
    }


def terms(recipe: Json) -> list[str]:
    """KL, by which trainings of different losses compare, and the recorded terms that the recipe gives a weight."""
    return list({"kl": None, **weights(recipe)})


def weights(recipe: Json) -> dict[str, float]:
    """Terms of the recipe's loss that have a weight, recorded or not."""
    loss = (recipe.get("train") or {}).get("loss") or {}
    known = {"kl": 1.0, **loss, **(loss.get("terms") or {})}
    names = (*TERMS, *(name for name in loss.get("terms") or {} if name not in TERMS))
    return {name: weight for name in names if (weight := finite(known.get(name)))}


def _lines(path: Path) -> list[Line]:
    """The steps in order, each with `weight`, the tokens that it scored."""
    if not path.is_file():
        return []
    advice = "Delete it, and the report is without the training curve"
    try:
        lines = artifacts.read_jsonl(path)
    except ArtifactError as error:
        raise ArtifactError(f"{error}. {advice}") from error
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or any(finite(line.get(key)) is None for key in ("step", "tokens", "seconds")):
            raise ArtifactError(f"{path}:{number}: expected an object with step, tokens and seconds. {advice}")
    _weigh(lines)
    return lines


def _steps_a_point(steps: int) -> int:
    return WINDOW * math.ceil(steps / (WINDOW * POINTS)) if steps >= WINDOW * LEAST else max(1, steps // LEAST)


def _weigh(lines: list[Line]) -> None:
    before = 0.0
    for number, line in enumerate(lines):
        # A file that was damaged begins anew behind the first step: its first line weighs as the steps before it.
        line["weight"] = max(line["tokens"] - before, 0.0) if number else line["tokens"] / max(line["step"], 1)
        before = line["tokens"]


def _skipped(line: Line) -> bool:
    """A step whose loss or gradient was not finite has no loss in its line."""
    return finite(line.get("loss")) is None


def _columns(groups: list[list[Line]], names: list[str]) -> Points:
    """Of each group of lines one point, column by column."""
    found: Json = {key: [group[-1][key] for group in groups] for key in ("step", "tokens", "seconds")}
    found["lr"] = [finite(group[-1].get("lr")) for group in groups]
    found["skipped"] = [sum(map(_skipped, group)) for group in groups]
    for name in names:
        known = [_values(group, name) for group in groups]
        low, high = BANDS.get(name, BAND)
        found[name] = {
            "mean": [_mean(pairs) for pairs in known],
            "low": [_quantile(pairs, low) for pairs in known],
            "high": [_quantile(pairs, high) for pairs in known],
        }
    return cast(Points, found)


def _values(lines: list[Line], name: str) -> list[tuple[float, float]]:
    """(value, what it weighs) of the steps that were not skipped, lowest value first."""
    known = [line for line in lines if not _skipped(line) and finite(line.get(name)) is not None]
    return sorted((line[name], 1.0 if name == "grad_norm" else line["weight"]) for line in known)


def _mean(pairs: list[tuple[float, float]]) -> float | None:
    total = sum(weight for _, weight in pairs)
    return _short(sum(value * weight for value, weight in pairs) / total) if total > 0 else None


def _quantile(pairs: list[tuple[float, float]], share: float) -> float | None:
    """The lowest value up to which lies this share of the weight."""
    total = sum(weight for _, weight in pairs)
    if total <= 0:
        return None
    sums = itertools.accumulate(weight for _, weight in pairs)
    reached = (value for (value, _), so_far in zip(pairs, sums, strict=True) if so_far >= share * total)
    return _short(next(reached, pairs[-1][0]))


def _short(value: float) -> float:
    """Five significant digits: more than a picture shows, at half the size."""
    return float(f"{value:.5g}")


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


FEW_ITEMS = 200  # of a task: with fewer an interval is too wide to tell good from fair
WANTED = 0.95  # of dense generation
TYPICAL = (50.0, 100.0, 250.0)  # mean tokens of an answer, where none was measured


def foretold(
    kl: float | None,
    tokens: float | None,
    measured: MeasureRecord,
    dense: MeasureRecord | None,
    parameters: float | None,
) -> list[str]:
    """What a trained model's KL along the dense model's own texts says of generation, and what tokens 95% would take.

    The first is said where a task of generation `measured` fewer than FEW_ITEMS, or none is there. `tokens`: trained
    on. `parameters`: of the dense model. None of it is known of models or of answers that differ much from those that
    it was found on; then one line says so.
    """
    if kl is None or kl <= 0:
        return []
    written = _generates((dense or {"tasks": {}})["tasks"])
    known = [float(length) for task in written if (length := words.finite(task.get("length")))]
    length = mean(known) if known else None
    least, (shortest, longest) = defaults.KEPT_LEAST, defaults.KEPT_LENGTHS
    unknown = f"KL {words.number(kl)} along dense's own texts: what that says of generation is not known for"
    if parameters is not None and parameters < least:
        return [f"{unknown} models below {words.count(least)} parameters."]
    if length is not None and not shortest <= length <= longest:
        return [f"{unknown} answers of {length:,.0f} tokens (it is for {shortest:,.0f} to {longest:,.0f})."]
    items = [task.get("items") or 0 for task in _generates(measured["tasks"])]
    few = min(items, default=0) < FEW_ITEMS
    lines = [_kept_words(kl, length)] if few else []
    if length is None or not tokens:
        return lines
    if defaults.share_kept(kl, length) + defaults.KEPT_BAND >= WANTED:
        near = f"{WANTED:.0%} of dense lies within the error of that: only items can tell whether it is reached."
        return [*lines, near] if few else lines
    now, all_ = (words.finite((each or {"headline": {}})["headline"].get("generation")) for each in (measured, dense))
    reached = not few and now is not None and all_ is not None and now >= WANTED * all_
    return lines if reached else [*lines, _tokens_words(kl, tokens, length)]


def _generates(tasks: Mapping[str, Task]) -> list[Task]:
    return [task for task in tasks.values() if task["kind"] in KINDS and KINDS[task["kind"]].headline == "generation"]


def _kept_words(kl: float, length: float | None) -> str:
    shares = {tokens: defaults.share_kept(kl, tokens) for tokens in ((length,) if length else TYPICAL)}
    ends = [(max(0.0, share - defaults.KEPT_BAND), min(1.0, share + defaults.KEPT_BAND)) for share in shares.values()]
    told = [
        f"about {share:.0%} ({low:.0%} to {high:.0%}) of generation with answers of {tokens:,.0f} tokens"
        for (tokens, share), (low, high) in zip(shares.items(), ends, strict=True)
    ]
    return f"KL {words.number(kl)} along dense's own texts: at such a KL trained models kept {'; '.join(told)}."


def _tokens_words(kl: float, tokens: float, length: float) -> str:
    wanted = defaults.kl_of(WANTED, length)
    fewest, most = (float(f"{each:.2g}") for each in defaults.tokens_for(kl, tokens, wanted))
    tried = f", more than any budget tried ({words.count(defaults.KL_TOKENS)})" if fewest > defaults.KL_TOKENS else ""
    far = f"{words.count(most)} at the flattest" if most < 1e12 else "at the flattest no budget"
    return (
        f"{WANTED:.0%} of dense would take a KL of {words.number(wanted)}, now {words.number(kl)} after "
        f"{words.count(tokens)} tokens: about {words.count(fewest)} tokens at the steepest fall that was seen{tried}, "
        f"and {far}."
    )


USUAL_RATE = 2e-3  # the highest that any recipe here trains adapters with
NAMES = {"kl": "KL along the dense model's own texts"}


def setback_sentence(found: Setback) -> str:
    """`perplexity is worse than pruned: 20.93, now 24.11 (+15% [+12%, +18%], 100 items)`."""
    figure, before, now, (low, high) = found["figure"], found["before"], found["now"], found["interval"]
    items = f"{found['items']:,} {'texts' if figure in ('kl', 'perplexity') else 'items'}"
    change = now - before
    if figure == "perplexity":
        shown = [words.perplexity(_exp(value)) for value in (before, now)]
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
        lines.append(_rate_words(words.finite(train.get("lr")) or rate, auto=train.get("lr") == "auto"))
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


def _rate_words(rate: float | None, *, auto: bool) -> str:
    trials = "" if auto else ", or train.lr=auto, which tries a few"
    if rate is None:
        return f"A lower learning rate (train.lr){trials}."
    lower = min(rate / 2, USUAL_RATE)
    return f"A lower learning rate: train.lr={lower:.2g} instead of {rate:.2g}{trials}."


def setbacks_told(epochs: Sequence[Epoch], recipe: Json, rate: float | None = None) -> list[str]:
    """For the report: what the kept epoch made worse, what other epochs lost, and what to change; none if nothing."""
    lines = []
    counted: list[Setback] = []
    for row in epochs:
        for found in row["setbacks"]:
            if row["best"] or found["against"] != "pruned":
                kept = ", which is kept" if row["best"] else ""
                lines.append(f"Epoch {row['epoch']}{kept}: {setback_sentence(found)}.")
                counted.append(found)
    return [*lines, *(["What may help. " + " ".join(advice(counted, recipe, rate))] if counted else [])]
