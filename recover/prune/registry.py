"""The ways to prune, a record each: its config of the recipe, what it costs, and what does it.

A way to prune is a config in `config/prune.py`, which names a module, and that module, which registers a `Pruner` when
it is imported. What was done is a plan, and all else (views, export, report) reads the plan, not the way.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import LongTensor

from recover.base.journal import Journal
from recover.config.prune import Pruning, accept, kind_of
from recover.models.plan import Pruned

if TYPE_CHECKING:
    from recover.models.load import Description
    from recover.models.twin import Twin


@dataclass(frozen=True)
class Cost:
    """What a pruning takes from a model, and what it takes to find, for `plan`; every figure is an estimate."""

    gone: float = 0.0  # weights that are no longer run
    unstored: float = 0.0  # weights that the exported model is known to do without
    blocks: float = 0.0  # share of the blocks that is no longer run
    own: int = 0  # weights that the pruned view holds besides the dense ones, at most
    masked: bool = False
    zeros: float = 0.0  # weights that become zero, and stay where they are
    passes: int = 0  # of the calibration text, in a search
    flops: float = 0.0  # of that search
    warnings: tuple[str, ...] = ()  # what will probably disappoint

    def share(self, model: Description) -> float:
        """Of the model's weights, the share that is taken away or zeroed."""
        return max((self.gone + self.zeros) / model.active, (self.unstored + self.zeros) / model.parameters)


@dataclass(frozen=True)
class Pruner:
    """One way to prune.

    `run` takes a twin whose two views are equal (`Twin(model, Plan.none(blocks))`), the config, the calibration batches
    (B, T) and a journal; it leaves the twin as it was, and gives the plan with its masks and weights. What takes one
    step after another (drops of a search, blocks of Wanda) is kept in the journal and gone on with. Raises PruneError
    for what cannot work on this model.

    `cost` takes the config and the model's description, before any weight is read. Raises PruneError for what `run`
    would refuse, as far as it can be told.
    """

    config: type[Pruning]
    run: Callable[[Twin, Any, list[LongTensor], Journal], Pruned]
    cost: Callable[[Any, Description], Cost]


PRUNERS: dict[str, Pruner] = {}  # by the recipe's `kind`, once the module of a kind is imported


def register(pruner: Pruner) -> Pruner:
    """Make a way to prune known, to recipes too. Raises ValueError if another one has its kind."""
    kind = kind_of(pruner.config)
    if PRUNERS.get(kind, pruner).config is not pruner.config:
        raise ValueError(f"prune.kind {kind!r} is taken by {PRUNERS[kind].config.__name__}: give another kind")
    accept(pruner.config)
    PRUNERS[kind] = pruner
    return pruner


def pruner_of(cfg: Pruning) -> Pruner:
    """The record behind a config."""
    kind = kind_of(type(cfg))
    if kind not in PRUNERS:
        importlib.import_module(cfg.module)
    return PRUNERS[kind]


def prune(twin: Twin, cfg: Pruning, batches: list[LongTensor], journal: Journal | None = None) -> Pruned:
    """What `Pruner.run` of this config gives; without a journal nothing is kept on the way."""
    return pruner_of(cfg).run(twin, cfg, batches, journal or Journal())
