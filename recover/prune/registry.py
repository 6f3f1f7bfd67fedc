"""The pruning methods by recipe `kind`. A new method is a function and a row here.

Each takes a twin whose two views are equal (`Twin(model, Plan.none(blocks))`), its config of the recipe and the
calibration batches (B, T), leaves the twin as it was, and gives the plan with its masks and weights. Raises PruneError
for what cannot work on this model. What takes one step after another (the drops of a search, the blocks of Wanda and
SparseGPT) is kept in `parts` and gone on with; magnitude and width are one pass, with nothing to keep on the way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import LongTensor

from recover.base.journal import Journal
from recover.models.plan import Pruned
from recover.prune.depth.depth import prune_depth
from recover.prune.sparsity import prune_magnitude, prune_sparsegpt, prune_wanda
from recover.prune.width import prune_width

if TYPE_CHECKING:
    from recover.models.twin import Twin


class Pruner(Protocol):
    """One method."""

    def __call__(self, twin: Twin, cfg: Any, batches: list[LongTensor], journal: Journal) -> Pruned: ...


PRUNERS: dict[str, Pruner] = {
    "depth": prune_depth,
    "magnitude": prune_magnitude,
    "wanda": prune_wanda,
    "sparsegpt": prune_sparsegpt,
    "width": prune_width,
}
