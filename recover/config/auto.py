"""What `auto` stands for in `train`: values from the model's size and how much of it is pruned, each with a reason.

They follow from docs/results.md: three models (width 112, 576, 896) at one to three prunings each. Nothing of the
machine enters, so a training goes on with the same values elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recover.config.train import DenseText, GivenText, PrunedText, Train

ALPHA = 64.0  # 2 x rank at rank 32, with which most figures of docs/results.md were made
WIDE = 768  # width from which rank 64 was used, 32 below
TOKENS = (200_000, 30_000_000)  # least and most that `auto` takes
STEPS = 400  # optimizer steps that a training should have at least, if smaller ones can give them
BATCHES = (32, 16, 8)  # rows a step that were tried
WARMUP = (20, 0.03, 0.1)  # steps, and the least and most share of all that they may be


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
    scheduler = take("scheduler", cfg.scheduler, "cosine", "the fall to zero brought more than any other part of it")
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
    least, most = TOKENS
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
    value = next((size for size in BATCHES if rows / size >= STEPS), BATCHES[-1])
    return value, f"about {rows / value:,.0f} steps of it; below {STEPS} a smaller one learns more from the same text"


def _warmup(steps: int) -> tuple[float, str]:
    number, least, most = WARMUP
    value = round(min(max(number / steps, least), most), 3)
    return value, f"about {value * steps:,.0f} of {steps:,} steps"


def _rank(facts: Facts) -> tuple[int, str]:
    value = 64 if facts.width >= WIDE else 32
    return (
        value,
        f"what models {'from' if value == 64 else 'below'} width {WIDE} were recovered with; this has {facts.width}",
    )
