"""Time and memory of every stage of `recover run`, at the size of a hybrid of 8B and of a mixture of experts.

    python benchmarks/whole_job.py --shape qwen3.5-9b --seconds 240 --out OUT
    python benchmarks/whole_job.py --shape 30b-a3b --blocks 16 --seconds 300 --out OUT
    python benchmarks/whole_job.py --shape 30b-a3b --tiny        # on a CPU: the same code in a minute

The weights are random, made on the spot; tokenizer and tasks are the embedded model's, and texts run to their limit.
So seconds and bytes are those of the shape, and the figures of the recovery mean nothing. Hybrids are narrowed (MLPs,
by activations), mixtures lose a quarter of their experts (REAP): the cheapest score of each.

A checkpoint and its export have to fit on the disk of `--folder`: where they do not, the model gets fewer blocks, and
the table says so. A row is printed, and written to whole_job.jsonl, as its stage ends. After `--seconds` the run is
stopped by a signal, as a scheduler would stop it: what was begun is a row too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from recover.base import dist
from recover.base.clock import Clock
from recover.base.errors import StopRequested
from recover.base.memory import GIB
from recover.config import recipe
from recover.run import stages

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
EVERY = 0.1  # seconds between two looks at the memory
ROOM = 0.95  # of the disk
TEXT = "calibration: {data: 'embedded:tasks/calibration.jsonl', samples: 24, length: 128}"
NARROWER = f"prune={{kind: width, mlp: 0.25, score: activation, repair: none, {TEXT}}}"
FEWER_EXPERTS = f"prune={{kind: experts, share: 0.25, score: reap, {TEXT}}}"
KINDS = {"M": "linear_attention", "-": "mlp", "*": "full_attention"}


@dataclass(frozen=True)
class Shape:
    """A family at the sizes of one of its models; `tiny`: what to have otherwise for a test."""

    family: str
    prune: str
    sizes: dict[str, Any]
    tiny: dict[str, Any]
    settings: tuple[str, ...] = ()

    def config(self, *, tiny: bool, blocks: int | None) -> PretrainedConfig:
        """Of the stock class; `blocks`: so many of them."""
        sizes = {"max_position_embeddings": 2048, **self.sizes, **(self.tiny if tiny else {})}
        if blocks:
            sizes["num_hidden_layers"] = blocks
        if "layers_block_type" in sizes:
            sizes["layers_block_type"] = sizes["layers_block_type"][:blocks]
        return AutoConfig.for_model(self.family, **sizes, bos_token_id=None, eos_token_id=None, pad_token_id=None)


SHAPES = {
    "qwen3.5-9b": Shape(  # three of four blocks are Gated DeltaNets
        "qwen3_5_text",
        NARROWER,
        {
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "vocab_size": 248_320,
            "tie_word_embeddings": False,
        },
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "vocab_size": 3000,
        },
    ),
    "falcon-h1-7b": Shape(  # Mamba-2 beside attention in every block
        "falcon_h1",
        NARROWER,
        {
            "hidden_size": 3072,
            "intermediate_size": 12_288,
            "num_hidden_layers": 44,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "mamba_d_ssm": 3072,
            "mamba_n_heads": 24,
            "mamba_d_head": 128,
            "mamba_d_state": 256,
            "mamba_n_groups": 2,
            "mamba_chunk_size": 128,
            "vocab_size": 130_048,
            "tie_word_embeddings": False,
        },
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "head_dim": 16,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_chunk_size": 16,
            "vocab_size": 3000,
        },
    ),
    "nemotron-h-8b": Shape(  # each block is one sublayer: Mamba-2, an MLP or attention
        "nemotron_h",
        NARROWER,
        {
            "hidden_size": 4096,
            "intermediate_size": 21_504,
            "layers_block_type": [KINDS[each] for each in f"M-M-M-M*-{'M-M-M-M-M*-' * 3}M-M-M-M-M-"],
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "mamba_num_heads": 128,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 8,
            "vocab_size": 131_072,
        },
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "layers_block_type": [KINDS[each] for each in "M-*-M-"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "vocab_size": 3000,
        },
    ),
    "30b-a3b": Shape(
        "qwen3_moe",
        FEWER_EXPERTS,
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "vocab_size": 151_936,
            "tie_word_embeddings": False,
        },
        {
            "hidden_size": 64,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "vocab_size": 3000,
        },
        ("train.lora.parts=[linears, experts, router]", "train.lora.rank=8"),
    ),
}


def parameters(config: PretrainedConfig) -> int:
    with torch.device("meta"):
        return sum(each.numel() for each in AutoModelForCausalLM.from_config(config).parameters())


def fitting(shape: Shape, given: argparse.Namespace, folder: Path) -> PretrainedConfig:
    """The shape with as many blocks as fit twice on the disk, once as the checkpoint, once as its export."""
    config = shape.config(tiny=given.tiny, blocks=given.blocks)
    free = ROOM * shutil.disk_usage(folder).free
    size = torch.bfloat16.itemsize
    while 2 * size * parameters(config) > free and config.num_hidden_layers > 1:
        config = shape.config(tiny=given.tiny, blocks=config.num_hidden_layers - 1)
    return config


def checkpoint(config: PretrainedConfig, folder: Path) -> float:
    """Write a stock folder of random weights with the embedded model's tokenizer; gives the seconds."""
    began = time.perf_counter()
    torch.manual_seed(0)
    with torch.device(dist.device()):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    AutoTokenizer.from_pretrained(recipe.embedded("fable-2m")).save_pretrained(folder)
    return time.perf_counter() - began


