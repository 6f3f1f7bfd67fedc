"""What happened during recovery beside learning, in words: skipped steps, returns to a checkpoint, the repair."""

from __future__ import annotations

from typing import Any

from recover.report import words

MANY = 0.01  # share of steps skipped from which the reader is told to mend the recipe


def notes(data: dict[str, Any]) -> list[str]:
    """One sentence for each thing that went wrong and was dealt with; none if the training was in order."""
    training = data["training"] or {}
    skipped, rollbacks = training.get("skipped") or 0, training.get("rollbacks") or 0
    steps = data["epochs"][-1]["step"] if data["epochs"] else None
    found = []
    if skipped:
        of = f" of {steps:,}" if steps else ""
        text = f"{skipped:,}{of} training step{'s were' if skipped > 1 else ' was'} not finite and left out"
        if steps:
            text += f" ({words.percent(skipped / steps)})"
        advice = ": lower recover.lr, or train in float32 or bfloat16" if steps and skipped / steps >= MANY else ""
        found.append(f"{text}; {'they' if skipped > 1 else 'it'} changed no weight{advice}.")
    if rollbacks:
        times = "once" if rollbacks == 1 else f"{rollbacks} times"
        found.append(f"Training went back to a checkpoint {times}, because too many steps in a row were not finite.")
    if training and not training.get("finished", True) and data["epochs"]:
        found.append("Training is not finished: what is shown is as far as it came.")
    return found
