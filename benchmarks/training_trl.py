"""trl's trainers on the text and shapes of `training.py`: what its users would train with instead.

`GKD`: `trl.experimental.gkd.GKDTrainer` on given text (lmbda 0, beta 0: KL of the dense model), two models, padded.
`SFT, packed`: `SFTTrainer` with `packing`, cross-entropy alone: no teacher runs, so it does less than a distillation.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import byte_tokenizer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from step_models import LINEARS, Bench, without
from transformers import TrainerCallback

from recover.train.data import collator

PACKED = 1024  # tokens of a packed row


class Clock(TrainerCallback):
    """The time at the end of each step, and the loss."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def trained(bench: Bench, way: str, rows: Dataset, batch: int, rank: int, steps: int, folder: Path) -> dict[str, Any]:
    """Figures of one training, as `training.trained` gives them; the first tenth of the steps is not counted."""
    teacher = bench.dense()
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEARS, task_type="CAUSAL_LM")
    student = get_peft_model(without(teacher, range(*bench.shape.dropped)), config)
    clock = Clock()
    build = {"trl's GKD": _gkd, "trl's SFT, packed": _sft}[way]
    trainer, tokens_a_step = build(student, teacher, rows, batch, folder, steps)
    trainer.add_callback(clock)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    trainer.train()
    times = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)][steps // 10 :]
    seconds = clock.times[-1] - started
    return {
        "steps": tokens_a_step / statistics.median(times),
        "training": tokens_a_step * steps / seconds,
        "step_seconds": statistics.median(times),
        "seconds": seconds,
        "tokens": tokens_a_step * steps,
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "losses": clock.losses,
    }


def _shared(batch: int, folder: Path, steps: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": 2e-4,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_length": PACKED,
    }


def _gkd(student: Any, teacher: Any, rows: Dataset, batch: int, folder: Path, steps: int) -> tuple[Any, float]:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    args = GKDConfig(**_shared(batch, folder, steps), lmbda=0.0, beta=0.0, seq_kd=False)
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=rows,
        processing_class=byte_tokenizer(),
        data_collator=collator(0, "completion"),
    )
    scored = sum(sum(row["completion_mask"]) for row in rows.select(range(min(len(rows), 640))))
    return trainer, scored / min(len(rows), 640) * batch


def _sft(student: Any, teacher: Any, rows: Dataset, batch: int, folder: Path, steps: int) -> tuple[Any, float]:
    from trl import SFTConfig, SFTTrainer

    tokens, scored = (sum(sum(map(count, row)) for row in rows[name]) for name, count in COUNTS.items())
    together = max(1, round(tokens / len(rows) * batch / PACKED))
    args = SFTConfig(**_shared(together, folder, steps), packing=True, completion_only_loss=True)
    trainer = SFTTrainer(model=student, args=args, train_dataset=rows, processing_class=byte_tokenizer())
    return trainer, scored / len(trainer.train_dataset) * together  # type: ignore[arg-type]


COUNTS: dict[str, Any] = {"input_ids": lambda _id: 1, "completion_mask": int}
