"""The files a recipe stands on, and what they hold: a changed file makes a stage stale as a changed field does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from recover.base.artifacts import sha256
from recover.config.recipe import local_path
from recover.models.gate import listed

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
    elif isinstance(value, str) and value:
        path = local_path(value)
        if path.is_absolute():
            yield from _files_at(path)


def _files_at(path: Path) -> Iterator[Path]:
    """The file; the model files of a folder; a task file with the data it names."""
    if path.is_dir():
        yield from (path / name for name in listed(path) if (path / name).is_file())
    elif path.is_file():
        yield path
        if path.suffix in {".yaml", ".yml"}:
            yield from (path.parent / data for data in _data_named(path) if (path.parent / data).is_file())


def _data_named(task: Path) -> list[str]:
    """The files of items and of examples that a task names."""
    try:
        value = yaml.safe_load(task.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, OSError, RecursionError):
        return []  # who reads the task says what is wrong with it
    named = [value, value.get("fewshot")] if isinstance(value, dict) else []
    found = [each.get("data") for each in named if isinstance(each, dict)]
    return [data for data in found if isinstance(data, str)]
