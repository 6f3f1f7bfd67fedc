"""How much of each block goes: everywhere the same, or less where outliers sit (OWL) or where it hurts (KL).

Shapes: B batch, T tokens, O out features, I in features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import LongTensor, Tensor, nn

from recover.base import console
from recover.base.errors import PruneError
from recover.config.recipe import Calibrated
from recover.prune.parts import NOWHERE, Part, Parts
from recover.prune.scores import keep_unstructured, wanda_score
from recover.prune.stream import Stream, norms, squares
from recover.prune.views import final_hidden, kl_rows, row_sum

if TYPE_CHECKING:
    from recover.models.twin import Twin

OUTLIER = 5.0  # M of OWL: a score so many times its layer's mean is an outlier
KL_TOKENS = 8192  # text on which `allocation: kl` runs the model once a block; at least one batch


def block_fractions(
    twin: Twin, cfg: Calibrated, batches: Sequence[LongTensor], parts: Parts = NOWHERE
) -> tuple[list[float], dict[str, Any]]:
    """The sparsity of every block, their mean over weights being the recipe's; and what to record of them."""
    if cfg.allocation == "uniform":
        return [cfg.fraction] * twin.plan.blocks, {}
    record = parts.once("allocation", lambda: Part(_allocated(twin, cfg, batches, parts))).value
    return record["sparsity"], record


def _allocated(twin: Twin, cfg: Calibrated, batches: Sequence[LongTensor], parts: Parts) -> dict[str, Any]:
    """The record of an allocation: what it goes by, and the sparsity of every block."""
    count = twin.plan.blocks
    stream = Stream(twin, batches)
    importance, sizes, norms_of = [], [], {}
    for index in console.track(range(count), f"dense pass for allocation '{cfg.allocation}'", unit="block"):
        with stream.resident(index) as linears, torch.no_grad():
            found = norms(stream.measure(index, squares, advance=True))
            scores = {name: wanda_score(linears[name].weight.detach(), norm_I) for name, norm_I in found.items()}
            importance.append(_outliers(scores))
        sizes.append(sum(linear.weight.numel() for linear in stream.linears[index].values()))
        norms_of |= {name: norm_I.cpu() for name, norm_I in found.items()}
    if cfg.allocation == "kl":
        importance = _kl_alone(twin, cfg.fraction, stream, norms_of, batches, parts)
    fractions = spread(importance, sizes, cfg.fraction, cfg.spread)
    return {"allocation": cfg.allocation, "importance": importance, "sparsity": fractions}


def spread(importance: Sequence[float], sizes: Sequence[int], mean: float, most: float) -> list[float]:
    """Sparsities that fall linearly with importance, within `mean` +- `most`; their mean weighted by size is `mean`.

    Source: Yin et al., "Outlier Weighed Layerwise Sparsity", arXiv 2310.05175, section 4.
    """
    value, size = torch.tensor(importance, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)
    away = value - (value * size).sum() / size.sum()
    largest = away.abs().max()
    return (mean - most * away / largest).tolist() if largest > 0 else [mean] * len(sizes)


def _outliers(scores: dict[str, Tensor]) -> float:
    """Share of the block's weights whose score is above OUTLIER times the mean of their layer."""
    above = torch.stack([(score_OI > OUTLIER * score_OI.mean()).sum() for score_OI in scores.values()]).sum()
    return float(above) / sum(score_OI.numel() for score_OI in scores.values())


@torch.no_grad()
def _kl_alone(
    twin: Twin,
    fraction: float,
    stream: Stream,
    norms_of: dict[str, Tensor],
    batches: Sequence[LongTensor],
    parts: Parts,
) -> list[float]:
    """KL(dense || pruned) a token with Wanda on each block alone, on the first KL_TOKENS tokens."""
    some = list(batches[: max(1, KL_TOKENS // batches[0].numel())])
    dense = [final_hidden(twin, ids_BT) for ids_BT in some]
    tokens = sum(ids_BT.numel() for ids_BT in some)

    def alone(linears: dict[str, nn.Linear]) -> Part:
        with _masked(linears, fraction, norms_of):
            pairs = zip(some, dense, strict=True)
            total = sum(row_sum(twin, kl_rows, seen_ND, final_hidden(twin, ids)) for ids, seen_ND in pairs)
        if not math.isfinite(total):
            raise PruneError(
                f"prune.allocation: KL of {next(iter(linears))}'s block alone is {total}. Check the weights"
            )
        return Part(total / tokens)

    blocks = console.track(enumerate(stream.linears), "KL of each block alone", total=len(stream.linears), unit="block")
    return [parts.once(f"KL of block {index} alone", lambda each=each: alone(each)).value for index, each in blocks]


@contextmanager
def _masked(linears: dict[str, nn.Linear], fraction: float, norms_of: dict[str, Tensor]) -> Iterator[None]:
    """Inside, these layers have their weights of lowest Wanda score zeroed."""
    before = {name: linear.weight.data for name, linear in linears.items()}
    try:
        for name, linear in linears.items():
            score_OI = wanda_score(linear.weight, norms_of[name].to(linear.weight.device))
            linear.weight.data = linear.weight.masked_fill(~keep_unstructured(score_OI, fraction), 0)
        yield
    finally:
        for name, weight_OI in before.items():
            linears[name].weight.data = weight_OI
