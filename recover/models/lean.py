"""Norms, gated MLPs and attention of stock blocks, as they are trained: less is kept for backward, less memory moved.

Forward's values are the stock ones, bit for bit, but where the fused kernels run: in training and writing on a GPU
(see `Switch.fused`), up to the order of a sum. Which modules: those that the row of the family names (`Arch.lean`) and
that compute what is written in `norm`, `gated_mlp` and `rotary` below. That is tried once for each class, with a few
random bfloat16 numbers, on the device of the module: float32 hides where a class rounds. Where one bit differs, the
module stays as transformers wrote it, and a line says so.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.utils.deprecation import deprecate_kwarg

from recover.base import console
from recover.kernels import fused
from recover.kernels.fused import PlainGate, gated_lora_linear, rotary_or
from recover.models.arch import ARCHS, Lean, base_of
from recover.models.masked_lora import SwitchedLora, base_parameters, hooked
from recover.models.switched import Factors, Switch, named_as, stock_class


def make_lean(model: nn.Module, switch: Switch | None = None) -> None:
    """Let norms, gated MLPs and attention below `model` follow `switch`. Names and parameters stay; twice is once."""
    switch = switch or Switch()
    arch = ARCHS.get(getattr(getattr(base_of(model), "config", None), "model_type", ""))
    for module in model.modules():
        stock: Any = module
        own = stock_class(module)
        part = _part(module, own)
        if part is None or (arch is not None and part not in arch.lean) or isinstance(module, KINDS[part]):
            continue
        if computes_as_known(part, module, own):
            stock.__class__ = _lean(KINDS[part], type(module), own)
            stock.switch = switch


class LeanMlp(nn.Module):
    """Keeps gate and up; of activation(gate) and the product, each as large, nothing."""

    def forward(self, x: Tensor) -> Tensor:
        this: Any = self
        switch, down, activation = this.switch, this.down_proj, this.act_fn
        kernels = switch.fused(this.training) and type(activation) in (nn.SiLU, SiLUActivation)
        one_step = not switch.dense and torch.is_grad_enabled() and isinstance(down, SwitchedLora) and not hooked(down)
        closed = getattr(this, "closed", False) and not switch.dense
        if closed or hooked(activation) or not (one_step or (kernels and fused.available(x.device))):
            return super().forward(x)
        gate, up = this.gate_proj(x), this.up_proj(x)
        kernels = kernels and fused.fits(gate, up)
        factors: Factors | None = down.foldable(up) if one_step and gate.dtype == up.dtype else None
        if factors is None:
            return down(fused.gated(gate, up) if kernels else activation(gate) * up)
        # Not called as a module: tools that follow modules do not expect one inside backward.
        weight_OI, bias_O = base_parameters(down)
        way = fused.FusedGate() if kernels else PlainGate(activation.forward)
        return gated_lora_linear(gate, up, way, weight_OI, bias_O, *factors)


class LeanNorm(nn.Module):
    """Keeps its input as it came, and not in float32; forward and backward are one kernel each, or backward alone."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        this: Any = self
        weight_D = this.weight
        if weight_D.dtype != hidden_states.dtype or weight_D.requires_grad:
            return super().forward(hidden_states)
        if this.switch.fused(this.training) and fused.fits_norm(hidden_states, weight_D):
            return fused.rms_norm(hidden_states, weight_D, this.variance_epsilon)
        if not (torch.is_grad_enabled() and hidden_states.requires_grad):
            return super().forward(hidden_states)
        return _RmsNorm.apply(hidden_states, weight_D, this.variance_epsilon, super().forward)  # type: ignore[return-value]


