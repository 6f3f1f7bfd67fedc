"""How much each unit of a sublayer matters: a unit is a run of inputs of the linear that writes to the residual stream.

A neuron is one input of the MLP's last linear; a KV group is as many inputs of the attention's last linear as its query
heads have together. All figures come from one pass of the dense model with hooks: units are ranked within a block, and
Minitron found that measuring anew after each removal brings nothing.

Shapes: B batch, T tokens, N tokens (B * T), I in features, O out features, H heads (or neurons), U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import LongTensor, Tensor, nn

from recover.base import console
from recover.base.errors import PruneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Outgoing(NamedTuple):
    """The last linear of a sublayer; its inputs are `units` equal runs, each of heads of `head` channels."""

    linear: nn.Linear
    units: int
    head: int = 1


class Activation:
    """Mean over a sample's tokens of ||a_h||, then the L2 norm over samples; a unit's is the sum over its heads.

    Of a neuron, ||a_h|| is |a|. Source: Muralidharan et al., "Compact Language Models via Pruning and Knowledge
    Distillation" (Minitron), arXiv 2407.14679, importance analysis, with the aggregations that they settled on.
    """

    def __init__(self, outgoing: Outgoing) -> None:
        self.outgoing = outgoing
        self.squares_H: Tensor | None = None

    def add(self, x_BTI: Tensor) -> None:
        """Take the inputs of some samples into account."""
        mean_BH = x_BTI.float().unflatten(-1, (-1, self.outgoing.head)).norm(dim=-1).mean(1)
        squares_H = mean_BH.double().square().sum(0)
        self.squares_H = squares_H if self.squares_H is None else self.squares_H + squares_H

    def scores(self) -> Tensor | None:
        """(U,), None if nothing was seen."""
        return None if self.squares_H is None else self.squares_H.sqrt().view(self.outgoing.units, -1).sum(1)


class Fluctuation:
    """Variance of each input over all tokens x squared norm of its outgoing weights; summed over a unit's inputs.

    What does not vary is a constant that the rest can learn to add. Source: An et al., FLAP, arXiv 2312.11983, the
    weighted fluctuation metric. Their bias compensation is left out: stock classes have no bias there.
    """

    def __init__(self, outgoing: Outgoing) -> None:
        self.outgoing = outgoing
        self.count = 0
        self.mean_I = self.deviations_I = torch.zeros(())

    def add(self, x_BTI: Tensor) -> None:
        """Take the inputs of some samples into account (Chan's update: no difference of two large sums)."""
        x_NI = x_BTI.flatten(0, 1).float()
        variance_I, mean_I = torch.var_mean(x_NI, dim=0, correction=0)
        new, total = len(x_NI), self.count + len(x_NI)
        old_mean_I, old_I = self.mean_I.to(mean_I.device), self.deviations_I.to(mean_I.device)
        step_I = mean_I.double() - old_mean_I
        self.mean_I = old_mean_I + step_I * (new / total)
        self.deviations_I = old_I + variance_I.double() * new + step_I.square() * (self.count * new / total)
        self.count = total

    def scores(self) -> Tensor | None:
        """(U,), None if nothing was seen."""
        if not self.count:
            return None
        squares_I = self.outgoing.linear.weight.detach().double().square().sum(0)
        fluctuation_I = self.deviations_I / max(self.count - 1, 1) * squares_I
        return fluctuation_I.view(self.outgoing.units, -1).sum(1)


SCORES: dict[str, type[Activation] | type[Fluctuation]] = {"activation": Activation, "fluctuation": Fluctuation}


@torch.no_grad()
def unit_scores(
    model: PreTrainedModel, outgoing: dict[str, Outgoing], batches: Sequence[LongTensor], score: str
) -> dict[str, Tensor]:
    """The score of every unit of each named linear, (U,) in fp64 on the CPU, seen in full forward passes of the model.

    Raises PruneError when a linear is never run or a score is not finite.
    """
    seen = {name: SCORES[score](place) for name, place in outgoing.items()}

    def see(name: str) -> Any:
        return lambda _module, args: seen[name].add(args[0].detach())

    handles = [place.linear.register_forward_pre_hook(see(name)) for name, place in outgoing.items()]
    try:
        for ids_BT in console.track(batches, score, unit="batch"):
            # One position of logits: nobody reads them, and all would be the largest tensor of the pass.
            model(input_ids=ids_BT.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _checked(name, one.scores()) for name, one in seen.items()}


def _checked(name: str, score_U: Tensor | None) -> Tensor:
    if score_U is None:
        raise PruneError(f"{name}: never run in a forward pass, so there are no activations to score it by")
    if not score_U.isfinite().all():
        raise PruneError(f"{name}: sees inputs that are not finite. Check the weights, or use model.dtype: float32")
    return score_U.cpu()


def highest(score_U: Tensor, count: int) -> Tensor:
    """The indices, ascending, of exactly `count` units of the highest scores; on ties the lowest index goes."""
    return torch.argsort(score_U, stable=True)[len(score_U) - count :].sort().values
