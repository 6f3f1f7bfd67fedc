"""The part of a recipe that says how the model is pruned: one config a `kind`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    SerializeAsAny,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from recover.config.base import Config

N_M = re.compile(r"([1-9]\d{0,3}):([1-9]\d{0,3})")


@dataclass(frozen=True)
class DepthScore:
    """A score of depth pruning, all that is known of it without a model.

    `make`: `module:function` of (twin, batches) that gives a `recover.prune.depth.scores.Score`. `closing`: it is
    measured with the units really closed, so sets can be searched by it. `meaning`: what it is called below a figure,
    with `{unit}` for what goes.
    """

    name: str
    make: str
    closing: bool = False
    meaning: str = ""

    def says(self, unit: str) -> str:
        """What a low one means, for a unit called so."""
        return (self.meaning or f"the score {self.name}").format(unit=unit)


def _ours(name: str, make: str, **more: Any) -> DepthScore:
    return DepthScore(name, f"recover.prune.depth.scores:{make}", **more)


DEPTH_SCORES: dict[str, DepthScore] = {
    score.name: score
    for score in (
        _ours("kl", "kl_score", closing=True, meaning="mean KL to dense if that {unit} goes too"),
        _ours("variance", "variance_score", closing=True),
        _ours("perplexity", "Perplexity", closing=True),
        _ours("taylor", "TaylorScore"),
        _ours("angular", "angular_score"),
        _ours("block_influence", "influence_score"),
    )
}


def register_score(score: DepthScore) -> DepthScore:
    """Make a score of another package known, to recipes and reports. Raises ValueError if its name is taken."""
    if score.name in DEPTH_SCORES:
        raise ValueError(f"prune.score {score.name!r}: there is one of that name: give another")
    DEPTH_SCORES[score.name] = score
    return score


def _or_registered(value: Any, known: ValidatorFunctionWrapHandler) -> Any:
    return value if isinstance(value, str) and value in DEPTH_SCORES else known(value)


class Pruning(Config):
    """A way to prune. `kind` of a subclass is a Literal of one name; `module` is imported to find its `Pruner`."""

    module: ClassVar[str] = ""


class Calibration(Config):
    """Text on which scores are measured: a file of rows with a `text` column, a text file, or a data set.

    A column may hold messages too, which the chat template writes. With `answer` each text is a prompt (of messages,
    all but the last answer), and the dense model's own answer to it is measured on too. Prompts of the kind that the
    recovered model is for choose better than text of another kind (docs/results.md).
    """

    data: str
    subset: str | None = Field(default=None, description="configuration of a data set, as wikitext-2-raw-v1")
    split: str = Field(default="train", description="of a data set")
    column: str = "text"
    samples: int = Field(default=64, ge=1, description="sequences of `length` tokens")
    length: int = Field(default=512, ge=8, description="tokens a sample, capped here and not by the model's context")
    batch_size: int = Field(default=8, ge=1)
    answer: int | None = Field(
        default=None, ge=1, description="most tokens that the dense model writes after each text, greedily; null: none"
    )
    strict: bool = Field(
        default=False, description="refuse a row that would be left out: one that holds nothing, or (`answer`) too long"
    )


class Depth(Pruning):
    """Drop blocks or sublayers: `count` chosen by `score`, or the listed `blocks` (`sites` for `unit: sublayer`)."""

    module: ClassVar[str] = "recover.prune.depth.depth"
    kind: Literal["depth"] = "depth"
    unit: Literal["block", "attention", "mlp", "sublayer", "pair"] = Field(
        default="block",
        description="what goes as one: a block, one sublayer of it, (sublayer) attention and MLP apart, or (pair) an "
        "attention and an MLP next to it, of one block or of two: a block less is stored for each",
    )
    count: int | None = Field(default=None, ge=1, description="how many units go, chosen by `score`")
    blocks: tuple[int, ...] | None = Field(
        default=None, description="which go, from 0 (with `unit: mlp`, their MLPs); block 0 keeps its attention"
    )
    sites: tuple[Annotated[str, Field(pattern=r"^(attention|mlp):(0|[1-9]\d*)$")], ...] | None = Field(
        default=None, description="which go with `unit: sublayer`, as `attention:5` or `mlp:7`"
    )
    score: Annotated[
        Literal["kl", "variance", "perplexity", "taylor", "angular", "block_influence"], WrapValidator(_or_registered)
    ] = "kl"
    contiguous: bool = Field(default=False, description="drop one run of neighbours")
    iterative: bool | None = Field(
        default=None, description="score anew after each drop; null: with kl, variance and perplexity"
    )
    beam: int | None = Field(
        default=None,
        ge=2,
        description="sets carried from drop to drop, greedy's among them, at so many times the cost; null: that alone",
    )
    swap: bool = Field(
        default=False,
        description="after the drops, exchange one unit at a time for a better one until none lowers the score",
    )
    repair: Literal["none", "rescale", "linear"] = Field(
        default="none",
        description="folded into the sublayer before each cut: a factor a channel, or a whole matrix (ReplaceMe)",
    )
    calibration: Calibration | None = None

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Depth:
        if self.unit == "pair" and (self.blocks is not None or self.sites is not None):
            raise ValueError("unit: pair is chosen by 'count': list what goes as 'sites' with unit: sublayer")
        listed = "sites" if self.unit == "sublayer" else "blocks"
        other = "blocks" if self.unit == "sublayer" else "sites"
        if getattr(self, other) is not None:
            raise ValueError(f"'{other}' is not for unit: {self.unit}: list what goes in '{listed}'")
        if (self.count is None) == (self.listed is None):
            raise ValueError(f"give either 'count' (and a score) or '{listed}', not both and not neither")
        if self.repair != "none" and self.calibration is None:
            raise ValueError(f"'repair: {self.repair}' needs 'calibration': it is fitted to activations on text")
        if self.listed is not None and (not self.listed or len(set(self.listed)) != len(self.listed)):
            what = "site" if self.unit == "sublayer" else "block"
            raise ValueError(f"'{listed}' must name at least one {what} and none twice, found {list(self.listed)}")
        if self.contiguous and self.iterative:
            raise ValueError("'contiguous' drops one run at once: there is no later round to be 'iterative' in")
        self._refuse_search()
        return self

    def _refuse_search(self) -> None:
        """A search of sets needs a score of sets, and drops."""
        asked = "swap" if self.swap else "beam"
        if not (self.swap or self.beam):
            return
        if self.count is None or not self.rounds or not self.closing:
            closing = [score.name for score in DEPTH_SCORES.values() if score.closing]
            raise ValueError(
                f"'{asked}' compares whole sets: it needs a 'count', a score of {', '.join(closing)}, "
                "and drops one by one (without 'contiguous', nor 'iterative: false')"
            )
        if self.swap and self.unit == "pair":
            raise ValueError("'swap' exchanges single units, and a pair may rest on others that are gone: give 'beam'")

    @property
    def listed(self) -> tuple[int, ...] | tuple[str, ...] | None:
        """What the recipe names, instead of a count."""
        return self.sites if self.unit == "sublayer" else self.blocks

    @property
    def units(self) -> int:
        """How many units go."""
        return self.count or len(self.listed or ())

    @property
    def rounds(self) -> bool:
        """Whether what is left is scored anew after each drop."""
        if self.iterative is not None:
            return self.iterative
        return self.closing and not self.contiguous

    @property
    def closing(self) -> bool:
        """Whether the score is measured with the units really closed."""
        return DEPTH_SCORES[self.score].closing


class Sparsity(Pruning):
    """Weights set to zero inside the linear layers of every block; `pattern` N:M keeps N of M consecutive inputs."""

    module: ClassVar[str] = "recover.prune.sparsity"
    pattern: str = Field(default="unstructured", description="`unstructured`, or N:M such as `2:4`")
    sparsity: float | None = Field(default=None, gt=0, lt=1, description="fraction of weights set to zero")

    @field_validator("pattern")
    @classmethod
    def _unstructured_or_n_of_m(cls, pattern: str) -> str:
        match = N_M.fullmatch(pattern)
        if pattern != "unstructured" and (match is None or int(match[1]) >= int(match[2])):
            raise ValueError("expected 'unstructured' or 'N:M' with N < M (N of M consecutive inputs are kept)")
        return pattern

    @model_validator(mode="after")
    def _sparsity_or_pattern(self) -> Sparsity:
        if self.n_m is None:
            if self.sparsity is None:
                raise ValueError("'sparsity' is needed, a fraction between 0 and 1 (or give pattern: '2:4')")
            return self
        n, m = self.n_m
        if self.sparsity is not None and abs(self.sparsity - (m - n) / m) > 1e-9:
            raise ValueError(
                f"pattern {self.pattern} fixes sparsity at {(m - n) / m:g}, found {self.sparsity}: leave 'sparsity' out"
            )
        return self

    @property
    def n_m(self) -> tuple[int, int] | None:
        """(N, M) of an N:M pattern."""
        match = N_M.fullmatch(self.pattern)
        return None if match is None else (int(match[1]), int(match[2]))

    @property
    def fraction(self) -> float:
        """Fraction of weights that become zero."""
        if self.n_m is None:
            assert self.sparsity is not None, "the recipe holds either a pattern or a sparsity"
            return self.sparsity
        n, m = self.n_m
        return (m - n) / m


class Calibrated(Sparsity):
    """Sparsity measured on text, which may differ from block to block."""

    kind: str
    calibration: Calibration
    allocation: Literal["uniform", "owl", "outliers", "kl"] = Field(
        default="uniform",
        description="sparser where outliers are few, as OWL counts them (arXiv 2310.05175) or matrix by matrix "
        "(outliers), or where the KL of a block alone is low; docs/results.md compares them",
    )
    spread: float = Field(
        default=0.08,
        gt=0,
        lt=0.5,
        description="most that a block's sparsity is off `sparsity`; with owl its lambda: the sparsest and the least "
        "sparse block are twice that apart",
    )

    @model_validator(mode="after")
    def _room_for_allocation(self) -> Calibrated:
        if self.allocation == "uniform":
            return self
        if self.n_m is not None:
            raise ValueError(f"allocation: {self.allocation} needs pattern: unstructured, found {self.pattern}")
        most = self.spread * (2 if self.allocation == "owl" else 1)
        if not 0 < self.fraction - most < self.fraction + most < 1:
            what = f"{'twice ' if self.allocation == 'owl' else ''}spread {self.spread}"
            raise ValueError(f"sparsity {self.fraction} +- {what} leaves (0, 1): give a smaller 'spread'")
        return self


class Magnitude(Sparsity):
    """Zero the weights of smallest |W| in each layer; needs no text."""

    kind: Literal["magnitude"] = "magnitude"


class Wanda(Calibrated):
    """Zero the weights of lowest |W| * ||x|| in each output row (arXiv 2306.11695)."""

    kind: Literal["wanda"] = "wanda"  # pyright: ignore[reportIncompatibleVariableOverride]


class SparseGpt(Calibrated):
    """Zero weights so that the others can make up for them, and rewrite those (arXiv 2301.00774)."""

    kind: Literal["sparsegpt"] = "sparsegpt"  # pyright: ignore[reportIncompatibleVariableOverride]


class Width(Pruning):
    """Cut neurons of the MLP and whole KV groups (a KV head with its query heads) out of every block, equally many."""

    module: ClassVar[str] = "recover.prune.width"
    kind: Literal["width"] = "width"
    mlp: float | None = Field(default=None, gt=0, lt=1, description="share of the neurons that goes")
    kv_groups: int | None = Field(default=None, ge=1, description="how many KV groups of each block go")
    score: Literal["activation", "fluctuation", "obs"] = Field(
        default="obs",
        description="activation: how large a unit's activations are (Minitron); fluctuation: how much they vary, "
        "times its outgoing weights (FLAP); obs: the error that is left where the other units make up for it",
    )
    repair: Literal["none", "linear"] = Field(
        default="linear",
        description="linear: outgoing weights of the units that stay are rewritten by least squares on the calibration "
        "text, to make up for those that go",
    )
    multiple: int | None = Field(
        default=None,
        ge=1,
        description="neurons left are rounded to one; default: 64, or 32, 16, 8 where that is over 1/16 of all",
    )
    calibration: Calibration

    @model_validator(mode="after")
    def _something_goes(self) -> Width:
        if self.mlp is None and self.kv_groups is None:
            raise ValueError("give 'mlp' (a share of the neurons), 'kv_groups' (a number), or both")
        return self

    def step(self, neurons: int) -> int:
        """The multiple that so many neurons are rounded to."""
        return self.multiple or next((step for step in (64, 32, 16) if 16 * step <= neurons), 8)

    def neurons(self, dense: int) -> int:
        """How many neurons of so many stay."""
        step = self.step(dense)
        return round((1 - (self.mlp or 0.0)) * dense / step) * step


class Experts(Pruning):
    """Take whole experts out of every mixture, equally many, and their rows out of the routers; shared experts stay."""

    module: ClassVar[str] = "recover.prune.experts"
    kind: Literal["experts"] = "experts"
    count: int | None = Field(default=None, ge=1, description="how many experts of each block go")
    share: float | None = Field(default=None, gt=0, lt=1, description="or the share that goes, rounded to whole ones")
    score: Literal["reap", "frequency", "kl"] = Field(
        default="reap",
        description="reap: mean over an expert's tokens of router weight x norm of its output (arXiv 2510.13999); "
        "frequency: tokens routed to it; kl: KL to dense with it really closed, so that the router chooses others",
    )
    candidates: int | None = Field(
        default=None,
        ge=1,
        description="with kl: experts of a block, the lowest by reap, that are closed one by one; default: twice those "
        "that go",
    )
    calibration: Calibration

    @model_validator(mode="after")
    def _one_number(self) -> Experts:
        if (self.count is None) == (self.share is None):
            raise ValueError("give either 'count' (experts of each block that go) or 'share'")
        if self.candidates is not None and self.score != "kl":
            raise ValueError(f"'candidates' are for score: kl, found score: {self.score}")
        return self

    def removed(self, experts: int) -> int:
        """How many of so many experts go."""
        return self.count if self.count is not None else round((self.share or 0.0) * experts)


def _has_text(
    cfg: Depth | Magnitude | Wanda | SparseGpt | Width | Experts,
) -> Depth | Magnitude | Wanda | SparseGpt | Width | Experts:
    """In a recipe; in Python, text may be given beside the config."""
    if isinstance(cfg, Depth) and cfg.count is not None and cfg.calibration is None:
        raise ValueError("'count' needs 'calibration': scores are measured on text")
    return cfg


OTHERS: dict[str, type[Pruning]] = {}  # kinds that were registered from outside


def kind_of(config: type[Pruning]) -> str:
    """The `kind` of a recipe that this config is for. Raises ValueError where it is not a Literal of one name."""
    field = config.model_fields.get("kind")
    names = get_args(field.annotation) if field else ()
    if len(names) != 1 or not isinstance(names[0], str):
        raise ValueError(f"{config.__name__}: expected a field 'kind: Literal[\"name\"]', found {names or 'none'}")
    return names[0]


def accept(config: type[Pruning]) -> None:
    """Let a recipe's `prune` be of this kind too."""
    if config not in get_args(get_args(Prune)[0]):
        OTHERS[kind_of(config)] = config


def _of_others(value: Any, known: ValidatorFunctionWrapHandler) -> Any:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return OTHERS[kind].model_validate(value) if isinstance(kind, str) and kind in OTHERS else known(value)


Prune = Annotated[
    Depth | Magnitude | Wanda | SparseGpt | Width | Experts,
    Discriminator("kind"),
    AfterValidator(_has_text),
    WrapValidator(_of_others),
    SerializeAsAny(),  # pyright: ignore[reportCallIssue]
]
