"""What it costs to probe two models along given texts: seconds, positions a second and peak memory, one row a case.

    python benchmarks/probe.py                  # on a GPU: two models of Qwen2.5-7B's shape, 64 texts of 512 tokens
    python benchmarks/probe.py --shape tiny     # on a CPU: the same code in seconds

Weights are random (the other model is the dense one plus noise, so that no sublayer is equal and none is skipped): cost
does not depend on what they say. Goal on one H200: all figures within 60 s and 40 GiB.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from recover.config import recipe
from recover.probe.probe import records_of, texts
from recover.probe.views import Pair

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 997,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
    },
}
TEXTS = {"tiny": (8, 32), "7b": (64, 512)}  # how many, tokens of each
NOISE = 0.02  # of the other model's matrices, in standard deviations of the dense ones
CASES = {
    "last layer": {"sublayers": False, "layer_positions": 1},
    "last layer, blocks": {"sublayers": False},
    "last layer, blocks, sublayers": {},
}


def model(shape: str, device: str, noise: float) -> Any:
    """Random weights, the same for every call but for the noise."""
    config = AutoConfig.for_model("qwen2", **SHAPES[shape], tie_word_embeddings=False, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        found = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    for parameter in found.parameters():
        if noise and parameter.dim() == 2:
            parameter.data += noise * parameter.data.std() * torch.randn_like(parameter)
    return found.eval()


def measure(pair: Pair, ids: list[list[int]], cfg: recipe.Probe, device: str) -> dict[str, Any]:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    began = time.perf_counter()
    records = records_of(pair, texts(pair, ids, cfg))
    seconds = time.perf_counter() - began
    final = next(record for record in records if record.probe == "final")
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    positions: int = final.positions  # type: ignore[union-attr]
    return {"records": len(records), "positions": positions, "seconds": seconds, "peak_gib": peak}


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b" if device == "cuda" else "tiny")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path, help="folder for probe.json")
    given = parser.parse_args()
    pair = Pair.of_models(model(given.shape, device, 0.0), model(given.shape, device, NOISE))
    count, length = TEXTS[given.shape]
    ids = torch.randint(0, SHAPES[given.shape]["vocab_size"], (count, length)).tolist()
    measure(pair, ids[:1], recipe.Probe(), device)  # warm up
    rows = {}
    print(f"{count} texts of {length} tokens, {given.shape}, {device}, batches of {given.batch_size}")
    print("| figures | records | positions | seconds | positions/s | peak GiB |\n|---|---:|---:|---:|---:|---:|")
    for name, fields in CASES.items():
        row = rows[name] = measure(
            pair, ids, recipe.Probe(samples=count, batch_size=given.batch_size, **fields), device
        )
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        print(
            f"| {name} | {row['records']:,} | {row['positions']:,} | {row['seconds']:.1f} | "
            f"{row['positions'] / row['seconds']:,.0f} | {peak} |",
            flush=True,
        )
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        chip = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
        value = {"chip": chip, "torch": torch.__version__, "shape": given.shape, "cases": rows}
        (given.out / "probe.json").write_text(json.dumps(value, indent=1))


if __name__ == "__main__":
    main()
