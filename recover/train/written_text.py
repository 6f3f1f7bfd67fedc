"""Text that models write for a recovery, after prompts, round after round: the dense model's is saved as it is written.

train/data/dense-<fingerprint>.jsonl   a line for each chunk: its number, and [prompt, ids] of each text
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recover.base import console, dist
from recover.base.artifacts import append_jsonl, read_jsonl
from recover.base.errors import DataError
from recover.config.recipe import DenseText, PrunedText, Sampling, Train
from recover.text.generate import context_of, generate
from recover.text.prompts import Prompt, encode_prompt
from recover.text.read import Row
from recover.train.sources import Sample, read_prompts, say_left_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from recover.models.twin import Twin

CHUNK_BATCHES = 8  # batches that are written, and saved, at a time


class DenseWriter:
    """Text that the dense model writes from prompts, round after round, each round with other random draws."""

    def __init__(
        self, source: DenseText, cfg: Train, twin: Twin, tokenizer: PreTrainedTokenizerBase, seed: int, folder: Path
    ) -> None:
        self.source, self.cfg, self.twin, self.tokenizer, self.seed = source, cfg, twin, tokenizer, seed
        self.prompts = fitting_prompts(source, cfg.length, tokenizer, context_of(twin.model))
        self.path = folder / f"dense-{self._fingerprint()}.jsonl"

    def write(self, budget: int) -> list[Sample]:
        """Samples with at least `budget` scored tokens; what an earlier call saved is read, not written again."""
        samples: list[Sample] = []
        tokens = chunk = 0
        saved = self._saved()
        while tokens < budget:
            if self._exhausted(len(samples)):
                return repeated(samples, tokens, budget, self.source.prompts, self.cfg.loss.scored)
            if chunk < len(saved):
                rows = saved[chunk]["rows"]
            else:
                title = f"dense model writes ({tokens:,} of {budget:,} tokens)"
                rows = self._write_chunk(self._next_prompts(len(samples), tokens, budget), chunk, title)
            for row in rows:
                samples.append(self._sample(*row))
                tokens += samples[-1].scored(self.cfg.loss.scored)
                if tokens >= budget:
                    break  # a large batch may have written far more than was asked for
            chunk += 1
        return samples

    def first_batch(self) -> list[Sample]:
        """What `write` begins with."""
        saved = self._saved()
        rows = saved[0]["rows"] if saved else self._write_chunk(self._next_prompts(0, 0, 1), 0, "dense model writes")
        return [self._sample(*row) for row in rows]

    def _saved(self) -> list[Any]:
        return dist.on_main(lambda: read_jsonl(self.path) if self.path.exists() else [])

    def _exhausted(self, written: int) -> bool:
        """Greedy text is the same in every round, so there is only one."""
        return self.source.temperature == 0 and written >= len(self.prompts)

    def _next_prompts(self, written: int, tokens: int, budget: int) -> list[Row]:
        """The next prompts in the endless row of rounds: as many as the budget seems to need, a few batches at most."""
        size = self.source.batch_size
        if written:
            size = min(CHUNK_BATCHES * size, max(1, round((budget - tokens) * written / tokens)))
        chosen = in_rounds(self.prompts, written, size, self.seed)
        return chosen[: len(self.prompts) - written] if self.source.temperature == 0 else chosen

    def _write_chunk(self, prompts: list[Row], chunk: int, title: str) -> list[list[Any]]:
        """[prompt, ids] of each prompt, written by all processes together and saved by the main one."""
        texts = [row.value["prompt"] for row in prompts]
        with self.twin.dense() as dense:
            written = write_together(dense, self.tokenizer, texts, self.source, (self.seed, chunk), title)
        rows = [[text, ids] for text, ids in zip(texts, written, strict=True)]
        dist.on_main(lambda: append_jsonl(self.path, {"chunk": chunk, "rows": rows}))
        return rows

    def _sample(self, prompt: Prompt, ids: list[int]) -> Sample:
        """The ids that were generated, not their text tokenised again: the two often differ."""
        return answered(self._encode(prompt), ids).cut(self.cfg.length)

    def _encode(self, prompt: Prompt) -> list[int]:
        return encode_prompt(self.tokenizer, prompt, chat=self.source.chat)

    def _fingerprint(self) -> str:
        """Of all that the text depends on, the dense weights among it."""
        described = {
            "source": self.source.model_dump(
                mode="json", exclude={"share", "prompts", "subset", "split", "column", "strict"}
            ),
            "prompts": [self._encode(row.value["prompt"]) for row in self.prompts],
            "seed": self.seed,
            "weights": weights_fingerprint(self.twin),
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def repeated(samples: list[Sample], tokens: int, budget: int, name: str, scored: str) -> list[Sample]:
    """The samples again and again until `budget` scored tokens, with a warning if that is more than once."""
    if tokens < budget:
        console.warn(
            f"{name}: holds {tokens:,} tokens to learn, its share is {budget:,}: read {budget / tokens:.1f} times over"
        )
    once = len(samples)
    while tokens < budget:
        sample = samples[len(samples) % once]
        samples.append(sample)
        tokens += sample.scored(scored)
    return samples


def weights_fingerprint(twin: Twin) -> str:
    """Hash of names, shapes and some values of every dense weight: tells models apart without reading all of them."""
    digest = hashlib.sha256()
    for name, parameter in twin.base.named_parameters():
        if not parameter.requires_grad:
            some = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)].float().cpu()
            plain = name.replace(".base_layer", "").replace(".original_module", "")  # the same with adapters on it
            digest.update(f"{plain}{tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()


def fitting_prompts(
    source: DenseText | PrunedText, length: int, tokenizer: PreTrainedTokenizerBase, context: int | None = None
) -> list[Row]:
    """The source's prompts, each of which leaves room for an answer within `length` tokens.

    And for one of `source.max_new_tokens` within the model's `context`, where that is known. Rows without a prompt, or
    with one that is too long, are left out and counted; `source.strict` refuses them, and so do lengths that more than
    half of the prompts do not fit.

    Raises:
        DataError: the chat template cannot write a prompt, by file and line; or most are too long.
    """
    prompts: list[Row] = []
    too_long: list[str] = []
    rows = read_prompts(source.prompts, source.split, source.subset, column=source.column, strict=source.strict)
    for row in rows:
        try:
            found = len(encode_prompt(tokenizer, row.value["prompt"], chat=source.chat))
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from error
        if found >= length:
            too_long.append(
                f"{row.where}: the prompt has {found} tokens, which leaves none of train.length {length} for an "
                "answer: shorten it or raise train.length"
            )
        elif context is not None and found + source.max_new_tokens > context:
            too_long.append(
                f"{row.where}: the prompt has {found} tokens; with max_new_tokens {source.max_new_tokens} of the "
                f"source that exceeds the model's context of {context}: lower it, or shorten the prompt"
            )
        else:
            prompts.append(row)
            continue
        if source.strict:
            raise DataError(too_long[0])
    if len(too_long) > len(prompts):
        count = len(too_long) + len(prompts)
        raise DataError(f"{source.prompts}: {len(too_long):,} of {count:,} prompts are too long; {too_long[0]}")
    say_left_out(source.prompts, too_long)
    return prompts


def in_rounds(prompts: Sequence[Row], first: int, count: int, seed: int) -> list[Row]:
    """`count` prompts from number `first` on, of an endless row of rounds, each of all prompts in another order."""
    chosen: list[Row] = []
    while len(chosen) < count:
        turn, position = divmod(first + len(chosen), len(prompts))
        order = list(range(len(prompts)))
        random.Random(seed * 7919 + turn).shuffle(order)
        chosen += [prompts[index] for index in order[position : position + count - len(chosen)]]
    return chosen


def write_together(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    source: DenseText | PrunedText,
    seed: tuple[int, ...],
    title: str,
) -> list[list[int]]:
    """The ids that the model writes after each prompt, dealt out to all processes and gathered on each."""
    drawn = Sampling(temperature=source.temperature, top_p=source.top_p) if source.temperature else None
    mine = dist.everywhere(
        lambda: generate(
            model,
            tokenizer,
            dist.shard(prompts),
            max_new_tokens=source.max_new_tokens,
            batch_size=source.batch_size,
            sampling=drawn,
            seed=one_seed(*seed, dist.rank()),
            chat=source.chat,
            title=title,
        )
    )
    return dist.gather([generation.ids for generation in mine])


def answered(prompt_ids: list[int], ids: list[int]) -> Sample:
    """A prompt with what was written after it, which is learnt."""
    return Sample(prompt_ids + ids, [0] * len(prompt_ids) + [1] * len(ids))


def one_seed(*parts: int) -> int:
    """One seed out of several numbers, unlike for unlike numbers."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")
