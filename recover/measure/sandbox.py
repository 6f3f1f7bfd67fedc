"""Runs programs that a model wrote behind a wall, and tells which of them pass their tests.

A program runs in one process and its tests in another (`recover/measure/box`), each in Linux namespaces of its own:
no network, no files but Python's own packages, no environment, no rights, no other processes in sight, limits of
memory, time and files. The tests ask the program over a socket and compare data: nothing that the program does to its
own interpreter makes them pass. docs/security.md says what is promised and what is not.

Without a wall nothing is run, unless the user says `unconfined`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SECONDS = 10.0
MEMORY_BYTES = 2**30
FILE_BYTES = 2**24
OPEN_FILES = 64
SHOWN = 300  # characters of why a program failed
WALLED = "behind Linux namespaces: no network, no files, no other processes"
UNCONFINED = "unconfined: with limits of time and memory only"
START_SECONDS = 60.0
REPLY_BYTES = 65536
ROOT = Path(__file__).parents[2]
START = "import sys; place = sys.argv.pop(1); sys.path.insert(0, place); from recover.measure.box import keeper; "
START += "sys.path.remove(place); keeper.main()"


class NoWall(Exception):
    """This machine gives no namespaces; the words say why."""


class KeeperGone(Exception):
    """The process that runs programs was ended from outside, as by a machine that had no memory left."""


@dataclass(frozen=True)
class Program:
    """What a model wrote, with what stands before it, and the tests that come after."""

    text: str
    tests: str = ""


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end without an error; else why not, in a line, and whether it is Python at all."""

    passed: bool
    reason: str = ""
    parsed: bool = True


class Keeper:
    """The process that runs programs, one at a time. A context: it ends, and all in it, when left.

    Raises NoWall if there is to be a wall and this machine has none.
    """

    def __init__(self, *, confined: bool = True) -> None:
        if confined and sys.platform != "linux":
            raise NoWall(f"this system is {sys.platform}, not Linux")
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-I", "-S", "-c", START, str(ROOT), "walled" if confined else "unconfined"]
        null, end = subprocess.DEVNULL, theirs.fileno()
        self.process = subprocess.Popen(
            command, stdin=end, stdout=null, stderr=null, env={}, cwd="/", start_new_session=True
        )
        theirs.close()
        self.control.settimeout(START_SECONDS)
        try:
            found = self._reply()
        except (OSError, ValueError) as error:
            found = {"error": f"its process did not start ({error})"}
        if "error" in found:
            self.close()
            raise NoWall(found["error"])

    def _reply(self) -> dict[str, Any]:
        reply = self.control.recv(REPLY_BYTES)
        if not reply:
            raise OSError("it ended")
        return json.loads(reply)

    def run(self, program: Program, *, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> Outcome:
        """Run a program and its tests to their end or to their limits."""
        limits = {
            "seconds": seconds,
            **{"CPU": int(seconds) + 1, "AS": memory_bytes, "FSIZE": FILE_BYTES, "NOFILE": OPEN_FILES},
            **{"CORE": 0, "NPROC": 0, "MSGQUEUE": 0, "MEMLOCK": 0},
        }
        reading, writing = os.pipe()
        theirs, ours = socket.socketpair()
        with contextlib.ExitStack() as stack:
            verdict = stack.enter_context(os.fdopen(reading, "rb"))
            with contextlib.ExitStack() as given:
                given.callback(os.close, writing)
                ends = [given.enter_context(each) for each in (theirs, ours)]
                files = [given.enter_context(_file(text)) for text in (program.text, program.tests)]
                descriptors = [files[0].fileno(), ends[0].fileno(), files[1].fileno(), ends[1].fileno(), writing]
                with self._gone():
                    socket.send_fds(self.control, [json.dumps(limits).encode()], descriptors)
            with self._gone():  # our copies of its descriptors are closed: what it waits for ends with the other side
                self.control.settimeout(seconds + START_SECONDS)
                ended = self._reply()
                if "error" in ended:
                    raise OSError(ended["error"])
            return _outcome(ended, verdict.read(REPLY_BYTES), seconds)

    @contextlib.contextmanager
    def _gone(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            self.close()
            raise KeeperGone(f"the process that runs programs is gone: {error}") from None

    def close(self) -> None:
        self.control.close()
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        self.close()


def _file(text: str) -> Any:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - whoever gets it closes it
    # A lone surrogate, which a model may well write, is no UTF-8.
    file.write(text.encode("utf-8", "replace"))
    file.seek(0)
    return file


def _outcome(ended: dict[str, Any], verdict: bytes, seconds: float) -> Outcome:
    if ended["late"]:
        return Outcome(False, f"not done in {seconds:g} s")
    found = json.loads(verdict) if verdict else {"passed": False, "reason": "its tests ended early"}
    if found["passed"]:
        return Outcome(True)
    code = ended["code"]
    reason = found.get("reason") or ("ended early" if code is None else f"ended early, exit code {code}")
    reason = reason.encode("utf-8", "backslashreplace").decode()  # a program may say what no file takes
    return Outcome(False, reason[:SHOWN], found.get("parsed", True))


@functools.cache
def why_no_wall() -> str:
    """Why this machine has no wall to run programs behind; empty if it has one."""
    try:
        with Keeper() as keeper:
            found = keeper.run(Program("def one(): return 1", "assert one() == 1"))
    except (NoWall, KeeperGone) as error:
        return str(error)
    return "" if found.passed else f"a first program did not run: {found.reason}"


def run_program(
    source: str, tests: str = "", *, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES, confined: bool = True
) -> Outcome:
    """Run one program, and its tests."""
    with Keeper(confined=confined) as keeper:
        return keeper.run(Program(source, tests), seconds=seconds, memory_bytes=memory_bytes)


def run_programs(
    programs: Sequence[Program], *, workers: int, seconds: float = SECONDS, confined: bool = True
) -> list[Outcome]:
    """The outcome of each, several run at a time, in their order.

    Raises NoWall if they are to be confined and cannot be.
    """
    count = max(1, min(workers, len(programs)))
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(count) as pool:
        keepers: queue.Queue[Keeper] = queue.Queue()
        for each in pool.map(lambda _: Keeper(confined=confined), range(count)):
            keepers.put(stack.enter_context(each))

        def run(program: Program) -> Outcome:
            keeper = keepers.get()
            try:
                return keeper.run(program, seconds=seconds)
            except KeeperGone as error:  # the others are run nevertheless
                keeper = stack.enter_context(Keeper(confined=confined))
                return Outcome(False, str(error))
            finally:
                keepers.put(keeper)

        return list(pool.map(run, programs))
