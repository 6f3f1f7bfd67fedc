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
    "a text model inside a wrapper, beside parts that read images or sound",
    "gemma3, mistral3, qwen2_5_vl, llama4",
    "its text model lies in a part of it, and the export would have to be the same wrapper",
    "save the text model alone and prune that: whole = AutoModelForImageTextToText.from_pretrained(SOURCE); text = "
    "AutoModelForCausalLM.from_config(whole.config.text_config); text.model = whole.model.language_model; text.lm_head "
    "= whole.lm_head; text.save_pretrained(FOLDER); AutoTokenizer.from_pretrained(SOURCE).save_pretrained(FOLDER)",
)
MIXTURE = Kind(
    "a mixture of experts of another kind",
    "qwen2_moe, granitemoe, phimoe, ernie4_5_moe, hunyuan_v1_moe, minimax_m2",
    "its router, its experts or what runs beside them are none of the kinds that a row can name, or not tried",
    "give one of the mixtures that are supported, or a dense model of the size of the experts that a token uses",
)
HYBRID = Kind(
    "a hybrid, whose blocks keep a state beside attention or in place of it (Mamba, linear attention, convolutions)",
    "qwen3_next, qwen3_5, lfm2, falcon_h1, nemotron_h, granitemoehybrid, jamba",
    "here a block is attention and an MLP",
    "give a model whose blocks all attend",
)
CONV1D = Kind(
    "a model whose projections are Conv1D, with the weight the other way round",
    "gpt2, gpt_bigcode, openai-gpt",
    "masks, adapters and slices are made for nn.Linear",
    "give a model of a later family",
)
KINDS = (WRAPPER, MIXTURE, HYBRID, CONV1D)
TYPES = {
    **dict.fromkeys(("gpt2", "gpt_bigcode", "openai-gpt"), CONV1D),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "jamba", "bamba", "zamba2"), HYBRID),
}


def kind_of_model(config: Mapping[str, Any]) -> Kind | None:
    """Which of `KINDS` this config is of; None where it is of none that is known."""
    if isinstance(config.get(TEXT), Mapping):
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
