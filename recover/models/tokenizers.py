"""A tokenizer beside a model: whether its files are there, what they make of a text, which ids the embedding has.

Published models have tokens without a row: Gemma 3 1B names one for images, which no text gives. So a token is refused
when a text gives it, and not because it is there.

A chat template is a program that came with a model: what it writes has a bound in time, memory and size.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, tzinfo
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateSyntaxError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from recover.base import console
from recover.base.artifacts import loads
from recover.base.errors import DataError, ModelError
from recover.base.process import TooSlow, within

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Any of these holds a vocabulary; settings files alone do not.
FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken", "*vocab*", "*.py")

# A tokenizer.json is a program: its parts follow one another, and each may write more than it reads.
MOST_PARTS = 64
MOST_GROWTH = 256  # times as many characters as a text has
MOST_ADDED = 1024  # characters or tokens around a text
MOST_HOLES = 1_000_000  # ids below the largest without a token: whatever copies or saves a tokenizer counts up to it
MOST_EXTRA = 2**17  # tokens beside a vocabulary: each takes a library 0.2 ms; sounds as tokens are some 2^16
GROWS = {"ByteLevel": 2, "BertNormalizer": 3}  # Unicode's own forms grow once, to 18 at most, however often they come
STUBBORN = ("a", " ", "1", "ab ", "\n", "é", "<")  # repeated, with something else at the end: patterns backtrack there
LENGTHS, SLOW = (30, 300), 2.0  # repetitions; seconds of the processor for one of them

_rows: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # of the embedding that a tokenizer's ids are looked up in


def check_there(folder: Path) -> None:
    """Raise ModelError for a folder that holds no tokenizer: libraries name packages that would not help."""
    if not any(next(folder.glob(pattern), None) for pattern in FILES):
        raise ModelError(
            f"{folder}: holds no tokenizer (tokenizer.json or tokenizer.model): copy it there, or set model.tokenizer"
        )


def check_parts(folder: Path) -> None:
    """Look at the parts of a tokenizer.json before a library builds them.

    Raises ModelError: they could write a text of thousands of times the length, or there are more than any has; or ids
    lie so far apart, here or in a vocab.json, that counting up to them would take minutes and gigabytes; or more tokens
    stand beside the vocabulary than any has.
    """
    for name, key in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "added_tokens_decoder")):
        _check_extra(folder / name, _read(folder / name).get(key))
    _check_extra(folder / "added_tokens.json", _read(folder / "added_tokens.json"))
    _check_holes(folder / "vocab.json", _read(folder / "vocab.json"))
    path = folder / "tokenizer.json"
    found = _read(path)
    model = found.get("model")
    _check_holes(path, model.get("vocab") if isinstance(model, dict) else None)
    for place in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        parts = list(_parts(found.get(place)))
        growth = 1
        for part in parts:
            growth *= _growth(part)
        added = max((_added(part) for part in parts), default=0)
        for number, most, what in (
            (len(parts), MOST_PARTS, "parts"),
            (growth, MOST_GROWTH, "times the text"),
            (added, MOST_ADDED, "characters or tokens around a text"),
        ):
            if number > most:
                raise ModelError(
                    f"{path}: its {place} makes {number:,} {what}; expected at most {most:,}, as of any tokenizer that "
                    "is meant to be used: fetch the file again, or take another one"
                )


def _read(path: Path) -> dict[str, Any]:
    """What the file holds; nothing where it is not there, or no JSON object: the library says so."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_extra(path: Path, tokens: Any) -> None:
    """Raise ModelError where more tokens are added to a vocabulary than a library takes in half a minute."""
    if isinstance(tokens, list | dict) and len(tokens) > MOST_EXTRA:
        raise ModelError(
            f"{path}: adds {len(tokens):,} tokens to the vocabulary; expected at most {MOST_EXTRA:,}: fetch the file "
            "again, or take another one"
        )


