"""A model under measurement, and what a kind of task does with it.

A model is measured in the view it is in: items are dealt out among all processes and gathered in order. What a task's
file may say is in `recover.config.tasks.TaskKind`; the rest of a kind is the one `WORK` of its module in `kinds/`,
which `work_of` finds by the kind's name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recover.base import dist
from recover.base.artifacts import JsonObject
from recover.config.recipe import Measure, Sampling
from recover.config.tasks import KINDS, Row
from recover.report.run_files import GreedyText
from recover.text.generate import Generation, generate
from recover.text.likelihood import Continuation, embeddings, log_likelihoods, option_log_likelihoods


@dataclass(frozen=True)
class ModelUnderTest:
    """A model in the view it is in, and how it is measured. An error on one process is raised on all."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    cfg: Measure
    seed: int = 0

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        sampling: Sampling | None,
        chat: bool | None,
        title: str,
        stop: Sequence[str] = (),
        unless: str | None = None,
    ) -> list[Generation]:
        """One text per prompt (`generate`), the same list on every process.

        Drawn texts follow the place of the prompt among all of them: the same prompt twice gives two texts.
        """
        return dist.over(
            list(enumerate(prompts)),
            lambda mine: generate(
                self.model,
                self.tokenizer,
                [prompt for _, prompt in mine],
                numbers=[number for number, _ in mine],
                max_new_tokens=max_new_tokens,
                batch_size=self.cfg.batch_size,
                sampling=sampling,
                seed=self.seed,
                chat=chat,
                stop=stop,
                unless=unless,
                title=title,
            ),
        )

    def score(self, rows: Sequence[Continuation], *, title: str) -> list[float]:
        """Log-likelihood of each row (`log_likelihoods`), the same list on every process."""
        size = self.cfg.batch_size
        return dist.over(rows, lambda mine: log_likelihoods(self.model, mine, batch_size=size, title=title))

    def score_options(self, groups: Sequence[Sequence[Continuation]], *, title: str) -> list[list[float]]:
        """Log-likelihood of each row of each group (`option_log_likelihoods`), the same list on every process."""
        size = self.cfg.batch_size
        return dist.over(groups, lambda mine: option_log_likelihoods(self.model, mine, batch_size=size, title=title))

    def embed(self, texts: Sequence[str], *, length: int, title: str) -> list[np.ndarray]:
        """One unit vector per text (`embeddings`), the same list on every process."""
        size = self.cfg.batch_size
        return dist.over(
            texts,
            lambda mine: embeddings(self.model, self.tokenizer, mine, length=length, batch_size=size, title=title),
        )


# Of one task: figures by the keys of the kind's `figures`, `kind`, `items`, `samples`; and `each`, the main figure of
# each item (perplexity: nats and tokens of each text), by which two models are compared item by item.
Record = JsonObject
Generations = dict[str, list[GreedyText]]  # task -> one per item


@dataclass(frozen=True)
class Measured:
    """The record of one task; of one that writes also its greedy texts, and the tokens written in all."""

    record: Record
    texts: Sequence[Generation] | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Work:
    """How items of a kind are made and measured. `file` is the kind's file model throughout.

    `make(file, row, where)`: one item; raises DataError, which names `where`. An item of a task that asks with a prompt
    is a dataclass with a `prompt`.
    `measure(model, file, items, reference)`: `reference` holds the dense model's greedy texts, or is None.
    `complete(file, item)`: what follows the prompt in a few-shot example; None: the task file has to say it.
    `together(items)`: what becomes of the items when all are read.
    `size(tokenizer, file, item)`: tokens of the item that the model reads before it writes; None: items are cut to fit.
    `pooled(records)`: the headline figure of several tasks of this kind, where the kind has one of its own.
    `asked(file, item)`: the text that tells an item from others; None: its prompt.
    """

    make: Callable[[Any, Row, str], Any]
    measure: Callable[[ModelUnderTest, Any, Sequence[Any], Generations | None], Measured]
    complete: Callable[[Any, Any], str] | None = None
    together: Callable[[Any, list[Any]], list[Any]] | None = None
    pooled: Callable[[Sequence[Record]], float] | None = None
    size: Callable[[Any, Any, Any], int] | None = None
    asked: Callable[[Any, Any], str] | None = None


def work_of(kind: str) -> Work:
    """The `WORK` of a kind that is registered."""
    found = importlib.import_module(KINDS[kind].work).WORK
    assert isinstance(found, Work)
    return found
