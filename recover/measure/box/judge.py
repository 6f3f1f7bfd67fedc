"""The two processes of a trial: one runs the program, the other its tests, and it alone says whether they passed.

What a test gets of the program is data, compared here, or an object of the program's, which is nothing but a number
here: it equals no data, whatever its class says. All that the program's process says is taken as the program's own
word: the program can say anything in its place.

Between the two, plain data goes by value, all else by a number. A value is packed as JSON. Numbers, text, bytes, lists,
tuples, sets, dicts and a few types beside them are data, and their subclasses become data of the plain type: what a
subclass says of itself (`__eq__`) does not travel.
"""

from __future__ import annotations

import builtins
import collections
import datetime
import decimal
import fractions
import importlib
import json
import operator
import os
import socket
import struct
import sys
from collections.abc import Callable
from types import CodeType, ModuleType
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


ASKED: dict[str, Callable[..., Any]] = {
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
    "repr": repr,
    "item": operator.getitem,
    "get": getattr,
    "set": setattr,
    "eq": operator.eq,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
CHANGEABLE = ("list", "dict", "set", "bytearray", "deque")


class Answers:
    """Answers on `line` with what lies in `namespace`."""

    def __init__(self, line: Line, namespace: dict[str, Any]) -> None:
        self.line, self.namespace = line, namespace
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}

    def serve(self) -> Any:
        """Answer until the tests give back what a function of theirs was asked for; EOFError when they end."""
        while True:
            what, *rest = self.line.receive()
            if what == "ok":
                return self._value(rest[0])
            if what == "raised":
                raise RuntimeError(rest[1])
            try:
                answer = self._answer(what, rest)
            except BaseException as error:
                self.line.send("raised", type(error).__name__, line_of(error))
            else:
                self.line.send("ok", *answer)

    def _answer(self, what: str, rest: list[Any]) -> tuple[Any, ...]:
        if what == "names":
            found = {name: self._named(name, self.namespace[name]) for name in rest[0] if name in self.namespace}
            return (found,)
        if what == "call":
            function, arguments, named = self.objects[rest[0]], rest[1], rest[2]
            values = [self._value(each) for each in arguments]
            result = self._pack(function(*values, **{name: self._value(each) for name, each in named.items()}))
            return result, {n: self._pack(values[n]) for n, each in enumerate(arguments) if _changeable(each)}
        return (self._pack(ASKED[what](self.objects[rest[0]], *(self._value(each) for each in rest[1]))),)

    def _named(self, name: str, value: Any) -> Any:
        return ["module"] if isinstance(value, ModuleType) and value.__name__ == name else self._pack(value)

    def _pack(self, value: Any) -> Any:
        return pack(value, self._number)

    def _number(self, thing: Any) -> list[Any]:
        if id(thing) not in self.numbers:
            self.numbers[id(thing)] = len(self.objects)
            self.objects.append(thing)
        return ["object", self.numbers[id(thing)]]

    def _value(self, data: Any) -> Any:
        return unpack(data, self._known)

    def _known(self, data: list[Any]) -> Any:
        what, number = data
        if what == "object":
            return self.objects[number]

        def theirs(*arguments: Any) -> Any:
            self.line.send("back", number, [self._pack(each) for each in arguments])
            return self.serve()

        return theirs


def _changeable(data: Any) -> bool:
    return isinstance(data, list) and data[0] in CHANGEABLE


def serve(source: int, end: int) -> int:
    """Run the program in the file `source`, then answer on the socket `end`; gives the exit code."""
    line = Line(socket.socket(fileno=end))
    with os.fdopen(source, encoding="utf-8") as file:
        text = file.read()
    try:
        code = compile(text, "program.py", "exec")
    except Exception as error:
        line.send("unparsed", line_of(error))
        return 1
    module = ModuleType("__main__")
    sys.modules["__main__"], sys.argv = module, ["program.py"]
    try:
        exec(code, module.__dict__)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        line.send("error", line_of(error))
        return 1
    line.send("ready")
    try:
        Answers(line, module.__dict__).serve()
    except (EOFError, OSError):
        return 0
    return 0


MODULE = ["module"]  # what the program says of a module that it has imported under the module's own name
MODULES = sys.stdlib_module_names
PYTHONS = MODULES | frozenset(dir(builtins))
PROGRAM_ENDED = 3  # exit code


class ProgramError(Exception):
    """The program raised what is no exception of Python's own."""


class Theirs:
    """An object of the program's: what is done with it is done there."""

    def __init__(self, asks: Asks, number: int) -> None:
        object.__setattr__(self, "_asks", asks)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._asks.call(self._number, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._asks.do("get", self._number, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._asks.do("set", self._number, name, value)

    def __iter__(self) -> Any:
        return self._asks.do("iter", self._number)

    def __next__(self) -> Any:
        return self._asks.do("next", self._number)

    def __len__(self) -> int:
        return int(self._asks.do("len", self._number))

    def __bool__(self) -> bool:
        return self._asks.do("bool", self._number) is True

    def __getitem__(self, key: Any) -> Any:
        return self._asks.do("item", self._number, key)

    def __str__(self) -> str:
        return str.__str__(self._asks.do("str", self._number))

    def __repr__(self) -> str:
        return str.__str__(self._asks.do("repr", self._number))

    def __hash__(self) -> int:
        return hash(self._number)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Theirs) and self._asks.do("eq", self._number, other) is True)

    def _order(self, what: str, other: object) -> Any:
        return self._asks.do(what, self._number, other) is True if isinstance(other, Theirs) else NotImplemented

    def __lt__(self, other: object) -> Any:
        return self._order("lt", other)

    def __le__(self, other: object) -> Any:
        return self._order("le", other)

    def __gt__(self, other: object) -> Any:
        return self._order("gt", other)

    def __ge__(self, other: object) -> Any:
        return self._order("ge", other)


