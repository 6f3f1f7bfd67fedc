"""Files of a user, row by row: JSONL (gzipped too), tables, plain text; and data sets of the hub.

What is wrong is a DataError that names the file and line, or the row. Files of a run are another matter:
`artifacts.read_jsonl` forgives a torn end.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recover.base.errors import DataError
from recover.config.paths import meant

LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
TABLES = (".parquet", ".arrow")
TEXTS = (".txt", ".md")
MAX_LISTED = 8


@dataclass(frozen=True)
class Row:
    """One row of a source; `where` names it in messages (`file:line`)."""

    where: str
    value: dict[str, Any]

    def column(self, name: str, kind: type = str) -> Any:
        """The value in a column, of this type and not empty.

        Raises:
            DataError: it is not there, of another type, or empty.
        """
        found = self.value.get(name)
        if name not in self.value:
            raise DataError(f"{self.where}: no column '{name}', found {sorted(self.value)[:MAX_LISTED]}")
        if not isinstance(found, kind) or not found:
            shown = "nothing" if not found else type(found).__name__
            raise DataError(f"{self.where}: column '{name}' must hold {kind.__name__}, not empty; found {shown}")
        return found


def json_lines(path: Path, what: str = "") -> Iterator[tuple[str, Any]]:
    """("file:line", value) of each line that is not blank; a byte order mark is passed over.

    What a value must be is the caller's to say. `what`: begins the message of a file that cannot be read.

    Raises:
        DataError: the file cannot be read, or a line is not JSON, by file and line.
    """
    try:
        with _opened(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}:{number}", _value(line, f"{path}:{number}")
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise DataError(f"{what}{unread(path, error)}") from error


def _opened(path: Path) -> Any:
    opened: Any = gzip.open if path.suffix == ".gz" else open
    return opened(path, "rt", encoding="utf-8-sig")


def _value(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); a JSONL file holds one object a line") from error


def text_of(path: Path, what: str = "") -> str:
    """All of a text file. Raises DataError: it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{what}{unread(path, error)}") from error


def file_rows(path: Path, what: str = "") -> Iterator[Row]:
    """The rows of a file of lines or a table, one by one; a text file is one row with a column `text`.

    Raises:
        DataError: the file cannot be read, or a row is not an object, by file and line.
    """
    if path.suffix in TEXTS:
        yield Row(f"{path}:1", {"text": text_of(path, what)})
        return
    for where, value in _table(path, what) if path.suffix in TABLES else json_lines(path, what):
        if not isinstance(value, dict):
            raise DataError(f"{where}: found {type(value).__name__}, expected one JSON object a line (JSONL)")
        yield Row(where, value)


def _table(path: Path, what: str) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException, ipc, parquet

    try:
        table = parquet.read_table(path) if path.suffix == ".parquet" else ipc.open_stream(path).read_all()
        rows = table.to_pylist()
    except ArrowException as error:
        raise DataError(f"{path}: not a table that Arrow reads: {error}") from None
    except OSError as error:
        raise DataError(f"{what}{unread(path, error)}") from None
    for number, row in enumerate(rows):
        yield f"{path}, row {number}", row


class DataSet(Sequence[Row]):
    """The rows of a data set of the hub, or of parquet files: read from disk one by one, in any order."""

    def __init__(
        self, source: str, *, subset: str | None = None, split: str = "train", kinds: str = "a local file"
    ) -> None:
        """`kinds`: of files, which `source` would be if it were none of the hub, as a message says it.

        Raises:
            DataError: it does not load.
        """
        import datasets
        from datasets.exceptions import DatasetsError

        self.source = source
        try:
            if source.endswith(".parquet"):
                rows: Any = datasets.load_dataset("parquet", data_files=source, split="train")
            else:
                rows = datasets.load_dataset(source, subset, split=split)
        except (OSError, ValueError, DatasetsError) as error:
            raise DataError(
                f"{source}: neither {kinds} nor a data set that loads, split '{split}' ({error})"
            ) from error
        self.rows = rows

    @property
    def columns(self) -> list[str]:
        """The names of its columns."""
        return self.rows.column_names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return Row(f"{self.source}, row {index}", dict(self.rows[index]))


def unread(path: Path, error: Exception) -> str:
    """Why a file could not be read, in one sentence, with the file beside it that was probably meant."""
    if isinstance(error, UnicodeDecodeError):
        return f"{path}: not UTF-8 text: {error.reason} at byte {error.start}"
    reason = getattr(error, "strerror", None) or str(error)
    if not isinstance(error, FileNotFoundError):
        return f"{path}: cannot be read: {reason}"
    return f"{path}: no such file{meant(path)}"
