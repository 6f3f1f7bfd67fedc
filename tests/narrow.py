"""What tests of width share: narrowed twins, and a reference that slices nothing and scores one unit at a time."""

from __future__ import annotations

import copy
import functools

import torch
from tiny import FAMILIES, HYBRIDS, MIXTURES, ids, tiny
from transformers.pytorch_utils import Conv1D

from recover.config import recipe
from recover.models.arch import arch_of, blocks_of
from recover.models.plan import Plan, Pruned
from recover.models.twin import Twin
from recover.prune.width import prune_width

NEURONS, HEAD, SHARED = 96, 16, 2  # of every tiny model; SHARED query heads on a KV head
MLP_ONLY = {"phi3", "olmo2", "olmo3", "granite_swa"}
MLP_ONLY |= {*HYBRIDS, "gemma4_text", "gemma4_unified_text", "olmoe", "gpt_oss", "deepseek_v3"}
MLP_ONLY |= {"stablelm", "stablelm_parallel", "cohere", "gpt_neox", "gpt_neox_sequential", "gpt2", "gpt_bigcode"}
NARROWED = [family for family in FAMILIES if family not in MIXTURES or family not in MLP_ONLY]


def cfg(*, score="activation", repair="none", **fields) -> recipe.Width:
    """Units are cut out as they are, unless a test asks for more: a reference can slice them too."""
    return recipe.Width(score=score, repair=repair, calibration=recipe.Calibration(data="text"), **fields)


def batches() -> list[torch.Tensor]:
    return [ids(2, 24, seed=7), ids(3, 24, seed=8)]


def widths(family: str) -> dict:
    if family in MIXTURES:
        return {"kv_groups": 1}
    return {"mlp": 0.4} if family in MLP_ONLY else {"mlp": 0.4, "kv_groups": 1}


def prune(model, **fields) -> Pruned:
    return prune_width(Twin(copy.deepcopy(model), Plan.none(6)), cfg(**fields), batches())


@functools.cache
def case(family: str):
    """(dense model, what pruning gave): shared, so copied before use."""
    dense = tiny(family)
    return dense, prune(dense, **widths(family))


def width_twin(family: str) -> Twin:
    dense, pruned = case(family)
    return Twin(copy.deepcopy(dense), *pruned)


def inputs_of_last(model, block: int, name: str, tokens: torch.Tensor) -> torch.Tensor:
    """What the last linear of a sublayer sees."""
    seen = []
    linear = blocks_of(model)[block].get_submodule(name)
    handle = linear.register_forward_pre_hook(lambda _module, args: seen.append(args[0].double()))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    handle.remove()
    return seen[0]


def last(model, block: int):
    """The linear of an MLP that writes to the residual stream."""
    return blocks_of(model)[block].get_submodule(name_of_last(model, block))


def matrix(linear) -> torch.Tensor:
    """Its weight (O, I), which GPT-2 stores the other way round."""
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def name_of_last(model, block: int) -> str:
    """Its name inside the block; empty for a block without an MLP."""
    arch = arch_of(model)
    names = [f"{arch.mlp}.{arch.mlp_linears[-1]}"]
    return next((name for name in names if name in dict(blocks_of(model)[block].named_modules())), "")


def lowest(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda unit: (scores[unit], unit))[:count])


def neuron_score(model, block: int, neuron: int, by: str, seen: list[torch.Tensor]) -> float:
    """By the papers' formulas, neuron by neuron."""
    if by == "activation":
        means = [float(sample[:, neuron].abs().mean()) for x in seen for sample in x]
        return sum(mean**2 for mean in means) ** 0.5
    column = matrix(last(model, block))[:, neuron].double()
    return float(torch.cat([x[..., neuron].flatten() for x in seen]).var() * (column @ column))


def group_score(model, block: int, group: int, by: str, seen: list[torch.Tensor]) -> float:
    total = 0.0
    for head in range(group * SHARED, (group + 1) * SHARED):
        channels = range(head * HEAD, (head + 1) * HEAD)
        if by == "activation":
            means = [float(sample[:, list(channels)].norm(dim=-1).mean()) for x in seen for sample in x]
            total += sum(mean**2 for mean in means) ** 0.5
        else:
            arch = arch_of(model)
            path = f"{arch.attention}.{arch.attention_linears[-1]}.weight"
            weight = blocks_of(model)[block].get_parameter(path).double()
            columns = [
                float(torch.cat([x[..., c].flatten() for x in seen]).var() * weight[:, c].norm() ** 2) for c in channels
            ]
            total += sum(columns)
    return total


def silenced(model, by: str = "activation", neurons: int = 40, groups: int = 1):
    """The model with the lowest units' outgoing columns at 0: what they compute reaches nobody. Nothing is sliced."""
    quiet = copy.deepcopy(model)
    with torch.no_grad():
        arch = arch_of(model)
        attention = f"{arch.attention}.{arch.attention_linears[-1]}"
        for block, layer in enumerate(blocks_of(quiet)):
            if neurons and (name := name_of_last(model, block)):
                seen = [inputs_of_last(model, block, name, tokens) for tokens in batches()]
                gone = lowest([neuron_score(model, block, n, by, seen) for n in range(NEURONS)], neurons)
                matrix(last(quiet, block))[:, sorted(gone)] = 0
            if not groups:
                continue
            seen = [inputs_of_last(model, block, attention, tokens) for tokens in batches()]
            for group in lowest([group_score(model, block, g, by, seen) for g in range(2)], groups):
                layer.get_submodule(attention).weight[:, group * SHARED * HEAD : (group + 1) * SHARED * HEAD] = 0
    return quiet


@torch.no_grad()
def logits(model, tokens=None) -> torch.Tensor:
    return model(input_ids=ids(2, 24) if tokens is None else tokens, use_cache=False).logits
