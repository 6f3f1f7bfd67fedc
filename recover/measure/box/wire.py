"""Values between two processes that do not trust each other: plain data by value, all else by a number.

A value is packed as JSON. Numbers, text, bytes, lists, tuples, sets, dicts and a few types beside them are data, and
their subclasses become data of the plain type: what a subclass says of itself (`__eq__`) does not travel.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import json
import socket
import struct
from collections.abc import Callable
from typing import Any

MESSAGE_BYTES = 2**26
WORD = 2**53  # integers beyond are written in hexadecimal, which has no limit of digits
ITEMS: dict[str, type] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
}
TEXTS: dict[str, Callable[[str], Any]] = {
    "decimal": decimal.Decimal,
    "fraction": fractions.Fraction,
    "datetime": datetime.datetime.fromisoformat,
    "date": datetime.date.fromisoformat,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
}


def pack(value: Any, number: Callable[[Any], list[Any]]) -> Any:
    """What JSON holds of `value`; `number(object)` is what stands for an object that is no data."""
    if value is None or isinstance(value, bool | str | float):
        return value
    if isinstance(value, int):
        return int(value) if -WORD < value < WORD else ["int", format(int(value), "x")]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, range):
        return ["range", *(pack(each, number) for each in (value.start, value.stop, value.step))]
    if isinstance(value, dict):
        return ["dict", [[pack(key, number), pack(each, number)] for key, each in value.items()]]
    for name, kind in ITEMS.items():
        if isinstance(value, kind):
            return [name, [pack(each, number) for each in value]]
    text = _text(value)
    return number(value) if text is None else text


def _text(value: Any) -> list[Any] | None:
    if isinstance(value, bytes | bytearray):
        return ["bytes" if isinstance(value, bytes) else "bytearray", value.hex()]
    if isinstance(value, decimal.Decimal | fractions.Fraction):
        return ["decimal" if isinstance(value, decimal.Decimal) else "fraction", str(value)]
    if isinstance(value, datetime.date):
        return ["datetime" if isinstance(value, datetime.datetime) else "date", value.isoformat()]
    return None


def unpack(data: Any, known: Callable[[list[Any]], Any]) -> Any:
    """The value that `pack` packed; `known` gives what stands for an object that is no data.

    Raises ValueError or TypeError if `data` is no such thing.
    """
    if not isinstance(data, list):
        return data
    name, *rest = data
    if name in ITEMS:
        return ITEMS[name]([unpack(each, known) for each in rest[0]])
    if name in TEXTS:
        return TEXTS[name](rest[0])
    if name == "dict":
        return {unpack(key, known): unpack(each, known) for key, each in rest[0]}
    if name == "int":
        return int(rest[0], 16)
    if name == "complex":
        return complex(float(rest[0]), float(rest[1]))
    if name == "range":
        return range(*(unpack(each, known) for each in rest))
    return known(data)


class Line:
    """One end of a socket on which messages, each a JSON list, come and go."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end

    def send(self, *message: Any) -> None:
        body = json.dumps(message).encode()
        if len(body) > MESSAGE_BYTES:
            raise ValueError(f"a value of {len(body)} bytes was to be handed over, at most {MESSAGE_BYTES} can be")
        self.end.sendall(struct.pack("<I", len(body)) + body)

    def receive(self) -> list[Any]:
        """The next message. Raises EOFError if the other side has ended, ValueError if it sent no such thing."""
        (size,) = struct.unpack("<I", self._bytes(4))
        if size > MESSAGE_BYTES:
            raise ValueError(f"a message of {size} bytes came, at most {MESSAGE_BYTES} can")
        message = json.loads(self._bytes(size))
        if not isinstance(message, list) or not message:
            raise ValueError("what came is no message")
        return message

    def _bytes(self, count: int) -> bytes:
        found = bytearray()
        while len(found) < count:
            part = self.end.recv(min(count - len(found), 2**20))
            if not part:
                raise EOFError("the program ended")
            found += part
        return bytes(found)


def line_of(error: BaseException) -> str:
    """The last line of a traceback: kind and words."""
    try:
        words = str(error)
    except Exception:
        words = ""
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
