"""Float32 adapters under a half-precision model, cast all at once: two small kernels an adapter become three in all.

A pass multiplies by each adapter's cast, and by the cast times the update's scaling. Where the casts of a pass are made
together, `lowered` finds them; else it makes them. Both have the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from recover.base import zero


class Lowered(NamedTuple):
    """A factor of an update in the dtype of the products, and the same times the scaling."""

    plain: Tensor
    scaled: Tensor


_together: dict[int, tuple[Tensor, float, Lowered]] = {}  # by the id of a factor, which is held


def lowered(factor: Tensor, dtype: torch.dtype, scaling: float) -> Lowered:
    """The factor and scaling * factor in this dtype, the product rounded after the cast."""
    found = _together.get(id(factor))
    if found is not None and found[1] == scaling and found[2].plain.dtype == dtype:
        return found[2]
    low = factor.detach().to(dtype)
    return Lowered(low, low if scaling == 1.0 else low * scaling)


@contextmanager
def cast_together(factors: Sequence[Tensor], scaling: float, dtype: torch.dtype) -> Iterator[None]:
    """Inside, `lowered` finds these factors' casts, made here in one piece of memory; they must not change meanwhile.

    The memory is new each time, so what autograd saved of it stays as it was. Nests; nothing is done for factors that
    have the dtype, that are not all on one device, or that ZeRO-3 has dealt out.
    """
    before = dict(_together)
    try:
        if _fit(factors, dtype):
            _together.update(_cast(factors, scaling, dtype))
        yield
    finally:
        _together.clear()
        _together.update(before)


def _fit(factors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    return (
        len({factor.device for factor in factors}) == 1
        and all(factor.dtype != dtype for factor in factors)
        and not any(map(zero.dealt_out, factors))
    )


@torch.no_grad()
def _cast(
    factors: Sequence[Tensor], scaling: float, dtype: torch.dtype
) -> Iterator[tuple[int, tuple[Tensor, float, Lowered]]]:
    sizes = [factor.numel() for factor in factors]
    plain = torch.empty(sum(sizes), dtype=dtype, device=factors[0].device)
    parts = [part.view_as(factor) for part, factor in zip(plain.split(sizes), factors, strict=True)]
    torch._foreach_copy_(parts, [factor.detach() for factor in factors])  # pyright: ignore[reportPrivateImportUsage]
    scaled = (plain if scaling == 1.0 else plain * scaling).split(sizes)
    for factor, low, times in zip(factors, parts, scaled, strict=True):
        yield id(factor), (factor, scaling, Lowered(low, times.view_as(factor)))
