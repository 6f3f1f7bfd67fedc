"""Where a training stands: steps made, skipped and undone, ends of epochs, sums of the loss terms, random generators.

A step whose loss or gradient is not finite is skipped: it changes no parameter and no moment of the optimizer. After
too many in a row the training goes back to a checkpoint, and in the end it says why it cannot go on. Every process must
be told the same, so that all decide alike: what is fed in here has been summed over processes before.
"""

from __future__ import annotations

import base64
import hashlib
import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recover.base import console, dist, zero
from recover.base.errors import ArtifactError, TrainingError
from recover.config.recipe import StopEarly, Train
from recover.maths.divergence import all_finite
from recover.models.stored_weights import each_weight
from recover.report.run_files import Finding
from recover.train.checkpoints import (
    TRAINED,
    Checkpoints,
    CheckpointState,
    Draws,
    Part,
    Skipped,
    Standing,
    TotalsState,
    TrainingRecord,
    note,
)
from recover.train.optimizer_state import Trained

FOCUS_DECAY = 0.9  # a step: the mean that weights of `loss.focus` are divided by is that of the last 10 or so

SKIPS_IN_A_ROW = 8  # before going back to a checkpoint the first time; half as many after each time
ROLLBACKS = 3
NAMED = 4  # tensors, in a message
MEND = "lower train.lr, or use model.dtype float32 or bfloat16"
FINDINGS = 50  # kept in training.json, the newest


class Course:
    """Steps made, skipped and undone. Every process holds one, and all must call its methods."""

    def __init__(
        self, folder: Path, fingerprint: str, *, batch_size: int, seed: int, totals: Totals, past: TrainingRecord
    ) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self.batch_size, self.seed = batch_size, seed
        self.totals, self.skips = totals, Skips()
        self.skips.restore(past, row=0)
        self.checkpoints = Checkpoints(folder, fingerprint, [part["fingerprint"] for part in past["parts"]])
        self.applied = 0  # optimizer steps that changed parameters
        self.draws = draws_standing()  # where the generators stood when the step being made began
        self._coming_draws: Draws | None = None

    def begin_step(self) -> None:
        """To be called when a step's text has been fetched: fetching draws random numbers of its own."""
        if self._coming_draws is not None:
            restore_draws(self._coming_draws)
            self._coming_draws = None
        self.draws = draws_standing()

    def end_step(self, step: int, model: nn.Module, *, undone: bool) -> None:
        """Step `step` (from 1) changed the parameters; or, if something was found wrong with it, it did not.

        `undone`: the optimizer has not gone over the bad gradient; else the parameters are lost. `model`: of whose
        gradients those that are not finite are named.
        """
        if self.skips.found is None:
            self.skips.proceed()
            self.totals.commit()
            self.applied += 1
            return
        if not undone:
            self.skips.found += ", and the optimizer went over it"
            self.skips.row = self.skips.allowed
        tensors = not_finite(gradients(model))
        if line := self.skips.skip(step, (self.batch_size * (step - 1) + 1, self.batch_size * step), tensors):
            console.warn(line)
        self.skips.found = None
        self.totals.discard()
        note(self.folder, self.fingerprint, self.skips.to_json())

    def save(self, step: int, trained: Trained, *, interrupted: bool = False) -> None:
        """Publish a checkpoint of this moment, `step` steps made; if `interrupted`, of that before the step begun.

        Raises:
            ArtifactError: it could not be written; checkpoints before it are as they were.
        """
        self.totals.stop_clock()
        values = trained.values(self.applied)
        state: Standing = {
            "processes": dist.world_size(),
            "threads": torch.get_num_threads(),
            "engine": trained.engine_name,
            "applied": self.applied,
            "row": self.skips.row,
            "averaged": trained.average.count,
            "totals": self.totals.to_json(),
            "draws": dist.gather([self.draws if interrupted else draws_standing()]),
        }
        dist.on_main(lambda: self.checkpoints.save(step, values, state))

    def begin(self, step: int, trained: Trained) -> int:
        """Go on from the newest checkpoint that verifies; where there is none, save what can be gone back to.

        Returns how many steps are made.
        """
        found = dist.on_main(self.checkpoints.newest)
        if found is None:
            self.save(step, trained)
            self._coming_draws = draws_standing()
            return step
        checkpoint, state = found
        self._restore(checkpoint, state, trained)
        self.skips.row = state["row"]
        console.say(f"going on from {checkpoint.name}, {self.totals.tokens:,} tokens trained")
        return state["step"]

    def go_back(self, trained: Trained, frozen: list[str]) -> int:
        """Return to the newest checkpoint of a moment when all was in order; how many steps are made then.

        `frozen`: weights of the model itself that are not finite, as `not_finite` names them.

        Raises:
            TrainingError: it would not help, or did not: which steps, which text, which tensors.
        """
        found = dist.on_main(lambda: self.checkpoints.newest(good=True))
        if frozen or found is None or self.skips.rollbacks == ROLLBACKS:
            raise TrainingError(self._diagnosis(frozen, stranded=found is None))
        row, seconds = self.skips.row, self.totals.elapsed()
        self.skips.rollbacks += 1
        self.skips.row = 0
        self._restore(*found, trained)
        self.totals.seconds = seconds
        note(self.folder, self.fingerprint, self.skips.to_json())
        times = f"{self.skips.rollbacks} of {ROLLBACKS} times"
        console.say(f"{row} steps in a row were not finite: back to {found[0].name} ({times})")
        return found[1]["step"]

    def _restore(self, checkpoint: Path, state: CheckpointState, trained: Trained) -> None:
        try:
            trained.put_back(load_file(checkpoint / TRAINED), state["applied"], averaged=state["averaged"])
        except ArtifactError as error:
            raise ArtifactError(f"{checkpoint / TRAINED}: {error}. Delete the folder and run the stage again") from None
        self.applied = state["applied"]
        self.totals.restore(state["totals"])
        say_other_threads(checkpoint, state.get("threads"), trained.device)
        if state["processes"] == dist.world_size():
            self._coming_draws = state["draws"][dist.rank()]
            return
        console.say(
            f"{checkpoint.name} is of {state['processes']} processes, this is {dist.world_size()}: the text goes on in "
            "the same order; random draws (LoRA dropout) begin anew, and sums are rounded in another order"
        )
        reseed_draws(self.seed, state["step"], dist.rank())

    def _diagnosis(self, frozen: list[str], *, stranded: bool) -> str:
        finding, cause = self.skips.findings[-1], MEND
        if frozen:
            cause = f"these weights of the model itself are not finite: {', '.join(frozen)}; load it anew"
        elif stranded:
            cause = "no checkpoint that could be gone back to verifies; delete the folder and begin anew"
        return (
            f"step {finding['step']}: {described(finding)}. {self.skips.row} steps in a row were skipped, after "
            f"{self.skips.rollbacks} returns to a checkpoint (training.json lists them). What may help: {cause}"
        )


