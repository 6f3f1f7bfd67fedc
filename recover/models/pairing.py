"""The sublayers that are kept, paired again into ordinary blocks.

The residual stream sees only the order of sublayers, so attention of one block and MLP of a later one make a block
like any other, each with its own norms, and stock classes load it. A sublayer without a partner gets a zeroed one:
exact, but its parameters are stored for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from recover.models.site import Site


class Packed(NamedTuple):
    """A block of the exported model: the dense blocks that its attention and its MLP come from; None = zeroed."""

    attention: int | None
    mlp: int | None

    @property
    def source(self) -> int:
        """The dense block that decides all else: per-block settings belong to the attention."""
        block = self.mlp if self.attention is None else self.attention
        assert block is not None, "a block of two zeroed sublayers"
        return block


def zeroed_partners(packed: Iterable[Packed]) -> int:
    """How many sublayers of the exported blocks are stored as zeros, for want of a partner."""
    return sum(part is None for block in packed for part in block)


def pack_sites(kept: Iterable[Site]) -> tuple[Packed, ...]:
    """The fewest blocks that run the kept sites in their order: attention opens a block, an MLP joins the open one."""
    packed: list[Packed] = []
    for site in sorted(kept):
        if site.part == "attention":
            packed.append(Packed(site.block, None))
        elif packed and packed[-1].mlp is None:
            packed[-1] = packed[-1]._replace(mlp=site.block)
        else:
            packed.append(Packed(None, site.block))
    return tuple(packed)
