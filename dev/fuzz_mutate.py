"""Changes of what is sound, by a seeded chance: of a tree of plain values, of its text, of bytes."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

Tree = Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", " ", "8"),
    *(
        "\x1b]0;x\x07\x1b[2J",
        "\u202e",
        "\ud800",
        "\x00",
        "null",
        "nan",
        "~",
        "no",
        "1e999",
        "0x10",
        "a" * 5000,
        "é" * 99,
    ),
    *("../../../etc/passwd", "/etc/passwd", "/dev/zero", "/dev/stdin", "pipe.jsonl", ".", "embedded:", "embedded:../x"),
    *("{a.__class__}", "{0}", "{a[b]:>999999999}", "{{", "%s", "$(touch x)", "`touch x`", "(a+)+$", "[", "(?P<", "\\"),
    *("owner/kernel", "<|endoftext|>", "torch.float64", "bfloat16", "__import__('os').system('touch x')", "a.b.c"),
    *([], [[]], [None] * 3, {}, {"": ""}, {"a": [1]}, ["a"] * 200, {"__class__": "x", "to_dict": 1}),
)
KEYS = (
    "",
    "__class__",
    "__init__",
    "to_dict",
    "self",
    "kind",
    "name",
    "\x1b[2J",
    "a.b",
    "0",
    "\ud800",
    "quantization_config",
)
NUMBERS = (0, 1, 2, 127, 128, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1, 10**9)


def tree(value: Tree, chance: random.Random, *, most: int = 3) -> Tree:
    """A copy with one to `most` changes."""
    changed = copy.deepcopy(value)
    for _ in range(chance.randint(1, most)):
        changed = _change(changed, chance)
    return changed


def _change(value: Tree, chance: random.Random) -> Tree:
    places = list(_places(value))
    if not places:
        return chance.choice(VALUES)
    inside, key = chance.choice(places)
    way = chance.random()
    if way < 0.5:
        inside[key] = copy.deepcopy(chance.choice(VALUES))
    elif way < 0.62:
        del inside[key]
    elif way < 0.74:
        other, at = chance.choice(places)
        inside[key] = copy.deepcopy(other[at]) if other is not inside else inside[key]
    elif way < 0.84 and isinstance(inside, dict):
        inside[chance.choice(KEYS)] = copy.deepcopy(chance.choice(VALUES))
    elif way < 0.92 and isinstance(inside, list):
        inside.extend(copy.deepcopy(inside[:20]))
    elif way < 0.96:
        inside[key] = [inside[key]]
    else:
        inside[key] = _deep(chance.choice((5, 60, 150, 400)))
    return value


def _places(value: Tree) -> Any:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from _places(inner)


def _deep(levels: int) -> Tree:
    value: Tree = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


def as_json(value: Tree, chance: random.Random) -> bytes:
    """The tree as JSON; now and then with what is no standard, or damaged."""
    data = json.dumps(value, ensure_ascii=chance.random() < 0.7).encode("utf-8", "surrogatepass")
    way = chance.random()
    if way < 0.06:
        return raw(data, chance)
    if way < 0.08:
        return b"\xef\xbb\xbf" + data
    if way < 0.09:
        return data.decode("utf-8", "replace").encode("utf-16")
    if way < 0.10:
        return b"[" * 100_000
    if way < 0.11:
        return data.replace(b'": ', b'": 1, "twice": ', 1)
    return data.replace(b'": ', b'": ' + b"9" * 5000 + b', "long": ', 1) if way < 0.12 else data


def raw(data: bytes, chance: random.Random, first: int | None = None) -> bytes:
    """Some bytes of the first ones changed, cut, doubled, or numbers put in that are far too large."""
    held = bytearray(data or b"\0")
    end = min(first or len(held), len(held))
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        held[chance.randrange(end)] = chance.randrange(256)
    if end > 16 and chance.random() < 0.4:
        at, size = chance.randrange(end - 8), chance.choice(("<Q", "<I", "<H"))
        number = chance.choice(NUMBERS) % 2 ** (8 * struct.calcsize(size))
        held[at : at + struct.calcsize(size)] = struct.pack(size, number)
    way = chance.random()
    if way < 0.1:
        return bytes(held[: chance.randrange(len(held))])
    if way < 0.15:
        at = chance.randrange(end)
        return bytes(held[:at] + held[at : at + chance.randrange(1, 64)] * chance.randint(1, 9) + held[at:])
    return bytes(held)


def text(data: str, pieces: tuple[str, ...], chance: random.Random) -> str:
    """The text with pieces put in, lines taken out, moved or doubled."""
    lines = data.splitlines(keepends=True) or [""]
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(lines))
        way = chance.random()
        if way < 0.5:
            cut = chance.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:cut] + chance.choice(pieces) + lines[at][cut:]
        elif way < 0.7:
            lines.insert(chance.randrange(len(lines) + 1), lines[at])
        elif way < 0.85 and len(lines) > 1:
            del lines[at]
        else:
            lines[at] = chance.choice(pieces)
    return "".join(lines)
