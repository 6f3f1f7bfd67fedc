"""A small run directory with believable figures, built without any model, for the tests of the report.

16 blocks, 4 of them dropped; dense 99%, pruned 13%, recovered 97% on a generative task; 48 decoding steps.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml
from report_steps import steps

BLOCKS, DROPPED, STEPS = 16, (6, 9, 10, 12), 48
MACHINE = {"system": "Linux", "processor": "Small CPU", "cores": 2, "memory_bytes": 8_000_000_000, "gpus": []}
SCALE = {"before": 1.0, "after": 0.035}

PROMPTS = [
    ("A baker has 14 rolls and bakes 25 more. How many rolls are there?", "14 + 25 = 39. There are 39 rolls.", "39"),
    (
        "Lena reads 12 pages a day for 5 days. How many pages is that?",
        "12 * 5 = 60. She reads 60 pages in total.",
        "60",
    ),
    ("A bus with 31 seats has 18 people in it. How many seats are free?", "31 - 18 = 13. So 13 seats are free.", "13"),
]
PRUNED_TEXTS = [
    "14 + 25 = 14 + 25 = 14 + 25 = 14 + 25 = 14 + 25 = 14 + 25 = 14 +",
    "12 * 5 pages pages a day, the day of the day of the day of the day of the",
    "31 - 18 = 13. So 18 people 18 people 18 people 18 people",
]
RECOVERED_TEXTS = [
    "14 + 25 = 39. There are 39 rolls.",
    "12 * 5 = 60. Lena reads 60 pages.",
    "31 - 18 = 13. So 13 seats are free.",
]


def build_run(root: Path, *, name: str = "tiny-drop4", kind: str = "depth", without: tuple[str, ...] = ()) -> Path:
    """Write the run and return its folder; `without` names files, relative to it, that are left out."""
    folder = root / name
    files: dict[str, Any] = {
        "RUN.json": {"made_by": "recover", "kind": "run"},
        "recipe.yaml": _recipe(name, kind),
        "env.json": {
            "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
            "machine": MACHINE,
            "git": "0f3c9e1",
            "processes": 1,
        },
        "plan/estimate.json": {"parameters_dense": 26_400_000, "training_seconds": 320.0},
        "dense/measure.json": _measure(
            "dense", (0.99, 0.97, 1.0), (0.645, 0.592, 0.695), 6.41, [text for _, text, _ in PROMPTS]
        ),
        "before/measure.json": _measure("pruned", (0.13, 0.087, 0.18), (0.621, 0.568, 0.672), 19.8, PRUNED_TEXTS),
        "after/measure.json": _measure(
            "recovered", (0.965, 0.935, 0.985), (0.638, 0.585, 0.688), 6.93, RECOVERED_TEXTS
        ),
        "prune/plan.json": _plan(kind),
        "speed.json": _speed(kind),
        "verify.json": {
            "ok": True,
            "logits_max_difference": 0.0,
            "zeros": {},
            "cache": {"steps": 16, "logits_max_difference": 2.4e-7},
            "files": {"model.safetensors": "ab12" * 16},
        },
        "deploy/recover.json": {"recover": "0.1.0", "seed": 0},
    }
    for part in ("before", "after"):
        records, summary = _probe(part)
        files[f"{part}/probe.json"], files[f"{part}/probe.jsonl"] = summary, records
    files["train/steps.jsonl"] = steps()
    files["epochs.jsonl"] = [_epoch(epoch) for epoch in range(1, 7)]
    for path, value in files.items():
        if path not in without:
            _write(folder / path, value)
    return folder


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".yaml":
        text = yaml.safe_dump(value, sort_keys=False)
    elif path.suffix == ".jsonl":
        text = "".join(json.dumps(record) + "\n" for record in value)
    else:
        text = json.dumps(value)
    path.write_text(text, encoding="utf-8")


def _recipe(name: str, kind: str) -> dict[str, Any]:
    prune = {"kind": "depth", "count": 4, "score": "kl"} if kind == "depth" else {"kind": "wanda", "pattern": "2:4"}
    return {
        "name": name,
        "seed": 0,
        "model": {"source": "embedded:model", "dtype": "float32"},
        "prune": prune,
        "train": {"epochs": 6, "tokens": 200_000, "lr": 2e-4},
        "measure": {"tasks": ["embedded:sums", "embedded:facts"], "limit": 200, "epoch_limit": 100},
    }


def _measure(model: str, generation: tuple, choice: tuple, perplexity: float, texts: list[str]) -> dict[str, Any]:
    pruned, dense = model == "pruned", model == "dense"
    samples = [
        {
            "prompt": prompt,
            "text": text,
            "expected": answer,
            "answer": answer if answer in text.split("=")[-1] else None,
            "correct": f"{answer}" in text and not pruned,
        }
        for (prompt, _, answer), text in zip(PROMPTS, texts, strict=True)
    ]
    first = {"mean": 5.2, "p10": 1.0, "p50": 4.0, "p90": 11.0} if pruned else {"mean": 21.0, "p50": 22.0, "p90": 30.0}
    parting = (
        {"never": 0.0, "p10": 1, "p50": 4, "p90": 11, "curve": [[0, 1.0], [5, 0.5], [12, 0.1], [20, 0.0]]}
        if pruned
        else {"never": 0.78, "p10": 22, "p50": None, "p90": None, "curve": [[0, 1.0], [23, 0.9], [41, 0.78]]}
    )
    sums = {
        "kind": "generate",
        "items": 200,
        "exact_match": generation[0],
        "interval95": list(generation[1:]),
        "sampled_exact_match": round(generation[0] * 0.96, 3),
        "repetition": 0.61 if pruned else 0.03,
        "longest_repeat": 41.0 if pruned else 1.2,
        "distinct_2": 0.34 if pruned else 0.88,
        "ended": 0.22 if pruned else 1.0,
        **_mistakes(model, samples),
        "length": 88.4 if pruned else 17.2,
        "truncated": 156 if pruned else 0,
        "agreement": None if dense else (0.11 if pruned else 0.91),
        "first_divergence": None if dense else first,
        "parting": None if dense else parting,
        "exact_text": None if dense else (0.0 if pruned else 0.78),
        "samples": samples,
    }
    facts = {
        "kind": "choice",
        "items": 320,
        "accuracy": choice[0],
        "interval95": list(choice[1:]),
        "accuracy_normalised": round(choice[0] - 0.012, 3),
        "margin": 1.21 if not pruned else 1.02,
        "samples": [],
    }
    text = {"kind": "perplexity", "items": 64, "tokens": 32_000, "perplexity": perplexity}
    headline = {"generation": generation[0], "choice": choice[0], "perplexity": perplexity}
    return {
        "tasks": {"sums": sums, "facts": facts, "prose": text},
        "headline": headline,
        "seconds": 41.0,
        "tokens_per_second": 912.0,
    }


def _mistakes(model: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    counts = {
        "dense": {"loop": 0, "endless": 0, "no_answer": 0, "content": 2},
        "pruned": {"loop": 131, "endless": 25, "no_answer": 6, "content": 12},
        "recovered": {"loop": 0, "endless": 0, "no_answer": 1, "content": 6},
    }[model]
    examples = {kind: samples[at % 3] for at, (kind, count) in enumerate(counts.items()) if count}
    start = {"mean": 14.2, "p10": 6.0, "p50": 12.0, "p90": 27.0} if counts["loop"] else None
    return {"mistakes": counts, "examples": examples, "loop_rate": counts["loop"] / 200, "loop_start": start}


def _plan(kind: str) -> dict[str, Any]:
    random.seed(3)
    common = {
        "kind": kind,
        "blocks": BLOCKS,
        "parameters_dense": 26_400_000,
        "calibration": {"samples": 64, "length": 256},
    }
    if kind == "depth":
        return {
            **common,
            "dropped": list(DROPPED),
            "scores": _greedy_scores(),
            "masks": {},
            "parameters_pruned": 21_100_000,
            "nonzero": 21_100_000,
        }
    masks = {
        f"model.layers.{block}.{site}": {
            "shape": [64, 64],
            "zeros": int(4096 * (0.5 if block else 0.42 + random.random() / 10)),
            "pattern": "2:4",
        }
        for block in range(BLOCKS)
        for site in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }
    return {
        **common,
        "dropped": [],
        "scores": [],
        "masks": masks,
        "parameters_pruned": 26_400_000,
        "nonzero": 14_900_000,
    }


def _greedy_scores() -> list[dict[str, Any]]:
    """Every candidate of every round: blocks in the middle are cheapest to lose."""
    scores, gone = [], []
    for round_, chosen in enumerate((9, 10, 6, 12), start=1):
        for block in range(1, BLOCKS):
            if block in gone:
                continue
            cost = 0.05 * 1.9**round_ * (1 + ((block - 9.3) / 3.2) ** 2) * (0.8 + 0.4 * random.random())
            cost *= 0.4 if block == chosen else 1.0
            scores.append({"round": round_, "blocks": [block], "score": cost, "by": "kl", "chosen": block == chosen})
        gone.append(chosen)
    return scores


def _speed(kind: str) -> dict[str, Any]:
    rates = {"prefill_tokens_per_second": 5200.0, "decode_tokens_per_second": 310.0}
    dense = {
        "parameters": 26_400_000,
        "file_bytes": 105_600_000,
        "kv_bytes_per_token": 16_384,
        "dtype": "bfloat16",
        "peak_memory_bytes": None,
    }
    smaller = {"parameters": 21_100_000, "file_bytes": 84_400_000, "kv_bytes_per_token": 12_288}
    gain = 1.28 if kind == "depth" else 1.01
    return {
        "dense": {**dense, **_rates(rates)},
        "deployed": {
            **dense,
            **(smaller if kind == "depth" else {}),
            **_rates({rate: value * gain for rate, value in rates.items()}),
        },
        "ratio": {rate: {"value": gain, "interval": [gain * 0.96, gain * 1.05]} for rate in rates},
        "repeats": 9,
        "same_shapes": kind != "depth",
        "workload": {"batch_size": 8, "prompt_length": 128, "steps": 32},
        "machine": MACHINE,
    }


def _rates(values: dict[str, float]) -> dict[str, Any]:
    return {**values, "interval": {rate: [value * 0.97, value * 1.02] for rate, value in values.items()}}


def _spread(middle: float) -> dict[str, float]:
    return {"mean": middle * 1.4, "p50": middle, "p90": middle * 2.4, "p99": middle * 3.1, "max": middle * 3.2}


def _probe(part: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    random.seed(11)
    scale = SCALE[part]
    finals = [{"probe": "final", "temperature": t, **_final(scale / t)} for t in (0.5, 1.0, 2.0)]
    blocks = [{"probe": "block", **_block(block, scale)} for block in range(BLOCKS)]
    steps = [{"probe": "step", **_step(step, scale, part)} for step in range(STEPS)]
    never = 0.02 if part == "before" else 0.71
    divergence = {"prompts": 32, "first": _spread(4.0), "never": never, "each": [4, None]}
    summary = {
        "final": _final(scale),
        "temperatures": [{key: value for key, value in final.items() if key != "probe"} for final in finals],
        "blocks": [{key: value for key, value in block.items() if key != "probe"} for block in blocks],
        "steps": [{key: value for key, value in step.items() if key != "probe"} for step in steps],
        "divergence": divergence,
        "prompts": 32,
        "identity": {"kl_max": 0.0},
    }
    return [*finals, *blocks, *steps, {"probe": "divergence", **divergence}], summary


def _final(scale: float) -> dict[str, Any]:
    return {
        "embedding": _spread(0.18 * scale),
        "logit": _spread(0.11 * scale),
        "probability": _spread(0.31 * scale),
        "kl": _spread(0.92 * scale),
        "kl_predicted": _spread(1.6 * scale),
        "reverse_kl": _spread(1.1 * scale),
        "top1": _spread(0.4 if scale > 0.5 else 0.68),
        "top5": _spread(0.35 if scale > 0.5 else 0.66),
    }


def _block(block: int, scale: float) -> dict[str, Any]:
    gone = sum(1 for dropped in DROPPED if dropped <= block)
    level = scale * gone**1.4 * 0.02 * (1 + 0.25 * math.sin(block))
    spaces = {
        "embedding": _spread(level),
        "logit": _spread(level * 0.6),
        "probability": _spread(level * 1.9 if block > 8 else level * 0.5),
    }
    by_step = [{"step": step, "kl": level * 3 * (1 + step / STEPS), "n": 128} for step in range(0, STEPS, 4)]
    place = {"block": block, "closed": block in DROPPED, "lens": "final_norm", "by_step": by_step}
    return {**place, **spaces, "kl": _spread(level * 3)}


def _step(step: int, scale: float, part: str) -> dict[str, Any]:
    forced = scale * (0.35 + 0.5 * random.random() ** 2 + (1.3 if step % 11 == 4 else 0))
    apart = 1 - math.exp(-(step + 0.3) / (5.0 if part == "before" else 120.0))
    free = forced + apart * (3.4 + 0.5 * random.random()) * (1.0 if part == "before" else 0.6)
    predicted = forced * (1 + 1.8 * forced * random.random()) if forced < 1 else forced * (0.5 + 3.5 * random.random())
    teacher = {"kl": _spread(forced / 1.4), "kl_predicted": _spread(predicted / 1.4), "n": 32 - step // 6}
    teacher |= {"embedding": _spread(forced / 6), "logit": _spread(forced / 8), "probability": _spread(forced / 3)}
    return {
        "step": step,
        "teacher_forced": teacher,
        "free_running": {
            "kl": _spread(forced),
            "total": _spread(free / 1.4),
            "gap": _spread(free / 1.4),
            "n": 32,
            "diverged": apart,
        },
        "by_temperature": {},
    }


def _epoch(epoch: int) -> dict[str, Any]:
    score = (0.52, 0.81, 0.93, 0.97, 0.96, 0.95)[epoch - 1]
    wrong = {"mistakes": {"loop": 12 // epoch, "endless": 2, "no_answer": 0, "content": 40 // epoch}}
    wrong |= {"loop_start": {"mean": 14.0, "p10": 6.0, "p50": 11.0 + epoch, "p90": 20.0}}
    loss = 0.9 * math.exp(-epoch / 1.7) + 0.045
    return {
        "epoch": epoch,
        "step": 66 * epoch,
        "tokens": 33_400 * epoch,
        "seconds": 52.0 * epoch,
        "train": {"loss": loss, "kl": loss * 0.93, "variance": loss * 0.4, "ce": 1.2 + loss, "lr": 2e-4},
        "measure": {
            "tasks": {
                "sums": {"kind": "generate", "items": 100, "exact_match": score, "loop_rate": 0.2 / epoch, **wrong}
            },
            "headline": {"generation": score, "choice": 0.62 + epoch / 400, "perplexity": 12 - epoch},
        },
        "drift": _final(0.4 / epoch),
        "score": score,
    }
