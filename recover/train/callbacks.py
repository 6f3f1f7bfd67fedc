"""Around optimizer steps: progress, a line of figures, checkpoints, and after each epoch what decides the best."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from recover.base import artifacts, console, dist
from recover.base.artifacts import read_json, write_json
from recover.base.errors import ArtifactError, TrainingError
from recover.config.recipe import StopEarly
from recover.report.run_files import EpochProgress, EpochScore
from recover.train.checkpoints import STEPS, best_of, publish_adapter
from recover.train.course import Totals, early_ends
from recover.train.trainer import RecoverTrainer

AfterEpoch = Callable[[int, EpochProgress], float | None]
LogStep = Callable[[int, dict[str, float]], None]


class Progress(TrainerCallback):
    """A line every few seconds: step, loss terms, rate, time left."""

    def __init__(self, totals: Totals) -> None:
        self.totals = totals
        self.done = self.first_tokens = 0
        self.started = self.last_line = 0.0

    def on_train_begin(self, args, state, control, **_: Any) -> None:
        self.done, self.first_tokens = 0, self.totals.tokens
        self.started = self.last_line = time.perf_counter()
        self.paused = self.totals.seconds

    def on_log(self, args, state, control, logs: dict[str, float] | None = None, **_: Any) -> None:
        now = time.perf_counter()
        if not logs or "loss" not in logs:
            return
        self.done += 1  # counted, as a step may be taken more than once
        if now - self.last_line < console.LINE_SECONDS:
            return
        self.last_line = now
        seconds = self.totals.elapsed() - self.paused
        left = seconds / self.done * (state.max_steps - state.global_step)
        rate = (self.totals.tokens - self.first_tokens) / seconds
        terms = ", ".join(f"{name} {logs[name]:.4g}" for name in ("loss", *self.totals.terms) if logs.get(name))
        if "variance_weight" in logs:
            terms += f", weight of variance {logs['variance_weight']:.4g}"
        console.say(
            f"step {state.global_step}/{state.max_steps}: {terms}, {rate:,.0f} tokens/s, {console.duration(left)} left"
        )


class StepLog(TrainerCallback):
    """Writes `steps.jsonl` of a training, each step once: one that is made again replaces all from there on.

    A line holds `step`, `tokens` scored and `seconds` trained up to it, `lr`, and, but for a skipped step, the means
    per token of the loss and its terms, `grad_norm` before clipping and the main process's `peak_memory_bytes` so far.
    `log_step` gets the step and its line too.
    """

    def __init__(self, folder: Path, totals: Totals, log_step: LogStep | None = None) -> None:
        self.path, self.totals, self.log_step = folder / STEPS, totals, log_step
        self.last: int | None = None  # of the file; None: not looked at yet

    def on_log(self, args, state, control, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not dist.is_main() or not logs or "learning_rate" not in logs:
            return
        if self.last is None or state.global_step <= self.last:
            self._rewind(state.global_step)
        self.last = state.global_step
        known = ("loss", *self.totals.terms, "grad_norm", "variance_weight")
        line = {
            "step": state.global_step,
            "tokens": self.totals.tokens,
            "seconds": round(self.totals.elapsed(), 4),
            "lr": logs["learning_rate"],
            **{name: logs[name] for name in known if name in logs},
        }
        if torch.cuda.is_available():
            line["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        # Not synced: waiting for the disk at each step would cost more than a line that a power loss takes.
        artifacts.append_jsonl(self.path, line, synced=False)
        if self.log_step is not None:
            self.log_step(state.global_step, line)

    def _rewind(self, step: int) -> None:
        """Leave only lines of steps before this one."""
        if not self.path.exists():
            return
        try:
            lines = [line for line in artifacts.read_jsonl(self.path) if line["step"] < step]
        except (ArtifactError, KeyError, TypeError) as error:
            console.warn(f"{self.path}: {error}; the training curve begins anew")
            lines = []
        artifacts.write_jsonl(self.path, lines)


class Epochs(TrainerCallback):
    """Saves what a resume needs, and after each epoch publishes the adapter, measures it, and keeps record of the best.

    The highest score wins, and the first of equal ones. Where the measurement gives no score, the lowest training
    loss wins. After a resume from an epoch's end that was not measured yet, it is measured before the first step.
    Where too many steps in a row were skipped, it goes back to a checkpoint, and the trainer starts over from there.
    """

    def __init__(
        self,
        *,
        folder: Path,
        ends: list[int],
        save_steps: int | None,
        patience: int | None,
        early: StopEarly | None,
        trainer: RecoverTrainer,
        after_epoch: AfterEpoch,
    ) -> None:
        self.folder, self.ends, self.save_steps, self.patience = folder, ends, save_steps, patience
        self.planned, self.early = ends, early
        self.trainer, self.after_epoch = trainer, after_epoch
        self.totals, self.skips, self.stop = trainer.course.totals, trainer.course.skips, trainer.stop
        self.records: list[EpochScore] = dist.on_main(self._read)

    def _read(self) -> list[EpochScore]:
        path = self.folder / "best.json"
        try:
            return read_json(path)["epochs"] if path.exists() else []
        except (ArtifactError, KeyError, TypeError) as error:
            console.warn(f"{path}: {error}; epochs measured before do not count")
            return []

    @property
    def best(self) -> EpochScore:
        """The record of the epoch to keep."""
        return best_of(self.records)

    def on_train_begin(self, args, state, control, model=None, **_: Any) -> Any:
        _check_adapter_dtype(model)
        state.max_steps = self.ends[-1]  # without the room for starting over
        self.trainer.resume()
        self.records = [record for record in self.records if record["step"] <= state.global_step]
        self._set_end(state, control)
        if state.global_step in self.ends[len(self.records) :]:
            self._end_epoch(state, control, model)
        self.totals.start_clock()
        return control

    def _set_end(self, state: Any, control: Any) -> None:
        """Where training ends: as planned, or earlier where the epochs so far call for that (`train.stop`)."""
        if self.early is None:
            return
        trainer = self.trainer
        scores = [record["score"] for record in self.records]
        before, self.ends = self.ends, early_ends(self.planned, scores, self.early, trainer.begin)
        state.max_steps = self.ends[-1]
        if self.ends == self.planned:
            trainer.fall(None)
            return
        if self.ends[-1] > self.ends[-2] and len(self.ends) > len(scores):
            trainer.fall(self.ends[-2], self.ends[-1])
        if self.ends != before:
            console.say(
                f"more tokens bring no more generation (train.stop): training ends at step {self.ends[-1]:,} instead "
                f"of {self.planned[-1]:,}"
            )
        control.should_training_stop = control.should_training_stop or state.global_step >= self.ends[-1]

    def on_step_end(self, args, state, control, **_: Any) -> Any:
        self.trainer.log_step()
        skips = self.skips
        self.trainer.average.add(state.global_step, skipped=skips.row > 0)
        if skips.too_many(last_step=state.global_step == self.ends[-1]):
            return self._start_over(state, control)
        due = self.save_steps is not None and state.global_step % self.save_steps == 0 and skips.row == 0
        control.should_save = due or state.global_step in self.ends or bool(self.stop.agreed)
        control.should_training_stop = control.should_training_stop or bool(self.stop.agreed)
        return control

    def _start_over(self, state: Any, control: Any) -> Any:
        self.totals.stop_clock()
        self.trainer.go_back()
        self.records = [record for record in self.records if record["step"] <= state.global_step]
        self._set_end(state, control)
        # The trainer's next epoch begins with the text of the step that is now the next one.
        control.should_epoch_stop, control.should_training_stop, control.should_save = True, False, False
        self.totals.start_clock()
        return control

    def on_save(self, args, state, control, model=None, **_: Any) -> Any:
        if state.global_step in self.ends and not self.stop.agreed:
            self._end_epoch(state, control, model)
        self.totals.start_clock()
        return control

    def _end_epoch(self, state: Any, control: Any, model: Any) -> None:
        with self.trainer.average.in_place():
            self._keep_epoch(state, control, model)

    def _keep_epoch(self, state: Any, control: Any, model: Any) -> None:
        epoch = self.ends.index(state.global_step) + 1
        publish_adapter(model, self.folder / f"epoch-{epoch}")
        means = self.totals.read_epoch()
        progress: EpochProgress = {
            "step": state.global_step,
            "tokens": self.totals.tokens,
            "seconds": self.totals.seconds,
            "skipped": self.skips.skipped,
            "rollbacks": self.skips.rollbacks,
            "peak_memory_bytes": self.trainer.peak_memory(),
            "train": {**means, "lr": self.totals.lr},
        }
        devices = [dist.device()] if torch.cuda.is_available() else []
        with self.stop.immediately(), torch.random.fork_rng(devices=devices), self.trainer.generating():
            score = dist.broadcast(self.after_epoch(epoch, progress))
        record: EpochScore = {
            "epoch": epoch,
            "step": state.global_step,
            "folder": f"epoch-{epoch}",
            "score": score,
            "loss": means["loss"],
        }
        self.records.append(record)
        self._write_best()
        kept = ("" if score is None else " (best so far)") if self.best is record else ""
        averaged = self.trainer.average.count
        kept += f"; mean of {averaged} steps' adapters" if averaged > 1 else ""
        if left_out := self.skips.skipped:
            kept += f"; {left_out:,} {'steps' if left_out > 1 else 'step'} left out up to here"
        shown = "generation not measured" if score is None else f"generation {score:.1%}"
        console.say(f"epoch {epoch}/{len(self.ends)}: loss {means['loss']:.4g}, kl {means['kl']:.4g}, {shown}{kept}")
        waited = epoch - self.best["epoch"]
        if self.patience is not None and waited >= self.patience and epoch < len(self.ends):
            console.say(f"no better generation for {waited} epochs (train.patience): stopping here")
            control.should_training_stop = True
        self._set_end(state, control)

    def _write_best(self) -> None:
        if dist.is_main():
            write_json(self.folder / "best.json", {**self.best, "epochs": self.records})


def _check_adapter_dtype(model: Any) -> None:
    found = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if found - {torch.float32}:
        raise TrainingError(
            f"the adapters were cast to {', '.join(sorted(map(str, found)))} by DeepSpeed's bf16 or fp16 mode, "
            "and small updates would be "
            "rounded away; set 'bf16': {'enabled': false} in its JSON (the model itself may well be bfloat16)"
        )
