"""A chat template is a program that came with a model: what it writes has a bound in time, memory and size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError
from transformers.utils import chat_template_utils

from recover.base.errors import ModelError
from recover.base.signals import TooSlow, within

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10.0  # templates take some tenths of a millisecond
MEMORY = 2**30  # bytes more than the process has
LONGEST = 2**16  # characters that a template may write around a message: tools and rules are some thousands
TRIAL = "Olga carries 81 roses."
MEND = "mend chat_template.jinja (or chat_template in tokenizer_config.json), or take it away"


class FixedDay(datetime):
    """The day that templates get for `strftime_now`: that which Llama 3's take where nobody tells the date."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> FixedDay:
        """Noon of that day."""
        return cls(2024, 7, 26, 12, tzinfo=tz)


@contextmanager
def fixed_day() -> Iterator[None]:
    """Inside, templates write the date of one day: with today's, a run's prompts would differ from stage to stage."""
    clock: Any = chat_template_utils  # whose `strftime_now` asks its `datetime`
    before, clock.datetime = clock.datetime, FixedDay
    try:
        yield
    finally:
        clock.datetime = before


def check_file(folder: Path) -> None:
    """Raise ModelError where a template's file is not text; by its name, which the library does not tell."""
    for path in sorted(folder.glob("*.jinja")):
        try:
            path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(
                f"{path}: cannot be read as UTF-8 text ({error}); save it as UTF-8, or take it away"
            ) from None


def check_template(tokenizer: PreTrainedTokenizerBase, where: object) -> None:
    """Render one short message with little time and memory.

    Raises ModelError: the template has an error of syntax, takes too long or too much, or writes without end. Whether
    it takes a certain kind of conversation is not looked at here.
    """
    if not isinstance(tokenizer.chat_template, str):
        return

    try:
        with within(SECONDS), _little_memory(), fixed_day():
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": TRIAL}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
    except TemplateSyntaxError as error:
        raise ModelError(f"{where}: chat template, line {error.lineno}: {_line(error)}; {MEND}") from None
    except TooSlow as error:
        raise ModelError(f"{where}: the chat template {error} for one short message; {MEND}") from None
    except (MemoryError, OverflowError) as error:
        raise ModelError(
            f"{where}: the chat template takes more than {MEMORY:,} bytes for one short message "
            f"({type(error).__name__} {_line(error)}); {MEND}"
        ) from None
    except Exception:
        return  # it refuses this conversation, as some do without a system prompt: said where one is rendered
    if len(str(text)) > LONGEST:
        raise ModelError(
            f"{where}: the chat template writes {len(str(text)):,} characters for one short message; expected at most "
            f"{LONGEST:,}; {MEND}"
        )


@contextmanager
def _little_memory() -> Iterator[None]:
    """Inside, this process gets little memory more, where the system can say how much it has."""
    import resource

    before: Any = None
    with suppress(OSError, ValueError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = [limit for limit in (soft, hard, used + MEMORY) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min(most), hard))
        before = (soft, hard)
    try:
        yield
    finally:
        if before is not None:
            resource.setrlimit(resource.RLIMIT_AS, before)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
