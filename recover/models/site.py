"""A site is one sublayer of one block: what pruning can take away whole, attention and MLP apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

Part = Literal["attention", "mlp"]
PARTS: tuple[Part, ...] = ("attention", "mlp")  # in the order in which a block runs them


class Site(NamedTuple):
    """Attention or MLP of one block (dense numbering). Sites sort in the order in which a model runs them."""

    block: int
    part: Part

    def __str__(self) -> str:
        return f"{self.part}:{self.block}"


def sites_of(what: Iterable[int | Site]) -> frozenset[Site]:
    """The sites meant: a number is a whole block, both its sites."""
    return frozenset(
        site for item in what for site in ((item,) if isinstance(item, Site) else (Site(item, part) for part in PARTS))
    )


def whole_blocks(sites: Iterable[Site]) -> tuple[int, ...]:
    """Blocks all of whose sites are in `sites`, ascending."""
    there = set(sites)
    blocks = {site.block for site in there}
    return tuple(sorted(block for block in blocks if all(Site(block, part) in there for part in PARTS)))
