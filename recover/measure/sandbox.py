"""Runs programs that a model wrote, each in a process of its own that can do little and not for long.

Its limits are the operating system's: processor time, memory, size of files, open files, an empty folder to work in, no
environment, no packages but Python's own, killed with all its children when time is up; where Linux allows it, no
network, no view of other processes. An audit hook besides refuses sockets, other programs and writing elsewhere.
That stops accidents, not an attacker who knows Python: measure models that you trust no further on a machine apart.
"""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

SECONDS = 10.0
MEMORY_BYTES = 2**30
FILE_BYTES = 2**24
OPEN_FILES = 64
TAIL_BYTES = 4096
SHOWN = 300  # characters of what a failed program said

# From the tightest on; the first that this machine allows is taken.
ISOLATIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("no network, processes of its own", ("-r", "-n", "-p", "-f", "--kill-child", "--mount-proc")),
    ("no network", ("-r", "-n")),
)
NOT_ISOLATED = "network not cut off"

# Runs inside. The secret that says "ran to its end" is read before the program is, and a program that exits early
# never gets to print it.
INSIDE = """
import os, resource, sys
secret, seconds, memory, file_size, files = sys.stdin.readline().split()
home = os.getcwd() + os.sep
for kind, limit in (
    (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, file_size),
    (resource.RLIMIT_NOFILE, files), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, 0),
):
    resource.setrlimit(kind, (int(limit), int(limit)))
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
REFUSED = ("socket.", "subprocess.", "ctypes.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn",
           "os.kill", "os.link", "os.symlink", "os.chmod", "os.chown", "os.putenv", "pty.", "signal.pthread_kill")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.utime", "shutil.")

def guard(event, arguments):
    if event.startswith(REFUSED):
        raise PermissionError(event)
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
        inside(event, arguments[:1])
    elif event.startswith(CHANGES):
        inside(event, arguments[:2])

def inside(event, places):
    for place in places:
        if isinstance(place, (str, bytes)) and not (os.path.realpath(os.fsdecode(place)) + os.sep).startswith(home):
            raise PermissionError(f"{event} outside of the working folder")

out = sys.stdout
try:
    program = compile(open("program.py", encoding="utf-8").read(), "program.py", "exec")
except Exception:
    out.write("\\n" + secret + " does not parse")
    out.flush()
    raise
sys.addaudithook(guard)
exec(program, {"__name__": "__main__"})
out.write("\\n" + secret)
out.flush()
"""


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end without an error; else why not, in a line, and whether it is Python at all."""

    passed: bool
    reason: str = ""
    parsed: bool = True


@functools.cache
def isolation() -> tuple[str, tuple[str, ...]]:
    """(what programs are cut off from, the command that does it) on this machine."""
    unshare = shutil.which("unshare")
    for words, options in ISOLATIONS if unshare else ():
        command = (str(unshare), *options)
        if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            return words, command
    return NOT_ISOLATED, ()


def run_program(source: str, *, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> Outcome:
    """Run a program to its end or its limits; it passes if it ends by itself, without an exception or an exit."""
    secret = secrets.token_hex(16)
    limits = f"{secret} {int(seconds) + 1} {memory_bytes} {FILE_BYTES} {OPEN_FILES}\n"
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        # A lone surrogate, which a model may well write, is no UTF-8.
        (Path(folder) / "program.py").write_bytes(source.encode("utf-8", "replace"))
        process = subprocess.Popen(
            [*isolation()[1], sys.executable, "-I", "-S", "-c", INSIDE],
            stdin=subprocess.PIPE,
            stdout=out,  # a file, whose size is limited: a pipe would fill our own memory
            stderr=err,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            process.communicate(limits.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"not done in {seconds:g} s")
        finally:
            _kill(process)
        if process.returncode == 0 and _end_of(out).endswith(secret):
            return Outcome(True)
        said = _end_of(err).strip().splitlines()
        parsed = not _end_of(out).endswith(f"{secret} does not parse")
    return Outcome(False, said[-1][:SHOWN] if said else f"ended early, exit code {process.returncode}", parsed)


def _end_of(file: IO[bytes]) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - TAIL_BYTES))
    return file.read().decode(errors="replace")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process and all of its session; what has ended already is no error."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def run_programs(sources: Sequence[str], *, workers: int, seconds: float = SECONDS) -> list[Outcome]:
    """`run_program` of each, several at a time, in their order."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        return list(pool.map(lambda source: run_program(source, seconds=seconds), sources))
