"""The process that runs a program's tests, and alone says whether it passed. The program is in another process.

What a test gets of the program is data, compared here, or an object of the program's, which is nothing but a number
here: it equals no data, whatever its class says.
"""

from __future__ import annotations

import builtins
import importlib
import json
import os
import socket
import sys
from collections.abc import Callable
from types import CodeType, ModuleType
from typing import Any

from recover.measure.box.wire import Line, line_of, pack, unpack

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
