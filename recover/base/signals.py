"""Stopping on request: a signal becomes an exception, so that every `finally` runs and what was done is kept.

In the middle of a training nothing is to be lost: the step is finished, a checkpoint is written, then it stops.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from recover.base.errors import RecoverError, StopRequested

# HUP: the terminal was closed; TERM: a scheduler or launcher asks; INT: control-C; USR1: a scheduler's warning ahead.
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))


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
