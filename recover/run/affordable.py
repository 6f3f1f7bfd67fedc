"""What a machine without a GPU is asked for: sizes at which each part of a run takes minutes, and not hours.

Each part (the search for what goes, the probes, the training, the measuring) has seconds, and is counted in FLOP at the
rates that a core reached (`defaults.CPU_...`). What does not fit is made smaller in the order given here, until it fits
or is at its least. Nothing is timed: the same recipe is written however busy the machine is. With a GPU nothing is made
smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from recover.config import defaults
from recover.config.prune import Calibration, Depth, Pruning, SparseGpt, Wanda, Width
from recover.config.recipe import Recipe
from recover.config.train import DenseText, PrunedText
from recover.models.load import Description
from recover.prune.registry import Cost, pruner_of

Sizes = dict[str, Any]  # path of a field -> its value; of `train.data.N.max_new_tokens`, WRITTEN for all sources

WRITTEN = "train.data.max_new_tokens"
LEAST_RANKED, LEAST_FITTED = 1024, 4  # tokens that rank what goes; for least squares, so many times the neurons
LEAST_TRAINED = 20_000  # tokens
LEAST_STEPS, ROWS = 60, 8  # of a training, of so many sequences each
LEAST_WRITTEN = 128  # tokens of a text
CALIBRATIONS = ((1, 1), (3, 1), (3, 2), (3, 4), (6, 4))  # into which samples, and their length, are divided
PROBES = ((16, 48, 2048), (8, 48, 128), (4, 24, 64), (2, 16, 32))  # prompts, steps, positions of blocks
MEASURED = (100, 50, 30, 20)  # items of each task
EPOCHS, EPOCH_ITEMS = 2, 20  # and items of each task after an epoch
FEWER_NEW = 256  # tokens of a measured answer
READ, ANSWERED = 192, 64  # tokens that an item has, with all its options; that are written to it where any are
DRIFTS = 3  # times that an item is read by a stage that probes: once to be measured, once by each view
HEADS = 10  # products with the whole vocabulary that a probe makes of a position, in each block


@dataclass(frozen=True)
class Work:
    """What a run is made of: the dense model, what pruning takes, how many tasks there are, and that write."""

    model: Description
    prune: Pruning
    cost: Cost
    tasks: int
    writing: int

    @property
    def calibration(self) -> Calibration | None:
        return getattr(self.prune, "calibration", None)

    @property
    def head(self) -> float:
        """FLOP of one position's logits."""
        return 2.0 * self.model.vocabulary * self.model.width


