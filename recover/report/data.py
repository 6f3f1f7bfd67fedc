"""What a report is made from, as types: `collect` reads a run into a `RunData`, and report.json is that very value.

A value that was not measured is None. What is shown as a file of the run has it is typed in `run_files.py`; a class
that is not `total` may lack keys, as files of an earlier version do. `Quantiles` are {mean, p50, p90, p99, max}.
"""

from __future__ import annotations

from typing import Literal, NotRequired, Required

from typing_extensions import TypedDict

from recover.base.artifacts import JsonObject as Json
from recover.base.clock import StageTime
from recover.report.run_files import (
    FOLDERS,
    DeployedFile,
    Model,
    Overlap,
    Quantiles,
    RateTrials,
    Repair,
    Score,
    Setback,
    Speed,
    TemperatureDrift,
    Training,
    Use,
)

Changed = Literal["pruned", "recovered"]
Space = Literal["embedding", "logit", "probability"]

MODELS: tuple[Model, ...] = tuple(FOLDERS)
CHANGED: tuple[Changed, ...] = ("pruned", "recovered")
SPACES: tuple[Space, ...] = ("embedding", "logit", "probability")

# What was measured.


class UseFigure(TypedDict):
    """Mean over the tasks of a use, each weighing the same."""

    value: float
    interval: list[float] | None
    chance: float | None
    tasks: list[str]
    items: int


class Headline(TypedDict):
    generation: UseFigure | None
    choice: UseFigure | None
    retrieval: UseFigure | None
    perplexity: float | None


class Cell(TypedDict):
    value: float
    interval: list[float] | None


class MeasureRow(TypedDict):
    """One metric of one task, for all models; `kept` is the share of dense, above chance if that is known."""

    task: str
    kind: str
    items: int | None
    key: str
    label: str
    form: str
    better: str
    main: bool
    against_dense: bool
    meaning: str
    dense: Cell | None
    pruned: Cell | None
    recovered: Cell | None
    deployed: NotRequired[Cell | None]
    alternative: NotRequired[Cell | None]
    kept: dict[str, float | None]


class Answer(TypedDict):
    """Whether a model is fit for a use; `kept`, of dense and above chance if that is known, is what is graded."""

    grade: str
    reason: str
    value: float | None
    dense: float | None
    kept: float | None
    chance: float | None
    interval: list[float] | None
    certain: bool


class Verdict(TypedDict):
    pruned: dict[Use, Answer]
    recovered: dict[Use, Answer]
    deployed: NotRequired[dict[Use, Answer]]
    alternative: NotRequired[dict[Use, Answer]]
    thresholds: dict[str, float]


class Text(TypedDict):
    """A text of a sample; where it leaves that of dense: the word, and the text before and after."""

    text: str
    answer: str | None
    correct: bool | None
    differs_at_word: NotRequired[int | None]
    before: NotRequired[str]
    word: NotRequired[str]
    after: NotRequired[str]


class Sample(TypedDict, total=False):
    task: Required[str]
    kind: Required[str]
    prompt: Required[str]
    expected: str | None
    dense: Text | None
    pruned: Text | None
    recovered: Text | None
    deployed: Text | None
    alternative: Text | None


class Mistakes(TypedDict):
    task: str
    model: Model
    items: int
    right: int
    mistakes: dict[str, int]
    loop_rate: float | None
    loop_start: Quantiles | None


class Example(TypedDict):
    task: str
    model: Model
    mistake: str
    prompt: str
    text: str
    expected: str | None
    answer: str | None


class ChangedItem(TypedDict):
    """An item that dense has right and another model wrong (`lost`), or the other way (`won`); `other` is its text.

    `tokens`: dense's text in runs of (letters, level of KL, tip), where KL was measured token by token.
    """

    way: str
    item: int
    prompt: str
    expected: str | None
    dense: str
    other: Text
    tokens: list[tuple[str, int, str]]


class Exchanged(TypedDict):
    """Dense and `model` on the items of a task: `right` in both, `lost`, `won`, `p` of McNemar's exact test.

    `each`: 1 for an item that `model` has right, else 0. `shown`: those of the items lost and won that are looked at.
    """

    task: str
    kind: str
    model: Model
    items: int
    right: int
    lost: int
    won: int
    p: float
    each: list[int]
    shown: list[ChangedItem]


class Rise(TypedDict):
    """Generation of an epoch less that of the one before, with its 95% interval over items, and the tokens between."""

    value: float
    interval: list[float]
    tokens: int | None
    real: bool


