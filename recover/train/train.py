"""Recovery: training with the distillation loss, the epoch that generates best kept, nothing lost on the way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recover.base import console, dist, zero
from recover.base.errors import StopRequested, TrainingError
from recover.config.recipe import Recover
from recover.models.packed_attention import HALF, packing_configs
from recover.train.caching import TextRow, TrainingStates, with_states
from recover.train.callbacks import AfterEpoch, Epochs, Progress
from recover.train.checkpoints import begin, note
from recover.train.course import Course
from recover.train.data import Collate, build_dataset, collator, packer, tokens_at_once, with_scored
from recover.train.dense_text import weights_fingerprint
from recover.train.on_policy import OnPolicy
from recover.train.settings import (
    epoch_ends,
    refuse_averaging_shares,
    refuse_sharding_twice,
    split_batch,
    training_arguments,
)
from recover.train.shapes import row_sizes
from recover.train.sharded.weights import SharedOut
from recover.train.skipping import ROLLBACKS
from recover.train.step_log import StepLog
from recover.train.stopping import Interrupted, stop_between_steps
from recover.train.teacher_file import TeacherStates
from recover.train.totals import Totals
from recover.train.trainer import RecoverTrainer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from recover.models.twin import Twin

# Fields that say how the course is computed, and change none of it.
NO_MATTER: dict[str, Any] = {
    **dict.fromkeys(("cache", "shard_weights", "gradient_checkpointing", "save_steps"), True),
    "loss": {"chunk"},
}
LARGEST_GRAPHED = 4_000_000_000  # parameters; a 7B model's step spends its time in the kernels


def train(
    twin: Twin,
    tokenizer: PreTrainedTokenizerBase,
    cfg: Recover,
    run_folder: Path,
    after_epoch: AfterEpoch,
    seed: int,
    baseline_score: float | None = None,
) -> Path:
    """Train LoRA on `twin`; the folder of the adapter that scored best after an epoch (`best.json` names it).

    `after_epoch(epoch, {"step", "tokens", "seconds", "train": means per token and lr})` runs on every process, when
    the model can generate; higher scores are better, None means that the training loss decides. `baseline_score` is
    the untrained model's: if no epoch beats it there is a warning, and still the best epoch is kept.

    Called again with the same arguments after a stop or crash, it goes on from the newest checkpoint that verifies,
    on any number of processes. Steps that are not finite are skipped and counted in `training.json`.
    Under DeepSpeed ZeRO-3 the twin cannot be used afterwards: its weights stay dealt out.

    Raises:
        TrainingError: not finite again and again, or not launched right. DataError: nothing to learn from.
        ArtifactError: a checkpoint could not be written. StopRequested: stopped by a signal.
    """
    split = split_batch(cfg, dist.world_size())
    refuse_sharding_twice(cfg)
    refuse_averaging_shares(cfg)
    if next(twin.base.parameters()).dtype is torch.float16:
        raise TrainingError("model.dtype: float16 cannot be trained (gradients underflow): use bfloat16 or float32")
    packed = bool(packing_configs(twin.base))  # else padded
    fingerprint = _fingerprint(twin, cfg, seed, packed=packed)
    past = begin(run_folder, fingerprint)
    texts = run_folder / "data"
    rows = build_dataset(cfg, twin, tokenizer, seed, texts, packed=packed)
    steps = len(rows) // cfg.batch_size
    torch.manual_seed(seed)
    twin.add_lora(cfg.lora)
    course = Course(run_folder, fingerprint, batch_size=cfg.batch_size, seed=seed, totals=Totals(), past=past)
    graphed = packed and _may_be_graphed(twin, cfg)
    collate = _collation(tokenizer, cfg, rows, split.micro, packed=packed, graphed=graphed)
    own = None
    if "writer" in rows.features:
        own = OnPolicy(cfg, twin, tokenizer, rows, seed, run_folder, fingerprint, with_scored(collate))
    args = training_arguments(cfg, split, steps, seed, run_folder / "checkpoints", passes=1 + ROLLBACKS)
    with stop_between_steps() as stop:
        trainer = RecoverTrainer(
            twin,
            tokenizer,
            cfg,
            rows,
            args=args,
            steps=steps,
            course=course,
            stop=stop,
            collate=collate,
            on_policy=own,
        )
        course.follow(trainer)
        _read_states(trainer, cfg, rows, split.micro, texts)
        if own is None:
            trainer.data_collator = with_scored(trainer.data_collator)
        _announce(twin, rows, steps, split)
        with trainer.light(), trainer.graphed() if graphed else nullcontext():
            epochs = _train(trainer, cfg, after_epoch, run_folder)
        if trainer.shards is not None:
            trainer.shards.end()
    if trainer.is_deepspeed_enabled:
        zero.load_whole_again()
    _judge(epochs.best, baseline_score)
    note(run_folder, fingerprint, course.skips.to_json(), finished=True)
    if stop.requested:  # it came after the last step
        raise StopRequested(stop.requested)
    return run_folder / epochs.best["folder"]


def _collation(
    tokenizer: PreTrainedTokenizerBase, cfg: Recover, rows: Dataset, micro: int, *, packed: bool, graphed: bool
) -> Collate:
    """How rows become a batch: packed into one row, filled up to few sizes for graphs; else padded."""
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    if not packed:
        return collator(pad, cfg.loss.scored)
    sizes = row_sizes(tokens_at_once(rows, micro)) if graphed else ()
    return packer(pad, cfg.loss.scored, cfg.length, sizes)


def _may_be_graphed(twin: Twin, cfg: Recover) -> bool:
    """Whether steps may be replayed as CUDA graphs; where a GPU could and a recipe cannot, the reason is said.

    A graph repeats the same kernels on the same memory: whatever draws, waits or shares weights out stays outside.
    """
    if twin.base.device.type != "cuda":
        return False
    size = sum(parameter.numel() for parameter in twin.base.parameters())
    reasons = {
        "the work of each kernel outlasts its launch at this size": size > LARGEST_GRAPHED,
        "several processes": dist.world_size() > 1,
        "DeepSpeed": dist.zero_stage() > 0,
        "recover.gradient_checkpointing": cfg.gradient_checkpointing,
        "recover.cache": cfg.cache is not None,
        "a teacher's file": cfg.teacher is not None,
        "model.dtype float32": twin.base.dtype not in HALF,
        "lora.dropout": cfg.lora.dropout > 0,
        "dropout of the model itself": any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in twin.base.modules()),
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is not None:
        console.say(f"steps are launched kernel by kernel, not as CUDA graphs: {reason}")
    return reason is None


def _read_states(trainer: RecoverTrainer, cfg: Recover, rows: Dataset, micro: int, texts: Path) -> None:
    """Where the dense view's states are on disk, batches come with them; those of a cache are filled first."""
    read: Callable[[Sequence[TextRow]], Any]
    if cfg.cache is not None:
        states = TrainingStates(cfg.cache, trainer.distiller)
        with trainer.stop.immediately():
            states.fill(rows, trainer.data_collator, micro)
        read = states.read
    elif cfg.teacher is not None:
        read = TeacherStates(cfg.teacher, texts).read
    else:
        return
    trainer.data_collator = with_states(trainer.data_collator, read)