class Asks:
    """Asks on `line` of the program what the tests ask."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.theirs: dict[int, Theirs] = {}
        self.ours: list[Callable[..., Any]] = []

    def names(self, names: list[str]) -> dict[str, Any]:
        """What the program calls so. A module of Python's own is this process's, if it is called by its own name."""
        (found,) = self._ask("names", names)
        return {name: self._named(name, found[name]) for name in names if name in found}

    def _named(self, name: str, data: Any) -> Any:
        return importlib.import_module(name) if data == MODULE and name in MODULES else self._value(data)

    def do(self, what: str, number: int, *arguments: Any) -> Any:
        return self._value(self._ask(what, number, [self._pack(each) for each in arguments])[0])

    def call(self, number: int, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        packed = [self._pack(each) for each in arguments]
        result, after = self._ask("call", number, packed, {name: self._pack(each) for name, each in named.items()})
        for place, each in enumerate(arguments):
            now = after.get(str(place), packed[place])
            if now != packed[place]:
                _become(each, self._value(now))
        return self._value(result)

    def _ask(self, *question: Any) -> list[Any]:
        self.line.send(*question)
        while True:
            what, *rest = self.line.receive()
            if what == "ok":
                return rest
            if what == "raised":
                raise _error(*rest)
            if what != "back":
                raise ValueError("the program gave no answer")
            function = self.ours[rest[0]]
            try:
                answer = self._pack(function(*(self._value(each) for each in rest[1])))
            except Exception as error:
                self.line.send("raised", type(error).__name__, line_of(error))
            else:
                self.line.send("ok", answer)

    def _pack(self, value: Any) -> Any:
        return pack(value, self._number)

    def _number(self, thing: Any) -> list[Any]:
        if isinstance(thing, Theirs):
            return ["object", thing._number]
        if not callable(thing):
            raise TypeError(
                f"the tests hand the program a {type(thing).__name__}: data and functions can be handed over"
            )
        self.ours.append(thing)
        return ["function", len(self.ours) - 1]

    def _value(self, data: Any) -> Any:
        return unpack(data, self._known)

    def _known(self, data: list[Any]) -> Any:
        what, *rest = data
        if what == "object" and isinstance(rest[0], int):
            return self.theirs.setdefault(rest[0], Theirs(self, rest[0]))
        raise ValueError("the program gave what is no value")


def _become(value: Any, now: Any) -> None:
    """`value`, which the tests handed over, holds what the program left in it."""
    if type(value) is not type(now):
        return
    if isinstance(value, list | bytearray):
        value[:] = now
    elif isinstance(value, dict | set):
        value.clear()
        value.update(now)
    else:
        value.clear()
        value.extend(now)


def _error(name: str, words: str) -> Exception:
    kind = getattr(builtins, name, None) if isinstance(name, str) else None
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(str(words).removeprefix(f"{name}: "))
        except TypeError:  # such as UnicodeDecodeError, which takes five arguments
            pass
    return ProgramError(str(words))


def asked_names(code: CodeType) -> set[str]:
    """The names that a code reads from its globals, those of the functions in it as well."""
    inner = [each for each in code.co_consts if isinstance(each, CodeType)]
    return set(code.co_names).union(*(asked_names(each) for each in inner))


def wanted_names(code: CodeType, has: Callable[[list[str]], dict[str, Any]]) -> dict[str, Any]:
    """What the tests use of the program's.

    A program's own `len` or `math` is no judge: names of Python's builtins and modules are the program's only if the
    tests use no other name of it, as the tests of a program that is to define `sum` do.
    """
    names = sorted(name for name in asked_names(code) if not name.startswith("__"))
    own = has([name for name in names if name not in PYTHONS])
    pythons = has([name for name in names if name in PYTHONS])
    if any(isinstance(each, Theirs) for each in own.values()):
        pythons = {name: each for name, each in pythons.items() if isinstance(each, ModuleType)}
    return {**own, **pythons}


def judge(source: int, line: Line) -> dict[str, Any]:
    """{passed} or {passed, reason, parsed, ended}: of the program at the other end of `line`."""
    with os.fdopen(source, encoding="utf-8") as file:
        text = file.read()
    try:
        what, *rest = line.receive()
    except EOFError:
        return {"passed": False, "ended": True}
    if what != "ready":
        return {"passed": False, "reason": str(rest[0]) if rest else "", "parsed": what != "unparsed"}
    try:
        code = compile(text, "tests.py", "exec")
        exec(code, {"__name__": "__main__", **wanted_names(code, Asks(line).names)})
    except EOFError:
        return {"passed": False, "ended": True}
    except BaseException as error:
        return {"passed": False, "reason": line_of(error)}
    return {"passed": True}


def run(source: int, end: int, verdict: int) -> int:
    """Judge the program at the other end of the socket `end` by the tests in `source`; `verdict` gets the verdict.

    Gives the exit code.
    """
    try:
        found = judge(source, Line(socket.socket(fileno=end)))
    except (ValueError, TypeError, OSError, LookupError, RecursionError, MemoryError) as error:
        found = {"passed": False, "reason": line_of(error)}
    found["reason"] = found.get("reason", "")[:300]
    os.write(verdict, json.dumps(found).encode())
    return PROGRAM_ENDED if found.get("ended") else 0
