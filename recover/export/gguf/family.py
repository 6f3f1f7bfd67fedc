"""What llama.cpp knows of a model family: tensor names, sizes, rope; and what of a config it would compute otherwise.

Source: the GGUF specification (ggml, docs/gguf.md) and llama.cpp's loaders, src/models/{llama,qwen2,qwen3,granite,
smollm3,olmo2,phi3,qwen3moe,olmoe,gemma,gemma2,gemma3}.cpp.
Where its loader for a family takes heads that together are as wide as the model, and these are not (KV groups were
pruned, or `head_dim` is set), the checkpoint is written as the family that computes the same for heads of any width.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gguf
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from recover.base import console
from recover.base.errors import ExportError
from recover.models.arch import experts_of, head_size_of, kv_heads_of
from recover.models.gguf_folder import LARGEST
from recover.models.settings import config_of
from recover.models.source import (
    CONFIG,
    check_tied,
    check_weights,
    check_written,
    config_in,
    explained,
    model_folder,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
HEAD = {"lm_head": "output"}
ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
AROUND = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
BEHIND = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
FUSED = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ROPES = ("default", "linear", "llama3")
OF_SLIDING = 1e4  # base of the rotary positions where Gemma 3's attention slides
# Of a mixture: the router, and the matrices of each expert, one tensor of all experts in the file.
ROUTER = {"mlp.gate": "ffn_gate_inp"}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


@dataclasses.dataclass(frozen=True)
class Mixture:
    """How llama.cpp routes in this family: `normed`, whether the weights of the chosen experts are made to sum to 1.

    `grouped`: it has room for query heads that share keys and values.
    """

    normed: bool
    grouped: bool = True


@dataclasses.dataclass(frozen=True)
class Family:
    """A model type in llama.cpp: its name there, where the two rows of a rotary pair lie, and what is in a block.

    `neighbours`: row 2i and row 2i + 1 of a head are a pair; else, as always in transformers, half a head is between.
    `without_positions`: every so many-th block has no rotary positions, whatever a file says.
    `slides`: attention slides in all blocks but every so many-th. `gemma`: norms multiply by one more than the
    checkpoint holds, the embedding is scaled, and it is the head too.
    """

    arch: str
    neighbours: bool = False
    norms: dict[str, str] = dataclasses.field(default_factory=lambda: NORMS)
    linears: dict[str, str] = dataclasses.field(default_factory=lambda: ATTENTION | MLP)
    without_positions: int | None = None
    mixture: Mixture | None = None
    slides: int | None = None
    gemma: bool = False


LLAMA = Family("llama", neighbours=True)
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3", norms=NORMS | HEAD_NORMS),
    "granite": Family("granite", neighbours=True),
    "smollm3": Family("smollm3", neighbours=True, without_positions=4),
    "olmo2": Family("olmo2", norms=BEHIND | HEAD_NORMS),
    "phi3": Family("phi3", linears=FUSED),
    "gemma": Family("gemma", gemma=True),
    "gemma2": Family("gemma2", norms=AROUND, slides=2, gemma=True),
    "gemma3_text": Family("gemma3", norms=AROUND | HEAD_NORMS, slides=6, gemma=True),
    "qwen3_moe": Family("qwen3moe", norms=NORMS | HEAD_NORMS, linears=ATTENTION | ROUTER, mixture=Mixture(normed=True)),
    "olmoe": Family(
        "olmoe", norms=NORMS | HEAD_NORMS, linears=ATTENTION | ROUTER, mixture=Mixture(normed=False, grouped=False)
    ),
}


def family_of(config: PretrainedConfig) -> Family:
    """What this checkpoint is in llama.cpp: its loader of Qwen 2 takes q and o as square matrices, Llama's does not."""
    square = head_size_of(config) * config.num_attention_heads == config.hidden_size
    return LLAMA if config.model_type == "qwen2" and not square else FAMILIES[config.model_type]


