"""What a probe writes down: one typed record a line of `probe.jsonl`, and the summary that reports are made from.

Every `Quantiles` is {mean, p50, p90, p99, max}; names of metrics are those of `spaces.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

Quantiles = dict[str, float | None]


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
    """

    probe: ClassVar[str] = "block"
    block: int
    closed: bool
    lens: str
    embedding: Quantiles
    logit: Quantiles
    probability: Quantiles
    kl: Quantiles


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
    teacher_forced: dict[str, Any]
    free_running: dict[str, Any]
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
    teacher_forced: dict[str, Any]
    free_running: dict[str, Any]
    first: Quantiles
    never: float
    steps: list[dict[str, Any]]


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
    likelihood: dict[str, Any]


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


Record = Final | Block | Sublayer | Step | Divergence | Sampled | Choice | Retrieval | Identity


def summary(records: Sequence[Record | dict[str, Any]]) -> dict[str, Any]:
    """The records, typed or as read back from JSONL, as one dict.

    `final` is at T = 1, `temperatures` holds all; `blocks` holds both lenses, `final_norm` first for each block.
    """
    plain = [record if isinstance(record, dict) else record.to_json() for record in records]

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
    }
