"""JSON as the standard has it: no NaN, no key twice; and the leaves of a value by dotted path."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from typing import Any


def dumps(value: Any, *, indent: int | None = None) -> str:
    """JSON text of `value`; a number that is not finite becomes null; dataclasses, paths and arrays are taken.

    Raises:
        TypeError: something else is in it.
    """
    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def loads(data: bytes) -> Any:
    """The value in a JSON text.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deep, or an object with the same key twice.
    """
    try:
        return json.loads(data.decode(), object_pairs_hook=_no_key_twice)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice in an object")
    return found


def whole_characters(text: str) -> bool:
    """Whether a text holds no half of a surrogate pair: JSON can name one, and no file and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def plain(value: Any) -> Any:
    """`value` with nothing in it but dict, list, str, int, finite float, bool and None."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if not isinstance(value, type) and dataclasses.is_dataclass(value):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {str(key): plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [plain(child) for child in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # a tensor or an array, without importing either library
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted path and JSON text of each value that holds no others; a list of plain values counts as one."""
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from leaves(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(child, dict | list | tuple) for child in value):
        for index, child in enumerate(value):
            yield from leaves(child, f"{path}.{index}" if path else str(index))
    else:
        yield path, dumps(value)
