"""Norms, gated MLPs and attention of stock blocks, as they are trained: less is kept for backward, less memory moved.

Forward's values are the stock ones, bit for bit, but where the fused kernels run: in training and writing on a GPU
(see `Switch.fused`), up to the order of a sum. Which modules: those whose stock `forward` reads word for word as below,
and attention whose rotary embedding does, whatever the family; others stay as they are. The second half is that
attention, whose rotary embedding may be a fused kernel.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.utils.deprecation import deprecate_kwarg

from recover.kernels import fused
from recover.kernels.fused import PlainGate, gated_lora_linear, rotary_or
from recover.models.masked_lora import SwitchedLora, base_parameters, hooked
from recover.models.switched import Factors, Switch, named_as, stock_class

MLP = """
down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
return down_proj
"""

NORM = """
input_dtype = hidden_states.dtype
hidden_states = hidden_states.to(torch.float32)
variance = hidden_states.pow(2).mean(-1, keepdim=True)
hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
return self.weight * hidden_states.to(input_dtype)
"""


def make_lean(model: nn.Module, switch: Switch | None = None) -> None:
    """Let norms, gated MLPs and attention below `model` follow `switch`. Names and parameters stay; twice is once."""
    switch = switch or Switch()
    for module in model.modules():
        stock: Any = module
        kind = _kind(stock_class(module))
        if kind is not None and not isinstance(module, kind):
            stock.__class__ = _lean(kind, type(module), stock_class(module))
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
    """The stock forward, whose rotary embedding is one kernel where kernels may run."""

    with_kernel: Callable[..., Any]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        this: Any = self
        closed = getattr(this, "closed", False) and not this.switch.dense
        if closed or not this.switch.fused(this.training) or not fused.available(hidden_states.device):
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
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            x = x.detach().requires_grad_()
            y = F.rms_norm(x, weight_D.shape, weight_D, ctx.epsilon)
        return *torch.autograd.grad(y, x, dy), None, None, None


@functools.cache
def _kind(stock: type[nn.Module]) -> type[nn.Module] | None:
    """What makes modules of this class lean, if anything does."""
    if not stock.__module__.startswith("transformers.models."):
        return None
    if with_fused_rotary(stock) is not None:
        return LeanAttention
    source = ast.parse(textwrap.dedent(inspect.getsource(stock.forward))).body[0]
    assert isinstance(source, ast.FunctionDef)
    said = ast.unparse(source.body)  # pyright: ignore[reportArgumentType]
    return {ast.unparse(ast.parse(text)): kind for text, kind in ((MLP, LeanMlp), (NORM, LeanNorm))}.get(said)


@functools.cache
def _lean(kind: type[nn.Module], seen: type[nn.Module], stock: type[nn.Module]) -> type[nn.Module]:
    """`kind` before the class that a module has, whose forward comes from `stock`."""
    own = {"with_kernel": with_fused_rotary(stock)} if kind is LeanAttention else {}
    return named_as(type(kind.__name__, (kind, seen), own), seen)


# Attention whose rotary embedding may be a fused kernel: known by what its forward calls, word for word.

NAME = "apply_rotary_pos_emb"

RENAMING: Any = deprecate_kwarg("old", "1", new_name="new")(lambda new: new)  # all under it have one code

ROTARY = """
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed
"""

ROTATE_HALF = """
def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)
"""


@functools.cache
def with_fused_rotary(stock: type[nn.Module]) -> Callable[..., Any] | None:
    """The forward of a stock attention with rotary by a kernel where that fits; None if it is not known what it calls.

    It is the stock code with another global, so nothing of transformers' modules is replaced, for nobody else either.
    Of decorators, only transformers' `deprecate_kwarg` is known: it renames a keyword and runs the function, and the
    new forward is under it too. Any other might do something before or after that a copy of the function would lack.
    """
    return _with_fused_rotary(vars(stock).get("forward"))


def _with_fused_rotary(forward: Any) -> Callable[..., Any] | None:
    if not isinstance(forward, types.FunctionType):
        return None
    if forward.__code__ is RENAMING.__code__:
        inner = _with_fused_rotary(forward.__wrapped__)
        if inner is None:
            return None
        return functools.wraps(inner)(_copied(forward, forward.__globals__, forward.__wrapped__, inner))
    if hasattr(forward, "__wrapped__"):
        return None
    known = forward.__globals__
    rotary = _plain(known.get(NAME))
    if NAME not in forward.__code__.co_names or rotary is None or _said(rotary) != _as_written(ROTARY):
        return None
    half = _plain(rotary.__globals__.get("rotate_half"))
    if half is None or _said(half) != _as_written(ROTATE_HALF):
        return None
    return _copied(forward, {**known, NAME: rotary_or(known[NAME])})


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


def _plain(called: Any) -> types.FunctionType | None:
    """The function itself, behind decorators, and behind the module that the `kernels` package makes of one."""
    if isinstance(called, nn.Module) and "forward" not in vars(called):
        closure = getattr(type(called).forward, "__closure__", None) or ()
        functions = [cell.cell_contents for cell in closure if isinstance(cell.cell_contents, types.FunctionType)]
        called = functions[0] if len(functions) == 1 else None
    plain = inspect.unwrap(called) if callable(called) else None
    return plain if isinstance(plain, types.FunctionType) else None


def _said(function: types.FunctionType) -> str | None:
    """Arguments and body, without annotations, decorators and docstring; None where there is no source."""
    try:
        return _as_written(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return None


def _as_written(text: str) -> str | None:
    function = ast.parse(text).body[0]
    if not isinstance(function, ast.FunctionDef):
        return None
    function.decorator_list, function.returns = [], None
    for argument in function.args.args:
        argument.annotation = None
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:]
    return ast.unparse(function)
