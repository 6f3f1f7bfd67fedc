"""What a run will cost, from the recipe and the model's configuration alone: sizes, tokens, time, memory.

Every figure is an estimate and says so; refusals are exact. Weights are not loaded.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from recover.base import console, dist, memory, provenance
from recover.base.artifacts import JsonObject
from recover.base.errors import ExportError, PruneError, RecipeError, TrainingError
from recover.config.defaults import Chosen, Facts, row_tokens, settled
from recover.config.recipe import PrunedText, Recipe, Train
from recover.config.train import refuse_averaging_shares, refuse_sharding_twice, split_batch
from recover.export.gguf.family import family_of, refuse_type
from recover.export.gguf.family import refuse as refuse_family
from recover.export.gguf.vocabulary import vocabulary
from recover.export.gguf.write import beside, nearest, planned_bytes, require_ggml
from recover.models.load import Description, checked_config, describe
from recover.models.source import exported_dtype, read_config
from recover.prune.registry import Cost, pruner_of
from recover.train.trials import planned

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Share of the measured matrix rate that a whole training step reaches.
STEP_EFFICIENCY = 0.35
PROMPT_TOKENS = 256  # of a measured prompt: tasks are not read here
SMALLER_CHUNKS = (512, 128)  # of `train.loss.chunk`


def refuse(recipe: Recipe, model: Description) -> None:
    """Raise RecipeError, naming the field, for what cannot work on this model."""
    try:  # what pruning itself would refuse, after the dense model was measured for nothing
        pruner_of(recipe.prune).cost(recipe.prune, model)
    except PruneError as error:
        raise RecipeError(str(error)) from None
    _refuse_cache(recipe, model)
    texts = {"prune": getattr(recipe.prune, "calibration", None), "deploy": recipe.deploy.calibration}
    for section, text in texts.items():
        if text is not None and text.length > (model.context or text.length):
            raise RecipeError(
                f"{section}.calibration.length: {text.length} tokens, the model's context is {model.context}: give at "
                "most that"
            )
    if recipe.train.length > (model.context or recipe.train.length):
        raise RecipeError(f"train.length: {recipe.train.length} tokens, the model's context is {model.context}")
    if model.mixture is None and {*recipe.train.lora.parts} - {"linears"}:
        raise RecipeError(
            f"train.lora.parts: {list(recipe.train.lora.parts)}, and {model.model_type} models have no experts: "
            "use [linears]"
        )
    if (
        model.mixture is not None
        and "shared" in recipe.train.lora.parts
        and not (model.mixture.shared or model.mixture.plain)
    ):
        raise RecipeError(
            f"train.lora.parts: 'shared' is for shared experts and for MLPs in blocks without experts, and this "
            f"{model.model_type} model has neither: leave it out"
        )
    widest = max(model.width, model.intermediate, model.heads * model.head_size)
    if recipe.train.lora.rank > widest:
        raise RecipeError(
            f"train.lora.rank: {recipe.train.lora.rank:,} is more than the widest matrix of the model has rows, "
            f"{widest:,}: a matrix of that rank holds all there is; lower it"
        )
    _refuse_training(recipe.train)


def _refuse_training(cfg: Train) -> None:
    """What training itself would refuse, after everything before it was done for nothing."""
    try:
        split_batch(cfg, dist.world_size())
        refuse_sharding_twice(cfg)
        refuse_averaging_shares(cfg)
    except TrainingError as error:
        raise RecipeError(str(error)) from None
    needed = cfg.batch_size * cfg.epochs
    if cfg.tokens < needed:  # a sequence has one scored token at least
        raise RecipeError(
            f"train.tokens: {cfg.tokens:,} tokens are less than {cfg.epochs} epochs of one step of "
            f"{cfg.batch_size} sequences: raise tokens, or lower batch_size or epochs"
        )


def _refuse_cache(recipe: Recipe, model: Description) -> None:
    """Raise RecipeError where the disk has no room. What lies in the folder already counts as part of what is needed.

    Training refuses again, by the text itself, before it computes anything.
    """
    cfg = recipe.train.cache
    if cfg is None:
        return
    folder = Path(cfg.folder).absolute()
    there = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    needed = cache_bytes(recipe, model)
    if needed > free + there:
        raise RecipeError(
            f"train.cache.folder: {folder} needs at least {needed:,} bytes, and has {there:,} of them and {free:,} "
            "free: make room, name another folder, lower train.tokens, or leave train.cache out"
        )


def settle(recipe: Recipe) -> tuple[Recipe, list[Chosen]]:
    """The recipe with what is `auto` in `train` replaced, but for `lr`, and what was taken, with reasons.

    Raises:
        RecipeError: pruning would refuse this model. ModelError: the model cannot be described.
    """
    if not {*recipe.train.auto} - {"lr"}:
        return recipe, []
    model = describe(recipe.model)
    try:
        cost = pruner_of(recipe.prune).cost(recipe.prune, model)
    except PruneError as error:
        raise RecipeError(str(error)) from None
    facts = Facts(model.width, model.parameters, cost.share(model))
    cfg, chosen = settled(recipe.train, facts)
    return recipe.model_copy(update={"train": cfg}), chosen


def rate_plan(cfg: Train, width: int) -> str:
    """What `lr: auto` will do, as far as can be said before there is text."""
    rows = cfg.tokens / row_tokens(cfg)
    return planned(cfg, width, [round(cfg.tokens / rows)] * round(rows)).why


def warnings(recipe: Recipe, model: Description) -> list[str]:
    """What will probably disappoint, said before hours are spent."""
    found, dtype = [], recipe.model.dtype
    if dist.device().type == "cpu" and dtype != "float32":
        found.append(f"no GPU is found: everything runs on the CPU, in {dtype} as model.dtype says")
    found += filter(None, [too_large(recipe, model, room())])
    if recipe.model.load_in is not None:
        found.append(
            f"model.load_in: what is pruned, what teaches and what is measured is the model in {recipe.model.load_in}; "
            "the export is merged into the weights of the files, and is not measured as it is"
        )
    return [*found, *_few_sequences(recipe.train), *pruner_of(recipe.prune).cost(recipe.prune, model).warnings]


def _few_sequences(cfg: Train) -> Iterator[str]:
    """A warning where long texts may leave fewer sequences than training takes, which only their lengths will show."""
    needed, made = cfg.batch_size * cfg.epochs, cfg.tokens // cfg.length
    if made < needed:
        yield (
            f"train.tokens: {cfg.tokens:,} tokens make only {made} sequences where each has the {cfg.length:,} tokens "
            f"of train.length, and training ends with an error below {needed}, one step of {cfg.batch_size} an epoch: "
            "raise tokens, or lower batch_size or epochs"
        )


def training_memory(recipe: Recipe, model: Description, cost: Cost) -> memory.Training:
    """What decides the memory of this recipe without DeepSpeed (which takes less: `launch/README.md`)."""
    cfg = recipe.train
    micro = cfg.micro_batch_size or cfg.batch_size // dist.world_size()
    return memory.Training(
        tokens=micro * cfg.length,
        rank=cfg.lora.rank,
        parts=cfg.lora.parts,
        averaged=cfg.average is not None,
        chunk=cfg.loss.chunk,
        checkpointing=cfg.gradient_checkpointing,
        element=ELEMENT_BYTES[recipe.model.dtype],
        kept_blocks=round(model.blocks * (1 - cost.blocks)),
        masked=cost.masked,
        own=cost.own,
        cached=_cached(recipe, model),
        processes=dist.world_size(),
        sharded=dist.local_world_size() if cfg.shard_weights else 1,
        zero=dist.zero_stage() if cfg.shard_weights else 0,
        place={"none": "gpu"}.get(recipe.model.offload, recipe.model.offload),
        bits=int(recipe.model.load_in.removesuffix("bit")) if recipe.model.load_in else 0,
    )


def _cached(recipe: Recipe, model: Description, most: int = 2**31) -> int:
    """Tokens in the KV cache while texts are written, `most` at once."""
    text = min(recipe.measure.max_new_tokens + PROMPT_TOKENS, model.context or 2**31)
    own = [each.batch_size for each in recipe.train.data if isinstance(each, PrunedText)]
    return max(min(recipe.measure.batch_size, most) * text, *(min(rows, most) * recipe.train.length for rows in own), 0)


def room() -> memory.Room:
    """What this process's machine has to give."""
    host = round(memory.MAIN_USABLE * provenance.machine()["memory_bytes"])
    device = dist.device()
    if device.type != "cuda" or not torch.cuda.is_available():
        return memory.Room(None, host, dist.local_world_size())
    there = torch.cuda.get_device_properties(device).total_memory
    return memory.Room(int(memory.USABLE * there), host, dist.local_world_size())


