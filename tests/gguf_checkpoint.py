"""Tiny checkpoints for tests of GGUF files: every way in which the families that are written differ."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
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
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
NARROW = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
# Every way in which these families differ in a GGUF file.
VARIANTS = {
    "llama": ("llama", {}),
    "llama_tied_biased": ("llama_tied", {"mlp_bias": True}),
    "llama_rope3": ("llama", {"rope_parameters": LLAMA31}),
    "llama_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "mistral": ("mistral", {"head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen2_narrow": ("qwen2", NARROW),  # a KV group pruned: llama.cpp's loader for Qwen 2 has no room for it
    "llama_narrow": ("llama_tied", NARROW),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "granite": ("granite", {"attention_multiplier": 0.3, "logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "granite_biased": (
        "granite",
        {"attention_multiplier": 0.3, "tie_word_embeddings": True, "rope_parameters": LLAMA31}
        | {"attention_bias": True, "mlp_bias": True},
    ),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 4}),
    "smollm3_narrow": ("smollm3", {"no_rope_layer_interval": 4, "tie_word_embeddings": True, **NARROW}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {"num_key_value_heads": 4}),
    "phi3_grouped": ("phi3", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": []}),
    "olmoe": ("olmoe", {"norm_topk_prob": False, "num_key_value_heads": 4}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"tie_word_embeddings": True, "attn_logit_softcapping": 5.0}),
    "gemma3_text": (
        "gemma3_text",
        {"tie_word_embeddings": True, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
        | {"rope_parameters": GEMMA3},
    ),
    "granite_narrow": ("granite", {**NARROW, "attention_multiplier": 0.3}),
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


def llama_cpp(path: Path) -> Any:
    """llama.cpp with this file, its cache in float32; the test is skipped where it is not installed."""
    found: Any = pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
    cfg = found.CommonParams()
    cfg.model.path, cfg.n_ctx, cfg.n_gpu_layers, cfg.warmup, cfg.verbosity = str(path), 256, 0, False, -1
    cfg.cpuparams.n_threads = 1
    cfg.cache_type_k = cfg.cache_type_v = found.ggml_type.GGML_TYPE_F32
    cfg.flash_attn_type = found.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return found.Server(cfg)


def said(answer: Any) -> Any:
    """An answer of llama.cpp: versions of the package give JSON or what it means."""
    return json.loads(answer) if isinstance(answer, str) else answer


def tokenized(server: Any, text: str) -> list[int]:
    """Ids of a text, special tokens around and in it too."""
    asked = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", asked)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["tokens"]


def by_llama_cpp(path: Path, prompts: list[list[int]], rows: int) -> torch.Tensor:
    """Log-probabilities (prompts, rows) of the token after each prompt, computed by llama.cpp."""
    server = llama_cpp(path)
    # Any whole letter is written (the bias is not part of what is told): half a letter would be told without numbers.
    options = {"n_predict": 1, "n_probs": rows, "logit_bias": [[35, 100.0]], "cache_prompt": False, "temperature": 0}
    told = torch.full((len(prompts), rows), torch.nan)
    for row, prompt in zip(told, prompts, strict=True):
        answer = said(server.handle_completions({"prompt": prompt, **options}))
        for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[token["id"]] = token["logprob"]
    return told
