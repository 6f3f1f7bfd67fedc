"""A whole training step of a 7B shape: recover's against two plain models, at the same tokens, in one run.

    python benchmarks/step.py --out step.json        # one CUDA GPU with 140 GB, two to three minutes
    python benchmarks/step.py --tiny --out x.json    # CPU, seconds: shows that all rows compute the same, not how fast

Qwen2.5-7B's shape with random weights in bfloat16 (logits as peaked as a trained model's), random tokens, every one but
the first scored; 28 dense blocks, a student of 20 (blocks 16 to 23 dropped), LoRA of rank 16 on all seven linears, KL.
A step is both passes, the loss, backward, clipping and AdamW. Plain: the student is a stock model of 20 blocks with
peft, the teacher another one, full logits. Where states are known, what `recover.cache` reads from disk stands in
pinned host memory.

Time: median over repetitions on the device's clock, after a warm-up. Share: FLOPs that the row's own passes need
(causal attention halved, nothing counted twice for checkpointing) over the time, of the rate of a bare bf16 product
measured in the same run. Peak: most that tensors took, the weights among it. `KL` and `gradient`: of the first step, to
be equal in rows of one student; the gradient is that of LoRA behind the cut, whose A is the same in all rows.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from step_cost import Shape, flops, shares
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from recover.distill.distiller import DenseStates, Distiller
from recover.models.twin import Twin
from recover.prune.plan import Plan
from recover.recipe import Lora, Loss

SEVEN = Shape(blocks=28, width=3584, intermediate=18_944, heads=28, kv_heads=4, vocabulary=152_064, dropped=(16, 24))
SMALL = Shape(blocks=6, width=64, intermediate=160, heads=4, kv_heads=2, vocabulary=512, dropped=(3, 5))
RANK = 16
LOGIT_SPREAD = 5.5  # standard deviation of a logit
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Built:
    """A model to train, and what makes one step's mean KL per token of a batch (B, T), with gradient."""

    model: Any
    loss: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """`passes`: blocks that run dense, forward and backward; `student`: rows of one student must agree."""

    name: str
    student: str
    passes: tuple[int, int, int]
    build: Callable[[], Built]


class Bench:
    """The shape, the device, and models made anew from the same seed: all rows have the same weights."""

    def __init__(self, shape: Shape, device: torch.device, batch: int, length: int, chunk: int) -> None:
        self.shape, self.device, self.chunk = shape, device, chunk
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator().manual_seed(1)
        self.ids_BT = torch.randint(3, shape.vocabulary, (batch, length), generator=generator).to(device)

    def dense(self) -> PreTrainedModel:
        config = Qwen2Config(
            **self.shape.config(), max_position_embeddings=max(4096, self.ids_BT.shape[1]), tie_word_embeddings=False
        )
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype, attn_implementation="sdpa")
        head: Any = model.get_output_embeddings()
        nn.init.normal_(head.weight, std=LOGIT_SPREAD / self.shape.width**0.5)
        return model.eval().requires_grad_(False)

    def autocast(self) -> Any:
        """As transformers' Trainer does with bf16."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16)

    def plain(self, kind: str, *, dropped: Sequence[int], checkpointing: bool = False) -> Built:
        teacher = self.dense()
        student = get_peft_model(
            without(teacher, dropped),
            LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS, task_type="CAUSAL_LM"),
        )
        prepare(student, checkpointing)
        loss = {"kl": full_kl, "trl": trl_kl, "liger": liger_kl}[kind]

        def run(ids_BT: Tensor) -> Tensor:
            with self.autocast():
                return loss(student, teacher, ids_BT)

        return Built(student, run)

    def recover(
        self, *, dropped: Sequence[int], blocks: Any = "all", checkpointing: bool = False, known: str = "nothing"
    ) -> Built:
        twin = Twin(self.dense(), Plan("depth" if dropped else "none", self.shape.blocks, tuple(dropped)))
        twin.add_lora(Lora(rank=RANK, blocks=blocks))
        prepare(twin.model, checkpointing)
        distiller = Distiller(twin, Loss(chunk=self.chunk))
        options: dict[str, Any] = {"distill": distiller}
        if known != "nothing":
            states = self.states(twin, distiller, prefix=known == "all")
            options["states"] = lambda: states

        def run(ids_BT: Tensor) -> Tensor:
            sums = twin.model(input_ids=ids_BT, attention_mask=None, labels=ids_BT, **options)
            return sums["loss"] / sums["tokens"]

        return Built(twin.model, run)

    def states(self, twin: Twin, distiller: Distiller, *, prefix: bool) -> DenseStates:
        """The dense model's states of the batch, in host memory."""
        batch = {"input_ids": self.ids_BT, "attention_mask": None, "labels": self.ids_BT}
        found = distiller.dense_states(twin.base, **batch)
        prefix_BTD = found.prefix_BTD if prefix else None
        return DenseStates(self.held(found.h_ND), None if prefix_BTD is None else self.held(prefix_BTD))

    def held(self, tensor: Tensor) -> Tensor:
        return tensor.cpu().pin_memory() if self.device.type == "cuda" else tensor.clone()


