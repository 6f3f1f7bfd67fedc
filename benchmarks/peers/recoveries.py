"""How a cut model learns again: each tool's own trainer, on the same rows, once over; out comes a stock model.

All train as many steps of as many sequences, score every token, let the rate rise over the same first steps and fall as
a cosine. Else each is as its users run it:

`sft`: trl's SFTTrainer, LoRA on all linear layers, cross-entropy. What users of LLM-Drop, PruneMe and Wanda do.
`full`: the same without LoRA, all weights. `gkd`: trl's GKDTrainer with LoRA on the given text (lmbda 0: every tool
learns from the same rows), its own beta of 0.5; `gkd-kl`: beta 0, which is KL. `optipfair`: its `distill_model`, all
weights, its own mixture of losses.

Rates are the recipe's times `RATES`: full training takes the tenth that is usual, optipfair its own 4e-5 where the
recipe has 2e-4.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, set_seed

from recover.config.train import Train
from recover.train.data import collator

# torch's first choice for padded rows on recent GPUs; its backward gave NaN with a finite loss (torch 2.11, H200).
torch.backends.cuda.enable_cudnn_sdp(False)

RATES = {"sft": 1.0, "full": 0.1, "gkd": 1.0, "gkd-kl": 1.0, "optipfair": 0.2}


@dataclass(frozen=True)
class Lesson:
    """What a trainer is given. `rows`: `input_ids` and `completion_mask`, whole steps; `student`, `dense`: folders."""

    student: Path
    dense: Path
    tokenizer: Any
    rows: Dataset
    cfg: Train
    seed: int
    scratch: Path
    micro: int | None = None  # sequences at once; None: all of a step

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return len(self.rows) // self.cfg.batch_size

    @property
    def at_once(self) -> int:
        """Sequences of one pass."""
        return min(self.micro or self.cfg.batch_size, self.cfg.batch_size)

    def halved(self) -> Lesson:
        """Half as many at once, where that was limited: for trainers that hold several copies of two models' logits."""
        return replace(self, micro=None if self.micro is None else max(1, self.at_once // 2))

    def settings(self) -> dict[str, Any]:
        """What trl's and transformers' trainers take alike."""
        on_gpu = torch.cuda.is_available()
        return {
            "output_dir": str(self.scratch),
            "max_steps": self.steps,
            "per_device_train_batch_size": self.at_once,
            "gradient_accumulation_steps": self.cfg.batch_size // self.at_once,
            "learning_rate": self.cfg.lr,
            "lr_scheduler_type": "cosine",
            "warmup_steps": round(self.cfg.warmup * self.steps),
            "max_grad_norm": self.cfg.max_grad_norm,
            "max_length": self.cfg.length,
            "bf16": on_gpu,
            "use_cpu": not on_gpu,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 20,
            "disable_tqdm": True,
            "seed": self.seed,
        }

    def lora(self) -> LoraConfig:
        """The recipe's rank on all linear layers."""
        rank = self.cfg.lora.rank
        alpha = self.cfg.lora.alpha or 2 * rank
        return LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")  # type: ignore[arg-type]


def loaded(folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    """A stock model on this process's device."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.cuda() if torch.cuda.is_available() else model


def sft(lesson: Lesson) -> Any:
    """LoRA by cross-entropy, merged as peft merges."""
    return _trl_sft(lesson, loaded(lesson.student), lesson.lora()).merge_and_unload()


def full(lesson: Lesson) -> Any:
    """All weights by cross-entropy, held in float32."""
    return _trl_sft(lesson, loaded(lesson.student, torch.float32), None)


def _trl_sft(lesson: Lesson, student: Any, lora: LoraConfig | None) -> Any:
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

    trainer: Any = SFTTrainer(
        model=student,
        args=SFTConfig(**lesson.settings(), completion_only_loss=False, packing=False),
        train_dataset=lesson.rows.select_columns(["input_ids"]),
        processing_class=lesson.tokenizer,
        peft_config=lora,
    )
    trainer.train()
    return trainer.model


def gkd(lesson: Lesson, beta: float = 0.5) -> Any:
    """LoRA by trl's distillation from the dense model, merged as peft merges."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    lesson = lesson.halved()
    collate: Any = collator(lesson.tokenizer.pad_token_id, "all")
    trainer: Any = GKDTrainer(
        model=loaded(lesson.student),
        teacher_model=loaded(lesson.dense),
        args=GKDConfig(**lesson.settings(), lmbda=0.0, beta=beta),
        train_dataset=lesson.rows,
        processing_class=lesson.tokenizer,
        data_collator=collate,
        peft_config=lesson.lora(),
    )
    trainer.train()
    return trainer.model.merge_and_unload()


def optipfair(lesson: Lesson) -> Any:
    """optipfair's distillation of all weights, held in float32."""
    from optipfair import distill_model  # pyright: ignore[reportMissingImports]  # a peer

    lesson = lesson.halved()
    collate: Any = collator(lesson.tokenizer.pad_token_id, "all")
    rows: Any = lesson.rows
    batches = DataLoader(
        rows,
        batch_size=lesson.at_once,
        shuffle=True,
        generator=torch.Generator().manual_seed(lesson.seed),
        collate_fn=collate,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.autocast(device, torch.bfloat16) if device == "cuda" else nullcontext():
        return distill_model(
            student_model=loaded(lesson.student, torch.float32),
            teacher_model=loaded(lesson.dense),
            dataloader=batches,
            epochs=1,
            learning_rate=lesson.cfg.lr,
            warmup_ratio=lesson.cfg.warmup,
            accumulation_steps=lesson.cfg.batch_size // lesson.at_once,
            show_progress=False,
        )


TRAINERS: dict[str, Callable[[Lesson], Any]] = {
    "sft": sft,
    "full": full,
    "gkd": gkd,
    "gkd-kl": lambda lesson: gkd(lesson, beta=0.0),
    "optipfair": optipfair,
}


def learnt(recovery: str, lesson: Lesson) -> Any:
    """The stock model after one of TRAINERS."""
    set_seed(lesson.seed)
    return TRAINERS[recovery](lesson)
