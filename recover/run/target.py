"""How much to prune: from what a person asks for (blocks, neurons, zeros, parameters, memory, speed) to `prune`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from recover.base import console, memory
from recover.base.errors import PruneError, RecipeError
from recover.config import defaults
from recover.config.prune import Depth, Pruning, SparseGpt, Wanda, Width
from recover.config.recipe import Calibration
from recover.models.load import Description
from recover.prune.registry import Cost, pruner_of

SERVED_TOKENS = 4096  # in the KV cache of a model that is to fit a memory
COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
BYTES = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
WAYS = ("depth", "width")


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
    given = [name for name in ("drop", "width", "sparsity", "params", "memory", "speedup") if getattr(wanted, name)]
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