def too_large(recipe: Recipe, model: Description, there: memory.Room) -> str:
    """What to set where a run has no room, the least trouble first; empty where it fits."""
    training = training_memory(recipe, model, pruner_of(recipe.prune).cost(recipe.prune, model))
    if there.holds(model, training):
        return ""
    there = replace(there, files=model.in_files)
    gpu, host = there.takes(model, training)
    short = [
        f"{'a GPU' if is_gpu else 'main memory'} has {console.size(has)} for this run, which takes about "
        f"{console.size(takes)}"
        for is_gpu, has, takes in ((True, there.gpu or 0, gpu), (False, there.host, host))
        if takes > has
    ]
    said, tries = "; ".join(short), [*_tries(recipe, model, training)]
    found = memory.fitting(model, tries, there)
    if found is not None:
        launched = " under launch/gpu.yaml" if training.zero and not found.training.zero else ""
        taken = _takes(model, found.training, there)
        return f"{said}. The nearest that fits{launched}: {_fields(recipe, found)} ({taken})"
    least = min(memory.fittings(tries, there), key=lambda each: max(_excess(model, each.training, there)))
    return (
        f"{said}. No setting makes it fit here; nearest is {_fields(recipe, least)} "
        f"({_takes(model, least.training, there)}): take a machine with so much, or a smaller model"
    )