def _check_holes(path: Path, vocabulary: Any) -> None:
    """Raise ModelError where the largest id of `vocabulary` (token -> id) is far above the number of its tokens."""
    ids = [index for index in vocabulary.values() if isinstance(index, int)] if isinstance(vocabulary, dict) else []
    if ids and (holes := max(ids) + 1 - len(ids)) > MOST_HOLES:
        raise ModelError(
            f"{path}: {len(ids):,} tokens have ids up to {max(ids):,}, which leaves {holes:,} ids without a token; "
            f"expected at most {MOST_HOLES:,}: fetch the file again, or take another one"
        )


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """The parts of a step, in their order; a sequence may hold sequences."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, list):
            left += reversed(part)
        elif isinstance(part, dict):
            yield part
            left += [part[key] for key in ("decoders", "processors", "pretokenizers", "normalizers") if key in part]


def _growth(part: dict[str, Any]) -> int:
    """How many characters may become of one."""
    kind = part.get("type")
    if kind == "Replace":
        pattern, content = part.get("pattern"), part.get("content")
        exact = pattern.get("String") if isinstance(pattern, dict) else None
        written = len(content) if isinstance(content, str) else 0
        return max(1, -(-written // len(exact)) if isinstance(exact, str) and exact else written + 1)
    if kind == "Precompiled":
        return max(1, _longest_of_map(part.get("precompiled_charsmap")))
    return GROWS.get(str(kind), 1)


def _longest_of_map(packed: Any) -> int:
    """The longest text that sentencepiece's map puts in a character's place: behind a trie, each ended by a zero."""
    try:
        data = base64.b64decode(packed)
    except (TypeError, ValueError, binascii.Error):
        return 1
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return max(map(len, texts.split(b"\0")), default=1)


def _added(part: dict[str, Any]) -> int:
    """Characters or tokens that a part puts before or behind a text."""
    lists = [part.get(key) for key in ("single", "pair")]
    special = part.get("special_tokens")
    for token in special.values() if isinstance(special, dict) else ():
        lists.append(token.get("ids") if isinstance(token, dict) else None)
    return max(
        len(each) for each in ("", part.get("prepend"), part.get("prefix"), *lists) if isinstance(each, str | list)
    )


def check_time(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise ModelError where a pattern of the tokenizer backtracks on some short text, and takes seconds."""
    for length in LENGTHS:
        for unit in STUBBORN:
            began = time.process_time()
            tokenizer(unit * length + "!", add_special_tokens=False, verbose=False)
            if time.process_time() - began > SLOW:
                raise ModelError(
                    f"{folder}: the tokenizer takes more than {SLOW:g} s for {len(unit) * length:,} characters: a "
                    "pattern in tokenizer.json backtracks; expected milliseconds. Fetch the file again, or take another"
                )


