"""What to do about a step whose loss or gradient is not finite: skip it, go back, and in the end say why.

A skipped step changes no parameter and no moment of the optimizer. Every process must be told the same, so that all
decide alike: what is fed in here has been summed over processes before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from recover.base import dist, zero

SKIPS_IN_A_ROW = 8  # before going back to a checkpoint the first time; half as many after each time
ROLLBACKS = 3
NAMED = 4  # tensors, in a message
FINDINGS = 50  # kept in training.json, the newest


@dataclass
class Skips:
    """Counts of a training, and whether it is in order (`found` says what is wrong with the step being made)."""

    skipped: int = 0
    rollbacks: int = 0
    row: int = 0  # steps skipped one after another, up to now
    findings: list[dict[str, Any]] = field(default_factory=list)
    found: str | None = None

    @property
    def allowed(self) -> int:
        """So many in a row are too many."""
        return max(1, SKIPS_IN_A_ROW >> self.rollbacks)

    def skip(self, step: int, sequences: tuple[int, int], tensors: list[str]) -> str:
        """Count this step as skipped; the line to print."""
        self.skipped += 1
        self.row += 1
        first, last = sequences
        finding = {"step": step, "found": self.found, "sequences": [first, last], "tensors": tensors}
        self.findings = [*self.findings, finding][-FINDINGS:]
        return (
            f"step {step}: {described(finding)}; the step is skipped ({self.row} in a row, {self.allowed} are too many)"
        )

    def proceed(self) -> None:
        """The step being made is in order."""
        self.row = 0

    def too_many(self, *, last_step: bool) -> bool:
        """Whether to go back: nobody looks at the parameters that a last, skipped step would leave."""
        return self.row >= self.allowed or (last_step and self.row > 0)

    def to_json(self) -> dict[str, Any]:
        """For training.json, where the report finds it."""
        return {"skipped": self.skipped, "rollbacks": self.rollbacks, "findings": self.findings}

    def restore(self, value: dict[str, Any], row: int) -> None:
        """Go on counting from `to_json` and the row a checkpoint was written in; every start has all its rollbacks."""
        self.skipped, self.findings, self.row = value["skipped"], list(value["findings"]), row


def described(finding: dict[str, Any]) -> str:
    """`the loss is not finite (kl nan), sequences 8-15; not finite: gradient of ...`."""
    first, last = finding["sequences"]
    text = f"{finding['found']}, sequences {first:,}-{last:,} of the training text"
    return f"{text}; not finite: {', '.join(finding['tensors'])}" if finding["tensors"] else text


def not_finite(tensors: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity on any process, the first few; all processes must call it."""
    mine = [name for name, value in tensors if value is not None and not bool(value.isfinite().all())]
    seen = list(dict.fromkeys(dist.gather(mine[:NAMED] + [""] * (NAMED - len(mine[:NAMED])))))
    named = [name for name in seen if name]
    return [*named[:NAMED], "and more"] if len(named) > NAMED or len(mine) > NAMED else named


def gradients(model: nn.Module) -> list[tuple[str, Tensor | None]]:
    """Name and gradient of each trained parameter; None where DeepSpeed has taken it away already."""
    return [
        (f"gradient of {name}", parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def frozen_weights(model: nn.Module) -> list[tuple[str, Tensor | None]]:
    """Name and value of each parameter that is not trained; of ZeRO-3's, the share that lies on this process."""
    return [
        (name, zero.own_share(parameter)) for name, parameter in model.named_parameters() if not parameter.requires_grad
    ]
