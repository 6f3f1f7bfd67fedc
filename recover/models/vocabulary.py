"""A tokenizer beside a model: whether its files are there, and which of its ids have a row in the embedding.

Published models have tokens without a row: Gemma 3 1B names one for images, which no text gives. So a token is refused
when a text gives it, and not because it is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from recover.base import console
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
