"""Size and speed of two models, timed by turns in one run, so that their ratio is a comparison of models.

Timed one after the other, models are compared at two moments: the first pays for cold caches and low clocks, and either
for whatever else the machine does just then. Here each repeat times both, the order changes from one repeat to the
next, and the ratio is taken within a repeat before any is taken over them.

Legend: B batch, T tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from recover.models.arch import cache_in, head_size_of, kv_heads_of, taking_cache
from recover.report.run_files import Ratio
from recover.text.generate import context_of

SIDES = ("dense", "deployed")
FULL, WITHOUT_KEYS = "full_attention", ("conv", "linear_attention", "mlp", "moe")  # kinds of blocks
RATES = ("prefill_tokens_per_second", "decode_tokens_per_second")

LEAST, MOST, SECONDS = 7, 25, 3.0  # repeats: as many as fit the seconds
WARM_SECONDS = 0.5  # clocks rise and kernels are chosen in the first passes
SPARE_BYTES = 4 * 2**30  # what activations and KV cache of a pass may need beside the weights

Turn = Callable[[], tuple[float, ...]]


def kv_bytes_per_token(config: Any, element_bytes: int) -> int:
    """Bytes that the KV cache grows by for each token: 2 (K and V) x blocks that attend x KV heads x head size."""
    types = getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers
    attending = sum(kind not in WITHOUT_KEYS for kind in types)
    return 2 * attending * kv_heads_of(config) * head_size_of(config) * element_bytes


def take_turns(
    first: Turn, second: Turn, *, least: int = LEAST, most: int = MOST, seconds: float = SECONDS
) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    """What each call of both gave, in pairs of one moment: `least` of them, and up to `most` within the seconds.

    The order is A B, B A, A B, ...: a machine that grows faster or slower favours neither.
    """
    pairs = []
    started = time.perf_counter()
    while len(pairs) < least or (len(pairs) < most and time.perf_counter() - started < seconds):
        if len(pairs) % 2 == 0:
            ahead = first()
            pairs.append((ahead, second()))
        else:
            ahead = second()
            pairs.append((first(), ahead))
    return pairs


def spread(values: Sequence[float]) -> Ratio:
    """{"value": median, "interval": [p10, p90]} of at least two values, percentiles interpolated linearly."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"value": statistics.median(values), "interval": [tenths[0], tenths[-1]]}


def paired_ratio(pairs: Sequence[tuple[float, float]]) -> Ratio:
    """`spread` of second / first within each pair. If its interval holds 1, the pairs show no difference.

    Of equal models each pair is a toss, so 11 pairs leave 1 outside of the interval in about 1 run of 80, and 7 pairs
    in about 1 of 20 (a sign test that allows one pair in ten to disagree).
    """
    return spread([second / first for first, second in pairs])


@torch.no_grad()
def compare_speed(
    dense: PreTrainedModel,
    deployed: PreTrainedModel,
    device: torch.device,
    *,
    batch_size: int = 8,
    prompt_length: int = 128,
    steps: int = 32,
) -> dict[str, Any]:
    """Sizes of both, their prefill and decode tokens per second on `device`, and the ratios deployed / dense.

    Random tokens, greedy, with a KV cache; tokens are summed over the batch; decoding is `steps` tokens after a prompt
    of `prompt_length`. Rates are medians over the repeats with p10 and p90 beside them (`interval`), ratios are paired
    (`paired_ratio`). `same_shapes` says that both do the same work: a mask stores zeros, and stock kernels multiply by
    them. Both models stay on the device if they fit; else each goes there for its turns.
    """
    models = dict(zip(SIDES, (dense, deployed), strict=True))
    prompt_length = min(prompt_length, max(8, min(context_of(model) or 2**31 for model in models.values()) - steps))
    vocabulary = min(model.config.vocab_size for model in models.values())
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, vocabulary, (batch_size, prompt_length), generator=generator).to(device)

    def turn_of(model: PreTrainedModel) -> Turn:
        def turn() -> tuple[float, float]:
            with _visiting(model, device):
                prefill, decode = _pass(model, ids_BT, steps)
            return ids_BT.numel() / prefill, batch_size * steps / decode

        return turn

    with _staying(list(models.values()), device):
        figures = {name: _size(model) | _peak_memory(model, ids_BT, steps) for name, model in models.items()}
        turns = [turn_of(model) for model in models.values()]
        take_turns(*turns, least=1, seconds=WARM_SECONDS)
        pairs = take_turns(*turns)
    for index, name in enumerate(SIDES):
        found = {rate: spread([pair[index][place] for pair in pairs]) for place, rate in enumerate(RATES)}
        figures[name] |= {rate: figure["value"] for rate, figure in found.items()}
        figures[name]["interval"] = {rate: figure["interval"] for rate, figure in found.items()}
    return {
        **figures,
        "ratio": {
            rate: paired_ratio([(first[place], second[place]) for first, second in pairs])
            for place, rate in enumerate(RATES)
        },
        "repeats": len(pairs),
        "same_shapes": _shapes(dense) == _shapes(deployed),
        "workload": {"batch_size": batch_size, "prompt_length": prompt_length, "steps": steps},
    }


def _shapes(model: nn.Module) -> list[tuple[torch.Size, torch.dtype]]:
    return [(parameter.shape, parameter.dtype) for parameter in model.parameters()]


def _bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _size(model: PreTrainedModel) -> dict[str, Any]:
    parameter = next(model.parameters())
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "file_bytes": _bytes(model),
        "kv_bytes_per_token": kv_bytes_per_token(model.config, parameter.element_size()),
        "dtype": str(parameter.dtype).removeprefix("torch."),
    }


def _pass(model: PreTrainedModel, ids_BT: torch.Tensor, steps: int) -> tuple[float, float]:
    """Seconds for the prompt, and for the `steps` tokens after it."""
    started = _now(ids_BT.device)
    output = model(input_ids=ids_BT, use_cache=True, logits_to_keep=1)
    filled = _now(ids_BT.device)
    for _ in range(steps):
        next_B1 = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=next_B1, use_cache=True, **taking_cache(model, cache_in(output)))
    return filled - started, _now(ids_BT.device) - filled


def _now(device: torch.device) -> float:
    """The clock when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_memory(model: PreTrainedModel, ids_BT: torch.Tensor, steps: int) -> dict[str, int]:
    """The weights, and the most that a pass needs beside them, whatever else lies on the device; not on a CPU."""
    device = ids_BT.device
    if device.type != "cuda":
        return {}
    with _visiting(model, device):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _pass(model, ids_BT, steps)
        return {"peak_memory_bytes": _bytes(model) + torch.cuda.max_memory_allocated(device) - before}


@contextmanager
def _visiting(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the model is on the device; afterwards it is back where it was."""
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


@contextmanager
def _staying(models: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, the models are on the device if there is room for all of them."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        if sum(map(_bytes, models)) + SPARE_BYTES <= free:
            for model in models:
                model.to(device)
    yield
