"""A recipe for a model that nobody has tuned: every field with the reason for its value, sized to this machine.

How much goes is a `target`: from what a person asks for (blocks, neurons, zeros, parameters, memory, speed) to `prune`.
The values of training are those of `config/defaults.py`; batches, dtype and checkpointing are what `plan`'s arithmetic
has room for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recover.base import console, dist, memory, provenance
from recover.base.artifacts import JsonObject
from recover.base.errors import PruneError, RecipeError
from recover.config import defaults, yaml_values
from recover.config.prune import Depth, Pruning, SparseGpt, Wanda, Width
from recover.config.recipe import Calibration, Recipe, parse_recipe
from recover.config.yaml_values import HEADING
from recover.models.load import Description
from recover.prune.registry import Cost, pruner_of
from recover.run import affordable
from recover.run.affordable import WRITTEN, Work
from recover.run.estimate import ELEMENT_BYTES, training_memory

SERVED_TOKENS = 4096  # in the KV cache of a model that is to fit a memory
COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
BYTES = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
WAYS = ("depth", "width")

MOST_AT_ONCE = {"cuda": 1024, "cpu": 128}  # texts written at once
CHUNKS = (4096, 2048, 512, 128)  # positions scored at once, the largest that fits
WORKING_LOGITS = 12  # bytes of a logit while a token is drawn
LENGTH_WHY = "tokens of a sample"
Line = tuple[str, Any, str]  # dotted path, value, why


@dataclass(frozen=True)
class Wanted:
    """What is asked for, as it was written; one of the first six. `by`: what goes for `params` or `memory`."""

    drop: str | None = None
    width: str | None = None
    sparsity: str | None = None
    params: str | None = None
    memory: str | None = None
    speedup: float | None = None
    by: str | None = None


@dataclass(frozen=True)
class Target:
    """A pruning: its config, what it takes, a word for the run's name, and why it is so, by field."""

    prune: Pruning
    cost: Cost
    word: str
    why: dict[str, str]


def target(wanted: Wanted, model: Description, calibration: Calibration, element: int) -> Target:
    """The pruning that gives what is wanted of this model; nothing wanted: an eighth of the MLP neurons.

    `element`: bytes of an exported weight.

    Raises:
        RecipeError: a value is of another form, more than one is given, or no pruning of this model reaches it.
    """
    ways = ("drop", "width", "sparsity", "params", "memory", "speedup")
    given = [name for name in ways if getattr(wanted, name) is not None]
    if len(given) > 1:
        raise RecipeError(
            f"{' and '.join(f'--{name}' for name in given)}: how much goes is said once; give one of them"
        )
    if wanted.by not in (None, *WAYS):
        raise RecipeError(f"--by: found {wanted.by!r}, expected one of {', '.join(WAYS)}")
    way = given[0] if given else "width"
    try:
        return {
            "drop": _drop,
            "width": _width,
            "sparsity": _sparsity,
            "params": _params,
            "memory": _memory,
            "speedup": _speedup,
        }[way](wanted, model, calibration, element)
    except PruneError as error:
        raise RecipeError(f"--{way}: {error}") from None


def _drop(wanted: Wanted, model: Description, calibration: Calibration, _element: int) -> Target:
    text = wanted.drop or ""
    if text.isdecimal():
        count = int(text)
        if count == 0:
            raise RecipeError(f"--drop: found {text!r}, expected at least one block")
    else:
        count = max(1, round(_share("--drop", text, "10%, or a number of blocks such as 3") * model.blocks))
    return _blocks(count, model, calibration)


def _width(wanted: Wanted, model: Description, calibration: Calibration, _element: int) -> Target:
    return _neurons(_share("--width", wanted.width or defaults.WIDTH, "25%"), model, calibration)


