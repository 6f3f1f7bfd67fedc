"""Damaged and hostile input by the hundred thousand, each made from a seed, held against laws that have no exceptions.

    python dev/fuzz.py                         every kind, 200 inputs each
    python dev/fuzz.py recipe rows --count 100000
    python dev/fuzz.py --seconds 600           ten minutes of each kind; Ctrl-C ends sooner, with what was done
    python dev/fuzz.py config --seed 4711 --count 1 --keep /tmp/input    one input again, to look at

An input is taken, or refused by an error of ours: anything else raised is a fault. So is more than `SECONDS` for one
input; a process started, a connection, code compiled from a file of the input; a file written, renamed or removed
outside of the folder that is fuzzed in; and memory that grows with the number of inputs. `fuzz_kinds.py` has the kinds.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import gc
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

SECONDS = 30.0  # three times the longest bound of the program itself, which is that of a chat template
NET_SECONDS = 120  # then the process is ended, with a traceback: a library does not come back
NET_AGAIN = 30.0  # seconds after which the net is hung up anew: it is a thread, which takes longer than most inputs
ROOM = 3 * 2**30  # bytes of address space that inputs may take
WARM = 200  # inputs after which libraries have loaded what they load
GROWTH = 96 * 2**20  # bytes that a process may have more after the last input than after the `WARM`th
LONGEST = 4000  # characters of a message
STARTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "subprocess.Popen",
    "pty.spawn",
)
CONNECTS = ("socket.connect", "socket.bind", "socket.sendto", "urllib.Request", "http.client.connect", "ftplib.connect")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "os.chmod")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

C = ctypes.CDLL(None)


class Forbidden(BaseException):
    """What no input may bring about; raised before it happens."""


class Slow(BaseException):
    """An input that takes longer than any may."""


@dataclass
class Fault:
    """A law that an input broke."""

    seed: int
    what: str

    def __str__(self) -> str:
        return f"--seed {self.seed}: {self.what}"


@dataclass
class Outcome:
    """What came of the inputs of one kind."""

    kind: str
    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    growth: int = 0
    faults: list[Fault] = field(default_factory=list)

    def row(self) -> str:
        """As a row of the table in docs/fuzzing.md."""
        return (
            f"| {self.kind} | {self.inputs:,} | {self.refused:,} | {len(self.faults)} | {self.seconds:,.0f} | "
            f"{self.slowest:.2f} | {self.growth / 2**20:,.0f} |"
        )


_scratch: Path | None = None  # the folder that may be written in; None: nothing is listened to
_broken: list[str] = []
_stopped: list[int] = []  # signals that asked for the end: after this input, with a row of what was done
_hung = 0.0  # when the net was hung up, by the clock; 0: it is not


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _scratch is None:
        return
    if event in STARTS or event in CONNECTS:
        _forbid(f"{event} {arguments[0]!r:.200}")
    if event == "open":
        path, mode, flags = arguments
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & WRITES):
            _inside(event, path)
    if event in CHANGES:
        descriptors = [each for each in arguments[1:] if isinstance(each, int) and each >= 0 and event != "os.chmod"]
        at = Path(f"/proc/self/fd/{descriptors[-1]}") if event != "os.truncate" and descriptors else Path()
        at = at if at.is_dir() else Path()  # a mode is a number, too
        _inside(event, arguments[0] if isinstance(arguments[0], int) else at / os.fsdecode(arguments[0]))
    if event == "compile" and isinstance(arguments[1], str) and arguments[1].startswith(str(_scratch)):
        _forbid(f"compile {arguments[1]}")


def _inside(event: str, path: Any) -> None:
    if isinstance(path, int) or path is None:
        return
    name = os.path.realpath(os.fsdecode(path))
    if not name.startswith((f"{_scratch}{os.sep}", os.devnull)) and name != str(_scratch):
        _forbid(f"{event} {name}")


def _forbid(what: str) -> None:
    _broken.append(what)
    raise Forbidden(what)


sys.addaudithook(_listen)


def fuzz(
    name: str, *, count: int | None = 200, seconds: float | None = None, seed: int = 0, keep: Path | None = None
) -> Outcome:
    """Give the kind `count` inputs, or as many as `seconds` allow, from `seed` on; the last one is copied to `keep`."""
    from fuzz_kinds import KINDS

    outcome = Outcome(name)
    with _folder() as scratch, _bounded():
        kind = KINDS[name](scratch / "input")
        began, warm = time.monotonic(), 0
        while (
            not _stopped
            and (count is None or outcome.inputs < count)
            and (seconds is None or time.monotonic() - began < seconds)
        ):
            _one(kind, seed + outcome.inputs, outcome)
            if outcome.inputs == WARM:
                warm = _resident()
        outcome.seconds = time.monotonic() - began
        outcome.growth = _resident() - warm if warm else 0
        if outcome.growth > GROWTH:
            outcome.faults.append(Fault(seed, f"memory grew by {outcome.growth:,} bytes"))
        if keep is not None:
            shutil.copytree(kind.folder, keep, dirs_exist_ok=True, symlinks=True)
    return outcome


def _one(kind: Any, seed: int, outcome: Outcome) -> None:
    global _scratch
    from recover.base.errors import RecoverError

    chance = _made(kind, f"{outcome.kind} {seed}")
    _broken.clear()
    began = time.monotonic()
    problem = None
    _hang_net(began)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        _scratch = kind.folder.parent
        try:
            kind.work(chance)
        except RecoverError as error:
            outcome.refused += 1
            problem = _message(str(error))
        except Slow:
            problem = f"takes more than {SECONDS:g} seconds"
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in where if f"{os.sep}recover{os.sep}" in frame.filename] or where
            problem = f"{type(error).__name__}: {str(error)[:200]!r}, {ours[-1].filename}:{ours[-1].lineno}"
            if isinstance(error, KeyboardInterrupt):
                raise
        finally:
            _scratch = None
            signal.setitimer(signal.ITIMER_REAL, 0)
    kind.after()
    outcome.inputs += 1
    outcome.slowest = max(outcome.slowest, time.monotonic() - began)
    for what in [problem, *_broken]:
        if what is not None:
            outcome.faults.append(Fault(seed, what))


def _hang_net(now: float) -> None:
    """End the process where an input does not come back, between `NET_SECONDS - NET_AGAIN` and `NET_SECONDS` later."""
    global _hung
    if now - _hung > NET_AGAIN or not _hung:
        faulthandler.dump_traceback_later(NET_SECONDS, exit=True, file=sys.__stderr__ or 2)
        _hung = now


def _made(kind: Any, seed: str) -> random.Random:
    """Make the next input. One that is nested deeper than it can be written is made again, otherwise."""
    while True:
        chance = random.Random(seed)
        try:
            kind.make(chance)
        except RecursionError:
            seed += " again"
        else:
            return chance


def _message(said: str) -> str | None:
    """What is wrong with a message; a recipe's may have a line for each of its mistakes."""
    from recover.base.console import visible

    if not said.strip():
        return "an error without a message"
    if len(said) > LONGEST:
        return f"a message of {len(said):,} characters: {said[:200]!r}"
    shown = visible(said)
    return None if "Traceback" not in shown else f"a traceback in a message: {said[:200]!r}"


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A new folder, which is also where temporary files go; in memory, where the machine has such a place."""
    before = tempfile.tempdir
    shared = Path("/dev/shm")
    place = shared if "TMPDIR" not in os.environ and shared.is_dir() and os.access(shared, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as name:
        scratch = Path(name).resolve()
        for inside in ("input", "tmp", "cache", "home"):
            (scratch / inside).mkdir()
        tempfile.tempdir = str(scratch / "tmp")
        kept = {key: os.environ.get(key) for key in ("RECOVER_CACHE", "TMPDIR")}
        os.environ |= {"RECOVER_CACHE": str(scratch / "cache"), "TMPDIR": str(scratch / "tmp")}
        try:
            yield scratch
        finally:
            tempfile.tempdir = before
            for key, value in kept.items():
                os.environ.pop(key, None)
                if value is not None:
                    os.environ[key] = value


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Little memory, and an alarm that is heard."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Slow

    global _hung
    limit = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
        _hung = 0.0


def _resident() -> int:
    gc.collect()
    if hasattr(C, "malloc_trim"):  # what is free already, and was not given back
        C.malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where a law was broken."""
    from fuzz_kinds import KINDS

    faulthandler.enable()  # a library in C that crashes says where
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--count", type=int, help="inputs of each kind; default: 200, without a limit with --seconds")
    parser.add_argument("--seconds", type=float, help="of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first input")
    parser.add_argument("--keep", type=Path, help="folder to copy the last input to")
    asked = parser.parse_args(arguments)
    if unknown := sorted(set(asked.kinds) - KINDS.keys()):
        parser.error(f"no kind {unknown[0]!r}; kinds are {', '.join(KINDS)}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _frame: _stopped.append(got))
    count = asked.count or (None if asked.seconds else 200)
    broken = 0
    print("| kind | inputs | refused | faults | seconds | slowest, s | growth, MiB |\n|---|---|---|---|---|---|---|")
    for name in asked.kinds or KINDS:
        if _stopped:
            break
        outcome = fuzz(name, count=count, seconds=asked.seconds, seed=asked.seed, keep=asked.keep)
        print(outcome.row(), flush=True)
        broken += len(outcome.faults)
        seen: set[str] = set()
        for fault in outcome.faults:
            alike = fault.what.rpartition(", ")[2] + fault.what[:20]
            if alike not in seen:
                print(f"  {name} {fault}", flush=True)
            seen.add(alike)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    sys.path.insert(0, str(Path(__file__).parent))
    raise SystemExit(main())
