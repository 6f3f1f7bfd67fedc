"""The file of a teacher that is not at hand: rows of text, and of each position that is learnt its top k. JSONL.

{"input_ids": [5, 9, 7], "completion_mask": [0, 1, 1], "top_ids": [[9, 4], [7, 2]],
 "top_logprobs": [[-0.1, -2.5], [-1.0, -1.5]], "tokenizer": {"vocabulary": "9f3c...", "splitting": "41d0...", ...}}

Ids mean nothing without their tokenizer, so a row carries its marks (`marks`), and who reads it holds them against the
pruned model's own.

Legend: N scored positions, K tokens known of each.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import torch
from torch import Tensor

from recover.base import console, dist
from recover.base.artifacts import sha256
from recover.base.errors import DataError
from recover.config.recipe import TeacherText
from recover.distill.loss_terms import TopK
from recover.text.read import file_rows, say_once
from recover.train.sources import Sample
from recover.train.state_cache import SHARD_BYTES, Key, StateCache, TextRow, pinned, row_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Marks = dict[str, str | None]

# Cut into tokens to know a tokenizer by: words, numbers, code, blanks, accents, signs of other scripts.
TEXT = (
    "The people of the small town came together in 1987, for $12,345.60 or more; they'd KNOWN it's re-done.\n\n"
    "def total(numbers, *, start=0):\n\treturn sum(n ** 2 for n in numbers)  # == start?\r\n    "
    "Zürich, naïve façade, Straße. Всё хорошо. 今日は良い天気です。 수고하셨습니다. नमस्ते مرحبا \U0001f600\u200d"
)
DIGITS, OWN_TOKENS = 12, 2000  # hex digits of a mark; tokens of the vocabulary that are cut again
PADDING = re.compile(r"\[PAD\d+\]")  # rows of a GGUF file that fill the vocabulary up to a round size
SLACK = 1e-2  # of a sum of probabilities over 1, as rounded log-probabilities give


@dataclass(frozen=True)
class TeacherRow:
    """A row of the file. `top`: of each token that is learnt, but a first one."""

    sample: Sample
    top: TopK

    def cut(self, length: int) -> TeacherRow:
        """The first `length` tokens."""
        sample = self.sample.cut(length)
        return TeacherRow(sample, self.top[slice(0, sample.scored("completion"))])

    @property
    def key(self) -> Key:
        """As `text_rows` has it."""
        positions = [index for index, learnt in enumerate(self.sample.mask[1:]) if learnt]
        return row_key(self.sample.ids, positions)


def marks(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """What tells a tokenizer from others: {vocabulary, splitting, bos, eos, template}.

    `vocabulary`: which token each id is. `splitting`: into which ids texts are cut, among them the tokens of the
    vocabulary, so that merges are known by what they do and not by how a file spells them. `template`: the chat
    template, None without one.
    """
    names = sorted((index, token) for token, index in tokenizer.get_vocab().items() if not PADDING.fullmatch(token))
    some = [index for index, _ in names][:: max(1, len(names) // OWN_TOKENS)]
    own = " ".join(str(tokenizer.decode([index])) for index in some)
    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in (TEXT, own)]
    bos, eos = (None if token is None else str(token) for token in (tokenizer.bos_token, tokenizer.eos_token))
    template = None if tokenizer.chat_template is None else _mark(tokenizer.chat_template)
    return {"vocabulary": _mark(names), "splitting": _mark(ids), "bos": bos, "eos": eos, "template": template}


def _mark(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:DIGITS]


def check_marks(where: str, found: Any, own: Marks) -> None:
    """Hold the marks of a row against those of the model's tokenizer.

    Another vocabulary or splitting is refused. Another end token, another chat template, or no marks are warned of.

    Raises:
        DataError: the ids mean other tokens; names `where`.
    """
    file = re.split(r":\d+$|, row \d+$", where)[0]
    if found is None:
        say_once(
            f"{file}: rows without the marks of their tokenizer, as an earlier version wrote them: whether their ids "
            "mean the tokens of this model is not checked; `recover teacher` writes a file that says it"
        )
        return
    if not isinstance(found, dict):
        what = type(found).__name__
        raise DataError(f"{where}: tokenizer: found {what}, expected the marks that `recover teacher` writes")
    for name, means in (("vocabulary", "an id is another token"), ("splitting", "text is cut into other tokens")):
        if found.get(name) != own[name]:
            raise DataError(
                f"{where}: made with another tokenizer: {name} {found.get(name)}, the model's has {own[name]}: "
                f"{means}. Write the file with a teacher that has the tokenizer of this model"
            )
    changed = [name for name in ("bos", "eos", "template") if name in found and found[name] != own[name]]
    if changed:
        theirs = "; ".join(f"{name} {found[name] or 'none'}, the model's {own[name] or 'none'}" for name in changed)
        say_once(
            f"{file}: written with the model's vocabulary, but another tokenizer file: {theirs}. What is learnt begins "
            "or ends unlike what is measured"
        )


def read_teacher(source: TeacherText, vocabulary: int, own: Marks | None = None) -> Iterator[TeacherRow]:
    """Rows of the file, one by one. `own`: the marks of the model's tokenizer; None: they are not looked at.

    Raises:
        DataError: the file cannot be read, or a row is not as it should be, by file and line.
    """
    width = None
    for found in file_rows(Path(source.source)):
        where, value = found.where, found.value
        row = _row(where, value, vocabulary)
        if own is not None:
            check_marks(where, value.get("tokenizer"), own)
        found = row.top.ids_NK.shape[1]
        if width is not None and len(row.top) and found != width:
            raise DataError(f"{where}: {found} tokens a position, the rows before have {width}: one k for all")
        width = found if len(row.top) else width
        yield row


def _row(where: str, value: Any, vocabulary: int) -> TeacherRow:
    try:
        ids = torch.tensor(value["input_ids"], dtype=torch.int64)
        mask = torch.tensor(value.get("completion_mask", [1] * len(ids)), dtype=torch.int64)
        ids_NK = torch.tensor(value["top_ids"], dtype=torch.int64)
        logp_NK = torch.tensor(value["top_logprobs"], dtype=torch.float32)
    except KeyError as error:
        raise DataError(f"{where}: no column {error}, expected input_ids, top_ids and top_logprobs") from None
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise DataError(f"{where}: expected lists of numbers of equal lengths ({error})") from None
    if ids.dim() != 1 or mask.dim() != 1 or not ids_NK.dim() or not logp_NK.dim():
        raise DataError(
            f"{where}: expected input_ids and completion_mask as lists of numbers, the others as lists of such lists"
        )
    if not len(ids_NK) and not len(logp_NK):
        ids_NK, logp_NK = ids_NK.reshape(0, 0), logp_NK.reshape(0, 0)
    problem = _problem(ids, mask, ids_NK, logp_NK, vocabulary)
    if problem:
        raise DataError(f"{where}: {problem}")
    return TeacherRow(Sample(ids.tolist(), mask.tolist()), TopK(ids_NK, logp_NK))


def _problem(ids: Tensor, mask: Tensor, ids_NK: Tensor, logp_NK: Tensor, vocabulary: int) -> str | None:
    for name, numbers in (("input_ids", ids), ("top_ids", ids_NK)):
        if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < vocabulary:
            return f"{name}: from {int(numbers.min())} to {int(numbers.max())}, the model has 0 to {vocabulary - 1}"
    if len(mask) != len(ids) or not set(mask.tolist()) <= {0, 1}:
        return f"completion_mask: expected {len(ids)} numbers, 0 or 1"
    count = int(mask[1:].sum())
    if ids_NK.dim() != 2 or ids_NK.shape != logp_NK.shape or len(ids_NK) != count:
        return (
            f"top_ids and top_logprobs have shapes {tuple(ids_NK.shape)} and {tuple(logp_NK.shape)}: expected one list "
            f"of k for each token that completion_mask marks, but a first one ({count})"
        )
    if len(ids_NK) and (ids_NK.sort(1).values.diff(dim=1) == 0).any():
        return "top_ids: a token stands twice in a position"
    if not bool((logp_NK <= SLACK).all()):
        return f"top_logprobs: found {float(logp_NK.max())}: natural logarithms of probabilities are at most 0"
    if len(ids_NK) and float(logp_NK.exp().sum(1).max()) > 1 + SLACK:
        return f"top_logprobs: the probabilities of a position add up to {float(logp_NK.exp().sum(1).max()):.4g}"
    return None


def check_teacher(source: TeacherText, vocabulary: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError if a row of the file is not as it should be, is of another tokenizer, or none is to be learnt."""
    rows = console.track(read_teacher(source, vocabulary, marks(tokenizer)), f"checking {source.source}", unit="rows")
    if not sum(row.sample.scored("completion") for row in rows):
        raise DataError(f"{source.source}: no row holds a token to learn")


