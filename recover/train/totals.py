"""Sums of the loss terms over tokens, all processes together: for the log, for an epoch, and across a resume."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

TERMS = ("loss", "kl", "variance", "reverse_kl", "ce")
SUMS = (*TERMS, "focus", "tokens")  # of a micro-step
FOCUS_DECAY = 0.9  # a step: the mean that weights of `loss.focus` are divided by is that of the last 10 or so


@dataclasses.dataclass
class Totals:
    """`tokens` and `seconds` since the first step; `step` and `epoch`: sums since the last reading.

    Micro-steps wait until their optimizer step is made (`commit`) or skipped (`discard`).
    """

    tokens: int = 0
    seconds: float = 0.0
    step: dict[str, float] = dataclasses.field(default_factory=dict)
    epoch: dict[str, float] = dataclasses.field(default_factory=dict)
    focus: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0])  # running sums: of `focus`, of tokens
    waiting: list[dict[str, float]] = dataclasses.field(default_factory=list)
    lr: float | None = None  # of the last step
    clock: float | None = dataclasses.field(default=None, repr=False)

    def add(self, sums: dict[str, float]) -> None:
        """Count one micro-step, once its optimizer step is made; `sums` holds SUMS."""
        self.waiting.append(sums)

    def commit(self) -> None:
        """The optimizer step of the micro-steps added last is made."""
        made = [sum(sums[name] for sums in self.waiting) for name in ("focus", "tokens")]
        self.focus = [FOCUS_DECAY * before + now for before, now in zip(self.focus, made, strict=True)]
        for sums in self.waiting:
            for window in (self.step, self.epoch):
                for name, value in sums.items():
                    window[name] = window.get(name, 0.0) + value
            self.tokens += round(sums["tokens"])
        self.discard()

    def discard(self) -> None:
        """The optimizer step of the micro-steps added last was not made: they never were."""
        self.waiting = []

    def focus_mean(self) -> float | None:
        """Running mean per token of `focus`; None before the first step, and where it is 0."""
        focus, tokens = self.focus
        return focus / tokens if focus > 0 else None

    def start_clock(self) -> None:
        """Training goes on from here."""
        self.clock = time.perf_counter()

    def stop_clock(self) -> None:
        """What follows (saving, measuring) is no training time."""
        if self.clock is not None:
            self.seconds += time.perf_counter() - self.clock
        self.clock = None

    def elapsed(self) -> float:
        """Seconds of training up to now."""
        return self.seconds + (0.0 if self.clock is None else time.perf_counter() - self.clock)

    def read_step(self) -> dict[str, float]:
        """Means per token of each term since the last call."""
        means, self.step = _means(self.step), {}
        return means

    def read_epoch(self) -> dict[str, float]:
        """Means per token of each term over the epoch, which begins anew."""
        means, self.epoch = _means(self.epoch), {}
        return means

    def to_json(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {"tokens": self.tokens, "seconds": self.seconds, "epoch": self.epoch, "lr": self.lr, "focus": self.focus}

    def restore(self, value: dict[str, Any]) -> None:
        """Take over what `to_json` gave."""
        self.tokens, self.seconds, self.epoch = value["tokens"], value["seconds"], dict(value["epoch"])
        self.lr, self.step, self.focus = value["lr"], {}, list(value["focus"])
        self.discard()


def _means(sums: dict[str, float]) -> dict[str, float]:
    tokens = max(sums.get("tokens", 0.0), 1.0)
    return {name: sums.get(name, 0.0) / tokens for name in TERMS}
