"""The part of a recipe that says how the pruned model is recovered: text, adapters, loss, training.

Then how its batches fall to the processes of a launch, and what of it a launch refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_serializer, model_validator

from recover.base import dist
from recover.base.artifacts import JsonObject
from recover.base.errors import TrainingError
from recover.config.base import Config
from recover.config.loss import TERMS, Loss


class _Written(Config):
    """What holds for text that a model writes from prompts, whichever writes it.

    A row's prompt is a text, or a conversation (`messages`) whose last answer is written anew. Rows that hold none, and
    prompts that leave no room for an answer within `train.length`, are left out and counted.
    """

    kind: Literal["dense", "pruned"]
    prompts: str
    subset: str | None = Field(default=None, description="configuration of a data set")
    split: str = Field(default="train", description="of a data set")
    column: str | None = Field(default=None, description="of text or messages; default: `prompt`, else `messages`")
    strict: bool = Field(default=False, description="refuse a row that would be left out")
    share: float = Field(default=1.0, gt=0, description="part of the tokens, relative to the other sources")
    temperature: float = Field(default=1.0, ge=0, description="0 = greedy")
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=256, ge=1)
    chat: bool | None = Field(
        default=None, description="wrap prompts in the chat template; default: if the tokenizer has one"
    )
    batch_size: int = Field(default=64, ge=1)


class DenseText(_Written):
    """Text that the dense model writes itself, from prompts: rows with a `prompt`, or with `messages`.

    Of messages the last answer is written anew. Rows that hold no prompt, and prompts that leave no room for an answer
    within `train.length`, are left out and counted.
    """

    kind: Literal["dense"] = "dense"


class PrunedText(_Written):
    """Text that the pruned model writes while it learns, scored by the dense one: on-policy (GKD, arXiv 2306.13649).

    `share` is GKD's lambda.
    """

    kind: Literal["pruned"] = "pruned"
    start: float = Field(
        default=0.0, ge=0, lt=1, description="part of the steps that is left to the other sources before it begins"
    )
    every: int = Field(
        default=16, ge=1, description="steps whose texts are written at once: more is faster, and staler by so many"
    )
    first_new_tokens: int | None = Field(
        default=None,
        ge=1,
        description="longest text at `start`; from there to the last step it grows linearly to `max_new_tokens`, so "
        "that contexts stay near the dense model's while the pruned one still goes astray; null: as long throughout",
    )
    cut_loops: bool = Field(
        default=False,
        description="a text that ends in a loop is learnt up to the first token of its second turn, where it decides",
    )

    @model_validator(mode="after")
    def _grows(self) -> PrunedText:
        if self.first_new_tokens is not None and self.first_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"first_new_tokens: {self.first_new_tokens} is more than max_new_tokens, {self.max_new_tokens}, to "
                "which it grows: lower it, or raise that"
            )
        return self

    def longest_at(self, share: float) -> int:
        """Most tokens of a text that is written after this part of the steps."""
        if self.first_new_tokens is None:
            return self.max_new_tokens
        grown = max(0.0, share - self.start) / (1 - self.start)
        return round(self.first_new_tokens + grown * (self.max_new_tokens - self.first_new_tokens))


class GivenText(Config):
    """Text as it is: a file of rows (JSONL, JSON, CSV, TSV, parquet, Arrow), a text file, or a data set.

    Rows that hold nothing, or nothing to learn within `train.length`, are left out and counted.
    """

    kind: Literal["given"] = "given"
    source: str
    subset: str | None = Field(default=None, description="configuration of a data set, as wikitext-2-raw-v1")
    split: str = Field(default="train", description="of a data set")
    strict: bool = Field(default=False, description="refuse a row that would be left out")
    columns: dict[Literal["text", "prompt", "completion", "messages"], str] = Field(
        default={"text": "text"},
        description="which column holds what; prompt and completion may be messages, of which the completion's are "
        "learnt",
    )
    share: float = Field(default=1.0, gt=0)


class TeacherText(Config):
    """Text with what a teacher that is not at hand said of it: JSONL, which `recover teacher` writes.

    A row: `input_ids`; `completion_mask`, 1 for each token that is learnt (default: all); and for each of those but a
    first token `top_ids` and `top_logprobs`, the k likeliest tokens and their log-probabilities at temperature 1, k the
    same throughout. What is left of the probability is one class more. `tokenizer`, the marks of the teacher's: another
    vocabulary, or other merges, than the model's own are refused; rows without it are taken with a warning.
    """

    kind: Literal["teacher"] = "teacher"
    source: str


Data = Annotated[DenseText | PrunedText | GivenText | TeacherText, Field(discriminator="kind")]


class Lora(Config):
    """Low-rank adapters on the linear layers of the kept blocks (arXiv 2106.09685); of mixtures, what `parts` names."""

    rank: int = Field(default=16, ge=1, description="auto, or the rank")
    parts: tuple[Literal["linears", "experts", "router", "shared"], ...] = Field(
        default=("linears",),
        min_length=1,
        description="what learns: adapters on linear layers (beside experts: of attention), adapters on the matrices "
        "of experts, routers as they are, without adapters (alone: Router-KD, arXiv 2603.02217), and adapters on the "
        "linear layers of shared experts and of MLPs in blocks without experts",
    )
    alpha: float | None = Field(
        default=None,
        gt=0,
        description="auto, or the scale of the update times the rank; default: 2 x rank, with which a higher rank "
        "takes larger steps at the same rate. auto: the same for every rank, so that one rate serves all",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1)
    blocks: Literal["all", "after_cut"] = Field(
        default="all",
        description="after_cut: only behind the first dropped block; what lies before runs once for both views",
    )

    @model_validator(mode="after")
    def _dropout_of_linears(self) -> Lora:
        if self.dropout and "experts" in self.parts:
            raise ValueError("'dropout' is for linear layers: experts see no dropped-out input, so leave it 0")
        return self


class StopEarly(Config):
    """End a training when more tokens no longer buy generation: after epochs that brought none, the rate falls to zero.

    Generation is measured while the rate is still high, and the fall brings much of it: so the training does not end
    at once.
    """

    patience: int = Field(default=1, ge=1, description="epochs in a row that brought less than `gain`")
    gain: float = Field(default=0.01, ge=0, lt=1, description="rise over the best epoch before, 0.01: a point")
    decay: float = Field(
        default=0.1, ge=0, lt=1, description="over so many more steps, as a share of those made; 0: it ends at once"
    )


class Cache(Config):
    """Hidden states of the dense model on disk: training then leaves the dense pass out, and the loss is the same.

    `plan` says how large they get. They are filled before training and known by their text, so they pay where text is
    read again: other seeds, learning rates or prunings, a resumed run.
    """

    folder: str = Field(description="where they lie; several runs may share it, at the same time too")
    prefix: bool = Field(
        default=False,
        description="also what the shared blocks put out, which then are not run; needs `lora.blocks` after_cut",
    )


# Fields of `Train` that take `auto`, dotted where they lie deeper.
AUTO = ("tokens", "batch_size", "lr", "warmup", "scheduler", "lora.rank", "lora.alpha")


class Train(Config):
    """LoRA distillation from the dense model; the checkpoint that generates best is kept.

    Fields whose meaning begins with `auto` take that word for a value: `plan` then says what is taken, and why
    (`recover/config/defaults.py`); the rate of `lr: auto` is found when training begins.
    """

    epochs: int = Field(
        default=3,
        ge=1,
        description="equal parts of the tokens; generation is measured after each. Of a training that is lengthened "
        "all together; unchanged, new ones are about as long",
    )
    tokens: int = Field(
        default=200_000,
        ge=1,
        description="auto, or teacher-scored tokens over all epochs. Raised when a training is finished, that goes on "
        "behind its last step, optimizer and all, with the text that is new: the rate rises again (`warmup` of the "
        "new steps) and falls to zero anew. Not with text of kind `pruned`, nor with `loss.variance_until`",
    )
    data: tuple[Data, ...] = Field(min_length=1)
    length: int = Field(default=512, ge=8, description="longest sequence, in tokens")
    batch_size: int = Field(default=16, ge=1, description="auto, or sequences per optimizer step, over all processes")
    micro_batch_size: int | None = Field(
        default=None, ge=1, description="sequences a process holds at once; default: all of its share"
    )
    lora: Lora = Lora()
    loss: Loss = Loss()
    lr: float = Field(
        default=2e-4,
        gt=0,
        description="auto, or the highest learning rate. auto: short trainings of a few rates on the run's own first "
        "text, within a twentieth of `tokens` more, judged by KL on text that they have not seen; where that is too "
        "little for them, what models of this width took",
    )
    warmup: float = Field(default=0.05, ge=0, lt=1, description="auto, or the share of the steps")
    scheduler: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="auto, or how the rate goes on after `warmup`: to zero, or as it is"
    )
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    average: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="each epoch's adapter is the mean of those after its last steps: so many, as a share of all steps, "
        "at most 1 / epochs (0.2: the last fifth). Training goes on from the adapter as it is; null: that one is kept",
    )
    gradient_checkpointing: bool = Field(default=False, description="less memory, about a third more time")
    shard_weights: bool = Field(
        default=False,
        description="while training, each process keeps a share of the frozen weights only, and reads blocks ahead",
    )
    patience: int | None = Field(
        default=None, ge=1, description="stop after so many epochs without better generation; default: never"
    )
    stop: StopEarly | None = Field(
        default=None, description="end early, with a fall of the rate, when generation rises no more; null: never"
    )
    save_steps: int | None = Field(
        default=None, ge=1, description="steps between checkpoints to resume from; default: each epoch"
    )
    cache: Cache | None = Field(
        default=None, description="the dense model's states on disk; null: computed in each step"
    )

    @field_validator("lr")
    @classmethod
    def _trains(cls, rate: float) -> float:
        """A step moves each weight of an adapter by about the rate: from 1 on nothing is left of what was learnt."""
        if not rate <= 1:
            raise ValueError(
                f"found {rate:g}: expected at most 1; adapters train at 1e-4 to 2e-3, and `auto` tries a few"
            )
        return rate

    _auto: tuple[str, ...] = PrivateAttr(default=())

    @model_validator(mode="wrap")
    @classmethod
    def _notes_what_is_auto(cls, value: Any, handler: Any) -> Train:
        """A field that is `auto` holds its default until it is settled, so that it is a number to all who read it."""
        if not isinstance(value, Mapping):
            return handler(value)
        tree, found = dict(value), []
        if isinstance(tree.get("lora"), Mapping):
            tree["lora"] = dict(tree["lora"])
        for name in AUTO:
            *above, last = name.split(".")
            part = tree.get(above[0]) if above else tree
            if isinstance(part, dict) and part.get(last) == "auto":
                del part[last]
                found.append(name)
        made = handler(tree)
        made._auto = tuple(found)
        return made

    @model_serializer(mode="wrap")
    def _auto_as_it_is_written(self, handler: Any) -> JsonObject:
        tree = handler(self)
        for name in self._auto:
            *above, last = name.split(".")
            part = tree.get(above[0], {}) if above else tree
            if last in part:
                part[last] = "auto"
        return tree

    @property
    def auto(self) -> tuple[str, ...]:
        """The fields that are `auto`, and not settled yet."""
        return self._auto

    @property
    def teacher(self) -> TeacherText | None:
        """The file that stands in for the dense view, if one does."""
        return next((source for source in self.data if isinstance(source, TeacherText)), None)

    @property
    def pruned(self) -> list[PrunedText]:
        """The sources that the pruned model writes itself."""
        return [source for source in self.data if isinstance(source, PrunedText)]

    @property
    def starts(self) -> list[float]:
        """Of each source, the part of the steps before its text comes."""
        return [source.start if isinstance(source, PrunedText) else 0.0 for source in self.data]

    @property
    def shares(self) -> list[float]:
        """Of each source; a teacher's file, which stands alone, has the whole."""
        return [1.0 if isinstance(source, TeacherText) else source.share for source in self.data]

    @property
    def budgets(self) -> list[int]:
        """Tokens of each source."""
        return [round(self.tokens * share / sum(self.shares)) for share in self.shares]

    @model_validator(mode="after")
    def _teacher_knows_little(self) -> Train:
        if self.teacher is None:
            return self
        if self.pruned:
            raise ValueError(
                "data: text of kind 'pruned' is not in a teacher's file, which knows its own text only: leave one of "
                "the two out"
            )
        unknown = [term.field for term in TERMS.values() if not term.top_k and self.loss.weight(term.name) > 0]
        if unknown or self.loss.temperature != 1:
            what = " and ".join(f"loss.{name}" for name in unknown or ["temperature"])
            raise ValueError(f"{what}: needs the whole distribution, and a teacher's file has its top k: use kl and ce")
        if self.loss.focus is not None and self.loss.focus.by == "entropy":
            raise ValueError(
                "loss.focus.by: dense's entropy needs the whole distribution, and a teacher's file has its top k: use "
                "disagreement or kl"
            )
        if len(self.data) > 1 or self.cache is not None or self.loss.scored == "all":
            raise ValueError(
                "data: a teacher's file stands alone: it says what is learnt (no loss.scored all), in place of the "
                "dense view (no train.cache), and of all text (no other source)"
            )
        return self

    @model_validator(mode="after")
    def _own_text_is_no_model(self) -> Train:
        if self.pruned and self.loss.ce > 0:
            raise ValueError(
                "loss.ce: cross-entropy on text of kind 'pruned' would teach the pruned model its own mistakes: leave "
                "it 0, or leave that text out"
            )
        return self

    @model_validator(mode="after")
    def _cached_text_is_known(self) -> Train:
        if self.cache is None:
            return self
        if self.pruned:
            raise ValueError(
                "cache: is filled before the first step, and text of kind 'pruned' is written while the model learns: "
                "leave train.cache or that text out"
            )
        if self.cache.prefix and self.lora.blocks != "after_cut":
            raise ValueError("cache.prefix: both views share no block unless lora.blocks is 'after_cut'")
        return self

    @model_validator(mode="after")
    def _averages_within_epochs(self) -> Train:
        """An epoch's mean holds none of the steps before it."""
        if self.average is not None and self.average * self.epochs > 1 + 1e-9:
            raise ValueError(
                f"average: {self.average:g} of all steps is more than one of {self.epochs} epochs has: give at most "
                f"{1 / self.epochs:.3g}, or fewer epochs"
            )
        return self

    @model_validator(mode="after")
    def _begins_with_something(self) -> Train:
        """Before a pruned source's `start`, the other sources must fill the steps."""
        for start in {*self.starts} - {0.0}:
            others = sum(share for share, own in zip(self.shares, self.starts, strict=True) if own < start)
            there = others / sum(self.shares)
            if there < start:
                raise ValueError(
                    f"data: text of kind 'pruned' starts after {start:.0%} of the steps, and the other sources hold "
                    f"{there:.0%} of the tokens: lower its start or its share"
                )
        return self


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
