"""What is done of unfinished work, kept on disk: a second call goes on after it and ends in the same bits.

An entry is a line of `parts.jsonl` (name, value, digests), and a safetensors file if it has tensors. Lines are in the
order in which they were made, each on top of those before, so one that is damaged takes those after it along. One
process writes, one after another; once the work is done, the journal is removed. So it is no place for what stays (text
that was written, a cache of states), nor for what several processes write at once (the batches of a probe).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from recover.base import artifacts, console
from recover.base.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

LINES = "parts.jsonl"
FORMAT = 1  # of these files, and of what is in them: raised when entries of before are of no use


class Entry(NamedTuple):
    """One thing decided: plain data, and tensors by name on the CPU."""

    value: Any = None
    tensors: Mapping[str, Tensor] = {}


class Line(TypedDict):
    """An entry as its line has it; `sha256`: of the file of its tensors, None where it has none."""

    name: str
    value: Any
    sha256: str | None
    line_sha256: str


class Header(TypedDict):
    """The first line: all that the entries were made from."""

    format: int
    made_from: Any


class Journal:
    """The entries under `folder`, made from exactly what `made_from` says; others are deleted with a warning.

    Without a folder nothing is found and nothing is kept. Raises ArtifactError where the folder cannot be read or
    written.
    """

    def __init__(self, folder: Path | None = None, made_from: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.lines: list[Line] = []
        if folder is None:
            return
        header: Header = {"format": FORMAT, "made_from": artifacts.plain(dict(made_from or {}))}
        fault = self._read(folder, header)
        if fault:
            console.warn(f"{folder}: what was done of this work: {fault}; {self._kept()}")
        if fault or not self.lines:
            lines = "".join(f"{artifacts.dumps(line)}\n" for line in [header, *self.lines])
            artifacts.write_text(folder / LINES, lines)
            used = {self._file(number) for number in range(len(self.lines))}
            for path in _files(folder) - used:
                path.unlink(missing_ok=True)
        if self.lines:
            console.say(f"going on after {self.lines[-1]['name']}: {len(self.lines)} parts are done")

    def find(self, name: str) -> Entry | None:
        """The entry of this name, if an earlier call made it."""
        for number, line in enumerate(self.lines):
            if line["name"] == name:
                import safetensors.torch  # with torch, which this folder does not import

                path = self._file(number)
                return Entry(line["value"], safetensors.torch.load_file(path) if line["sha256"] else {})
        return None

    def keep(self, name: str, entry: Entry) -> None:
        """Put the entry on disk, whole or not at all, after those that are there."""
        if self.folder is None:
            return
        if self.find(name) is not None:
            raise AssertionError(f"{name}: decided twice")
        digest = None
        if entry.tensors:
            import safetensors.torch

            data = safetensors.torch.save({key: tensor.cpu().contiguous() for key, tensor in entry.tensors.items()})
            artifacts.write_bytes(self._file(len(self.lines)), data)
            digest = hashlib.sha256(data).hexdigest()
        value = artifacts.plain(entry.value)
        line: Line = {"name": name, "value": value, "sha256": digest, "line_sha256": _digest(name, value, digest)}
        artifacts.append_jsonl(self.folder / LINES, line)
        self.lines.append(line)

    def once(self, name: str, do: Callable[[], Entry]) -> Entry:
        """The entry of this name: the one that is there, or else what `do` gives, which is kept."""
        found = self.find(name)
        if found is None:
            found = do()
            self.keep(name, found)
        return found

    def remove(self) -> None:
        """Delete all of them: what they were for is done."""
        if self.folder is not None:
            for path in {self.folder / LINES, *_files(self.folder)}:
                path.unlink(missing_ok=True)
            with suppress(OSError):  # files of others are in it, or it is not there
                self.folder.rmdir()
        self.lines = []

    def _read(self, folder: Path, header: Header) -> str:
        """Fill `lines` with those that are whole; why there are no more of them, if that is a fault."""
        if not (folder / LINES).exists():
            return ""
        try:
            found = artifacts.read_jsonl(folder / LINES)
        except ArtifactError as error:
            return str(error)
        if not found:
            return ""
        if found[0] != header:
            return f"made from something else ({_difference(found[0], header)})"
        for line in found[1:]:
            fault = self._fault(line)
            if fault:
                return fault
            self.lines.append(line)
        return ""

    def _fault(self, line: Any) -> str:
        """What is wrong with the next line or its file."""
        if not isinstance(line, dict) or line.get("line_sha256") != _digest_of(line):
            return f"line {len(self.lines) + 2} of {LINES} is damaged"
        path = self._file(len(self.lines))
        if line["sha256"] and not path.exists():
            return f"{path.name} is missing"
        if line["sha256"] and artifacts.sha256(path) != line["sha256"]:
            return f"{path.name} is damaged"
        return ""

    def _file(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"part-{number}.safetensors"

    def _kept(self) -> str:
        if not self.lines:
            return "all is done again"
        return f"those up to {self.lines[-1]['name']} are used, the others done again"


def _files(folder: Path) -> set[Path]:
    """The tensor files of entries in this folder."""
    return {path for path in folder.glob("part-*.safetensors") if re.fullmatch(r"part-\d+", path.stem)}


def _digest_of(line: Mapping[str, Any]) -> str:
    return _digest(*(line.get(key) for key in ("name", "value", "sha256")))


def _digest(name: Any, value: Any, sha256: Any) -> str:
    text = artifacts.dumps({"name": name, "value": value, "sha256": sha256})
    return hashlib.sha256(text.encode()).hexdigest()


def _difference(found: Any, header: Header) -> str:
    """The first fields in which two headers differ, and how."""
    before, now = dict(artifacts.leaves(found)), dict(artifacts.leaves(header))
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    said = [
        f"{name.removeprefix('made_from.')}: {before.get(name, 'absent')} -> {now.get(name, 'absent')}"
        for name in changed[:3]
    ]
    return "; ".join(said).replace('"', "")
