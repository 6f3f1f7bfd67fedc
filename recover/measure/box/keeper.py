"""The process that starts programs and their tests behind the wall, one pair at a time, and ends them in time.

It is told on a socket, which comes as its standard input: `ready?`, then jobs with their descriptors. It reads no
program and no test itself, so none of it lies in the memory that a program is a copy of.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from recover.measure.box import judge, wall

CONTROL = 0
LINK, SOURCE, VERDICT = 3, 4, 5  # descriptors of a program and of its tests; all others are closed
DESCRIPTORS = 64
PAUSE = 0.002  # seconds between looks at whether they have ended
ENDING = 1.0  # seconds between a program's last word and its end
# Imported before the wall goes up: what they need of the machine's libraries is then loaded.
LEFT_OUT = ("_test", "_xx", "xx", "_tkinter", "readline", "_curses", "_ctypes_test")
USUAL = ("typing", "re", "math", "collections", "itertools", "functools", "heapq", "bisect", "string", "copy", "random")


def prepare(walled: bool) -> bool:
    """Whether the keeper is root; behind the wall from here on, if there is to be one."""
    for path in Path(os.path.dirname(os.__file__)).glob("lib-dynload/*.so") if walled else ():
        if not path.name.startswith(LEFT_OUT):
            with contextlib.suppress(Exception):
                importlib.import_module(path.name.partition(".")[0])
    for name in USUAL:
        importlib.import_module(name)
    if not walled:
        return False
    root = wall.own_namespaces()
    keeper = os.fork()
    if keeper:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(keeper, 0)[1]) and 1)
    wall.die_with_parent()
    wall.enter(wall.own_packages())
    return root


def main() -> None:
    walled = sys.argv[1] == "walled"
    control = socket.socket(fileno=os.dup(CONTROL))
    try:
        root = prepare(walled)
    except Exception as error:
        control.send(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        return
    null = os.open(os.devnull, os.O_RDWR)  # the one behind the wall, which nobody can touch
    for each in (0, 1, 2):
        os.dup2(null, each)
    os.close(null)
    sys.orig_argv[:] = []
    gc.freeze()
    control.send(json.dumps({"root": root}).encode())
    while True:
        told, descriptors, _, _ = socket.recv_fds(control, 4096, 8)
        if not told:
            return
        try:
            ended = job(control, json.loads(told), descriptors, walled=walled, root=root)
        except Exception as error:
            ended = {"error": f"{type(error).__name__}: {error}"}
        control.send(json.dumps(ended).encode())


def job(control: socket.socket, limits: dict[str, Any], descriptors: list[int], *, walled: bool, root: bool) -> Any:
    """Run a program and its tests; gives the program's exit code, or None if time was up."""
    if walled:
        return _pair(control, limits, descriptors, root, None)
    folder = tempfile.mkdtemp()
    try:
        return _pair(control, limits, descriptors, root, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pair(
    control: socket.socket, limits: dict[str, Any], descriptors: list[int], root: bool, folder: str | None
) -> Any:
    """As `job`, without a wall if they are given a `folder` to work in."""
    seconds = limits.pop("seconds")
    source, theirs, test, ours, verdict = descriptors
    walled = folder is None

    def run_program() -> int:
        _keep({theirs: LINK, source: SOURCE}, folder)
        sys.argv = [""]
        return judge.serve(SOURCE, LINK)

    def run_tests() -> int:
        _keep({ours: LINK, test: SOURCE, verdict: VERDICT}, folder)
        return judge.run(SOURCE, LINK, VERDICT)

    children = [wall.spawn(each, walled=walled, root=root, limits=limits) for each in (run_program, run_tests)]
    for each in descriptors:
        os.close(each)
    codes: dict[int, int] = {}
    _wait(control, children, codes, children[1], seconds)
    if codes.get(children[1]) == judge.PROGRAM_ENDED:
        _wait(control, children, codes, children[0], ENDING)
    for child in children:
        _end(child, walled, child in codes)
    return {"late": children[1] not in codes, "code": codes.get(children[0])}


def _wait(control: socket.socket, children: list[int], codes: dict[int, int], last: int, seconds: float) -> None:
    """Until `last` has ended, or the side that is at `control`, or time is up; `codes` gets the exit codes."""
    until = time.monotonic() + seconds
    # Nothing is said on `control` meanwhile: what there is to read is its end.
    while last not in codes and time.monotonic() < until and not select.select([control], [], [], PAUSE)[0]:
        for child in set(children) - set(codes):
            number, status = os.waitpid(child, os.WNOHANG)
            if number:
                codes[child] = os.waitstatus_to_exitcode(status)


def _keep(places: dict[int, int], folder: str | None) -> None:
    """These descriptors at their places, the standard ones, and no other; work in `folder`."""
    os.chdir(folder or ".")
    high = {os.dup2(old, DESCRIPTORS // 2 + place): place for old, place in places.items()}
    for old, place in high.items():
        os.dup2(old, place)
    os.closerange(LINK + len(places), 4 * DESCRIPTORS)


def _end(child: int, walled: bool, ended: bool) -> None:
    if not walled:  # behind the wall it is the first of its namespace, which ends with it
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