class LeanAttention(nn.Module):
    """The stock forward, whose rotary embedding is one kernel where kernels may run, and fewer passes on a CPU."""

    with_kernel: Callable[..., Any]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        this: Any = self
        closed = getattr(this, "closed", False) and not this.switch.dense
        kernels = this.switch.fused(this.training) and fused.available(hidden_states.device)
        if closed or not (kernels or hidden_states.device.type == "cpu"):
            return super().forward(hidden_states, *args, **kwargs)
        return self.with_kernel(hidden_states, *args, **kwargs)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_D, epsilon, stock):  # type: ignore[override]
        ctx.save_for_backward(x, weight_D)
        ctx.epsilon = epsilon
        return stock(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        x, weight_D = ctx.saved_tensors
        if x.device.type == "cpu":
            return norm_gradient(dy, x, weight_D, ctx.epsilon), None, None, None
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            x = x.detach().requires_grad_()
            y = F.rms_norm(x, weight_D.shape, weight_D, ctx.epsilon)
        return *torch.autograd.grad(y, x, dy), None, None, None


def norm_gradient(dy: Tensor, x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """Of x in y = weight x / rms(x), rms(x) = sqrt(mean(x^2) + epsilon), at dy; in float32 or wider, cast once."""
    kind = torch.promote_types(x.dtype, torch.float32)
    wide, width = x.to(kind), x.shape[-1]
    inverse = (torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_() / width).add_(epsilon).rsqrt_()
    unit, of_unit = wide * inverse, dy.to(kind) * weight_D
    along = torch.linalg.vecdot(unit, of_unit).unsqueeze_(-1) / width
    return torch.addcmul(of_unit, unit, along, value=-1).mul_(inverse).to(x.dtype)


@functools.cache
def _lean(kind: type[nn.Module], seen: type[nn.Module], stock: type[nn.Module]) -> type[nn.Module]:
    """`kind` before the class that a module has, whose forward comes from `stock`."""
    own = {"with_kernel": _replaced(stock)[0]} if kind is LeanAttention else {}  # type: ignore[index]
    return named_as(type(kind.__name__, (kind, seen), own), seen)


KINDS: dict[Lean, type[nn.Module]] = {"norm": LeanNorm, "mlp": LeanMlp, "rotary": LeanAttention}


# What is known of stock modules.

Linear = Callable[[Tensor], Tensor]


def norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """RMSNorm that rounds to the dtype of x before the weight multiplies."""
    wide = x.to(torch.float32)
    return weight_D * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def gated_mlp(x: Tensor, gate: Linear, up: Linear, down: Linear, activation: Linear) -> Tensor:
    """Nothing but this: no factors, limits or dropout."""
    return down(activation(gate(x)) * up(x))


def rotary(q_BHTC: Tensor, k_BHTC: Tensor, cos_BTC: Tensor, sin_BTC: Tensor) -> tuple[Tensor, Tensor]:
    """Column c turns with column c + C / 2."""
    cos, sin = cos_BTC.unsqueeze(1), sin_BTC.unsqueeze(1)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return turned(q_BHTC), turned(k_BHTC)


# Whether a class computes that.

SAID = {"norm": "norms", "mlp": "MLPs", "rotary": "the rotary embedding"}
_found: dict[tuple[Any, ...], bool] = {}


def _part(module: nn.Module, stock: type[nn.Module]) -> Lean | None:
    """What this module would be, by what it has."""
    if not stock.__module__.startswith("transformers.models."):
        return None
    if hasattr(module, "variance_epsilon") and [*module._parameters] == ["weight"] and _takes_one(stock):
        return "norm"
    if module._modules.keys() >= {"gate_proj", "up_proj", "down_proj", "act_fn"} and _takes_one(stock):
        return "mlp"
    return "rotary" if _replaced(stock) is not None else None


@functools.cache
def _takes_one(stock: type[nn.Module]) -> bool:
    """Whether forward has one argument: gated norms of mixers have two."""
    return len(inspect.signature(stock.forward).parameters) == 2


def computes_as_known(part: Lean, module: Any, stock: type[nn.Module]) -> bool:
    """Whether the class computes what is known of its part, to the bit. Tried once; said where it does not."""
    tensor = next(module.parameters(), None)
    device = torch.device("cpu") if tensor is None or tensor.is_meta else tensor.device
    key = part, stock, device.type, type(getattr(module, "act_fn", None))
    if key not in _found:
        _found[key] = _tried({"norm": _norms, "mlp": _mlps, "rotary": _rotaries}[part], module, stock, device)
        if not _found[key]:
            console.warn(
                f"{SAID[part]} of {stock.__name__}: transformers computes otherwise than is known here; that runs as it"
                " is, and takes more time and memory in training"
            )
    return _found[key]


def _tried(pair: Callable[..., tuple[Any, Any]], module: Any, stock: type[nn.Module], device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)  # of its own: nobody else's random numbers move

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            return all(map(torch.equal, *pair(module, stock, random)))
        except Exception:  # whatever code of others raises for tensors that are as it knows them: it is other code
            return False


def _norms(module: Any, stock: type[nn.Module], random: Callable[..., Tensor]) -> tuple[Any, Any]:
    x, weight_D = random(8, 64), random(64)
    x = x * torch.logspace(-4, 3, 8, device=x.device, dtype=x.dtype)[:, None]  # epsilon counts in the first rows
    bare = _bare(module, stock, _parameters={"weight": weight_D})
    return (stock.forward(bare, x),), (norm(x, weight_D, module.variance_epsilon),)


def _mlps(module: Any, stock: type[nn.Module], random: Callable[..., Tensor]) -> tuple[Any, Any]:
    x = random(8, 16)
    gate, up, down = (functools.partial(F.linear, weight=random(*shape)) for shape in ((32, 16), (32, 16), (16, 32)))
    bare = _bare(module, stock, gate_proj=gate, up_proj=up, down_proj=down, act_fn=module.act_fn.forward)
    return (stock.forward(bare, x),), (gated_mlp(x, gate, up, down, module.act_fn.forward),)


def _rotaries(_module: Any, stock: type[nn.Module], random: Callable[..., Tensor]) -> tuple[Any, Any]:
    tensors = random(2, 4, 5, 16), random(2, 2, 5, 16), random(1, 5, 16), random(1, 5, 16)
    replaced = _replaced(stock)
    assert replaced is not None
    return replaced[1](*tensors), rotary(*tensors)


def _bare(module: nn.Module, stock: type[nn.Module], **own: Any) -> Any:
    """An object of the stock class with the settings of `module`, and this of its own; it has no hooks."""
    bare: Any = object.__new__(stock)
    vars(bare).update({**vars(module), "_modules": {}, **own})
    return bare


# Attention whose rotary embedding may be a fused kernel.

NAME = "apply_rotary_pos_emb"


def with_fused_rotary(stock: type[nn.Module]) -> Callable[..., Any] | None:
    """The forward of a stock attention with rotary by a kernel where that fits; None if it is not known what it calls.

    It is the stock code with another global, so nothing of transformers' modules is replaced, for nobody else either.
    Of decorators, only those of transformers' `deprecation` are known: they rename a keyword and run the function, and
    the new forward is under them too. Any other might do something before or after that a copy would lack.
    """
    replaced = _replaced(stock)
    return None if replaced is None else replaced[0]


@functools.cache
def _replaced(stock: type[nn.Module]) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """That forward, and the rotary embedding that the stock one calls."""
    return _with_fused_rotary(vars(stock).get("forward"))


def _with_fused_rotary(forward: Any) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    if not isinstance(forward, types.FunctionType):
        return None
    known = forward.__globals__
    if hasattr(forward, "__wrapped__"):
        inner = _with_fused_rotary(forward.__wrapped__)
        if inner is None or known.get("__name__") != deprecate_kwarg.__module__:
            return None
        new, rotates = inner
        return functools.wraps(new)(_copied(forward, known, forward.__wrapped__, new)), rotates
    if NAME not in forward.__code__.co_names or not callable(known.get(NAME)):
        return None
    return _copied(forward, {**known, NAME: rotary_or(known[NAME])}), known[NAME]


def _copied(
    function: types.FunctionType, known: dict[str, Any], old: Any = None, new: Any = None
) -> Callable[..., Any]:
    """The function with these globals; where it closes over `old`, over `new` instead."""
    cells = function.__closure__ or ()
    if old is not None:
        cells = tuple(types.CellType(new) if cell.cell_contents is old else cell for cell in cells)
    copy = types.FunctionType(function.__code__, known, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
