"""What a recipe stands on, and what it holds: a changed file makes a stage stale as a changed field does.

Everything that is read counts: of a model folder weights, configs, tokenizer and templates; of data a file, all files
that a pattern matches, a whole folder; of a task its data, too, a package's or a generator's. What comes from a hub
counts by its commit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from recover.base import hub
from recover.base.errors import DataError, RecoverError
from recover.base.products import digest_of
from recover.config import yaml_values
from recover.config.named import BLEND, blend_paths, is_task_name, task_path
from recover.config.recipe import FIELDS, FOLDERS, ending, local_path
from recover.models.gate import listed
from recover.text.read import matching
from recover.text.rows import FUNCTIONS, GENERATOR, PACKAGE, in_package

HASHED_BYTES = 64 * 2**20  # larger files (weights) are known by size and time of change: hashing them costs minutes
WRITTEN = ("cache-", "tmp")  # beginnings of what `datasets` puts into a folder that it reads
GENERATOR_PACKAGE = "reasoning-gym"


def digests(leaves: Any) -> dict[str, str]:
    """Name -> sha256 of each file that the leaves name (of large ones size and time), data of tasks included.

    A repository of the hub is named by its kind and has its commit, where that is known by now.
    """
    found = {str(path): _digest(path) for path in files_of(leaves)}
    for repository in repositories(leaves):
        commit = hub.known(repository)
        if commit is not None:
            found[str(repository)] = commit
    return {**found, **dict(_generators(leaves))}


def files_of(value: Any) -> list[Path]:
    """Each file that these leaves name by absolute paths, task data included."""
    return sorted(set(_files(value)))


def repositories(leaves: Any) -> list[hub.Repository]:
    """Repositories of the hub that a recipe, or a part of it, reads: model, tokenizer, and data sets."""
    found: dict[hub.Repository, None] = {}
    model = leaves.get("model") or {} if isinstance(leaves, dict) else {}
    for field in FIELDS:
        for value in () if field in FOLDERS else _at(leaves, field.split(".")):
            if field.startswith("model."):
                revision = model.get("revision") if value == model.get("source") else None
                if _of_hub(value, Path.cwd()) and not value.endswith(".gguf"):
                    found[hub.Repository("model", value, revision)] = None
            elif field.startswith("measure.tasks"):
                for data, folder in _data_of(value):
                    if _of_hub(data, folder):
                        found[hub.Repository("dataset", data)] = None
            elif _of_hub(value, Path.cwd()):
                found[hub.Repository("dataset", value)] = None
    return list(found)


def _at(tree: Any, steps: Sequence[str]) -> Iterator[str]:
    """The texts of a field; `*` stands for each element of a list."""
    if not steps:
        if isinstance(tree, str):
            yield tree
        return
    step, *rest = steps
    if step == "*" and isinstance(tree, list | tuple):
        for child in tree:
            yield from _at(child, rest)
    elif isinstance(tree, dict) and step in tree:
        yield from _at(tree[step], rest)


def _of_hub(name: str, folder: Path) -> bool:
    """Whether a name is read from the hub: no path, and nothing that is here or is made here."""
    made_here = name.startswith(("embedded:", GENERATOR, PACKAGE, FUNCTIONS, BLEND))
    return not (made_here or ending(name) or not hub.named(name) or matching(folder / name))


def _digest(path: Path) -> str:
    stat = path.stat()
    if stat.st_size > HASHED_BYTES:
        return f"{stat.st_size} bytes, changed {stat.st_mtime_ns}"
    return digest_of(path)


def _files(value: Any, name: str = "") -> Iterator[Path]:
    if name in ("cache", "train.cache"):  # what lies there is known by the text, and is made where it is missing
        return
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _files(child, str(key))
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _files(child)
    elif isinstance(value, str) and value.startswith(BLEND):
        for path in blend_paths(value):
            yield from _files_at(path)
    elif isinstance(value, str) and value:
        path = _task_path(value)
        if path.is_absolute():
            yield from _files_at(path)


def _files_at(path: Path) -> Iterator[Path]:
    """The file, or all that the pattern matches; what is read of a folder; a task file with its data."""
    for found in matching(path):
        if found.is_dir():
            yield from _of_folder(found)
            continue
        yield found
        if found.suffix in {".yaml", ".yml"}:
            for data, folder in [*_data_of(str(found)), *_alternatives(found)]:
                yield from _data_files(data, folder)


def _data_files(data: str, folder: Path) -> Iterator[Path]:
    if data.startswith(PACKAGE):
        try:
            there = matching(in_package(data.removeprefix(PACKAGE)))
        except DataError:
            return  # who reads the task says what is missing
    elif data.startswith((GENERATOR, FUNCTIONS)):
        return
    else:
        there = matching(folder / data)
    for path in there:
        yield from _of_folder(path) if path.is_dir() else (path,)


def _of_folder(folder: Path) -> Iterator[Path]:
    """What is read of a model folder; of any other, a data set's, all its files."""
    if (folder / "config.json").is_file() or (folder / "tokenizer_config.json").is_file():
        yield from (folder / name for name in listed(folder) if (folder / name).is_file())
        return
    for path in folder.rglob("*"):
        below = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") for part in below) and not path.name.startswith(WRITTEN):
            yield path


def _generators(leaves: Any) -> Iterator[tuple[str, str]]:
    """Questions that a package makes are those of its version."""
    for task in _at(leaves, ["measure", "tasks", "*"]):
        for data, _ in _data_of(task):
            if data.startswith(GENERATOR):
                try:
                    yield data, f"{GENERATOR_PACKAGE} {metadata.version(GENERATOR_PACKAGE)}"
                except metadata.PackageNotFoundError:
                    continue


def _data_of(task: str) -> list[tuple[str, Path]]:
    """The data of items and of examples that a task file names, each with the folder from which it is seen."""
    try:
        path = _task_path(task)
        value = yaml_values.load(path.read_text(encoding="utf-8"), str(path))
    except (ValueError, OSError, RecoverError):
        return []  # who reads the task says what is wrong with it
    named = [value, value.get("fewshot")] if isinstance(value, dict) else []
    found = [each.get("data") for each in named if isinstance(each, dict)]
    return [(data, path.parent) for data in found if isinstance(data, str)]


def _task_path(name: str) -> Path:
    """Where a task lies that goes by a name; else the path that a name is."""
    return task_path(name) if is_task_name(name) else local_path(name)


def _alternatives(file: Path) -> Iterator[tuple[str, Path]]:
    """The data that each source of a task names, or of a blend's parts: whichever comes or goes, other rows are read.

    Data sets of the hub are pinned in the file itself.
    """
    try:
        value = yaml_values.load(file.read_text(encoding="utf-8"), str(file))
    except (ValueError, OSError, RecoverError):
        return  # who reads the file says what is wrong with it
    parts = [value, *(value.get("parts") or ())] if isinstance(value, dict) else []
    for part in parts:
        for source in (part.get("sources") or ()) if isinstance(part, dict) else ():
            if isinstance(source, dict) and isinstance(source.get("data"), str):
                yield source["data"], file.parent
