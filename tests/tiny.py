"""Tiny random models of every supported family, for tests: same code paths as the real ones, seconds on a CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
SLIDING, FULL = "sliding_attention", "full_attention"
CONV, LINEAR = "conv", "linear_attention"

# Ministral 3's: queries grow with the logarithm of their position, past `original_max_position_embeddings`.
LLAMA4 = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.1,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
# Heads of another size where a block attends to all; there keys are values too.
GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 8,
    "num_kv_shared_layers": 0,
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL, FULL],
    "final_logit_softcapping": 20.0,
    "use_bidirectional_attention": None,
}
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)  # 0.1 where a config does not say
# name -> (model type, what differs from COMMON). Sliding windows are shorter than the test prompts.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("mistral", {"head_dim": 16, "sliding_window": None}),
    "mistral_sliding": ("mistral", {"head_dim": 16, "sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2_sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3_text": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
        },
    ),
    "phi3": ("phi3", {"original_max_position_embeddings": 256}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 3}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 8, "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL]}),
    "gemma": ("gemma", {"head_dim": 16}),
    "ministral3": ("ministral3", {"head_dim": 16, "rope_parameters": LLAMA4}),
    "exaone4": (
        "exaone4",
        {"head_dim": 16, "sliding_window": 8, "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL]},
    ),
    "seed_oss": (
        "seed_oss",
        {"head_dim": 16, "attention_out_bias": True, "attention_dropout": 0.0, "residual_dropout": 0.0},
    ),
    "ernie4_5": ("ernie4_5", {"head_dim": 16, "use_bias": True}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 16}),
    "glm": ("glm", {"head_dim": 16}),
    "glm4": ("glm4", {"head_dim": 16}),
    "arcee": ("arcee", {"head_dim": 16, "mlp_bias": True}),
    "nemotron": ("nemotron", {"head_dim": 16}),
    "starcoder2": ("starcoder2", {"sliding_window": 8}),
    "apertus": ("apertus", {}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "stablelm_parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "cohere": ("cohere", {"logit_scale": 0.5, "use_qk_norm": True}),
    "cohere2": (
        "cohere2",
        {
            "logit_scale": 0.5,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
        },
    ),
    "phi": ("phi", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox_sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt2": ("gpt2", {"n_inner": 96, **NO_DROPOUT, "tie_word_embeddings": True}),
    "gpt_bigcode": ("gpt_bigcode", {"n_inner": 96, **NO_DROPOUT}),
    "granite_swa": (
        "granite_swa",
        {
            "logits_scaling": 3.0,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 2.0,
            "sliding_window": 8,
            "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
        },
    ),
    "lfm2": ("lfm2", {"block_auto_adjust_ff_dim": False, "layer_types": [CONV, CONV, FULL, CONV, FULL, FULL]}),
    "qwen3_5_text": (
        "qwen3_5_text",
        {
            "head_dim": 16,
            "layer_types": [LINEAR, LINEAR, FULL, LINEAR, FULL, FULL],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 16,
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        {"head_dim": 16, "layer_types": [LINEAR, LINEAR, FULL, LINEAR, FULL, FULL], "mlp_only_layers": [4]}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 16}
        | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"shared_expert_intermediate_size": 48},
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            "num_local_experts": 0,
            "shared_intermediate_size": 96,
            "layer_types": [LINEAR, LINEAR, FULL, LINEAR, FULL, FULL],
            "position_embedding_type": "rope",
            "mamba_n_heads": 8,
            "mamba_d_state": 16,
            "mamba_chunk_size": 8,
            "logits_scaling": 3.0,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.25,
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            "head_dim": 16,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_d_ssm": 128,
            "mamba_chunk_size": 8,
            "lm_head_multiplier": 0.5,
            "embedding_multiplier": 2.0,
            "key_multiplier": 0.7,
            "attention_in_multiplier": 0.9,
            "attention_out_multiplier": 0.8,
            "ssm_in_multiplier": 1.1,
            "ssm_out_multiplier": 0.6,
            "ssm_multipliers": [0.9, 0.8, 0.7, 1.1, 1.2],
            "mlp_multipliers": [0.9, 1.1],
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            "head_dim": 16,
            "layers_block_type": [LINEAR, LINEAR, FULL, LINEAR, "mlp", FULL],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 8,
            "expand": 2,
        },
    ),
    "gemma4_text": ("gemma4_text", {**GEMMA4, "hidden_size_per_layer_input": 0}),
    "gemma4_unified_text": ("gemma4_unified_text", GEMMA4),  # whose class knows no embeddings for each block
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}),
    "olmoe": ("olmoe", {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 32}),
    "qwen3_moe": (
        "qwen3_moe",
        {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "qwen3_moe_step": (
        "qwen3_moe",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
        | {"decoder_sparse_step": 2},
    ),
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
        | {"sliding_window": 8, "layer_types": [SLIDING, FULL] * 3},
    ),
    "glm4_moe": (
        "glm4_moe",
        {"head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"first_k_dense_replace": 2, "use_qk_norm": True},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1}
        | {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
        | {"qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 2},
    ),
    "granite": ("granite", {"logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}),
}

HYBRIDS = {
    "lfm2",
    "qwen3_5_text",
    "qwen3_next",
    "granitemoehybrid",
    "falcon_h1",
    "nemotron_h",
}  # blocks that keep a state: texts are written by transformers' own `generate`

WITHOUT_ROPE = {"nemotron_h", "gpt2", "gpt_bigcode"}  # the first has no positions, the others learn theirs

# Whose MLPs are mixtures of experts, in some blocks at least.
MIXTURES = (*("mixtral", "olmoe", "qwen3_moe", "qwen3_moe_step", "qwen3_next", "gpt_oss", "glm4_moe", "deepseek_v3"),)

# Made of parts that another family has too: their tests are slow ones (`conftest.py`), so that the suite stays short.
LIKE_OTHERS = {
    *(
        "llama_tied",
        "qwen2_sliding",
        "ministral3",
        "exaone4",
        "seed_oss",
        "ernie4_5",
        "hunyuan_v1_dense",
        "glm",
        "arcee",
    ),
    *("mixtral", "olmoe", "qwen3_moe_step", "glm4_moe"),
    *(
        "mistral",
        "olmo3",
        "gemma4_unified_text",
        "gemma",
        "starcoder2",
        "stablelm",
        "cohere2",
        "gpt_neox_sequential",
        "gpt_bigcode",
        "granite",
    ),
}


# One of each kind of attention and of state: windows, sinks, scales, parallel blocks, latent keys, mixers.
ATTENDS = {
    *("llama", "mistral_sliding", "gemma3_text", "granite_swa", "cohere", "gpt_neox", "gemma4_text"),
    *("lfm2", "qwen3_5_text", "falcon_h1", "gpt_oss", "deepseek_v3"),
}


def only(families: Iterable[str], chosen: set[str]) -> list[Any]:
    """The families as parameters, those that are not chosen among the slow tests."""
    import pytest  # this file is read without it too

    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in families]


def tiny_config(family: str, **overrides: Any) -> Any:
    """The config of one family at tiny size."""
    model_type, differences = FAMILIES[family]
    kind = CONFIG_MAPPING[model_type]
    declared = {field.name for field in dataclasses.fields(kind)} | {*kind.attribute_map}  # pyright: ignore
    common = {name: value for name, value in COMMON.items() if name in declared}
    return AutoConfig.for_model(model_type, **{**common, **differences, **overrides})


def tiny(family: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A causal LM of this family in float32 and eval mode, the same for the same seed; `overrides` go to the config."""
    config, key = tiny_config(family, **overrides), (family, seed, repr(sorted(overrides.items())))
    if key not in MADE:
        MADE[key] = _values(_drawn(config, seed))
    # Drawn before, or just now: half of the time of a model is its first values.
    with torch.random.fork_rng(devices=[]), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    with torch.no_grad():
        for name, value in _values(model).items():
            value.copy_(MADE[key][name])
    for module in model.modules():
        module._is_hf_initialized = True  # as after drawing
    return model.eval()


MADE: dict[tuple[str, int, str], dict[str, torch.Tensor]] = {}


def _values(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, those in no state dict too."""
    return {name: value.detach() for name, value in (*model.named_parameters(), *model.named_buffers())}


def _drawn(config: Any, seed: int) -> PreTrainedModel:
    """A model of the config, whose values are drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # stock init is 1 and 0: mistakes there would not show
                torch.nn.init.normal_(parameter, mean=parameter.data.mean().item(), std=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
    return model


def ids(batch: int = 2, tokens: int = 20, *, vocabulary: int = 256, seed: int = 1) -> torch.Tensor:
    """Random token ids (B, T), none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (batch, tokens), generator=generator)
