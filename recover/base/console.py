"""What a person sees: text and tables on stdout, warnings, errors and progress on stderr; main process only.

Sizes and durations in words come from here too, so that the plan, the console and the report say the same of one file.
"""

from __future__ import annotations

import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from logging import CRITICAL, LogRecord, getLogger
from typing import TYPE_CHECKING, Any, TypeVar

from recover.base import dist
from recover.base.errors import RecoverError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

SIZES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def size(count: float) -> str:
    """Bytes with three digits, in powers of 1000 as recipes and disks have them: `950 B`, `84.4 MB`, `3.09 GB`."""
    for unit, scale in SIZES:
        if abs(count) >= scale * 0.9995:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def perplexity(value: float) -> str:
    """A perplexity with two decimals below 100, so that 1.90 stands under 2.05: `1.90`, `15.41`, `153`, `12,400`."""
    return f"{value:.2f}" if value < 99.995 else f"{value:,.0f}" if value < 1e7 else f"{value:.1e}"


def duration(seconds: float) -> str:
    """Seconds in the two largest units: `0.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


Item = TypeVar("Item")

SILENT_SECONDS = 2.0  # shorter loops need no progress
LINE_SECONDS = 5.0  # on a pipe: no more lines than one in so many seconds
PIPE_WIDTH = 140  # columns where there is no terminal to ask

# C0 and C1 controls but tab and line end, lone surrogates, and marks of direction.
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
TAG = re.compile(r"(\\*)(\[[a-z#/@][^[]*?])")  # what rich takes for one of its own
TAGS = ("[dim]", "[/dim]", "[bold]", "[/bold]")  # that we write

_clock = time.monotonic
_shown: list[Progress] = []  # the one live display; loops inside loops add their bar to it
_muted = False  # inside `muted`


def _speaks() -> bool:
    return dist.is_main() and not _muted


@contextmanager
def muted() -> Iterator[None]:
    """Inside, nothing is printed: for a rehearsal, whose lines would be taken for those of the run."""
    global _muted
    before, _muted = _muted, True
    try:
        yield
    finally:
        _muted = before


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, emoji=False)
    if not console.is_terminal and console.width < PIPE_WIDTH:
        console.width = PIPE_WIDTH
    return console


def visible(text: str) -> str:
    """The text with control characters as `\\x1b`: a terminal would obey them. Line ends and tabs stay.

    Marks that turn the direction of writing are shown too, because text after them reads as something else.
    """
    return UNSAFE.sub(lambda found: _escaped(found[0]), text)


def _escaped(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def say(text: str) -> None:
    """Print text; `[dim]...[/dim]` and `[bold]...[/bold]` are styled, and all else in brackets stays as it is.

    A name of a file or a task may look like another tag of rich's: a colour, or a link to an address.
    """
    from rich.errors import MarkupError

    if not _speaks():
        return
    text = TAG.sub(lambda tag: tag[0] if tag[2] in TAGS else f"{tag[1] * 2}\\{tag[2]}", visible(text))
    try:
        _print(text, soft_wrap=True)
    except MarkupError:
        _print(text, soft_wrap=True, markup=False)


def _print(shown: Any, *, stderr: bool = False, **options: Any) -> None:
    """Raises RecoverError where what it is written to takes no more, such as a log on a full disk."""
    try:
        _console(stderr=stderr).print(shown, **options)
    except OSError as error:
        raise RecoverError(f"standard {'error' if stderr else 'output'}: cannot be written: {error.strerror}") from None


def heading(text: str) -> None:
    """Print a bold line with a blank one above it."""
    if _speaks():
        _print(f"\n{visible(text)}", style="bold", soft_wrap=True, markup=False)


def warn(text: str) -> None:
    """Print `warning: text` on stderr."""
    _label("warning", text, "yellow")


def error(text: str) -> None:
    """Print `error: text` on stderr, in one piece: no blank around it, no traceback."""
    _label("error", text, "red")


def _label(label: str, text: str, style: str) -> None:
    if _speaks():
        with suppress(RecoverError) if label == "error" else nullcontext():  # then the exit code says it
            _print(f"{label}: {visible(text)}", stderr=True, style=style, soft_wrap=True, markup=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table; numbers stand right and are rounded to four digits, None is a dash."""
    if not _speaks():
        return
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    body = [list(row) for row in rows]
    shown = Table(box=SIMPLE, pad_edge=False)
    for index, column in enumerate(columns):
        numeric = all(isinstance(row[index], int | float | None) for row in body)
        shown.add_column(Text(visible(column)), justify="right" if body and numeric else "left")
    for row in body:
        shown.add_row(*(Text(_cell(value)) for value in row))
    _print(Text(visible(title), style="bold"))  # a title of the table would break at its width
    _print(shown)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else visible(str(value))


