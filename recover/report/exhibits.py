"""What a page shows: its sections in order, and in each the figures and tables, one row of a list for each.

A new figure is a function in `figures/` and a row here; the templates show what they find.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from recover.report import items, tables
from recover.report.figures import curve, drift, outcome, plan
from recover.report.figures.figure import Figure
from recover.report.tables import Table


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
RUN = (
    Section(
        "measures",
        "What was measured",
        "What was measured",
        "All three models had the same items, prompts and decoding. Brackets are 95% intervals.",
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
