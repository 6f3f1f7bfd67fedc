"""YAML as people write it (the 1.2 core): `1e-3` is a number, `2:4` and `no` are text, and no key occurs twice.

PyYAML reads YAML 1.1, where `2:4` is the number 124, `no` is false and `1e-3` is text.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from recover.base.artifacts import JsonObject, meant
from recover.base.errors import RecipeError

MOST_REPEATED = 10_000  # values that the aliases of a text may stand for, beside those that are written
LARGEST = 2**22  # bytes of a file that a person writes


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  yaml's own attribute

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for index, key in enumerate(keys):
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is not text", node.start_mark)
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Keeps the resolvers of 1.1 beside ours: text that either would read as something else is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_SCALARS = {
    "null": (r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+(?:_[0-9]+)*", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
for _kind, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _first)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    # Decimal whatever it starts with (1.1 reads 010 as 8), so that what looks like a number is that number.
    return int(loader.construct_scalar(node).replace("_", ""))


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def load(text: str, where: str) -> Any:
    """The value of a YAML text.

    Raises:
        RecipeError: `where`, line and column, and what is wrong there.
    """
    try:
        return _value(_Loader(text))  # a SafeLoader: plain values only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise RecipeError(f"{where}{place}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise RecipeError(f"{where}: not YAML: {reason}") from None


def _value(loader: _Loader) -> Any:
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_repeats(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _refuse_repeats(top: yaml.Node) -> None:
    """Raise MarkedYAMLError where aliases stand for far more than was written, or for what they are a part of."""
    sizes: dict[int, int] = {}
    begun: set[int] = set()
    left = [top]
    while left:  # each node once, after those below it
        node = left.pop()
        if id(node) in sizes:
            continue
        inner = [each for pair in node.value for each in pair] if isinstance(node, yaml.MappingNode) else node.value
        below = inner if isinstance(node, yaml.CollectionNode) else []
        if id(node) not in begun:
            begun.add(id(node))
            left += [node, *below]
        elif any(id(each) not in sizes for each in below):
            raise yaml.MarkedYAMLError(problem="an alias stands for what it is a part of", problem_mark=node.start_mark)
        else:
            sizes[id(node)] = 1 + sum(sizes[id(each)] for each in below)
    if sizes[id(top)] - len(sizes) > MOST_REPEATED:
        raise yaml.MarkedYAMLError(
            problem=f"aliases stand for {sizes[id(top)]:,} values, where {len(sizes):,} are written; expected at most "
            f"{MOST_REPEATED:,} more: write out what is meant",
            problem_mark=top.start_mark,
        )


def read(path: Path, *, instead: str = "") -> JsonObject:
    """The fields of a YAML file; an empty one has none.

    `instead`: what to do where there is no such file, nor one of nearly its name.

    Raises:
        RecipeError: no such file, not text, not YAML, not fields, or larger than such a file is.
    """
    if os.path.exists(path) and not path.is_file() and not path.is_dir():
        raise RecipeError(f"{path}: is a pipe or device; expected a YAML file")
    if os.path.isfile(path) and path.stat().st_size > LARGEST:
        raise RecipeError(f"{path}: {path.stat().st_size:,} bytes; expected at most {LARGEST:,}, of a YAML file")
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: {error.strerror}{meant(path) or instead}") from None
    except IsADirectoryError:
        inside = path / "recipe.yaml"
        hint = f". Did you mean '{inside}'?" if inside.is_file() else ""
        raise RecipeError(f"{path}: a folder, expected a YAML file{hint}") from None
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8") from None
    except ValueError as error:
        raise RecipeError(f"{str(path)!r}: cannot be the name of a file: {error}") from None
    tree = load(text, str(path))
    if not isinstance(tree, dict | None):
        raise RecipeError(f"{path}: expected fields, as 'name: value' on lines of their own")
    return tree or {}


def dump(value: Any) -> str:
    """YAML text that `load` reads back as the same value; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)


