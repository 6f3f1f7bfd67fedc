"""Attention whose rotary embedding may be a fused kernel: known by what its forward calls, word for word."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.utils.deprecation import deprecate_kwarg

from recover.kernels.fused import rotary_or

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
