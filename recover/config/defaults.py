"""The values that `recover init` writes, by the size of the dense model and by how much of it goes.

This is the one place for them. Each row says where its figures come from (docs/results.md, which has the commands), and
what was not measured: whoever has newer figures changes the row, and its `source`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Training:
    """How models of up to so many parameters are trained: `tokens` where `share` of the dense parameters went."""

    up_to: float
    lr: float
    rank: int
    batch_size: int
    tokens: int
    share: float
    source: str


TRAININGS = (
    Training(10e6, 2e-3, 32, 8, 190_000, 0.157, "as the quickstart's 1.9M, which comes back to 97.5% of dense"),
    Training(
        250e6, 1e-3, 32, 32, 1_200_000, 0.079, "as SmolLM2-135M's, which comes back to dense with 3 of 30 blocks gone"
    ),
    Training(
        math.inf, 2e-4, 64, 16, 3_000_000, 0.047, "as Qwen2.5-Coder-0.5B's, 62% of dense with 2 of 24 blocks gone"
    ),
)
MEASURED_UP_TO = 0.7e9  # parameters: what is larger was not measured, and takes the values of the last row
MOST_TOKENS = 30_000_000  # what is asked for without being asked


@dataclass(frozen=True)
class Zeros:
    """By how much `Training.tokens` is multiplied where up to this fraction of the weights becomes zero."""

    up_to: float
    times: int
    source: str


ZEROS = (
    Zeros(0.5, 1, "half of the weights gone, SmolLM2-135M came back to 87% on 1.2M tokens"),
    Zeros(1.0, 10, "ten times what brought half of the weights back to 87% (135M); not measured"),
)
PATTERN = Zeros(1.0, 10, "ten times; with 2:4, 300k tokens brought under 10% of generation (135M)")

EPOCHS, EPOCHS_SOURCE = 3, "generation is measured after each, and the best one kept"
WARMUP, WARMUP_SOURCE = 0.05, "of the steps; no other was compared"
SCHEDULER, SCHEDULER_SOURCE = "cosine", "falls to 0; no other was compared"
SCORED, SCORED_SOURCE = (
    "all",
    "prompts too: 58.5% of generation kept against 55.3%, and better perplexity (0.5B, 1M tokens)",
)
TEMPERATURE, TEMPERATURE_SOURCE = 0.7, "drawn text; greedy text kept 4 points less at 0.5B"
NEW_TOKENS, NEW_TOKENS_SOURCE = 512, "at 320, 27% of the dense model's solutions of GSM8K were cut"
MEASURED_TOKENS, MEASURED_TOKENS_SOURCE = 640, "so that few answers are cut; those that are, are counted"
PROMPT_TOKENS = 256  # room for a prompt beside the new tokens, in a sequence
ANSWER, ANSWER_SOURCE = (
    256,
    "tokens of the dense model's own answer: they only rank what goes, and each candidate reads all",
)
SAMPLES, SAMPLES_SOURCE = 48, "answers; as at 0.5B"
OWN_TEXT_SOURCE = (
    "prompts of the kind that must survive: chosen on own answers, 3 of 30 blocks came back 8 points further"
)

# Which way to prune, where only the amount is asked for.
SCORE, SCORE_SOURCE = "kl", "orders what goes by the generation that is left; angular and influence hardly do"
WIDTH = "12.5%"  # of the MLP neurons, where no amount is asked for
WIDTH_SCORE, WIDTH_SCORE_SOURCE = "obs", "those that the others make up for best; a third of fluctuation's KL (0.5B)"
WIDTH_REPAIR, WIDTH_REPAIR_SOURCE = (
    "linear",
    "without a step of training 9.2% fewer neurons kept 93% of generation, 75% by fluctuation as they were (0.5B)",
)
WIDTH_SAMPLES, WIDTH_SAMPLES_SOURCE = 192, "answers; least squares wants more text than a ranking does"
ALLOCATION, ALLOCATION_SOURCE = (
    "outliers",
    "8 points more generation than uniform at 50% (135M); owl was not compared there",
)
PATTERN_SOURCE = "sparsegpt was ahead of wanda with 2:4 (9.5% and 7.3% of generation, 135M)"


def training(parameters: int) -> Training:
    """The row for a dense model of this size."""
    return next(row for row in TRAININGS if parameters <= row.up_to)


def tokens(size: Training, share: float) -> tuple[int, str]:
    """Teacher-scored tokens where blocks or neurons go that are this share of the dense parameters, and why."""
    wanted = min(MOST_TOKENS, _two_digits(size.tokens * max(1.0, share / size.share)))
    if wanted == size.tokens:
        return wanted, f"{size.source} on these"
    most = ", and no more than this without being asked for" if wanted == MOST_TOKENS else ""
    return wanted, f"{size.tokens:,} where {size.share:.1%} of the parameters went, in proportion to {share:.1%}{most}"


def tokens_for_zeros(size: Training, fraction: float, *, pattern: bool) -> tuple[int, str]:
    """As `tokens`, where this fraction of the weights becomes zero, in an N:M pattern or anywhere."""
    row = PATTERN if pattern else next(row for row in ZEROS if fraction <= row.up_to)
    return min(MOST_TOKENS, size.tokens * row.times), row.source


def _two_digits(count: float) -> int:
    scale = 10 ** (len(str(round(count))) - 2)
    return round(count / scale) * scale
