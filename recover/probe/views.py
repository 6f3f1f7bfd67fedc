"""Two views of a language model to compare, and what a full forward of one of them shows.

Hidden states are read by hooks inside a whole forward: blocks called by hand would miss masks, positions and caches.
The views are those of a twin, or two checkpoints of one tokenizer (`load_pair`), quantized ones too.

Shapes: B batch, T tokens, N kept tokens, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from recover.base.errors import ModelError
from recover.config import recipe
from recover.maths.divergence import Head
from recover.models.arch import Arch, arch_of, base_of, blocks_of, final_norm_of, head_of
from recover.models.load import check_fit, check_tokenizers, load_any, load_tokenizer
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

    @classmethod
    def of_models(cls, dense: nn.Module, other: nn.Module, numbers: Sequence[int] | None = None) -> Pair:
        """Two models by themselves, of one vocabulary; `numbers[i]`: the dense block that the other's block i is.

        Raises ModelError for a mapping that does not fit, and for two depths without one.
        """
        blocks, others = len(blocks_of(dense)), len(blocks_of(other))
        if numbers is None and blocks != others:
            raise ModelError(
                f"the dense model has {blocks} blocks, the other one {others}: say which {others} of the dense blocks "
                f"0 to {blocks - 1} they stand for (in order, such as 0,1,3,...)"
            )
        numbers = tuple(range(blocks) if numbers is None else numbers)
        if len(numbers) != others or list(numbers) != sorted(set(numbers)) or not set(numbers) <= set(range(blocks)):
            raise ModelError(
                f"the mapping {list(numbers)} does not fit: expected {others} numbers, each larger than the one "
                f"before, from 0 to {blocks - 1}"
            )
        missing = frozenset(range(blocks)) - set(numbers)
        return cls(View.of_model("dense", dense), View.of_model("pruned", other, numbers), missing)

    @property
    def one_model(self) -> bool:
        """Whether both are views of one model: then they have one norm and one head."""
        return self.dense.model is self.pruned.model

    @property
    def one_width(self) -> bool:
        """Whether hidden states of the two views can be compared at all."""
        first, second = (base_of(view.model).config.hidden_size for view in (self.dense, self.pruned))
        return first == second


@contextmanager
def running(view: View) -> Iterator[Any]:
    """The view's model, ready to be read: in its view, in eval mode (restored after), without grad."""
    training = [module for module in view.model.modules() if module.training]
    for module in training:
        module.training = False
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
def hidden_states(
    view: View, select: Callable[[Tensor], Tensor], *, of_blocks: Callable[[Tensor], Tensor] | None = None
) -> Iterator[States]:
    """Every forward inside the body fills the States given here with the rows that `select` (BTD -> ND) keeps.

    `of_blocks` selects those of the blocks' outputs; None: they are not kept.
    """
    states = States(torch.empty(0), {})

    def keep_block(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            assert of_blocks is not None
            states.blocks[number] = of_blocks(output[0] if isinstance(output, tuple) else output)

        return hook

    def keep_final(module: nn.Module, inputs: Any, output: Tensor) -> None:
        states.final_ND = select(output)

    with ExitStack() as stack:
        stack.callback(final_norm_of(view.model).register_forward_hook(keep_final).remove)
        if of_blocks is not None:
            for number, block in zip(view.numbers, blocks_of(view.model), strict=True):
                stack.callback(block.register_forward_hook(keep_block(number)).remove)
        yield states


class Lens:
    """From a hidden state to float32 logits by the view's own final norm and head, a few rows at a time.

    `final_norm` is the lens of the last block applied everywhere. `raw` leaves the norm out, as the paper does: there a
    change of length that the real model cancels looks like damage.
    """

    def __init__(self, view: View) -> None:
        self.norm = final_norm_of(view.model)
        arch, base = arch_of(view.model), base_of(view.model)
        module: Any = base.get_submodule(arch.head)
        plain = _is_plain(getattr(module, "weight", None))
        self.head = head_of(view.model).ready() if plain else _Foreign(module, arch, base.config)
        self.vocabulary: int = self.head.weight_VD.shape[0] if isinstance(self.head, Head) else base.config.vocab_size

    def states(self, h_ND: Tensor, lens: str) -> Tensor:
        """What the head is given: the normalised state under `final_norm`, the state itself under `raw`."""
        return self.norm(h_ND) if lens == FINAL_NORM else h_ND

    def logits(self, h_ND: Tensor) -> Tensor:
        """z = softcap(scale * (h W^T + bias)), never rounded below float32 (but by a quantized head itself)."""
        return self.head.logits(h_ND)


class _Foreign:
    """A quantized head: only its own kernel can read its weight."""

    def __init__(self, module: nn.Module, arch: Arch, config: Any) -> None:
        self.module, self.scale, self.softcap = module, float(arch.logit_scale(config)), arch.softcap(config)

    def logits(self, h_ND: Tensor) -> Tensor:
        z_NV = self.module(h_ND)
        z_NV = z_NV.to(torch.promote_types(z_NV.dtype, torch.float32)) * self.scale
        return z_NV if self.softcap is None else torch.tanh(z_NV / self.softcap) * self.softcap


def _is_plain(weight: Any) -> bool:
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.element_size() > 1


def load_pair(
    dense: recipe.Model, other: recipe.Model, numbers: Sequence[int] | None = None
) -> tuple[Pair, PreTrainedTokenizerBase]:
    """Both models on this process's device, and the dense one's tokenizer; `numbers` as in `Pair.of_models`.

    Raises ModelError: a model cannot be loaded, needs a package that is not there, or the two differ in tokenizer, in
    vocabulary, or in depth without a mapping.
    """
    tokenizer = load_tokenizer(dense)
    check_tokenizers(tokenizer, load_tokenizer(other), other.source)
    first, second = load_any(dense), load_any(other)
    for model in (first, second):
        check_fit(model, tokenizer)
    return Pair.of_models(first, second, numbers), tokenizer
