"""Where the time of a whole job goes: seconds of each stage and its parts, and how often the host waits for the GPU.

    python benchmarks/stages.py --shape 0.5b --out OUT        # on a GPU: Qwen2.5-Coder-0.5B's shape
    python benchmarks/stages.py --shape tiny --tokens 8000    # on a CPU: the same code in a minute

Random weights, so the tokenizer and the tasks of the embedded model serve, and texts run to their limit: an upper bound
of what writing costs. Waits are counted by torch's own warnings, at the line of recover that asked.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from recover.base.clock import spent
from recover.config import recipe
from recover.run import stages

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 3000,
    },
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
    },
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
}
LINES = 8  # of waits shown for a stage


class Waits:
    """Counts the warnings of `torch.cuda.set_sync_debug_mode`, by stage and line of the package."""

    def __init__(self) -> None:
        self.stage = ""
        self.found: dict[str, Counter[str]] = {}

    def __call__(self, message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" not in str(message):
            return
        frame: Any = sys._getframe(1)
        while frame is not None and "/recover/" not in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is not None:
            file = frame.f_code.co_filename.rpartition("/recover/")[2]
            self.found.setdefault(self.stage, Counter())[f"{file}:{frame.f_lineno} {frame.f_code.co_name}"] += 1

    def install(self) -> None:
        """From here on; each stage is told apart as it begins."""
        warnings.simplefilter("always")
        warnings.showwarning = self
        torch.cuda.set_sync_debug_mode("warn")
        work = stages.Stage.run

        def begun(stage: stages.Stage, context: Any) -> None:
            self.stage = stage.name
            work(stage, context)

        stages.Stage.run = begun


def checkpoint(shape: str, folder: Path) -> Path:
    """A stock folder of random weights with the embedded model's tokenizer."""
    sizes: dict[str, Any] = {"max_position_embeddings": 2048, "tie_word_embeddings": True, **SHAPES[shape]}
    config = AutoConfig.for_model("qwen2", **sizes, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(recipe.embedded("fable-2m")).save_pretrained(folder)
    return folder


def settings(given: argparse.Namespace, source: Path) -> list[str]:
    return [
        f"model.source={source}",
        f"model.dtype={'bfloat16' if torch.cuda.is_available() else 'float32'}",
        f"train.tokens={given.tokens}",
        "train.epochs=1",
        "train.batch_size=32",
        "train.data.0.temperature=1.0",
        "train.data.0.batch_size=256",
        f"measure.limit={given.limit}",
        "measure.epoch_limit=50",
        "measure.batch_size=256",
        f"probe.samples={given.samples}",
    ]


def show(rows: list[dict[str, Any]], waits: Waits) -> None:
    print("| stage | seconds | of it | waits |\n|---|---:|---|---:|")
    for row in rows:
        parts = sorted(row["parts"].items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts if seconds >= 0.05)
        print(
            f"| {row['stage']} | {row['seconds']:.1f} | {shown} | {sum(waits.found.get(row['stage'], {}).values()):,} |"
        )
    print(f"| all | {sum(row['seconds'] for row in rows):.1f} | | |")
    for stage, lines in waits.found.items():
        print(f"\nwaits of {stage}: " + ", ".join(f"{where} {count:,}" for where, count in lines.most_common(LINES)))


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--tokens", type=int, default=30_000, help="of the recovery")
    parser.add_argument("--limit", type=int, default=200, help="items of each task")
    parser.add_argument("--samples", type=int, default=32, help="prompts of the probe")
    parser.add_argument("--until", choices=stages.STAGES, default="report")
    parser.add_argument("--out", type=Path, help="folder for stages.json")
    given = parser.parse_args()
    waits = Waits()
    with tempfile.TemporaryDirectory() as scratch:
        source = checkpoint(given.shape, Path(scratch) / "model")
        if torch.cuda.is_available():
            waits.install()
        cfg = recipe.load_recipe(QUICKSTART, settings(given, source))
        directory = stages.run(cfg, Path(scratch) / "runs", until=given.until)
        rows = spent(directory.root)
    show(rows, waits)
    print(f"\nthe whole program: {time.perf_counter() - began:.1f} s")
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        chip = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
        found = {stage: dict(lines) for stage, lines in waits.found.items()}
        value = {"chip": chip, "torch": torch.__version__, "shape": given.shape, "stages": rows, "waits": found}
        (given.out / "stages.json").write_text(json.dumps(value, indent=1))


if __name__ == "__main__":
    main()
