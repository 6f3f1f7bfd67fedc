"""Sizes that a config names: whole numbers that the weights beside it could fill, before anything is built of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recover.base.errors import ModelError

NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads")
SIZES = (*NEEDED, "intermediate_size", "vocab_size", "max_position_embeddings")
MAY_BE_NULL = ("num_key_value_heads", "head_dim", "sliding_window")
MOST = 2**40
MOST_BLOCKS = 4096
NO_HARM = 2**27  # parameters that any machine has room for
SMALLEST = {False: 1, True: 8}  # parameters in a byte: fp8, or one bit each where they are quantized


def check_sizes(config: dict[str, Any], where: object) -> None:
    """Raise ModelError for a size that is no whole number from 1 on, or that no model has; by name and value."""
    for name in (*SIZES, *MAY_BE_NULL):
        value = config.get(name, 1)
        if value is None and name in MAY_BE_NULL:
            continue
        most = MOST_BLOCKS if name == "num_hidden_layers" else MOST
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ModelError(f"{where}: {name} is {_short(value)}; expected a whole number from 1 to {most:,}")
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads is not None and kv_heads is not None and heads % kv_heads:
        raise ModelError(
            f"{where}: num_attention_heads is {heads} and num_key_value_heads {kv_heads}; expected a multiple of it"
        )
    if not isinstance(config.get("quantization_config"), dict | None):
        raise ModelError(f"{where}: quantization_config is {_short(config['quantization_config'])}; expected a mapping")


def check_room(config: dict[str, Any], folder: Path) -> None:
    """Raise ModelError where the config, whose sizes are sound, means more parameters than the weights could hold.

    What is too little or too much by less is found by name when the weights are read: this is for what would take all
    memory first.
    """
    held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    meant = _least(config)
    if held and meant > NO_HARM and meant > held * SMALLEST[bool(config.get("quantization_config"))]:
        raise ModelError(
            f"{folder}: config.json means at least {meant:,} parameters, and its weights are {held:,} bytes: they do "
            "not belong together; fetch the model again"
        )


def _least(config: dict[str, Any]) -> int:
    """Parameters of embedding, attention and MLP matrices, as far as the config names their sizes."""
    if any(config.get(name) is None for name in NEEDED):
        return 0
    width, blocks, heads = (config[name] for name in NEEDED)
    head = config.get("head_dim") or max(1, width // heads)
    kv_heads = config.get("num_key_value_heads") or 1
    attention = 2 * width * head * (heads + kv_heads)
    mlp = 2 * width * config.get("intermediate_size", 0)
    return width * config.get("vocab_size", 0) + blocks * (attention + mlp)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
