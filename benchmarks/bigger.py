"""Models that are bigger than the card: seconds, memory and tokens a second of each stage, by where the weights lie.

    python benchmarks/bigger.py --out bigger.jsonl --rows 7B:gpu 7B:cpu 7B:4bit 14B:4bit 32B:4bit 70B:4bit
    python benchmarks/bigger.py --out tiny.jsonl --rows tiny:gpu tiny:cpu tiny:4bit tiny:8bit

    python benchmarks/bigger.py --out shared.jsonl --gpus 2 --rows 7B:gpu 7B:shared 32B:shared+checkpointing

A row is a shape and where its weights are: `gpu` (resident), `cpu` (`model.offload: cpu`), `4bit`, `8bit`
(`model.load_in`), `shared` (`train.shard_weights`, by `--gpus` processes of `accelerate launch`); behind a +,
`checkpointing`. Weights are random, made matrix by matrix where they are to lie, so that
neither main memory nor the disk has to hold a model in bf16. Each row is a process of its own, for at most `--seconds`;
each stage is a line of `--out`, written when it ends. Shapes are those of published models, as Llama's class has them.

Stages: load; prune (25% of the blocks, next to each other, by one pass over 8 x 2,048 tokens); probe (4 texts, 16
steps); text (64 texts of 32 tokens, of the pruned view); train (steps of 4 x 2,048 tokens, LoRA of rank 16 on all
linears, KL; of several processes each has its own sequences, and gradients are averaged); merge (every tensor of the
export, one after the other, written nowhere). Of several processes a line has the largest figure of all, tokens are
those of all, and prompts fall to them in turn.

Legend: B batch, T tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parent / "several_gpus"))

from byte_tokenizer import byte_tokenizer
from launching import kill

from recover.base import dist
from recover.base.memory import PUBLISHED, Shape
from recover.config.recipe import Depth, Lora, Loss, Probe
from recover.distill.distiller import Distiller
from recover.export.merge import tensors, unfilled
from recover.models.plan import Plan
from recover.models.stored_weights import fill, shared_store, store_of, stored_in
from recover.models.twin import Held, Twin
from recover.probe.probe import probe
from recover.prune.registry import prune
from recover.text.generate import generate

SHAPES = {name.partition(" ")[0]: shape for name, shape in PUBLISHED.items()}
SHAPES["14B"] = Shape(14_770_033_664, 48, 5120, 13_824, 40, 8, 128, 152_064)  # Qwen2.5-14B
SHAPES["tiny"] = Shape(0, 8, 64, 160, 4, 2, 16, 512)
MODES = ("gpu", "cpu", "4bit", "8bit", "shared")
# An NVLink multicast that fails can take the GPUs of a shared host out of service.
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
WARM_UP = 2  # steps of training that are not counted
LOGIT_SPREAD = 5.5  # standard deviation of a logit


def main() -> None:
    options = parser_of().parse_args()
    if options.row:
        dist.start()
        Row(options).run()
        dist.stop()
        return
    for row in options.rows:
        if code := process_of(row, options):
            note(options.out, {"row": row, "stage": "failed", "code": code})


def process_of(row: str, options: argparse.Namespace) -> int | str:
    """Do a row in a process of its own, or in several; what it ended with, 0 if all is well."""
    command = [sys.executable, __file__, *sys.argv[1:], "--row", row]
    if row.partition(":")[2].startswith("shared"):
        file = Path(__file__).parents[1] / "launch" / "gpu.yaml"
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes"]
        if not torch.cuda.is_available():
            launch = ["-m", "torch.distributed.run", "--nproc_per_node"]
        command = [sys.executable, *launch, str(options.gpus), *command[1:]]
    with subprocess.Popen(command, env={**os.environ, **NO_MULTICAST}) as process:
        try:
            return process.wait(options.seconds)
        except subprocess.TimeoutExpired:
            return f"ended after {options.seconds} s"
        finally:
            kill(process)


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a line of JSON for each stage, appended")
    parser.add_argument("--rows", nargs="+", default=[], help=f"SHAPE:WHERE, of {', '.join(SHAPES)} and {MODES}")
    parser.add_argument("--row", default="", help=argparse.SUPPRESS)  # of the process that does it
    parser.add_argument("--stages", nargs="+", default=["prune", "probe", "text", "train", "merge"])
    parser.add_argument("--seconds", type=float, default=540, help="of a row (%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step (%(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="their tokens (%(default)s)")
    parser.add_argument("--gpus", type=int, default=2, help="processes of a row that is shared (%(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="that are counted (%(default)s)")
    return parser


def note(out: Path, line: dict[str, Any]) -> None:
    if not dist.is_main():
        return
    text = json.dumps(line)
    print(text, flush=True)
    with open(out, "a") as file:
        file.write(f"{text}\n")


class Row:
    """A shape, where its weights lie, and what has been made of it so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.name = options, options.row
        shape, _, mode = options.row.partition(":")
        self.mode, _, more = mode.partition("+")
        self.checkpointing = more == "checkpointing"
        self.shape, self.device = SHAPES[shape], dist.device()
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        tiny = shape == "tiny"
        self.length, self.vocabulary = (48 if tiny else options.length), self.shape.vocabulary
        self.texts, self.tokenizer = (4 if tiny else 64), byte_tokenizer()

    def run(self) -> None:
        with self.stage("load") as found:
            self.held = Held(self.model())
            found["weights"] = stored_in(self.held.model).kind if stored_in(self.held.model) else "resident"
        self.plan = Plan.none(self.shape.blocks)
        for name in self.options.stages:
            with self.stage(name) as found:
                getattr(self, name)(found)

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """A line with seconds and peaks, and what is put into it inside."""
        found: dict[str, Any] = {}
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        dist.barrier()
        started, failed = time.perf_counter(), None
        try:
            yield found
            if cuda:
                torch.cuda.synchronize()
        except torch.OutOfMemoryError as error:
            failed = str(error).splitlines()[0]
            note(self.options.out, {"row": self.name, "stage": name, "out_of_memory": failed})
            os._exit(1)  # the others wait for this process: their launcher ends them
        peaks = {"host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
        if cuda:
            peaks["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
            peaks["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        each = dist.gather([{"seconds": time.perf_counter() - started, **peaks}])
        line: dict[str, Any] = {"row": self.name, "stage": name}
        line |= {figure: round(max(one[figure] for one in each), 3) for figure in each[0]}
        if len(each) > 1:
            line |= {"processes": len(each), "of_each_gib": [round(one.get("gpu_gib", 0.0), 2) for one in each]}
        if cuda:
            line["gpu"] = torch.cuda.get_device_name()
        note(self.options.out, line | found)

    def model(self) -> PreTrainedModel:
        """Random weights, the same wherever they lie."""
        shape = self.shape
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.blocks,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_size,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        with accelerate.init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype, attn_implementation="sdpa")
        model.requires_grad_(False).eval()
        shapes = {name: each.shape for name, each in model.named_parameters()}

        def value(name: str) -> Tensor | None:
            if name not in shapes:
                return None  # a buffer, which the class made
            if len(shapes[name]) == 1:
                return torch.ones(shapes[name], device=self.device, dtype=self.dtype)
            generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
            std = LOGIT_SPREAD / shape.width**0.5 if name == "lm_head.weight" else 0.02
            found = torch.empty(shapes[name], device=self.device, dtype=self.dtype)
            return found.normal_(std=std, generator=generator)

        dtypes = dict.fromkeys(model.state_dict(), self.dtype)
        if self.mode == "shared":
            fill(model, shared_store(self.device), value, dtypes)
        elif self.mode == "gpu":
            fill(model, None, value, dtypes, self.device)
        else:
            bits: Any = self.mode if "bit" in self.mode else None
            fill(model, store_of("none" if bits else self.mode, bits, self.device), value, dtypes)
        return model

    def twin(self) -> Twin:
        return self.held.twin(self.plan)

    def prune(self, found: dict[str, Any]) -> None:
        count = self.shape.blocks // 4
        cfg = Depth.model_validate(
            {"count": count, "contiguous": True, "score": "angular", "calibration": {"data": "random"}}
        )
        batches: Any = [self.ids(4, self.length, seed) for seed in range(2)]
        self.plan = prune(self.twin(), cfg, batches).plan
        found |= {"tokens": sum(ids.numel() for ids in batches), "dropped": list(self.plan.dropped)}

    def probe(self, found: dict[str, Any]) -> None:
        prompts = self.ids(4, 64, 7).tolist()
        records = probe(self.twin(), self.tokenizer, prompts, Probe(samples=4, steps=16, batch_size=4))
        found["records"] = len(records)

    def text(self, found: dict[str, Any]) -> None:
        prompts = [f"text {number}: once upon a time there was" for number in range(self.texts)]
        started = time.perf_counter()
        mine = dist.shard(prompts)
        written = generate(
            self.twin().model, self.tokenizer, mine, max_new_tokens=32, batch_size=self.texts, title="text"
        )
        tokens = sum(dist.gather([sum(len(each.ids) for each in written)]))
        found |= {"tokens": tokens, "tokens_per_second": round(tokens / (time.perf_counter() - started), 1)}

    def train(self, found: dict[str, Any]) -> None:
        twin = self.twin()
        torch.manual_seed(0)
        twin.add_lora(Lora(rank=16))
        if self.checkpointing:
            twin.base.gradient_checkpointing_enable({"use_reentrant": False})
        twin.model.train()
        distiller = Distiller(twin, Loss())
        trained = [each for each in twin.model.parameters() if each.requires_grad]
        adam = torch.optim.AdamW(trained, lr=1e-4, fused=self.device.type == "cuda")
        ids_BT = self.ids(self.options.batch, self.length, 9 + dist.rank()).to(self.device)

        def step() -> float:
            sums = twin.model(input_ids=ids_BT, attention_mask=None, labels=ids_BT, distill=distiller)
            (sums["loss"] / sums["tokens"]).backward()
            average([each.grad for each in trained if each.grad is not None])
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            adam.step()
            adam.zero_grad()
            return float(sums["loss"].detach() / sums["tokens"])

        times, losses = timed(step, WARM_UP + self.options.steps)
        seconds = statistics.median(times[WARM_UP:])
        found |= {
            "step_seconds": round(seconds, 4),
            "tokens_per_second": round(ids_BT.numel() * dist.world_size() / seconds, 1),
            "losses": losses,
        }

    def merge(self, found: dict[str, Any]) -> None:
        twin = self.twin()
        twin.add_lora(Lora(rank=16))

        def size() -> int:
            return sum(value.nbytes for _, value in tensors(twin, unfilled(twin), self.dtype))

        found["bytes"] = dist.on_main(size)

    def ids(self, rows: int, length: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, min(self.vocabulary, 256), (rows, length), generator=generator)


def average(gradients: list[Tensor]) -> None:
    """Over all processes, in place, by one exchange."""
    if dist.world_size() == 1:
        return
    flat = torch.cat([each.flatten() for each in gradients])
    torch.distributed.all_reduce(flat)
    parts = (flat / dist.world_size()).split([each.numel() for each in gradients])
    for each, part in zip(gradients, parts, strict=True):
        each.copy_(part.view_as(each))


def timed(step: Callable[[], float], times: int) -> tuple[list[float], list[float]]:
    """Seconds and what is given, of each call; what is given is waited for."""
    seconds, given = [], []
    for _ in range(times):
        started = time.perf_counter()
        given.append(step())
        seconds.append(time.perf_counter() - started)
    return seconds, given


if __name__ == "__main__":
    main()
