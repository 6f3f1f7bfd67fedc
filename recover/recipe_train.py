"""The part of a recipe that says how the pruned model is recovered: text, adapters, loss, training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from recover.leaf import Leaf


class DenseText(Leaf):
    """Text that the dense model writes itself, from prompts (JSONL, `prompt` column)."""

    kind: Literal["dense"]
    prompts: str
    share: float = Field(default=1.0, gt=0, description="part of the tokens, relative to the other sources")
    temperature: float = Field(default=1.0, ge=0, description="0 = greedy")
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=256, ge=1)
    chat: bool | None = Field(
        default=None, description="wrap prompts in the chat template; default: if the tokenizer has one"
    )
    batch_size: int = Field(default=64, ge=1)


class PrunedText(Leaf):
    """Text that the pruned model writes while it learns, scored by the dense one: on-policy (GKD, arXiv 2306.13649)."""

    kind: Literal["pruned"]
    prompts: str
    share: float = Field(
        default=1.0, gt=0, description="part of the tokens, relative to the other sources; GKD's lambda"
    )
    start: float = Field(
        default=0.0, ge=0, lt=1, description="part of the steps that is left to the other sources before it begins"
    )
    every: int = Field(
        default=16, ge=1, description="steps whose texts are written at once: more is faster, and staler by so many"
    )
    temperature: float = Field(default=1.0, ge=0, description="0 = greedy")
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=256, ge=1)
    chat: bool | None = Field(
        default=None, description="wrap prompts in the chat template; default: if the tokenizer has one"
    )
    batch_size: int = Field(default=64, ge=1)


class GivenText(Leaf):
    """A `datasets` source: hub id, `.jsonl`, `.parquet` or `.txt` file."""

    kind: Literal["given"]
    source: str
    split: str = "train"
    columns: dict[Literal["text", "prompt", "completion", "messages"], str] = Field(default={"text": "text"})
    share: float = Field(default=1.0, gt=0)


Data = Annotated[DenseText | PrunedText | GivenText, Field(discriminator="kind")]


class Lora(Leaf):
    rank: int = Field(default=16, ge=1)
    alpha: float | None = Field(default=None, gt=0, description="default: 2 x rank")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    blocks: Literal["all", "after_cut"] = Field(
        default="all",
        description="after_cut: only behind the first dropped block; what lies before runs once for both views",
    )


class Loss(Leaf):
    """Weights of the terms; T = temperature; every term is multiplied by T^2 but CE (Hinton's convention).

    p, q: probabilities of the dense and of the pruned model. Close to the dense model a variance beside KL does what a
    larger learning rate does: compare it with that.
    """

    kl: float = Field(default=1.0, ge=0, description=r"KL(dense \|\| pruned)")
    variance: float = Field(default=0.0, ge=0, description="Var_p(dz) / 2T^2, its second-order form")
    variance_r: float = Field(
        default=0.0, ge=0, description="Var_r(dz) / 2T^2, r = p^2 normalised: second-order form of 1 - cos(p, q)"
    )
    reverse_kl: float = Field(default=0.0, ge=0, description=r"KL(pruned \|\| dense)")
    jsd: float = Field(
        default=0.0, ge=0, description=r"Jensen-Shannon: b KL(p \|\| m) + (1 - b) KL(q \|\| m), m = b p + (1 - b) q"
    )
    jsd_beta: float = Field(default=0.5, gt=0, lt=1, description="b of `jsd`, the weight of the dense side")
    ce: float = Field(default=0.0, ge=0, description="cross-entropy on the text itself")
    temperature: float = Field(default=1.0, gt=0)
    scored: Literal["completion", "all"] = Field(default="completion", description="which positions carry loss")
    chunk: int = Field(default=2048, ge=1, description="most token positions scored at once; a matter of memory only")

    @model_validator(mode="after")
    def _something_to_learn(self) -> Loss:
        sees_all = self.kl + self.reverse_kl + self.jsd + self.ce
        blind = [name for name in ("variance", "variance_r") if getattr(self, name) > 0]
        if sees_all == 0 and not blind:
            raise ValueError("all loss weights are 0: nothing would be learnt")
        if sees_all == 0:
            alone = " and ".join(blind) + (" alone is" if len(blind) == 1 else " alone are")
            raise ValueError(f"{alone} blind to tokens that the student raises: give 'kl' a weight beside it")
        return self


class Recover(Leaf):
    """LoRA distillation from the dense model; the checkpoint that generates best is kept."""

    epochs: int = Field(default=3, ge=1, description="equal parts of the tokens; generation is measured after each")
    tokens: int = Field(default=200_000, ge=1, description="teacher-scored tokens over all epochs")
    data: tuple[Data, ...] = Field(min_length=1)
    length: int = Field(default=512, ge=8, description="longest sequence, in tokens")
    batch_size: int = Field(default=16, ge=1, description="sequences per optimizer step, over all processes")
    micro_batch_size: int | None = Field(
        default=None, ge=1, description="sequences a process holds at once; default: all of its share"
    )
    lora: Lora = Lora()
    loss: Loss = Loss()
    lr: float = Field(default=2e-4, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps")
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    gradient_checkpointing: bool = Field(default=False, description="less memory, about a third more time")
    patience: int | None = Field(
        default=None, ge=1, description="stop after so many epochs without better generation; default: never"
    )
    save_steps: int | None = Field(
        default=None, ge=1, description="steps between checkpoints to resume from; default: each epoch"
    )

    @model_validator(mode="after")
    def _own_text_is_no_model(self) -> Recover:
        if self.loss.ce > 0 and any(isinstance(source, PrunedText) for source in self.data):
            raise ValueError(
                "loss.ce: cross-entropy on text of kind 'pruned' would teach the pruned model its own mistakes: leave "
                "it 0, or leave that text out"
            )
        return self

    @model_validator(mode="after")
    def _begins_with_something(self) -> Recover:
        """Before a pruned source's `start`, the other sources must fill the steps."""
        whole = sum(source.share for source in self.data)
        starts = [source.start if isinstance(source, PrunedText) else 0.0 for source in self.data]
        for start in {*starts} - {0.0}:
            there = sum(source.share for source, own in zip(self.data, starts, strict=True) if own < start) / whole
            if there < start:
                raise ValueError(
                    f"data: text of kind 'pruned' starts after {start:.0%} of the steps, and the other sources hold "
                    f"{there:.0%} of the tokens: lower its start or its share"
                )
        return self