def dump_commented(rows: Iterable[tuple[str, Any, str]]) -> str:
    """YAML text of (dotted path, value, comment), in this order, each on a line with its comment behind it.

    Numbers in a path are places in a list. A row whose value is `HEADING` gives the comment of the fields below it. A
    comment that leaves no room on its line stands above it.
    """
    comments: dict[str, str] = {}
    tree: JsonObject = {}
    for path, value, comment in rows:
        comments[path] = comment
        *way, last = path.split(".")
        node = tree
        for step in way:
            node = node.setdefault(step, {})
        if value is not HEADING:
            node[last] = value if not isinstance(value, dict) else {**value}
    lines = [_with_comment(*line) for line in _lines(tree, comments, "", "")]
    return "".join(f"{line}\n" for line in lines)


HEADING = object()
COMMENT_COLUMN = 40
LINE_END = 120


def _lines(tree: JsonObject, comments: dict[str, str], path: str, margin: str) -> Iterator[tuple[str, str]]:
    """(text, comment) of each line of these fields, or of the items of a list, whose names are numbers."""
    listed = bool(tree) and all(name.isdecimal() for name in tree)
    for name, value in tree.items():
        here = f"{path}.{name}" if path else name
        begin = f"{margin}- " if listed else f"{margin}{name}:"
        if not isinstance(value, dict):
            yield f"{begin}{'' if listed else ' '}{_scalar(value)}".rstrip(), comments.get(here, "")
            continue
        if not listed:
            yield begin, comments.get(here, "")
        below = list(_lines(value, comments, here, margin + "  "))
        if listed:
            below[0] = (begin + below[0][0].lstrip(), below[0][1])
        yield from below


def _scalar(value: Any) -> str:
    """A value on one line as people write it: `3_000_000`, `2e-4`."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{value:_}"
    if isinstance(value, float) and 0 < abs(value) < 1e-2:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6)
    return text.removesuffix("...\n").strip()


def _with_comment(text: str, comment: str) -> str:
    if not comment:
        return text
    line = f"{text:<{COMMENT_COLUMN}}  # {comment}"
    if len(line) <= LINE_END:
        return line
    margin = " " * (len(text) - len(text.lstrip()))
    above = textwrap.wrap(comment, LINE_END - len(margin) - 2, break_on_hyphens=False)
    return "\n".join([*(f"{margin}# {each}" for each in above), text])


def apply_override(tree: JsonObject, override: str) -> str:
    """Set one `a.b.0.c=VALUE` (VALUE as YAML) in `tree`, making mappings on the way; its dotted key is returned.

    Raises:
        RecipeError: no `=`, no key, a list index that is not there, or a way through something that holds no fields.
    """
    key, equals, text = override.partition("=")
    steps = key.strip().split(".")
    where = f"override '{override}'"
    if not equals or not all(steps):
        raise RecipeError(f"{where}: expected KEY=VALUE, such as train.lr=1e-3")
    value = load(text, where)
    node: Any = tree
    for depth, step in enumerate(steps):
        last = depth == len(steps) - 1
        if isinstance(node, list):
            node = _list_step(node, step, f"{where}: {'.'.join(steps[:depth])}", value if last else None, last)
        elif not isinstance(node, dict):
            raise RecipeError(f"{where}: {'.'.join(steps[:depth])} is {node!r} and has no field '{step}'")
        elif last:
            node[step] = value
        else:
            if node.get(step) is None:
                node[step] = {}
            node = node[step]
    return ".".join(steps)


def _list_step(node: list[Any], step: str, where: str, value: Any, last: bool) -> Any:
    if not step.isdecimal() or int(step) >= len(node):
        raise RecipeError(
            f"{where} is a list of {len(node)}: expected an index from 0 to {len(node) - 1}, found '{step}'"
        )
    if last:
        node[int(step)] = value
    return node[int(step)]
