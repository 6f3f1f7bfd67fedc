"""Tokens written per second by what it is made of: each means alone, all of them, greedy and drawn, at three shapes.

    python benchmarks/writing_rate.py                       # a GPU: 135M and 0.5B at 1,024 rows, 7B at 256; 3 minutes
    python benchmarks/writing_rate.py --only 0.5b --seconds 60
    python benchmarks/writing_rate.py --only tiny           # a CPU, seconds: shows that the ways run, not how fast

Random weights in bfloat16 and random prompts of 35 to 49 tokens, one a row; every text is `--tokens` long. A pass is
the whole writing: prompts read, steps recorded, steps taken. tokens/s: median of `--repeats` passes after a short one;
`same`: the texts of all passes are equal to the token; `equal`: share of texts that are those of the first greedy row.
ms/step, kernels, host: of a step in the middle, without the profiler and (kernels) under it; read, record: ms of
reading all prompts and of the first steps, in which one is recorded. Rows are printed as they are measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from trace_events import ON_GPU, events_of, gaps, longest, span
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from recover.config.recipe import Lora, Sampling
from recover.kernels import fused
from recover.models import attention as attention_module
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.text import decode, stepping
from recover.text.decode import Writing

LOGIT_SPREAD = 5.5  # standard deviation of a logit
TOP = 12


@dataclasses.dataclass(frozen=True)
class Subject:
    """A shape, and how many rows of it are written at once."""

    config: Callable[..., PretrainedConfig]
    sizes: tuple[int, int, int, int, int, int]  # blocks, width, intermediate, heads, key-value heads, vocabulary
    rows: int
    ways: tuple[str, ...] | None = None  # default: all
    rank: int = 0  # of adapters on all linear layers of a twin, two blocks of which are dropped; 0: a stock model


SUBJECTS = {
    "135m": Subject(LlamaConfig, (30, 576, 1536, 9, 3, 49_152), 1024),
    "0.5b": Subject(Qwen2Config, (24, 896, 4864, 14, 2, 151_936), 1024),
    "0.5b-lora": Subject(
        Qwen2Config, (24, 896, 4864, 14, 2, 151_936), 1024, ("plain", "all", "all but products"), rank=64
    ),
    "7b": Subject(
        Qwen2Config, (28, 3584, 18_944, 28, 4, 152_064), 256, ("plain", "kernels", "products", "all", "all, drawn")
    ),
    "tiny": Subject(Qwen2Config, (4, 64, 96, 4, 2, 500), 8, rank=4),
}


def model_of(subject: Subject, device: torch.device) -> Any:
    blocks, width, intermediate, heads, kv_heads, vocabulary = subject.sizes
    config = subject.config(
        num_hidden_layers=blocks,
        hidden_size=width,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    nn.init.normal_(model.get_output_embeddings().weight, std=LOGIT_SPREAD / width**0.5)
    model = model.eval().requires_grad_(False)
    return pruned(model, subject.rank) if subject.rank else model


def pruned(model: Any, rank: int) -> Any:
    """The pruned view of a twin, with adapters that change something."""
    blocks = model.config.num_hidden_layers
    twin = Twin(model, Plan("depth", blocks, (blocks // 2, blocks // 2 + 1)))
    twin.add_lora(Lora(rank=rank))
    for name, parameter in twin.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return twin.base.eval()


def _by_sorting(temperature: float, top_p: float) -> decode.Draw:
    """Draws as they were made before: torch's random numbers, and a nucleus by sorting."""

    def draw(logits_BV: Tensor, *_: Tensor) -> Tensor:
        p_BV = (logits_BV.float() / temperature).softmax(-1)
        if top_p < 1:
            sorted_BV, index_BV = p_BV.sort(-1, descending=True)
            kept_BV = (sorted_BV.cumsum(-1) - sorted_BV) < top_p
            p_BV = torch.zeros_like(p_BV).scatter(-1, index_BV, sorted_BV * kept_BV)
        return (p_BV / torch.empty_like(p_BV).exponential_()).argmax(-1)

    return draw


MEANS = ("kernels", "products", "attention", "draws")


@contextmanager
def by(means: set[str]) -> Iterator[None]:
    """Inside, texts are written by these means alone."""
    none = SimpleNamespace(fits=lambda *_: False, available=lambda _: False, DTYPES=())

    @contextmanager
    def ready(model: Any) -> Iterator[None]:
        with (
            stepping.by_kernels(model) if "kernels" in means else nullcontext(),
            stepping.in_few_products(model) if "products" in means else nullcontext(),
        ):
            yield

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(decode, "stepping", ready))
        if "attention" not in means:
            stack.enter_context(mock.patch.object(decode, "fused", none))
            cache = SimpleNamespace(fits=none.fits, available=fused.available)  # for the rest of `stepping` as it is
            stack.enter_context(mock.patch.object(stepping, "fused", cache))
            stack.enter_context(mock.patch.object(attention_module, "_fits", lambda *_: False))
        if "draws" not in means:
            stack.enter_context(mock.patch.object(decode, "greedy", lambda z, *_: z.float().argmax(-1)))
            stack.enter_context(mock.patch.object(decode, "nucleus", _by_sorting))
        yield