def say_other_threads(checkpoint: Path, before: int | None, device: torch.device) -> None:
    """Say that sums on a CPU may differ in the last bits. `before`: threads a process, None where it is not known."""
    here = torch.get_num_threads()
    if before not in (None, here) and device.type == "cpu":
        console.say(
            f"{checkpoint.name} was trained with {before} threads a process, this is {here}: sums are rounded in "
            f"another order. For the same bits, start with OMP_NUM_THREADS={before}"
        )


@dataclass
class Skips:
    """Counts of a training, and whether it is in order (`found` says what is wrong with the step being made)."""

    skipped: int = 0
    rollbacks: int = 0
    row: int = 0  # steps skipped one after another, up to now
    findings: list[Finding] = field(default_factory=list)
    found: str | None = None

    @property
    def allowed(self) -> int:
        """So many in a row are too many."""
        return max(1, SKIPS_IN_A_ROW >> self.rollbacks)

    def skip(self, step: int, sequences: tuple[int, int], tensors: list[str]) -> str:
        """Count this step as skipped; the line to print for the first of a training, empty for all others.

        training.json has the last ones with the tensors that were not finite.
        """
        self.skipped += 1
        self.row += 1
        first, last = sequences
        finding: Finding = {"step": step, "found": self.found or "", "sequences": [first, last], "tensors": tensors}
        self.findings = [*self.findings, finding][-FINDINGS:]
        if self.skipped > 1:
            return ""
        return f"step {step}: {self.found}; such steps change no weight, and are counted. If more follow: {MEND}"

    def proceed(self) -> None:
        """The step being made is in order."""
        self.row = 0

    def too_many(self, *, last_step: bool) -> bool:
        """Whether to go back: nobody looks at the parameters that a last, skipped step would leave."""
        return self.row >= self.allowed or (last_step and self.row > 0)

    def to_json(self) -> Skipped:
        """For training.json, where the report finds it."""
        return {"skipped": self.skipped, "rollbacks": self.rollbacks, "findings": self.findings}

    def restore(self, value: Skipped, row: int) -> None:
        """Go on counting from `to_json` and the row a checkpoint was written in; every start has all its rollbacks."""
        self.skipped, self.findings, self.row = value["skipped"], list(value["findings"]), row


