"""A whole run in a process, or in each of several, that may hold less than the model; as a script under a launcher.

python tests/limited.py RECIPE ROOT MIB [FIELD=VALUE ...]: MIB of memory that is the process's own, beyond what it has
once its libraries are loaded (0: no limit). A process that takes more is ended. Files that are mapped, and memory that
processes share, are not counted, so a resource limit of the system would not do: transformers maps each file of a model
as if it were going to write to it.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from recover.base import dist
from recover.base.console import quiet_libraries
from recover.config.recipe import load_recipe
from recover.run import stages

WIDTH, INTERMEDIATE, BLOCKS = 512, 2048, 12
LATE = ("recover.run.stage_work", "trl", "datasets", "deepspeed")  # what a run imports when it gets there


def write_model(folder: Path) -> int:
    """A model whose blocks are nearly all of it; its bytes in float32, and so in memory, as its files are bfloat16."""
    from byte_tokenizer import byte_tokenizer

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=BLOCKS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="25MB")
    byte_tokenizer().save_pretrained(folder)
    return sum(4 * each.numel() for each in model.parameters())


def own_bytes() -> int:
    """Memory of this process that is no other's and no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def watch(limit: int, peak: list[int]) -> None:
    """End the process when it takes more than the limit."""
    while True:
        peak[0] = max(peak[0], own_bytes())
        if peak[0] > limit:
            print(f"OVER THE LIMIT: {peak[0]:,} bytes, {limit:,} allowed", flush=True)
            os._exit(9)
        time.sleep(0.01)


def main() -> None:
    recipe, root, mebibytes, *fields = sys.argv[1:]
    torch.set_num_threads(1)
    quiet_libraries()
    dist.start()
    assert all(importlib.import_module(name) for name in LATE)
    before, peak = own_bytes(), [0]
    limit = before + (int(mebibytes) or 2**30) * 2**20
    threading.Thread(target=watch, args=(limit, peak), daemon=True).start()
    stages.run(load_recipe(Path(recipe), fields), Path(root))
    print(f"process {dist.rank()}: at most {(peak[0] - before) / 2**20:.0f} MiB of its own", flush=True)
    dist.stop()
    dist.leave(0)


if __name__ == "__main__":
    main()
