"""What a model is that is not supported, told from its config, and what to do instead."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

TEXT = "text_config"
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "moe_intermediate_size")
ATTENDS = ("full_attention", "sliding_attention", "chunked_attention")  # entries of `layer_types`
STATES = ("mamba", "ssm", "linear_num_value_heads", "conv_l_cache", "attn_layer_indices", "time_step", "rwkv")


class Kind(NamedTuple):
    """Models that are not supported for one reason: what they are, such as, what stands in the way, what to do."""

    called: str
    such_as: str
    why: str
    instead: str


WRAPPER = Kind(
    "a text model inside a wrapper of its own kind, beside parts that read images or sound",
    "llama4, internvl, paligemma, aya_vision",
    "its text model lies in a part of it, and WRAPPERS in recover/models/wrapper.py has no row that says where",
    "save the text model alone and prune that: whole = AutoModelForImageTextToText.from_pretrained(SOURCE); text = "
    "AutoModelForCausalLM.from_config(whole.config.text_config); text.model = whole.model.language_model; text.lm_head "
    "= whole.lm_head; text.save_pretrained(FOLDER); AutoTokenizer.from_pretrained(SOURCE).save_pretrained(FOLDER)",
)
MIXTURE = Kind(
    "a mixture of experts of another kind",
    "qwen2_moe, granitemoe, phimoe, ernie4_5_moe, hunyuan_v1_moe, minimax_m2, nemotron_h (Nemotron 3)",
    "its router, its experts or what runs beside them are none of the kinds that a row can name, or not tried",
    "give one of the mixtures that are supported, or a dense model of the size of the experts that a token uses",
)
HYBRID = Kind(
    "a hybrid of another kind, whose blocks keep a state (Mamba, linear attention, convolutions)",
    "jamba, bamba, zamba2, olmo_hybrid",
    "its blocks are not a mixer or attention and then an MLP, nor one of them, or none of them was tried",
    "give one of the hybrids that are supported (lfm2, qwen3_5_text, qwen3_next, granitemoehybrid, falcon_h1, "
    "nemotron_h)",
)
PER_BLOCK = Kind(
    "a model with embeddings for each block, or blocks that share keys and values",
    "gemma3n, gemma4 (E2B, E4B)",
    "the embeddings of all blocks are one matrix, of which a block that goes takes a part with it, and blocks that "
    "read the keys and values of another one lose them with that",
    "give a model of the family without them, such as Gemma 3 or Gemma 4 12B and 31B",
)
ON_STREAM = Kind(
    "a model whose norms act on the residual stream itself, behind each sublayer",
    "openai-gpt",
    "a block that goes would have to leave its two norms behind, and no stock block is norms alone",
    "give a model whose norms are inside its sublayers, such as gpt2",
)
KINDS = (WRAPPER, MIXTURE, HYBRID, PER_BLOCK, ON_STREAM)
TYPES = {
    "openai-gpt": ON_STREAM,
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "jamba", "bamba", "zamba2"), HYBRID),
}


def kind_of_model(config: Mapping[str, Any]) -> Kind | None:
    """Which of `KINDS` this config is of; None where it is of none that is known."""
    inner = config.get(TEXT)
    name, settings = str(config.get("model_type")), inner if isinstance(inner, Mapping) else config
    shared = settings.get("num_kv_shared_layers") or settings.get("hidden_size_per_layer_input")
    if name.startswith("gemma3n") or (name.startswith("gemma4") and shared):
        return PER_BLOCK
    if isinstance(inner, Mapping):
        return WRAPPER
    if any(isinstance(value := config.get(name), int) and value > 1 for name in EXPERTS):
        return MIXTURE
    layers = config.get("layer_types")
    others = set(layers) - set(ATTENDS) if isinstance(layers, list) and all(isinstance(x, str) for x in layers) else ()
    if others or any(state in str(name).lower() for name, value in config.items() if value for state in STATES):
        return HYBRID
    return TYPES.get(str(config.get("model_type")))


def unsupported(config: Mapping[str, Any], supported: Collection[str]) -> str:
    """One line: what this model is, why it is not supported, what to do."""
    name, kind = str(config.get("model_type")), kind_of_model(config)
    if kind is None:
        return (
            f"model type '{name}' is not supported; supported: {', '.join(supported)}. If its modules are named as in "
            "Llama, add this row to ARCHS in recover/models/arch.py, a tiny config to tests/tiny.py, and run the "
            f"tests: Arch({name!r}),"
        )
    text = config[TEXT].get("model_type") if kind is WRAPPER else None
    inside = f", of type '{text}'" if text in supported else f" of type '{text}', which is not supported either"
    said = f"model type '{name}' is not supported: it is {kind.called}{inside if text else ''}; {kind.why}. "
    if kind is WRAPPER and text is not None and text not in supported:
        return f"{said}`recover families` says which are supported"
    return f"{said}What can be done: {kind.instead}. `recover families` says what is supported"