def _train(trainer: RecoverTrainer, cfg: Recover, after_epoch: AfterEpoch, run_folder: Path) -> Epochs:
    """To the end of the last epoch; what was found after each.

    Raises:
        StopRequested: stopped by a signal; a checkpoint is written.
    """
    epochs = Epochs(
        folder=run_folder,
        ends=epoch_ends(trainer.steps, cfg.epochs),
        save_steps=cfg.save_steps,
        patience=cfg.patience,
        course=trainer.course,
        stop=trainer.stop,
        after_epoch=after_epoch,
        generating=trainer.generating,
        peak_memory=trainer.peak_memory,
    )
    if cfg.shard_weights and dist.world_size() > 1:
        trainer.add_callback(SharedOut(trainer))
    trainer.add_callback(epochs)
    trainer.add_callback(Progress(trainer.course.totals))
    trainer.add_callback(StepLog(run_folder, trainer.course.totals))
    try:
        trainer.train()
    except Interrupted:
        trainer.course.save(interrupted=True)
    if trainer.stop.agreed:
        raise StopRequested(trainer.stop.agreed)
    return epochs


def _announce(twin: Twin, rows: Dataset, steps: int, split: Any) -> None:
    trained = sum(parameter.numel() for parameter in twin.model.parameters() if parameter.requires_grad)
    console.say(
        f"{len(rows):,} sequences in {steps:,} steps of {split.processes} x {split.micro} x {split.accumulation} "
        f"(processes x at once x accumulated); {trained:,} parameters learn"
    )


def _judge(best: dict[str, Any], baseline: float | None) -> None:
    score = best["score"]
    if baseline is not None and score is not None and score <= baseline:
        console.warn(
            f"no epoch generates better than the pruned model before training (best {score:.1%}, before "
            f"{baseline:.1%}); epoch {best['epoch']} is kept all the same. "
            "More tokens, other text (recover.data) or less pruning may help"
        )


def _fingerprint(twin: Twin, cfg: Recover, seed: int, *, packed: bool) -> str:
    """Of all that decides a training's course: another one must not go on from its checkpoints.

    Rows that are `packed` come in another order, and came in yet another one before they were even: who went on in
    another one would train some twice, others never.
    """
    plan = {name: value for name, value in twin.plan.to_json().items() if name != "scores"}
    described = {
        "config": cfg.model_dump(mode="json", exclude=NO_MATTER),
        "seed": seed,
        "rows": "packed, even" if packed else "padded",
        "plan": plan,
        "weights": weights_fingerprint(twin),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
