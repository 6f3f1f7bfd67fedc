"""How long Wanda and SparseGPT take on a model of Qwen2.5-7B's shape, against the textbook's block-by-block loop.

    python benchmarks/prune.py --out prune.json     # one CUDA GPU with 60 GB, two minutes
    python benchmarks/prune.py --tiny --out x.json  # CPU, seconds: shows that it runs, not how fast

Weights are random. The textbook version (one sample at a time, a full sort, a Hessian and three factorizations a layer)
is run on the first blocks only and its time multiplied up. `agreement` is the share of equal mask entries in block 0.

Legend: B batch, T tokens, D width, N tokens, O/I out/in features.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from recover.config.recipe import Calibration, SparseGpt, Wanda
from recover.models.arch import blocks_of, linears_of
from recover.models.plan import Plan, Pruned
from recover.models.twin import Twin
from recover.prune.sparsity import prune_sparsegpt, prune_wanda

SHAPE: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
}
SHAPE |= {"num_key_value_heads": 4, "vocab_size": 152064}
TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 256}
SPARSITY = 0.5


def built(shape: dict[str, Any], device: torch.device, length: int) -> PreTrainedModel:
    """A model with random weights, made on the device in bfloat16 (float32 on a CPU)."""
    config = Qwen2Config(**shape, max_position_embeddings=max(length, 4096), tie_word_embeddings=False)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


class _Stop(Exception):
    pass


@torch.no_grad()
def entrance(model: PreTrainedModel, samples: list[Tensor]) -> tuple[list[Tensor], dict[str, Any]]:
    """What the first block gets, sample by sample."""
    hidden: list[Tensor] = []
    options: dict[str, Any] = {}

    def catch(_module: Any, arguments: tuple[Any, ...], given: dict[str, Any]) -> None:
        hidden.append(arguments[0])
        options.update(given)
        raise _Stop

    handle = blocks_of(model)[0].register_forward_pre_hook(catch, with_kwargs=True)
    for ids_1T in samples:
        try:
            model(input_ids=ids_1T, use_cache=False)
        except _Stop:
            continue
    handle.remove()
    return hidden, options


@torch.no_grad()
def plain(model: PreTrainedModel, samples: list[Tensor], blocks: int, *, hessian: bool) -> dict[str, Tensor]:
    """The textbook loop over the first blocks; weights are pruned in place and put back at the end."""
    hidden, options = entrance(model, samples)
    linears, masks, before = linears_of(model), {}, {}
    for index in range(blocks):
        block = blocks_of(model)[index]
        names = [name for name in linears if f".layers.{index}." in name]
        sums: dict[str, Tensor] = {}
        handles = [linears[name].register_forward_hook(_adding(sums, name, hessian)) for name in names]
        for h_1TD in hidden:
            block(h_1TD, **options)
        for handle in handles:
            handle.remove()
        for name in names:
            weight = linears[name].weight
            before[name] = weight.data
            prune = textbook_sparsegpt if hessian else textbook_wanda
            weight.data, masks[name] = prune(weight.data, sums.pop(name))
        outputs = [block(h_1TD, **options) for h_1TD in hidden]
        hidden = [output[0] if isinstance(output, tuple) else output for output in outputs]
    for name, weight in before.items():
        linears[name].weight.data = weight
    return masks


def _adding(sums: dict[str, Tensor], name: str, hessian: bool) -> Callable[..., None]:
    def hook(_module: Any, arguments: tuple[Tensor, ...], _output: Tensor) -> None:
        x_NI = arguments[0].flatten(0, -2).float()
        found = x_NI.T @ x_NI if hessian else x_NI.square().sum(0)
        sums[name] = sums[name] + found if name in sums else found

    return hook


def textbook_wanda(weight_OI: Tensor, square_I: Tensor) -> tuple[Tensor, Tensor]:
    score_OI = weight_OI.float().abs() * square_I.sqrt()
    lowest = score_OI.sort(dim=1, stable=True).indices[:, : round(SPARSITY * score_OI.shape[1])]
    keep_OI = torch.ones_like(score_OI, dtype=torch.bool).scatter_(1, lowest, False)
    return weight_OI * keep_OI, keep_OI


def textbook_sparsegpt(weight_OI: Tensor, hessian_II: Tensor) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of arXiv 2301.00774 with its three factorizations, a column at a time."""
    w_OI, keep_OI = weight_OI.float(), torch.ones_like(weight_OI, dtype=torch.bool)
    hessian_II.diagonal().add_(0.01 * hessian_II.diagonal().mean())
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))
    factor_II = torch.linalg.cholesky(inverse_II, upper=True)
    for start in range(0, w_OI.shape[1], 128):
        end = min(start + 128, w_OI.shape[1])
        block_OC, factor_CC = w_OI[:, start:end].clone(), factor_II[start:end, start:end]
        score_OC = block_OC.square() / factor_CC.diagonal().square()
        gone_OC = score_OC <= score_OC.flatten().sort().values[int(score_OC.numel() * SPARSITY) - 1]
        error_OC = torch.zeros_like(block_OC)
        for column in range(end - start):
            q_O = block_OC[:, column].clone()
            q_O[gone_OC[:, column]] = 0
            error_O = (block_OC[:, column] - q_O) / factor_CC[column, column]
            block_OC[:, column:] -= error_O.unsqueeze(1) @ factor_CC[column, column:].unsqueeze(0)
            error_OC[:, column] = error_O
        w_OI[:, start:end] = block_OC.masked_fill(gone_OC, 0)
        w_OI[:, end:] -= error_OC @ factor_II[start:end, end:]
        keep_OI[:, start:end] = ~gone_OC
    return w_OI.to(weight_OI.dtype), keep_OI


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """What the work gives, its seconds, and the most device memory that it took."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    found = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return found, {"seconds": time.perf_counter() - started, "peak_gib": peak}


def compared(
    name: str,
    ours: Callable[[], Pruned],
    plainly: Callable[[int], dict[str, Tensor]],
    blocks: int,
    part: int,
    device: torch.device,
) -> dict[str, Any]:
    """One row: both timed in this run; a version that fails is a result too, and printed."""
    row: dict[str, Any] = {"method": name, "blocks_timed_plain": part}
    try:
        masks, row["plain"] = timed(device, lambda: plainly(part))
        row["plain"]["seconds_extrapolated"] = row["plain"]["seconds"] * blocks / part
        masks = {layer: keep_OI.cpu() for layer, keep_OI in masks.items() if ".layers.0." in layer}
        pruned, row["ours"] = timed(device, ours)
        row["ratio"] = row["plain"]["seconds_extrapolated"] / row["ours"]["seconds"]
        equal = sum(int((pruned.masks[layer] == keep_OI).sum()) for layer, keep_OI in masks.items())
        row["agreement"] = equal / sum(keep_OI.numel() for keep_OI in masks.values())
        row["sparsity"] = pruned.plan.sparsity
    except (RuntimeError, ValueError) as error:
        row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        traceback.print_exc()
    return row


def markdown(rows: list[dict[str, Any]], machine: str) -> str:
    lines = [f"{machine}\n", "| method | ratio | ours, s | plain, s (extrapolated) | ours, peak GiB | agreement |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['method']} | {row['error']} | | | | |")
            continue
        peak = row["ours"]["peak_gib"]
        lines.append(
            f"| {row['method']} | {row['ratio']:.1f}x | {row['ours']['seconds']:.1f} | "
            f"{row['plain']['seconds_extrapolated']:.0f} ({row['blocks_timed_plain']} blocks timed) | "
            f"{'-' if peak is None else f'{peak:.0f}'} | {row['agreement']:.4%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.tiny else "cpu")
    shape = TINY if options.tiny else SHAPE
    if options.tiny:
        options.samples, options.length = 8, 64
    torch.manual_seed(0)
    model = built(shape, device, options.length)
    ids = torch.randint(3, shape["vocab_size"], (options.samples, options.length))
    batches, samples = list(ids.split(options.batch_size)), list(ids.to(device).split(1))
    calibration = Calibration(data="random", samples=options.samples, length=options.length)
    twin, blocks = Twin(model, Plan.none(shape["num_hidden_layers"])), shape["num_hidden_layers"]
    wanda = Wanda(kind="wanda", sparsity=SPARSITY, calibration=calibration)
    sparsegpt = SparseGpt(kind="sparsegpt", sparsity=SPARSITY, calibration=calibration)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    machine = f"{name}, torch {torch.__version__}, transformers {transformers.__version__}; {options.samples} x "
    machine += (
        f"{options.length} tokens, batches of {options.batch_size}, {blocks} blocks of width {shape['hidden_size']}"
    )
    work: list[tuple[str, Callable[[], Pruned], bool, int]] = [
        ("wanda", lambda: prune_wanda(twin, wanda, batches), False, min(2, blocks)),  # type: ignore[arg-type]
        ("sparsegpt", lambda: prune_sparsegpt(twin, sparsegpt, batches), True, 1),  # type: ignore[arg-type]
    ]
    rows = []
    for method, ours, hessian, part in work:
        plainly = lambda count, hessian=hessian: plain(model, samples, count, hessian=hessian)  # noqa: E731
        rows.append(compared(method, ours, plainly, blocks, part, device))
        options.out.write_text(json.dumps({"machine": machine, "shape": shape, "rows": rows}, indent=1))
        print(markdown(rows, machine), flush=True)


if __name__ == "__main__":
    main()