@dataclass
class Totals:
    """`tokens` and `seconds` since the first step; `step` and `epoch`: sums since the last reading.

    `terms`: of the loss, whose means are read beside its own. Micro-steps wait until their optimizer step is made
    (`commit`) or skipped (`discard`).
    """

    terms: tuple[str, ...]
    tokens: int = 0
    seconds: float = 0.0
    step: dict[str, float] = field(default_factory=dict)
    epoch: dict[str, float] = field(default_factory=dict)
    focus: list[float] = field(default_factory=lambda: [0.0, 0.0])  # running sums: of `focus`, of tokens
    waiting: list[dict[str, float]] = field(default_factory=list)
    lr: float | None = None  # of the last step
    clock: float | None = field(default=None, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sums of a micro-step."""
        return ("loss", *self.terms, "focus", "tokens")

    def add(self, sums: dict[str, float]) -> None:
        """Count one micro-step, once its optimizer step is made; `sums` holds `names`."""
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
        means, self.step = self._means(self.step), {}
        return means

    def read_epoch(self) -> dict[str, float]:
        """Means per token of each term over the epoch, which begins anew."""
        means, self.epoch = self._means(self.epoch), {}
        return means

    def to_json(self) -> TotalsState:
        """What a resumed run goes on from."""
        return {"tokens": self.tokens, "seconds": self.seconds, "epoch": self.epoch, "lr": self.lr, "focus": self.focus}

    def restore(self, value: TotalsState) -> None:
        """Take over what `to_json` gave."""
        self.tokens, self.seconds, self.epoch = value["tokens"], value["seconds"], dict(value["epoch"])
        self.lr, self.step, self.focus = value["lr"], {}, list(value["focus"])
        self.discard()

    def _means(self, sums: dict[str, float]) -> dict[str, float]:
        tokens = max(sums.get("tokens", 0.0), 1.0)
        return {name: sums.get(name, 0.0) / tokens for name in ("loss", *self.terms)}


def described(finding: Finding) -> str:
    """`the loss is not finite (kl nan), sequences 8-15; not finite: gradient of ...`."""
    first, last = finding["sequences"]
    text = f"{finding['found']}, sequences {first:,}-{last:,} of the training text"
    return f"{text}; not finite: {', '.join(finding['tensors'])}" if finding["tensors"] else text


def not_finite(tensors: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity on any process, the first few; all processes must call it."""
    mine = [name for name, value in tensors if value is not None and not all_finite(value)]
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


def frozen_weights(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Name and value of each parameter that is not trained; of ZeRO-3's, the share that lies on this process.

    A value may be there only until the next one is asked for.
    """
    for name, parameter in each_weight(model):
        if not parameter.requires_grad:
            yield name, zero.own_share(parameter)


def draws_standing() -> Draws:
    """The state of this process's generators: Python's, numpy's, torch's, and that of its GPU."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    state: Draws = {
        "python": [version, list(internal), gauss],
        "numpy": [name, _text(np.asarray(keys).tobytes()), int(position), int(has_gauss), float(cached)],
        "torch": _text(torch.get_rng_state().numpy().tobytes()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _text(torch.cuda.get_rng_state().numpy().tobytes())
    return state


def restore_draws(state: Draws) -> None:
    """Put this process's generators where `draws_standing` found them."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.frombuffer(base64.b64decode(keys), dtype=np.uint32), *rest))
    torch.set_rng_state(_tensor(state["torch"]))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def reseed_draws(*what: int) -> None:
    """Begin generators anew from these numbers, where no process stood in this one's place before."""
    digest = hashlib.sha256(repr(what).encode()).digest()
    seed = int.from_bytes(digest[:4], "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def epoch_ends(steps: int, epochs: int) -> list[int]:
    """The optimizer steps after which an epoch ends; the last one is `steps`."""
    return [round(steps * epoch / epochs) for epoch in range(1, epochs + 1)]


def early_ends(ends: list[int], scores: Sequence[float | None], stop: StopEarly | None, begin: int = 0) -> list[int]:
    """`ends` of epochs, cut where `stop` ends the training: behind the first epoch that calls for it, the fall's end.

    `scores`: of the epochs that were measured. Only epochs that end behind step `begin` call for it.
    """
    known = [-1.0 if score is None else score for score in scores]
    if stop is None or any(score is None for score in scores):
        return ends
    for at in range(stop.patience, len(known)):
        late, early = known[at - stop.patience + 1 : at + 1], known[: at - stop.patience + 1]
        if at < len(ends) - 1 and ends[at] > begin and max(late) < max(early) + stop.gain:
            more = math.ceil(stop.decay * ends[at])
            return [*ends[: at + 1], *([min(ends[at] + more, ends[-1])] if more else [])]
    return ends


def all_ends(parts: Sequence[Part], cfg: Train, steps: int) -> list[int]:
    """As `epoch_ends`, of a training that goes on behind finished `parts`: those of the parts, then its own.

    It has as many epochs more as `cfg.epochs` is more than were made; if that is none, epochs of about as many tokens.
    """
    before = [end for part in parts for end in part["ends"]]
    if not parts:
        return epoch_ends(steps, cfg.epochs)
    begin, tokens = before[-1], parts[-1]["tokens"]
    epochs = cfg.epochs - len(before)
    if epochs < 1:
        epochs = max(1, round(len(before) * (cfg.tokens - tokens) / tokens))
    epochs = min(epochs, steps - begin)
    return [*before, *(begin + end for end in epoch_ends(steps - begin, epochs))]
