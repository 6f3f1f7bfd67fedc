"""A disk that fails: calls by which `recover.base.artifacts` changes files are counted, and one goes wrong."""

from __future__ import annotations

import builtins
import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from recover.base import artifacts


def kill() -> NoReturn:
    """End this process as a power loss would."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("survived SIGKILL")


class Disk:
    """Counts the calls that change files; call `at` raises `error` (an errno) once, or dies, as do all after it.

    A write that dies leaves half of its bytes. `room`: bytes that may be written until the disk is full. `die` ends the
    process, or raises what no code of recover catches.
    """

    CHANGING = ("replace", "fsync", "unlink", "rmdir", "mkdir", "ftruncate")

    def __init__(
        self, at: int = 0, error: int | None = None, room: int | None = None, die: Callable[[], NoReturn] = kill
    ) -> None:
        self.at, self.error, self.room, self.die = at, error, room, die
        self.calls = self.written = 0

    def step(self) -> bool:
        """Count a call; True if this is the one that dies."""
        self.calls += 1
        if self.error is None:
            if 0 < self.at < self.calls:
                self.die()
            return self.calls == self.at
        if self.calls == self.at:
            raise OSError(self.error, os.strerror(self.error))
        return False

    def wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.step():
                self.die()
            return function(*args, **kwargs)

        return call

    def open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        changes = bool(set(mode) & set("wa+"))
        dies = changes and self.step()
        file = builtins.open(path, mode, *args, **kwargs)  # noqa: SIM115
        if dies:
            file.close()
            self.die()
        return Writing(file, self) if changes else file

    @contextmanager
    def installed(self) -> Iterator[None]:
        held = {name: getattr(os, name) for name in self.CHANGING}
        try:
            for name, function in held.items():
                setattr(os, name, self.wrapped(function))
            artifacts.open = self.open  # type: ignore[attr-defined]
            yield
        finally:
            for name, function in held.items():
                setattr(os, name, function)
            del artifacts.open  # type: ignore[attr-defined]


class Writing:
    """An open file whose write can be torn, or meet a full disk."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self.file, self.disk = file, disk

    def write(self, data: bytes) -> int:
        if self.disk.step():
            self._part(data, len(data) // 2)
            self.disk.die()
        self.disk.written += len(data)
        if self.disk.room is not None and self.disk.written > self.disk.room:
            self._part(data, max(0, len(data) - (self.disk.written - self.disk.room)))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def _part(self, data: bytes, size: int) -> None:
        self.file.write(data[:size])
        self.file.flush()

    def truncate(self, size: int) -> int:
        if self.disk.step():
            self.disk.die()
        return self.file.truncate(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
