"""Stopping on request: a signal becomes an exception, so that every `finally` runs and what was done is kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from recover.base.errors import StopRequested

# HUP: the terminal was closed; TERM: a scheduler or launcher asks; INT: control-C; USR1: a scheduler's warning ahead.
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))


@contextmanager
def graceful_stop() -> Iterator[None]:
    """Inside, the first SIGINT, SIGTERM, SIGHUP or SIGUSR1 raises StopRequested in the main thread; a second one kills.

    The handlers of before are put back on exit. Does nothing outside the main thread, where Python takes no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPPING}

    def stop(number: int, _frame: FrameType | None) -> None:
        for each in STOPPING:
            signal.signal(each, signal.SIG_DFL)
        raise StopRequested(number)

    for number in STOPPING:
        if before[number] is not signal.SIG_IGN:  # nohup: what the caller ignores stays ignored
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: set by C code, which Python cannot put back
                signal.signal(number, handler)
