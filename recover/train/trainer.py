"""trl's trainer with the distillation loss in place of its own, and our own checkpoints.

Everything is a sum until one place divides: by the scored tokens of the whole optimizer step, over all micro-
batches and processes. So gradients do not depend on how a step is cut into micro-batches or dealt out to processes.

Legend: B batch, T tokens.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback
from trl.trainer.sft_trainer import SFTTrainer

from recover.base import dist, zero
from recover.base.errors import StopRequested, TrainingError
from recover.base.process import Interrupted, Stop
from recover.config.recipe import PrunedText, Train
from recover.distill.distiller import Batch, Distiller, GraphedPasses, scaled, scored_tokens
from recover.models.attention import PACKED_NAME, attending
from recover.models.stored_weights import StoredWeights, comes_and_goes, gather_by_block, stored_in
from recover.models.twin import modules_below, plain_modes, set_training
from recover.train.course import Course, epoch_ends, frozen_weights, not_finite
from recover.train.optimizer_state import Average, Trained, averaged_steps
from recover.train.sources import Collate
from recover.train.written_text import Numbers, OnPolicy, write_together

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from recover.models.twin import Twin


@dataclass(frozen=True)
class _Fetched:
    """The `count` micro-batches of one step, and the iterator `of` which they came."""

    of: Any = None
    count: int = 0
    batches: list[Any] = field(default_factory=list)


class _Copied:
    """Numbers on their way to the host; what the device is given to do after them is not waited for."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.there = values, None
        if values.is_cuda:
            self.values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            self.there = torch.cuda.Event()
            self.there.record()

    def read(self) -> list[float]:
        if self.there is not None:
            self.there.synchronize()
        return self.values.tolist()


ROUTING = ("output_router_logits", "router_aux_loss_coef")  # of a config of a mixture of experts


@contextmanager
def _left_as_it_is(model: Any) -> Iterator[None]:
    """Inside, trl may do to the model what is undone behind it: a twin outlives its training.

    It puts a forward of its own head onto the object, which ours never takes; and has the config ask for router logits,
    for a loss of load balance that is not added here, so that an export would ask for them too.
    """
    config = model.config
    before = {name: getattr(config, name) for name in ROUTING if hasattr(config, name)}
    yield
    vars(model).pop("forward", None)
    for name, value in before.items():
        setattr(config, name, value)


