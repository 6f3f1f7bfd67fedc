"""Where the parts of each supported architecture are: one row of `ARCHS` a model type.

Nothing else in `recover` names a module.

Shapes: V vocabulary, D width.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from recover.base.errors import ModelError
from recover.maths.head import Head
from recover.models.site import Site, Sublayer

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
AROUND_ATTENTION = ("input_layernorm", "post_attention_layernorm")
AROUND_MLP = ("pre_feedforward_layernorm", "post_feedforward_layernorm")


def _no_scale(config: PretrainedConfig) -> float:
    return 1.0


def _no_softcap(config: PretrainedConfig) -> float | None:
    return None


def _final_softcap(config: PretrainedConfig) -> float | None:
    return config.final_logit_softcapping


@dataclasses.dataclass(frozen=True)
class Arch:
    """Names inside one architecture, from the causal LM down.

    logits = softcap(scale * (norm(h) W^T + bias)). The last linear of a sublayer writes to the residual stream. Each
    norm of a block belongs to one sublayer, before or behind it, and goes where the sublayer goes.
    """

    model_type: str
    blocks: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    norm: str = "model.norm"
    head: str = "lm_head"
    embed: str = "model.embed_tokens"
    attention_linears: tuple[str, ...] = ATTENTION
    mlp_linears: tuple[str, ...] = MLP
    logit_scale: Callable[[PretrainedConfig], float] = _no_scale
    softcap: Callable[[PretrainedConfig], float | None] = _no_softcap
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    kv_groups_stay: str = ""  # why width pruning cannot remove KV groups, empty where it can


ARCHS: dict[str, Arch] = {
    arch.model_type: arch
    for arch in (
        Arch("llama"),
        Arch("mistral"),
        Arch("qwen2"),
        Arch("qwen3"),
        Arch("gemma2", softcap=_final_softcap, attention_norms=AROUND_ATTENTION, mlp_norms=AROUND_MLP),
        Arch("gemma3_text", softcap=_final_softcap, attention_norms=AROUND_ATTENTION, mlp_norms=AROUND_MLP),
        Arch(
            "phi3",
            attention_linears=("qkv_proj", "o_proj"),
            mlp_linears=("gate_up_proj", "down_proj"),
            kv_groups_stay="q, k and v are one linear, cut by head counts of the config, which both views share",
        ),
        Arch("smollm3"),
        Arch(
            "olmo2",
            attention_norms=("post_attention_layernorm",),
            mlp_norms=("post_feedforward_layernorm",),
            kv_groups_stay="its q_norm and k_norm take all heads together, so that removing one changes the others",
        ),
        Arch("granite", logit_scale=lambda config: 1.0 / config.logits_scaling),
    )
}


def register(arch: Arch) -> Arch:
    """Make a family of another package known. Raises ValueError if there is a row of its model type."""
    if arch.model_type in ARCHS:
        raise ValueError(f"model type {arch.model_type!r}: there is a row of it already")
    ARCHS[arch.model_type] = arch
    return arch


def base_of(model: nn.Module) -> PreTrainedModel:
    """The causal LM itself, unwrapped if peft holds it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[return-value, operator]


def arch_of(model: PretrainedConfig | nn.Module) -> Arch:
    """The row of this model or config; raises ModelError that shows the row to add."""
    config: Any = model if isinstance(model, PretrainedConfig) else base_of(model).config
    return arch_of_type(config.model_type)


def arch_of_type(model_type: str) -> Arch:
    """The row of a config's `model_type`; raises ModelError that shows the row to add."""
    if model_type not in ARCHS:
        raise ModelError(
            f"model type '{model_type}' is not supported; supported: {', '.join(ARCHS)}. If its modules are "
            "named as in Llama, add this row to ARCHS in recover/models/arch.py, a tiny config to tests/tiny.py, and "
            f"run the tests: Arch({model_type!r}),"
        )
    return ARCHS[model_type]


def kv_heads_of(config: PretrainedConfig) -> int:
    """Key-value heads of a block: as many as query heads where the config names none."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def head_size_of(config: PretrainedConfig) -> int:
    """Rows of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, in dense order."""
    return base_of(model).get_submodule(arch_of(model).blocks)  # type: ignore[return-value]


def final_norm_of(model: nn.Module) -> nn.Module:
    """The norm between the last block and the head."""
    return base_of(model).get_submodule(arch_of(model).norm)


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer of every block, by its module name in the stock model (also where peft has wrapped it)."""
    arch, base = arch_of(model), base_of(model)
    sites = [f"{arch.attention}.{name}" for name in arch.attention_linears]
    sites += [f"{arch.mlp}.{name}" for name in arch.mlp_linears]
    names = [f"{arch.blocks}.{i}.{site}" for i in range(len(blocks_of(model))) for site in sites]
    modules = {name: base.get_submodule(name) for name in names}
    return {name: getattr(module, "base_layer", module) for name, module in modules.items()}  # type: ignore[misc]


def site_of(arch: Arch, name: str) -> Site:
    """The sublayer that a linear layer (by its module name) belongs to."""
    match = re.match(re.escape(arch.blocks) + rf"\.(\d+)\.({arch.attention}|{arch.mlp})\.", name)
    assert match, name
    return Site(int(match[1]), "attention" if match[2] == arch.attention else "mlp")


def part_of(arch: Arch, inside: str) -> Sublayer:
    """The sublayer that a tensor or module belongs to, by its name inside the block."""
    first = inside.partition(".")[0]
    if first == arch.attention or first in arch.attention_norms:
        return "attention"
    if first == arch.mlp or first in arch.mlp_norms:
        return "mlp"
    raise ModelError(
        f"{arch.model_type}: '{inside}' of a block belongs to no sublayer: complete its row in recover/models/arch.py"
    )


def head_of(model: nn.Module) -> Head:
    """z = scale * (h W^T + bias), then softcap * tanh(z / softcap) if there is one."""
    arch, base = arch_of(model), base_of(model)
    head: Any = base.get_submodule(arch.head)
    return Head(head.weight, head.bias, float(arch.logit_scale(base.config)), arch.softcap(base.config))
