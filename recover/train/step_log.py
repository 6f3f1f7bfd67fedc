"""A line for each optimizer step: what the training curve is drawn from, and what two trainings are compared by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from recover.base import artifacts, console, dist, strict_json
from recover.base.errors import ArtifactError
from recover.train.checkpoints import STEPS
from recover.train.totals import TERMS, Totals


class StepLog(TrainerCallback):
    """Writes `steps.jsonl` of a training, each step once: one that is made again replaces all from there on.

    A line holds `step`, `tokens` scored and `seconds` trained up to it, `lr`, and, but for a skipped step, the means
    per token of the loss and its terms, `grad_norm` before clipping and the main process's `peak_memory_bytes` so far.
    """

    def __init__(self, folder: Path, totals: Totals) -> None:
        self.path, self.totals = folder / STEPS, totals
        self.last: int | None = None  # of the file; None: not looked at yet

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not dist.is_main() or not logs or "learning_rate" not in logs:
            return
        if self.last is None or state.global_step <= self.last:
            self._rewind(state.global_step)
        self.last = state.global_step
        line = {
            "step": state.global_step,
            "tokens": self.totals.tokens,
            "seconds": round(self.totals.elapsed(), 4),
            "lr": logs["learning_rate"],
            **{name: logs[name] for name in (*TERMS, "grad_norm", "variance_weight") if name in logs},
        }
        if torch.cuda.is_available():
            line["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        # Not synced: waiting for the disk at each step would cost more than a line that a power loss takes.
        artifacts.append_jsonl(self.path, line, synced=False)

    def _rewind(self, step: int) -> None:
        """Leave only lines of steps before this one."""
        if not self.path.exists():
            return
        try:
            lines = [line for line in artifacts.read_jsonl(self.path) if line["step"] < step]
        except (ArtifactError, KeyError, TypeError) as error:
            console.warn(f"{self.path}: {error}; the training curve begins anew")
            lines = []
        artifacts.write_text(self.path, "".join(f"{strict_json.dumps(line)}\n" for line in lines))
