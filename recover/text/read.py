"""Rows of a user's data, one by one: files of lines, tables, sheets and plain text, and data sets of the hub.

`rows_at` is the one reader: a path that is there is that file, whatever its letters and its kind. What is wrong is a
DataError that names the file and line, or the row. Files of a run are another matter: `artifacts.read_jsonl` forgives
a torn end.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from recover.base import console, hub
from recover.base.artifacts import meant, whole_characters
from recover.base.errors import DataError
from recover.config.recipe import ROWS, SHEETS, TABLES, TEXTS, ending, local_path
from recover.text import data_gate

MAX_LISTED = 8
BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


class EmptyColumn(DataError):
    """A row holds nothing in a column that is asked for: such rows may be left out."""


@dataclass(frozen=True)
class Row:
    """One row of a source; `where` names it in messages (`file:line`)."""

    where: str
    value: dict[str, Any]

    def column(self, name: str, kind: type = str) -> Any:
        """The value in a column, of this type and not empty (a text: more than white space). A list may be JSON text.

        Raises:
            EmptyColumn: it is null or empty. DataError: it is not there, or of another type.
        """
        found = self.value.get(name)
        if name not in self.value:
            raise DataError(f"{self.where}: no column '{name}', found {sorted(self.value)[:MAX_LISTED]}")
        if found is None or found == kind() or (isinstance(found, str) and not found.strip()):
            raise EmptyColumn(f"{self.where}: column '{name}' must hold {kind.__name__}, not empty; found nothing")
        found = listed(found) if kind is list else found
        if not isinstance(found, kind):
            raise DataError(
                f"{self.where}: column '{name}' must hold {kind.__name__}, not empty; found {type(found).__name__}"
            )
        return found


@cache
def say_once(text: str) -> None:
    """Warn of what every later reading of a source would say again."""
    console.warn(text)


def listed(value: Any) -> Any:
    """The list that a text holds as JSON, since a sheet has no other way to hold one; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = data_gate.parsed(value)
    except ValueError:
        return value
    return found if isinstance(found, list) and all(map(whole_characters, _texts(found))) else value


def rows_at(
    source: str,
    *,
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    what: str = "",
    kinds: str = "a local file",
) -> Sequence[Row]:
    """All rows of a file (`ROWS` lists the endings), of all files that a pattern matches, or of a data set.

    `subset` and `split` are of data sets, `revision` of those of the hub. `what` begins a message about a file, `kinds`
    says what else `source` could have been.

    Raises:
        DataError: it is not there, cannot be read, or a row is not an object; by file and line.
    """
    path = local_path(source)
    files = matching(path)
    if files == [path] and path.is_dir():
        return DataSet(str(path), subset=subset, split=split, kinds=kinds)
    if not files and not ending(source):
        return DataSet(source, subset=subset, split=split, revision=revision, kinds=kinds)
    if not files:
        missing = "no file matches" if "*" in source else f"no such file{meant(path)}"
        raise DataError(f"{what}{path}: {missing}")
    if [ending(file.name) for file in files] == [".parquet"]:
        return DataSet(str(files[0]))
    return [row for file in files for row in file_rows(file, what)]


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
    except ValueError as error:
        raise DataError(f"{path}: {error}; expected * and ? within names, ** as the whole name of a folder") from None


def file_rows(path: Path, what: str = "") -> Iterator[Row]:
    """The rows of a file of lines, a table or a sheet, one by one; a text file is one row with a column `text`.

    Raises:
        DataError: the file cannot be read, its ending is not known, or a row is not an object, by file and line.
    """
    kind = ending(path.name)
    if not kind:
        raise DataError(f"{what}{path}: its ending says nothing of how to read it; expected one of {', '.join(ROWS)}")
    if kind in TEXTS:
        yield Row(f"{path}:1", {"text": text_of(path, what)})
        return
    read = _table if kind in TABLES else _sheet if kind in SHEETS else json_lines
    for where, value in read(path, what):
        if not isinstance(value, dict):
            raise DataError(f"{where}: found {type(value).__name__}, expected one JSON object a line (JSONL)")
        yield Row(where, value)


