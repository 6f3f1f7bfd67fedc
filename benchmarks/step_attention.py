"""Attention of one decoding step: its bits each time, error and time; and texts written again.

    python benchmarks/step_attention.py                                # attention alone
    python benchmarks/step_attention.py --model FOLDER_OR_GGUF --task TASK --dtype bfloat16

Three ways: recover's, this version of transformers', and torch's own choice where keys and values were copied before.
`same`: calls that gave the bits of the first; `error`: the largest, relative to float64; on a GPU recorded as a CUDA
graph, on a CPU called as it is, with two rows. With a model its texts are written `--times` times, with recover's
attention and with transformers': how many are those of the first time, to the token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from recover.base import console, dist, provenance
from recover.config import recipe
from recover.measure.tasks import load_task
from recover.models.attention import attend
from recover.models.load import load_model, load_tokenizer, ready
from recover.report import words
from recover.text import decode
from recover.text.generate import generate

CALLS, TIMED = 100, 20  # that are compared; medians of so many, each of ten calls


@dataclass(frozen=True)
class Shape:
    """Rows, query heads, query heads to a KV head, columns seen, columns of the cache, size of a head."""

    name: str
    rows: int
    heads: int
    shared: int
    seen: int
    columns: int
    size: int


SHAPES = (
    Shape("SmolLM2", 200, 9, 3, 256, 288, 64),
    Shape("SmolLM2, many rows", 1024, 9, 3, 512, 512, 64),
    Shape("Qwen2.5-7B", 64, 28, 7, 512, 700, 128),
    Shape("Qwen2.5-7B, many rows", 256, 28, 7, 512, 700, 128),
    Shape("Llama-3.1-8B", 64, 32, 4, 512, 512, 128),
    Shape("Llama-3.1-8B, one row", 1, 32, 4, 2048, 2048, 128),
    Shape("an odd number of columns", 61, 14, 7, 333, 700, 128),
    Shape("two to a head", 37, 30, 2, 1024, 1024, 128),
    Shape("sixteen to a head", 50, 64, 16, 700, 700, 128),
    Shape("28 heads, none shared", 64, 28, 1, 512, 512, 128),
    Shape("9 heads, none shared", 333, 9, 1, 400, 400, 64),
    Shape("32 heads, none shared", 64, 32, 1, 512, 512, 128),
)


class Heads(nn.Module):
    """What transformers' function asks an attention module for."""

    is_causal = True

    def __init__(self, shared: int) -> None:
        super().__init__()
        self.num_key_value_groups = shared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, GGUF file, or embedded:NAME")
    parser.add_argument(
        "--task", default="embedded:stories", help="a generate task: its prompts (default: %(default)s)"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--times", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=96, help="most new tokens of a text (%(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="texts at once (%(default)s)")
    arguments = parser.parse_args()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    console.say(f"{words.machine(provenance.machine())}; {versions}")
    if arguments.model:
        console.table("texts of the first time", ["attention", "the same, time by time", "of"], texts(arguments))
    else:
        on_gpu = dist.device().type == "cuda"  # else a few rows show that it runs
        shapes = SHAPES if on_gpu else [replace(shape, rows=min(shape.rows, 2)) for shape in SHAPES]
        rows = [row for shape in shapes for row in calls(shape)]
        console.table("one call of attention", ["shape", "attention", "same", "of", "error", "us"], rows)


@torch.no_grad()
def calls(shape: Shape) -> list[list[Any]]:
    device = dist.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, tokens: int) -> Tensor:
        return torch.randn(shape.rows, heads, tokens, shape.size, device=device, dtype=dtype, generator=generator)

    query, kv_heads = normal(shape.heads, 1), shape.heads // shape.shared
    key, value = (normal(kv_heads, shape.columns)[:, :, : shape.seen] for _ in "kv")
    at_B1 = torch.randint(shape.seen // 2, shape.seen, (shape.rows, 1), device=device, generator=generator)
    hidden_B11K = (torch.arange(shape.seen, device=device) > at_B1)[:, None, None]
    mask = torch.zeros(hidden_B11K.shape, device=device, dtype=dtype).masked_fill(hidden_B11K, torch.finfo(dtype).min)
    module = Heads(shape.shared)

    def copied(wide: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Tensor:
        keys, values = (wide(each).repeat_interleave(shape.shared, 1) for each in (key, value))
        return scaled_dot_product_attention(wide(query), keys, values, attn_mask=wide(mask)).transpose(1, 2)

    ways: dict[str, Callable[[], Tensor]] = {
        "recover": lambda: attend(module, query, key, value, mask)[0],
        "transformers": lambda: sdpa_attention_forward(module, query, key, value, mask)[0],
        "torch, keys copied": copied,
    }
    exact = copied(Tensor.double)
    return [[shape.name, name, *_measured(way, exact)] for name, way in ways.items()]


def _measured(way: Callable[[], Tensor], exact: Tensor) -> list[Any]:
    way()
    call = _recorded(way) if exact.is_cuda else way
    outputs = [call().clone() for _ in range(CALLS)]
    same = sum(torch.equal(output, outputs[0]) for output in outputs)
    error = max(float((output.double() - exact).norm() / exact.norm()) for output in outputs)
    return [same, CALLS, f"{error:.2e}", round(1e6 * statistics.median(_seconds(call) for _ in range(TIMED)))]


def _recorded(way: Callable[[], Tensor]) -> Callable[[], Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = way()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def _seconds(call: Callable[[], Tensor]) -> float:
    """Of one call, out of ten; the clock starts and stops when all that was asked is done."""
    started = _now()
    for _ in range(10):
        call()
    return (_now() - started) / 10


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def texts(arguments: argparse.Namespace) -> list[list[Any]]:
    cfg = recipe.Model(source=arguments.model, dtype=arguments.dtype)
    model, tokenizer = ready(load_model(cfg)), load_tokenizer(cfg)
    prompts = [item.prompt for item in load_task(arguments.task).items]

    def written() -> list[list[int]]:
        options = {"max_new_tokens": arguments.tokens, "batch_size": arguments.batch}
        return [each.ids for each in generate(model, tokenizer, prompts, **options)]

    def row(name: str) -> list[Any]:
        first, *others = [written() for _ in range(arguments.times)]
        same = [sum(a == b for a, b in zip(first, other, strict=True)) for other in others]
        return [name, ", ".join(map(str, same)), len(prompts)]

    found = [row("recover")]
    with mock.patch.object(decode, "configs_of", lambda model: []):
        return [*found, row("transformers")]


if __name__ == "__main__":
    main()
