"""How a process behaves beside others: it stops when it is asked to, and its threads wait asleep.

A signal becomes an exception, so that every `finally` runs and what was done is kept. In the middle of a training
nothing is to be lost: the step is finished, a checkpoint is written, then it stops.

OpenMP's threads wait by counting, for a while or for good, unless the user says otherwise. Where other programs use the
cores too, a thread that counts keeps the core from the very thread that it waits for: two threads then do a tenth of
what one does. Asleep they take what the others leave. On busy cores, and for small models, one thread may still be
faster than several: that is timed. The last bits of a sum depend on the number of threads, so a run keeps the one that
it began with.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from recover.base import console
from recover.base.errors import RecoverError, StopRequested

# HUP: the terminal was closed; TERM: a scheduler or launcher asks; INT: control-C; USR1: a scheduler's warning ahead.
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))

WAIT, ASLEEP = "OMP_WAIT_POLICY", "PASSIVE"
# Each tells an OpenMP library how long to count before it sleeps: the standard's name, GNU's, and LLVM's and Intel's.
WAITING = (WAIT, "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
ROWS = 128  # texts that are written at once
TURNS, SECONDS = 3, 1.0
CLEARLY = 1.2  # times faster: less is left to torch, so that the same machine gives the same bits
NUMBERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def graceful_stop() -> Iterator[None]:
    """Inside, the first SIGINT, SIGTERM, SIGHUP or SIGUSR1 raises StopRequested in the main thread; a second one kills.

    The handlers of before are put back on exit. Does nothing outside the main thread, where Python takes no handlers.
    """
    stop = Stop()
    stop.at_once = True
    with _handled_by(stop):
        yield


@contextmanager
def stop_between_steps() -> Iterator[Stop]:
    """Inside, a stopping signal sets `requested` instead of raising; the handlers of before are put back on exit."""
    stop = Stop()
    with _handled_by(stop):
        yield stop


@contextmanager
def _handled_by(stop: Stop) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup: what the caller ignores stays ignored
            signal.signal(number, stop.request)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: set by C code, which Python cannot put back
                signal.signal(number, handler)


class Interrupted(Exception):
    """Raised out of a step that was begun and has changed nothing yet; on every process at the same micro-step."""


class Stop:
    """`requested`: the number of the signal this process got, or 0; `agreed`: one that all processes know of, or 0.

    Only what is agreed may end the training, or one process would stop while another waits for it.
    """

    def __init__(self) -> None:
        self.requested = 0
        self.agreed = 0
        self.at_once = False

    def request(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler: the first signal asks, a second one kills."""
        for each in STOPPING:
            signal.signal(each, signal.SIG_DFL)
        self.requested = number
        if self.at_once:
            raise StopRequested(number)

    @contextmanager
    def immediately(self) -> Iterator[None]:
        """Inside, a request raises StopRequested at once: for work after a checkpoint that can simply be done again."""
        self.at_once = True
        try:
            yield
        finally:
            self.at_once = False


class TooSlow(RecoverError):
    """Something took longer than it may."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Inside, Python code that takes longer ends in TooSlow. In the main thread alone: others take no signals."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TooSlow(f"takes more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    left, every = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, every)
        signal.signal(signal.SIGALRM, before)


def wait_asleep() -> None:
    """Have threads wait asleep, here and in processes started later, if the environment says nothing about it.

    OpenMP reads the environment once, when it is loaded: to be called before torch is imported.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ[WAIT] = ASLEEP


def choose_threads(width: int, inner: int, before: int | None = None) -> None:
    """Set torch's number of threads on the CPU, and say which: `before`, or else the fastest of a second's timing.

    Timed are products of a block's sizes (`width`, `inner`). Another number than torch's own is taken where it is
    `CLEARLY` faster. What the environment says stays, and so does torch's number where a launcher started several
    processes, or a GPU does the work.
    """
    import torch

    own = torch.get_num_threads()
    given = any(os.environ.get(name) for name in NUMBERS)
    if given or own == 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1 or torch.cuda.is_available():
        return
    if before is not None:
        torch.set_num_threads(min(before, own))
        return
    rates = rates_of([1, *(2**power for power in range(1, own.bit_length()) if 2**power < own), own], width, inner)
    number = fastest(rates, own)
    torch.set_num_threads(number)
    shown = ", ".join(f"{each}: {rate / max(rates.values()):.0%}" for each, rate in rates.items())
    console.say(f"[dim]{number} of {own} threads of torch (speed by threads, {shown}; OMP_NUM_THREADS sets it)[/dim]")


def fastest(rates: dict[int, float], own: int) -> int:
    """The number of threads with the highest rate, or torch's `own` where that is about as good."""
    best = max(rates, key=lambda number: rates[number])
    return best if rates[best] > CLEARLY * rates[own] else own


def rates_of(numbers: list[int], width: int, inner: int) -> dict[int, float]:
    """Products a second with so many threads each: by turns, so that what else runs is the same for all; the median."""
    import torch

    x, up, down = torch.randn(ROWS, width), torch.randn(width, inner), torch.randn(inner, width)

    def once() -> None:
        torch.mm(torch.nn.functional.silu(torch.mm(x, up)), down)

    found: dict[int, list[float]] = {number: [] for number in numbers}
    for _ in range(TURNS):
        for number in numbers:
            torch.set_num_threads(number)
            once()  # brings up the threads
            began, done = time.perf_counter(), 0
            while (took := time.perf_counter() - began) < SECONDS / TURNS / len(numbers) or not done:
                once()
                done += 1
            found[number].append(done / took if took else float(done))
    return {number: statistics.median(rates) for number, rates in found.items()}


def described_threads() -> dict[str, str | int | None]:
    """For the record of a run: torch's threads (None: torch is not loaded), and what the environment says of them."""
    torch = sys.modules.get("torch")
    said = {name: os.environ[name] for name in (*NUMBERS, *WAITING) if name in os.environ}
    return {"number": None if torch is None else torch.get_num_threads(), **said}