def sizes_of(work: Work, asked: int | None = None) -> Sizes:
    """What is taken where there is a GPU. `asked`: tokens of the training, where somebody asked for them."""
    model, size = work.model, defaults.training(work.model.parameters)
    length = min(defaults.NEW_TOKENS + defaults.PROMPT_TOKENS, model.context or 2**31)
    return {
        "probe.samples": defaults.PROBED,
        "probe.steps": PROBES[0][1],
        "probe.layer_positions": PROBES[0][2],
        "train.epochs": defaults.EPOCHS,
        "train.tokens": asked or tokens(work)[0],
        "train.batch_size": size.batch_size,
        WRITTEN: min(defaults.NEW_TOKENS, length * 2 // 3),
        "measure.limit": defaults.MEASURED_ITEMS,
        "measure.epoch_limit": MEASURED[0],
        "measure.max_new_tokens": max(1, min(defaults.MEASURED_TOKENS, (model.context or 2**31) * 2 // 3)),
    }


def tokens(work: Work) -> tuple[int, str]:
    """Of the training, and why, where there is a GPU."""
    size = defaults.training(work.model.parameters)
    if isinstance(work.prune, Wanda | SparseGpt):
        return defaults.tokens_for_zeros(size, work.prune.fraction, pattern=work.prune.n_m is not None)
    return defaults.tokens(size, work.cost.gone / work.model.parameters)


def fitted(sizes: Sizes, work: Work, cores: int, asked: int | None = None) -> Sizes:
    """The same, smaller where a CPU of so many cores would take longer than `defaults.CPU_SECONDS`.

    `asked`: tokens of the training that somebody asked for, which stay, and are taken in steps enough also where a CPU
    is quick with them.
    """
    found = dict(sizes)
    _fit_probe(found, work, cores)
    _fit_training(found, work, cores, asked)
    _fit_measuring(found, work, cores)
    return found


def _seconds(flops: float, kind: str, cores: int) -> float:
    return flops / (defaults.CPU_RATES[kind] * cores)


def _fit_probe(sizes: Sizes, work: Work, cores: int) -> None:
    for samples, steps, positions in PROBES:
        layers = min(samples * steps, positions) * work.model.blocks * HEADS * work.head
        read = samples * (defaults.PROMPT_TOKENS + steps) * DRIFTS * 2 * work.model.active
        names = ("probe.samples", "probe.steps", "probe.layer_positions")
        for name, value in zip(names, (samples, steps, positions), strict=True):
            sizes[name] = min(sizes[name], value)
        if 2 * _seconds(layers + read, "judging", cores) <= defaults.CPU_SECONDS["probe"]:
            return


def _fit_training(sizes: Sizes, work: Work, cores: int, asked: int | None) -> None:
    active = work.model.active
    each = _seconds(2 * active, "writing", cores) + _seconds(6 * active, "training", cores)
    affordable = defaults.CPU_SECONDS["train"] / each
    slow = affordable < sizes["train.tokens"]
    few = asked is not None and asked < min(tokens(work)[0], LEAST_STEPS * sizes["train.batch_size"] * sizes[WRITTEN])
    if not slow and not few:
        return
    if slow and asked is None:
        budget = max(affordable, LEAST_TRAINED)
        scale = 10 ** (len(str(round(budget))) - 2)
        sizes["train.tokens"] = min(sizes["train.tokens"], int(budget // scale) * scale)
    if slow:
        sizes["train.epochs"] = min(sizes["train.epochs"], EPOCHS)
    sizes["train.batch_size"] = min(sizes["train.batch_size"], ROWS)
    steps = LEAST_STEPS * sizes["train.batch_size"]
    while sizes[WRITTEN] > LEAST_WRITTEN and sizes["train.tokens"] / sizes[WRITTEN] < steps:
        sizes[WRITTEN] = max(LEAST_WRITTEN, sizes[WRITTEN] // 2)


def _fit_measuring(sizes: Sizes, work: Work, cores: int) -> None:
    for limit in MEASURED:
        sizes["measure.limit"] = min(sizes["measure.limit"], limit)
        epoch = min(sizes["measure.epoch_limit"], limit if limit == MEASURED[0] else EPOCH_ITEMS)
        items = limit * (1 + 2 * DRIFTS) + sizes["train.epochs"] * epoch
        read = _seconds(items * work.tasks * READ * 2 * work.model.active, "reading", cores)
        written = (3 * limit + sizes["train.epochs"] * epoch) * work.writing * ANSWERED * 2 * work.model.active
        if read + _seconds(written, "writing", cores) <= defaults.CPU_SECONDS["measure"]:
            break
    if sizes["measure.limit"] < MEASURED[0]:
        sizes["measure.epoch_limit"] = epoch
        sizes["measure.max_new_tokens"] = min(sizes["measure.max_new_tokens"], FEWER_NEW)


def calibrated(cfg: Pruning, model: Description, cores: int) -> Pruning:
    """The pruning with less text to judge by, where a CPU of so many cores would take too long with what it has.

    A search that is too long with the least of it scores once, and not anew after each drop.
    """
    given: Calibration | None = getattr(cfg, "calibration", None)
    if given is None:
        return cfg
    found = cfg
    for samples, length in CALIBRATIONS:
        text = _less_text(given, samples, length)
        if text.samples * text.length < min(given.samples * given.length, _least(cfg, model)):
            break
        found = cfg.model_copy(update={"calibration": text})
        if search_seconds(found, model, cores) <= defaults.CPU_SECONDS["search"]:
            return found
    if isinstance(cfg, Depth) and cfg.rounds and not (cfg.swap or cfg.beam):
        return found.model_copy(update={"iterative": False})
    return found


def _least(cfg: Pruning, model: Description) -> int:
    """Tokens that it takes at least."""
    solves = isinstance(cfg, SparseGpt) or (isinstance(cfg, Width) and cfg.repair == "linear")
    return max(LEAST_RANKED, LEAST_FITTED * model.intermediate if solves else 0)


def _less_text(given: Calibration, samples: int, length: int) -> Calibration:
    answer = None if given.answer is None else max(1, given.answer // length)
    less = {"samples": max(1, given.samples // samples), "length": max(8, given.length // length), "answer": answer}
    return given.model_copy(update=less)


def search_seconds(cfg: Pruning, model: Description, cores: int) -> float:
    """Seconds of writing the answers, and of judging by them, as they are counted."""
    text: Calibration = cast(Any, cfg).calibration
    written = text.samples * (text.answer or 0) * 2 * model.active
    flops = pruner_of(cfg).cost(cfg, model).flops
    if flops:
        judged = _seconds(flops, "judging", cores)
    else:  # block by block: each is read for what goes, and once more for the next one's input
        judged = _seconds(text.samples * text.length * 2 * 2 * model.active, "judging", cores)
    return _seconds(written, "writing", cores) + judged


def smaller(now: Mapping[str, Any], gpu: Mapping[str, Any]) -> list[str]:
    """Of each field that is less than where there is a GPU: `train.tokens 40,000 (1,200,000)`."""
    return [f"{path} {now[path]:,} ({value:,})" for path, value in gpu.items() if path in now and now[path] < value]


def text_sizes(calibration: Calibration | None) -> Sizes:
    """Of the text that pruning judges by."""
    if calibration is None:
        return {}
    found = {"samples": calibration.samples, "answer": calibration.answer, "length": calibration.length}
    return {f"prune.calibration.{name}": value for name, value in found.items() if value is not None}


def smaller_than_asked(recipe: Recipe, work: Work, cores: int) -> list[str]:
    """As `smaller`, of a recipe; nothing where the sizes that a GPU takes are what a CPU does in minutes as well."""
    given = work.calibration
    gpu = sizes_of(work)
    if given is not None:
        samples = defaults.WIDTH_SAMPLES if isinstance(work.prune, Width) else defaults.SAMPLES
        usual = given.model_copy(update={"samples": samples, "answer": given.answer and defaults.ANSWER, "length": 512})
        gpu |= text_sizes(usual)
        slow = search_seconds(work.prune.model_copy(update={"calibration": usual}), work.model, cores)
    else:
        slow = 0.0
    counted = ("train.tokens", "probe.steps", "train.epochs")
    fits = fitted(gpu, work, cores)
    if slow <= defaults.CPU_SECONDS["search"] and all(fits[path] == gpu[path] for path in counted):
        return []
    return smaller(_now(recipe, given), gpu)


def _now(recipe: Recipe, calibration: Calibration | None) -> Sizes:
    texts = [source.max_new_tokens for source in recipe.train.data if isinstance(source, DenseText | PrunedText)]
    probe, train, measure = recipe.probe, recipe.train, recipe.measure
    now: Sizes = {
        **text_sizes(calibration),
        "probe.samples": probe.samples,
        "probe.steps": probe.steps,
        "probe.layer_positions": probe.layer_positions,
        "train.epochs": train.epochs,
        "train.tokens": train.tokens,
        "train.batch_size": train.batch_size,
        "measure.limit": measure.limit,
        "measure.epoch_limit": measure.epoch_limit,
        "measure.max_new_tokens": measure.max_new_tokens,
        WRITTEN: min(texts, default=None),
    }
    return {path: value for path, value in now.items() if value is not None}
