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
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from recover.measure.box import judge, program, wall

CONTROL, NULL = 0, 1
LINK, SOURCE, VERDICT = 3, 4, 5  # descriptors of a program and of its tests; all others are closed
DESCRIPTORS = 64
PAUSE = 0.002  # seconds between looks at whether they have ended
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
    os.dup2(NULL, CONTROL)
    gc.freeze()
    control.send(json.dumps({"root": root}).encode())
    while True:
        told, descriptors, _, _ = socket.recv_fds(control, 4096, 8)
        if not told:
            return
        control.send(json.dumps(job(control, json.loads(told), descriptors, walled=walled, root=root)).encode())


def job(control: socket.socket, limits: dict[str, Any], descriptors: list[int], *, walled: bool, root: bool) -> Any:
    """Run a program and its tests; gives the program's exit code, or None if time was up."""
    seconds = limits.pop("seconds")
    source, theirs, test, ours, verdict = descriptors

    def run_program() -> int:
        _keep({theirs: LINK, source: SOURCE})
        sys.argv = [""]
        return program.run(SOURCE, LINK)

    def run_tests() -> int:
        _keep({ours: LINK, test: SOURCE, verdict: VERDICT})
        return judge.run(SOURCE, LINK, VERDICT)

    until = time.monotonic() + seconds
    children = [wall.spawn(each, walled=walled, root=root, limits=limits) for each in (run_program, run_tests)]
    for each in descriptors:
        os.close(each)
    codes: dict[int, int] = {}
    gone = False
    while children[1] not in codes and not gone and time.monotonic() < until:
        gone = bool(select.select([control], [], [], PAUSE)[0])  # nothing is said meanwhile: the other side has ended
        for child in set(children) - set(codes):
            number, status = os.waitpid(child, os.WNOHANG)
            if number:
                codes[child] = os.waitstatus_to_exitcode(status)
    late = children[1] not in codes
    for child in children:
        if child not in codes:
            _end(child, walled)
    return {"late": late, "code": codes.get(children[0])}


def _keep(places: dict[int, int]) -> None:
    """These descriptors at their places, the standard ones, and no other."""
    high = {os.dup2(old, DESCRIPTORS // 2 + place): place for old, place in places.items()}
    for old, place in high.items():
        os.dup2(old, place)
    os.closerange(LINK + len(places), 4 * DESCRIPTORS)


def _end(child: int, walled: bool) -> None:
    with contextlib.suppress(ProcessLookupError):
        if walled:
            os.kill(child, signal.SIGKILL)
        else:
            os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)


if __name__ == "__main__":
    main()