def without(dense: PreTrainedModel, dropped: Sequence[int]) -> PreTrainedModel:
    """A stock model of the other blocks, with weights of its own."""
    model: Any = copy.deepcopy(dense)
    kept = [block for number, block in enumerate(model.model.layers) if number not in dropped]
    for number, block in enumerate(kept):
        block.self_attn.layer_idx = number
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    model.config.layer_types = model.config.layer_types[: len(kept)]
    return model


def prepare(model: Any, checkpointing: bool) -> None:
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()


def full_kl(student: Any, teacher: Any, ids_BT: Tensor) -> Tensor:
    """As in a textbook: both sides' logits whole, in fp32, and autograd."""
    with torch.no_grad():
        y_NV = teacher(input_ids=ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
    z_NV = student(input_ids=ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
    log_q_NV, log_p_NV = z_NV.float().log_softmax(-1), y_NV.float().log_softmax(-1)
    return F.kl_div(log_q_NV, log_p_NV, reduction="batchmean", log_target=True)


def trl_kl(student: Any, teacher: Any, ids_BT: Tensor) -> Tensor:
    """trl's loss of generalized knowledge distillation at beta 0, as its trainer calls it."""
    from trl.experimental.gkd import GKDTrainer

    z_BTV = student(input_ids=ids_BT, use_cache=False).logits
    with torch.no_grad():
        y_BTV = teacher(input_ids=ids_BT, use_cache=False).logits
    return GKDTrainer.generalized_jsd_loss(
        student_logits=z_BTV[:, :-1], teacher_logits=y_BTV[:, :-1], labels=ids_BT[:, 1:], beta=0.0
    )


def liger_kl(student: Any, teacher: Any, ids_BT: Tensor) -> Tensor:
    """Liger's fused head and JSD at beta 0, which it defines as KL: no logits are held."""
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction  # pyright: ignore[reportMissingImports]

    with torch.no_grad():
        y_BTD = teacher.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    stock = student.get_base_model()
    z_BTD = stock.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    z_ND, y_ND = (h_BTD[:, :-1].flatten(0, 1).to(teacher.dtype) for h_BTD in (z_BTD, y_BTD))
    heads = stock.lm_head.weight, teacher.lm_head.weight
    with torch.autocast(ids_BT.device.type, enabled=False):
        return LigerFusedLinearJSDFunction.apply(z_ND, heads[0], y_ND, heads[1], None, 0.0, -100, 1.0)  # type: ignore[return-value]


def rows_of(bench: Bench) -> list[Row]:
    """The default row first: ratios are to it."""
    first, end = bench.shape.dropped
    dropped, all_, after = range(first, end), bench.shape.blocks, bench.shape.blocks - end
    kept = all_ - len(dropped)
    plain, ours = bench.plain, bench.recover
    both = f"{kept} of {all_} blocks"
    found = [
        Row(f"plain, {both}", "cut", (all_, kept, kept), lambda: plain("kl", dropped=dropped)),
        Row("... with trl's GKD loss", "cut", (all_, kept, kept), lambda: plain("trl", dropped=dropped)),
        Row("... with Liger's fused loss", "cut", (all_, kept, kept), lambda: plain("liger", dropped=dropped)),
        Row("... checkpointed", "cut", (all_, kept, kept), lambda: plain("kl", dropped=dropped, checkpointing=True)),
        Row(f"recover, {both}", "cut", (all_, kept, kept), lambda: ours(dropped=dropped)),
        Row("... checkpointed", "cut", (all_, kept, kept), lambda: ours(dropped=dropped, checkpointing=True)),
        Row("... dense states", "cut", (0, kept, kept), lambda: ours(dropped=dropped, known="dense")),
        Row("... after the cut", "cut", (all_, after, after), lambda: ours(dropped=dropped, blocks="after_cut")),
        Row(
            "... after the cut, dense states and prefix",
            "cut",
            (0, after, after),
            lambda: ours(dropped=dropped, blocks="after_cut", known="all"),
        ),
        Row(f"plain, {all_} blocks", "whole", (all_, all_, all_), lambda: plain("kl", dropped=())),
        Row(f"recover, {all_} blocks", "whole", (all_, all_, all_), lambda: ours(dropped=())),
    ]
    missing = {"trl": "trl's", "liger_kernel": "Liger"}
    absent = [word for package, word in missing.items() if importlib.util.find_spec(package) is None]
    absent += ["Liger"] if bench.device.type == "cpu" else []
    return [row for row in found if not any(word in row.name for word in absent)]


def measured(bench: Bench, row: Row, repeats: int, *, profile: bool) -> dict[str, Any]:
    """One row; one that fails is a result too, and printed."""
    cuda = bench.device.type == "cuda"
    result: dict[str, Any] = {"row": row.name, "student": row.student}
    started = time.monotonic()
    try:
        built = row.build()
        trained = [parameter for parameter in built.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=cuda)

        def step() -> Tensor:
            loss = built.loss(bench.ids_BT)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        result |= first_step(bench, built)
        step()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times = [seconds(step, cuda) for _ in range(repeats)]
        result["peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
        result["seconds"], result["times"] = statistics.median(times), times
        result["tokens_per_second"] = bench.ids_BT.numel() / result["seconds"]
        result["flops"] = flops(bench.shape, bench.ids_BT.shape, RANK, row.passes)
        result["profile"] = shares(step) if profile and cuda else None
    except (RuntimeError, ValueError, TypeError) as error:
        result["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        traceback.print_exc()
    result["wall_seconds"] = time.monotonic() - started
    return result


def first_step(bench: Bench, built: Built) -> dict[str, float]:
    """KL of the batch, and the norm of LoRA's gradient behind the cut."""
    _, end = bench.shape.dropped
    after = bench.shape.blocks - end
    by_block: dict[int, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(2)
    for name, parameter in built.model.named_parameters():
        if "lora_" in name:
            block = int(name.split(".layers.")[1].split(".")[0])
            by_block.setdefault(block, []).append(parameter)
    behind = [parameter for block in sorted(by_block)[-after:] for parameter in by_block[block]]
    with torch.no_grad():  # the same A in all rows, however peft came to its own
        for parameter in behind:
            if bool((parameter != 0).any()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    loss = built.loss(bench.ids_BT)
    loss.backward()
    square = sum(float(each.grad.float().square().sum()) for each in behind if each.grad is not None)
    built.model.zero_grad(set_to_none=True)
    return {"kl": float(loss.detach()), "gradient": square**0.5}


def seconds(step: Callable[[], Any], cuda: bool) -> float:
    if not cuda:
        started = time.perf_counter()
        step()
        return time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a bare product of random values."""
    cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        torch.mm(a, b)
    return 2 * size**3 / statistics.median(seconds(lambda: torch.mm(a, b), cuda) for _ in range(10))


def clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def markdown(found: dict[str, Any]) -> str:
    rows = found["rows"]
    base = next((row["seconds"] for row in rows if "seconds" in row), None)
    lines = [
        f"{found['machine']}\n",
        "| step | x plain | tokens/s | ms | peak GB | share of the matrix rate | KL | gradient |",
        "|---|" + "---:|" * 7,
    ]
    for row in rows:
        if "error" in row or base is None:
            lines.append(f"| {row['row']} | {row.get('error', '')} | | | | | | |")
            continue
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}"
        share = row["flops"] / row["seconds"] / found["matrix_rate"]
        lines.append(
            f"| {row['row']} | {base / row['seconds']:.2f} | {row['tokens_per_second']:,.0f} "
            f"| {row['seconds'] * 1e3:,.1f} | {peak} | {share:.0%} | {row['kl']:.5g} | {row['gradient']:.5g} |"
        )
    for row in rows:
        if row.get("profile"):
            lines += ["", f"{row['row']}: ms of GPU time in a step", *row["profile"]]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape in float32 on the CPU")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step (%(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="their tokens (%(default)s)")
    parser.add_argument("--chunk", type=int, default=2048, help="recover's loss.chunk (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after this")
    parser.add_argument("--only", nargs="+", type=int, metavar="N", help="these rows, from 0")
    parser.add_argument("--profile", nargs="*", type=int, metavar="N", help="where the time goes, of these rows or all")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.tiny else "cpu")
    if device.type == "cpu":
        options.batch, options.length = 2, 48
    bench = Bench(SEVEN if device.type == "cuda" else SMALL, device, options.batch, options.length, options.chunk)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    found: dict[str, Any] = {"rows": [], "matrix_rate": matrix_rate(device)}
    for number, row in enumerate(rows_of(bench)):
        if time.monotonic() - started > options.seconds or number not in (options.only or [number]):
            continue
        profile = options.profile is not None and number in (options.profile or [number])
        found["rows"].append(measured(bench, row, options.repeats, profile=profile))
        clear()
        found["machine"] = (
            f"{name}, torch {torch.__version__}, transformers {transformers.__version__}; {options.batch} x "
            f"{options.length} tokens; bare product {found['matrix_rate'] / 1e12:.0f} TFLOP/s"
        )
        options.out.write_text(json.dumps(found, indent=1))
        print(f"{time.monotonic() - started:4.0f} s: {row.name}", flush=True)
    found["matrix_rate_after"] = matrix_rate(device)
    options.out.write_text(json.dumps(found, indent=1))
    print(markdown(found))


if __name__ == "__main__":
    main()
