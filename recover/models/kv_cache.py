"""The KV cache that a model takes and gives: one word here, `cache`; two names in transformers (`cache` since 5.24).

A forward swallows keywords that it does not know, and then decodes without a cache and without an error. So the name is
read from the model's own signature, and never told by transformers' version: a family may be renamed later than others.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import Cache

from recover.base.errors import ModelError
from recover.models.arch import base_of

# Where two are taken, the first is the one that is not deprecated. GPT-NeoX's blocks have a name of their own, and so
# have mixers before transformers 5.24.
NAMES = ("cache", "past_key_values", "layer_past", "cache_params")


@functools.cache
def cache_name(kind: type[nn.Module]) -> str:
    """The keyword under which forwards of this class take a KV cache; raises ModelError if it is none of NAMES."""
    taken = inspect.signature(kind.forward).parameters  # behind decorators and the twin's class too
    for name in NAMES:
        if name in taken:
            return name
    raise ModelError(
        f"{kind.__module__}.{kind.__qualname__}: its forward takes {', '.join([*taken][1:])}; expected a KV cache "
        f"under one of the names {', '.join(NAMES)}. Use another version of transformers, or add the name to {__name__}"
    )


def taking(model: nn.Module, cache: Any) -> dict[str, Any]:
    """What to call the causal LM with so that it takes this cache (None: it makes one of its own, if it is to)."""
    return {cache_name(type(base_of(model))): cache}


def given_by(output: Any) -> Any:
    """The cache in what a model gave back, None if it kept none."""
    return output.cache if hasattr(output, "cache") else output.past_key_values


def among(keywords: Mapping[str, Any], others: Sequence[Any] = ()) -> Any:
    """The cache among the keywords of a call, or its `others`, given by place (GPT-2); None if there is none."""
    named = (keywords[name] for name in NAMES if keywords.get(name) is not None)
    return next(named, next((each for each in others if isinstance(each, Cache)), None))
