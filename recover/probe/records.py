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

    `metrics` has every metric of the three spaces, and the ratios predicted / exact (`kl_ratio` is Var_p / (2 KL T^2)).
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
class Identity(_Record):
    """Each view against itself, cached decoding against one full forward: the largest drift that rounding alone makes.

    Drift of this size says nothing; a value far above rounding means that the view's KV cache is broken.
    """

    probe: ClassVar[str] = "identity"
    kl_max: float
    embedding_max: float
    dense: dict[str, float]
    pruned: dict[str, float]


Record = Final | Block | Step | Divergence | Identity


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
        "steps": of("step"),
        "divergence": divergence,
        "identity": next(iter(of("identity")), None),
    }
