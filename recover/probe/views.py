"""Two views of a language model to compare, and what a full forward of one of them shows.

Hidden states are read by hooks inside a whole forward: blocks called by hand would miss masks, positions and caches.

Shapes: B batch, T tokens, N kept tokens, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from recover.models.arch import blocks_of, final_norm_of, head_of
from recover.models.twin import Twin

FINAL_NORM, RAW = "final_norm", "raw"
LENSES = (FINAL_NORM, RAW)


@dataclasses.dataclass(frozen=True)
class View:
    """One way to run a model: `enter()` is held during forwards; `numbers[i]` is the dense number of its block i."""

    name: str
    model: Any
    enter: Callable[[], AbstractContextManager[Any]]
    numbers: tuple[int, ...]

    @classmethod
    def of_model(cls, name: str, model: nn.Module, numbers: tuple[int, ...] | None = None) -> View:
        """A model by itself; give `numbers` if blocks of the dense model are missing in it."""
        return cls(name, model, nullcontext, numbers or tuple(range(len(blocks_of(model)))))


@dataclasses.dataclass(frozen=True)
class Pair:
    """The dense view, the view held against it, and the blocks (dense numbering) that do nothing in the latter."""

    dense: View
    pruned: View
    closed: frozenset[int] = frozenset()

    @classmethod
    def of(cls, pair: Twin | Pair) -> Pair:
        """The two views of a twin; a pair stays as it is."""
        if isinstance(pair, Pair):
            return pair
        numbers = tuple(range(pair.plan.blocks))
        pruned = View("pruned", pair.model, pair.folded, numbers)
        return cls(View("dense", pair.model, pair.dense, numbers), pruned, frozenset(pair.closed_blocks))


@contextmanager
def running(view: View) -> Iterator[Any]:
    """The view's model, ready to be read: in its view, in eval mode (restored after), without grad."""
    training = [module for module in view.model.modules() if module.training]
    view.model.eval()
    try:
        with torch.no_grad(), view.enter():
            yield view.model
    finally:
        for module in training:
            module.training = True


@dataclasses.dataclass
class States:
    """Hidden states of one forward: `final_ND` after the final norm, `blocks[number]` at each block's output."""

    final_ND: Tensor
    blocks: dict[int, Tensor]


@contextmanager
def hidden_states(view: View, select: Callable[[Tensor], Tensor], *, with_blocks: bool = True) -> Iterator[States]:
    """Every forward inside the body fills the States given here with the rows that `select` (BTD -> ND) keeps."""
    states = States(torch.empty(0), {})

    def keep_block(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            states.blocks[number] = select(output[0] if isinstance(output, tuple) else output)

        return hook

    def keep_final(module: nn.Module, inputs: Any, output: Tensor) -> None:
        states.final_ND = select(output)

    with ExitStack() as stack:
        stack.callback(final_norm_of(view.model).register_forward_hook(keep_final).remove)
        if with_blocks:
            for number, block in zip(view.numbers, blocks_of(view.model), strict=True):
                stack.callback(block.register_forward_hook(keep_block(number)).remove)
        yield states


class Lens:
    """From a hidden state to float32 logits by the view's own final norm and head, a few rows at a time.

    `final_norm` is the lens of the last block applied everywhere. `raw` leaves the norm out, as the paper does: there a
    change of length that the real model cancels looks like damage.
    """

    def __init__(self, view: View) -> None:
        weight_VD, bias_V, self.scale, self.softcap = head_of(view.model)
        self.norm = final_norm_of(view.model)
        self.vocabulary = weight_VD.shape[0]
        # Half precision is widened once on a CPU; CUDA multiplies it into float32 logits as it is.
        self.weight_VD = weight_VD.detach() if weight_VD.is_cuda else _wide(weight_VD.detach())
        self.bias_V = None if bias_V is None else _wide(bias_V.detach())

    def states(self, h_ND: Tensor, lens: str) -> Tensor:
        """What the head is given: the normalised state under `final_norm`, the state itself under `raw`."""
        return self.norm(h_ND) if lens == FINAL_NORM else h_ND

    def logits(self, h_ND: Tensor) -> Tensor:
        """z = softcap(scale * (h W^T + bias)), never rounded below float32."""
        z_NV = _matmul_wide(h_ND, self.weight_VD)
        if self.bias_V is not None:
            z_NV = z_NV + self.bias_V
        if self.scale != 1:
            z_NV = z_NV * self.scale
        return z_NV if self.softcap is None else self.softcap * torch.tanh(z_NV / self.softcap)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _matmul_wide(h_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """h W^T in float32 or better: rounding logits to bf16 would drown a small drift (both views round on their own)."""
    if weight_VD.dtype in (torch.float32, torch.float64):
        return h_ND.to(weight_VD.dtype) @ weight_VD.T
    return torch.mm(h_ND.to(weight_VD.dtype), weight_VD.T, out_dtype=torch.float32)