class Parted(TypedDict):
    """When greedy texts leave dense's: the token by which half and 90% of all have; `curve`: share still the same."""

    never: float | None
    p50: float | None
    p90: float | None
    curve: list[tuple[int, float]]
    agreement: float | None


class DivergenceRow(TypedDict):
    task: str
    pruned: Parted | None
    recovered: Parted | None
    deployed: NotRequired[Parted | None]
    alternative: NotRequired[Parted | None]


# Drift.


class Stretch(TypedDict):
    """Mean KL over the `n` positions of some decoding steps, of which `step` is the first."""

    step: int
    kl: float
    n: int


class BlockDrift(TypedDict):
    block: int
    closed: bool
    embedding: Quantiles | None
    logit: Quantiles | None
    probability: Quantiles | None
    kl: Quantiles | None
    by_step: list[Stretch]


class SublayerDrift(TypedDict):
    block: int
    part: str
    counterfactual: str
    embedding: Quantiles | None
    logit: Quantiles | None
    probability: Quantiles | None
    kl: Quantiles | None
    parallel: Quantiles | None
    orthogonal: Quantiles | None


class Forced(TypedDict):
    kl: Quantiles | None
    kl_predicted: Quantiles | None
    embedding: Quantiles | None
    logit: Quantiles | None
    probability: Quantiles | None


class Free(TypedDict):
    """`kl`: each view on its own words (`total` of the probe); `both`: both read the words of this model."""

    kl: Quantiles | None
    both: Quantiles | None
    diverged: float | None


class StepDrift(TypedDict):
    step: int
    teacher_forced: Forced
    free_running: Free
    prompts: int | None


class Divergence(TypedDict, total=False):
    prompts: int
    first: Quantiles | None
    never: float | None
    each: list[int | None]


class SampledDrift(TypedDict):
    seed: int
    teacher_forced: Quantiles | None
    free_running: Quantiles | None
    first: Quantiles | None
    never: float | None
    diverged: list[tuple[int, float]]


class Likelihood(TypedDict, total=False):
    margin: dict[str, Quantiles]
    accuracy: dict[str, float | None]
    same_choice: float | None
    rank_changed: float | None


class ChoiceDrift(TypedDict, total=False):
    task: Required[str]
    items: int
    subspace: int
    drift: dict[str, Quantiles]
    vocabulary: dict[str, Quantiles]
    mass: dict[str, Quantiles]
    likelihood: Likelihood


class RetrievalDrift(TypedDict, total=False):
    pooling: Required[str]
    task: str | None
    queries: int
    embedding: Quantiles
    rank_correlation: Quantiles
    ndcg: Quantiles
    top1: float
    relevance: dict[str, Quantiles] | None


class Routing(TypedDict):
    """Tokens that each expert of a block was given on the prompts, in the dense numbering."""

    block: int
    dense: list[int]
    pruned: list[int]


class Drift(TypedDict):
    """The summary of one probe; of the two lenses, the one with the final norm."""

    prompts: int | None
    identity: dict[str, float] | None
    final: dict[str, Quantiles]
    temperatures: list[TemperatureDrift]
    blocks: list[BlockDrift]
    steps: list[StepDrift]
    divergence: Divergence | None
    sublayers: list[SublayerDrift]
    sampled: list[SampledDrift]
    choices: list[ChoiceDrift]
    retrieval: list[RetrievalDrift]
    routing: list[Routing]


# What was pruned, trained and deployed.


class ModuleZeros(TypedDict):
    module: str
    sparsity: float


class Plan(TypedDict, total=False):
    """prune/plan.json, its masks summed up as `modules`, `sparsity` over all of them, and their `patterns`."""

    kind: Required[str]
    blocks: Required[int]
    dropped: Required[list[int]]
    dropped_attention: list[int]
    dropped_mlp: list[int]
    scores: Required[list[Score]]
    config: dict[str, int]
    repair: Repair
    parallel: bool
    experts: dict[str, list[int]]
    parameters_dense: Required[int]
    parameters_pruned: Required[int]
    modules: Required[list[ModuleZeros]]
    sparsity: Required[float | None]
    patterns: Required[list[str]]


class Epoch(TypedDict):
    """`best` is the one that is kept; tokens and seconds are counted from the start of the training.

    `form`, `content`: the share of all texts that is a mistake of form, and that is well formed and wrong.
    """

    step: int | None
    tokens: int | None
    seconds: float | None
    score: float | None
    epoch: int
    train: dict[str, float | None]
    headline: dict[str, float | None]
    loop_rate: float | None
    loops_begin: float | None
    form: float | None
    content: float | None
    items: dict[str, int | None]
    drift: dict[str, Quantiles]
    setbacks: list[Setback]
    rise: NotRequired[Rise | None]
    best: bool


