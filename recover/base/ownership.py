"""Whose a folder is: what we write into is new, empty, or made by us. Anything else is refused before a byte changes.

A folder of ours holds a marker, such as RUN.json. Those of earlier versions have none and are known by what they hold.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from recover import __version__
from recover.base import artifacts
from recover.base.artifacts import TEMPORARY, explained, write_json
from recover.base.errors import ArtifactError

LOCK, DIAGNOSIS = ".lock", "diagnosis"
SHOWN = 3  # entries of a foreign folder that a message names


def marker(kind: str) -> str:
    """Name of the file that says what a folder is: RUN.json, DIAGNOSIS.json."""
    return f"{kind.upper()}.json"


def owned(folder: Path, kind: str, known: Callable[[Path], bool]) -> bool:
    """Whether we made this folder: it holds our marker, or what `known` finds of an earlier version."""
    found = peek(folder / marker(kind))
    return (isinstance(found, dict) and found.get("made_by") == "recover" and found.get("kind") == kind) or known(
        folder
    )


def refuse_foreign(folder: Path, kind: str, known: Callable[[Path], bool], way_out: str) -> None:
    """Raise ArtifactError unless the folder is missing, empty, or ours; nothing is written.

    `way_out`: what to do instead, the end of the message.
    """
    try:
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise explained(error, folder) from error
    others = [name for name in names if not _of_beginning(folder / name, kind)]
    if others and not owned(folder, kind, known):
        shown = ", ".join(others[:SHOWN]) + (", ..." if len(others) > SHOWN else "")
        raise ArtifactError(
            f"{folder}: found {shown}, and nothing that says that this is a {kind} of ours; expected a new or an empty "
            f"folder, or a {kind}. Nothing was changed: {way_out}"
        )


def mark(folder: Path, kind: str) -> None:
    """Put the marker there, once."""
    if peek(folder / marker(kind)) is None:
        write_json(folder / marker(kind), {"made_by": "recover", "kind": kind, "version": __version__})


def peek(path: Path) -> Any:
    """The value in a JSON file that may not be ours; None where there is no file or no JSON in it."""
    try:
        return artifacts.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError):
        return None


def refuse_input(out: Path, inputs: Iterable[str | Path]) -> None:
    """Raise ArtifactError where a file to be written is one of those that are read."""
    for path in map(Path, inputs):
        if out.exists() and path.exists() and out.samefile(path):
            raise ArtifactError(f"{out}: is to be read and to be written; give the output another name")


def is_diagnosis(folder: Path) -> bool:
    """Whether `recover diagnose` made or began this folder: by its marker, its summary, or the key of its batches."""
    return owned(folder, DIAGNOSIS, _diagnosed)


def _diagnosed(folder: Path) -> bool:
    found = peek(folder / "probe.json")
    if isinstance(found, dict) and isinstance(found.get("dense"), str) and isinstance(found.get("other"), str):
        return True
    keys = (peek(folder / "batches" / part / "key.json") for part in ("prompts", "texts"))
    return any(isinstance(key, dict) and {"dense", "other", "probe", "length"} <= key.keys() for key in keys)


def begin_diagnosis(folder: Path) -> None:
    """Take a folder for a diagnosis; raise ArtifactError, with nothing written, where it is something else's."""
    refuse_foreign(folder, DIAGNOSIS, _diagnosed, "give another --out")
    mark(folder, DIAGNOSIS)


def _of_beginning(path: Path, kind: str) -> bool:
    """What a process that ended between its lock and its marker leaves: the folder is as good as empty."""
    if path.name == LOCK and path.is_file() and not path.is_symlink():
        return path.stat().st_size < 20 and re.fullmatch(rb"(\d+\n)?", path.read_bytes()) is not None
    return re.fullmatch(rf"\.{re.escape(marker(kind))}\.\d+{re.escape(TEMPORARY)}", path.name) is not None


def open_lock(folder: Path) -> Any:
    """The lock file of a folder, open for reading and writing; made where there is none, never one behind a link."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    return os.fdopen(os.open(folder / LOCK, flags, 0o666), "a+")
