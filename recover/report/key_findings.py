"""The page in one minute: at most one sentence for each question that a reader has, each read off a figure below it."""

from __future__ import annotations

from recover.report import words
from recover.report.data import MODELS, Divergence, PageData
from recover.report.drift import by_model, choice_kls, level, mean_of
from recover.report.figures.plan import PART_NAMES
from recover.report.items import FORM

Point = tuple[str, str, str]  # question, answer, key of the figure or section that shows it
FEW_TOKENS = 10.0  # a mean KL so many times the median is carried by few tokens


def key_findings(data: PageData) -> list[Point]:
    """Questions with their answers, only those that this run can answer."""
    first = next(iter(data["drift"]))
    found = [_gain(data), _rising(data), _where(data, first), _how(data, first), _when(data), _compounds(data)]
    found += [_fails(data), _chooses(data)]
    return [point for point in found if point is not None]


def _rising(data: PageData) -> Point | None:
    """What the last epoch brought, and whether more tokens may bring more."""
    last = data["epochs"][-1] if data["epochs"] else None
    rise = last.get("rise") if last else None
    if last is None or rise is None:
        return None
    low, high = (f"{100 * bound:+.1f}".replace("-", "−") for bound in rise["interval"])
    tokens = f", of {words.count(rise['tokens'])} tokens" if rise["tokens"] else ""
    change = f"{100 * rise['value']:+.1f} points [{low}, {high}] over the last epoch{tokens}".replace("-", "−")
    if rise["real"] and rise["value"] > 0:
        answer = f"Yes: {change}. More train.tokens go on from where it ended."
    elif rise["real"]:
        answer = f"No, it fell: {change}. More of the same text will not help."
    else:
        answer = f"Not beyond noise: {change}."
    return ("Is recovery still rising?", answer, "figure-epochs")


def _where(data: PageData, model: str) -> Point | None:
    """The sublayer whose replacement costs most KL by itself, or the block after which drift grows most."""
    rows = by_model(data, lambda probe: probe["sublayers"]).get(model) or []
    costs = [(kl, row) for row in rows if row["counterfactual"] == "pruned" and (kl := mean_of(row["kl"])) is not None]
    kl, row = max(costs, key=lambda cost: cost[0], default=(0.0, None))
    if row is None or kl <= 0:
        return None
    part = PART_NAMES[row["part"]] if row["part"] == "mlp" else row["part"]
    answer = f"The {part} of block {row['block']}: changed alone, it gives a KL of {words.number(kl)} right after it."
    return ("Where does most of it come from?", answer, "figure-sublayers")


def _how(data: PageData, model: str) -> Point | None:
    """Whether few tokens carry the damage."""
    kl = ((data["drift"][model] or {}).get("final") or {}).get("kl")
    mean, median = level(kl, "mean"), level(kl, "p50")
    if mean is None or median is None or mean <= 0:
        return None
    figures = f"mean KL {words.number(mean)}, median {words.number(median)}"
    few = mean > FEW_TOKENS * median
    answer = f"No, few tokens carry it: {figures}." if few else f"Yes, the damage is spread over the text: {figures}."
    return ("Is every token hit?", answer, "table-last-layer")


def _when(data: PageData) -> Point | None:
    """By which token half of the greedy texts have left dense."""
    parts = []
    for model in data["drift"]:
        found = (data["drift"].get(model) or {}).get("divergence") or {}
        never, first = words.finite(found.get("never")), (found.get("first") or {}).get("p50")
        if never is None:
            continue
        half = (
            f"half by token {words.number(half_parted(found))}" if never < 0.5 else f"{words.percent(never)} never do"
        )
        parts.append(f"{model}, {half}" if first is not None or never >= 0.5 else "")
    answer = "; ".join(part for part in parts if part)
    return (
        ("When do texts leave the dense model's?", f"{answer[0].upper()}{answer[1:]}.", "figure-divergence")
        if answer
        else None
    )


def half_parted(found: Divergence) -> float | None:
    """The token by which half of all texts have parted (the record's median is over those that did)."""
    each = [place for place in found.get("each") or () if place is not None]
    half = -(-int(found.get("prompts") or 0) // 2)
    return sorted(each)[half - 1] if 0 < half <= len(each) else (found.get("first") or {}).get("p50")


def _compounds(data: PageData) -> Point | None:
    """Whether words are harder for the model where it wrote them itself.

    How far the two texts are apart is no answer: once they have parted it is as far under any damage (docs/paper.md).
    """
    parts = []
    for model, rows in by_model(data, lambda probe: probe["steps"]).items():
        pairs = [(mean_of(row["teacher_forced"]["kl"]), mean_of(row["free_running"]["both"])) for row in rows]
        known = [(direct, own) for direct, own in pairs if direct is not None and own is not None]
        if known:
            direct, own = (sum(side) / len(known) for side in zip(*known, strict=True))
            parts.append(f"{model}, KL {words.number(own)} on its own words and {words.number(direct)} on dense words")
    answer = "; ".join(parts)
    return ("Is it worse on its own words?", f"{answer[0].upper()}{answer[1:]}.", "figure-steps") if answer else None


def _fails(data: PageData) -> Point | None:
    """Whether texts fail by their form, which any text teaches, or by their content."""
    parts = []
    for model in MODELS:
        rows = [row for row in data["mistakes"] if row["model"] == model]
        items = sum(row["items"] for row in rows)
        if not items:
            continue
        form = sum(count for row in rows for kind, count in row["mistakes"].items() if kind in FORM)
        content = sum(row["mistakes"].get("content", 0) for row in rows)
        loops = sum(row["mistakes"].get("loop", 0) for row in rows)
        looping = f" ({words.percent(loops / items, 1)} loop)" if loops else ""
        parts.append(
            f"{model}, {words.percent(form / items, 1)} of answers by form{looping}, "
            f"{words.percent(content / items, 1)} by content"
        )
    answer = "; ".join(parts)
    return (
        ("Do answers fail by form or by content?", f"{answer[0].upper()}{answer[1:]}.", "table-mistakes")
        if parts
        else None
    )


def _chooses(data: PageData) -> Point | None:
    """Whether the few logits that choose moved less than all of them, over the items of all choice tasks."""
    parts = []
    for model, rows in by_model(data, lambda probe: probe["choices"]).items():
        known = [(*kls, row.get("subspace") or 1) for row in rows if (kls := choice_kls(row)) is not None]
        items = sum(n for *_, n in known)
        if items:
            inside, outside = (sum(kls[side] * kls[2] for kls in known) / items for side in (0, 1))
            among = f"KL {words.number(inside)} among the options, {words.number(outside)} over all tokens there"
            parts.append(f"{model}, {among}")
    answer = "; ".join(parts)
    question = "Do the logits that choose move as much?"
    return (question, f"{answer[0].upper()}{answer[1:]}.", "figure-choices") if answer else None


def _gain(data: PageData) -> Point | None:
    """What was bought with it."""
    speed = data["speed"]
    size = words.speed_value(speed, "file_bytes")
    if speed is None or size is None:
        return None
    rate = words.speed_gain(speed, "decode_tokens_per_second")
    faster = f"decoding {rate}" if rate.startswith("×") else f"decoding: {rate}"
    file = "The file is as large as before" if round(size, 2) == 1 else f"A file ×{size:.2f} the size"
    return ("What does it buy?", f"{file}; {faster}.", "deploy")