DRAWN, CUT = Sampling(temperature=0.7, top_p=1.0), Sampling(temperature=0.7, top_p=0.95)
WAYS: dict[str, tuple[set[str], Sampling | None]] = {
    "plain": (set(), None),
    "kernels": ({"kernels"}, None),  # norms, gates, rotary embedding
    "products": ({"products"}, None),  # query, key and value in one; gate and up in one
    "attention": ({"attention"}, None),  # one kernel for attention, one to fill the cache
    "draws": ({"draws"}, None),  # the likeliest out of half precision
    "all": (set(MEANS), None),
    "plain, drawn": (set(), DRAWN),
    "all, drawn": (set(MEANS), DRAWN),
    "plain, nucleus": (set(), CUT),
    "all, nucleus": (set(MEANS), CUT),
    "all but products": ({"kernels", "attention", "draws"}, None),
    "all but kernels": ({"products", "attention", "draws"}, None),
}


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measured(model: Any, prompts_ids: list[list[int]], how: Writing, repeats: int, until: float) -> dict[str, Any]:
    texts, seconds = [], []
    warm = dict(decode.write(model, prompts_ids, dataclasses.replace(how, limit=2)))
    assert len(warm) == len(prompts_ids)
    for _ in range(repeats):
        torch.manual_seed(0)
        start = now()
        texts.append(dict(decode.write(model, prompts_ids, how)))
        seconds.append(now() - start)
        if time.monotonic() > until:
            break
    tokens = sum(map(len, texts[0].values()))
    return {
        "tokens_per_second": tokens / statistics.median(seconds),
        "seconds": seconds,
        "same": all(each == texts[0] for each in texts),
        "texts": texts[0],
    }


def steady(model: Any, prompts_ids: list[list[int]], how: Writing, *, trace_reading: bool) -> dict[str, Any]:
    """A step in the middle of a text: its time, kernels, and what the host needs for it.

    `trace_reading`: the kernels of reading prompts too (whose time is then the profiler's as well).
    """
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    writer, steps = decode._Writer(model, prompts_ids, how), decode.steps_unseen(model.device)
    with decode.stepping(model):
        start = now()
        with tracing(cuda and trace_reading) as read_events:
            while writer.waiting:
                writer._read_group(len([item for item in writer.items if item is None]))
            read = now()
        now()
        resumed = now()
        writer._advance()
        first = now()
        for _ in range(3):
            writer._advance()
        began = now()
        for _ in range(2):
            writer._advance()
        host = time.perf_counter()
        ended = now()
        with tracing(cuda) as events:
            writer._advance()
            now()
    if writer.recorder:
        writer.recorder.forget()
        writer.recorder = None
    each = (ended - began) / 2 / steps
    found: dict[str, Any] = {
        "read_ms": (read - start) * 1e3,
        "record_ms": (first - resumed - each * steps) * 1e3,
        "step_ms": each * 1e3,
        "host_ms": (host - began) / 2 / steps * 1e3,
        "kernels": len(events) / steps,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }
    if events:
        found["busy"] = 1 - sum(gaps(events)) / span(events)
        found["top"] = top_of(events, steps)
    if read_events:
        found["read_busy"] = 1 - sum(gaps(read_events)) / span(read_events)
        found["read_top"] = top_of(read_events, 1)
    return found


@contextmanager
def tracing(wanted: bool) -> Iterator[list[dict[str, Any]]]:
    """A list that holds, afterwards, what ran on the GPU inside."""
    events: list[dict[str, Any]] = []
    if not wanted:
        yield events
        return
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        yield events
        now()
    events += [event for event in events_of(profiler) if event.get("cat") in ON_GPU]


