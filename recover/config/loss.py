"""The distillation loss: its terms, a record each, and the part of a recipe that weighs them; no torch.

A term is a `LossTerm` here and a formula in `recover/distill/loss_terms.py`, whose table says what each is. Weights,
logs, training curves and checkpoints go through the records. A term of another package is registered, and gets its
weight from `train.loss.terms`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from recover.base.artifacts import JsonObject
from recover.config.base import Config

FORMULAS = "recover.distill.loss_terms"
# What else a line of a training's log holds, and what a term may therefore not be called.
TAKEN = ("epoch", "grad_norm", "learning_rate", "loss", "lr", "peak_memory_bytes", "seconds", "skipped", "step")
TAKEN += ("tokens", "total", "variance_weight")


@dataclass(frozen=True)
class LossTerm:
    """One term of the loss, all that is known of it without a model.

    `name`: of its weight in `train.loss` (in `train.loss.terms`, if another package registers it), and of its mean
    per token in logs. `label` and `style`: its name and its line (classes of `style.css`) in the report. `formula`:
    `module:function`, a `recover.distill.loss_terms.Formula`. `divergence`: between two distributions at the
    temperature T, so multiplied by T^2. `blind`: to tokens that the pruned model raises, so no loss on its own.
    `always`: computed and logged without a weight too. `labels`: needs the text's own next tokens. `top_k`: is formed
    from a teacher's k likeliest tokens as well (`topk_terms`), which no term of another package is.
    """

    name: str
    label: str
    formula: str
    style: str = "thin dotted"
    divergence: bool = True
    blind: bool = False
    always: bool = False
    labels: bool = False
    top_k: bool = False

    @property
    def field(self) -> str:
        """Where its weight stands, in `train.loss`."""
        return self.name if self.name in Loss.model_fields else f"terms.{self.name}"


def _ours(name: str, label: str, style: str, **more: bool) -> LossTerm:
    return LossTerm(name, label, f"{FORMULAS}:{name}", style, **more)


# In the order in which they are added up, logged and shown.
TERMS: dict[str, LossTerm] = {
    term.name: term
    for term in (
        _ours("kl", "KL", "line", always=True, top_k=True),
        _ours("variance", "variance", "thin dashed", always=True, blind=True),
        _ours("reverse_kl", "reverse KL", "line dashed", always=True),
        _ours("variance_r", "variance over r", "thin dotted", blind=True),
        _ours("jsd", "Jensen-Shannon", "line dotted"),
        _ours("ce", "cross-entropy", "thin", divergence=False, always=True, labels=True, top_k=True),
    )
}


def register(term: LossTerm) -> LossTerm:
    """Make a term of another package known, to recipes, trainings and reports.

    Raises:
        ValueError: its name is taken, or is no name of a field; or it claims `top_k`.
    """
    if term.name in (*TERMS, *Loss.model_fields, *TAKEN):
        raise ValueError(f"loss term {term.name!r}: the name is taken: give another")
    if not term.name.isidentifier():
        raise ValueError(f"loss term {term.name!r}: expected a name of letters, digits and underscores")
    if term.top_k:
        raise ValueError(f"loss term {term.name!r}: top_k: a teacher's file has formulas for the built-in terms only")
    TERMS[term.name] = term
    return term


class Focus(Config):
    """How much each scored position counts: the measure `by`, to the power of `power`, over its mean.

    A few positions decide whether a text goes on as dense would write it, and most of the others agree already. A
    position's whole loss is multiplied; the weight itself carries no gradient. The mean is a running one over the
    tokens of the last optimizer steps (some 10), so the weights are 1 on average; in the first step each is 1.
    """

    by: Literal["disagreement", "kl", "entropy"] = Field(
        default="disagreement",
        description=r"disagreement: 1 - sum min(p, q), how often two draws from dense and pruned, coupled as well as "
        r"can be, part here; kl: KL(dense \|\| pruned); entropy: dense's, which is high where a text may branch",
    )
    power: float = Field(default=1.0, gt=0, description="above 1: sharper; below: flatter")


class Loss(Config):
    """Weights of the terms; T = temperature; every term is multiplied by T^2 but CE (Hinton's convention).

    p, q: probabilities of the dense and of the pruned model. No variance beside KL brought generation where tried
    (docs/results.md); a larger learning rate did.
    """

    kl: float = Field(default=1.0, ge=0, description=r"KL(dense \|\| pruned)")
    variance: float = Field(default=0.0, ge=0, description="Var_p(dz) / 2T^2, its second-order form")
    variance_until: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="part of the steps over which the weight `variance` falls linearly to 0; null: it stays as it is",
    )
    variance_r: float = Field(
        default=0.0, ge=0, description="Var_r(dz) / 2T^2, r = p^2 normalised: second-order form of 1 - cos(p, q)"
    )
    reverse_kl: float = Field(default=0.0, ge=0, description=r"KL(pruned \|\| dense)")
    jsd: float = Field(
        default=0.0, ge=0, description=r"Jensen-Shannon: b KL(p \|\| m) + (1 - b) KL(q \|\| m), m = b p + (1 - b) q"
    )
    jsd_beta: float = Field(default=0.5, gt=0, lt=1, description="b of `jsd`, the weight of the dense side")
    ce: float = Field(default=0.0, ge=0, description="cross-entropy on the text itself")
    terms: dict[str, float] = Field(
        default={}, description="weights of terms that another package has registered (`recover.config.loss.register`)"
    )
    temperature: float = Field(default=1.0, ge=0.01)
    focus: Focus | None = Field(default=None, description="which positions count more; null: each the same")
    scored: Literal["completion", "all"] = Field(default="completion", description="which positions carry loss")
    chunk: int = Field(default=2048, ge=1, description="most token positions scored at once; a matter of memory only")

    @field_validator("terms")
    @classmethod
    def _are_registered(cls, weights: dict[str, float]) -> dict[str, float]:
        for name, weight in weights.items():
            if name in cls.model_fields:
                raise ValueError(f"{name!r} is a field of the loss: give 'loss.{name}'")
            if name not in TERMS:
                others = ", ".join(known for known in TERMS if known not in cls.model_fields) or "none"
                raise ValueError(f"no term {name!r} is registered; registered are: {others}")
            if weight < 0:
                raise ValueError(f"{name}: {weight:g}: expected a weight of at least 0")
        return weights

    @model_validator(mode="after")
    def _something_to_learn(self) -> Loss:
        weighted = [term for term in TERMS.values() if self.weight(term.name) > 0]
        sees_all = sum(self.weight(term.name) for term in weighted if not term.blind)
        blind = [term.name for term in weighted if term.blind]
        if sees_all == 0 and not blind:
            raise ValueError("all loss weights are 0: nothing would be learnt")
        if sees_all == 0:
            alone = " and ".join(blind) + (" alone is" if len(blind) == 1 else " alone are")
            raise ValueError(f"{alone} blind to tokens that the student raises: give 'kl' a weight beside it")
        if self.variance_until is not None and self.variance == 0:
            raise ValueError(
                "'variance_until' says when 'variance' ends, which is 0: give it a weight, or leave it out"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_before_there_were_terms(self, dump: SerializerFunctionWrapHandler) -> JsonObject:
        """Without `terms` where there are none: what a run of an earlier version was made from reads the same."""
        fields = dump(self)
        return fields if self.terms else {name: value for name, value in fields.items() if name != "terms"}

    def weight(self, name: str) -> float:
        """Of this term."""
        return getattr(self, name) if name in type(self).model_fields else self.terms.get(name, 0.0)

    def at(self, share: float) -> Loss:
        """The weights of a step before which this part of the steps was made: as here, but `variance` as far faded."""
        if self.variance_until is None:
            return self
        left = max(0.0, 1.0 - share / self.variance_until)
        return self.model_copy(update={"variance": self.variance * left, "variance_until": None})
