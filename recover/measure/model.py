"""A model under measurement, in the view it is in: items are dealt out among all processes and gathered in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recover.base import dist
from recover.config.recipe import Measure, Sampling
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
