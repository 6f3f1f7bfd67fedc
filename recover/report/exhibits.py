"""What a page shows: its key findings, its sections in order, and in each the figures and tables, a row of a list for
each.

A new figure is a function in `figures/` and a row here; the templates show what they find. The key findings are the
page in one minute: at most one sentence for each question that a reader has, each read off a figure below it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from recover.report import items, tables, words
from recover.report.data import MODELS, Divergence, PageData
from recover.report.drift import by_model, choice_kls, level, mean_of
from recover.report.figures import curve, drift, outcome, plan
from recover.report.figures.figure import Figure
from recover.report.figures.plan import PART_NAMES
from recover.report.items import FORM
from recover.report.run_files import Model
from recover.report.tables import Table
from recover.report.verdict import against_alternative


@dataclass(frozen=True)
class Section:
    """A heading of the page and the sentence below it. What else it holds is in `templates/sections/<key>.html.j2`.

    `name` is what the list of sections calls it. A section that is not `always` there needs figures or tables. `terms`
    are words that it uses, each with what it means.
    """

    key: str
    name: str
    heading: str
    intro: str = ""
    always: bool = True
    terms: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Exhibit:
    """A figure or a table: where it stands, its key (that of its anchor), and the function that makes it of a run.

    `make` returns None where the run has nothing to show; a figure without a drawing says why. `numbers`: Markdown,
    which has no pictures, shows the numbers of the figure.
    """

    section: str
    key: str
    make: Callable[[Any], Figure | Table | None]
    numbers: bool = False


TEXT = "A model reads its own words when it writes: one changed word is enough for the two texts to part."
USES = "These uses read little of the output or none of it, so they can hold where writing fails."

KL = (
    "KL",
    "Kullback-Leibler divergence KL(dense ‖ model) of the next token's probabilities, in nats: 0 where they are equal",
)
BLOCK = ("block", "one layer of the model; its two sublayers are attention and MLP")
DRIFT_TERMS = (
    ("embedding", "the final hidden state of a token, before the head makes logits of it"),
    ("logit", "a token's score before softmax makes probabilities of all of them"),
    ("1 − cos", "one less the cosine of the angle between two vectors: 0 alike, 1 at right angles"),
    KL,
    ("p50, p99", "the median, and the value that 99% of tokens stay below"),
    ("Var/(2T²)", "the theory's estimate of KL from how logits moved, at temperature T"),
    BLOCK,
)
TEXT_TERMS = (
    KL,
    ("greedy", "each token is the likeliest one; drawn or sampled: picked at random by its probability"),
    ("dense words, own words", "the text read so far is the dense model's, or the model's own"),
)
# Models that not every run has, with what they are.
FURTHER: dict[Model, str] = {
    "deployed": "the recovered model as the quantized file that is served; its weights, dequantized, were measured",
    "alternative": "the dense model quantized to about as many bytes as the deployed file: served without pruning",
}
RUN = (
    Section(
        "measures",
        "What was measured",
        "What was measured",
        "All models had the same items, prompts and decoding. Brackets are 95% intervals.",
        terms=(
            ("dense, pruned, recovered", "the model as given; with parts taken out; pruned and trained again"),
            ("kept", "share of the dense figure; where guessing scores too, of what dense does above chance"),
            ("95% interval", "other items of the same kind would put the figure inside in 95 of 100 cases"),
        ),
    ),
    Section(
        "samples",
        "What the models write",
        "What the models write",
        "The same prompts, greedy decoding. The underlined word is the first that the dense model did not write there.",
    ),
    Section(
        "recovery",
        "How generation came back",
        "How generation came back",
        terms=(
            ("LoRA", "small matrices beside the frozen weights, which alone are trained, and are merged in at the end"),
            ("distillation", "training towards the dense model's probabilities instead of given answers"),
            ("epoch", "one pass over the text of the training"),
            KL,
        ),
    ),
    Section(
        "damage",
        "Where the damage sits",
        "Where the damage sits",
        "Drift is the distance from the dense model, in three spaces: hidden state, logits, probabilities. A drift "
        "that is small in one space can be large in the next.",
        terms=DRIFT_TERMS,
    ),
    Section("text", "What it does to a text", "What the damage does to a text", TEXT, terms=TEXT_TERMS),
    Section("uses", "Choosing and ranking", "Choosing and ranking", USES, always=False),
    Section("pruned", "What was pruned", "What was pruned"),
    Section("deploy", "What you deploy", "What you deploy"),
    Section("limits", "What it does not tell", "What this report does not tell"),
    Section("origin", "How it was made", "How it was made"),
)
DIAGNOSIS = (
    Section(
        "damage",
        "Where the difference sits",
        "Where the difference sits",
        "Drift is the distance between the two models, in three spaces: hidden state, logits, probabilities. A drift "
        "that is small in one space can be large in the next.",
        always=False,
        terms=DRIFT_TERMS,
    ),
    Section("text", "What it does to a text", "What it does to a text", TEXT, always=False, terms=TEXT_TERMS),
    Section("uses", "Choosing and ranking", "Choosing and ranking", USES, always=False),
)

EXHIBITS: list[Exhibit] = [
    Exhibit("top", "hero", outcome.hero),
    Exhibit("measures", "mistakes", items.mistakes_table),
    Exhibit("measures", "exchanged", items.exchanged_table),
    Exhibit("measures", "overlap", items.overlap_table),
    Exhibit("recovery", "skipped", tables.skipped),
    Exhibit("recovery", "epochs", outcome.epochs, numbers=True),
    Exhibit("recovery", "training", curve.training),
    Exhibit("recovery", "rates", tables.rates),
    Exhibit("damage", "last-layer", tables.last_layer),
    Exhibit("damage", "blocks", drift.blocks, numbers=True),
    Exhibit("damage", "block-steps", drift.block_steps),
    Exhibit("damage", "sublayers", plan.worth, numbers=True),
    Exhibit("damage", "writes", plan.writes),
    Exhibit("damage", "experts", tables.experts),
    Exhibit("text", "steps", drift.steps),
    Exhibit("text", "divergence", outcome.divergence),
    Exhibit("text", "parting", outcome.parting),
    Exhibit("text", "divergence", tables.divergence),
    Exhibit("text", "sampled", drift.sampled, numbers=True),
    Exhibit("text", "temperatures", drift.temperatures, numbers=True),
    Exhibit("text", "predictors", drift.predictors),
    Exhibit("uses", "choices", drift.choices, numbers=True),
    Exhibit("uses", "choices-table", tables.choices),
    Exhibit("uses", "retrieval", tables.retrieval),
    Exhibit("pruned", "plan", plan.pruned, numbers=True),
    Exhibit("pruned", "removed", tables.removed),
    Exhibit("pruned", "repair", tables.repair),
    Exhibit("deploy", "served", tables.served),
    Exhibit("origin", "times", tables.times),
    Exhibit("origin", "stages", tables.stages),
    Exhibit("origin", "inputs", tables.inputs),
]


def made(data: Any, sections: Iterable[str] | None = None) -> dict[Exhibit, Figure | Table]:
    """What there is to show of `data`, in the order of the page; of the named sections alone, if any are named."""
    wanted = None if sections is None else set(sections)
    rows = [each for each in EXHIBITS if wanted is None or each.section in wanted]
    return {each: found for each in rows if (found := each.make(data)) is not None}


def figures(data: Any) -> dict[str, Figure]:
    """Key -> figure, measured or not."""
    return {each.key: found for each, found in made(data).items() if isinstance(found, Figure)}


def shown_tables(data: Any) -> dict[str, Table]:
    """Key -> table."""
    return {each.key: found for each, found in made(data).items() if isinstance(found, Table)}


Point = tuple[str, str, str]  # question, answer, key of the figure or section that shows it
FEW_TOKENS = 10.0  # a mean KL so many times the median is carried by few tokens


def key_findings(data: PageData) -> list[Point]:
    """Questions with their answers, only those that this run can answer."""
    first = next(iter(data["drift"]))
    found = [_gain(data), _rising(data), _where(data, first), _how(data, first), _when(data), _compounds(data)]
    found += [_fails(data), _chooses(data)]
    if (told := against_alternative(data)) is not None:
        found.insert(0, ("Is quantizing alone better?", told, "deploy"))
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
    answer = f"the {part} of block {row['block']}: changed alone, it gives a KL of {words.number(kl)} right after it."
    return ("Where does most damage come from?", f"{model.capitalize()}, {answer}", "figure-sublayers")


def _how(data: PageData, model: str) -> Point | None:
    """Whether few tokens carry the damage."""
    kl = ((data["drift"][model] or {}).get("final") or {}).get("kl")
    mean, median = level(kl, "mean"), level(kl, "p50")
    if mean is None or median is None or mean <= 0:
        return None
    figures = f"mean KL {words.number(mean)}, median {words.number(median)}"
    few = mean > FEW_TOKENS * median
    answer = f"no, few tokens carry it: {figures}." if few else f"yes, the damage is spread over the text: {figures}."
    return ("Is every token hit?", f"{model.capitalize()}, {answer}", "table-last-layer")


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
