"""Tiny checkpoints for tests of GGUF files: every way in which the families that are written differ."""

from __future__ import annotations

from pathlib import Path

from tiny import tiny
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from recover.config import recipe

ROWS = 1030  # of the embedding: six more than the tokenizer has tokens
LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Every way in which these families differ in a GGUF file.
VARIANTS = {
    "llama": ("llama", {}),
    "llama_tied_biased": ("llama_tied", {"mlp_bias": True}),
    "llama_rope3": ("llama", {"rope_parameters": LLAMA31}),
    "llama_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "mistral": ("mistral", {"head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}


def words() -> PreTrainedTokenizerFast:
    """The embedded model's tokenizer (byte-level BPE, single digits, BOS) with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(recipe.embedded("fable-2m"))
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return tokenizer


def checkpoint(folder: Path, variant: str = "llama", **overrides) -> Path:
    """A model folder as an export leaves it; `overrides` go to the config."""
    family, differences = VARIANTS[variant]
    model = tiny(family, **{"vocab_size": ROWS, **differences, **overrides})
    model.generation_config.eos_token_id = [2, 9]
    model.save_pretrained(folder)
    words().save_pretrained(folder)
    return folder
