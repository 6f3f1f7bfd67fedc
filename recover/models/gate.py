"""The gate before a model folder: what will be read of it is listed, bounded, hashed, and the same once it is loaded.

Every road in passes here: a folder, a hub snapshot, what a GGUF file was converted to, an export of ours, a folder that
gives the tokenizer alone. What is not listed is not read. What settings may say, and how large their
numbers may be, is in `settings.py`; the tensors are accounted for in `load.py`.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from recover.base.errors import ModelError
from recover.base.products import ALWAYS_HASHED, digest_of

SETTINGS, WORDS, TEMPLATE = 2**24, 2**29, 2**22  # bytes: of settings, of a vocabulary, of a chat template
# What is read of a folder, by pattern, and the most bytes of it; weights are bounded by their own headers.
READ: dict[str, int | None] = {
    "config.json": SETTINGS,
    "generation_config.json": SETTINGS,
    "adapter_config.json": SETTINGS,
    "processor_config.json": SETTINGS,
    "preprocessor_config.json": SETTINGS,
    "video_preprocessor_config.json": SETTINGS,
    "model.safetensors.index.json": 4 * SETTINGS,
    "tokenizer_config.json": 4 * SETTINGS,
    "special_tokens_map.json": 4 * SETTINGS,
    "added_tokens.json": 4 * SETTINGS,
    "tokenizer*.json": WORDS,
    "vocab.json": WORDS,
    "merges.txt": WORDS,
    "vocab.txt": WORDS,
    "tekken.json": WORDS,
    "*.model": WORDS,
    "chat_template.jinja": TEMPLATE,
    "chat_template.json": TEMPLATE,
    "additional_chat_templates/*.jinja": TEMPLATE,
    "*.safetensors": None,
    "*.py": SETTINGS,  # with model.trust_remote_code alone
}
MOST_FILES = 4096


class Stamp(NamedTuple):
    """What tells a file from another one of its name, without reading it."""

    device: int
    inode: int
    size: int
    changed: int


def listed(folder: Path) -> dict[str, int | None]:
    """Each file that may be read of the folder, by name, and the most bytes of it."""
    found: dict[str, int | None] = {}
    for pattern, most in READ.items():
        for path in folder.glob(pattern):
            found.setdefault(path.relative_to(folder).as_posix(), most)
    return dict(sorted(found.items()))


def check_files(folder: Path) -> None:
    """Raise ModelError for a file that is none, is another's, or is larger than any of its kind; nothing is read."""
    names = listed(folder)
    if len(names) > MOST_FILES:
        raise ModelError(f"{folder}: holds {len(names):,} files that would be read; expected at most {MOST_FILES:,}")
    for name, most in names.items():
        path = folder / name
        try:
            found = path.stat()
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror}); fetch the model again") from None
        if not stat.S_ISREG(found.st_mode):
            raise ModelError(f"{path}: is a {_kind(found.st_mode)}; expected a file")
        if most is not None and found.st_size > most:
            raise ModelError(f"{path}: {found.st_size:,} bytes; expected at most {most:,}: it is no file of this kind")
        if not name.endswith(".safetensors"):
            _check_link(path, folder)


def _check_link(path: Path, folder: Path) -> None:
    """A link of a downloaded folder may lead to a private file, whose text would end up in a message or an export."""
    target, home = path.resolve(), folder.resolve()
    if target.is_relative_to(home) or target.name == path.name:
        return
    if target.parent == home.parent.parent / "blobs":  # as the cache of the hub keeps a snapshot
        return
    raise ModelError(
        f"{path}: is a link to {target}, which lies outside of the folder under another name; expected the file itself"
    )


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "folder", stat.S_ISFIFO: "pipe", stat.S_ISSOCK: "socket"}
    return next((name for test, name in kinds.items() if test(mode)), "device")


def digests(folder: Path) -> dict[str, str]:
    """sha256 of each listed file, by name; of large ones size and time of change, since hashing them takes minutes."""
    return {name: _digest(folder / name) for name in listed(folder)}


def _digest(path: Path) -> str:
    found = path.stat()
    if found.st_size > ALWAYS_HASHED:
        return f"{found.st_size} bytes, changed {found.st_mtime_ns}"
    return digest_of(path)


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Inside, what was checked is loaded: ModelError at the end for a file that came, went or was written meanwhile."""
    before = _stamps(folder)
    yield
    after = _stamps(folder)
    differing = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if differing:
        raise ModelError(
            f"{folder / differing[0]}: changed while it was read ({len(differing)} such files), so that what was "
            "checked may not be what was loaded; wait until the folder is whole, then give the same command again"
        )


def _stamps(folder: Path) -> dict[str, Stamp]:
    stamps = {}
    for name in listed(folder):
        found = (folder / name).stat()
        stamps[name] = Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    return stamps
