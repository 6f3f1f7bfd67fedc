"""The rows of the benchmark: what each one does to the dense model, shown by one twin and undone afterwards.

Shapes: O out features, I in features, G groups of neighbouring inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import LongTensor, Tensor, nn

from recover.config.recipe import Calibration, Depth, Wanda
from recover.models.arch import blocks_of, linears_of
from recover.models.plan import Plan, Pruned
from recover.models.switched import see_pruned
from recover.models.twin import Twin
from recover.prune.depth.depth import prune_depth
from recover.prune.depth.search import choose, units_of
from recover.prune.sparsity import prune_wanda

COUNTS = {"attention": (1, 2, 3, 4, 6, 8, 10, 12), "mlp": (1, 2, 3, 4, 5, 6, 8), "block": (1, 2, 3, 4, 5, 6)}
WANDA: dict[str, dict[str, Any]] = {
    "wanda-50": {"sparsity": 0.5},
    "wanda-4of8": {"pattern": "4:8"},
    "wanda-2of4": {"pattern": "2:4"},
}
GROUPS = (64, 32, 16)  # inputs that share a step, the first that divides them; AWQ's 128 do not divide SmolLM2's 576
ROUNDED = {"int4": 4, "int6": 6}  # bits
PROBED = ("attention-8", "mlp-4", "block-3", "wanda-4of8", "int4", "int6")


@dataclass(frozen=True)
class Row:
    """One row: its name, its family (a line of a figure), and how many units go where they are counted."""

    name: str
    family: str
    count: int | None = None


def rows_of(blocks: int) -> list[Row]:
    """All rows of a model with so many blocks: the dense one, those probed in full, then the ends of each series.

    What matters most comes first, since the time may end: of each series every second count, then those between.
    """
    counted = [
        Row(f"{unit}-{count}", unit, count)
        for unit, counts in COUNTS.items()
        for count in counts
        if count < len(units_of(unit, blocks))
    ]
    others = [Row(name, "wanda") for name in WANDA] + [Row(name, "rounded") for name in ROUNDED]
    every = [*counted, *others]
    first = [row for name in PROBED for row in every if row.name == name]
    even = [row for row in every if row not in first and (row.count or 0) % 2 == 0]
    odd = [row for row in every if row not in first and row not in even]
    return [Row("dense", "dense", 0), *first, *even, *odd]


class Plans:
    """Makes what each row shows; a model's sublayers are ranked once a unit."""

    def __init__(self, twin: Twin, calibration: Calibration, batches: list[LongTensor]) -> None:
        self.twin, self.calibration, self.batches = twin, calibration, batches
        self.blocks = len(blocks_of(twin.model))
        self._orders: dict[str, list[int]] = {}

    def pruned(self, row: Row) -> Pruned:
        """Plan, masks and weights of one row."""
        if row.family == "wanda":
            cfg = Wanda(kind="wanda", calibration=self.calibration, **WANDA[row.name])
            return prune_wanda(self.twin, cfg, self.batches)
        if row.family == "rounded":
            return Pruned(self._nothing, {}, quantized(self.twin, ROUNDED[row.name]))
        if not row.count:
            return Pruned(self._nothing, {}, {})
        chosen = tuple(sorted(self._order(row.family)[: row.count]))
        return prune_depth(self.twin, Depth(kind="depth", unit=row.family, blocks=chosen), [])  # type: ignore[arg-type]

    @cached_property
    def _nothing(self) -> Plan:
        return Plan.none(self.blocks)

    def _order(self, unit: str) -> list[int]:
        """Blocks by how little their unit turns the residual stream, least first: 1 - cos(before, after), one pass.

        ShortGPT's block influence, and for a sublayer the same over the sublayer with its residual. Scored once on the
        dense model, so that n + 1 dropped units are the n before and one more.
        """
        if unit not in self._orders:
            cfg = Depth(
                kind="depth",
                unit=unit,  # type: ignore[arg-type]
                count=1,
                score="block_influence",
                calibration=self.calibration,
            )
            scores = choose(self.twin, cfg, self.batches).candidates
            self._orders[unit] = [row["blocks"][0] for row in sorted(scores, key=lambda row: row["score"])]
        return self._orders[unit]


def quantized(twin: Twin, bits: int) -> dict[str, Tensor]:
    """Weights of all linear layers of the blocks, rounded to so many bits and back; embeddings and norms stay.

    The plainest quantization there is, without AWQ's scaling by activations, and so a worse one at equal bits.
    """
    linears = linears_of(twin.model)
    return {f"{name}.weight": rounded(linear.weight.detach(), bits) for name, linear in linears.items()}


def rounded(weight_OI: Tensor, bits: int) -> Tensor:
    """The nearest weights of a symmetric grid: for 4 bits -8 to 7 steps of max|w| / 7 of a group of inputs."""
    group = next(group for group in GROUPS if weight_OI.shape[1] % group == 0)
    top = 2 ** (bits - 1) - 1
    grouped_OGI = weight_OI.float().unflatten(1, (-1, group))
    step_OG1 = (grouped_OGI.abs().amax(-1, keepdim=True) / top).clamp_min(torch.finfo(torch.float32).tiny)
    return (grouped_OGI / step_OG1).round().clamp(-top - 1, top).mul(step_OG1).flatten(1).to(weight_OI.dtype)


@contextmanager
def showing(twin: Twin, pruned: Pruned) -> Iterator[None]:
    """The twin's pruned view is this one inside, and afterwards the dense model again: nothing is loaded anew."""
    linears = linears_of(twin.model)
    masks = {name: keep_OI.to(twin.model.device) for name, keep_OI in pruned.masks.items()}  # packed where it is fast
    see_pruned(twin.model, masks, pruned.weights, twin.switch)
    try:
        with twin.closed(pruned.plan.sites), twin.folded():
            yield
    finally:
        for linear in linears.values():
            _restore(linear)


def _restore(linear: Any) -> None:
    """The stock layer that a masked or rewritten one was made from, in place."""
    linear.__class__ = nn.Linear
    for name in ("keep_packed", "own_weight", "own_bias"):
        linear._buffers.pop(name, None)
    for name in ("switch", "folded"):
        vars(linear).pop(name, None)