def _tries(
    recipe: Recipe, model: Description, training: memory.Training
) -> Iterator[tuple[dict[str, object], memory.Training]]:
    """The training as it is, and the same with ever less at once: no figure of it changes, but for rounding."""
    cfg = recipe.train
    share = cfg.batch_size // dist.world_size()
    micro = cfg.micro_batch_size or share
    writing = {"measure": recipe.measure.batch_size}
    writing |= {f"train.data.{n}": each.batch_size for n, each in enumerate(cfg.data) if isinstance(each, PrunedText)}
    largest = max(writing.values())
    at_once = [largest, *(2**power for power in range(largest.bit_length() - 1, -1, -1) if 2**power < largest)]
    sizes = [size for size in range(micro, 0, -1) if share % size == 0]
    chunks = [cfg.loss.chunk, *(chunk for chunk in SMALLER_CHUNKS if chunk < cfg.loss.chunk)]
    for size, chunk, texts in product(sizes, chunks, at_once):
        asked = {"train.micro_batch_size": (micro, size), "train.loss.chunk": (cfg.loss.chunk, chunk)}
        asked |= {f"{name}.batch_size": (count, min(count, texts)) for name, count in writing.items()}
        fields: dict[str, object] = {name: now for name, (was, now) in asked.items() if was != now}
        cached = _cached(recipe, model, texts)
        yield fields, replace(training, tokens=size * cfg.length, chunk=chunk, cached=cached)


def _fields(recipe: Recipe, found: memory.Fitting) -> str:
    """What is to be set in this recipe; a place that it asks for, and that does not fit, is taken back."""
    place = {"model.offload": "none", "model.load_in": None}
    now: dict[str, object] = {
        "model.offload": recipe.model.offload,
        "model.load_in": recipe.model.load_in,
        "train.gradient_checkpointing": recipe.train.gradient_checkpointing,
        "train.shard_weights": recipe.train.shard_weights,
    }
    wanted = {name: value for name, value in (place | found.fields).items() if name not in now or now[name] != value}
    said = [f"{name}: {'null' if value is None else str(value).lower()}" for name, value in wanted.items()]
    return ", ".join(said) or "this recipe as it is"


def _takes(model: Description, training: memory.Training, there: memory.Room) -> str:
    gpu, host = there.takes(model, training)
    parts = [f"{console.size(gpu)} of a GPU"] if there.gpu is not None else []
    return " and ".join([*parts, *([f"{console.size(host)} of main memory"] if host else [])])


def _excess(model: Description, training: memory.Training, there: memory.Room) -> tuple[float, float]:
    """How many times what there is, of a GPU and of main memory."""
    gpu, host = there.takes(model, training)
    return gpu / max(1, there.gpu or 1), host / max(1, there.host)


def cache_bytes(recipe: Recipe, model: Description) -> int:
    """Bytes that `train.cache` takes on disk at least: a state for each scored token, once more with the prefix.

    A prefix holds positions without loss too (prompts, unless `loss.scored` is all), which only the text can tell.
    """
    cfg = recipe.train
    if cfg.cache is None:
        return 0
    return cfg.tokens * model.width * ELEMENT_BYTES[recipe.model.dtype] * (1 + cfg.cache.prefix)


def matrix_rate() -> float:
    """FLOP/s of one matrix product on this device, measured in 0.3 s of a GPU, whose clock has to rise, or 0.05 s."""
    device = dist.device()
    size, dtype, seconds = (4096, torch.bfloat16, 0.3) if device.type == "cuda" else (512, torch.float32, 0.05)
    left = torch.randn(size, size, device=device, dtype=dtype)
    torch.mm(left, left)  # warm up
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        (left @ left)[0, 0].item()
        products += 1
    return products * 2 * size**3 / (time.perf_counter() - started)


class PlannedFile(TypedDict):
    """The file of stage deploy, and of the dense model beside it; bytes of weights."""

    quantize: str
    bytes: int
    beside: NotRequired[str]
    beside_bytes: NotRequired[int]


