"""From the recipe to the trainer's arguments, and what is refused on the way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from trl.trainer.sft_config import SFTConfig

from recover.base import dist
from recover.base.errors import TrainingError
from recover.config.recipe import StopEarly, Train
from recover.train.checkpoints import Part

SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class BatchSplit:
    """`processes` x `micro` sequences at once, `accumulation` times a step."""

    processes: int
    micro: int
    accumulation: int


def split_batch(cfg: Train, processes: int) -> BatchSplit:
    """How the sequences of one optimizer step fall to processes and micro-batches.

    Raises:
        TrainingError: they do not come out even (the loss would be right, but some process would be idle).
    """
    share, rest = divmod(cfg.batch_size, processes)
    if rest or share == 0:
        near = max(1, round(cfg.batch_size / processes)) * processes
        raise TrainingError(
            f"train.batch_size: {cfg.batch_size} sequences a step cannot be dealt out evenly to {processes} "
            f"processes; give a multiple of {processes}, such as {near}"
        )
    micro = cfg.micro_batch_size or share
    if share % micro:
        raise TrainingError(
            f"train.micro_batch_size: {micro} does not divide the {share} sequences that each of {processes} "
            f"processes gets of train.batch_size {cfg.batch_size}; give a divisor of {share}"
        )
    return BatchSplit(processes, micro, share // micro)


def refuse_sharding_twice(cfg: Train) -> None:
    """Raises TrainingError: weights were to be shared out by us, and by DeepSpeed too."""
    if cfg.shard_weights and dist.zero_stage() == 3:
        raise TrainingError(
            "train.shard_weights: DeepSpeed's ZeRO-3, which was launched, shares out all weights itself; launch with "
            "launch/zero2.yaml or launch/gpu.yaml, which is faster, or leave shard_weights out"
        )


def refuse_averaging_shares(cfg: Train) -> None:
    """Raises TrainingError: adapters were to be averaged, of which no process holds a whole one."""
    if cfg.average is not None and dist.zero_stage() == 3:
        raise TrainingError(
            "train.average: DeepSpeed's ZeRO-3, which was launched, shares out the adapters too, and gathering them "
            "at each step to average them would cost more than it brings: launch with launch/zero2.yaml or "
            "launch/gpu.yaml (train.shard_weights shares out the frozen weights there), or leave average out"
        )


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


def training_arguments(
    cfg: Train, split: BatchSplit, steps: int, seed: int, folder: Path, *, passes: int = 1, begin: int = 0
) -> SFTConfig:
    """Arguments of trl's trainer. What it would save, log, report or show by itself is off: our callbacks do that.

    `passes`: how often the trainer may start over the text, for which it must expect so many times the steps. `begin`:
    the step behind which the schedule begins, after a finished training.
    """
    on_gpu = torch.cuda.is_available()
    # The one field goes by two names, and each version of transformers warns of the other.
    known = {field.name for field in dataclasses.fields(SFTConfig)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    memory: Any = {name: cfg.gradient_checkpointing}
    if cfg.gradient_checkpointing:
        memory[f"{name}_kwargs"] = {"use_reentrant": False}
    return SFTConfig(
        output_dir=str(folder),
        max_steps=steps * passes,
        per_device_train_batch_size=split.micro,
        gradient_accumulation_steps=split.accumulation,
        learning_rate=cfg.lr,
        lr_scheduler_type=SCHEDULERS[cfg.scheduler],
        warmup_steps=math.ceil(cfg.warmup * (steps - begin)),
        weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.max_grad_norm,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        accelerator_config={"non_blocking": on_gpu},
        seed=seed,
        # The distiller multiplies half-precision models by float32 adapters itself, with and without DeepSpeed alike.
        bf16=False,
        fp16=False,
        use_cpu=not on_gpu,
        # Without it, on a CPU with DeepSpeed, every process would take itself for the only one.
        ddp_backend="gloo" if split.processes > 1 and not on_gpu else None,
        ddp_find_unused_parameters=False,
        **memory,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",  # `log_step` is called by a callback
        logging_nan_inf_filter=False,  # would hide a NaN and wait for the device at every step
    )