def top_of(events: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """What takes most time, each step's."""
    return [
        {"name": name, "calls": len(times) / steps, "us": sum(times) / len(times), "ms": sum(times) / steps / 1e3}
        for name, times in longest(events, TOP)
    ]


def line(name: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{name:18} {row['error']}"
    peak = f"{row['peak_bytes'] / 1e9:6.1f}" if row.get("peak_bytes") else "     -"
    return (
        f"{name:18} {row['tokens_per_second']:10,.0f} {row['ratio']:6.2f} {row['step_ms']:8.2f} {row['kernels']:7.0f} "
        f"{row.get('busy', 0):6.1%} {row['host_ms']:7.2f} {row['read_ms']:8.1f} {row['record_ms']:8.1f} {peak} "
        f"{len(row['seconds']):3} {row['same']!s:5} {row['equal']:6.1%}"
    )


HEAD = (
    f"{'way':18} {'tokens/s':>10} {'ratio':>6} {'ms/step':>8} {'kernels':>7} {'busy':>6} {'host ms':>7} {'read ms':>8} "
    f"{'rec. ms':>8} {'GB':>6} {'n':>3} {'same':5} {'equal':>6}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SUBJECTS), default=["135m", "0.5b", "7b"])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="default: as many as the time allows")
    parser.add_argument("--rows", type=int, help="written at once (default: the shape's)")
    parser.add_argument("--tokens", type=int, default=128, help="of each text (%(default)s)")
    parser.add_argument("--prompts", type=int, default=1, help="for each row (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=160, help="for all; no way is begun after (%(default)s)")
    parser.add_argument(
        "--top", nargs="*", default=["plain", "all", "all, nucleus"], help="ways whose kernels are listed"
    )
    parser.add_argument("--reading", nargs="*", default=[], help="ways whose reading of prompts is traced too")
    parser.add_argument("--attention", action="store_true", help="times of the attention kernel by its tiles")
    parser.add_argument("--out", type=Path, help="a file for all figures, JSON")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{machine}, torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    found: dict[str, Any] = {"machine": machine, "torch": torch.__version__, "shapes": {}}
    if options.attention:
        attention(device)
    started = time.monotonic()
    for number, name in enumerate(options.only):
        until = started + options.seconds * (number + 1) / len(options.only)
        found["shapes"][name] = shape(name, device, options, until)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(found, indent=1) + "\n")


def attention(device: torch.device) -> None:
    """Microseconds of a call, by columns at once and warps, for the three shapes at 100 columns of 177."""
    from recover.kernels import triton_kernels

    for name, (rows, heads, groups, size) in {
        "135m": (1024, 3, 3, 64),
        "0.5b": (1024, 2, 7, 64),
        "7b": (256, 4, 7, 128),
    }.items():
        query, keys, values = (
            torch.randn(rows, heads, count, size, device=device, dtype=torch.bfloat16) for count in (groups, 177, 177)
        )
        added, last = (
            torch.zeros(rows, 1, 1, 177, device=device, dtype=torch.bfloat16),
            torch.arange(rows, device=device),
        )
        last = 85 + last % 30
        found = []
        for columns in (32, 64, 128):
            for warps in (1, 2, 4, 8):
                with mock.patch.multiple(triton_kernels, COLUMNS=columns, WARPS=warps):
                    for _ in range(3):
                        triton_kernels.attend(query, keys, values, added, last, 0.1)
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        for _ in range(20):
                            triton_kernels.attend(query, keys, values, added, last, 0.1)
                    graph.replay()
                    start = now()
                    graph.replay()
                    found.append(f"{columns}/{warps}: {(now() - start) / 20 * 1e6:.1f}")
        print(f"attention, {name}, us by columns/warps: {', '.join(found)}", flush=True)


@torch.no_grad()
def shape(name: str, device: torch.device, options: argparse.Namespace, until: float) -> dict[str, Any]:
    subject = SUBJECTS[name]
    rows = options.rows or subject.rows
    began = time.monotonic()
    model, numbers = model_of(subject, device), random.Random(0)
    vocabulary = subject.sizes[-1]
    prompts_ids = [
        [numbers.randrange(vocabulary) for _ in range(numbers.randint(35, 49))] for _ in range(rows * options.prompts)
    ]
    print(
        f"\n{name}: {rows} rows, {options.tokens} tokens (model made in {time.monotonic() - began:.0f} s)\n{HEAD}",
        flush=True,
    )
    found: dict[str, Any] = {}
    first: dict[str, Any] | None = None
    lists: list[str] = []
    for way in options.ways or subject.ways or WAYS:
        if time.monotonic() > until:
            print(f"{way:18} out of time", flush=True)
            continue
        means, sampling = WAYS[way]
        how = Writing(options.tokens, ends=(), pad=0, rows=rows, sampling=sampling)
        try:
            with by(means):
                row = measured(model, prompts_ids, how, options.repeats, until)
                row |= steady(model, prompts_ids[:rows], how, trace_reading=way in options.reading)
        except Exception as error:  # a result too: the other ways still count
            row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        else:
            texts = row.pop("texts")
            first = first or {"texts": texts, "rate": row["tokens_per_second"]}
            row["ratio"] = row["tokens_per_second"] / first["rate"]
            row["equal"] = sum(first["texts"][item] == ids for item, ids in texts.items()) / len(texts)
        found[way] = row
        print(line(way, row), flush=True)
        top: Any = row.get("top", ())
        if way in options.top and top:
            lists.append(f"{name}, {way}: kernels of a step")
            lists += [f"  {k['ms']:7.3f} ms {k['calls']:6.1f} x {k['us']:7.1f} us  {k['name'][:100]}" for k in top]
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print("\n".join(lists), flush=True)
    return found


if __name__ == "__main__":
    main()
