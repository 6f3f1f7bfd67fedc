"""The lines of `train/steps.jsonl` of a run that was never made: a loss that falls in scatter, as losses do."""

from __future__ import annotations

import math
import random
from typing import Any

TOKENS_A_STEP = 506  # about; as many as make the epochs of `report_run`


def steps(number: int = 396, *, skipped: tuple[int, ...] = (), tokens: float = TOKENS_A_STEP) -> list[dict[str, Any]]:
    """A line for each step; one of `skipped` scores nothing and has no loss."""
    rng = random.Random(5)
    lines, scored = [], 0
    for step in range(1, number + 1):
        line: dict[str, Any] = {
            "step": step,
            "tokens": scored,
            "seconds": 0.788 * step,
            "lr": 2e-4 * (1 - step / number),
        }
        if step not in skipped:
            scored += round(tokens * rng.uniform(0.8, 1.2))
            kl = (1.9 * math.exp(-4.2 * step / number) + 0.04) * math.exp(rng.gauss(0, 0.2))
            terms = {"loss": kl, "kl": kl, "variance": 0.4 * kl, "reverse_kl": 1.7 * kl, "ce": 1.2 + kl}
            line |= {"tokens": scored, **terms, "grad_norm": 2.5 * kl**0.5 * math.exp(rng.gauss(0, 0.3))}
        lines.append(line)
    return lines
