"""Stopping in the middle of training without losing it: finish the step, write a checkpoint, then stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from recover.base.errors import StopRequested
from recover.base.signals import STOPPING


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


@contextmanager
def stop_between_steps() -> Iterator[Stop]:
    """Inside, a stopping signal sets `requested` instead of raising; the handlers of before are put back on exit."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop.request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
