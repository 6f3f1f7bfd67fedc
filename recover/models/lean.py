"""Norms and gated MLPs of stock blocks that keep less for backward: forward's values are the stock ones, bit for bit.

Which modules: those whose stock `forward` reads word for word as below, whatever the family; others stay as they are.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recover.models.closing import named_as, stock_class
from recover.models.lora_linear import gated_lora_linear
from recover.models.masked_linear import Factors
from recover.models.masked_lora import SwitchedLora, base_parameters, hooked

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


def make_lean(model: nn.Module) -> None:
    """Let norms and gated MLPs below `model` keep less. Names and parameters stay; a second time does nothing."""
    for module in model.modules():
        stock: Any = module
        kind = _kind(stock_class(module))
        if kind is not None and not isinstance(module, kind):
            stock.__class__ = _lean(kind, type(module))


class LeanMlp(nn.Module):
    """Keeps gate and up; of activation(gate) and the product, each as large, nothing."""

    def forward(self, x: Tensor) -> Tensor:
        this: Any = self
        down, activation = this.down_proj, this.act_fn
        stock = this.switch.dense or this.closed or not torch.is_grad_enabled() or not isinstance(down, SwitchedLora)
        if stock or hooked(down) or hooked(activation):
            return super().forward(x)
        gate, up = this.gate_proj(x), this.up_proj(x)
        factors: Factors | None = down.foldable(up) if gate.dtype == up.dtype else None
        if factors is None:
            return down(activation(gate) * up)
        # Not called as a module: tools that follow modules do not expect one inside backward.
        weight_OI, bias_O = base_parameters(down)
        return gated_lora_linear(gate, up, activation.forward, weight_OI, bias_O, *factors)


class LeanNorm(nn.Module):
    """Keeps its input as it came, and not in float32; its backward is that of torch's own norm, in one kernel."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        this: Any = self
        plain = this.weight.dtype == hidden_states.dtype and not this.weight.requires_grad
        if not plain or hasattr(this.weight, "ds_id") or not (torch.is_grad_enabled() and hidden_states.requires_grad):
            return super().forward(hidden_states)
        return _RmsNorm.apply(hidden_states, this.weight, this.variance_epsilon, super().forward)  # type: ignore[return-value]


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
    source = ast.parse(textwrap.dedent(inspect.getsource(stock.forward))).body[0]
    assert isinstance(source, ast.FunctionDef)
    said = ast.unparse(source.body)  # pyright: ignore[reportArgumentType]
    return {ast.unparse(ast.parse(text)): kind for text, kind in ((MLP, LeanMlp), (NORM, LeanNorm))}.get(said)


@functools.cache
def _lean(kind: type[nn.Module], stock: type[nn.Module]) -> type[nn.Module]:
    return named_as(type(kind.__name__, (kind, stock), {}), stock)
