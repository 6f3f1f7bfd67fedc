"""A tokenizer beside a model: whether its files are there, and which of its ids have a row in the embedding.

Published models have tokens without a row: Gemma 3 1B names one for images, which no text gives. So a token is refused
when a text gives it, and not because it is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from recover.base import console
from recover.base.artifacts import loads
from recover.base.errors import DataError, ModelError

# Any of these holds a vocabulary; settings files alone do not.
FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken", "*vocab*", "*.py")

_rows: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # of the embedding that a tokenizer's ids are looked up in


def check_there(folder: Path) -> None:
    """Raise ModelError for a folder that holds no tokenizer: libraries name packages that would not help."""
    if not any(next(folder.glob(pattern), None) for pattern in FILES):
        raise ModelError(
            f"{folder}: holds no tokenizer (tokenizer.json or tokenizer.model): copy it there, or set model.tokenizer"
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
