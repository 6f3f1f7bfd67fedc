"""The config of a GGUF file with what transformers leaves out of it; every key that shapes the model is accounted for.

Shapes: P rotary pairs of a head.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from recover.base.artifacts import JsonObject
from recover.base.errors import ModelError
from recover.models.arch import head_size_of, kv_heads_of

FREQUENCIES = "rope_freqs.weight"  # what each rotary frequency is divided by
TOLERANCE = 1e-5  # of a factor that is stored in float32
LOW, HIGH = 1.0, 4.0  # of every Llama 3.1 to 3.3; what it was trained on before is a power of two
TRAINED = [2**power for power in (13, *range(4, 21))]
# Of `ARCH.`: what the file says of its origin, of how texts are computed, or what is held against the tensors.
SAID_ELSEWHERE = (
    "context_length",
    "vocab_size",
    "feed_forward_length",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "attention.causal",
)
# Blocks of Gemma's 27B: alone in its family it divides scores by the root of width / heads, the others of a head's
# size. No key says so: llama.cpp (src/models/gemma2.cpp, gemma3.cpp) tells by the blocks; transformers takes 256.
LARGEST = {"gemma2": 46, "gemma3": 62}
KNOWN = ("llama", "mistral", "qwen2", "qwen3")  # files of other kinds are left to what transformers knows of them


def completed(config: Any, reader: Any) -> Any:
    """`config`, as transformers reads it from the file, with head size, scaled positions and biases of the file, and
    with how Gemma scales its scores.

    Raises ModelError for a key of the file that says something else than the config, and for positions scaled in a way
    that has no words in the config.
    """
    arch = str(field(reader, "general.architecture"))
    names = {tensor.name for tensor in reader.tensors}
    if arch in LARGEST:
        width = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = width if config.num_hidden_layers == LARGEST[arch] else head_size_of(config)
    if arch not in KNOWN:
        _refuse_scaling(config, field(reader, f"{arch}.rope.scaling.type"))
        return config
    if (size := field(reader, f"{arch}.attention.key_length")) is not None:
        config.head_dim = size
    if config.model_type == "llama":
        config.attention_bias = any(name.endswith("attn_q.bias") for name in names)
        config.mlp_bias = any(name.endswith("ffn_up.bias") for name in names)
    _scale(config, arch, reader)
    _account(config, arch, reader)
    return config


def field(reader: Any, name: str) -> Any:
    """The value under a key of the file; None where there is none."""
    found = reader.fields.get(name)
    return None if found is None else found.contents()


def _scale(config: Any, arch: str, reader: Any) -> None:
    """Give the config the file's scaled positions."""
    kind = field(reader, f"{arch}.rope.scaling.type")
    factor = field(reader, f"{arch}.rope.scaling.factor") or field(reader, f"{arch}.rope.scale_linear")
    rope = dict(config.rope_parameters)
    stored = next((tensor for tensor in reader.tensors if tensor.name == FREQUENCIES), None)
    if kind == "linear" and factor:
        config.rope_parameters = rope | {"rope_type": "linear", "factor": float(factor)}
    elif kind not in (None, "", "none"):
        _refuse_scaling(config, kind)
    if stored is None or bool((stored.data == 1).all()):
        return
    found = None if kind == "linear" else llama3(np.array(stored.data, dtype=np.float64), rope["rope_theta"])
    if found is None:
        raise ModelError(
            f"its rotary frequencies are divided by {FREQUENCIES}, {_some(stored.data)}, which is no scaling of Llama "
            "3.1 that can be told from them, and the model would be another one. Give the checkpoint that the file was "
            "made from"
        )
    config.rope_parameters = rope | found


def llama3(factor_P: np.ndarray, base: float) -> JsonObject | None:
    """Parameters of Llama 3.1's scaling that divide the frequencies by these factors; None where none do.

    Long waves are divided by the largest factor, short ones by 1; between, the share is a straight line in the
    frequency, from `low_freq_factor` to `high_freq_factor` waves in the text that the model was trained on before.
    """
    largest = float(factor_P.max())
    if not np.isfinite(factor_P).all() or float(factor_P.min()) < 1 or largest <= 1:
        return None
    frequency_P = base ** -(np.arange(len(factor_P)) / len(factor_P))
    between_P = (factor_P > 1 + TOLERANCE) & (factor_P < largest * (1 - TOLERANCE))
    tried = [(LOW, HIGH, trained) for trained in TRAINED]
    if between_P.sum() >= 2:
        share_P = (1 / factor_P[between_P] - 1 / largest) / (1 - 1 / largest)
        slope, start = np.polyfit(frequency_P[between_P], share_P, 1)
        if start < 0 < slope:  # with the first of the three at its usual value: only their ratios show
            high = LOW * (1 - 1 / start)
            tried.append((LOW, round(high, 4), round(slope * 2 * math.pi * (high - LOW))))
    for low, high, trained in tried:
        share_P = ((trained * frequency_P / (2 * math.pi) - low) / (high - low)).clip(0, 1)
        if np.allclose(1 / (share_P + (1 - share_P) / largest), factor_P, rtol=TOLERANCE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": largest,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": trained,
            }
    return None


def _account(config: Any, arch: str, reader: Any) -> None:
    """Raise ModelError for the first key of `ARCH.` that the config contradicts, or has no words for."""
    said = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": kv_heads_of(config),
        "attention.key_length": head_size_of(config),
        "attention.value_length": head_size_of(config),
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": head_size_of(config),
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "attention.sliding_window": getattr(config, "sliding_window", None),
    }
    for name in reader.fields:
        key = name.removeprefix(f"{arch}.")
        if key == name or key in SAID_ELSEWHERE:
            continue
        value = field(reader, name)
        if key not in said or not _equal(value, said[key]):
            of = f"and {said[key]} as transformers reads the file" if key in said else "for which it has no words"
            raise ModelError(
                f"{name} is {_some(value)}, {of}, and the model would be another one. Give the checkpoint that the "
                "file was made from"
            )


def _equal(value: Any, said: Any) -> bool:
    if isinstance(value, list):
        return all(_equal(each, said) for each in value)
    numbers = isinstance(value, int | float) and isinstance(said, int | float)
    return math.isclose(value, said, rel_tol=1e-6) if numbers else value == said


def _some(values: Any) -> str:
    shown = [f"{value:g}" for value in np.asarray(values).ravel()[:4]] if not isinstance(values, str) else [values]
    return ", ".join(shown) + (", ..." if np.size(values) > 4 else "")


def _refuse_scaling(config: Any, scaling: Any) -> None:
    taken = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if scaling not in (None, "", "none") and taken == "default":
        raise ModelError(
            f"its rotary positions are scaled ('{scaling}'), which is not taken over from a GGUF file, and the model "
            "would be another one. Give the checkpoint that the file was made from"
        )
