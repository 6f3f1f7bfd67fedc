"""Mixtures of experts in two views: in the pruned one a router knows only the experts that stay.

Nothing is copied. The router runs the stock code on those of its rows that stay, so that it chooses and weights as a
model without the others would; the experts are the stock module with all its matrices, of which some are not asked for.

Shapes: N tokens, D width, E experts, K experts that stay, P experts of a token, S pairs of a token and an expert, O out
features, I in features, R rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recover.models.arch import Arch, arch_of, base_of, blocks_of, mixture_in
from recover.models.switched import Factors, Switch, masked_lora_linear, named_as, pack, switch_class, unpack

IN, OUT = "gate_up_proj", "down_proj"  # matrices of every expert, in the order in which a token meets them

# Token places (S), experts (S), outputs (S, D) before router weights, and those (S): pairs in the experts' order.
See = Callable[[Tensor, Tensor, Tensor, Tensor], None]
# Name of the matrix, expert, what this expert's tokens put into it (S, I).
Take = Callable[[str, int, Tensor], None]


class Routed(NamedTuple):
    """Router and experts of a block."""

    router: SwitchedRouter
    experts: SwitchedExperts


class _Seen:
    """A module as a stock forward sees it: some of its attributes are others."""

    def __init__(self, module: nn.Module, **others: Any) -> None:
        self.__dict__.update(others, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


class SwitchedRouter(nn.Module):
    """Goes before a stock router: among all experts in the dense view, among those of `keep_K` in the pruned one.

    The experts that it names are numbered as in the dense model in both.
    """

    switch: Switch
    keep_K: Tensor | None
    stock_forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    num_experts: int
    dtype: torch.dtype  # of the weight that is read: one that is trained is float32

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, E), weights (N, P) and experts (N, P) of each token; experts that are gone have -inf."""
        stock = type(self).stock_forward
        keep_K = None if self.switch.dense else self.keep_K
        if keep_K is None and all(each.dtype == self.dtype for each in self.parameters(recurse=False)):
            return stock(self, hidden_states)
        own = {**dict(self.named_parameters(recurse=False)), **self._rows()}
        others: dict[str, Any] = {
            name: (each if keep_K is None else each[keep_K]).to(self.dtype if name in self._parameters else each.dtype)
            for name, each in own.items()
        }
        if keep_K is None:
            return stock(_Seen(self, **others), hidden_states)
        logits_NK, weights, places = stock(_Seen(self, num_experts=len(keep_K), **others), hidden_states)
        logits_NE = logits_NK.new_full((len(logits_NK), self.num_experts), float("-inf"))
        return logits_NE.index_copy(1, keep_K, logits_NK), weights, keep_K[places]

    def _rows(self) -> dict[str, Tensor]:
        """Buffers with a number an expert."""
        return {name: each for name, each in self.named_buffers(recurse=False) if name != "keep_K"}