def json_lines(path: Path, what: str = "") -> Iterator[tuple[str, Any]]:
    """("file:line", value) of each line that is not blank; a byte order mark is passed over.

    A file named `.json` may be one list instead, or one object over several lines. What a value must be is the caller's
    to say. `what`: begins the message of a file that cannot be read.

    Raises:
        DataError: the file cannot be read, or a line is not JSON, by file and line.
    """
    try:
        if ending(path.name) == ".json" and _is_whole(path):
            yield from _whole(path)
            return
        with _opened(path) as file:
            for number, line in enumerate(data_gate.lines(file, path), 1):
                if line.strip():
                    yield f"{path}:{number}", _value(line, f"{path}:{number}")
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise DataError(f"{what}{unread(path, error)}") from error


def _refuse_pipe(path: Path, what: str = "") -> None:
    """What is no file may never end, or never begin."""
    if path.exists() and not path.is_file():
        raise DataError(f"{what}{path}: is a {'folder' if path.is_dir() else 'pipe or device'}; expected a file")


def _opened(path: Path, newline: str | None = None) -> Any:
    _refuse_pipe(path)
    opened: Any = data_gate.Unpacked(path) if path.suffix.lower() == ".gz" else path.open("rb")
    return io.TextIOWrapper(opened, encoding="utf-8-sig", newline=newline)


def _is_whole(path: Path) -> bool:
    """Whether a JSON file is a list, or an object whose first line does not end it; else it is read by lines."""
    with _opened(path) as file:
        first = ""
        while not first and (line := file.readline(data_gate.LONGEST_LINE)):
            first = line.strip()
    if first.startswith("["):
        return True
    try:
        data_gate.parsed(first)
    except json.JSONDecodeError as error:
        return first.startswith("{") and error.pos >= len(first) - 1
    except ValueError:  # whose reading by lines says so
        pass
    return False


def _whole(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        text = file.read(data_gate.LONGEST_JSON + 1)
    if len(text) > data_gate.LONGEST_JSON:
        raise DataError(f"{path}: one JSON value of more than {data_gate.LONGEST_JSON:,} characters; save it as JSONL")
    try:
        value = data_gate.parsed(text)
    except ValueError as error:
        raise DataError(f"{path}:{getattr(error, 'lineno', 1)}: not JSON ({error})") from None
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        yield where, _written(row, where)


def _value(line: str, where: str) -> Any:
    try:
        value = data_gate.parsed(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); a JSONL file holds one object a line") from error
    return _written(value, where) if "\\u" in line else value


def _written(value: Any, where: str) -> Any:
    """The value, if each text in it can be written: JSON can name half a character, which no tokenizer takes."""
    half = next((text for text in _texts(value) if not whole_characters(text)), None)
    if half is None:
        return value
    at = next(index for index, letter in enumerate(half) if "\ud800" <= letter <= "\udfff")
    shown = half[max(0, at - 20) : at + 20].encode("ascii", "backslashreplace").decode()
    raise DataError(
        f"{where}: found half of a surrogate pair at character {at + 1} of '{shown}': not a character, as text that "
        "was cut in UTF-16 has; take it out"
    )


def _texts(value: Any) -> Iterator[str]:
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            left += reversed([*item, *item.values()])
        elif isinstance(item, list):
            left += reversed(item)


def text_of(path: Path, what: str = "") -> str:
    """All of a text file. Raises DataError: it cannot be read."""
    _refuse_pipe(path, what)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{what}{unread(path, error)}") from error


def _sheet(path: Path, what: str) -> Iterator[tuple[str, Any]]:
    """Rows of a CSV or TSV file by the names in its first line; every cell is text, and an empty one is empty text.

    Cells of a CSV file whose first line has no comma may be parted by semicolons or tabs, as spreadsheets of many
    countries write it.
    """
    before = csv.field_size_limit(data_gate.LONGEST_LINE)
    try:
        with _opened(path, newline="") as file:
            lines = csv.reader(data_gate.lines(file, path), delimiter=_parted_by(path), strict=True)
            names = next(lines, [])
            if len(set(names)) < len(names) or not all(names):
                raise DataError(f"{path}:1: columns {names}: expected a name for each, and none twice")
            last = lines.line_num
            for cells in lines:
                where, last = f"{path}:{last + 1}", lines.line_num
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise DataError(f"{where}: found {len(cells)} cells, expected {len(names)}: {', '.join(names)}")
                yield where, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}: not a sheet: line {lines.line_num}: {error}") from None
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise DataError(f"{what}{unread(path, error)}") from error
    finally:
        csv.field_size_limit(before)