def planned_file(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, figures: Estimate) -> PlannedFile | None:
    """What stage deploy will write; None where it is not asked for.

    Raises RecipeError, naming the field, for a model that is not written as GGUF.
    """
    cfg = recipe.deploy
    if cfg.quantize is None:
        return None
    model = describe(recipe.model)
    try:
        where = recipe.model.source
        refuse_type(str(read_config(recipe.model).get("model_type")), where)  # of a wrapper, which is exported as one
        config = checked_config(recipe.model)
        refuse_family(config, where)
        _refuse_unreadable(config, where)
        vocabulary(tokenizer, model.vocabulary, [])
        require_ggml(cfg.quantize, weighed=recipe.importance_text is not None)
    except ExportError as error:
        instead = "" if "recover gguf" in str(error) else ", and convert the export by another tool"
        raise RecipeError(f"deploy.quantize: {error}. Leave it out{instead}") from None
    if recipe.prune.kind == "depth" and (every := family_of(config).slides) is not None:
        console.warn(
            f"deploy.quantize: llama.cpp lets attention slide in all blocks of {config.model_type} but every block "
            f"{every}: no file is written of blocks that are left in another order, as most choices leave them"
        )
    ends = model.embedding_parameters
    kept = (figures["parameters_pruned"] - ends) / (model.parameters - ends)
    parts = {each: planned_bytes(config, each) for each in {*beside(cfg.quantize), cfg.quantize}}
    head, rest = parts[cfg.quantize]
    found: PlannedFile = {"quantize": cfg.quantize, "bytes": round(head + rest * kept)}
    if cfg.beside is not None:
        sizes = {each: sum(parts[each]) for each in beside(cfg.quantize)}
        kind = nearest(sizes, found["bytes"])
        found["beside"], found["beside_bytes"] = kind, sizes[kind]
    return found


def _refuse_unreadable(config: PretrainedConfig, where: str) -> None:
    """Raise ExportError where transformers reads no GGUF file of this family, so that it could not be measured."""
    if family_of(config).arch not in GGUF_CONFIG_MAPPING:
        raise ExportError(
            f"{where}: a GGUF file of {config.model_type} is written and could not be measured, as transformers reads "
            "none: write one of the export, `recover gguf FOLDER OUT.gguf --dtype q8_0`"
        )


class Estimate(TypedDict):
    """Sizes, tokens, seconds and bytes that a run will need, in plan/estimate.json."""

    parameters_dense: int
    parameters_pruned: int
    active_dense: int
    active_pruned: int
    file_bytes_dense: int
    file_bytes_pruned: int
    file_dtype_dense: str
    file_dtype_pruned: str
    teacher_tokens: int
    search_passes: int
    search_seconds: float
    training_flops: float
    training_seconds: float
    memory_bytes_per_process: int
    host_memory_bytes: int
    cache_bytes: int
    matrix_rate_flops: float
    processes: int
    auto: NotRequired[list[JsonObject]]
    gguf: NotRequired[PlannedFile]


def estimate(recipe: Recipe, model: Description, rate: float) -> Estimate:
    """Sizes, tokens, seconds and bytes that the run will need, per process where it says so.

    Of a mixture of experts, `active` counts the weights that a token goes through; of others, all that run.
    A distillation step costs 2 FLOP per weight and token for the dense pass, 2 for the pruned forward and 2 for its
    backward (frozen weights have no gradient of their own).
    """
    cost = pruner_of(recipe.prune).cost(recipe.prune, model)
    training = training_memory(recipe, model, cost)
    pruned, stored = model.active - cost.gone, model.parameters - cost.unstored
    copied = model.beside * ELEMENT_BYTES[model.stored]  # parts of a wrapper that are not loaded
    exported = exported_dtype(recipe.model.dtype, model.stored, recipe.export.dtype)
    tokens = recipe.train.tokens
    flops = tokens * (2 * model.active + 4 * pruned)
    seconds = flops / (rate * STEP_EFFICIENCY * dist.world_size())
    return {
        "parameters_dense": model.parameters,
        "parameters_pruned": round(stored),
        "active_dense": model.active,
        "active_pruned": round(pruned),
        "file_bytes_dense": model.parameters * ELEMENT_BYTES[model.stored] + copied,
        "file_bytes_pruned": round(stored * ELEMENT_BYTES[exported]) + copied,
        "file_dtype_dense": model.stored,
        "file_dtype_pruned": exported,
        "teacher_tokens": tokens,
        "search_passes": cost.passes,
        "search_seconds": cost.flops / (rate * STEP_EFFICIENCY),  # by one process
        "training_flops": flops,
        "training_seconds": seconds,
        "memory_bytes_per_process": memory.peak_bytes(model, training),
        "host_memory_bytes": memory.host_bytes(model, training),
        "cache_bytes": cache_bytes(recipe, model),
        "matrix_rate_flops": rate,
        "processes": dist.world_size(),
    }
