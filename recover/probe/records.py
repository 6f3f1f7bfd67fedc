"""What a probe writes down: one typed record a line of `probe.jsonl`, and the summary that reports are made from.

`to_json` writes a record, `record_of` reads it again. Every `Quantiles` is {mean, p50, p90, p99, max}; names of metrics
are those of `maths/divergence.py`. No torch is needed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from recover.base.errors import ArtifactError

Quantiles = dict[str, float | None]
Figures = dict[str, Quantiles | int | float]  # quantiles by metric; beside them counts and shares


class SampledStep(TypedDict):
    """One step of texts that are drawn."""

    step: int
    teacher_forced: Figures
    free_running: Figures


class Stretch(TypedDict):
    """Mean KL over the `n` positions of some decoding steps, of which `step` is the first."""

    step: int
    kl: float
    n: int


class Scored(TypedDict):
    """Both views' choices by one kind of score: margins and accuracy by view, and how often the views agree."""

    margin: dict[str, Quantiles]
    accuracy: dict[str, float | None]
    same_choice: float | None
    rank_changed: float | None


@dataclasses.dataclass(frozen=True)
class _Record:
    probe: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """The record as a dict of plain values, its kind under `probe`."""
        return {"probe": self.probe, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Final(_Record):
    """Teacher-forced drift at the last layer over all scored positions of all prompts, at one temperature.

    `metrics` has every metric of the three spaces, and of each prediction its error (predicted - exact) and its ratio
    (predicted / exact; `kl_ratio` is Var_p / (2 KL T^2)).
    """

    probe: ClassVar[str] = "final"
    temperature: float
    prompts: int
    positions: int
    metrics: dict[str, Quantiles]

    def to_json(self) -> dict[str, Any]:
        """As every record, with the metrics beside the other fields."""
        value = super().to_json()
        return value | value.pop("metrics")


@dataclasses.dataclass(frozen=True)
class Block(_Record):
    """Teacher-forced drift at the output of one block (dense numbering), T = 1, seen through one lens.

    A closed block hands its input on: its drift is that of the block before it against a dense block that did its work.
    `by_step`, of the final norm's lens: stretches of equally many decoding steps.
    """

    probe: ClassVar[str] = "block"
    block: int
    closed: bool
    lens: str
    embedding: Quantiles
    logit: Quantiles
    probability: Quantiles
    kl: Quantiles
    by_step: list[Stretch] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Sublayer(_Record):
    """One sublayer (`part`: attention or mlp; dense numbering) closed, or replaced by the pruned one, all else dense.

    Drift right behind it, T = 1, seen through the dense norm and head (`lens`). `parallel` and `orthogonal` are the
    parts of the change along and across the dense state, in its lengths: `parallel` may be negative.
    """

    probe: ClassVar[str] = "sublayer"
    block: int
    part: str
    counterfactual: str
    lens: str
    embedding: Quantiles
    parallel: Quantiles
    orthogonal: Quantiles
    logit: Quantiles
    probability: Quantiles
    kl: Quantiles


@dataclasses.dataclass(frozen=True)
class Step(_Record):
    """Drift at one decoding step, T = 1 but for `by_temperature`.

    `teacher_forced`: both views read the dense trajectory: the direct error. `free_running`: `kl` = both read the
    pruned view's own trajectory; `total` = dense on the dense trajectory against pruned on its own; `gap` = total -
    direct at the same prompt and step: the compounding error; `diverged` = share of all prompts whose token differed
    here or before.
    `n` counts the prompts still running.
    """

    probe: ClassVar[str] = "step"
    step: int
    teacher_forced: Figures
    free_running: Figures
    by_temperature: dict[str, dict[str, Quantiles]]


@dataclasses.dataclass(frozen=True)
class Divergence(_Record):
    """Where the pruned view's greedy text leaves the dense one's: `first` differing token, over prompts that did."""

    probe: ClassVar[str] = "divergence"
    prompts: int
    first: Quantiles
    never: float
    each: list[int | None]


@dataclasses.dataclass(frozen=True)
class Sampled(_Record):
    """As `Step` and `Divergence`, for texts drawn at T = 1 from one seed: both views draw with the same random numbers.

    `teacher_forced.kl`, and `kl`, `total`, `gap` of `free_running`, are over all positions; `steps` has them by step.
    """

    probe: ClassVar[str] = "sampled"
    seed: int
    prompts: int
    teacher_forced: Figures
    free_running: Figures
    first: Quantiles
    never: float
    steps: list[SampledStep]


@dataclasses.dataclass(frozen=True)
class Choice(_Record):
    """A choice task in both views: the subspace of its option tokens, the whole vocabulary at the same positions, and
    the options' full log-likelihoods beside them.

    `items`: all; `subspace`: those whose options part at one place, each with a token of its own; what is said of
    tokens is of these. `mass`: total probability of the option tokens: where it is small, what the subspace
    says is weak evidence. `rank_changed`: share of items whose options stand in another order.
    """

    probe: ClassVar[str] = "choice"
    task: str
    items: int
    subspace: int
    drift: dict[str, Quantiles]
    vocabulary: dict[str, Quantiles]
    mass: dict[str, Quantiles]
    margin: dict[str, Quantiles]
    accuracy: dict[str, float | None]
    same_choice: float | None
    rank_changed: float | None
    likelihood: Scored


@dataclasses.dataclass(frozen=True)
class Retrieval(_Record):
    """Pooled hidden states (after the final norm) as embeddings: does the pruned view rank documents as the dense one?

    `embedding`: 1 - cos of a text's two embeddings. `rank_correlation`: Spearman's, of a query's document scores.
    `ndcg`: of the pruned ranking, the dense ranking being right; `relevance`: nDCG of each view where the file says
    which documents are relevant. `task`: None where the queries are of no task.
    """

    probe: ClassVar[str] = "retrieval"
    pooling: str
    queries: int
    documents: int
    embedding: Quantiles
    rank_correlation: Quantiles
    ndcg: Quantiles
    top1: float
    relevance: dict[str, Quantiles] | None
    task: str | None = None


@dataclasses.dataclass(frozen=True)
class Identity(_Record):
    """Each view against itself, cached decoding against one full forward: the largest drift that rounding alone makes.

    Drift of this size says nothing; a value far above rounding means that the view's KV cache is broken.
    """

    probe: ClassVar[str] = "identity"
    kl_max: float
    embedding_max: float
    dense: dict[str, float]
    pruned: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Routing(_Record):
    """How many tokens each expert of a block's mixture was given, on the prompts: dense numbering in both views.

    `pruned` is empty where that view does not run the mixture.
    """

    probe: ClassVar[str] = "routing"
    block: int
    dense: list[int]
    pruned: list[int]


Record = Final | Block | Sublayer | Step | Divergence | Sampled | Choice | Retrieval | Identity | Routing


KINDS: dict[str, type[Record]] = {
    kind.probe: kind
    for kind in (Final, Block, Sublayer, Step, Divergence, Sampled, Choice, Retrieval, Identity, Routing)
}


def record_of(value: dict[str, Any]) -> Record:
    """The record that `to_json` made this of.

    Raises:
        ArtifactError: it is none; says which kind it should be, and which field is wrong.
    """
    kind = KINDS.get(str(value.get("probe")))
    if kind is None:
        raise ArtifactError(f"a record of probe {value.get('probe')!r}: expected one of {', '.join(KINDS)}")
    fields = {name: each for name, each in value.items() if name != "probe"}
    if kind is Final:
        own = {field.name for field in dataclasses.fields(Final)}
        metrics = {name: fields.pop(name) for name in list(fields) if name not in own}
        fields["metrics"] = metrics
    try:
        return _adapter(kind).validate_python(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtifactError(
            f"a record of probe '{kind.probe}': {'.'.join(map(str, first['loc']))}: {first['msg']}, found "
            f"{first['input']!r:.80}: probe again"
        ) from None


@functools.cache
def _adapter(kind: type[Record]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """The records as one dict.

    `final` is at T = 1, `temperatures` holds all; `blocks` holds both lenses, `final_norm` first for each block.
    """
    plain = [record.to_json() for record in records]

    def of(kind: str) -> list[dict[str, Any]]:
        found = [record for record in plain if record["probe"] == kind]
        return [{name: value for name, value in record.items() if name != "probe"} for record in found]

    finals = {record["temperature"]: record for record in of("final")}
    divergence = next(iter(of("divergence")), None)
    return {
        "prompts": finals[1.0]["prompts"] if finals else 0,
        "final": finals.get(1.0),
        "temperatures": list(finals.values()),
        "blocks": of("block"),
        "sublayers": of("sublayer"),
        "steps": of("step"),
        "divergence": divergence,
        "sampled": of("sampled"),
        "choices": of("choice"),
        "retrieval": of("retrieval"),
        "identity": next(iter(of("identity")), None),
        "routing": of("routing"),
    }