def _parted_by(path: Path) -> str:
    if ending(path.name) == ".tsv":
        return "\t"
    with _opened(path, newline="") as file:
        first = file.readline(data_gate.LONGEST_LINE)
    return "," if "," in first else max(";\t,", key=first.count) if any(mark in first for mark in ";\t") else ","


def _table(path: Path, what: str) -> Iterator[tuple[str, Any]]:
    _refuse_pipe(path, what)
    try:
        rows = [row for batch in data_gate.batches(path) for row in batch.to_pylist()]
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{what}{unread(path, error)}") from None
    except Exception as error:  # Arrow's own kinds, and those of Python for numbers that are damaged
        raise DataError(f"{path}: not a table that Arrow reads: {_line(error)}") from None
    for number, row in enumerate(rows):
        yield f"{path}, row {number}", row


class DataSet(Sequence[Row]):
    """The rows of a data set of the hub or of a folder, or of a parquet file: read from disk one by one, in any order.

    A folder is what `datasets` makes of its files, or what its `save_to_disk` wrote.
    """

    def __init__(
        self,
        source: str,
        *,
        subset: str | None = None,
        split: str = "train",
        revision: str | None = None,
        kinds: str = "a local file",
    ) -> None:
        """`kinds`: of files, which `source` would be if it were none of the hub, as a message says it.

        Raises:
            DataError: it does not load.
        """
        self.source = source
        if os.path.isdir(source) and not any(path.is_file() for path in Path(source).rglob("*")):
            raise DataError(f"{source}: an empty folder; expected files of rows in it: {', '.join(ROWS)}")
        try:
            with console.silent("datasets", "huggingface_hub"):
                rows = _data_set(source, subset, split, revision)
        except DataError:
            raise
        except hub.NoCommit as error:
            raise DataError(f"{source}: neither {kinds} nor a data set that can be had: {error}") from error
        except Exception as error:  # of `datasets`, of Arrow, of whichever reader of files they have
            if "config" in str(error).lower() and "available" in str(error):
                asked = "it has several configurations" if subset is None else f"no configuration '{subset}'"
                raise DataError(f"{source}: {asked}: set 'subset' ({_line(error)})") from error
            if os.path.exists(source):  # which takes a name that no file system can have for one that is not there
                raise DataError(f"{source}: cannot be read as a data set, split '{split}': {_causes(error)}") from error
            raise DataError(
                f"{source}: neither {kinds} nor a data set that loads, split '{split}' ({_line(error)})"
            ) from error
        if media := data_gate.media_columns(rows.features):
            say_once(f"{source}: columns {', '.join(media)} hold no text, and are not read")
            rows = rows.remove_columns(media)
        self.rows = rows

    @property
    def columns(self) -> list[str]:
        """The names of its columns."""
        return self.rows.column_names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        try:
            return Row(f"{self.source}, row {index}", dict(self.rows[index]))
        except IndexError:  # the end, for who counts
            raise
        except Exception as error:
            raise DataError(f"{self.source}, row {index}: cannot be read ({_line(error)})") from error


