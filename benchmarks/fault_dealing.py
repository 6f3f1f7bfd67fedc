"""Trials dealt out over processes: the same trials however many work on them, none begun after the time is up."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any

Trial = str | None  # what was wrong, or None
LONG_SECONDS = 8  # a hand that takes longer is dealt before all shorter ones
GRACE_SECONDS = 80  # for what was begun before the time was up


@dataclass(frozen=True)
class Hand:
    """Trials of one row that one worker does one after the other."""

    row: str
    numbers: tuple[int, ...]

    def draws(self) -> Iterator[tuple[int, random.Random]]:
        """Each trial's number and its own random numbers: the same whoever does it, after whatever."""
        for number in self.numbers:
            yield number, random.Random(f"{self.row} {number}")


@dataclass(frozen=True)
class Row:
    """A kind of fault. `inject(bench, hand)` yields what came of each trial of the hand, in order."""

    what: str
    inject: Callable[[Any, Hand], Iterator[Trial]]
    times: int
    seconds: float  # of a trial, about: what takes longest is dealt first
    hand: int = 1  # trials dealt together
    processes: int = 1  # that a trial keeps busy
    limit: float = 120  # seconds after which a trial hangs


def each(trial: Callable[[Any, int, random.Random], Trial]) -> Callable[[Any, Hand], Iterator[Trial]]:
    """A row's `inject`, for trials that stand alone: `trial(bench, number, random numbers)`."""

    def inject(bench: Any, hand: Hand) -> Iterator[Trial]:
        for number, draw in hand.draws():
            yield trial(bench, number, draw)

    return inject


@dataclass(frozen=True)
class Outcome:
    row: str
    number: int
    problem: Trial
    seconds: float
    measured: dict[str, float] = field(default_factory=dict)  # the largest of each is reported


def hands(rows: dict[str, Row], share: float = 1.0) -> list[Hand]:
    """What is dealt, in this order: what takes long first, so that it does not end last; then all rows in step.

    The hands of a row are shuffled. So where the time runs out, each row has tried about as large a part of its
    trials, drawn at random.
    """
    dealt: list[tuple[float, float, Hand]] = []
    for name, row in rows.items():
        draw = random.Random(name)
        numbers = sorted(draw.sample(range(row.times), min(row.times, max(1, round(row.times * share)))))
        parts = [tuple(numbers[at : at + row.hand]) for at in range(0, len(numbers), row.hand)]
        draw.shuffle(parts)
        seconds = row.seconds * row.processes * row.hand
        long = seconds if seconds > LONG_SECONDS else 0.0
        dealt += [(-long, at / len(parts), Hand(name, part)) for at, part in enumerate(parts)]
    return [hand for *_, hand in sorted(dealt, key=lambda one: one[:2])]


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Inside, TimeoutError after so long. Only in the main thread of a process."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"did not end within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcomes(bench: Any, row: Row, hand: Hand, until: float) -> Iterator[Outcome]:
    """Of each trial of the hand that begins before `until` (time.time()). One that raises is a failure."""
    left = hand.numbers
    while left:
        source = row.inject(bench, replace(hand, numbers=left))
        for at, number in enumerate(left):
            started = time.time()
            if started >= until:
                return
            try:
                with limited(min(row.limit, until + GRACE_SECONDS - started)):
                    problem, raised = next(source), False
            except Exception:
                problem, raised = f"trial {number}: {traceback.format_exc()}", True
            measured, bench.measured = bench.measured, {}
            yield Outcome(hand.row, number, problem, time.time() - started, measured)
            if raised:
                left = left[at + 1 :]
                break
        else:
            return


def worker(pipe: Connection, build: Callable[[int], Any], number: int, rows: dict[str, Row], until: float) -> None:
    """Do hand after hand; each outcome is sent, and None at the end of each hand, and when ready for the first."""
    bench = build(number)
    pipe.send(None)
    while (hand := pipe.recv()) is not None:
        for outcome in outcomes(bench, rows[hand.row], hand, until):
            pipe.send(outcome)
        pipe.send(None)


class Dealer:
    """Workers, forked from this process; each has a bench of its own, `build(number of the worker)`.

    Rows with several processes a trial count as many workers, so that no more than `jobs` are busy.
    """

    def __init__(self, build: Callable[[int], Any], rows: dict[str, Row], jobs: int, until: float) -> None:
        self.build, self.rows, self.jobs, self.until = build, rows, jobs, until
        self.busy: dict[Connection, Hand | None] = {}
        self.processes: dict[Connection, Any] = {}
        self.hired = 0

    def hire(self) -> None:
        forking: Any = multiprocessing.get_context("fork")
        ours, theirs = forking.Pipe()
        arguments = (theirs, self.build, self.hired, self.rows, self.until)
        process = forking.Process(target=worker, args=arguments)
        process.start()
        theirs.close()
        self.hired += 1
        self.processes[ours], self.busy[ours] = process, None

    def weight(self, hand: Hand) -> int:
        return min(self.jobs, self.rows[hand.row].processes)

    def pick(self, waiting: list[Hand]) -> Hand | None:
        """The first that there is room for; None also once the time is up."""
        free = self.jobs - sum(self.weight(hand) for hand in self.busy.values() if hand)
        if time.time() >= self.until:
            return None
        for at, hand in enumerate(waiting):
            if self.weight(hand) <= free:
                return waiting.pop(at)
        return None

    def deal(self, dealt: Sequence[Hand], keep: Callable[[Outcome], None]) -> None:
        """All of it, or what can be begun in time. A worker that dies fails its hand, and another one is hired."""
        waiting = list(dealt)
        for _ in range(min(self.jobs, len(waiting))):
            self.hire()
        idle: list[Connection] = []
        started: dict[Connection, set[int]] = {}
        while self.busy:
            ready: list[Any] = wait([pipe for pipe in self.busy if pipe not in idle], timeout=1)
            for pipe in ready:
                try:
                    outcome = pipe.recv()
                except EOFError:
                    waiting[:0] = self.bury(pipe, started.pop(pipe, set()), keep)
                    if waiting and self.hired < 3 * self.jobs:
                        self.hire()
                    continue
                if outcome is None:
                    self.busy[pipe] = None
                    idle.append(pipe)
                else:
                    started.setdefault(pipe, set()).add(outcome.number)
                    keep(outcome)
            for pipe in list(idle):
                hand = self.pick(waiting)
                if hand is not None:
                    idle.remove(pipe)
                    self.busy[pipe], started[pipe] = hand, set()
                    pipe.send(hand)
                elif not waiting or time.time() >= self.until:
                    idle.remove(pipe)
                    self.dismiss(pipe)

    def dismiss(self, pipe: Connection) -> None:
        pipe.send(None)
        self.processes.pop(pipe).join()
        del self.busy[pipe]

    def bury(self, pipe: Connection, done: set[int], keep: Callable[[Outcome], None]) -> list[Hand]:
        """What the worker was at when it died counts as failed; what was behind it in its hand is to be dealt again."""
        hand = self.busy.pop(pipe)
        process = self.processes.pop(pipe)
        process.join()
        if hand is None:
            raise RuntimeError(f"a worker ended with {process.exitcode} before its first trial")
        left = [number for number in hand.numbers if number not in done]
        for number in left[:1]:
            keep(Outcome(hand.row, number, f"trial {number}: its worker ended with {process.exitcode}", 0.0))
        return [Hand(hand.row, tuple(left[1:]))] if left[1:] else []
