"""`lr: auto`: short trainings of a few rates on the run's own first text, and the one whose model is nearest to dense.

Each trial starts from adapters of zero, goes over the same rows, warms up and falls to zero: what a rate does is seen
when it has fallen, not while it is high. It is judged on the last rows of the run, which no trial has learnt from. The
training then starts from zero too. Trials are plain loops before the trainer is made, so that they are the same under
every engine; several processes share the rows of each step.

train/trials.json   the plan, each trial as it ends, and what was chosen; a run that goes on reads it
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Required, TypedDict, cast

import numpy as np
import torch
import torch.distributed
from accelerate.utils import send_to_device
from torch import Tensor

from recover.base import console, dist
from recover.base.artifacts import read_json, write_json
from recover.base.errors import ArtifactError, TrainingError
from recover.config.defaults import prior_rate
from recover.config.recipe import Train
from recover.distill.distiller import Batch, Distiller, GraphedPasses, rows_scored, scaled
from recover.maths.score import of_ratio
from recover.models.attention import PACKED_NAME, attending, learning_from_rows
from recover.report.run_files import Trial
from recover.train.sources import Collate

if TYPE_CHECKING:
    from datasets import Dataset

    from recover.models.twin import Twin

FILE = "trials.json"
SHARE = 0.05  # of the run's tokens, for all trials with what they are judged on
FACTORS = ((0.25, 0.5, 1.0, 2.0, 4.0), (0.5, 1.0, 2.0))  # of the prior; the longer row where there is enough for it
STEPS = (16, 200)  # of a trial, at least and at most
JUDGED = 0.15  # of a trial's tokens are those that it is judged on
GROUPS = 16  # of the rows that are judged, whose figures are paired; at least 8
WARMUP = 0.1  # of a trial's steps

Sums = list[tuple[float, int]]  # of each group of rows: nats, and tokens


@dataclass(frozen=True)
class Trials:
    """Which rates, and on which rows: the first `steps` x batch each trial learns, and is judged on the rows `judged`.

    No rates: no trials, for the reason `why`.
    """

    prior: float
    rates: tuple[float, ...]
    steps: int
    judged: tuple[int, ...]
    tokens: int  # scored in all trials together
    why: str  # how the budget is split, or why there are no trials


class JudgedTrial(Trial, total=False):
    """A trial with the sums of each group of rows: of KL, and of -log p of the text."""

    each: Required[Sums]
    perplexity_each: Required[Sums]


class TrialsRecord(TypedDict):
    """trials.json; `fingerprint`: of the training that it is of. `chosen`: None until all trials are made."""

    fingerprint: str
    prior: float
    steps: int
    tokens: int
    why: str
    trials: list[JudgedTrial]
    chosen: float | None
    reason: str | None


def planned(cfg: Train, width: int, scored: Sequence[int], texts: Sequence[Hashable] | None = None) -> Trials:
    """The trials of a training; `scored`: tokens that each of its rows scores, 0 of one without a text of its own.

    `texts`: what each row holds, where some may hold the same: a trial is judged on none that it learns. No rates where
    the budget, or the text, is too little: then the prior is taken.
    """
    prior = prior_rate(width, cfg.lora.alpha or 2 * cfg.lora.rank)
    allowed = SHARE * cfg.tokens
    texts = range(len(scored)) if texts is None else texts
    first = next((at for at, tokens in enumerate(scored) if not tokens), len(scored))
    mean = sum(scored[:first]) / max(first, 1)
    fewest = f"{len(FACTORS[-1])} trials of {STEPS[0]} steps"
    why = f"{SHARE:.0%} of train.tokens, {allowed:,.0f}, are less than {fewest} take"
    for factors in FACTORS:
        each = allowed / len(factors)
        steps = min(STEPS[1], int((1 - JUDGED) * each / max(mean, 1e-9) / cfg.batch_size)) if first else 0
        if steps < STEPS[0]:
            continue
        learnt = steps * cfg.batch_size
        wanted = max(GROUPS // 2, int(learnt * JUDGED / (1 - JUDGED)))
        known = {*texts[:learnt]}
        judged = tuple(row for row in range(learnt, first) if texts[row] not in known)[-wanted:]
        if len(judged) < wanted:
            why = f"the text holds less than trials of {steps} steps and other rows to judge them on"
            continue
        tokens = len(factors) * (sum(scored[:learnt]) + sum(scored[row] for row in judged))
        split = (
            f"{len(factors)} trials of {steps} steps, each judged on {wanted} other rows: {tokens:,} tokens "
            f"({tokens / cfg.tokens:.1%} of train.tokens) beside the training's own"
        )
        return Trials(prior, tuple(prior * factor for factor in factors), steps, judged, tokens, split)
    if first < len(scored):
        why = f"the pruned model writes text from row {first + 1:,} of {len(scored):,} on, too early for trials"
    return Trials(prior, (), 0, (), 0, f"{why}: what models of width {width} took is taken, without trials")


def scored_of(rows: Dataset, scored: str) -> list[int]:
    """Tokens that each row of `build_dataset` scores; 0 where the pruned model is yet to write it."""
    writers = rows["writer"] if "writer" in rows.features else [-1] * len(rows)
    masks = rows.with_format("numpy")["completion_mask"]
    return [
        0 if writer >= 0 else int(len(mask) - 1 if scored == "all" else np.sum(mask[1:]))
        for writer, mask in zip(writers, masks, strict=True)
    ]


def found_rate(
    twin: Twin,
    cfg: Train,
    rows: Dataset,
    *,
    collate: Collate,
    perplexity: Collate | None,
    micro: int,
    seed: int,
    folder: Path,
    fingerprint: str,
    graphed: bool,
) -> float:
    """The learning rate of a training with `lr: auto`, the same on every process; the adapters are as they were.

    `collate`: as the training's, with `scored`. `perplexity`: the same with all tokens scored; None: not judged by it.
    `fingerprint`: of the training; trials of another one are not read.

    Raises:
        TrainingError: every trial met a loss that is not finite.
    """
    texts = [ids.tobytes() for ids in rows.with_format("numpy")["input_ids"]]
    plan = planned(cfg, twin.base.config.hidden_size, scored_of(rows, cfg.loss.scored), texts)
    record = dist.on_main(lambda: _read(folder / FILE, fingerprint))
    if record is None or record["chosen"] is None:
        bench = Bench(twin, cfg, rows.with_format("numpy"), plan, collate, perplexity, micro, seed, graphed=graphed)
        record = _tried(bench, plan, record, folder / FILE, fingerprint)
    if record["chosen"] is None:
        raise AssertionError("no rate was chosen of all that were tried")
    _say(record)
    return dist.broadcast(record["chosen"])


def _read(path: Path, fingerprint: str) -> TrialsRecord | None:
    try:
        found = read_json(path) if path.exists() else None
    except ArtifactError as error:
        console.warn(f"{error}; the trials are made again")
        found = None
    if not isinstance(found, dict) or found.get("fingerprint") != fingerprint:
        return None
    return cast(TrialsRecord, found)


def _tried(bench: Bench, plan: Trials, before: TrialsRecord | None, path: Path, fingerprint: str) -> TrialsRecord:
    """The record with all trials and the choice, written as it grows; `before`: as a training that goes on finds it."""
    trials = list(before["trials"]) if before else []
    if plan.rates:
        console.say(f"lr: auto: {plan.why}")

    def write(chosen: float | None, reason: str | None) -> TrialsRecord:
        now: TrialsRecord = {
            "fingerprint": fingerprint,
            "prior": plan.prior,
            "steps": plan.steps,
            "tokens": plan.tokens,
            "why": plan.why,
            "trials": trials,
            "chosen": chosen,
            "reason": reason,
        }
        dist.on_main(lambda: write_json(path, now))
        return now

    with bench:
        for rate in plan.rates[len(trials) :]:
            trials.append(bench.trial(rate))
            write(None, None)
    return write(*_best(trials, plan))


def _best(trials: Sequence[JudgedTrial], plan: Trials) -> tuple[float, str]:
    """The rate to take, and why. Rates that are not worse beyond noise count as equal, first by KL, then by perplexity.

    Of what is left the lowest: the training is longer than a trial, and longer ones want lower rates.
    """
    if not plan.rates:
        return plan.prior, plan.why
    finite = [trial for trial in trials if trial["kl"] is not None]
    if not finite:
        raise TrainingError(
            f"train.lr: auto: each of the trials, from {plan.rates[0]:.2g} to {plan.rates[-1]:.2g}, met a loss that "
            "is not finite: give a rate, such as train.lr=1e-5, and look at the text and the pruned model"
        )
    reasons = []
    for key, name in (("each", "KL"), ("perplexity_each", "perplexity")):
        if len(finite) > 1 and all(trial[key] for trial in finite):
            best = min(finite, key=lambda trial: _mean(trial[key]))
            kept = [trial for trial in finite if not _worse(best[key], trial[key])]
            if len(kept) < len(finite):
                reasons.append(f"lowest {name}" if len(kept) == 1 else f"{name} among the lowest {len(kept)}")
            finite = kept
    reasons += ["the lowest rate of those that are equal within noise"] if len(finite) > 1 else []
    return min(trial["lr"] for trial in finite), ", then ".join(reasons)


def _worse(best: Sums, other: Sums) -> bool:
    change = of_ratio(best, other)
    return change is not None and change.rose


def _mean(sums: Sums) -> float:
    return sum(nats for nats, _ in sums) / sum(tokens for _, tokens in sums)


def _say(record: TrialsRecord) -> None:
    if record["trials"]:
        columns = ["rate", "KL", "perplexity", "seconds"]
        shown = [
            [trial["lr"], trial["kl"], trial.get("perplexity"), trial.get("seconds")] for trial in record["trials"]
        ]
        console.table("trials of learning rates", columns, shown)
    console.say(f"lr: auto: {record['chosen']:.3g}: {record['reason']}")


class Bench:
    """Trials, or steps, on one twin with adapters; after `with` the adapters and random numbers are as before."""

    def __init__(
        self,
        twin: Twin,
        cfg: Train,
        rows: Any,
        plan: Trials,
        collate: Collate,
        perplexity: Collate | None,
        micro: int,
        seed: int,
        *,
        graphed: bool,
    ) -> None:
        self.twin, self.cfg, self.rows, self.plan = twin, cfg, rows, plan
        self.collate, self.perplexity, self.micro, self.seed = collate, perplexity, micro, seed
        self.trained = [parameter for parameter in twin.model.parameters() if parameter.requires_grad]
        self.first = [parameter.detach().clone() for parameter in self.trained]
        self.distiller = Distiller(twin, cfg.loss)
        self.graphs = GraphedPasses(self.distiller, self.trained) if graphed and plan.rates else None
        self.device = next(twin.base.parameters()).device
        self.training = twin.model.training

    def __enter__(self) -> Bench:
        devices = [self.device] if self.device.type == "cuda" else []
        self.random = torch.random.fork_rng(devices=devices)
        self.random.__enter__()
        if self.cfg.gradient_checkpointing and self.plan.rates:
            self.twin.model.gradient_checkpointing_enable({"use_reentrant": False})
        return self

    def __exit__(self, *_: Any) -> None:
        self.random.__exit__(None, None, None)
        self._from_zero()
        if self.graphs is not None:
            self.graphs.forget()
        self.twin.model.train(self.training)

    @torch.no_grad()
    def _from_zero(self) -> None:
        for parameter, first in zip(self.trained, self.first, strict=True):
            parameter.copy_(first)
            parameter.grad = None

    def trial(self, rate: float) -> JudgedTrial:
        """A training of this rate, and how near its end is to dense; `kl` None where its loss was not finite."""
        started = time.perf_counter()
        self._from_zero()
        torch.manual_seed(self.seed)
        self.distiller.stand_at(0.0)
        adam = self.optimizer(rate)
        self.twin.model.train()
        finite = True
        for step in console.track(range(self.plan.steps), f"trial of lr {rate:.2g}", unit="steps"):
            for group in adam.param_groups:
                group["lr"] = rate * _shape(step, self.plan.steps)
            finite = self.step(step, adam)
            if not finite:
                break
        self.twin.model.eval()
        found: JudgedTrial = {"lr": rate, "kl": None, "perplexity": None, "each": [], "perplexity_each": []}
        if finite:
            self._judge(found)
        found["seconds"] = round(time.perf_counter() - started, 1)
        return found

    def optimizer(self, rate: float) -> torch.optim.Optimizer:
        """A new one of what learns."""
        decay = self.cfg.weight_decay
        return torch.optim.AdamW(self.trained, lr=rate, weight_decay=decay, fused=self.device.type == "cuda")

    def step(self, step: int, adam: torch.optim.Optimizer) -> bool:
        """One optimizer step over all processes; whether its gradient was finite."""
        size = self.cfg.batch_size
        share = size // dist.world_size()
        begin = step * size + dist.rank() * share
        batches = [
            self._batch(self.collate, range(start, min(start + self.micro, begin + share)))
            for start in range(begin, begin + share, self.micro)
        ]
        mine = sum(len(rows_scored(batch)[0]) for batch in batches)
        tokens = _over_processes(torch.tensor([mine], dtype=torch.float64))
        scale = (1.0 / tokens.clamp_min(1.0)).to(self.device, torch.float32)[0]
        for parameter in self.trained:
            parameter.grad = None
        for batch in batches:
            self._backward(batch, scale)
        flat = torch.cat([_gradient(parameter).flatten() for parameter in self.trained])
        flat = _over_processes(flat)
        norm = flat.norm()
        if not bool(norm.isfinite()):
            return False
        flat *= (self.cfg.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        parts = flat.split([parameter.numel() for parameter in self.trained])
        for parameter, part in zip(self.trained, parts, strict=True):
            _gradient(parameter).copy_(part.view_as(parameter))
        adam.step()
        return True

    def _backward(self, batch: Batch, scale: Tensor) -> None:
        if self.graphs is not None and self.graphs.takes(batch):
            self.graphs.step(batch, scale)
            return
        if self.graphs is not None:
            self.graphs.bring_gradients()
        with (
            attending(self.distiller.packs if "packing" in batch else (), PACKED_NAME),
            learning_from_rows(self.twin.base),
        ):
            sums = self.twin.model(**self.distiller.given(batch), distill=self.distiller)
            scaled(sums["loss"], scale).backward()

    def _batch(self, collate: Collate, numbers: Sequence[int]) -> Batch:
        found: Any = send_to_device(collate([self.rows[number] for number in numbers]), self.device)
        return found

    def _judge(self, found: JudgedTrial) -> None:
        """Put KL and perplexity on the rows that no trial learns from into the record, if they are finite."""
        rows = self.plan.judged
        size = max(1, len(rows) // GROUPS)
        groups: list[Sequence[int]] = [rows[start : start + size] for start in range(0, len(rows), size)]
        each = dist.over(groups, lambda mine: [self._sums(self.collate, group, "kl") for group in mine])
        texts: Sums = []
        if self.perplexity is not None:
            collate = self.perplexity
            texts = dist.over(groups, lambda mine: [self._sums(collate, group, "ce") for group in mine])
        if not math.isfinite(_mean(each)):
            return
        found["kl"], found["each"] = _mean(each), each
        if texts:
            found["perplexity"], found["perplexity_each"] = math.exp(min(_mean(texts), 700.0)), texts

    @torch.no_grad()
    def _sums(self, collate: Collate, numbers: Sequence[int], term: str) -> tuple[float, int]:
        batch = self.distiller.given(self._batch(collate, numbers))
        sums = self.twin.model(**batch, distill=self.distiller)
        return float(sums[term]), int(sums["tokens"])


def _shape(step: int, steps: int) -> float:
    """Share of the rate at a step (from 0): a linear rise, then half a cosine down to zero."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / (steps - warmup + 1)))


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _over_processes(values: Tensor) -> Tensor:
    """The sum over all processes."""
    if dist.world_size() == 1:
        return values
    on_device = values.to(dist.device())
    torch.distributed.all_reduce(on_device)
    return on_device