class Memory:
    """The most in use since `begin`: what torch gave out, all of the GPU (a fresh process verifies), and of the host.

    Of the host it is this process and its children, without pages of files that the system may take back.
    """

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available()
        self.gpu = self.host = 0
        self.over = threading.Event()
        self.watch = threading.Thread(target=self._look, daemon=True)

    def begin(self) -> None:
        """Forget the most so far."""
        self.gpu = self.host = 0
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def found(self) -> dict[str, float]:
        """GiB: `torch` and `gpu` (0 on a CPU), `host`."""
        self._see()
        given_out = torch.cuda.max_memory_allocated() if self.on_gpu else 0
        return {"torch": given_out / GIB, "gpu": self.gpu / GIB, "host": self.host / GIB}

    def _look(self) -> None:
        while not self.over.wait(EVERY):
            self._see()

    def _see(self) -> None:
        if self.on_gpu:
            free, total = torch.cuda.mem_get_info()
            self.gpu = max(self.gpu, total - free)
        this = psutil.Process()
        used = 0
        for each in (this, *this.children(recursive=True)):
            try:
                memory = each.memory_info()
                used += memory.rss - getattr(memory, "shared", 0)
            except psutil.NoSuchProcess:
                continue
        self.host = max(self.host, used)

    def __enter__(self) -> Memory:
        self.watch.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.over.set()
        self.watch.join()


def line(row: dict[str, Any]) -> str:
    parts = sorted(row["parts"].items(), key=lambda each: -each[1])
    shown = ", ".join(f"{name} {took:.1f}" for name, took in parts if took >= 0.05)
    gib = " | ".join(f"{row['gib'][name]:.1f}" for name in ("torch", "gpu", "host"))
    return f"| {row['stage']}{'' if row['done'] else ', stopped'} | {row['seconds']:.1f} | {gib} | {shown} |"