class Band(TypedDict):
    mean: list[float | None]
    low: list[float | None]
    high: list[float | None]


class Points(TypedDict, total=False):
    """Columns of the points of a training curve; the loss and `grad_norm` are bands, and so is each of its terms."""

    step: Required[list[int]]
    tokens: Required[list[int]]
    seconds: Required[list[float]]
    lr: Required[list[float | None]]
    skipped: Required[list[int]]
    loss: Required[Band]
    grad_norm: Required[Band]


class Curve(TypedDict):
    first_step: int
    last_step: int
    skipped: int
    steps_a_point: int
    points: Points
    ends: dict[str, list[float | None]]
    ends_steps: int
    tokens_per_second: float | None
    peak_memory_bytes: float | None


class Tokens(TypedDict):
    """Tokens behind the checkpoint that is kept, and over the whole training."""

    kept: int | None
    all: int | None
    epoch: int
    epochs: int


class Made(TypedDict):
    """What a stage was made with, by its stamp; `versions` by package, `inputs` by name their digests."""

    stage: str
    finished: str
    recipe: Json
    differs: list[str]
    versions: dict[str, str | None]
    machine: Json | None
    inputs: dict[str, str]
    stages: dict[str, str | None]


class Lead(TypedDict):
    """A figure of the deployed file less that of the alternative, on the same items, with its 95% interval.

    `better`: which of the two is, beyond noise; None where the items do not tell.
    """

    value: float
    interval: list[float]
    better: Model | None


class Served(TypedDict):
    """The files of stage deploy, by model, and who of the two is better for which use."""

    files: dict[Model, DeployedFile]
    lead: dict[Use, Lead]


# Pages.


class PageData(TypedDict):
    """What figures, tables and findings are made from: of a run, or of two models held against each other."""

    name: str
    title: str
    recipe: Json
    plan: Plan | None
    headline: dict[str, Headline | None]
    drift: dict[str, Drift | None]
    epochs: list[Epoch]
    training: Training | None
    rate_trials: RateTrials | None
    curve: Curve | None
    speed: Speed | None
    mistakes: list[Mistakes]
    exchanged: list[Exchanged]
    divergence: list[DivergenceRow]
    times: list[StageTime]
    made: list[Made]
    served: Served | None


class Gap(TypedDict):
    """A file that is not there, and what is not known without it."""

    file: str
    means: str


class Provenance(TypedDict):
    env: Json | None
    deployed: Json | None


class RunData(PageData):
    """All that a run has measured so far."""

    schema: int
    summary: str
    missing: list[Gap]
    mixed: list[str]
    measured_later: list[str]
    provenance: Provenance
    estimate: Json | None
    measures: list[MeasureRow]
    tokens: Tokens | None
    verify: Json | None
    samples: list[Sample]
    examples: list[Example]
    overlap: list[Overlap] | None
    verdict: Verdict
    foretold: list[str]
    limits: list[str]


class ComparedRun(TypedDict):
    """One run of a comparison; `kept`, `grades` and `interval` by model and use, `kl` as (tokens, mean per token).

    `pruned_generation` is the figure itself, not its share of dense.
    """

    name: str
    model: str
    summary: str
    missing: list[str]
    mixed: list[str]
    pruned: str
    parameters: float | None
    decoding: float | None
    speed: Speed | None
    measure: str
    timed_on: str | None
    tokens: int | None
    epochs: list[tuple[int | None, float | None]]
    kl: list[tuple[float, float]]
    dense: dict[Use, float | None]
    pruned_generation: float | None
    interval: dict[Changed, dict[Use, list[float] | None]]
    right: dict[str, list[int]]
    kept: dict[Changed, dict[Use, float | None]]
    grades: dict[Changed, dict[Use, str]]
    perplexity: dict[str, float | None]


class Paired(TypedDict):
    """A run's recovered model and the best run's, item by item: `lost` right in the best alone, `won` here alone."""

    run: str
    task: str
    items: int
    lost: int
    won: int
    p: float


class Comparison(TypedDict):
    """Runs side by side; `apart` says what must not be compared, and why; `paired` holds each against the best.

    `best` is better than all others beyond noise; if none is, `equal` names the first ones, which noise does not part.
    """

    runs: list[ComparedRun]
    best: str | None
    equal: list[str]
    same_dense: bool
    comparable: bool
    paired: list[Paired]
    apart: list[str]


class DiagnosisData(PageData):
    """`dense` and `other` are the names of the two models."""

    dense: str
    other: str
    facts: list[tuple[str, str]]