def track(iterable: Iterable[Item], description: str, *, total: int | None = None, unit: str = "it") -> Iterator[Item]:
    """Yield every item, showing count, rate and time left once the loop has run for two seconds.

    A terminal gets a bar that is gone at the end, a pipe a plain line every five seconds at most and one at the end.
    `total` is the number of items where `iterable` has no length.
    """
    if not _speaks():
        yield from iterable
        return
    meter = _Meter(description, len(iterable) if total is None and hasattr(iterable, "__len__") else total, unit)  # type: ignore[arg-type]
    try:
        for item in iterable:
            yield item
            meter.advance()
    finally:
        meter.close()


class _Meter:
    """Counts one loop and decides when to show it."""

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        self.description, self.total, self.unit = visible(description), total, unit
        self.count = 0
        self.started = self.last_line = _clock()
        self.bar: tuple[Progress, Any] | None = None
        self.owner = False  # of the live display

    def advance(self) -> None:
        self.count += 1
        now = _clock()
        if now - self.started < SILENT_SECONDS:
            return
        if sys.stderr.isatty():
            self._draw()
        elif now - self.last_line >= LINE_SECONDS:
            self.last_line = now
            self._print_line(now)

    def close(self) -> None:
        now = _clock()
        if self.bar is not None:
            progress, task = self.bar
            progress.remove_task(task)
        if self.owner:
            _shown.pop().stop()
        if now - self.started >= SILENT_SECONDS:
            self._print_line(now, finished=True)

    def _draw(self) -> None:
        if self.bar is None:
            if not _shown:
                self.owner = True
                _shown.append(_live_display())
            task = _shown[0].add_task(self.description, total=self.total, unit=self.unit, rate="")
            self.bar = (_shown[0], task)
        progress, task = self.bar
        progress.update(task, completed=self.count, rate=self._rate(_clock()))

    def _rate(self, now: float) -> str:
        return f"{self.count / max(now - self.started, 1e-9):.3g} {self.unit}/s"

    def _print_line(self, now: float, *, finished: bool = False) -> None:
        elapsed = now - self.started
        of_total = "" if self.total is None else f"/{self.total}"
        line = f"{self.description}: {self.count}{of_total} {self.unit}, {self._rate(now)}"
        if finished:
            line += f", took {duration(elapsed)}"
        elif self.total is not None:
            line += f", {duration(elapsed / self.count * (self.total - self.count))} left"
        _print(line, stderr=True, soft_wrap=True, markup=False)


def _live_display() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]} {task.fields[rate]}"),
    )
    # stdout is redirected only if it is the same terminal: a redirected file must get its text.
    progress = Progress(
        *columns,
        TimeRemainingColumn(),
        console=_console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
    )
    progress.start()
    return progress


LOGGING = ("", "transformers", "huggingface_hub", "datasets", "accelerate", "peft")


def _made_visible(record: LogRecord) -> bool:
    """Let the record pass, as text without control characters."""
    record.msg, record.args = visible(record.getMessage()), None
    return True


@contextmanager
def silent(*libraries: str) -> Iterator[None]:
    """Inside, these libraries log nothing: what they have to say is raised or returned, and told by the caller."""
    loggers = [getLogger(name) for name in libraries]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def quiet_libraries() -> None:
    """Silence load bars, deprecations inside transformers, and DeepSpeed's notice that a machine has no GPU.

    What the libraries still say may quote a file of others: control characters in it are shown, as in our own lines.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|torch\.distributed)\.")
    for name in LOGGING:
        for handler in getLogger(name).handlers:
            if _made_visible not in handler.filters:
                handler.addFilter(_made_visible)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
