"""The process in which a program that a model wrote runs, and answers what its tests ask of it.

All that it says is taken as the program's own word: the program can say anything in its place.
"""

from __future__ import annotations

import operator
import os
import socket
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from recover.measure.box.wire import Line, line_of, pack, unpack

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


def run(source: int, end: int) -> int:
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