def top_cache(source: TeacherText, folder: Path) -> StateCache:
    """Where the file's top k lie to be read in any order, checked shard by shard, below `folder`."""
    about = {"states": "a teacher's top k", "file": dist.on_main(lambda: sha256(Path(source.source)))}
    return StateCache(folder / "teacher", about)


def teacher_samples(
    source: TeacherText, length: int, vocabulary: int, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> list[Sample]:
    """The text of the file, cut to `length`; the top k go to `top_cache`. Rows with nothing to learn are left out.

    Raises:
        DataError: a row is not as it should be, by file and line. ArtifactError: the cache cannot be written.
    """
    own = marks(tokenizer)
    return dist.on_main(
        lambda: _take_in(source, length, read_teacher(source, vocabulary, own), top_cache(source, folder))
    )


def _take_in(source: TeacherText, length: int, rows: Iterator[TeacherRow], cache: StateCache) -> list[Sample]:
    samples: list[Sample] = []
    fresh: dict[Key, Tensor] = {}
    for row in console.track(rows, f"reading {source.source}", unit="rows"):
        row = row.cut(length)
        if not len(row.top):
            continue
        samples.append(row.sample)
        if row.key not in cache.where:
            fresh[row.key] = packed(row.top)
        if sum(value.nbytes for value in fresh.values()) >= SHARD_BYTES:
            cache.write(fresh)
            fresh = {}
    if fresh:
        cache.write(fresh)
    if not samples:
        raise DataError(f"{source.source}: no row holds a token to learn within train.length {length}")
    return samples


def packed(top: TopK) -> Tensor:
    """Token numbers and the bits of the log-probabilities side by side, int32 (N, 2 K)."""
    return torch.cat([top.ids_NK.int(), top.logp_NK.float().view(torch.int32)], dim=1)


def unpacked(value_N2K: Tensor) -> TopK:
    """What was packed."""
    ids_NK, bits_NK = value_N2K.chunk(2, dim=1)
    return TopK(ids_NK.contiguous(), bits_NK.contiguous().view(torch.float32))


class FileRow(TypedDict):
    """A line of a teacher's file: a text, and of each scored token the teacher's likeliest ones."""

    input_ids: list[int]
    completion_mask: list[int]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]
    tokenizer: NotRequired[Marks]


def file_row(row: TeacherRow, own: Marks | None = None) -> FileRow:
    """The row as the file has it; log-probabilities to six digits, none so low that JSON has no number for it.

    `own`: the marks of the teacher's tokenizer.
    """
    logp = [[float(f"{max(value, -1e4):.6g}") for value in values] for values in row.top.logp_NK.tolist()]
    found: FileRow = {
        "input_ids": row.sample.ids,
        "completion_mask": row.sample.mask,
        "top_ids": row.top.ids_NK.tolist(),
        "top_logprobs": logp,
    }
    if own is not None:
        found["tokenizer"] = own
    return found


class TeacherStates:
    """What a file says, for batches of its text in any order; `teacher_samples` has taken it in."""

    def __init__(self, source: TeacherText, folder: Path) -> None:
        self.cache = top_cache(source, folder)

    def read(self, rows: Sequence[TextRow]) -> TopK:
        """Of the scored positions of a batch of these rows, as `with_states` asks.

        Raises:
            ArtifactError: a shard is damaged or gone, or a row is not there.
        """
        top = unpacked(torch.cat(self.cache.read([row.dense for row in rows])))
        return TopK(pinned(top.ids_NK), pinned(top.logp_NK))
