"""Where a training stands: saved to a checkpoint, brought back from one, and set back to one when it went astray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recover.base import console, dist
from recover.base.errors import ArtifactError, TrainingError
from recover.train import draws
from recover.train.checkpoints import TRAINED, Checkpoints, note
from recover.train.optimizer_state import collect, put_back
from recover.train.skipping import ROLLBACKS, Skips, described, frozen_weights, gradients, not_finite
from recover.train.totals import Totals

if TYPE_CHECKING:
    from recover.train.trainer import RecoverTrainer


class Course:
    """Steps made, skipped and undone. Every process holds one, and all must call its methods."""

    def __init__(
        self, folder: Path, fingerprint: str, *, batch_size: int, seed: int, totals: Totals, past: dict[str, Any]
    ) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self.batch_size, self.seed = batch_size, seed
        self.totals, self.skips = totals, Skips()
        self.skips.restore(past, row=0)
        self.checkpoints = Checkpoints(folder, fingerprint, [part["fingerprint"] for part in past["parts"]])
        self.applied = 0  # optimizer steps that changed parameters
        self.draws: dict[str, Any] = {}  # where the generators stood when the step being made began
        self._coming_draws: dict[str, Any] | None = None
        self.trainer: Any = None

    def follow(self, trainer: RecoverTrainer) -> None:
        """From here on it is this trainer's."""
        self.trainer = trainer

    def begin_step(self) -> None:
        """To be called when a step's text has been fetched: fetching draws random numbers of its own."""
        if self._coming_draws is not None:
            draws.restore(self._coming_draws)
            self._coming_draws = None
        self.draws = draws.standing()

    def end_step(self, *, undone: bool) -> None:
        """The step being made changed the parameters; or, if something was found wrong with it, it did not.

        `undone`: the optimizer has not gone over the bad gradient; else the parameters are lost.
        """
        if self.skips.found is None:
            self.skips.proceed()
            self.totals.commit()
            self.applied += 1
            return
        step = self.trainer.state.global_step + 1
        if not undone:
            self.skips.found += ", and the optimizer went over it"
            self.skips.row = self.skips.allowed
        tensors = not_finite(gradients(self.trainer.model))
        console.warn(self.skips.skip(step, (self.batch_size * (step - 1) + 1, self.batch_size * step), tensors))
        self.skips.found = None
        self.totals.discard()
        note(self.folder, self.fingerprint, self.skips.to_json())

    def save(self, *, interrupted: bool = False) -> None:
        """Publish a checkpoint of this moment; if `interrupted` within a step, of the moment before that step.

        Raises:
            ArtifactError: it could not be written; checkpoints before it are as they were.
        """
        self.totals.stop_clock()
        trainer = self.trainer
        values = collect(trainer.model, trainer.optimizer, trainer.zero_engine, self.applied)
        values |= trainer.average.values() if dist.is_main() else {}
        standing = dist.gather([self.draws if interrupted else draws.standing()])
        state = {
            "processes": dist.world_size(),
            "threads": torch.get_num_threads(),
            "engine": trainer.engine,
            "applied": self.applied,
            "row": self.skips.row,
            "averaged": trainer.average.count,
            "totals": self.totals.to_json(),
            "draws": standing,
        }
        dist.on_main(lambda: self.checkpoints.save(trainer.state.global_step, values, state))

    def begin(self) -> None:
        """Go on from the newest checkpoint that verifies; where there is none, save what can be gone back to."""
        found = dist.on_main(self.checkpoints.newest)
        if found is None:
            self.save()
            self._coming_draws = draws.standing()
            return
        checkpoint, state = found
        self._restore(checkpoint, state)
        self.skips.row = state["row"]
        console.say(f"going on from {checkpoint.name}, {self.totals.tokens:,} tokens trained")

    def go_back(self) -> None:
        """Return to the newest checkpoint of a moment when all was in order.

        Raises:
            TrainingError: it would not help, or did not: which steps, which text, which tensors.
        """
        with self.trainer.generating():  # where they are whole
            frozen = not_finite(frozen_weights(self.trainer.model))
        found = dist.on_main(lambda: self.checkpoints.newest(good=True))
        if frozen or found is None or self.skips.rollbacks == ROLLBACKS:
            raise TrainingError(self._diagnosis(frozen, stranded=found is None))
        row, seconds = self.skips.row, self.totals.elapsed()
        self.skips.rollbacks += 1
        self.skips.row = 0
        self._restore(*found)
        self.totals.seconds = seconds
        note(self.folder, self.fingerprint, self.skips.to_json())
        console.warn(
            f"{row} steps in a row were skipped: back to {found[0].name} "
            f"({self.skips.rollbacks} of {ROLLBACKS} times; {self.skips.allowed} in a row are too many from here on)"
        )

    def _restore(self, checkpoint: Path, state: dict[str, Any]) -> None:
        from safetensors.torch import load_file

        trainer = self.trainer
        try:
            values = load_file(checkpoint / TRAINED)
            trainer.average.take(values, state["averaged"])
            put_back(trainer.model, trainer.optimizer, trainer.zero_engine, values, state["applied"])
        except ArtifactError as error:
            raise ArtifactError(f"{checkpoint / TRAINED}: {error}. Delete the folder and run the stage again") from None
        trainer.stand_at(state["step"])
        self.applied = state["applied"]
        self.totals.restore(state["totals"])
        self._say_other_threads(checkpoint, state.get("threads"))
        if state["processes"] == dist.world_size():
            self._coming_draws = state["draws"][dist.rank()]
            return
        console.say(
            f"{checkpoint.name} is of {state['processes']} processes, this is {dist.world_size()}: the text goes on in "
            "the same order; random draws (LoRA dropout) begin anew, and sums are rounded in another order"
        )
        draws.reseed(self.seed, state["step"], dist.rank())

    def _say_other_threads(self, checkpoint: Path, before: int | None) -> None:
        """`before`: threads a process, None where the checkpoint does not say."""
        here = torch.get_num_threads()
        if before not in (None, here) and self.trainer.args.device.type == "cpu":
            console.say(
                f"{checkpoint.name} was trained with {before} threads a process, this is {here}: sums are rounded in "
                f"another order. For the same bits, start with OMP_NUM_THREADS={before}"
            )

    def _diagnosis(self, frozen: list[str], *, stranded: bool) -> str:
        finding, cause = self.skips.findings[-1], "lower recover.lr, or use model.dtype float32 or bfloat16"
        if frozen:
            cause = f"these weights of the model itself are not finite: {', '.join(frozen)}; load it anew"
        elif stranded:
            cause = "no checkpoint that could be gone back to verifies; delete the folder and begin anew"
        return (
            f"step {finding['step']}: {described(finding)}. {self.skips.row} steps in a row were skipped, after "
            f"{self.skips.rollbacks} returns to a checkpoint (training.json lists them). What may help: {cause}"
        )