class SwitchedExperts(nn.Module):
    """Goes before stock experts: masks of the pruned view, adapters, and whoever wants to see what each expert gives.

    Without any of them the stock code runs.
    """

    switch: Switch
    see: See | None
    take: Take | None
    stock_forward: Callable[..., Tensor]
    is_transposed: bool
    masks: tuple[str, ...]  # which of IN and OUT are masked; the masks are buffers, a row of bytes an expert

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        factors: Mapping[str, ExpertFactors] | None = None,
    ) -> Tensor:
        """(N, D): the sum of what each token's experts give, by router weights; `factors`: updates of low rank."""
        masks, factors = () if self.switch.dense else self.masks, factors or {}
        if self.see is None and self.take is None and not masks and not factors:
            return type(self).stock_forward(self, hidden_states, top_k_index, top_k_weights)

        def linear(x_SI: Tensor, name: str, expert: int) -> Tensor:
            if self.take is not None:
                self.take(name, expert, x_SI)
            bias_O = getattr(self, f"{name}_bias")[expert] if hasattr(self, f"{name}_bias") else None
            weight_OI = matrices(self, name)[expert]
            own = factors[name].of(expert) if name in factors else None
            if name in masks:
                keep = getattr(self, f"keep_{name}")[expert]
                a_RI, b_OR, scaling = own or (None, None, 1.0)
                return masked_lora_linear(x_SI, weight_OI, keep, a_RI, b_OR, scaling, bias_O)
            y_SO = F.linear(x_SI, weight_OI, bias_O)
            if own is None:
                return y_SO
            a_RI, b_OR = (each.to(x_SI.dtype) for each in (own.a_RI, own.b_OR))
            return y_SO + own.scaling * F.linear(F.linear(x_SI, a_RI), b_OR)

        return self._by_expert(hidden_states, top_k_index, top_k_weights, linear)

    def _by_expert(
        self, h_ND: Tensor, index_NP: Tensor, weight_NP: Tensor, linear: Callable[[Tensor, str, int], Tensor]
    ) -> Tensor:
        """One expert after the other, each on its tokens; summed up as the stock grouped product does."""
        this: Any = self
        expert_S = index_NP.flatten()
        order_S = expert_S.argsort(stable=True)
        token_S, weight_S = order_S // index_NP.shape[1], weight_NP.flatten()[order_S]
        tokens = torch.bincount(expert_S, minlength=this.num_experts).tolist()
        found = [
            linear(this._apply_gate(linear(x_SD, IN, expert)), OUT, expert)
            for expert, x_SD in enumerate(h_ND[token_S].split(tokens))
            if len(x_SD)
        ]
        y_SD = torch.cat(found)
        if self.see is not None:
            self.see(token_S, expert_S[order_S], y_SD, weight_S)
        weighted_SD = (y_SD * weight_S[:, None])[order_S.argsort()]
        return weighted_SD.unflatten(0, index_NP.shape).sum(1).to(h_ND.dtype)


class ExpertFactors(NamedTuple):
    """Updates s B A of every expert's matrix."""

    a_ERI: Tensor
    b_EOR: Tensor
    scaling: float

    def of(self, expert: int) -> Factors:
        """That of one expert."""
        return Factors(self.a_ERI[expert], self.b_EOR[expert], self.scaling)


def matrices(experts: Any, name: str) -> Tensor:
    """(E, O, I) of the experts' matrices of this name, whichever way round they are stored."""
    stored = getattr(experts, name)
    return stored.transpose(1, 2) if experts.is_transposed else stored


class ExpertMatrix:
    """A matrix of all experts of a block, as a linear layer to what chooses weights: (E O, I), expert by expert.

    `weight` is a view of the parameter where it is stored so, else a copy.
    """

    def __init__(self, experts: SwitchedExperts, name: str) -> None:
        self.experts, self.name = experts, name

    @property
    def weight(self) -> Tensor:
        """(E O, I)."""
        return matrices(self.experts, self.name).flatten(0, 1)

    @property
    def in_features(self) -> int:
        """I."""
        return matrices(self.experts, self.name).shape[2]

    @property
    def count(self) -> int:
        """E."""
        return getattr(self.experts, self.name).shape[0]

    @contextmanager
    def replaced(self, weight_OI: Tensor) -> Iterator[None]:
        """Inside, the experts have this weight (E O, I)."""
        parameter: Any = getattr(self.experts, self.name)
        before, made = parameter.data, weight_OI.unflatten(0, (self.count, -1))
        try:
            parameter.data = made.transpose(1, 2) if self.experts.is_transposed else made
            yield
        finally:
            parameter.data = before


def expert_matrices(model: nn.Module) -> dict[str, ExpertMatrix]:
    """Every matrix of experts of a twin's model, by its stock name."""
    arch = arch_of(model)
    return {
        f"{arch.blocks}.{block}.{arch.mlp}.{arch.experts.experts}.{name}": ExpertMatrix(experts, name)
        for block, (_, experts) in mixtures_of(model).items()
        for name in (IN, OUT)
        if arch.experts is not None
    }


