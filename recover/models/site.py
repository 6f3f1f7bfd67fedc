"""A site is one sublayer of one block: what pruning can take away whole, attention and MLP apart.

The sites that are kept are paired again into ordinary blocks. The residual stream sees only the order of sublayers, so
attention of one block and MLP of a later one make a block like any other, each with its own norms, and stock classes
load it. A sublayer without a partner gets a zeroed one: exact, but its parameters are stored for nothing. Where a block
runs both on one input (GPT-NeoX, Phi, Cohere), only sublayers of one block are partners.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

Sublayer = Literal["attention", "mlp"]
SUBLAYERS: tuple[Sublayer, ...] = ("attention", "mlp")  # in the order in which a block runs them


class Site(NamedTuple):
    """Attention or MLP of one block (dense numbering). Sites sort in the order in which a model runs them."""

    block: int
    part: Sublayer

    def __str__(self) -> str:
        return f"{self.part}:{self.block}"


def sites_of(what: Iterable[int | Site]) -> frozenset[Site]:
    """The sites meant: a number is a whole block, both its sites."""
    return frozenset(site for item in what for site in ([item] if isinstance(item, Site) else sites_in(item)))


def sites_in(block: int) -> tuple[Site, ...]:
    """Both sites of a block, in the order in which it runs them."""
    return tuple(Site(block, part) for part in SUBLAYERS)


def whole_blocks(sites: Iterable[Site]) -> tuple[int, ...]:
    """Blocks all of whose sites are in `sites`, ascending."""
    there = set(sites)
    blocks = {site.block for site in there}
    return tuple(sorted(block for block in blocks if all(Site(block, part) in there for part in SUBLAYERS)))


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


def side_by_side(kept: Iterable[Site]) -> tuple[Packed, ...]:
    """As `pack_sites`, for blocks that run attention and MLP on one input: only those of one block go together."""
    there = set(kept)
    blocks = sorted({site.block for site in there})
    return tuple(Packed(*(b if Site(b, part) in there else None for part in SUBLAYERS)) for b in blocks)


def packed_as(parallel: bool) -> Callable[[Iterable[Site]], tuple[Packed, ...]]:
    """How the kept sites are stored, by whether blocks run attention and MLP on one input."""
    return side_by_side if parallel else pack_sites


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
