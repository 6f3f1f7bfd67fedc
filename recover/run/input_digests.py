"""The files a recipe stands on, and what they hold: a changed file makes a stage stale as a changed field does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from recover.base.artifacts import sha256
from recover.config.named import BLEND, blend_paths, is_task_name, task_path
from recover.config.recipe import local_path
from recover.models.gate import listed
from recover.text.rows import files_behind

HASHED_BYTES = 64 * 2**20  # larger files (weights) are known by size and time of change: hashing them costs minutes


def digests(leaves: Any) -> dict[str, str]:
    """Path -> sha256 (or size and time, for large files) of each file that the leaves name, task data included."""
    return {str(path): _digest(path) for path in files_of(leaves)}


def files_of(value: Any) -> list[Path]:
    """Each file that these leaves name by absolute paths, task data included."""
    return sorted(set(_files(value)))


def _digest(path: Path) -> str:
    stat = path.stat()
    if stat.st_size > HASHED_BYTES:
        return f"{stat.st_size} bytes, changed {stat.st_mtime_ns}"
    return sha256(path)


def _files(value: Any) -> Iterator[Path]:
    if isinstance(value, dict):
        for child in value.values():
            yield from _files(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _files(child)
    elif isinstance(value, str) and value.startswith(BLEND):
        for path in blend_paths(value):
            yield from _files_at(path)
    elif isinstance(value, str) and value:
        path = task_path(value) if is_task_name(value) else local_path(value)
        if path.is_absolute():
            yield from _files_at(path)


def _files_at(path: Path) -> Iterator[Path]:
    """The file; the model files of a folder; a task file with the data it names."""
    if path.is_dir():
        yield from (path / name for name in listed(path) if (path / name).is_file())
    elif path.is_file():
        yield path
        if path.suffix in {".yaml", ".yml"}:
            for data in _data_named(path):
                yield from files_behind(data, path.parent)


def _data_named(file: Path) -> list[str]:
    """The data of a task or a blend, wherever in the file it is named: of items, of examples, of each source."""
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, OSError, RecursionError):
        return []  # who reads the file says what is wrong with it
    found, left = [], [value]
    while left:
        each = left.pop()
        if isinstance(each, dict):
            found += [each["data"]] if isinstance(each.get("data"), str) else []
            left += [child for name, child in each.items() if name != "rows"]
        elif isinstance(each, list):
            left += each
    return found
