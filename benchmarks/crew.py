"""Several workers on one GPU: each a process that holds the model once, and does one piece of work after the other."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

Row = dict[str, Any]
GRACE_SECONDS = 5  # to end by itself


class Task(Protocol):
    """A piece of work, which can be sent to another process."""

    @property
    def key(self) -> Hashable:
        """What others may need."""
        ...

    @property
    def needs(self) -> set[Any]:
        """Keys of tasks that must be done before."""
        ...


class Bench(Protocol):
    """What a process does tasks with; built in it, from the options."""

    def do(self, task: Any) -> list[Row]:
        """The rows that come of the task."""
        ...


class Crew:
    """Workers, each with one task at a time; tasks whose needs are met go out in their order.

    `failed` says of each task that raised, or whose process ended, what happened; the others go on.
    """

    def __init__(self, bench: Callable[[argparse.Namespace], Bench], options: argparse.Namespace, tasks: Sequence[Any]):
        spawning: Any = multiprocessing.get_context("spawn")
        self.waiting: list[Any] = list(tasks)
        self.done: set[Hashable] = set()
        self.failed: list[str] = []
        self.workers: dict[Connection, Any] = {}
        self.busy: dict[Connection, Any] = {}  # None: still loading
        for number in range(min(options.jobs, len(tasks))):
            ours, theirs = spawning.Pipe()
            process = spawning.Process(target=worker, args=(theirs, bench, options, number))
            process.start()
            theirs.close()
            self.workers[ours], self.busy[ours] = process, None

    def run(self, seconds: float, keep: Callable[[Row], None]) -> None:
        """All tasks, or what of them is done within so many seconds; `keep` gets each row as it comes."""
        started = time.monotonic()
        try:
            while time.monotonic() - started < seconds:
                self._hand_out()
                if not self.busy:
                    break
                for row in self._collect(min(1.0, seconds)):
                    keep(row)
        finally:
            self._stop()
        print(f"{len(self.waiting) + len(self.busy)} tasks not done, {len(self.failed)} failed", flush=True)

    def _hand_out(self) -> None:
        for connection in [each for each in self.workers if each not in self.busy]:
            ready = next((task for task in self.waiting if task.needs <= self.done), None)
            if ready is None:
                return
            self.waiting.remove(ready)
            self.busy[connection] = ready
            connection.send(ready)

    def _collect(self, seconds: float) -> list[Row]:
        """Rows that came within so many seconds."""
        rows = []
        for each in wait(list(self.busy), seconds):
            connection: Any = each
            task = self.busy.pop(connection)
            try:
                found, error = connection.recv()
            except EOFError:
                process = self.workers.pop(connection)
                process.join(10)
                found, error = [], f"worker ended with exit code {process.exitcode}"
            rows += found
            if error is not None:
                self.failed.append(f"{task}: {error}")
                print(self.failed[-1], flush=True)
            elif task is not None:
                self.done.add(task.key)
        return rows

    def _stop(self) -> None:
        """A training that is asked to end does so between two steps, and its worker then finds that nobody listens."""
        for connection, process in self.workers.items():
            connection.close()
            process.terminate()
        until = time.monotonic() + GRACE_SECONDS
        for process in self.workers.values():
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


def worker(
    connection: Connection, bench: Callable[[argparse.Namespace], Bench], options: argparse.Namespace, number: int
) -> None:
    """A process: says that it is ready, does the tasks that it is sent, and sends back rows, or what went wrong."""
    log = (options.out / f"worker-{number}.log").open("a", buffering=1)
    sys.stdout = sys.stderr = log
    at_work = bench(options)
    connection.send(([], None))
    while (task := _next_of(connection)) is not None:
        started = time.monotonic()
        try:
            found: tuple[list[Row], str | None] = at_work.do(task), None
        except Exception as error:  # reported as the task's result; the next task may be another matter
            traceback.print_exc()
            found = [], f"{type(error).__name__}: {str(error)[:300]}"
        print(f"{task} took {time.monotonic() - started:.1f} s", flush=True)
        _clear()
        try:
            connection.send(found)
        except OSError:
            return


def _next_of(connection: Connection) -> Any:
    """The next task; None where nobody is left to send one."""
    try:
        return connection.recv()
    except (EOFError, OSError):
        return None


def _clear() -> None:
    """Give back what the task held: the others share the GPU."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