class RecoverTrainer(SFTTrainer):
    """`twin.model` learns, by `distiller`, from rows of `build_dataset`, in their order.

    A step whose loss or gradient is not finite, on whichever process, changes no parameter on any: `course` counts it.
    """

    data_collator: Any  # a Collate, or `OnPolicy.numbers`
    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of all micro-batches of the step

    def __init__(
        self,
        twin: Twin,
        tokenizer: PreTrainedTokenizerBase,
        cfg: Train,
        rows: Dataset,
        *,
        args: Any,
        steps: int,
        course: Course,
        stop: Stop,
        collate: Collate,
        on_policy: OnPolicy | None = None,
        ends: list[int] | None = None,
        begin: int = 0,
    ) -> None:
        """`ends`: the last step of each epoch; default: equal ones. `begin`: the step behind which the rate's schedule
        begins, of a training that goes on behind a finished one.
        """
        # What comes and goes is on its device when it is there: nobody moves it, or sends it to other processes.
        if gone := [name for name, value in twin.model.named_parameters() if comes_and_goes(value)]:
            vars(twin.model).update(to=lambda *_, **__: twin.model, _ddp_params_and_buffers_to_ignore=gone)
        with _left_as_it_is(twin.base):
            super().__init__(
                model=twin.model,
                args=args,
                train_dataset=rows.with_format("numpy"),
                processing_class=tokenizer,
                data_collator=cast(Any, collate if on_policy is None else on_policy.numbers),
            )
        self.aux_loss_enabled = False  # see `_left_as_it_is`
        self.shards: StoredWeights | None = None  # see `SharedOut`
        if self.is_zero3:
            gather_by_block(twin)
        self.adapted: Any = twin.model
        learning = {name: value for name, value in twin.model.named_parameters() if value.requires_grad}
        self.trained = list(learning.values())
        self.average = Average(
            learning, averaged_steps(cfg.average, steps - begin, ends or epoch_ends(steps, cfg.epochs))
        )
        self.distiller = Distiller(twin, cfg.loss)
        self.graphs: GraphedPasses | None = None  # see `graphed`
        self._unread: list[Tensor] = []  # sums of micro-batches, which the device has yet to compute
        self._step = _Fetched()
        self._ahead = _Fetched()
        self._planned: list[Callable[[int], float]] = []  # the schedule, where `fall` has replaced it
        self.steps, self.begin, self.rows_a_step = steps, begin, cfg.batch_size
        self.max_norm, self._norm, self._rate = cfg.max_grad_norm, 0.0, cfg.lr
        self.course = course
        self.stop = stop
        self.on_policy = on_policy
        # Kept, it would have the model's special tokens rewritten to match, and a copy saved with each checkpoint.
        self.processing_class, self.tokenizer = None, tokenizer
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if self.accelerator.num_processes != dist.world_size():
            raise TrainingError(
                f"{dist.world_size()} processes were launched, and accelerate sees {self.accelerator.num_processes}: "
                "each would train alone on the same data. Launch with one of the files in launch/"
            )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, and the scored tokens in them, over all processes."""
        if self._ahead.of is epoch_iterator:
            batches = self._ahead.batches
        else:
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step, self._ahead = _Fetched(epoch_iterator, num_batches, batches), _Fetched()
        self.course.begin_step()
        self._rate = schedule_of(self.lr_scheduler).optimizer.param_groups[0]["lr"]
        # Of the step's number alone, so a training that goes on, or back, has the weights of a straight one.
        self.distiller.stand_at(self.state.global_step / self.steps, self.course.totals.focus_mean())
        if self.on_policy is not None:
            # A loader brings its batches to the device; graphs take none that lies elsewhere.
            batches = [self._prepared(batch) for batch in self._own_text(batches)]
        tokens = torch.zeros((), dtype=torch.int64, device=device)
        for batch in batches:
            tokens += scored_tokens(batch["labels"]).to(device)
        return batches, self.accelerator.reduce(tokens, "sum")

    def _own_text(self, batches: Sequence[Numbers]) -> list[Batch]:
        """The batches that numbers of rows stand for; the pruned model writes what is not written yet."""
        assert self.on_policy is not None

        def write(prompts: Sequence[str], source: PrunedText, seed: tuple[int, ...], title: str) -> list[list[int]]:
            try:
                with self.stop.immediately(), self.generating(), self.distiller.twin.folded():
                    return write_together(self.adapted, self.tokenizer, prompts, source, seed, title)
            except StopRequested as stop:
                self.stop.agreed = stop.signal_number
                raise Interrupted from None

        return self.on_policy.fill(batches, self.state.global_step, write)

    def _prepare_next(self, graphs: GraphedPasses) -> None:
        """Have the device begin with the next step's first batch, while the host is busy with the end of this one."""
        if self.on_policy is not None or self.state.global_step + 1 >= self.steps:
            return
        batches, _ = super().get_batch_samples(self._step.of, self._step.count, self.args.device)
        self._ahead = _Fetched(self._step.of, self._step.count, batches)
        if batches:
            graphs.prepare(batches[0])

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch forward and backward; after the last one of a step, whether the step may be made."""
        if self.graphs is not None and self.graphs.takes(inputs):
            scale = self._scale(num_items_in_batch)
            sums: Any = self.graphs.step(self._prepared(inputs), scale)
            self._count(sums)
            loss = (sums["loss"] * scale).detach()
        else:
            if self.graphs is not None:
                self.graphs.bring_gradients()
            # Around backward too: blocks that are checkpointed run once more there.
            with attending(self.distiller.packs if "packing" in inputs else (), PACKED_NAME):
                loss = super().training_step(model, inputs, num_items_in_batch)
        in_order = self.course.skips.found is None
        if self.accelerator.sync_gradients:
            in_order = self._judge_step()
        return loss if in_order else torch.zeros_like(loss)  # transformers adds it to a sum of its own

    def _prepared(self, batch: Batch) -> Batch:
        """On the device, as transformers has it."""
        inputs: Any = batch
        prepared: Any = self._prepare_inputs(inputs)
        return prepared

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This micro-batch's part of the mean loss per token, as autograd must see it."""
        assert not return_outputs
        sums = model(**self.distiller.given(inputs), distill=self.distiller)
        self._count(sums)
        return scaled(sums["loss"], self._scale(num_items_in_batch))

    def _scale(self, num_items_in_batch: Any) -> Tensor:
        """What the sum of a micro-batch's loss is multiplied by."""
        # Gradients are averaged over processes, by DDP and DeepSpeed alike, and this is a sum over them.
        scale = self.accelerator.num_processes / num_items_in_batch.clamp_min(1)
        # Where one process met a NaN, every gradient of the step is to be one: DeepSpeed then skips it by itself.
        return scale if self.course.skips.found is None else scale * math.nan

    def _count(self, sums: dict[str, Tensor]) -> None:
        """Add to the totals of all processes; learn on the way whether any met a NaN or was asked to stop.

        Sums that nobody needs before the optimizer step wait for `_judge_step`. DeepSpeed needs them before backward,
        several processes have to agree on a stop.
        """
        values = [sums[name].detach().double() for name in self.course.totals.names]
        values.append(torch.full_like(values[0], self.stop.requested))
        last, alone = self.accelerator.sync_gradients, self.accelerator.num_processes == 1
        if self.zero_engine is None and (last or (alone and not self.stop.requested)):
            self._unread.append(torch.stack(values))
            return
        summed: Any = self.accelerator.reduce(torch.stack(values), "sum")
        self._add(summed.tolist())

    def _add(self, summed: list[float]) -> None:
        *numbers, stop = summed
        if stop:
            self.stop.agreed = self.stop.requested or signal.SIGTERM
            if not self.accelerator.sync_gradients:
                raise Interrupted  # a step of many micro-batches may outlast the time until we are killed
        total: dict[str, float] = dict(zip(self.course.totals.names, numbers, strict=True))
        if all(map(math.isfinite, numbers)):
            self.course.totals.add(total)
            return
        shown = ", ".join(f"{name} {value:g}" for name, value in total.items() if not math.isfinite(value))
        self.course.skips.found = f"the loss is not finite ({shown})"

    def _judge_step(self) -> bool:
        """Before an optimizer step: whether its gradient is finite on every process. If not it is thrown away.

        DeepSpeed has made its step by now, or has seen that the norm is not finite and left it out. Elsewhere the
        gradient is clipped here, and the device is waited for once.
        """
        skips, engine = self.course.skips, self.zero_engine
        if engine is None:
            undone, bad = True, self._clip_and_read()
        else:
            norm = engine.get_global_grad_norm()
            self._norm = float("nan") if norm is None else float(norm)
            undone = self.accelerator.optimizer_step_was_skipped
            mine = undone or not (norm is None or math.isfinite(norm))
            summed: Any = self.accelerator.reduce(torch.tensor(float(mine), device=self.args.device), "sum")
            bad = bool(summed.item())
        if bad and skips.found is None:
            skips.found = "the gradient is not finite, though the loss is"
        wrong = skips.found is not None
        self.course.end_step(self.state.global_step + 1, self.adapted, undone=undone)
        if wrong:
            self.adapted.zero_grad(set_to_none=True)  # a step without gradients changes nothing, moments included
        return not wrong

    def _clip_and_read(self) -> bool:
        """Clip the gradient, read what the device has summed up; whether the gradient is not finite on any process."""
        norm = self._clip()
        unread, self._unread = self._unread, []
        summed: Any = self.accelerator.reduce(torch.cat([*unread, norm.to(unread[0])[None]]), "sum")
        copied = _Copied(summed)
        if self.graphs is not None:
            self._prepare_next(self.graphs)
        *numbers, norms = copied.read()
        self._norm = norms / self.accelerator.num_processes  # the same on each, as DDP has averaged the gradients
        for start in range(0, len(numbers), len(unread[0])):
            self._add(numbers[start : start + len(unread[0])])
        return not math.isfinite(norms)

    def _clip(self) -> Tensor:
        """Clip all gradients together to `max_norm`; their norm before.

        By a norm that is not finite nothing is clipped: which gradients are not finite is still to be found.
        """
        flat = [] if self.graphs is None else [self.graphs.flat]
        held = flat or [parameter.grad for parameter in self.trained if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(held)
        known = norm.nan_to_num(0.0, 0.0, 0.0)
        if flat:
            flat[0].mul_((self.max_norm / (known + 1e-6)).clamp(max=1.0))
        else:
            torch.nn.utils.clip_grads_with_norm_(self.trained, self.max_norm, known)
        return norm

    @contextmanager
    def graphed(self) -> Iterator[None]:
        """Inside, steps are replayed as CUDA graphs where they can be."""
        if self.is_deepspeed_enabled:
            yield
            return
        self.graphs = GraphedPasses(self.distiller, self.trained)
        try:
            yield
        finally:
            self.graphs.forget()
            self.graphs = None

    @contextmanager
    def light(self) -> Iterator[None]:
        """Inside, what is asked of all modules at each step does not go torch's long way through them."""
        if self.is_deepspeed_enabled:
            yield
            return
        ours: dict[str, Callable[..., Any]] = {"zero_grad": self._let_go}
        if plain_modes(self.adapted):
            ours["train"] = self._set_training
        vars(self.adapted).update(ours)
        try:
            yield
        finally:
            for name in ours:
                del vars(self.adapted)[name]

    def _set_training(self, mode: bool = True) -> Any:
        """`train` of the model; `eval` comes here too."""
        set_training(modules_below(self.adapted), mode)
        return self.adapted

    def _let_go(self, set_to_none: bool = True) -> None:
        """`zero_grad` of what is trained; the rest has no gradient."""
        for parameter in self.trained:
            parameter.grad = None

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clipped already (see `_judge_step`): the norm before."""
        return super()._clip_grad_norm(model) if self.zero_engine is not None else self._norm

    def log_step(self) -> None:
        """Of the step just made, losses as means per token over all processes; of a skipped step, only that it was.

        In place of transformers' own, which waits for the device to read a loss that is known already.
        """
        set_rate(self.lr_scheduler, self.state.global_step)  # DeepSpeed holds it back at a step that it skips
        self.course.totals.lr = float(self._rate)
        logs: dict[str, float] = {"learning_rate": self._rate}
        if self.course.skips.row:
            logs["skipped"] = self.course.skips.skipped
        else:
            logs |= {"grad_norm": self._norm, **self.course.totals.read_step()}
            if self.distiller.cfg.variance_until is not None:
                logs["variance_weight"] = self.distiller.weights.variance
        self.log(logs)

    def stand_at(self, step: int) -> None:
        """Go on as if `step` optimizer steps had been made: the step's number, the learning rate; text follows."""
        self.state.global_step = step
        set_rate(self.lr_scheduler, step)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """For the steps of the training, without the room that the trainer has for starting over.

        Behind a finished training the rate rises from zero and falls again, over the steps that came to it.
        """
        scheduler = super().create_scheduler(self.steps - self.begin, optimizer)
        if self.begin:
            schedule = schedule_of(scheduler)
            schedule.lr_lambdas = [_later(rate, self.begin) for rate in schedule.lr_lambdas]
        return scheduler

    def fall(self, begin: int | None, end: int = 0) -> None:
        """From step `begin` on the rate falls in a straight line to zero at step `end`; None: as it was planned."""
        schedule = schedule_of(self.lr_scheduler)
        planned = self._planned or list(schedule.lr_lambdas)
        self._planned = planned
        schedule.lr_lambdas = planned if begin is None else [_falling(rate, begin, end) for rate in planned]
        set_rate(self.lr_scheduler, self.state.global_step)

    def _save_checkpoint(self, *_: Any, **__: Any) -> None:
        """All that a resume needs is in ours; transformers' cannot go to another number of processes."""
        self.save()

    @property
    def held(self) -> Trained:
        """What the training changes, for a checkpoint."""
        engine = self.zero_engine
        return Trained(self.adapted, self.optimizer, self.average, engine, self.engine, self.args.device)

    def save(self, *, interrupted: bool = False) -> None:
        """Publish a checkpoint; if `interrupted` within a step, of the moment before that step."""
        self.course.save(self.state.global_step, self.held, interrupted=interrupted)

    def resume(self) -> None:
        """Go on from the newest checkpoint that verifies, or begin."""
        self.stand_at(self.course.begin(self.state.global_step, self.held))

    def go_back(self) -> None:
        """Return to the newest checkpoint of a moment when all was in order.

        Raises:
            TrainingError: it would not help, or did not.
        """
        with self.generating():  # where they are whole
            frozen = not_finite(frozen_weights(self.adapted))
        self.stand_at(self.course.go_back(self.held, frozen))

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        # In training order, from the step that is next: drawn ones would have to be brought back to their state.
        return RowsToCome(self)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: checkpoints here are for resuming only."""

    def _send_telemetry(self) -> None:
        """None: a training run makes no network request of its own."""

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not counted: transformers' estimate walks all parameters at each step and knows neither view of the twin."""
        return 0

    def peak_memory(self) -> int | None:
        """Most bytes that this process had on its GPU; None on a CPU."""
        if not torch.cuda.is_available():
            return None
        stored = self.shards or stored_in(self.distiller.twin.base)
        return torch.cuda.max_memory_allocated() + (stored.bytes_elsewhere if stored else 0)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Inside, every process holds the whole model, outside of the engine: what generation needs."""
        if self.shards is not None:
            with self.shards.whole():
                yield
            return
        if not self.is_zero3:
            yield
            return
        with zero.outside(self.model_wrapped):
            yield

    @property
    def is_zero3(self) -> bool:
        """Whether parameters are dealt out over the processes."""
        plugin = self.accelerator.state.deepspeed_plugin
        return plugin is not None and plugin.zero_stage == 3

    @property
    def zero_engine(self) -> Any:
        """DeepSpeed's engine, or None."""
        return self.model_wrapped if self.is_deepspeed_enabled else None

    @property
    def engine(self) -> str:
        """In words, for who reads a checkpoint."""
        plugin = self.accelerator.state.deepspeed_plugin
        return "plain" if plugin is None else f"DeepSpeed zero{plugin.zero_stage}"


class RowsToCome(torch.utils.data.Sampler):
    """Numbers of the rows from the trainer's next step on, each time it is gone through."""

    def __init__(self, trainer: RecoverTrainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.trainer.state.global_step * self.trainer.rows_a_step, len(self)))

    def __len__(self) -> int:
        return self.trainer.steps * self.trainer.rows_a_step


def _later(rate: Callable[[int], float], begin: int) -> Callable[[int], float]:
    return lambda step: rate(max(0, step - begin))


def _falling(rate: Callable[[int], float], begin: int, end: int) -> Callable[[int], float]:
    return lambda step: rate(step) if step < begin else rate(begin) * max(0.0, (end - step) / (end - begin))


def schedule_of(scheduler: Any) -> Any:
    """torch's own, out of what accelerate or DeepSpeed put around it."""
    return getattr(scheduler, "scheduler", scheduler)


def set_rate(scheduler: Any, step: int) -> None:
    """The learning rate that a straight training has after `step` optimizer steps, skipped ones included."""
    schedule = schedule_of(scheduler)
    schedule.last_epoch = step
    parts = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
    for group, base, rate in parts:
        group["lr"] = base * rate(step)
