"""Files that a recipe names: where they lie, whatever folder the command is given from."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from recover.base.artifacts import JsonObject
from recover.base.errors import DataError

# Fields that name files, or a hub id.
FIELDS = (
    "model.source",
    "model.tokenizer",
    "prune.calibration.data",
    "probe.prompts",
    "train.data.*.prompts",
    "train.data.*.source",
    "measure.tasks.*",
    "train.cache.folder",
)
FOLDERS = ("train.cache.folder",)  # made where there is none; never a hub id
# Endings of files that hold rows; of each but a table, gzipped too.
LINES, TABLES, SHEETS, TEXTS = (".jsonl", ".ndjson", ".json"), (".parquet", ".arrow"), (".csv", ".tsv"), (".txt", ".md")
ROWS = (*LINES, *(f"{ending}.gz" for ending in (*LINES, *SHEETS)), *TABLES, *SHEETS, *TEXTS)
SUFFIXES = {*LINES, *TABLES, *SHEETS, *TEXTS, ".yaml", ".yml", ".gguf", ".gz"}


def ending(name: str) -> str:
    """The ending of `ROWS` that a name has, in small letters, without `.gz`; else nothing."""
    small = name.lower()
    return next((found.removesuffix(".gz") for found in ROWS if small.endswith(found)), "")


def matching(path: Path) -> list[Path]:
    """The file or folder that this path is, whatever its letters; else all files that it matches, in order of name.

    Only `*` and `?` stand for other letters, and only behind the last folder that is there as it is written: `[1]` is
    part of a name.
    """
    if os.path.exists(path):
        return [path]
    base, *rest = path.parts or ("",)
    folder = Path(base)
    while len(rest) > 1 and (folder / rest[0]).is_dir():
        folder, rest = folder / rest[0], rest[1:]
    if not any(letter in step for step in (base, *rest) for letter in "*?"):
        return []
    if "*" in base or "?" in base:
        folder, rest = Path(), [base, *rest]
    try:
        return sorted(found for found in folder.glob("/".join(rest).replace("[", "[[]")) if found.is_file())
    except OSError as error:  # a folder on the way that may not be read
        raise DataError(f"{path}: cannot look for its files: {error.filename}: {error.strerror}") from None


def meant(path: Path) -> str:
    """What was probably meant, as `. Did you mean NAME?` of a file beside the path with nearly its name, or nothing."""
    if os.path.islink(path):
        return f": a link to {os.readlink(path)}, which is not there"
    if "$" in str(path):
        return ": variables such as $HOME are not filled in; write the path out, or begin it with ~"
    if not path.parent.is_dir():
        return ""
    there = {found.stem: found for found in path.parent.iterdir() if found.suffix == path.suffix}
    near = get_close_matches(path.stem, there, n=1, cutoff=0.5)  # short names: one letter of two
    return f". Did you mean '{there[near[0]]}'?" if near else ""


def place_files(tree: JsonObject, folder: Path, *, within: str = "") -> None:
    """Make relative files in an unchecked recipe absolute, as seen from `folder`.

    `within` limits it to one dotted field and what is below. A hub id and `embedded:NAME` stay what they are.
    """
    given = within.split(".") if within else []
    for field in FIELDS:
        steps = field.split(".")
        if all(step in ("*", key) for step, key in zip(steps, given, strict=False)):
            absolute = partial(_absolute, folder=folder, file=field in FOLDERS)
            _change(tree, [*given[: len(steps)], *steps[len(given) :]], absolute)


def without_folders(tree: JsonObject) -> JsonObject:
    """A copy of a recipe's tree in which files are named without the folders of the machine they lie on."""
    shown = copy.deepcopy(tree)
    for field in FIELDS:
        _change(shown, field.split("."), lambda name: os.path.basename(name) if os.path.isabs(name) else name)
    return shown


def _change(node: Any, steps: Sequence[str], change: Callable[[str], str]) -> None:
    """Put what `change` gives in place of every text that lies there; `*` is any key of a list."""
    step, *rest = steps
    keys: list[Any] = []
    if isinstance(node, list):
        keys = [index for index in range(len(node)) if step in ("*", str(index))]
    elif isinstance(node, dict) and step in node:
        keys = [step]
    for key in keys:
        if rest:
            _change(node[key], rest, change)
        elif isinstance(node[key], str):
            node[key] = change(node[key])


def _absolute(name: str, folder: Path, *, file: bool) -> str:
    if not name or name.startswith("embedded:"):
        return name
    path = os.path.abspath(os.path.join(folder, os.path.expanduser(name)))
    file_like = file or name.startswith((".", "/", "~")) or os.path.splitext(name)[1] in SUFFIXES
    return path if file_like or os.path.exists(path) else name
