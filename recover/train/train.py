"""Recovery: training with the distillation loss, the epoch that generates best kept, nothing lost on the way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from trl.trainer.sft_config import SFTConfig

from recover.base import console, dist, zero
from recover.base.artifacts import JsonObject
from recover.base.errors import DataError, StopRequested, TrainingError
from recover.base.process import Interrupted, stop_between_steps
from recover.config.recipe import Train
from recover.config.train import BatchSplit, refuse_averaging_shares, refuse_sharding_twice, split_batch
from recover.distill.loss_terms import computed
from recover.models.attention import HALF, learning_from_rows, packing_configs
from recover.models.experts import taken_one_by_one, used_parameters
from recover.models.stored_weights import SharedOut, stored_in
from recover.report.run_files import EpochScore
from recover.text.generate import context_of
from recover.train.callbacks import AfterEpoch, Epochs, LogStep, Progress, StepLog
from recover.train.checkpoints import Asked, Part, PartEnds, begin, note
from recover.train.course import ROLLBACKS, Course, Totals, all_ends
from recover.train.data import build_dataset, collator, packer, row_sizes, tokens_at_once, with_scored
from recover.train.sources import Collate
from recover.train.state_cache import TextRow, TrainingStates, with_states
from recover.train.teacher_file import TeacherStates
from recover.train.trainer import RecoverTrainer
from recover.train.trials import found_rate
from recover.train.written_text import OnPolicy, weights_fingerprint

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from recover.models.twin import Twin

# Fields that say how the course is computed, and change none of it.
NO_MATTER: Any = {
    **dict.fromkeys(("cache", "shard_weights", "gradient_checkpointing", "save_steps"), True),
    "loss": {"chunk"},
}
SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
LARGEST_GRAPHED = 4_000_000_000  # parameters that a token meets; a 7B model's step spends its time in the kernels


def train(
    twin: Twin,
    tokenizer: PreTrainedTokenizerBase,
    cfg: Train,
    run_folder: Path,
    after_epoch: AfterEpoch,
    seed: int,
    baseline_score: float | None = None,
    log_step: LogStep | None = None,
) -> Path:
    """Train LoRA on `twin`; the folder of the adapter that scored best after an epoch (`best.json` names it).

    `after_epoch(epoch, {"step", "tokens", "seconds", "train": means per token and lr})` runs on every process, when
    the model can generate; higher scores are better, None means that the training loss decides. `baseline_score` is
    the untrained model's: if no epoch beats it there is a warning, and still the best epoch is kept. `log_step(step,
    line)` gets each line of `steps.jsonl` on the main process.

    Called again with the same arguments after a stop or crash, it goes on from the newest checkpoint that verifies,
    on any number of processes. Called with more `tokens` when it is finished, it goes on behind its last step, with the
    text that is new and a schedule of its own; epochs, records and what is best are those of all parts. Steps that are
    not finite are skipped and counted in `training.json`.
    Under DeepSpeed ZeRO-3 the twin cannot be used afterwards: its weights stay dealt out.

    Raises:
        TrainingError: not finite again and again, or not launched right. DataError: nothing to learn from.
        ArtifactError: a checkpoint could not be written. StopRequested: stopped by a signal.
    """
    split = split_batch(cfg, dist.world_size())
    _refuse(twin, cfg)
    packed = _packs(twin)  # else padded
    past = begin(run_folder, _asked(twin, cfg, seed, packed=packed))
    fingerprint, parts = past["fingerprint"], past["parts"]
    texts = run_folder / "data"
    rows = build_dataset(cfg, twin, tokenizer, seed, texts, packed=packed, parts=parts)
    steps, begun = _steps(cfg, rows, parts)
    ends = all_ends(parts, cfg, steps)
    torch.manual_seed(seed)
    twin.add_lora(cfg.lora)
    totals = Totals(computed(cfg.loss))
    course = Course(run_folder, fingerprint, batch_size=cfg.batch_size, seed=seed, totals=totals, past=past)
    graphed = packed and may_be_graphed(twin, cfg)
    collate = _collation(tokenizer, cfg, rows, split.micro, packed=packed, graphed=graphed)
    first = parts[0]["fingerprint"] if parts else fingerprint  # a training that is lengthened keeps its rate
    cfg = _with_rate(twin, tokenizer, cfg, rows, split.micro, collate, seed, run_folder, first, graphed=graphed)
    own = _own_text(twin, tokenizer, cfg, rows, seed, run_folder, fingerprint, collate)
    args = training_arguments(cfg, split, steps, seed, run_folder / "checkpoints", passes=1 + ROLLBACKS, begin=begun)
    with stop_between_steps() as stop, learning_from_rows(twin.base):
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
            ends=ends,
            begin=begun,
        )
        _read_states(trainer, cfg, rows, split.micro, texts)
        if own is None:
            trainer.data_collator = with_scored(trainer.data_collator)
        _announce(twin, rows, steps, split)
        epochs = _train(trainer, cfg, after_epoch, run_folder, ends, log_step, graphed=graphed)
    _judge(epochs.best, baseline_score)
    part: PartEnds = {"tokens": cfg.tokens, "ends": [each["step"] for each in epochs.records if each["step"] > begun]}
    note(run_folder, fingerprint, course.skips.to_json(), finished=True, part=part)
    if stop.requested:  # it came after the last step
        raise StopRequested(stop.requested)
    return run_folder / epochs.best["folder"]


def _refuse(twin: Twin, cfg: Train) -> None:
    """Raises TrainingError for what cannot be trained so."""
    refuse_sharding_twice(cfg)
    refuse_averaging_shares(cfg)
    if next(twin.base.parameters()).dtype is torch.float16:
        raise TrainingError("model.dtype: float16 cannot be trained (gradients underflow): use bfloat16 or float32")


def _packs(twin: Twin) -> bool:
    """Whether texts lie one after another in a row; said where they cannot."""
    if twin.arch.mixer:
        console.say(
            f"[dim]{twin.arch.model_type}: rows are padded and not packed: its blocks keep a state, which would go on "
            "from one text to the next[/dim]"
        )
    return bool(packing_configs(twin.base))


def _steps(cfg: Train, rows: Dataset, parts: list[Part]) -> tuple[int, int]:
    """Steps to the end, and those of parts that are finished. Raises DataError if there is none to make."""
    steps, begun = len(rows) // cfg.batch_size, parts[-1]["ends"][-1] if parts else 0
    if steps == begun:
        raise DataError(
            f"train.tokens: {cfg.tokens:,} make no step of {cfg.batch_size} more than the finished training's "
            f"{parts[-1]['tokens']:,}: raise it further"
        )
    return steps, begun


def _collation(
    tokenizer: PreTrainedTokenizerBase, cfg: Train, rows: Dataset, micro: int, *, packed: bool, graphed: bool
) -> Collate:
    """How rows become a batch: packed into one row, filled up to few sizes for graphs; else padded."""
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    if not packed:
        return collator(pad, cfg.loss.scored)
    sizes = row_sizes(tokens_at_once(rows, micro)) if graphed else ()
    return packer(pad, cfg.loss.scored, cfg.length, sizes)


def _own_text(
    twin: Twin,
    tokenizer: PreTrainedTokenizerBase,
    cfg: Train,
    rows: Dataset,
    seed: int,
    folder: Path,
    fingerprint: str,
    collate: Collate,
) -> OnPolicy | None:
    """What has the pruned model write the rows that are its own; None where there are none."""
    if "writer" not in rows.features:
        return None
    return OnPolicy(cfg, tokenizer, rows, seed, folder, fingerprint, with_scored(collate), context_of(twin.model))


def _with_rate(
    twin: Twin,
    tokenizer: PreTrainedTokenizerBase,
    cfg: Train,
    rows: Dataset,
    micro: int,
    collate: Collate,
    seed: int,
    folder: Path,
    fingerprint: str,
    *,
    graphed: bool,
) -> Train:
    """The config with the rate that trials find, where it is `auto`."""
    if "lr" not in cfg.auto:
        return cfg
    scored, everything = with_scored(collate), None
    if cfg.teacher is not None:
        scored = with_scored(with_states(collate, TeacherStates(cfg.teacher, folder / "data").read))
    elif cfg.loss.scored != "all":
        whole = cfg.model_copy(update={"loss": cfg.loss.model_copy(update={"scored": "all"})})
        packed = bool(packing_configs(twin.base))
        everything = with_scored(_collation(tokenizer, whole, rows, micro, packed=packed, graphed=graphed))
    rate = found_rate(
        twin,
        cfg,
        rows,
        collate=scored,
        perplexity=everything,
        micro=micro,
        seed=seed,
        folder=folder,
        fingerprint=fingerprint,
        graphed=graphed,
    )
    return cfg.model_copy(update={"lr": rate})


def may_be_graphed(twin: Twin, cfg: Train, size: int | None = None) -> bool:
    """Whether steps may be replayed as CUDA graphs; where a GPU could and a recipe cannot, the reason is said.

    `size`: parameters that a token goes through, where the twin's model is a part of one.
    A graph repeats the same kernels on the same memory: whatever draws, waits or shares weights out stays outside.
    """
    if twin.base.device.type != "cuda":
        return False
    size = size or used_parameters(twin.base)
    reasons = {
        "the work of each kernel outlasts its launch at this size": size > LARGEST_GRAPHED,
        "several processes": dist.world_size() > 1,
        "weights that come and go (model.offload, model.load_in)": stored_in(twin.base) is not None,
        "DeepSpeed": dist.zero_stage() > 0,
        "train.gradient_checkpointing": cfg.gradient_checkpointing,
        "train.cache": cfg.cache is not None,
        "a teacher's file": cfg.teacher is not None,
        "model.dtype float32": twin.base.dtype not in HALF,
        "lora.dropout": cfg.lora.dropout > 0,
        "experts that are taken one after the other": taken_one_by_one(twin.base),
        "dropout of the model itself": any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in twin.base.modules()),
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is not None:
        console.say(f"steps are launched kernel by kernel, not as CUDA graphs: {reason}")
    return reason is None


def _read_states(trainer: RecoverTrainer, cfg: Train, rows: Dataset, micro: int, texts: Path) -> None:
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


def _train(
    trainer: RecoverTrainer,
    cfg: Train,
    after_epoch: AfterEpoch,
    run_folder: Path,
    ends: list[int],
    log_step: LogStep | None,
    *,
    graphed: bool,
) -> Epochs:
    """To the end of the last epoch; what was found after each. Shared weights are whole again behind it.

    Raises:
        StopRequested: stopped by a signal; a checkpoint is written.
    """
    epochs = Epochs(
        folder=run_folder,
        ends=ends,
        save_steps=cfg.save_steps,
        patience=cfg.patience,
        early=cfg.stop,
        trainer=trainer,
        after_epoch=after_epoch,
    )
    if cfg.shard_weights and dist.world_size() > 1 and stored_in(trainer.distiller.twin.base) is None:
        trainer.add_callback(SharedOut(trainer))
    trainer.add_callback(epochs)
    trainer.add_callback(Progress(trainer.course.totals))
    trainer.add_callback(StepLog(run_folder, trainer.course.totals, log_step))
    with trainer.light(), trainer.graphed() if graphed else nullcontext():
        try:
            trainer.train()
        except Interrupted:
            trainer.save(interrupted=True)
        if trainer.stop.agreed:
            raise StopRequested(trainer.stop.agreed)
    if trainer.shards is not None:
        trainer.shards.end()
    if trainer.is_deepspeed_enabled:
        zero.load_whole_again()
    return epochs


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


def _announce(twin: Twin, rows: Dataset, steps: int, split: Any) -> None:
    trained = sum(parameter.numel() for parameter in twin.model.parameters() if parameter.requires_grad)
    console.say(
        f"{len(rows):,} sequences in {steps:,} steps of {split.processes} x {split.micro} x {split.accumulation} "
        f"(processes x at once x accumulated); {trained:,} parameters learn"
    )


def _judge(best: EpochScore, baseline: float | None) -> None:
    score = best["score"]
    if baseline is not None and score is not None and score <= baseline:
        console.warn(
            f"no epoch generates better than the pruned model before training (best {score:.1%}, before "
            f"{baseline:.1%}); epoch {best['epoch']} is kept all the same. "
            "More tokens, other text (train.data) or less pruning may help"
        )


def _asked(twin: Twin, cfg: Train, seed: int, *, packed: bool) -> Asked:
    """What is asked for, with all that decides its course: another one must not go on from it.

    Rows that are `packed` come in another order, and came in yet another one before they were even: who went on in
    another one would train some twice, others never. Where the pruned model writes, text depends on the share of the
    steps that is made, so such a training is not lengthened.
    """
    others = {
        "seed": seed,
        "rows": "packed, even" if packed else "padded",
        "plan": {name: value for name, value in twin.plan.to_json().items() if name != "scores"},
        "weights": weights_fingerprint(twin),
    }
    fades = cfg.loss.variance_until is not None
    return Asked(_deciding(cfg), others, _completed, lengthens=not cfg.pruned and not fades)


def _deciding(cfg: Train) -> JsonObject:
    return cfg.model_dump(mode="json", exclude=NO_MATTER)


def _completed(config: JsonObject) -> JsonObject | None:
    """What an earlier version put down of its config, with the fields that came later; None: it is none of now."""
    try:
        return _deciding(Train.model_validate(config))
    except ValidationError:
        return None
