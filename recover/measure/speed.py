"""Speed and size of a model as it is: prefill and decode tokens per second, KV bytes per token, peak memory.

Legend: B batch, T tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel


def kv_bytes_per_token(config: Any, element_bytes: int) -> int:
    """Bytes that the KV cache grows by for each token: 2 (K and V) x blocks x KV heads x head size."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_size * element_bytes


def _seconds(function: Callable[[], Any], device: torch.device, *, repeats: int) -> float:
    """Median of `repeats` timings after one warm-up; the device is synchronised around each."""
    function()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.no_grad()
def size_and_speed(
    model: PreTrainedModel, *, batch_size: int = 8, prompt_length: int = 128, steps: int = 32, repeats: int = 3
) -> dict[str, float]:
    """Parameters, bytes, and prefill and decode tokens per second on random tokens, greedy, with a KV cache.

    Decode speed is what `steps` further tokens cost after a prompt of `prompt_length`, per sequence of the batch
    and summed over it. Peak memory is the accelerator's; on a CPU it is not measured.
    """
    device = model.device
    context = getattr(model.config, "max_position_embeddings", None) or prompt_length + steps
    prompt_length = min(prompt_length, max(8, context - steps))
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, model.config.vocab_size, (batch_size, prompt_length), generator=generator).to(device)

    def prefill() -> Any:
        return model(input_ids=ids_BT, use_cache=True, logits_to_keep=1)

    def decode() -> None:
        output = prefill()
        for _ in range(steps):
            next_B1 = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=next_B1, past_key_values=output.past_key_values, use_cache=True)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    prefill_seconds = _seconds(prefill, device, repeats=repeats)
    decode_seconds = max(_seconds(decode, device, repeats=repeats) - prefill_seconds, 1e-9)
    parameters = list(model.parameters())
    record = {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "file_bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        "prefill_tokens_per_second": batch_size * prompt_length / prefill_seconds,
        "decode_tokens_per_second": batch_size * steps / decode_seconds,
        "kv_bytes_per_token": kv_bytes_per_token(model.config, parameters[0].element_size()),
    }
    if device.type == "cuda":
        record["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return record