@dataclass
class Table:
    """Rows as stages end: printed, and written where there is a file."""

    memory: Memory
    file: Path | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, stage: str, seconds: float, parts: dict[str, float], *, done: bool = True) -> None:
        """A row with the memory since the one before."""
        row = {"stage": stage, "seconds": seconds, "parts": parts, "done": done, "gib": self.memory.found()}
        self.rows.append(row)
        self.memory.begin()
        print(line(row), flush=True)
        if self.file:
            with self.file.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def __str__(self) -> str:
        head = "| stage | seconds | torch GiB | GPU GiB | host GiB | of it |\n|---|---:|---:|---:|---:|---|"
        return "\n".join([head, *map(line, self.rows)])

    @contextmanager
    def of_stages(self) -> Iterator[None]:
        """Inside, a stage of a run is a row when it ends, also where it ends early."""
        note = stages.note

        def noted(root: Path, stage: str, clock: Clock, *, done: bool) -> None:
            note(root, stage, clock, done=done)
            self.add(stage, clock.seconds, dict(clock.parts), done=done)

        stages.note = noted
        try:
            yield
        finally:
            stages.note = note


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Inside, this process gets SIGTERM after so many seconds, which ends a run."""
    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    except StopRequested:
        print(f"stopped after {seconds:.0f} s", flush=True)
    finally:
        timer.cancel()


def settings(given: argparse.Namespace, source: Path) -> list[str]:
    shape = SHAPES[given.shape]
    return [
        f"name={given.shape}",
        f"model={{source: '{source}', dtype: {'bfloat16' if torch.cuda.is_available() else 'float32'}}}",
        shape.prune,
        "probe.samples=8",
        "probe.steps=16",
        "train.epochs=1",
        f"train.tokens={given.tokens}",
        "train.lora.rank=16",
        "train.lr=1e-4",
        "train.data.0.temperature=1.0",
        "train.data.0.max_new_tokens=48",
        f"measure.limit={given.limit}",
        "measure.max_new_tokens=48",
        "measure.batch_size=64",
        "measure.sampling=null",
        *shape.settings,
        *given.set,
    ]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="30b-a3b")
    parser.add_argument("--blocks", type=int, help="so many of them, not all of the model's")
    parser.add_argument("--tiny", action="store_true", help="the family at a size for tests")
    parser.add_argument("--tokens", type=int, default=20_000, help="of the recovery (%(default)s)")
    parser.add_argument("--limit", type=int, default=16, help="items of each task (%(default)s)")
    parser.add_argument("--until", choices=stages.STAGES, default="report")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for all: the run is stopped after this")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="more fields of the recipe")
    parser.add_argument(
        "--folder", type=Path, help="for the checkpoint and the run; default: the system's, for a while"
    )
    parser.add_argument("--out", type=Path, help="folder of whole_job.jsonl, a row a stage")
    given = parser.parse_args(arguments)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch, Memory() as memory:
        table = Table(memory, given.out and given.out / "whole_job.jsonl")
        config = fitting(SHAPES[given.shape], given, Path(scratch))
        of, count = SHAPES[given.shape].config(tiny=given.tiny, blocks=None).num_hidden_layers, parameters(config)
        chip = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
        blocks = f"{config.num_hidden_layers} of {of} blocks"
        print(f"{given.shape} ({config.model_type}): {blocks}, {count:,} parameters; {chip}")
        table.add("random weights", checkpoint(config, Path(scratch) / "model"), {})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            memory.begin()
        asked = recipe.load_recipe(QUICKSTART, settings(given, Path(scratch) / "model"))
        left = given.seconds - (time.perf_counter() - began)
        with table.of_stages(), stopped_after(left):
            directory = stages.run(asked, Path(scratch) / "runs", until=given.until)
            planned = json.loads((directory.plan / "estimate.json").read_text())["memory_bytes_per_process"]
            print(f"planned for the recovery: {planned / GIB:.1f} GiB")
            for file in (directory.plan / "estimate.json", directory.speed, directory.report_md):
                if given.out and file.exists():
                    shutil.copy(file, given.out / file.name)
    print(f"\n{table}\n\nthe whole program: {time.perf_counter() - began:.1f} s")
    return table.rows


if __name__ == "__main__":
    main()
