"""Folders that we write: whose one is, and whether what a stage wrote is still there as it was written.

What we write into is new, empty, or made by us. Anything else is refused before a byte changes. A folder of ours holds
a marker, such as RUN.json. Those of earlier versions have none and are known by what they hold.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict

from recover import __version__
from recover.base import artifacts, earlier
from recover.base.artifacts import DONE, MANIFEST, TEMPORARY, explained, write_json
from recover.base.errors import ArtifactError, RecoverError

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
        # `os.path.exists` is False, too, of what can be no file's name
        if os.path.exists(out) and os.path.exists(path) and out.samefile(path):
            raise ArtifactError(f"{out}: is to be read and to be written; give the output another name")


def refuse_other_kind(out: Path, *endings: str) -> None:
    """Raise ArtifactError where a file is there whose name has none of these endings: it is of another kind."""
    if os.path.isfile(out) and out.suffix not in endings:
        raise ArtifactError(
            f"{out}: is there, and its name does not end in {' or '.join(endings)}, as that of a file which is written "
            "here would: nothing was changed; give the output another name"
        )


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
    path = folder / LOCK
    if path.is_file() and not path.is_symlink() and path.stat().st_nlink > 1:
        _leave_to_copy(path)
    return os.fdopen(os.open(path, flags, 0o666), "a+")


def hold_lock(file: Any, *, wait: bool = False) -> None:
    """Hold the lock of an open file until it is closed, or its process ends, however that is.

    Raises BlockingIOError where another holds it, unless this one is to wait; OSError on a file system without locks.
    """
    import fcntl  # not on every system: nothing else here needs it

    fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _leave_to_copy(lock: Path) -> None:
    """Take our name off a lock file that a copy by `cp -al` has too, unless somebody holds it: here or there."""
    with open(lock) as file, suppress(OSError):
        hold_lock(file)
        lock.unlink()


class FileEntry(TypedDict):
    """A file as its stage wrote it: its size, its time of change in nanoseconds, and its sha256."""

    bytes: int
    changed: int
    sha256: str


MEASURED = ("measure.json", "generations.json", "probe.json", "probe.jsonl")
# Names of files by stage, from the run directory on.
NAMES: dict[str, tuple[str, ...]] = {
    "plan": ("env.json", "plan/estimate.json", "plan/overlap.json"),
    "dense": tuple(f"dense/{name}" for name in MEASURED),
    "prune": ("prune/plan.json", "prune/masks.safetensors", "prune/weights.safetensors"),
    "before": tuple(f"before/{name}" for name in MEASURED),
    "train": ("train/best.json", "epochs.jsonl", "train/steps.jsonl"),  # and the files of the epoch that it names
    "after": tuple(f"after/{name}" for name in (*MEASURED, "best.json", "epochs.jsonl")),  # of epochs measured again
    "export": ("verify.json", "speed.json"),  # and those of the checkpoint
    "deploy": (
        "gguf/files.json",
        *(f"gguf/{below}{name}" for below in ("", "dense/") for name in ("model.gguf", "imatrix.gguf", *MEASURED[:2])),
    ),
}
SHOWN_ALONE = ("train/steps.jsonl", "recover/steps.jsonl")  # no stage reads them, and none is done again for them
OWN_WORDS = ".md"  # a model card is there to be written on
ALWAYS_HASHED = 64 * 2**20  # bytes; larger files count as unchanged while their size and time are
GONE, CHANGED = "is gone", "is not what was written"

_digests: dict[tuple[Any, ...], str] = {}


def written(root: Path, stage: str) -> dict[str, FileEntry]:
    """Bytes, time and sha256 of each file that this stage has written, by name; to be kept in its stamp."""
    entries: dict[str, FileEntry] = {}
    for path, known in _files(root, stage):
        if path.is_file() and path.suffix != OWN_WORDS:
            stat = path.stat()
            digest = known or artifacts.sha256(path)
            entries[path.relative_to(root).as_posix()] = {
                "bytes": stat.st_size,
                "changed": stat.st_mtime_ns,
                "sha256": digest,
            }
    return entries


def lost(root: Path, entries: Any, *, every_byte: bool = False, shown: bool = False) -> str | None:
    """The first of these files that is gone or changed, in words; None where there is none.

    `every_byte`: large files are read too, of which else size and time are looked at. `shown`: also what no stage
    reads, and a report shows.
    """
    if not isinstance(entries, dict):
        return None
    for name, entry in entries.items():
        if name in SHOWN_ALONE and not shown:
            continue
        path = root / name
        if not path.is_file():
            return f"{name} {GONE}"
        if not _same(path, entry, every_byte=every_byte):
            return f"{name} {CHANGED}"
    return None


def _same(path: Path, entry: Any, *, every_byte: bool) -> bool:
    stat = path.stat()
    if not isinstance(entry, dict) or stat.st_size != entry.get("bytes"):
        return False
    if stat.st_size > ALWAYS_HASHED and not every_byte and stat.st_mtime_ns == entry.get("changed"):
        return True
    return digest_of(path) == entry.get("sha256")


@contextmanager
def taken_apart(root: Path) -> Iterator[None]:
    """Inside, the records of a run or a diagnosis are taken apart; a value that we never write is an ArtifactError.

    It names the first file that is not as its stage wrote it, where a stamp tells.
    """
    try:
        yield
    except (
        RecoverError,
        OSError,
        NameError,
        ImportError,
        MemoryError,
    ):  # the last three: no value of a file gives them
        raise
    except Exception as error:  # whatever comes of a text where a table is expected
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ArtifactError(
            f"{root}: {_first_changed(root) or 'a file in it is not what was written'}: it cannot be read as a record "
            f"of recover ({type(error).__name__}: {error}, {Path(place.filename).name}:{place.lineno}). Put the file "
            "back, or do its stage again: recover run RECIPE --from STAGE"
        ) from error


def _first_changed(root: Path) -> str | None:
    stamps = (peek(path) for path in sorted(root.glob(f"*/{DONE}")))
    found = (lost(root, stamp.get("files")) for stamp in stamps if isinstance(stamp, dict))
    return next(filter(None, found), None)


def digest_of(path: Path) -> str:
    """The file's sha256, found once in a process for as long as the file is the same one, of one size and time."""
    stat = path.stat()
    key = (path.absolute(), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if key not in _digests:
        _digests[key] = artifacts.sha256(path)
    return _digests[key]


def _files(root: Path, stage: str) -> Iterator[tuple[Path, str | None]]:
    """Each file that the stage may have written, and its sha256 where a manifest has it."""
    yield from ((earlier.place(root, name), None) for name in NAMES.get(stage, ()))
    folder = None
    if stage == "export":
        folder = root / "deploy"
    elif stage == "train":
        best = peek(earlier.place(root, "train/best.json"))
        named = best.get("folder") if isinstance(best, dict) else None
        folder = earlier.place(root, "train") / named if isinstance(named, str) else None
    listed = peek(folder / MANIFEST) if folder is not None else None
    if folder is not None and isinstance(listed, dict) and isinstance(listed.get("files"), dict):
        yield folder / MANIFEST, None
        yield from ((folder / name, entry["sha256"]) for name, entry in listed["files"].items())


def check_checkpoint(folder: Path, mend: str) -> None:
    """Hold a folder against the manifest in it, before it is read; every byte. `mend`: what to do, for the message.

    A model card may be changed, and files may be added. Raises ArtifactError: a file is gone or changed.
    """
    listed = peek(folder / MANIFEST)
    files = listed.get("files") if isinstance(listed, dict) else None
    for name, entry in files.items() if isinstance(files, dict) else ():
        path = folder / name
        if name.endswith(OWN_WORDS) or not isinstance(entry, dict):
            continue
        there = path.is_file()
        if not there or path.stat().st_size != entry.get("bytes") or digest_of(path) != entry.get("sha256"):
            raise ArtifactError(f"{path}: {CHANGED if there else GONE}, as {MANIFEST} beside it has it: {mend}")
