"""The head of a GGUF file held against the file's size: no count in it may say more than there are bytes for.

The reader of the package `gguf` believes every count, and walks on past the end of the file for as long as it says.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from recover.base.errors import ModelError

MAGIC, VERSIONS = b"GGUF", (2, 3)
STRING, ARRAY = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type
DEEPEST = 4  # arrays inside arrays
MOST_DIMENSIONS = 4


def check_head(path: Path, shown: Path) -> None:
    """Walk the head once; raise ModelError (the file named as `shown`) with the byte at which it is unsound."""
    if path.stat().st_size < 24:
        raise ModelError(f"{shown}: {path.stat().st_size} bytes, too short for the head of a GGUF file")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(data, shown).all()


class _Walk:
    def __init__(self, data: mmap.mmap, shown: Path) -> None:
        self.data, self.shown, self.at, self.end = data, shown, 0, len(data)

    def all(self) -> None:
        if self.data[:4] != MAGIC:
            raise self.unsound(f"begins with {self.data[:4]!r}", f"{MAGIC!r}: no GGUF file")
        self.at = 4
        version = self.number("<I")
        if version not in VERSIONS:
            raise self.unsound(f"version {version}", f"one of {VERSIONS}, little-endian")
        tensors, keys = self.count(24, "tensors"), self.count(13, "keys")
        for _ in range(keys):
            self.text("a key")
            self.value(self.number("<I"), 0)
        for _ in range(tensors):
            self.text("a tensor's name")
            dimensions = self.number("<I")
            if dimensions > MOST_DIMENSIONS:
                raise self.unsound(f"a tensor of {dimensions} dimensions", f"at most {MOST_DIMENSIONS}")
            self.skip(8 * dimensions + 12, "a tensor's shape and place")

    def value(self, kind: int, depth: int) -> None:
        if kind == STRING:
            self.text("a text")
        elif kind == ARRAY and depth < DEEPEST:
            inner = self.number("<I")
            length = self.count(SIZES.get(inner, 8), "values")
            if inner in SIZES:
                self.skip(SIZES[inner] * length, "an array")
            else:
                for _ in range(length):
                    self.value(inner, depth + 1)
        elif kind in SIZES:
            self.skip(SIZES[kind], "a value")
        else:
            raise self.unsound(f"a value of type {kind}", "a type of GGUF, arrays not nested deeper than 4")

    def text(self, what: str) -> None:
        self.skip(self.count(1, f"bytes of {what}"), what)

    def count(self, size: int, what: str) -> int:
        """A count of things that take at least `size` bytes each."""
        count = self.number("<Q")
        if count * size > self.end - self.at:
            raise self.unsound(f"{count:,} {what}", f"no more than the {self.end - self.at:,} bytes left can hold")
        return count

    def number(self, form: str) -> int:
        start = self.at
        self.skip(struct.calcsize(form), "a number")
        return struct.unpack_from(form, self.data, start)[0]

    def skip(self, size: int, what: str) -> None:
        if size > self.end - self.at:
            raise self.unsound(f"the end of the file in {what}", "the rest of the head")
        self.at += size

    def unsound(self, found: str, expected: str) -> ModelError:
        return ModelError(f"{self.shown}: byte {self.at}: found {found}; expected {expected}. Fetch the file again")
