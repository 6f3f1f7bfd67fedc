"""The KV cache in a model's output, as its forward takes it: told by the output, not by the call as in `recover`."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import Cache


def cached(output: Any) -> dict[str, Cache]:
    """{name: cache} for the next call; transformers renamed `past_key_values` to `cache` in 5.24."""
    (name,) = {"cache", "past_key_values"} & {field.name for field in dataclasses.fields(output)}
    return {name: getattr(output, name)}


def cache_of(output: Any) -> Cache:
    """The KV cache itself."""
    return next(iter(cached(output).values()))
