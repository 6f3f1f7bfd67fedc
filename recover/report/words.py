"""How numbers and model text are worded in reports: one place, so that page, markdown and pictures say the same.

Nothing here invents a value: None, NaN and infinity all become "not measured".
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from recover.base import units

NOT_MEASURED = "not measured"
TEXT_LIMIT = 1200  # characters of one text shown; the run directory holds the whole

# Control characters, and the marks that reorder text: a right-to-left override from a model would turn the page around.
_INVISIBLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


def finite(value: Any) -> float | None:
    """The value as a float, or None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def jsonable(value: Any) -> Any:
    """The same value with NaN and infinity as None, and all text in it `clean`."""
    if isinstance(value, dict):
        return {clean(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return clean(value)
    return value


def percent(value: Any, digits: int | None = None) -> str:
    """A share as a percentage: whole numbers from 10% to 99%, one digit near the ends, or `digits` digits."""
    share = finite(value)
    if share is None:
        return NOT_MEASURED
    if digits is None:
        digits = 1 if (0 < abs(share) < 0.0995 or 0.99 < share < 0.9995) else 0
    return f"{100 * share + math.copysign(1e-9, share):.{digits}f}%"  # 66.5 is 67, as readers round


def number(value: Any) -> str:
    """Three significant digits, with thousands separated and small numbers as powers of ten."""
    x = finite(value)
    if x is None:
        return NOT_MEASURED
    if x == 0 or 0.001 <= abs(x) < 1000:
        return f"{x:.3g}"
    if abs(x) >= 1e7 or abs(x) < 0.001:
        mantissa, exponent = f"{x:.1e}".split("e")
        return f"{mantissa}×10{_superscript(int(exponent))}"
    return f"{x:,.0f}"


def _superscript(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def count(value: Any) -> str:
    """A count in short form: 950, 200k, 1.6M, 7B."""
    x = finite(value)
    if x is None:
        return NOT_MEASURED
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(x) >= size * 0.9995:
            return f"{x / size:.3g}{unit}"
    return f"{x:.0f}"


def size(value: Any) -> str:
    """Bytes as the plan and the console say them."""
    x = finite(value)
    return NOT_MEASURED if x is None else units.size(x)


def duration(value: Any) -> str:
    """Seconds as the plan and the console say them."""
    x = finite(value)
    return NOT_MEASURED if x is None else units.duration(x)


def machine(record: Any) -> str:
    """A machine in a few words: its GPUs if it has some, else processor and cores."""
    if not isinstance(record, dict):
        return NOT_MEASURED if record is None else str(record)
    names = [str(gpu.get("name")) for gpu in record.get("gpus") or ()]
    if names:
        return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    return f"{record.get('processor') or 'CPU'}, {record.get('cores')} cores"


FORMATS = {"percent": percent, "number": number, "count": count, "bytes": size, "seconds": duration}


def shown(value: Any, form: str) -> str:
    """The value worded by one of FORMATS."""
    return FORMATS[form](value)


def clean(text: Any) -> str:
    """Model text safe to lay out: invisible and reordering characters become a visible mark. Templates escape it."""
    return _INVISIBLE.sub("\N{REPLACEMENT CHARACTER}", str(text).encode("utf-8", "replace").decode("utf-8"))


def shown_source(source: str) -> str:
    """A hub id as it is; of a local path only the last part, since folders of one machine tell others nothing.

    Of an export of ours the run's name, too: `deploy` alone is what all of them are called.
    """
    path = Path(source)
    if path.name == "deploy" and path.parent.name:
        return f"{path.parent.name}/deploy"
    return path.name if path.is_absolute() else source


def beginning(text: str) -> str:
    """A long text up to TEXT_LIMIT characters."""
    return text[:TEXT_LIMIT].rstrip() + " …" if len(text) > TEXT_LIMIT else text


def first_difference(dense: str, other: str) -> int | None:
    """Index of the first word of `other` that dense does not have at that place; None if word for word equal.

    If `other` is a beginning of `dense`, that is its number of words: it stopped there.
    """
    a, b = dense.split(), other.split()
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))


def split_at_word(text: str, index: int | None) -> tuple[str, str, str]:
    """(text before the word, the word, text after), white space kept; the word is empty if the text ends before it."""
    if index is None:
        return text, "", ""
    for position, match in enumerate(re.finditer(r"\S+", text)):
        if position == index:
            return text[: match.start()], match.group(), text[match.end() :]
    return text, "", ""
