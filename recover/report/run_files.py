"""What files of a run hold, as its stages write them and the report reads them: figures of tasks, of epochs, of speed.

A class that is not `total` has keys that files of an earlier version do not have. `Quantiles` are {mean, p50, p90, p99,
max}.
"""

from __future__ import annotations

from typing import Literal, NotRequired, Required

from typing_extensions import TypedDict

from recover.base.artifacts import JsonObject as Json

Use = str
Model = Literal["dense", "pruned", "recovered", "deployed", "alternative"]
# Where the record of each model lies. The last two are of stage `deploy`: the export as a quantized file, and the dense
# model quantized to about as many bytes, which would be served without pruning.
FOLDERS: dict[Model, str] = {
    "dense": "dense",
    "pruned": "before",
    "recovered": "after",
    "deployed": "gguf",
    "alternative": "gguf/dense",
}
Quantiles = dict[str, float | None]


class SampleRecord(TypedDict, total=False):
    """One prompt of a task with the text of a model."""

    prompt: str
    text: str | None
    expected: str | None
    answer: str | None
    correct: bool | None


class Task(TypedDict, total=False):
    """A task as one model did it; the figures of its kind (`config.tasks.Figure`) stand beside these."""

    kind: Required[str]
    items: Required[int]
    chance: float | None
    interval95: list[float] | None
    samples: list[SampleRecord]
    mistakes: dict[str, int]
    examples: dict[str, SampleRecord]
    length: float | None
    truncated: int
    loop_rate: float | None
    loop_start: Quantiles | None
    first_divergence: Quantiles | None
    parting: Json | None
    exact_text: float | None
    agreement: float | None
    isolation: str
    each: list[float]


class MeasureRecord(TypedDict):
    """measure.json: all tasks of one model, and a figure for each use."""

    tasks: dict[str, Task]
    headline: dict[str, float | None]
    seconds: NotRequired[float]
    tokens_per_second: NotRequired[float | None]


class DeployedFile(TypedDict):
    """One file of gguf/files.json: where it lies in the run, the type of its matrices, its bytes.

    `importance`: the text by which its channels were weighed, as {data, samples, tokens}; without, all count alike.
    """

    path: str
    quantize: str
    bytes: int
    importance: NotRequired[Json]


class GreedyText(TypedDict):
    """A text of generations.json, by task and item; what was asked, and the right answer where there is one.

    `dense_kl`, of items that dense has right and this model wrong or the other way: of each token of dense's text its
    letters and KL(dense || this model) there, both reading dense's text. Earlier versions wrote `ids` and `text` alone.
    """

    ids: list[int]
    text: str
    prompt: NotRequired[str]
    expected: NotRequired[str | None]
    dense_kl: NotRequired[list[tuple[str, float]]]


Records = dict[Model, MeasureRecord | None]


class Overlap(TypedDict):
    """Items of a task that stand in a text of the run: `same` word for word, `near` others nearly so.

    `field` of the recipe names the text `source`. `examples`: {item, text, same}.
    """

    field: str
    source: str
    task: str
    items: int
    same: int
    near: int
    examples: list[Json]


class OverlapRecord(TypedDict):
    """plan/overlap.json: how many texts of each field were looked at, and which hold measured items."""

    looked_at: dict[str, int]
    found: list[Overlap]


class TemperatureDrift(TypedDict, total=False):
    temperature: Required[float]
    embedding: Quantiles
    logit: Quantiles
    probability: Quantiles
    kl: Quantiles


class Score(TypedDict, total=False):
    """One candidate of a search for what to drop."""

    round: Required[int]
    blocks: Required[list[int]]
    parts: list[str]
    score: Required[float | None]
    by: str
    block: int
    experts: list[float]
    kept: list[int]
    chosen: bool
    beside: list[str]


class RepairedCut(TypedDict, total=False):
    site: Required[str]
    dropped: Required[list[str]]
    kept: Required[bool]
    error_before: float | None
    error_after: float | None
    kl_before: float | None
    kl_after: float | None


class Repair(TypedDict, total=False):
    kind: Required[str]
    kept: Required[bool]
    kl_before: Required[float | None]
    kl_after: Required[float | None]
    tokens_fitted: int
    tokens_held_out: int
    cuts: list[RepairedCut]


class Setback(TypedDict):
    """A figure that became worse beyond noise; perplexity in nats per token. `interval`: 95%, of now - before.

    `against`: `pruned`, or `epoch N`.
    """

    figure: str
    against: str
    before: float
    now: float
    interval: list[float]
    items: int


class Finding(TypedDict):
    """A step that was not finite."""

    step: int
    found: str
    sequences: list[int]
    tensors: list[str]


class Training(TypedDict, total=False):
    """What train/training.json says to a reader; all that it holds is `train.checkpoints.TrainingRecord`."""

    skipped: int
    rollbacks: int
    finished: bool
    findings: list[Finding]


class EpochScore(TypedDict):
    """An epoch as train/best.json has it: the folder of its adapter, what it scored, and its training loss."""

    epoch: int
    step: int
    folder: str
    score: float | None
    loss: float


class Best(EpochScore):
    """train/best.json, and after/best.json: the epoch that is kept, and all of them."""

    epochs: list[EpochScore]


class EpochProgress(TypedDict):
    """Where a training stands when an epoch ends; `train`: means per token of the loss and its terms, and `lr`."""

    step: int
    tokens: int
    seconds: float
    skipped: int
    rollbacks: int
    peak_memory_bytes: int | None
    train: dict[str, float | None]


class EpochDrift(TemperatureDrift, total=False):
    """Drift at the last layer, T = 1; `each`: of each prompt the sum of KL in nats, and how many positions it is of."""

    each: list[tuple[float, int]]


class EpochMeasured(TypedDict):
    """What was measured of an epoch's adapter, and all that these figures depend on."""

    measure: MeasureRecord
    drift: EpochDrift
    score: float | None
    measured_with: Json


class EpochLine(EpochProgress, EpochMeasured):
    """A line of epochs.jsonl."""

    epoch: int
    setbacks: NotRequired[list[Setback]]


class Trial(TypedDict, total=False):
    """A short training of `lr: auto`; `kl` is None where its loss was not finite."""

    lr: Required[float]
    kl: Required[float | None]
    perplexity: float | None
    seconds: float


class RateTrials(TypedDict, total=False):
    """train/trials.json: what was tried for `lr: auto`, what was chosen, and why."""

    prior: float
    steps: int
    tokens: int
    trials: Required[list[Trial]]
    chosen: Required[float | None]
    reason: str | None
    why: str


class Ratio(TypedDict):
    value: float | None
    interval: list[float]


class Side(TypedDict, total=False):
    parameters: int
    file_bytes: int
    kv_bytes_per_token: int
    peak_memory_bytes: int | None
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    dtype: str
    interval: dict[str, list[float]]


class Speed(TypedDict):
    dense: Side
    deployed: Side
    ratio: dict[str, Ratio]
    repeats: int
    workload: dict[str, int]
    same_shapes: NotRequired[bool]
    machine: NotRequired[Json]
