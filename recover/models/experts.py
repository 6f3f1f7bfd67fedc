"""Mixtures of experts in two views: in the pruned one a router knows only the experts that stay.

Nothing is copied. The router runs the stock code on those of its rows that stay, so that it chooses and weights as a
model without the others would; the experts are the stock module with all its matrices, of which some are not asked for.

Adapters on experts are applied as stock code applies the experts: pairs of a token and an expert are sorted by expert,
and one grouped product multiplies each expert's rows by its matrix. How many rows each has stays on the device, so the
host waits for nothing, and a CUDA graph records it.

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

from recover.base import console
from recover.models.arch import Arch, arch_of, base_of, blocks_of, experts_of, mixture_in
from recover.models.switched import Factors, Switch, masked_lora_linear, named_as, pack, switch_class, unpack

IN, OUT = "gate_up_proj", "down_proj"  # matrices of every expert, in the order in which a token meets them
ALIGNED = 16  # bytes: a grouped product takes rows whose length is a multiple of it
GROUPED = (torch.float32, torch.bfloat16, torch.float16)  # what it multiplies
OLDEST = (8, 0)  # compute capability of the oldest GPU that has one
_said: set[str] = set()

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
        if self.see is None and self.take is None and not masks and self._groups():
            return self._by_group(hidden_states, top_k_index, top_k_weights, factors)

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

    def _groups(self) -> bool:
        """Whether torch's grouped product is for these experts; once for each reason, why not is said."""
        reason = _not_grouped(self)
        if reason and reason not in _said:
            _said.add(reason)
            console.warn(f"adapters on experts are applied one expert after the other, many times slower: {reason}")
        return not reason

    def _by_group(
        self, h_ND: Tensor, index_NP: Tensor, weight_NP: Tensor, factors: Mapping[str, ExpertFactors]
    ) -> Tensor:
        """All experts at once, each on its tokens; summed up as the stock grouped product does."""
        this: Any = self
        pairs = Pairs.of(index_NP, this.num_experts)
        x_SD = _Taken.apply(h_ND.to(this.down_proj.dtype), pairs.order_S // index_NP.shape[1], pairs.place_NP)
        inside_SI = this._apply_gate(self._grouped(x_SD, IN, pairs, factors.get(IN)))
        y_SD = self._grouped(inside_SI, OUT, pairs, factors.get(OUT))
        place_S = pairs.place_NP.flatten()
        weight_S: Any = _Taken.apply(weight_NP.flatten(), pairs.order_S, place_S)
        weighted_SD: Any = _Taken.apply(y_SD * weight_S[:, None], place_S, pairs.order_S)
        return weighted_SD.unflatten(0, index_NP.shape).sum(1).to(h_ND.dtype)

    def _grouped(self, x_SI: Any, name: str, pairs: Pairs, factors: ExpertFactors | None) -> Tensor:
        """x W^T + bias + s (x A^T) B^T, each row with the matrices of its expert."""
        weight_EIO = matrices(self, name).transpose(1, 2)
        x_SI = x_SI.to(weight_EIO.dtype)  # autocast knows nothing of grouped products
        y_SO = F.grouped_mm(x_SI, weight_EIO, offs=pairs.ends_E)
        if hasattr(self, f"{name}_bias"):
            y_SO = y_SO + getattr(self, f"{name}_bias")[pairs.expert_S]
        if factors is None:
            return y_SO
        a_ERI, b_ERO = (_Asked.apply(each, pairs.ends_E) for each in factors.aligned(x_SI.dtype))
        low_SR = F.grouped_mm(x_SI, a_ERI.transpose(1, 2), offs=pairs.ends_E)
        return y_SO + F.grouped_mm(low_SR * factors.scaling, b_ERO, offs=pairs.ends_E)

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

    def aligned(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (E, R, I) and B (E, R, O) for grouped products in this dtype; zeros fill R up to a multiple of 16 bytes."""
        a_ERI, b_ERO = self.a_ERI.to(dtype), self.b_EOR.transpose(1, 2).to(dtype)
        more = -a_ERI.shape[1] % (ALIGNED // dtype.itemsize)
        return tuple((F.pad(each, (0, 0, 0, more)) if more else each).contiguous() for each in (a_ERI, b_ERO))  # type: ignore[return-value]


class Pairs(NamedTuple):
    """Pairs of a token and an expert, in the experts' order."""

    expert_S: Tensor
    order_S: Tensor  # the place of each in the flat order (N P), and the other way round
    place_NP: Tensor
    ends_E: Tensor  # int32: the pairs of an expert end here, those of the next begin

    @classmethod
    def of(cls, index_NP: Tensor, experts: int) -> Pairs:
        """By what the router chose; nothing comes to the host."""
        expert_S, order_S = index_NP.flatten().sort(stable=True)
        numbers_S = torch.arange(len(order_S), device=order_S.device)
        place_NP = torch.empty_like(order_S).scatter_(0, order_S, numbers_S).view(index_NP.shape)
        numbers_E = torch.arange(experts, device=expert_S.device, dtype=expert_S.dtype)
        return cls(expert_S, order_S, place_NP, torch.searchsorted(expert_S, numbers_E, right=True, out_int32=True))


class _Taken(torch.autograd.Function):
    """Rows `x[rows]`. `back` says where each row went: to one place, or to P whose gradients are summed.

    Indexing itself would sort once more in backward, to add up rows that may be anywhere.
    """

    @staticmethod
    def forward(ctx, x, rows, back):  # type: ignore[override]
        ctx.save_for_backward(back)
        return x[rows]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        (back,) = ctx.saved_tensors
        return (dy[back] if back.dim() == 1 else dy[back].sum(1)), None, None


class _Asked(torch.autograd.Function):
    """Factors as they are; their gradient is 0 of experts without tokens, where a grouped product may leave anything.

    (So on Blackwell: torch issue 172439.)
    """

    @staticmethod
    def forward(ctx, factor_E, ends_E):  # type: ignore[override]
        ctx.save_for_backward(ends_E)
        return factor_E.view_as(factor_E)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dfactor_E):  # type: ignore[override]
        (ends_E,) = ctx.saved_tensors
        idle_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
        return dfactor_E.masked_fill(idle_E[:, None, None], 0), None


def _not_grouped(experts: Any) -> str:
    """Why these experts are not multiplied by a grouped product; empty if they are."""
    weight = experts.down_proj
    chosen = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    if chosen != "grouped_mm":
        return f"the model's experts_implementation is {chosen}, and not grouped_mm"
    if weight.dtype not in GROUPED:
        return f"torch has no grouped product in {str(weight.dtype).removeprefix('torch.')}"
    if weight.device.type == "cuda" and (found := torch.cuda.get_device_capability(weight.device)) < OLDEST:
        return f"a GPU of compute capability {found[0]}.{found[1]} has no grouped product, those from 8.0 on have one"
    if weight.device.type not in ("cpu", "cuda"):
        return f"no grouped product is known on {weight.device.type}"
    if any(size * weight.itemsize % ALIGNED for size in weight.shape[1:]):
        return f"rows of {tuple(weight.shape[1:])} numbers are no multiples of {ALIGNED} bytes"
    if any(getattr(experts, name).data_ptr() % ALIGNED for name in (IN, OUT)):
        return f"the experts' matrices begin at no multiple of {ALIGNED} bytes"
    return ""


def taken_one_by_one(model: nn.Module) -> bool:
    """Whether a pass waits to hear which tokens an expert has: masks, and what no grouped product is for."""
    return any(experts.masks or _not_grouped(experts) for _, experts in mixtures_of(model).values())


def used_parameters(model: nn.Module) -> int:
    """Of a twin's model, its adapters counted too: those that a token goes through."""
    count, used = experts_of(model.config)  # pyright: ignore[reportArgumentType]
    idle = sum(each.numel() for _, experts in mixtures_of(model).values() for each in experts.parameters())
    return sum(each.numel() for each in model.parameters()) - (idle * (count - used) // count if count else 0)


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
