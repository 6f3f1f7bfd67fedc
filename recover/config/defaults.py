"""Values of a training that nobody gave: those that `recover init` writes, and those that `auto` stands for in `train`.

This is the one place for them, and for what a KL says of generation (`KEPT_...`). `init` takes the row of models of the
size of the dense one. Each row says where its figures come from (docs/results.md, which has the commands), and what was
not measured: whoever has newer figures changes the row, and its `source`.

A machine without a GPU is asked for less (`CPU_...`), so that a run takes minutes there: `run/affordable.py`.

`auto` follows from the model's width and from how much of it is pruned, each value with a reason. The rules are drawn
through three models (width 112, 576, 896) at one to three prunings each. Nothing of the machine enters, so a training
goes on with the same values elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recover.config.train import DenseText, GivenText, PrunedText, Train


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
    Training(10e6, 1e-3, 32, 8, 190_000, 0.157, "as the quickstart's 1.9M, which comes back to 100% of dense"),
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

MEASURED_ITEMS = 1500  # of each task
PROBED = 64  # prompts

# What a machine without a GPU is asked for: seconds that each part of a run may take, and FLOP/s of a core by which it
# is counted. Both are of SmolLM2-135M in float32 on two cores of a server, as `recover plan` timed it: 5.5 ms a token
# and candidate of a search (0.22 GFLOP), 6.8 ms a written token (0.27), 6.1 ms a trained one (0.78).
CPU_SECONDS = {"search": 480.0, "probe": 100.0, "train": 540.0, "measure": 480.0}
CPU_RATES = {"judging": 20e9, "writing": 20e9, "training": 60e9, "reading": 60e9}

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


# What a KL says of generation, of models that were trained after pruning: kept = exp(-KEPT_PER_NAT x KL x length), with
# KL in nats a token along the dense model's own texts, and length the mean tokens of its answers.
KEPT_PER_NAT, KEPT_SOURCE = (
    0.043,
    "48 recovered runs of two models (135M, answers of 33 tokens; 630M, of 266)",
)
KEPT_BAND = 0.1  # points on either side: 19 of 20 runs of prunings that the fit had not seen
KEPT_LENGTHS = (25.0, 350.0)  # mean tokens of an answer, a little beyond those that it was made on
KEPT_LEAST = 100e6  # parameters: a model of 1.9M kept 19% where this says 81%
KL_POWERS = (-0.29, -0.08)  # KL against tokens between budgets of one pruning, the steepest and the flattest of six
KL_TOKENS = 20e6  # the largest budget among them


def share_kept(kl: float, length: float) -> float:
    """Of dense generation, what trained models kept at such a KL (nats a token) where answers have so many tokens."""
    return math.exp(-KEPT_PER_NAT * kl * length)


def kl_of(share: float, length: float) -> float:
    """The KL, in nats a token, at which this share was kept."""
    return -math.log(share) / (KEPT_PER_NAT * length)


def tokens_for(kl: float, tokens: float, wanted: float) -> tuple[float, float]:
    """(fewest, most) tokens that bring KL down to `wanted` where it is `kl` after `tokens`, by the powers seen."""
    fewest, most = (math.exp(min(math.log(kl / wanted) / -power, 600.0)) for power in KL_POWERS)
    return tokens * fewest, tokens * most


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


ALPHA = 64.0  # 2 x rank at rank 32, with which most figures of docs/results.md were made
WIDE = 768  # width from which rank 64 was used, 32 below
SETTLED_TOKENS = (200_000, MOST_TOKENS)  # least and most that `auto` takes
SETTLED_STEPS = 400  # optimizer steps that a training should have at least, if smaller ones can give them
SETTLED_BATCHES = (32, 16, 8)  # rows a step that were tried
SETTLED_WARMUP = (20, 0.03, 0.1)  # steps, and the least and most share of all that they may be


@dataclass(frozen=True)
class Facts:
    """Of the dense model: `width` of its hidden states, `parameters`; and the share of these that pruning takes."""

    width: int
    parameters: int
    gone: float


@dataclass(frozen=True)
class Chosen:
    """What was taken for a field that is `auto`, and why, in words."""

    field: str
    value: Any
    why: str


def prior_rate(width: int, alpha: float) -> float:
    """The learning rate that models of this width took, for adapters of this alpha (not the scale, alpha / rank).

    An update of LoRA under Adam grows in its first steps as rate x alpha, whatever the rank. The products that did best
    were 0.064 (width 112), 0.06 to 0.13 (576) and 0.013 to 0.05 (896); wider models, of which there are no figures
    here, are taken to want less as a power of the width.
    """
    return min(0.0192 * (2000 / width) ** 0.76, 0.064) / alpha


def settled(cfg: Train, facts: Facts) -> tuple[Train, list[Chosen]]:
    """The config with every `auto` but that of `lr` replaced, and what was taken, in the order it was."""
    chosen: list[Chosen] = []

    def take(field: str, now: Any, value: Any, why: str) -> Any:
        if field not in cfg.auto:
            return now
        chosen.append(Chosen(field, value, why))
        return value

    tokens = take("tokens", cfg.tokens, *_tokens(facts))
    rows = tokens / row_tokens(cfg)
    batch = take("batch_size", cfg.batch_size, *_batch(rows, cfg))
    steps = max(1, round(rows / batch))
    warmup = take("warmup", cfg.warmup, *_warmup(steps))
    scheduler = take("scheduler", cfg.scheduler, SCHEDULER, "the fall to zero brought more than any other part of it")
    rank = take("lora.rank", cfg.lora.rank, *_rank(facts))
    alpha = take("lora.alpha", cfg.lora.alpha, ALPHA, "the same at every rank, so that one rate serves all")
    if not chosen:
        return cfg, []
    tree = cfg.model_dump(mode="json")
    values: Mapping[str, Any] = {"tokens": tokens, "batch_size": batch, "warmup": warmup, "scheduler": scheduler}
    return Train.model_validate({**tree, **values, "lora": {**tree["lora"], "rank": rank, "alpha": alpha}}), chosen


def _tokens(facts: Facts) -> tuple[int, str]:
    """One for each parameter that goes, in two digits."""
    gone = facts.gone * facts.parameters
    least, most = SETTLED_TOKENS
    value = min(max(gone, least), most)
    digits = 1 - math.floor(math.log10(value))
    limit = (
        f", at least {least:,}" if gone < least else f", at most {most:,}: more will bring more" if gone > most else ""
    )
    return int(round(value, digits)), f"one for each of {gone:,.0f} parameters that go{limit}"


def row_tokens(cfg: Train) -> float:
    """Scored tokens that a row may hold on average, guessed before any text is there: half of what it can hold."""
    shares = [source.share for source in cfg.data if isinstance(source, DenseText | PrunedText | GivenText)]
    longest = [
        min(cfg.length, source.max_new_tokens) if isinstance(source, DenseText | PrunedText) else cfg.length
        for source in cfg.data
    ]
    weights = shares if len(shares) == len(longest) else [1.0] * len(longest)
    rows = sum(weight / length for weight, length in zip(weights, longest, strict=True))
    return max(1.0, sum(weights) / rows / 2)


def _batch(rows: float, cfg: Train) -> tuple[int, str]:
    """The largest that gives enough steps; many small steps brought more than few large ones."""
    value = next((size for size in SETTLED_BATCHES if rows / size >= SETTLED_STEPS), SETTLED_BATCHES[-1])
    return (
        value,
        f"about {rows / value:,.0f} steps of it; below {SETTLED_STEPS} a smaller one learns more from the same text",
    )


def _warmup(steps: int) -> tuple[float, str]:
    number, least, most = SETTLED_WARMUP
    value = round(min(max(number / steps, least), most), 3)
    return value, f"about {value * steps:,.0f} of {steps:,} steps"


def _rank(facts: Facts) -> tuple[int, str]:
    value = 64 if facts.width >= WIDE else 32
    return (
        value,
        f"what models {'from' if value == 64 else 'below'} width {WIDE} were recovered with; this has {facts.width}",
    )
