"""A recipe for a model that nobody has tuned: every field with the reason for its value, sized to this machine.

How much goes is `target.py`'s; the values of training are those of `config/defaults.py`; batches, dtype and
checkpointing are what `plan`'s arithmetic has room for.
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
from recover.config import defaults, yaml_values
from recover.config.prune import Depth, SparseGpt, Wanda, Width
from recover.config.recipe import Calibration, Recipe, parse_recipe
from recover.config.yaml_values import HEADING
from recover.models.load import Description
from recover.run.estimate import ELEMENT_BYTES, training_memory
from recover.run.target import Target

MOST_AT_ONCE = {"cuda": 1024, "cpu": 128}  # texts written at once
MEASURED_ITEMS = {"cuda": 1500, "cpu": 100}
CPU_SHARE = 0.7  # of a machine's memory: others live there too
CHUNKS = (4096, 2048, 512, 128)  # positions scored at once, the largest that fits
WORKING_LOGITS = 12  # bytes of a logit while a token is drawn
Line = tuple[str, Any, str]  # dotted path, value, why


@dataclass(frozen=True)
class Machine:
    """What a process has: a GPU or the CPU, its memory in bytes, and the dtype that it computes fast in."""

    device: str
    name: str
    memory: int
    dtype: str
    count: int = 1

    @property
    def usable(self) -> float:
        return self.memory * (memory.USABLE if self.device == "cuda" else CPU_SHARE)


@dataclass(frozen=True)
class Texts:
    """What a recipe reads: prompts (with what they are), and tasks; `probe`: prompts where no task gives any."""

    prompts: tuple[tuple[str, str], ...]
    tasks: tuple[tuple[str, str], ...]
    runs_code: bool = False
    probe: str | None = None


def this_machine() -> Machine:
    """The machine of this process; of several GPUs the smallest counts."""
    found = provenance.machine()
    if dist.device().type == "cpu":
        return Machine("cpu", f"{found['cores']} CPU cores", found["memory_bytes"], "float32")
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
    length = min(defaults.NEW_TOKENS + defaults.PROMPT_TOKENS, model.context or 2**31)
    new_tokens = min(defaults.NEW_TOKENS, length * 2 // 3)
    lines: list[Line] = [
        ("name", given.get("name") or f"{slug(source)}-{goal.word}", "of the folder under checkpoints/"),
        ("seed", 0, "of calibration, written text, order and draws; another one shows the noise"),
        ("model", HEADING, f"{model.parameters:,} parameters, {model.blocks} blocks, width {model.width:,}"),
        ("model.source", source, "hub id, folder or GGUF file; a relative path is seen from this file"),
        ("model.dtype", dtype, dtype_why),
        *_prune(goal, texts),
        *_probe(texts, machine),
        *_train(model, goal, size, machine, given.get("tokens")),
        *_data(texts, new_tokens),
        *_measure(texts, model, machine),
    ]
    lines = _set(lines, "train.length", length, _length_why(length, model))
    return _fitted(lines, model, goal, machine, new_tokens)


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
    assert isinstance(cfg, Depth | Width | Wanda | SparseGpt), "one that `target` gives"
    calibration = cfg.calibration
    assert calibration is not None
    yield "prune.calibration", HEADING, "text on which it is judged what goes"
    yield "prune.calibration.data", calibration.data, defaults.OWN_TEXT_SOURCE
    yield "prune.calibration.column", calibration.column, "of that data"
    yield "prune.calibration.answer", calibration.answer, defaults.ANSWER_SOURCE
    yield "prune.calibration.samples", calibration.samples, why.get("samples", defaults.SAMPLES_SOURCE)
    yield "prune.calibration.length", calibration.length, "tokens of a sample"


def calibration_for(texts: Texts, model: Description) -> Calibration:
    """Own answers to the prompts of all sources: a blend of blends, else the first file."""
    names = [name for name, _ in texts.prompts]
    blended = all(name.startswith("blend:") for name in names)
    data = "blend:" + "+".join(name.removeprefix("blend:") for name in names) if blended else names[0]
    length = min(512, model.context or 512)
    answer = min(defaults.ANSWER, max(1, length // 2))
    return Calibration(data=data, column="prompt", answer=answer, samples=defaults.SAMPLES, length=length)


def _probe(texts: Texts, machine: Machine) -> Iterator[Line]:
    yield "probe", HEADING, "how far the pruned model is from the dense one, before and after"
    if texts.probe is not None:
        yield "probe.prompts", texts.probe, "no generate task gives prompts to probe with"
    yield "probe.samples", 64 if machine.device == "cuda" else 16, "prompts along whose answers it is measured"
    yield "probe.steps", 48, "tokens of each answer"
    yield "probe.batch_size", 16, "prompts at once"


def _train(
    model: Description, goal: Target, size: defaults.Training, machine: Machine, tokens: int | None
) -> Iterator[Line]:
    unlike = "; not measured at this size" if model.parameters > defaults.MEASURED_UP_TO else ""
    budget, why = (tokens, "as asked for") if tokens else _tokens(goal, model, size)
    yield "train", HEADING, "how generation is brought back: LoRA, by distilling from the dense model"
    yield "train.epochs", defaults.EPOCHS, defaults.EPOCHS_SOURCE
    yield "train.tokens", budget, why if tokens else why + unlike
    yield "train.length", 0, ""
    yield "train.batch_size", size.batch_size, f"sequences a step; {size.source}"
    yield "train.micro_batch_size", size.batch_size, ""
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


def _tokens(goal: Target, model: Description, size: defaults.Training) -> tuple[int, str]:
    if isinstance(goal.prune, Wanda | SparseGpt):
        return defaults.tokens_for_zeros(size, goal.prune.fraction, pattern=goal.prune.n_m is not None)
    return defaults.tokens(size, goal.cost.gone / model.parameters)


def _data(texts: Texts, new_tokens: int) -> Iterator[Line]:
    yield "train.data", HEADING, "text that the dense model writes itself, in equal parts of the tokens"
    for number, (prompts, about) in enumerate(texts.prompts):
        at = f"train.data.{number}"
        yield f"{at}.kind", "dense", "the dense model's own text keeps its distribution; given text does not"
        yield f"{at}.prompts", prompts, about
        yield f"{at}.share", 1.0, "part of the tokens, relative to the other sources"
        yield f"{at}.temperature", defaults.TEMPERATURE, defaults.TEMPERATURE_SOURCE
        yield f"{at}.max_new_tokens", new_tokens, defaults.NEW_TOKENS_SOURCE
        yield f"{at}.batch_size", 1, ""


def _measure(texts: Texts, model: Description, machine: Machine) -> Iterator[Line]:
    most = max(1, min(defaults.MEASURED_TOKENS, (model.context or 2**31) * 2 // 3))
    yield "measure", HEADING, "what is asked of dense, pruned and recovered alike"
    yield "measure.tasks", HEADING, "the generate and code tasks choose the best epoch"
    for number, (task, about) in enumerate(texts.tasks):
        yield f"measure.tasks.{number}", task, about
    limit = MEASURED_ITEMS[machine.device]
    yield "measure.limit", limit, "items of each task, the first ones" + _spread(limit)
    yield "measure.epoch_limit", 100, "after each epoch" + _spread(100)
    yield "measure.max_new_tokens", most, defaults.MEASURED_TOKENS_SOURCE
    yield "measure.batch_size", 1, ""
    yield "measure.sampling", None, "greedy alone; {temperature: 0.7} measures drawn texts beside it"
    if texts.runs_code:
        yield "measure.allow_code_execution", True, "a task runs what the model writes; false: take that task out"


def _spread(items: int) -> str:
    """The widest interval of 95% of a share of so many items."""
    return f": an interval of 95% of up to {98 / items**0.5:.1f} points on either side"


def _length_why(length: int, model: Description) -> str:
    room = f"{defaults.PROMPT_TOKENS} tokens of prompt and {defaults.NEW_TOKENS} of answer"
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