def _sparsity(wanted: Wanted, model: Description, calibration: Calibration, _element: int) -> Target:
    text = wanted.sparsity or ""
    if re.fullmatch(r"\d+:\d+", text):
        try:
            cfg: Wanda | SparseGpt = SparseGpt(pattern=text, calibration=calibration)
        except ValueError:
            raise RecipeError(f"--sparsity: found {text!r}, expected N:M with N < M, such as 2:4") from None
        why = {
            "kind": defaults.PATTERN_SOURCE,
            "pattern": f"{text}: of {text.split(':')[1]} inputs {text.split(':')[0]} stay",
        }
        return Target(cfg, pruner_of(cfg).cost(cfg, model), f"sparsegpt-{text.replace(':', 'of')}", why)
    share = _share("--sparsity", text, "50%, or a pattern such as 2:4")
    spread = Wanda.model_fields["spread"].default
    uneven = spread < share < 1 - spread
    cfg = Wanda(sparsity=share, calibration=calibration, allocation=defaults.ALLOCATION if uneven else "uniform")
    why = {
        "kind": "zeros by |W| * ||x||; files and stock kernels are as large and as slow as dense",
        "sparsity": f"{share:.0%} of the weights in the blocks' linear layers become zero",
        "allocation": defaults.ALLOCATION_SOURCE if uneven else "the same in each block",
    }
    return Target(cfg, pruner_of(cfg).cost(cfg, model), f"wanda{round(share * 100)}", why)


def _params(wanted: Wanted, model: Description, calibration: Calibration, _element: int) -> Target:
    goal = _number("--params", wanted.params or "", COUNTS, "1.2B")

    def fits(cost: Cost) -> bool:
        return model.parameters - cost.unstored <= goal

    said = f"{model.parameters:,} parameters"
    return _least(wanted, "--params", fits, said, model, calibration)


def _memory(wanted: Wanted, model: Description, calibration: Calibration, element: int) -> Target:
    goal = _number("--memory", wanted.memory or "", BYTES, "8GB")
    tokens = min(SERVED_TOKENS, model.context or SERVED_TOKENS)

    def taken(cost: Cost) -> float:
        cache = tokens * memory.kv_bytes_per_token(model, element) * (1 - cost.blocks)
        return (model.parameters - cost.unstored) * element + cache

    said = f"{console.size(taken(Cost()))} of weights and of a KV cache of {tokens:,} tokens"
    return _least(wanted, "--memory", lambda cost: taken(cost) <= goal, said, model, calibration)


