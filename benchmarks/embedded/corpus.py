"""From texts to token rows: a small byte-level tokenizer, and packing of whole documents into rows of equal length.

A document is `<s> text </s>`. Documents are packed whole, so attention may look back into unrelated documents but no
document is cut; the model learns to ignore what stands before `<s>`.
"""

import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy
from generators import documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
CHUNK = 4096  # rows of one seed; results do not depend on the number of workers


def build_tokenizer(texts: Iterable[str], vocabulary: int, longest: int) -> PreTrainedTokenizerFast:
    """A stock fast tokenizer with single digits, which puts `<s>` in front as Llama tokenizers do."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[PAD, BOS, EOS],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write it under the class name that every version of transformers knows."""
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.pop("backend", None)
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def pack(sequences: Iterable[list[int]], length: int, pad: int, *, open_rows: int = 64) -> Iterator[list[int]]:
    """Rows of exactly `length`: each sequence goes whole into the fullest open row that has room."""
    rows: list[list[int]] = []
    for sequence in sequences:
        if len(sequence) > length:
            raise ValueError(f"pack: a document of {len(sequence)} tokens does not fit a row of {length}")
        room = max((row for row in rows if len(row) + len(sequence) <= length), key=len, default=None)
        if room is not None:
            room += sequence
        else:
            rows.append(list(sequence))
        if len(rows) > open_rows:
            rows.sort(key=len)
            yield rows[-1] + [pad] * (length - len(rows.pop()))
    for row in rows:
        yield row + [pad] * (length - len(row))


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Each text as `<s> text </s>`."""
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]


def _chunk(index: int, *, seed: int, length: int, folder: str, shares: dict[str, float]) -> numpy.ndarray:
    """`CHUNK` packed rows, a function of seed and index alone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    stream = documents(f"{seed}-{index}", **shares)

    def sequences() -> Iterator[list[int]]:
        while True:
            yield from encode(tokenizer, [prompt + rest for prompt, rest in islice(stream, 512)])

    rows = islice(pack(sequences(), length, tokenizer.pad_token_id), CHUNK)
    return numpy.array(list(rows), dtype=numpy.uint16)


def training_rows(
    count: int, *, seed: int, length: int, folder: str, shares: dict[str, float], workers: int
) -> Iterator[numpy.ndarray]:
    """Chunks of packed rows, at least `count` rows in all, written by `workers` processes while the caller trains."""
    chunk = partial(_chunk, seed=seed, length=length, folder=folder, shares=shares)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(chunk, range(-(-count // CHUNK)))