def _data_set(source: str, subset: str | None, split: str, revision: str | None) -> Any:
    import datasets

    folder = Path(source)
    if folder.is_file():  # escaped: `datasets` takes every name for a pattern
        for _ in data_gate.batches(folder):
            pass
        return datasets.load_dataset("parquet", data_files=glob.escape(source), split="train")
    if not folder.is_dir():
        commit = _commit(source, revision)
        builder = datasets.load_dataset_builder(source, subset, revision=commit)
        data_gate.check_builder(builder, source, "hf://datasets/")
        return datasets.load_dataset(source, subset, split=split, revision=commit)
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _saved(folder, split)
    kinds = {ending(path.name) for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")}
    kinds -= {"", ".md"}
    if subset is None and len(kinds) > 1:
        raise ValueError(
            f"files of several kinds ({', '.join(sorted(kinds))}), of which only one would be read: name the files "
            "instead, as FOLDER/*.jsonl"
        )
    if glob.escape(str(folder.absolute())) != str(folder.absolute()):
        raise ValueError("a folder with [, * or ? in its path; name its files instead, as FOLDER/*.jsonl, or rename it")
    data_gate.check_folder(folder)
    options: Any = {"cache_dir": _own_cache(folder)}
    data_gate.check_builder(datasets.load_dataset_builder(source, subset, **options), source, f"{folder.resolve()}/")
    return datasets.load_dataset(source, subset, split=split, **options)


def _saved(folder: Path, split: str) -> Any:
    """The rows of a folder that `save_to_disk` wrote, each batch of them looked at: they are read where they lie."""
    import datasets

    data_gate.check_saved(folder)
    saved: Any = datasets.load_from_disk(str(folder))
    if isinstance(saved, dict):
        if split not in saved:
            raise ValueError(f"saved splits: {', '.join(saved)}")
        saved = saved[split]
    for _ in data_gate.checked(iter(saved.data.to_batches()), folder):
        pass
    return saved


def _own_cache(folder: Path) -> str:
    """Where `datasets` keeps what it made of a folder, known by the folder's place and the state of its files.

    By itself it goes by the names of folder and configuration: of two folders of one name it gives the rows of the one
    that was read first, and of one whose files were changed, the rows of before.
    """
    from datasets import config

    known = hashlib.sha256(str(folder.absolute()).encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        state = path.stat()
        known.update(f"\n{path.relative_to(folder)} {state.st_size} {state.st_mtime_ns}".encode())
    return str(Path(config.HF_DATASETS_CACHE) / f"folder-{known.hexdigest()[:16]}")


def _causes(error: BaseException) -> str:
    """What went wrong, and what was behind it: `datasets` says by itself that something did."""
    said: list[str] = []
    found: BaseException | None = error
    while found is not None and len(said) < 3:
        if (text := " ".join(str(found).split())[:300]) and text not in said:
            said.append(text)
        found = found.__cause__ or found.__context__
    return ": ".join(said)


def _commit(source: str, revision: str | None) -> str | None:
    """The commit of a data set of the hub; None where only the copy that `datasets` made is there, and no hub."""
    from datasets import config

    if not hub.named(source):
        raise hub.NoCommit(f"{source!r} cannot be the name of one of the hub: check the path")
    try:
        return hub.commit(hub.Repository("dataset", source, revision))
    except hub.NoCommit:
        if Path(config.HF_DATASETS_CACHE, source.replace("/", "___")).is_dir():
            return None
        raise


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def unread(path: Path, error: Exception) -> str:
    """Why a file could not be read, in one sentence, with the file beside it that was probably meant."""
    if isinstance(error, UnicodeDecodeError):
        found = next((name for mark, name in BOMS.items() if error.object[:2] == mark), None)
        found = f"{found}, " if found and not error.start else ""
        return f"{path}: not UTF-8 text: {found}{error.reason} at byte {error.start}; save it as UTF-8"
    reason = getattr(error, "strerror", None) or str(error)
    if not isinstance(error, FileNotFoundError):
        return f"{path}: cannot be read: {reason}"
    return f"{path}: no such file{meant(path)}"
