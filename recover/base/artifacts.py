"""Files that are whole or not there: written beside, synced, renamed; read back with an error that names the file.

A crash at any point leaves the old state or the new one. A folder is published by two renames; a crash between
them is mended by `settle`, which whoever takes a run directory's lock calls before anything is read. JSON is as the
standard has it: no NaN, no key twice.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from itertools import count
from pathlib import Path, PurePosixPath
from typing import IO, Any

from recover.base import console
from recover.base.errors import ArtifactError

MANIFEST = "MANIFEST.json"
DONE = "DONE.json"  # the stamp of a finished stage, see run_directory.py
REPLACED = ".replaced"  # `.NAME.replaced`: the folder NAME of before, until the new one has its name
TEMPORARY = ".tmp"
WRITING = ".writing"  # `.NAME.7.writing`: a folder that is not whole yet
KEPT = ".kept"  # `NAME.kept`: files of others that lay in NAME when it was written anew
SHOWN = 3  # files named in a message
ESCAPES = "backslashreplace"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_bytes(path: Path, data: bytes) -> None:
    """Put `data` under `path`, whole or not at all; missing folders are made.

    Raises:
        ArtifactError: it could not be written, with the path, and the bytes needed and free where the disk is full.
    """
    with writing(path, len(data)) as file:
        file.write(data)


@contextmanager
def writing(path: Path, size: int | None = None) -> Iterator[IO[bytes]]:
    """A file that has the name `path` once it is whole, synced, at the end; whatever is raised inside leaves no trace.

    `size`: bytes to come, for the message where the disk is full. Raises ArtifactError as `write_bytes` does.
    """
    with placing(path, size) as beside, open(beside, "wb") as file:
        yield file


@contextmanager
def placing(path: Path, size: int | None = None) -> Iterator[Path]:
    """As `writing`, for what a library writes: the file's name for now, in the folder of `path`."""
    path = Path(path)
    refuse_place(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        _sync_file(beside)
        os.replace(beside, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise explained(error, path, size) from error
    finally:
        with suppress(OSError):  # already renamed, or the error above says more
            beside.unlink()


def refuse_place(path: Path) -> None:
    """Raise ArtifactError where a file may not take the place of what has this name.

    That is a device, a pipe or a socket, which a rename would remove for all who use it, and what is read-only.
    """
    if path.name in ("", ".."):
        raise ArtifactError(f"'{path}': is a folder; expected the name of a file")
    try:
        mode = path.stat().st_mode
    except OSError:  # nothing is there; what else may be wrong is said when it is written
        return
    if stat.S_ISDIR(mode):
        return
    descriptor = path.is_symlink() and os.readlink(path).startswith("/proc/")  # as /dev/stdout is
    if not stat.S_ISREG(mode) or descriptor:
        raise ArtifactError(f"{path}: is no file, and one that takes its place would remove it; give a file's name")
    if not os.access(path, os.W_OK):
        raise ArtifactError(f"{path}: is read-only, and is not replaced: give another name, or let it be written")


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8; bytes of a path that are none become escapes, which JSON reads back as they were."""
    write_bytes(path, text.encode(errors=ESCAPES))


def write_json(path: Path, value: Any) -> None:
    """As `write_bytes`, as strict JSON: what is not finite becomes null; dataclasses, paths and arrays are taken."""
    write_text(path, dumps(value, indent=1) + "\n")


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """As `write_json`, a line for each record."""
    write_text(path, "".join(f"{dumps(record)}\n" for record in records))


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


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        ArtifactError: missing, unreadable or corrupt.
    """
    try:
        return loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise ArtifactError(
            f"{path}: no such file: the stage that writes it has not run, or the file was deleted since; "
            "`recover run RECIPE` does that stage, and with --from STAGE all after it too"
        ) from None
    except OSError as error:
        raise explained(error, path) from error
    except ValueError as error:
        raise ArtifactError(f"{path}: corrupt JSON ({error}); delete it, and its stage is done again") from None


def append_jsonl(path: Path, record: Any, *, synced: bool = True) -> None:
    """Add one line, synced to disk unless told not to; a line torn by an earlier crash is cut off first.

    A file that has another name too, by a link or as in a copy by `cp -al`, is left to that name: the line goes to one
    of our own.
    """
    path = Path(path)
    line = dumps(record).encode(errors=ESCAPES) + b"\n"
    try:
        try:
            there = path.lstat()
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            alone = stat.S_ISREG(there.st_mode) and there.st_nlink == 1
            if not alone and path.is_file():
                write_bytes(path, path.read_bytes())
        with open(path, "a+b") as file:
            file.truncate(_whole_lines(file))
            file.write(line)
            file.flush()
            if synced:
                os.fsync(file.fileno())
    except OSError as error:
        raise explained(error, path, len(line)) from error


def read_jsonl(path: Path) -> list[Any]:
    """The records of a JSONL file; a last line without its end was torn by a crash and does not count.

    Raises:
        ArtifactError: missing, unreadable, or a corrupt line, by number.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise explained(error, path) from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(loads(line))
        except ValueError as error:
            raise ArtifactError(f"{path}:{number}: corrupt JSON ({error})") from None
    return records


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise explained(error, path) from error


def write_manifest(folder: Path) -> None:
    """Sync every file of `folder` to disk and write their sizes and sha256 to MANIFEST.json."""
    files = {}
    for path in _listed(folder):
        _sync_file(path)
        files[path.relative_to(folder).as_posix()] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    write_json(folder / MANIFEST, {"files": files})


def check_manifest(folder: Path) -> None:
    """Hold every file of `folder` against MANIFEST.json.

    Raises:
        ArtifactError: a file is missing, changed, or not listed, each by name; the manifest itself is corrupt; or the
            folder cannot be read, as when another process deletes it at this moment.
    """
    folder = Path(folder)
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise ArtifactError(f"{folder / MANIFEST}: not a manifest")
    with explaining(folder):
        present = {path.relative_to(folder).as_posix() for path in _listed(folder)}
    problems = [f"{name} is not listed" for name in sorted(present - files.keys())]
    for name, entry in files.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            problems.append(f"{name} lies outside")
        elif name not in present:
            problems.append(f"{name} is missing")
        elif sha256(folder / name) != entry.get("sha256"):
            problems.append(f"{name} has changed")
    if problems:
        raise ArtifactError(f"{folder}: not what was written: {'; '.join(problems)}")


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, to be filled and published under its name; at the end it is gone.

    Nothing that is there is taken for it, whatever its name: the number in its own is one that is free.
    """
    with explaining(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for number in count(os.getpid()):
            beside = folder.with_name(f".{folder.name}.{number}{WRITING}")
            with suppress(FileExistsError):
                beside.mkdir()
                break
    try:
        yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def publish(folder_tmp: Path, folder: Path, *, keep_edited: bool = False) -> None:
    """Give `folder_tmp`, synced and with a manifest, the name `folder`; what we wrote under that name is deleted last.

    Files that the old manifest does not list go to `NAME.kept` with a warning; with `keep_edited` also listed ones that
    somebody changed, weights apart.

    Raises:
        ArtifactError: it could not be done; then the old folder still has its name.
    """
    old = folder.with_name(f".{folder.name}{REPLACED}")
    try:
        _settle_one(old, keep_edited=keep_edited)
        write_manifest(folder_tmp)
        if folder.exists():
            os.replace(folder, old)
        os.replace(folder_tmp, folder)
        _sync_folder(folder.parent)
    except OSError as error:
        with suppress(OSError):
            _settle_one(old, keep_edited=keep_edited)
        raise explained(error, folder) from error
    with suppress(OSError):  # the new folder is there; `settle` goes on with the old one
        _put_away(old, keep_edited=keep_edited)


def settle(folder: Path, names: str, *, keep_edited: bool = False) -> None:
    """Mend what a crash left directly in `folder` of files and folders called `names` (an expression that a whole name
    matches): a folder between two names gets its name back, what was being written goes. Nothing else is touched.
    """
    if not folder.is_dir():
        return
    ends = f"{re.escape(REPLACED)}|(?:\\.\\d+)?(?:{re.escape(TEMPORARY)}|{re.escape(WRITING)})"
    left = re.compile(f"\\.(?:{names})(?P<end>{ends})")
    for path in sorted(folder.iterdir()):
        match = left.fullmatch(path.name)
        if match is None:
            continue
        if match["end"] == REPLACED:
            _settle_one(path, keep_edited=keep_edited)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def discard(folder: Path, *, also: Collection[str] = (), keep_edited: bool = False) -> None:
    """Delete what we wrote into `folder`, and then the folder, if nothing else is in it.

    That is: the files that its manifest lists, those named in `also`, the manifest, the stamp. `keep_edited`: listed
    files with other bytes stay, weights apart.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    listed = _entries(folder)
    inside = folder.resolve()
    for name in {*listed, *also}:
        path = folder / name
        if not path.parent.resolve().is_relative_to(inside) or not (path.is_file() or path.is_symlink()):
            continue
        edited = keep_edited and path.suffix != ".safetensors" and sha256(path) != listed.get(name, {}).get("sha256")
        if not edited:
            path.unlink(missing_ok=True)
    for below in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        _remove_empty(below)
    for name in (DONE, MANIFEST):  # last, so that a crash before leaves what says which files are ours
        (folder / name).unlink(missing_ok=True)
    _remove_empty(folder)


def _entries(folder: Path) -> dict[str, dict[str, Any]]:
    """What the manifest of a folder lists, nothing where it has none that can be read."""
    try:
        files = read_json(folder / MANIFEST)["files"]
        return {
            name: entry for name, entry in files.items() if isinstance(entry, dict) and ".." not in Path(name).parts
        }
    except (ArtifactError, KeyError, TypeError, AttributeError):
        return {}


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # it holds something, or is a link
        folder.rmdir()


def _settle_one(old: Path, *, keep_edited: bool) -> None:
    folder = old.with_name(old.name[1:].removesuffix(REPLACED))
    if old.exists() and not folder.exists():
        os.replace(old, folder)
    elif old.exists():
        _put_away(old, keep_edited=keep_edited)


def _put_away(old: Path, *, keep_edited: bool) -> None:
    """Delete a replaced folder as far as we wrote it; the rest gets a name that is free, and is named."""
    discard(old, keep_edited=keep_edited)
    files = sorted(path.relative_to(old).as_posix() for path in old.rglob("*") if not path.is_dir())
    if not files:  # nothing is left, or empty folders that could not be removed now
        return
    name = old.name[1:].removesuffix(REPLACED)
    free = (old.with_name(f"{name}{KEPT}{f'-{number}' if number > 1 else ''}") for number in count(1))
    kept = next(path for path in free if not os.path.lexists(path))
    os.replace(old, kept)
    shown = ", ".join(files[:SHOWN]) + (f" and {len(files) - SHOWN} more" if len(files) > SHOWN else "")
    console.warn(f"{old.with_name(name)}: was written anew; {shown}, not written by recover, is now in {kept}")


def _listed(folder: Path) -> list[Path]:
    """Files that a manifest vouches for: all but itself, the stamp of the stage, and temporary files."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return sorted(path for path in files if path.name not in (MANIFEST, DONE) and path.suffix != TEMPORARY)


def _whole_lines(file: Any) -> int:
    """Length in bytes of the part of an open file that ends with its last line end."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Inside, an OSError becomes the ArtifactError that names `path`: for writing that others do for us."""
    try:
        yield
    except OSError as error:
        raise explained(error, path) from error


@contextmanager
def explaining_libraries(path: Path, size: int | None = None, *, full_alone: bool = False) -> Iterator[None]:
    """As `explaining`, also for what a library makes of an OSError: safetensors says its number in the text alone.

    `full_alone`: only where the disk is full or the file too large, and anything else passes as it is.
    """
    try:
        yield
    except Exception as error:
        said = re.search(r"\(os error (\d+)\)", str(error))
        plain = OSError(int(said[1]), os.strerror(int(said[1]))) if said is not None else error
        if not isinstance(plain, OSError) or (full_alone and plain.errno not in FULL):
            raise
        raise explained(plain, path, size) from error


def explained(error: OSError, path: Path, size: int | None = None) -> ArtifactError:
    """The error that names the file; where the disk is full, also the bytes to be written (`size`) and those free."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ArtifactError(f"{path}: {error.strerror or error}")
    needed = "" if size is None else f"{size:,} bytes to write, "
    where = next(folder for folder in Path(path).absolute().parents if folder.exists())
    free = shutil.disk_usage(where).free
    return ArtifactError(f"{path}: disk full: {needed}{free:,} bytes free; make room, and the same command goes on")


def dumps(value: Any, *, indent: int | None = None) -> str:
    """JSON text of `value`; a number that is not finite becomes null; dataclasses, paths and arrays are taken.

    Raises:
        TypeError: something else is in it.
    """
    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


JsonObject = dict[str, Any]  # an object of JSON or YAML whose fields are not ours to name, or not all of one kind


def loads(data: bytes | str) -> Any:
    """The value in a JSON text.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deep, a number of thousands of digits, or an object with the same
            key twice.
    """
    try:
        return json.loads(data.decode() if isinstance(data, bytes) else data, object_pairs_hook=_no_key_twice)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except RecursionError:
        raise ValueError("nested too deep") from None
    except ValueError as error:
        if "int_max_str_digits" in str(error):  # of Python's, which tells how to change Python
            raise ValueError(f"a number of more than {sys.get_int_max_str_digits():,} digits") from None
        raise


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.40} occurs twice in an object")
    return found


def whole_characters(text: str) -> bool:
    """Whether a text holds no half of a surrogate pair: JSON can name one, and no file and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def plain(value: Any) -> Any:
    """`value` with nothing in it but dict, list, str, int, finite float, bool and None."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if not isinstance(value, type) and dataclasses.is_dataclass(value):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {str(key): plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [plain(child) for child in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # a tensor or an array, without importing either library
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted path and JSON text of each value that holds no others; a list of plain values counts as one."""
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from leaves(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(child, dict | list | tuple) for child in value):
        for index, child in enumerate(value):
            yield from leaves(child, f"{path}.{index}" if path else str(index))
    else:
        yield path, dumps(value)