def warn_of_older_readers(config: PretrainedConfig) -> None:
    """llama.cpp before b8929 takes a bias of q for as wide as the model, and stops with 'wrong shape' where it is not.

    Tried with the builds of the package xllamacpp: 0.2.14 refuses, 2026.4.8929 and later load and compute the same.
    """
    heads = head_size_of(config) * config.num_attention_heads
    if "attn_q" in _biased(config) and heads != config.hidden_size:
        console.warn(
            f"gguf: q has a bias of {heads} numbers beside a width of {config.hidden_size}: llama.cpp from b8929 "
            "(April 2026) on loads the file, older ones say 'wrong shape'"
        )


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a checkpoint with all its weights, such that llama.cpp computes what transformers does.

    Raises ExportError naming the field that it would not, ModelError for a folder that is no whole checkpoint.
    """
    check_written(model_folder(folder))
    check_weights(folder)
    with explained(str(folder)):
        config = config_of(config_in(folder), str(folder), folder / CONFIG)
    check_tied(folder, bool(config.tie_word_embeddings))
    refuse(config, str(folder))
    return config


def refuse(config: PretrainedConfig, where: str) -> None:
    """Raise ExportError for a family, rope or activation that llama.cpp would compute otherwise; `where`: the model."""
    refuse_type(config.model_type, where)
    rope, acts = rope_of(config), "gelu_pytorch_tanh" if family_of(config).gemma else "silu"
    act = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    wrong = {
        "hidden_act": (act, act == acts, acts),
        "rope_type": (rope["rope_type"], rope["rope_type"] in ROPES, " or ".join(ROPES)),
        "partial_rotary_factor": (
            rope.get("partial_rotary_factor"),
            rope.get("partial_rotary_factor", 1.0) == 1.0,
            1.0,
        ),
    }
    for field, (found, right, expected) in wrong.items():
        if not right:
            raise ExportError(f"{where}: {field} is {found}; GGUF is written for {expected}")
    _refuse_positions(config, where)
    _refuse_routing(config, where)
    if family_of(config).gemma:
        _refuse_gemma(config, where)


def rope_of(config: PretrainedConfig) -> dict[str, Any]:
    """Rotary positions of the blocks that attend to all."""
    rope = config.rope_parameters
    return rope.get("full_attention", rope)


def _refuse_gemma(config: Any, where: str) -> None:
    """Raise ExportError for a Gemma that llama.cpp computes otherwise: it knows most of its numbers by the family."""
    family, blocks = family_of(config), config.num_hidden_layers
    expected: dict[str, Any] = {"tie_word_embeddings": True}
    if family.slides is not None:
        largest = blocks == LARGEST[family.arch]
        expected |= {
            "query_pre_attn_scalar": config.hidden_size // config.num_attention_heads if largest else config.head_dim,
            "use_bidirectional_attention": None,
        }
        kinds = [kind == "sliding_attention" for kind in config.layer_types]
        there = [(block + 1) % family.slides != 0 for block in range(blocks)]
        if kinds != there:
            other = next(block for block, (one, two) in enumerate(zip(kinds, there, strict=True)) if one != two)
            raise ExportError(
                f"{where}: attention of block {other} {'slides' if kinds[other] else 'is to all tokens'} "
                f"(layer_types), and llama.cpp lets it slide in all blocks but every block {family.slides} of this "
                "family, whatever a file says: after depth pruning the kinds of blocks lie otherwise. Prune width, or "
                "drop blocks so that the kinds alternate as before"
            )
    if family.arch == "gemma3":
        sliding = config.rope_parameters["sliding_attention"]
        expected |= {"attn_logit_softcapping": None, "final_logit_softcapping": None}
        if (sliding["rope_type"], sliding["rope_theta"]) != ("default", OF_SLIDING):
            raise ExportError(
                f"{where}: rotary positions of blocks that slide are {sliding}; GGUF is written for base "
                f"{OF_SLIDING:g} without scaling, which is what llama.cpp computes in this family whatever a file says"
            )
    for field, value in expected.items():
        if (found := getattr(config, field, None)) != value and (found or value):
            raise ExportError(
                f"{where}: {field} is {found}; GGUF is written for {value}, which is what llama.cpp computes in this "
                "family whatever a file says"
            )
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        if family.arch == "gemma2" and not getattr(config, field):
            raise ExportError(f"{where}: {field} is null; GGUF is written for a number: llama.cpp always limits there")


def _refuse_routing(config: PretrainedConfig, where: str) -> None:
    """Raise ExportError for a mixture that llama.cpp routes otherwise, or of which some blocks have a plain MLP."""
    mixture, settings = family_of(config).mixture, cast(Any, config)
    if mixture is None:
        return
    if settings.norm_topk_prob != mixture.normed:
        raise ExportError(
            f"{where}: norm_topk_prob is {settings.norm_topk_prob}; GGUF is written for {mixture.normed}, which is "
            "what llama.cpp computes in this family whatever a file says"
        )
    if not mixture.grouped and kv_heads_of(config) != config.num_attention_heads:
        raise ExportError(
            f"{where}: num_key_value_heads is {kv_heads_of(config)}; GGUF is written for {config.num_attention_heads}, "
            "as many as query heads: llama.cpp has no room for others in this family"
        )
    plain = getattr(config, "mlp_only_layers", None) or []
    if plain or getattr(config, "decoder_sparse_step", 1) != 1:
        raise ExportError(
            f"{where}: some blocks have a plain MLP (mlp_only_layers, decoder_sparse_step), and llama.cpp's "
            f"'{family_of(config).arch}' takes experts in every block"
        )


def _refuse_positions(config: PretrainedConfig, where: str) -> None:
    """Raise ExportError where other blocks have rotary positions than those that llama.cpp gives them."""
    has, every = getattr(config, "no_rope_layers", None), family_of(config).without_positions
    if has is None or every is None:
        return
    there = [int((block + 1) % every != 0) for block in range(config.num_hidden_layers)]
    if list(has) != there:
        other = next(block for block, (one, two) in enumerate(zip(has, there, strict=True)) if one != two)
        raise ExportError(
            f"{where}: block {other} has {'' if has[other] else 'no '}rotary positions (no_rope_layers), and llama.cpp "
            f"leaves them out in every block {every} of this family, whatever a file says: after depth pruning the "
            "kinds of blocks lie otherwise. Prune width, or drop blocks so that the kinds alternate as before"
        )


def refuse_type(model_type: str, where: str) -> None:
    """Raise ExportError for a type of model that is not written as GGUF."""
    if model_type not in FAMILIES:
        raise ExportError(f"{where}: model type '{model_type}' is not written as GGUF; expected {', '.join(FAMILIES)}")


def tensor_names(config: PretrainedConfig) -> dict[str, str]:
    """For each tensor that the checkpoint must hold, its name in the GGUF file: one name for those of all experts."""
    biased = _biased(config)
    modules = TOP | ({} if config.tie_word_embeddings else HEAD)
    block = family_of(config).norms | family_of(config).linears
    for number in range(config.num_hidden_layers):
        modules |= {f"model.layers.{number}.{module}": f"blk.{number}.{name}" for module, name in block.items()}
    names = {}
    for module, name in modules.items():
        names[f"{module}.weight"] = f"{name}.weight"
        if name.rpartition(".")[2] in biased:
            names[f"{module}.bias"] = f"{name}.bias"
    if family_of(config).mixture is not None:
        for number in range(config.num_hidden_layers):
            names |= {
                f"model.layers.{number}.mlp.experts.{expert}.{module}.weight": f"blk.{number}.{name}.weight"
                for module, name in EXPERTS.items()
                for expert in range(experts_of(config)[0])
            }
    return names


def _biased(config: PretrainedConfig) -> set[str]:
    """Linears with a bias that is written; any other bias in the weights is left over, and refused as such."""
    if config.model_type == "qwen2":
        return {"attn_q", "attn_k", "attn_v"}
    if config.model_type not in ("llama", "granite"):
        return set()
    return {*(ATTENTION.values() if config.attention_bias else ()), *(MLP.values() if config.mlp_bias else ())}


def add_sizes(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    """Put all that llama.cpp must know to compute the model into the metadata; rope factors are a tensor, see below."""
    rope, head = rope_of(config), head_size_of(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(kv_heads_of(config))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_vocab_size(config.vocab_size)
    if family_of(config).mixture is not None:
        count, used = experts_of(config)
        writer.add_expert_count(count)
        writer.add_expert_used_count(used)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    if family_of(config).slides is not None:
        writer.add_sliding_window(cast(Any, config).sliding_window)
    if family_of(config).arch == "gemma2":
        writer.add_attn_logit_softcapping(cast(Any, config).attn_logit_softcapping)
        writer.add_final_logit_softcapping(cast(Any, config).final_logit_softcapping)
    if config.model_type == "granite":  # without them llama.cpp scales by 1 / sqrt(head) and 1
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)  # divides


def _context(config: PretrainedConfig) -> int:
    """Tokens for which llama.cpp computes what transformers does: it attends to all, so a sliding window ends them."""
    if family_of(config).slides is not None:
        return config.max_position_embeddings
    window, layers = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = layers is None or "sliding_attention" in layers
    if window is None or not slides or window >= config.max_position_embeddings:
        return config.max_position_embeddings
    console.warn(
        f"gguf: attention slides over {window} tokens, and llama.cpp attends to all in this family: the file's context "
        f"is {window} tokens, not {config.max_position_embeddings}"
    )
    return int(window)


def rope_factors(config: PretrainedConfig) -> Tensor | None:
    """What llama.cpp divides each rotary frequency by, for Llama 3.1's scaling (factors by wavelength); else None."""
    rope, head = rope_of(config), head_size_of(config)
    if rope["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(0, head, 2, dtype=torch.float64) / head)
    return (plain / scaled.double()).float()
