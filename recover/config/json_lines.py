"""A user's JSONL file, line by line. (Files of a run: `artifacts.read_jsonl`, which forgives a torn end.)"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recover.base.errors import DataError
from recover.config.paths import meant


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """("file:line", value) of each line that is not blank; a byte order mark is passed over.

    What a value must be is the caller's to say.

    Raises:
        DataError: a line is not JSON, by file and line.
        OSError, UnicodeDecodeError: the file cannot be read; callers say what it was wanted for.
    """
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                value = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{where}: not JSON ({error}); a JSONL file holds one object a line") from error
            yield where, value


def unread(path: Path, error: Exception) -> str:
    """Why a file could not be read, in one sentence, with the file beside it that was probably meant."""
    if isinstance(error, UnicodeDecodeError):
        return f"{path}: not UTF-8 text: {error.reason} at byte {error.start}"
    reason = getattr(error, "strerror", None) or str(error)
    if not isinstance(error, FileNotFoundError):
        return f"{path}: cannot be read: {reason}"
    return f"{path}: no such file{meant(path)}"