def fit(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Remember that ids from `rows` on have no place in the embedding; `refuse_past` then knows them.

    Raises ModelError where these are words, so that the tokenizer is another model's, or the end-of-text token, which
    could not be written. A padding token without a row is replaced: it is looked up, and never read.
    """
    _rows[tokenizer] = rows
    any_tokenizer: Any = tokenizer
    past = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
    added = any_tokenizer.get_added_vocab()
    words = [(index, token) for token, index in past.items() if token not in added]
    if words:
        index, token = max(words)
        raise ModelError(
            f"the tokenizer gives id {index} ({token!r}), the model's vocabulary ends at {rows - 1}: this tokenizer "
            "belongs to another model; check model.tokenizer"
        )
    if any_tokenizer.eos_token in past:
        raise ModelError(
            f"the end-of-text token {tokenizer.eos_token!r} has id {past[any_tokenizer.eos_token]}, and the model's "
            f"vocabulary ends at {rows - 1}, so that no text would end: set eos_token in tokenizer_config.json to a "
            "token that the model has"
        )
    if any_tokenizer.pad_token in past:
        console.warn(
            f"the padding token {tokenizer.pad_token!r} has id {past[any_tokenizer.pad_token]}, and the model's "
            f"vocabulary ends at {rows - 1}: {tokenizer.eos_token!r} is used in its place"
        )
        any_tokenizer.pad_token = any_tokenizer.eos_token


def check_ends(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Hold generation_config.json, where it is there, against tokenizer and vocabulary: when does a text end?

    Where it does not name the tokenizer's own end token, that is said: texts that are learnt end in it.

    Raises ModelError: it is no JSON object, or an end is no id of the model's.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    try:
        settings = loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}); fetch the file again, or take it away") from None
    found = settings.get("eos_token_id") if isinstance(settings, dict) else settings
    ends = [] if found is None else found if isinstance(found, list) else [found]
    wrong = [end for end in ends if not isinstance(end, int) or isinstance(end, bool) or not 0 <= end < rows]
    if wrong or not isinstance(settings, dict):
        shown = f"eos_token_id is {found!r:.60}" if isinstance(settings, dict) else f"found {settings!r:.60}"
        raise ModelError(f"{path}: {shown}; expected one id or a list of ids, each from 0 to {rows - 1}")
    own: Any = tokenizer.eos_token_id
    if ends and own not in ends:
        say_once(
            f"{path}: ends texts at {', '.join(map(str, ends))}, and the tokenizer's end token is "
            f"{tokenizer.eos_token!r} ({own}): a text ends at any of them here, and the export names them all"
        )


@cache
def say_once(text: str) -> None:
    """Warn of what each look at the folder would say again."""
    console.warn(text)


def refuse_past(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> None:
    """Raise DataError where a text gave an id that the embedding of the model has no row for."""
    rows = _rows.get(tokenizer)
    if rows is None or not ids or max(ids) < rows:
        return
    token: Any = tokenizer.convert_ids_to_tokens(max(ids))
    raise DataError(
        f"the text {text[:60]!r} gives the token {token!r} (id {max(ids)}), and the model's vocabulary ends at "
        f"{rows - 1}: take it out of the text or the chat template, or give the tokenizer of this model"
    )


SECONDS = 10.0  # templates take some tenths of a millisecond
MEMORY = 2**30  # bytes more than the process has
LONGEST = 2**16  # characters that a template may write around a message: tools and rules are some thousands
TIMES = 16  # characters that it may write for each of a message: JSON within JSON takes 12 for some
MOST_BITS = 2**16  # of a whole number that it computes: Python works on larger ones without end, and hears no signal
MOST_ITEMS = 10**6  # of lists within lists, each counted wherever it stands: to compare them is such a step too
TRIAL = "Olga carries 81 roses."
MEND = "mend chat_template.jinja (or chat_template in tokenizer_config.json), or take it away"


class FixedDay(datetime):
    """The day that templates get for `strftime_now`: that which Llama 3's take where nobody tells the date."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> FixedDay:
        """Noon of that day."""
        return cls(2024, 7, 26, 12, tzinfo=tz)


class Sandbox(ImmutableSandboxedEnvironment):
    """Where templates run: as transformers has it, with whole numbers and nested lists that have an end.

    A power of some digits keeps Python busy for years, in one step that no signal interrupts; where it is made of
    constants, already while the template is compiled. What is intercepted here is computed when it is rendered. A
    comparison of lists that hold one list twice, forty deep, is such a step too: they are counted where they are made.
    """

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tests = {**self.tests, "divisibleby": lambda value, by: self.call_binop(None, "%", value, by) == 0}
        self.filters = {**self.filters, Counting.FILTER: counted}

    def compile(self, source: Any, *args: Any, **kwargs: Any) -> Any:
        """With `Counting` in the template."""
        tree = self.parse(source) if isinstance(source, str) else source
        return super().compile(Counting(self).visit(tree), *args, **kwargs)

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        """As jinja has it; raises OverflowError as `counted`: `dict(...)` makes mappings too."""
        return counted(super().call(context, called, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """As Python has it; raises OverflowError for a whole number of more than `MOST_BITS` bits, and as `counted`."""
        return counted(self._binop(context, operator, left, right))

    def _binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        bits = [value.bit_length() for value in (left, right) if isinstance(value, int)]
        if operator == "**" and len(bits) == 2:
            bits.append(bits[0] * right)
        if max(bits, default=0) > MOST_BITS:
            raise OverflowError(f"a number of more than {MOST_BITS:,} bits")
        return super().call_binop(context, operator, left, right)


class Counting(NodeTransformer):
    """Has each list, tuple and mapping that a template makes, the arguments of a macro too, go through `counted`."""

    FILTER = "counted"
    MADE_BY_CALLS = ("varargs", "kwargs")

    def __init__(self, environment: Sandbox) -> None:
        self.environment = environment

    def visit_List(self, node: nodes.List) -> nodes.Filter:
        """Of `[a, b]`."""
        return self._counted(self.generic_visit(node))

    def visit_Dict(self, node: nodes.Dict) -> nodes.Filter:
        """Of `{a: b}`."""
        return self._counted(self.generic_visit(node))

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        """Of `(a, b)`, where it is no place to put values."""
        self.generic_visit(node)
        return self._counted(node) if node.ctx == "load" else node

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        """Of what a macro was called with beside its own arguments."""
        return self._counted(node) if node.ctx == "load" and node.name in self.MADE_BY_CALLS else node

    def _counted(self, node: Any) -> nodes.Filter:
        found = nodes.Filter(node, self.FILTER, [], [], None, None, lineno=node.lineno)
        found.environment = self.environment
        return found


def counted(value: Any) -> Any:
    """The value; raises OverflowError where it holds more than `MOST_ITEMS` items, nested ones counted each time."""
    if isinstance(value, list | tuple | dict) and _items(value, {}) > MOST_ITEMS:
        raise OverflowError(f"lists of more than {MOST_ITEMS:,} items, those within one another counted each time")
    return value


def _items(value: Any, known: dict[int, int]) -> int:
    """What stands in these lists, each looked into once."""
    if not isinstance(value, list | tuple | dict):
        return 1
    if id(value) not in known:
        known[id(value)] = 1  # of a list within itself
        inside = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_items(each, known) for each in inside)
    return known[id(value)]


@contextmanager
def bounded() -> Iterator[None]:
    """Inside, a template has little time and memory, and writes the date of one day.

    With today's, a run's prompts would differ from stage to stage. Raises TooSlow, MemoryError, OverflowError.
    """
    library: Any = chat_template_utils  # whose `strftime_now` asks its `datetime`
    before = library.datetime, library.ImmutableSandboxedEnvironment
    library.datetime, library.ImmutableSandboxedEnvironment = FixedDay, Sandbox
    try:
        with within(SECONDS), _little_memory():
            yield
    finally:
        library.datetime, library.ImmutableSandboxedEnvironment = before


def too_long(text: str, messages: Sequence[Any]) -> str | None:
    """What is wrong with the length of what a template wrote of these messages, in words, or None."""
    most = LONGEST + TIMES * len(str(messages))
    return f"writes {len(text):,} characters; expected at most {most:,}" if len(text) > most else None


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
    messages = [{"role": "user", "content": TRIAL}]
    try:
        with bounded():
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
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
    if (problem := too_long(str(text), messages)) is not None:
        raise ModelError(f"{where}: the chat template {problem}, for one short message; {MEND}")


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
