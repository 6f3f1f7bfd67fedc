"""Recovery: trl's trainer with the distillation loss in place of its own, and the epoch that generates best kept.

Everything is a sum until one place divides: by the scored tokens of the whole optimizer step, over all micro-
batches and processes. So gradients do not depend on how a step is cut into micro-batches or dealt out to processes.

Legend: B batch, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback
from trl.trainer.sft_trainer import SFTTrainer

from recover import console, dist
from recover.distill.distiller import Distiller, scored_tokens
from recover.errors import StopRequested, TrainingError
from recover.recipe import Recover
from recover.train.callbacks import AfterEpoch, Epochs, Progress
from recover.train.checkpoints import begin, finish, newest_checkpoint, read_adapter, write_adapter
from recover.train.data import build_dataset, collator, weights_fingerprint
from recover.train.settings import epoch_ends, split_batch, training_arguments
from recover.train.stopping import Stop, stop_between_steps
from recover.train.totals import TERMS, Totals

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from recover.models.twin import Twin


class RecoverTrainer(SFTTrainer):
    """`twin.model` learns, by `distiller`, from rows of `build_dataset`, in their order.

    Raises:
        TrainingError: the loss is not finite, on whichever process; all of them stop before the step changes a
            parameter.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of all micro-batches of the step

    def __init__(
        self,
        twin: Twin,
        tokenizer: PreTrainedTokenizerBase,
        leaf: Recover,
        rows: Dataset,
        *,
        args: Any,
        totals: Totals,
        stop: Stop,
    ) -> None:
        pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        super().__init__(
            model=twin.model,
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
            data_collator=collator(pad or 0, leaf.loss.scored),
        )
        self.adapted: Any = twin.model
        self.distiller = Distiller(twin, leaf.loss)
        self.totals = totals
        self.stop = stop
        # trl patches the model object with a forward of its own head; ours never takes it, and a twin outlives its
        # training.
        vars(twin.base).pop("forward", None)
        # Kept, it would have the model's special tokens rewritten to match, and a copy saved with each checkpoint.
        self.processing_class = None
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if self.accelerator.num_processes != dist.world_size():
            raise TrainingError(
                f"{dist.world_size()} processes were launched, and accelerate sees {self.accelerator.num_processes}: "
                "each would train alone on the same data. Launch with one of the files in launch/"
            )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, and the scored tokens in them, over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = torch.zeros((), dtype=torch.int64, device=device)
        for batch in batches:
            tokens += scored_tokens(batch["labels"]).to(device)
        return batches, self.accelerator.reduce(tokens, "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This micro-batch's part of the mean loss per token, as autograd must see it."""
        assert num_items_in_batch is not None and not return_outputs
        sums = model(**inputs, distill=self.distiller)
        self._count(sums)
        # Gradients are averaged over processes, by DDP and DeepSpeed alike, and this is a sum over them.
        return sums["loss"] * (self.accelerator.num_processes / num_items_in_batch.clamp_min(1))

    def _count(self, sums: dict[str, Tensor]) -> None:
        """Add to the totals of all processes; learn on the way whether any met a NaN or was asked to stop."""
        names = [*TERMS, "tokens"]
        values = [sums[name].detach().double() for name in names]
        values.append(torch.full_like(values[0], self.stop.requested))
        summed: Any = self.accelerator.reduce(torch.stack(values), "sum")
        *numbers, stop = summed.tolist()
        if stop:
            self.stop.agreed = self.stop.requested or signal.SIGTERM
        total = dict(zip(names, numbers, strict=True))
        if not all(map(torch.isfinite, torch.tensor(numbers))):
            shown = ", ".join(f"{name} {total[name]}" for name in names)
            raise TrainingError(
                f"step {self.state.global_step + 1}: the loss is not finite ({shown}); this step changed no parameter. "
                "Lower recover.lr, or use model.dtype float32 or bfloat16"
            )
        self.totals.add(total)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Losses as means per token over all processes.

        Raises:
            TrainingError: the gradient was not finite.
        """
        if "loss" in logs:
            logs = {**logs, **self.totals.read_step()}
        norm = logs.get("grad_norm")
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)):
            raise TrainingError(
                f"step {self.state.global_step}: the gradient's norm is {norm}, though the loss was finite; "
                "the parameters of this step are lost, checkpoints before it are whole. "
                "Lower recover.lr, or use model.dtype float32 or bfloat16"
            )
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter alone; every process takes part."""
        folder: Any = output_dir or self.args.output_dir
        write_adapter(self.adapted, Path(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        read_adapter(self.adapted, Path(resume_from_checkpoint))

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        # The rows are in training order; a sampler that draws would have to be brought back to its state at a resume.
        rows: Any = self.train_dataset
        return torch.utils.data.SequentialSampler(rows)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: checkpoints here are for resuming only."""

    def _send_telemetry(self) -> None:
        """None: a training run makes no network request of its own."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: transformers' estimate walks all parameters at each step and knows neither view of the twin."""
        return 0

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Inside, every process holds the whole model, outside of the engine: what generation needs."""
        if not self.is_zero3:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters
        from trl.models.utils import add_hooks, remove_hooks

        engine: Any = self.model_wrapped
        with GatheredParameters(list(engine.parameters())):
            remove_hooks(engine)
            try:
                yield
            finally:
                add_hooks(engine)

    @property
    def is_zero3(self) -> bool:
        """Whether parameters are dealt out over the processes."""
        plugin = self.accelerator.state.deepspeed_plugin
        return plugin is not None and plugin.zero_stage == 3

    @property
    def engine(self) -> str:
        """What checkpoints belong to: DeepSpeed's shards fit only the same stage and number of processes."""
        plugin = self.accelerator.state.deepspeed_plugin
        return "plain" if plugin is None else f"DeepSpeed zero{plugin.zero_stage} on {dist.world_size()} processes"


def recover(
    twin: Twin,
    tokenizer: PreTrainedTokenizerBase,
    leaf: Recover,
    run_folder: Path,
    after_epoch: AfterEpoch,
    seed: int,
    baseline_score: float | None = None,
) -> Path:
    """Train LoRA on `twin`; the folder of the adapter that scored best after an epoch (`best.json` names it).

    `after_epoch(epoch, {"step", "tokens", "seconds", "train": means per token and lr})` runs on every process, when
    the model can generate; higher scores are better, None means that the training loss decides. `baseline_score` is
    the untrained model's: if no epoch beats it there is a warning, and still the best epoch is kept.

    Called again with the same arguments after a stop or crash, it goes on from the newest checkpoint that verifies.
    Under DeepSpeed ZeRO-3 the twin cannot be used afterwards: its weights stay dealt out.

    Raises:
        TrainingError: not finite, or not launched right. DataError: nothing to learn from. StopRequested: stopped
            by a signal.
    """
    split = split_batch(leaf, dist.world_size())
    if next(twin.base.parameters()).dtype is torch.float16:
        raise TrainingError("model.dtype: float16 cannot be trained (gradients underflow): use bfloat16 or float32")
    fingerprint = _fingerprint(twin, leaf, seed)
    begin(run_folder, fingerprint)
    rows = build_dataset(leaf, twin, tokenizer, seed, run_folder / "data")
    steps = len(rows) // leaf.batch_size
    torch.manual_seed(seed)
    twin.add_lora(leaf.lora)
    totals = Totals()
    args = training_arguments(leaf, split, steps, seed, run_folder / "checkpoints")
    with stop_between_steps() as stop:
        trainer = RecoverTrainer(twin, tokenizer, leaf, rows, args=args, totals=totals, stop=stop)
        epochs = Epochs(
            folder=run_folder,
            ends=epoch_ends(steps, leaf.epochs),
            save_steps=leaf.save_steps,
            patience=leaf.patience,
            engine=trainer.engine,
            totals=totals,
            stop=stop,
            after_epoch=after_epoch,
            generating=trainer.generating,
        )
        trainer.add_callback(epochs)
        trainer.add_callback(Progress(totals))
        _announce(twin, rows, steps, split)
        _train(trainer, run_folder / "checkpoints", totals)
        if stop.agreed:
            raise StopRequested(stop.agreed)
    _forget_deepspeed(trainer)
    _judge(epochs.best, baseline_score)
    finish(run_folder, fingerprint)
    if stop.requested:  # it came after the last step
        raise StopRequested(stop.requested)
    return run_folder / epochs.best["folder"]


def _train(trainer: RecoverTrainer, folder: Path, totals: Totals) -> None:
    found = newest_checkpoint(folder, trainer.engine)
    if found is None:
        trainer.train()
        return
    checkpoint, state = found
    totals.restore(state["totals"])
    console.say(f"going on from {checkpoint.name}, {totals.tokens:,} tokens trained")
    trainer.train(resume_from_checkpoint=str(checkpoint))


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
            f"no epoch generates better than the pruned model before training (best {score:.4g}, before "
            f"{baseline:.4g}); epoch {best['epoch']} is kept all the same. "
            "More tokens, other text (recover.data) or less pruning may help"
        )


def _fingerprint(twin: Twin, leaf: Recover, seed: int) -> str:
    """Of all that decides a training's course: another one must not go on from its checkpoints."""
    plan = {"dropped": twin.plan.dropped, "masks": {name: record.zeros for name, record in twin.plan.masks.items()}}
    described = {"leaf": leaf.model_dump(mode="json"), "seed": seed, "plan": plan, "weights": weights_fingerprint(twin)}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _forget_deepspeed(trainer: RecoverTrainer) -> None:
    """Later `from_pretrained` calls of this process must load whole weights, not ZeRO-3 shares."""
    if trainer.accelerator.state.deepspeed_plugin is not None:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