def mask_experts(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Let the pruned view see these matrices of experts through their masks (E O, I); linear layers are left out."""
    for name, matrix in expert_matrices(model).items():
        if name in masks:
            keep_EOI = masks[name].unflatten(0, (matrix.count, -1))
            packed = torch.stack([pack(keep_OI) for keep_OI in keep_EOI]).to(_device(matrix.experts))
            matrix.experts.register_buffer(f"keep_{matrix.name}", packed, persistent=False)
            matrix.experts.masks = (*matrix.experts.masks, matrix.name)


def expert_mask(experts: SwitchedExperts, name: str) -> Tensor | None:
    """(E, O, I), true where a weight survives; None without a mask."""
    if name not in experts.masks:
        return None
    shape = matrices(experts, name).shape
    return torch.stack([unpack(packed, shape[1:]) for packed in getattr(experts, f"keep_{name}")])


def make_routable(model: nn.Module, switch: Switch) -> None:
    """Let routers and experts below the causal LM follow `switch`; all experts are there. Names stay the same."""
    arch = arch_of(model)
    for block in blocks_of(model):
        if not mixture_in(arch, block):
            continue
        router, experts = _parts(arch, block)
        for module, kind in ((router, SwitchedRouter), (experts, SwitchedExperts)):
            switch_class(module, functools.partial(_switched, kind))
            module.switch = switch
        router.register_buffer("keep_K", None, persistent=False)
        router.dtype = router.weight.dtype
        experts.see, experts.take, experts.masks = None, None, ()


@functools.cache
def _switched(kind: type[nn.Module], stock: type[nn.Module]) -> type[nn.Module]:
    return named_as(type(kind.__name__, (kind, stock), {"stock_forward": stock.forward}), stock)


def _parts(arch: Arch, block: nn.Module) -> tuple[Any, Any]:
    """Router and experts of a block, behind what peft has put around them."""
    assert arch.experts is not None
    mlp = block.get_submodule(arch.mlp)
    router, experts = mlp.get_submodule(arch.experts.router), cast(Any, mlp.get_submodule(arch.experts.experts))
    while hasattr(experts, "base_layer"):
        experts = experts.base_layer
    return getattr(router, "original_module", router), experts


def mixtures_of(model: nn.Module) -> dict[int, Routed]:
    """Router and experts of a twin's model, of each block that has them."""
    arch = arch_of(model)
    blocks = enumerate(blocks_of(model))
    return {index: Routed(*_parts(arch, block)) for index, block in blocks if mixture_in(arch, block)}


def keep_experts(model: nn.Module, kept: Mapping[int, tuple[int, ...]]) -> None:
    """Let the pruned view have exactly these experts, by block; all of them in blocks that are not named."""
    for index, (router, _) in mixtures_of(model).items():
        keep_K = torch.tensor(kept[index], device=_device(router)) if index in kept else None
        for each in _copies(base_of(model), router):
            each.keep_K = keep_K


@contextmanager
def keeping(model: nn.Module, kept: Mapping[int, tuple[int, ...]]) -> Iterator[None]:
    """Inside, the pruned view has these experts in these blocks, and in others those that it had before."""
    before = kept_experts(model)
    keep_experts(model, {**before, **kept})
    try:
        yield
    finally:
        keep_experts(model, before)


def kept_experts(model: nn.Module) -> dict[int, tuple[int, ...]]:
    """The experts of the pruned view, of each block that has lost some."""
    found = {index: router.keep_K for index, (router, _) in mixtures_of(model).items()}
    return {index: tuple(keep_K.tolist()) for index, keep_K in found.items() if keep_K is not None}


def _copies(model: nn.Module, router: Any) -> list[Any]:
    """The router, and the copy of it that is trained in its place, where there is one."""
    own = [
        copy
        for module in model.modules()
        if getattr(module, "original_module", None) is router
        for copy in module.modules_to_save.values()  # type: ignore[union-attr, operator]
    ]
    return [router, *own]


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


@contextmanager
def watching(model: nn.Module, see: Callable[[int], See]) -> Iterator[None]:
    """Inside, `see(block)` is called for each block with a mixture, and what it gives with each pass through it."""
    mixtures = mixtures_of(model)
    try:
        for index, (_, experts) in mixtures.items():
            experts.see = see(index)
        yield
    finally:
        for _, experts in mixtures.values():
            experts.see = None