def _speedup(wanted: Wanted, model: Description, calibration: Calibration, _element: int) -> Target:
    goal = wanted.speedup or 0.0
    if goal <= 1:
        raise RecipeError(f"--speedup: found {goal:g}, expected more than 1, such as 1.3")
    if wanted.by == "width":
        raise RecipeError("--speedup: narrower MLPs decoded no faster where measured (docs/results.md): leave --by out")
    read = model.parameters - (0 if model.tied else model.embedding_parameters // 2)  # of a table, one row a token

    def fits(cost: Cost) -> bool:
        return read / (read - cost.gone) >= goal

    return _least(wanted, "--speedup", fits, f"{read:,} weights that a token reads", model, calibration)


def _least(wanted: Wanted, option: str, fits: Any, said: str, model: Description, calibration: Calibration) -> Target:
    """The smallest pruning that fits. Raises RecipeError if the dense model does already, or none does."""
    asked = getattr(wanted, option.removeprefix("--"))
    by = wanted.by or ("depth" if option == "--speedup" else "width")
    if fits(Cost()):
        raise RecipeError(f"{option} {asked}: the dense model has {said}, which is enough: nothing needs to go")
    tried = 0
    for each in _ever_smaller(by, model, calibration):
        tried += 1
        if fits(each.cost):
            return each
    raise RecipeError(
        f"{option} {asked}: the dense model has {said}, and no pruning by {by} reaches it ({tried} were tried); "
        f"ask for less, give --by {'width' if by == 'depth' else 'depth'}, or begin with a smaller model"
    )


def _ever_smaller(by: str, model: Description, calibration: Calibration) -> Iterable[Target]:
    if by == "depth":
        for count in range(1, model.blocks - 1):
            yield _blocks(count, model, calibration)
        return
    step = Width(mlp=0.5, calibration=calibration).step(model.intermediate)
    for neurons in range(model.intermediate - model.intermediate % step, 0, -step):
        if neurons < model.intermediate:
            yield _neurons(1 - neurons / model.intermediate, model, calibration)


def _blocks(count: int, model: Description, calibration: Calibration) -> Target:
    cfg = Depth(count=max(1, count), calibration=calibration)
    cost = pruner_of(cfg).cost(cfg, model)
    stay = round(model.parameters - cost.unstored)
    share = cost.gone / model.parameters
    why = {
        "kind": "blocks go whole: the model gets smaller, faster, and so does its KV cache, in stock tools",
        "count": f"of {model.blocks} blocks: {share:.1%} of the parameters, {model.parameters:,} become {stay:,}",
        "score": defaults.SCORE_SOURCE,
    }
    return Target(cfg, cost, f"drop{count}", why)


def _neurons(share: float, model: Description, calibration: Calibration) -> Target:
    share = round(share, 4)
    text = calibration.model_copy(update={"samples": defaults.WIDTH_SAMPLES})
    cfg = Width(mlp=share, score=defaults.WIDTH_SCORE, repair=defaults.WIDTH_REPAIR, calibration=text)
    cost = pruner_of(cfg).cost(cfg, model)
    stay = round(model.parameters - cost.unstored)
    why = {
        "kind": "MLPs get narrower: least harm at equal parameters where measured; dropped blocks decode faster",
        "mlp": f"{model.intermediate:,} neurons become {cfg.neurons(model.intermediate):,} in each block: "
        f"{cost.gone / model.parameters:.1%} of the parameters, {model.parameters:,} become {stay:,}",
        "score": defaults.WIDTH_SCORE_SOURCE,
        "repair": defaults.WIDTH_REPAIR_SOURCE,
        "samples": defaults.WIDTH_SAMPLES_SOURCE,
    }
    return Target(cfg, cost, f"width{round(share * 100)}", why)


def _share(option: str, text: str, example: str) -> float:
    """`25%` or `0.25` as a fraction between 0 and 1."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(%?)", text.strip())
    share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < share < 1:
        raise RecipeError(f"{option}: found {text!r}, expected a share such as {example}")
    return share


def _number(option: str, text: str, scales: dict[str, float], example: str) -> float:
    """`1.2B` or `8GB` as a number."""
    match = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?) ?([A-Z]*)", text.strip().upper())
    if match is None or match[2] not in scales:
        raise RecipeError(f"{option}: found {text!r}, expected a number such as {example}")
    return float(match[1].replace("_", "").replace(",", "")) * scales[match[2]]


@dataclass(frozen=True)
class Machine:
    """What a process has: a GPU or the CPU, its memory in bytes, and the dtype that it computes fast in.

    `count`: of the GPUs; `cores`: of the CPU, where there is none.
    """

    device: str
    name: str
    memory: int
    dtype: str
    count: int = 1
    cores: int = 1

    @property
    def usable(self) -> float:
        return self.memory * (memory.USABLE if self.device == "cuda" else memory.MAIN_USABLE)


@dataclass(frozen=True)
class Texts:
    """What a recipe reads: prompts (with what they are), and tasks; `probe`: prompts where no task gives any.

    `writing`: how many of the tasks let the model write.
    """

    prompts: tuple[tuple[str, str], ...]
    tasks: tuple[tuple[str, str], ...]
    runs_code: bool = False
    probe: str | None = None
    writing: int = 1


def this_machine() -> Machine:
    """The machine of this process; of several GPUs the smallest counts."""
    found = provenance.machine()
    cores = found["cores"] or 1
    if dist.device().type == "cpu":
        return Machine("cpu", f"{cores} CPU core{'s' * (cores > 1)}", found["memory_bytes"], "float32", cores=cores)
    least = min(found["gpus"], key=lambda gpu: gpu["memory_bytes"])
    half = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return Machine("cuda", least["name"], least["memory_bytes"], half, len(found["gpus"]))


def dtype_for(machine: Machine, model: Description) -> tuple[str, str]:
    """The dtype to load the model in, and why."""
    if machine.device == "cuda":
        return machine.dtype, f"what {machine.name} computes fast in"
    if model.parameters * 4 <= machine.usable / 2:
        return "float32", "no GPU is found, and a CPU computes fastest in it"
    return "bfloat16", f"no GPU is found, and float32 weights would take {console.size(model.parameters * 4)}"


def draft(source: str, model: Description, goal: Target, texts: Texts, machine: Machine, **given: Any) -> list[Line]:
    """The lines of a recipe, each with its reason.

    `given`: `name`, `tokens` and `out` (where the recipe will lie) where they were asked for. The result is a recipe:
    `parse_recipe` takes it.
    """
    size = defaults.training(model.parameters)
    dtype, dtype_why = dtype_for(machine, model)
    work = _work(model, goal, texts)
    sizes = _sizes(work, machine, given.get("tokens"))
    new_tokens = sizes.now[WRITTEN]
    length = min(new_tokens + defaults.PROMPT_TOKENS, model.context or 2**31)
    lines: list[Line] = [
        ("name", given.get("name") or f"{slug(source)}-{goal.word}", "of the folder under checkpoints/"),
        ("seed", 0, "of calibration, written text, order and draws; another one shows the noise"),
        ("model", HEADING, f"{model.parameters:,} parameters, {model.blocks} blocks, width {model.width:,}"),
        ("model.source", source, "hub id, folder or GGUF file; a relative path is seen from this file"),
        ("model.dtype", dtype, dtype_why),
        *_prune(goal, texts),
        *_probe(texts, sizes),
        *_train(work, size, sizes, given.get("tokens")),
        *_data(texts, sizes),
        *_measure(texts, sizes),
    ]
    lines = _set(lines, "train.length", length, _length_why(length, new_tokens, model))
    return _fitted(lines, model, goal, machine, new_tokens)


@dataclass(frozen=True)
class Sizes:
    """How much of everything there is: `now` in the recipe, `gpu` where there is one."""

    now: affordable.Sizes
    gpu: affordable.Sizes

    def line(self, path: str, why: str, *, field: str | None = None, of_gpu: bool = False) -> Line:
        """A line of the recipe; where a GPU takes more, it says so.

        `field`: its path, where it is another. `of_gpu`: the reason is one for what a GPU takes.
        """
        now, gpu = self.now[path], self.gpu[path]
        if now == gpu:
            return field or path, now, why
        return field or path, now, _with_gpu(gpu, why) if of_gpu else f"{why}; with a GPU {gpu:,}"


def _with_gpu(value: int, why: str) -> str:
    return f"with a GPU {value:,}: {why}"


def _work(model: Description, goal: Target, texts: Texts) -> Work:
    return Work(model, goal.prune, goal.cost, len(texts.tasks), texts.writing)


def _sizes(work: Work, machine: Machine, tokens: int | None) -> Sizes:
    gpu = affordable.sizes_of(work, tokens)
    return Sizes(gpu if machine.device == "cuda" else affordable.fitted(gpu, work, machine.cores, tokens), gpu)


def affordably(goal: Target, model: Description, machine: Machine) -> Target:
    """The target with as much text to judge by as this machine reads in minutes, where it has no GPU."""
    if machine.device == "cuda":
        return goal
    cfg = affordable.calibrated(goal.prune, model, machine.cores)
    if cfg == goal.prune:
        return goal
    gpu, now = (affordable.text_sizes(getattr(each, "calibration", None)) for each in (goal.prune, cfg))
    less = {path.rpartition(".")[2]: value for path, value in gpu.items() if now[path] != value}
    told = {"samples": defaults.SAMPLES_SOURCE, "answer": defaults.ANSWER_SOURCE, "length": LENGTH_WHY} | goal.why
    why = goal.why | {name: _with_gpu(value, told[name]) for name, value in less.items()}
    return Target(cfg, pruner_of(cfg).cost(cfg, model), goal.word, why)


def smaller(
    lines: Sequence[Line], wanted: Target, model: Description, texts: Texts, *, tokens: int | None = None
) -> list[str]:
    """What is smaller in these lines than where there is a GPU, which takes what stands in brackets.

    `wanted`: the target before `affordably` made its text less. `tokens`: of the training, where they were asked for.
    """
    values, work = _values(lines), _work(model, wanted, texts)
    gpu = affordable.text_sizes(work.calibration) | affordable.sizes_of(work, tokens)
    return affordable.smaller({WRITTEN: values["train.data.0.max_new_tokens"]} | values, gpu)


def _prune(goal: Target, texts: Texts) -> Iterator[Line]:
    cfg, why = goal.prune, goal.why
    yield "prune", HEADING, "what goes"
    fields = {
        Depth: ("kind", "count", "score"),
        Width: ("kind", "mlp", "score", "repair"),
        Wanda: ("kind", "sparsity", "allocation"),
        SparseGpt: ("kind", "pattern"),
    }[type(cfg)]
    for field in fields:
        yield f"prune.{field}", getattr(cfg, field), why[field]
    if isinstance(cfg, Depth) and cfg.iterative is not None:
        yield "prune.iterative", cfg.iterative, "with a GPU true: what is left is scored anew after each drop"
    assert isinstance(cfg, Depth | Width | Wanda | SparseGpt), "one that `target` gives"
    calibration = cfg.calibration
    assert calibration is not None
    yield "prune.calibration", HEADING, "text on which it is judged what goes"
    yield "prune.calibration.data", calibration.data, defaults.OWN_TEXT_SOURCE
    yield "prune.calibration.column", calibration.column, "of that data"
    yield "prune.calibration.answer", calibration.answer, why.get("answer", defaults.ANSWER_SOURCE)
    yield "prune.calibration.samples", calibration.samples, why.get("samples", defaults.SAMPLES_SOURCE)
    yield "prune.calibration.length", calibration.length, why.get("length", LENGTH_WHY)


def calibration_for(texts: Texts, model: Description) -> Calibration:
    """Own answers to the prompts of all sources: a blend of blends, else the first file."""
    names = [name for name, _ in texts.prompts]
    blended = all(name.startswith("blend:") for name in names)
    data = "blend:" + "+".join(name.removeprefix("blend:") for name in names) if blended else names[0]
    length = min(512, model.context or 512)
    answer = min(defaults.ANSWER, max(1, length // 2))
    return Calibration(data=data, column="prompt", answer=answer, samples=defaults.SAMPLES, length=length)


def _probe(texts: Texts, sizes: Sizes) -> Iterator[Line]:
    yield "probe", HEADING, "how far the pruned model is from the dense one, before and after"
    if texts.probe is not None:
        yield "probe.prompts", texts.probe, "no generate task gives prompts to probe with"
    yield sizes.line("probe.samples", "prompts along whose answers it is measured")
    yield sizes.line("probe.steps", "tokens of each answer")
    if sizes.now["probe.layer_positions"] != sizes.gpu["probe.layer_positions"]:
        yield sizes.line("probe.layer_positions", "positions at which each block is looked at, of a batch")
    yield "probe.batch_size", 16, "prompts at once"


def _train(work: Work, size: defaults.Training, sizes: Sizes, tokens: int | None) -> Iterator[Line]:
    unlike = "; not measured at this size" if work.model.parameters > defaults.MEASURED_UP_TO else ""
    why = "as asked for" if tokens else affordable.tokens(work)[1]
    yield "train", HEADING, "how generation is brought back: LoRA, by distilling from the dense model"
    yield sizes.line("train.epochs", defaults.EPOCHS_SOURCE)
    yield sizes.line("train.tokens", why if tokens else why + unlike, of_gpu=True)
    yield "train.length", 0, ""
    yield sizes.line("train.batch_size", f"sequences a step; {size.source}", of_gpu=True)
    yield "train.micro_batch_size", sizes.now["train.batch_size"], ""
    yield "train.gradient_checkpointing", False, ""
    if unlike:
        yield "train.lr", "auto", "no rate was measured at this size: short trials on the run's own text find one"
    else:
        yield "train.lr", size.lr, size.source
    yield "train.warmup", defaults.WARMUP, defaults.WARMUP_SOURCE
    yield "train.scheduler", defaults.SCHEDULER, defaults.SCHEDULER_SOURCE
    yield "train.lora", HEADING, "adapters on all linear layers of the blocks that stay"
    yield "train.lora.rank", size.rank, "of the adapters; 256 at the same rate kept 9 points less (0.5B)"
    yield "train.loss", HEADING, "KL(dense || pruned); neither variance nor weights on tokens brought more"
    yield "train.loss.kl", 1.0, "its weight"
    yield "train.loss.scored", defaults.SCORED, defaults.SCORED_SOURCE
    yield "train.loss.chunk", CHUNKS[0], ""


def _data(texts: Texts, sizes: Sizes) -> Iterator[Line]:
    yield "train.data", HEADING, "text that the dense model writes itself, in equal parts of the tokens"
    for number, (prompts, about) in enumerate(texts.prompts):
        at = f"train.data.{number}"
        yield f"{at}.kind", "dense", "the dense model's own text keeps its distribution; given text does not"
        yield f"{at}.prompts", prompts, about
        yield f"{at}.share", 1.0, "part of the tokens, relative to the other sources"
        yield f"{at}.temperature", defaults.TEMPERATURE, defaults.TEMPERATURE_SOURCE
        yield sizes.line(WRITTEN, defaults.NEW_TOKENS_SOURCE, field=f"{at}.max_new_tokens", of_gpu=True)
        yield f"{at}.batch_size", 1, ""


def _measure(texts: Texts, sizes: Sizes) -> Iterator[Line]:
    yield "measure", HEADING, "what is asked of dense, pruned and recovered alike"
    yield "measure.tasks", HEADING, "the generate and code tasks choose the best epoch"
    for number, (task, about) in enumerate(texts.tasks):
        yield f"measure.tasks.{number}", task, about
    yield sizes.line("measure.limit", "items of each task, the first ones" + _spread(sizes.now["measure.limit"]))
    yield sizes.line("measure.epoch_limit", "after each epoch" + _spread(sizes.now["measure.epoch_limit"]))
    yield sizes.line("measure.max_new_tokens", defaults.MEASURED_TOKENS_SOURCE)
    yield "measure.batch_size", 1, ""
    yield "measure.sampling", None, "greedy alone; {temperature: 0.7} measures drawn texts beside it"
    if texts.runs_code:
        yield "measure.allow_code_execution", True, "a task runs what the model writes; false: take that task out"


def _spread(items: int) -> str:
    """The widest interval of 95% of a share of so many items."""
    return f": an interval of 95% of up to {98 / items**0.5:.1f} points on either side"


def _length_why(length: int, new_tokens: int, model: Description) -> str:
    room = f"{defaults.PROMPT_TOKENS} tokens of prompt and {new_tokens} of answer"
    return room if length < (model.context or 2**31) else f"the model's context; {room} would be better"


def _values(lines: Sequence[Line]) -> JsonObject:
    return {path: value for path, value, _ in lines}


def _set(lines: Sequence[Line], path: str, value: Any, why: str) -> list[Line]:
    return [(path, value, why) if line[0] == path else line for line in lines]


def _fitted(lines: list[Line], model: Description, goal: Target, machine: Machine, new_tokens: int) -> list[Line]:
    """Batches, checkpointing and chunk as large as memory allows."""
    element = ELEMENT_BYTES[_values(lines)["model.dtype"]]
    room = f"of {console.size(machine.memory)} ({machine.name})"
    writing = _at_once(model, element, machine, defaults.PROMPT_TOKENS + new_tokens)
    for number in range(sum(path.endswith(".prompts") and path.startswith("train.data") for path, _, _ in lines)):
        lines = _set(lines, f"train.data.{number}.batch_size", writing, f"texts written at once, {room}")
    measured = _values(lines)["measure.max_new_tokens"]
    batch = min(writing, _at_once(model, element, machine, defaults.PROMPT_TOKENS + measured))
    lines = _set(lines, "measure.batch_size", batch, f"texts at once, {room}")
    return _trained(lines, model, goal, machine)


def _at_once(model: Description, element: int, machine: Machine, tokens: int) -> int:
    """Texts of so many tokens whose KV cache there is room for, a power of two."""
    free = machine.usable - model.parameters * element - memory.RUNTIME_BYTES
    each = tokens * memory.kv_bytes_per_token(model, element) + model.vocabulary * WORKING_LOGITS
    most = MOST_AT_ONCE[machine.device]
    return next(
        (size for size in (2**power for power in range(most.bit_length() - 1, 0, -1)) if size * each <= free), 1
    )


def _trained(lines: list[Line], model: Description, goal: Target, machine: Machine) -> list[Line]:
    batch = _values(lines)["train.batch_size"]
    sizes = [size for size in range(batch, 0, -1) if batch % size == 0]
    tried = [(micro, chunk, less) for less in (False, True) for micro in sizes for chunk in CHUNKS]
    for micro, chunk, less in tried:
        lines = _set(lines, "train.micro_batch_size", micro, "")
        lines = _set(lines, "train.gradient_checkpointing", less, "")
        lines = _set(lines, "train.loss.chunk", chunk, "")
        needed = memory.peak_bytes(model, training_memory(recipe_of(lines), model, goal.cost))
        if needed <= machine.usable:
            break
    else:
        micro, chunk, less = tried[-1]
    said = f"{console.size(needed)} by `plan`'s arithmetic, {console.size(machine.memory)} there"
    fits = said if needed <= machine.usable else f"TOO LARGE for this machine: {said}"
    lines = _set(lines, "train.micro_batch_size", micro, f"sequences at once on a process: {fits}")
    why = "less memory, a third more time: needed here" if less else "not needed here; less memory, a third more time"
    lines = _set(lines, "train.gradient_checkpointing", less, why)
    return _set(lines, "train.loss.chunk", chunk, "positions scored at once: a matter of memory only")


def fits(lines: Sequence[Line]) -> bool:
    """Whether the training has room on the machine that the lines were made for."""
    return not any("TOO LARGE" in why for _, _, why in lines)


def recipe_of(lines: Sequence[Line]) -> Recipe:
    """The recipe that the lines make."""
    return parse_recipe(yaml_values.load(written(lines), "draft"), "draft")


def written(lines: Sequence[Line], head: Iterable[str] = ()) -> str:
    """The recipe as text, below comments."""
    return "".join(f"# {line}\n" for line in head) + yaml_values.dump_commented(lines)


def slug(source: str) -> str:
    """A name for a run of this model: small letters of its last part."""
    last = re.sub(r"\.(gguf)$", "", os.path.basename(os.path.normpath(source.removeprefix("embedded:"))), flags=re.I)
    return re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("-._") or "model"


def relative(source: str, folder: Path) -> str:
    """A local path as a recipe in `folder` names it; a hub id or `embedded:NAME` as it is."""
    path = Path(source).expanduser()
    if source.startswith("embedded:") or not path.exists():
        return source
    found = os.path.relpath(path.absolute(), folder.absolute())
    return str(path.absolute()) if found.startswith(f"..{os.sep}..") else os.path.join(".", found)
