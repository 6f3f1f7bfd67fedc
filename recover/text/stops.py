"""Strings that end a text, found while it is written: by a table that a GPU reads, token after token.

A text is cut by `cut`, on the text itself. The table only ends the writing in time: it follows, over the characters of
each token, how much of which string the text ends with (Knuth, Morris and Pratt, all strings at once). Where a
tokenizer writes a character in several tokens, a string with that character is not seen by the table: such a text goes
on to its end or limit, and is cut all the same. With `unless` (a code fence), a text that holds that before any of the
strings is neither ended nor cut by them.

Legend: V vocabulary, A states, B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from recover.base.errors import DataError
from recover.config.tasks import STOP_CHARACTERS

_pieces: WeakKeyDictionary[Any, dict[int, list[str]]] = WeakKeyDictionary()


class Stops:
    """How tokens lead from state to state; 0 is the beginning, `found` the state behind the end of a string."""

    def __init__(self, tokenizer: Any, strings: Sequence[str], vocabulary: int, *, unless: str | None = None) -> None:
        """`unless`: a text that holds this before any of the strings goes on; passed over where a string holds it.

        Raises DataError for an empty string, and for strings that are too long together.
        """
        if not all(strings) or sum(map(len, strings)) > STOP_CHARACTERS:
            raise DataError(
                f"stop: {len(strings)} strings of {sum(map(len, strings))} characters; expected at most "
                f"{STOP_CHARACTERS} characters together, and no empty string"
            )
        self.strings = tuple(strings)
        self.unless = None if unless is None or any(unless in each for each in strings) else unless
        self.table_AV = _table(self.strings, pieces(tokenizer, vocabulary), self.unless)
        self.found = len(self.table_AV) - 1

    def cut(self, text: str) -> str | None:
        """The text up to the first of the strings in it, None if it holds none, or `unless` before them."""
        free = -1 if self.unless is None else text.find(self.unless)
        bound = text if free < 0 else text[: free + len(self.unless or "")]
        places = [place for place in (bound.find(each) for each in self.strings) if place >= 0]
        return text[: min(places)] if places else None

    def ended(self, ids: Sequence[int]) -> list[int]:
        """The ids up to the one that ends the first string, as the table sees it; all of them if none does."""
        state = 0
        for place, token in enumerate(ids):
            state = int(self.table_AV[state, token])
            if state == self.found:
                return list(ids[: place + 1])
        return list(ids)

    def to(self, device: torch.device) -> Tensor:
        """The table, (A, V) of int16."""
        return torch.from_numpy(self.table_AV).to(device)


def pieces(tokenizer: Any, vocabulary: int) -> list[str]:
    """What each token adds to a text that goes on; nothing for special tokens and those that are none.

    Remembered: to decode each token of a large vocabulary takes seconds.
    """
    kept = _pieces.setdefault(tokenizer, {})
    if vocabulary not in kept:
        kept[vocabulary] = _decoded(tokenizer, vocabulary)
    return kept[vocabulary]


def _decoded(tokenizer: Any, vocabulary: int) -> list[str]:
    special, known = set(tokenizer.all_special_ids), len(tokenizer)
    # Behind another token: some tokenizers leave a space out at the beginning of a text.
    anchor = next(token for token in range(known) if token not in special and tokenizer.decode([token]).strip())
    before = tokenizer.decode([anchor])
    plain = [token for token in range(min(known, vocabulary)) if token not in special]
    found = [""] * vocabulary
    texts = tokenizer.batch_decode([[anchor, token] for token in plain], skip_special_tokens=True)
    for token, text in zip(plain, texts, strict=True):
        found[token] = text[len(before) :] if text.startswith(before) else ""
    return found


def _table(strings: Sequence[str], tokens: Sequence[str], unless: str | None) -> np.ndarray:
    """(A, V): the state behind a token, int16."""
    watched = [*strings, *([unless] if unless else [])]
    states = _prefixes(watched)
    number = {prefix: state for state, prefix in enumerate(states)}
    free, found = len(states), len(states) + 1  # neither is left again
    letters = {letter: index for index, letter in enumerate(sorted({each for text in watched for each in text}))}
    other = len(letters)  # every letter that is in no string
    by_letter = np.zeros((found + 1, other + 1), dtype=np.int16)
    by_letter[free], by_letter[found] = free, found
    for prefix, state in number.items():
        for letter, index in letters.items():
            text = prefix + letter
            if any(text.endswith(each) for each in strings):
                by_letter[state, index] = found
            elif unless and text.endswith(unless):
                by_letter[state, index] = free
            else:
                by_letter[state, index] = _longest_end(text, number)
    table_AV = np.tile(np.arange(found + 1, dtype=np.int16)[:, None], (1, len(tokens)))
    longest = max(map(len, tokens), default=0)
    letters_VL = np.full((len(tokens), longest), other, dtype=np.int16)
    lengths_V = np.array([len(token) for token in tokens])
    for index, token in enumerate(tokens):
        letters_VL[index, : len(token)] = [letters.get(letter, other) for letter in token]
    order = np.argsort(-lengths_V, kind="stable")
    for place in range(longest):
        here = order[: int((lengths_V > place).sum())]
        table_AV[:, here] = by_letter[table_AV[:, here], letters_VL[here, place][None]]
    return table_AV


def _prefixes(strings: Sequence[str]) -> list[str]:
    """Beginnings of the strings, the empty one first, none whole."""
    found = {text[:length] for text in strings for length in range(len(text))}
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def _longest_end(text: str, number: dict[str, int]) -> int:
    """The state of the longest end of this text that a string begins with."""
    return next(number[text[start:]] for start in range(len(text) + 1) if text[start:] in number)
