"""Which weights become zero: by magnitude, or by magnitude times input norm (Wanda); equally many in every output row.

Shapes: O out features, I in features, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import LongTensor, Tensor, nn
from torch.nn.utils import parametrize

from recover import console
from recover.errors import PruneError
from recover.models.arch import blocks_of, linears_of
from recover.models.masked_linear import effective_weight, pack
from recover.prune.calibrate import calibration_record, check_context, input_norms
from recover.prune.plan import Kind, MaskRecord, Plan, Pruned
from recover.prune.scores import keep_n_m, keep_unstructured, magnitude_score, wanda_score
from recover.recipe import Magnitude, Sparsity, Wanda

if TYPE_CHECKING:
    from recover.models.twin import Twin


def prune_magnitude(twin: Twin, leaf: Magnitude, batches: list[LongTensor]) -> Pruned:
    """Masks that keep the largest weights of each output row of each linear layer in the blocks; no text is read."""
    masks = {}
    for name, linear in console.track(linears_of(twin.model).items(), "magnitude", unit="layer"):
        masks[name] = _keep(name, magnitude_score(linear.weight.detach()), leaf)
    return Pruned(_plan(twin, "magnitude", leaf, masks, {}), masks, {})


def prune_wanda(twin: Twin, leaf: Wanda, batches: list[LongTensor]) -> Pruned:
    """Masks that keep the weights of highest |W| * ||x|| of every output row, block after block.

    What a block's layers see is measured with all blocks before it already masked, as the pruned model will run.
    Source: Sun et al., arXiv 2306.11695, section 3 and algorithm 1.
    """
    check_context(twin.model, batches)
    masks: dict[str, Tensor] = {}
    with _masking() as mask:
        for block in console.track(blocks_of(twin.model), "wanda", unit="block"):
            names = {id(module) for module in block.modules()}
            linears = {name: linear for name, linear in linears_of(twin.model).items() if id(linear) in names}
            norms = input_norms(twin.model, linears, batches, last=block)
            for name, linear in linears.items():
                keep_OI = _keep(name, wanda_score(linear.weight.detach(), norms[name]), leaf)
                mask(linear, keep_OI)
                masks[name] = keep_OI
    return Pruned(_plan(twin, "wanda", leaf, masks, calibration_record(leaf.calibration, batches)), masks, {})


def _keep(name: str, score_OI: Tensor, leaf: Sparsity) -> Tensor:
    """The mask for these scores; raises PruneError naming the layer where the pattern does not fit."""
    if not score_OI.isfinite().all():
        raise PruneError(f"{name}: scores are not finite. Check the weights, or use model.dtype: float32")
    if leaf.pattern == "unstructured":
        inputs = score_OI.shape[1]
        gone = round(leaf.fraction * inputs)
        if not 0 < gone < inputs:
            found = f"{name}: prune.sparsity {leaf.fraction} rounds to {gone} of its {inputs} inputs"
            raise PruneError(f"{found}: expected at least one pruned and one left")
        return keep_unstructured(score_OI, leaf.fraction).cpu()
    n, m = map(int, leaf.pattern.split(":"))
    try:
        return keep_n_m(score_OI, n, m).cpu()
    except PruneError as error:
        raise PruneError(f"{name}: {error}") from error


class _Masked(nn.Module):
    """A parametrization that shows a weight with its pruned entries at 0."""

    def __init__(self, keep_OI: Tensor) -> None:
        super().__init__()
        self.register_buffer("keep_packed", pack(keep_OI), persistent=False)

    def forward(self, weight_OI: Tensor) -> Tensor:
        return effective_weight(weight_OI, self.keep_packed)  # type: ignore[arg-type]


@contextmanager
def _masking() -> Iterator[Callable[[nn.Linear, Tensor], Any]]:
    """Gives a function that masks a layer until the end of the block; weights are then the same objects as before."""
    done: list[nn.Linear] = []

    def mask(linear: nn.Linear, keep_OI: Tensor) -> None:
        parametrize.register_parametrization(linear, "weight", _Masked(keep_OI.to(linear.weight.device)), unsafe=True)
        done.append(linear)

    try:
        with torch.no_grad():
            yield mask
    finally:
        for linear in done:
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)


def _plan(twin: Twin, kind: Kind, leaf: Sparsity, masks: dict[str, Tensor], calibration: dict[str, Any]) -> Plan:
    records = {name: MaskRecord.of(keep_OI, leaf.pattern) for name, keep_OI in masks.items()}
    parameters = sum(parameter.numel() for parameter in twin.model.parameters())
    return Plan(
        kind=kind,
        blocks=len(blocks_of(twin.model)),
        masks=records,
        parameters_dense=parameters,
        parameters_pruned=parameters,
        nonzero=parameters - sum(record.zeros for record in records.values()),
        calibration=calibration,
    )
