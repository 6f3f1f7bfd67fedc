"""A folder full of somebody else's files, with names as ours: what no command may touch."""

from __future__ import annotations

import json
import os
from pathlib import Path

NAMES = (
    *("notes.md", ".notes.tmp", ".x.1234.tmp", ".lock", "env.json", "epochs.jsonl", "verify.json", "speed.json"),
    *("report.json", "report.md", "report.html", "comparison.html", "expected.safetensors"),
    *("probe.json", "probe.jsonl", "positions.jsonl", "positions.parquet", "figures.json"),
    *("batches/texts/batch-00000.pt", "batches/prompts/batch-00001.pt", "batches/prompts/key.json"),
    *("plan/estimate.json", "plan/.estimate.json.7.tmp", "plan/DONE.json", "src/.cache.tmp"),
    *("dense/measure.json", "dense/generations.json", "dense/DONE.json"),
    *("prune/plan.json", "prune/masks.safetensors", "prune/weights.safetensors", "prune/.plan.json.7.tmp"),
    *("prune/parts/parts.jsonl", "prune/parts/part-0.safetensors"),
    *("before/measure.json", "after/measure.json", "trial/trial.json", "trial/epoch-1/adapter_model.safetensors"),
    *("train/best.json", "train/training.json", "train/steps.jsonl", "train/checkpoints.jsonl"),
    *("train/epoch-1/adapter_model.safetensors", "train/epoch-1/MANIFEST.json", "train/.epoch-1.tmp/a"),
    *("train/checkpoints/checkpoint-20/state.json", "train/pruned_text/0-000001.json", "train/data/a.jsonl"),
    *("deploy/model.safetensors", "deploy/mine.txt", "deploy/DONE.json", ".deploy.replaced/a.txt", ".deploy.writing/b"),
    *(".mine.replaced/photo.jpg", ".deploy.tmp/c"),
)


def fill(folder: Path, names: tuple[str, ...] = NAMES) -> Path:
    """Put a file under each name, and a recipe.yaml that is one of ours."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"theirs": name}) if path.suffix == ".json" else f"theirs: {name}\n")
    return folder


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every entry below, links as where they point to."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else b""
        for path in sorted(folder.rglob("*"))
    }
