"""What `same_figures.py` runs: small jobs that between them pass through every family, kind of pruning and loss.

A job is words for the command line `recover`, never a call of a function: files move, the command line does not.
Recipes keep to field names that older commits know: `recover` is what `train` was called before.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Fields = dict[str, Any]

CHECKPOINTS = 51


@dataclass(frozen=True)
class Job:
    """One call of the command line.

    `words`: its arguments. `launcher`: Python's arguments before them, where processes are started by a launcher.
    `found`: the run directory or the file with the figures, in the work folder. `last`: the file of the run with which
    all figures are there; what would follow is ended. `seconds`: after so many it has failed.
    """

    name: str
    words: Sequence[str]
    found: str
    launcher: Sequence[str] = ()
    last: str | None = None
    seconds: float = 300.0


CALIBRATION = {"data": "calibration.jsonl", "samples": 4, "length": 48, "batch_size": 4}


def _depth(**fields: Any) -> Fields:
    return {"kind": "depth", "calibration": CALIBRATION, **fields}


def _weights(kind: str, **fields: Any) -> Fields:
    return {"kind": kind, "calibration": CALIBRATION, **fields}


KINDS: dict[str, Fields] = {
    "depth-kl": _depth(count=2, score="kl"),
    "wanda": _weights("wanda", sparsity=0.5),
    "sparsegpt-2:4": _weights("sparsegpt", pattern="2:4"),
    "depth-variance-rescale": _depth(count=1, score="variance", repair="rescale"),
    "width-activation": _weights("width", mlp=0.25, score="activation", repair="none", multiple=8),
    "depth-perplexity-linear": _depth(count=2, score="perplexity", repair="linear"),
    "magnitude": {"kind": "magnitude", "sparsity": 0.25},
    "depth-taylor": _depth(count=2, score="taylor"),
    "wanda-owl": _weights("wanda", sparsity=0.5, allocation="owl"),
    "depth-angular": _depth(count=2, score="angular"),
    "sublayers-kl": _depth(unit="sublayer", count=3),
    "sparsegpt": _weights("sparsegpt", sparsity=0.4),
    "depth-influence": _depth(count=2, score="block_influence", iterative=True),
    "width-fluctuation": _weights("width", kv_groups=1, score="fluctuation", repair="none"),
    "pairs": _depth(unit="pair", count=2),
    "wanda-kl": _weights("wanda", sparsity=0.3, allocation="kl"),
    "attention-kl": _depth(unit="attention", count=2),
    "depth-contiguous": _depth(count=2, contiguous=True),
    "magnitude-2:4": {"kind": "magnitude", "pattern": "2:4"},
    "mlp-kl": _depth(unit="mlp", count=2),
    "depth-beam": _depth(count=2, beam=2),
    "wanda-4:8": _weights("wanda", pattern="4:8"),
    "depth-listed": {"kind": "depth", "blocks": [2, 4]},
    "width-both": _weights("width", mlp=0.25, kv_groups=1, score="activation", repair="none", multiple=8),
    "depth-swap": _depth(count=2, swap=True),
    "sublayers-listed": {"kind": "depth", "unit": "sublayer", "sites": ["mlp:3", "attention:4"]},
    "depth-answers": _depth(count=2, calibration={**CALIBRATION, "answer": 12}),
}

# In the place of what is not done to experts, where a mixture's turn comes to it.
NOT_FOR_EXPERTS = ("wanda-owl", "sparsegpt")
EXPERTS = _weights("experts", count=1, score="kl")

GIVEN = {"kind": "given", "source": "given.jsonl", "columns": {"prompt": "p", "completion": "c"}}
WRITTEN = {"prompts": "prompts.jsonl", "max_new_tokens": 12, "batch_size": 8}
ALL_TERMS = {"kl": 1.0, "variance": 0.2, "variance_until": 0.5, "variance_r": 0.1, "reverse_kl": 0.1, "jsd": 0.1}
# Ways to train, which the checkpoints take in turn.
TRAININGS: dict[str, Fields] = {
    "given": {},
    "terms": {"loss": {**ALL_TERMS, "ce": 0.1, "temperature": 2.0, "chunk": 64}},
    "dense text": {"data": [{**WRITTEN, "kind": "dense", "temperature": 0}]},
    "accumulated": {"micro_batch_size": 1, "gradient_checkpointing": True},
    "pruned text": {"data": [GIVEN, {**WRITTEN, "kind": "pruned", "every": 2}]},
    "cached": {"cache": {"folder": "states"}},
    "all scored": {"loss": {"kl": 1.0, "scored": "all"}, "lora": {"rank": 4, "dropout": 0.1}},
}
AFTER_CUT = {"lora": {"rank": 4, "blocks": "after_cut"}}
CHANGES: dict[str, Fields] = {"depth-listed": AFTER_CUT}  # of training, for one kind of pruning


def recipe(name: str, family: str, prune: Fields, **training: Any) -> Fields:
    """A whole recipe of seconds: two epochs of two steps on a tiny model."""
    recover = {"epochs": 2, "tokens": 500, "length": 64, "batch_size": 4, "lr": 0.01, "lora": {"rank": 4}}
    return {
        "name": name,
        "seed": 3,
        "model": {"source": f"models/{family}", "tokenizer": "tokenizer"},
        "prune": prune,
        "probe": {"samples": 2, "steps": 6, "temperatures": [1.0], "items": 2, "batch_size": 4},
        "recover": {**recover, "data": [GIVEN], **training},
        "measure": {
            "tasks": ["says.yaml", "chooses.yaml", "reads.yaml"],
            "limit": 4,
            "max_new_tokens": 8,
            "batch_size": 8,
            "sampling": {"temperature": 0.7},
            "samples": 1,
        },
    }


QUICKSTART = ("measure.limit=40", "measure.epoch_limit=20", "probe.samples=4", "probe.steps=16", "probe.items=20")
QUICKSTART += ("recover.tokens=8000", "recover.epochs=2", "recover.data.0.max_new_tokens=64")
QUICKSTART += ("recover.data.0.batch_size=32",)

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "recover")
ZERO = ("-m", "accelerate.commands.launch", "--config_file")
LAUNCHERS: dict[str, tuple[Sequence[str], Fields]] = {
    "ddp": (TORCHRUN, {"micro_batch_size": 1}),
    "ddp-terms": (TORCHRUN, {**TRAININGS["terms"], "shard_weights": True}),
    "zero2": ((*ZERO, str(ROOT / "launch/cpu_zero2.yaml"), "-m", "recover"), {}),
}


def write_models(folder: Path) -> list[str]:
    """A random checkpoint of each family of tests/tiny.py in `folder`, with a tokenizer beside it; their names."""
    sys.path.insert(0, str(ROOT / "tests"))
    from byte_tokenizer import byte_tokenizer
    from tiny import FAMILIES, tiny

    for family in FAMILIES:
        tiny(family).save_pretrained(folder / family)
        byte_tokenizer().save_pretrained(folder / family)
    # Recipes name this one: beside a Qwen2 config, transformers makes a tokenizer of that family of it, with other ids.
    byte_tokenizer().save_pretrained(folder.parent / "tokenizer")
    return list(FAMILIES)


def write_texts(work: Path) -> None:
    """Prompts, texts and tasks of the tiny models: uneven lengths, no two rows the same."""
    words = [" ".join(f"{(7 * i + 3 * j) % 50}{chr(97 + i * j % 26)}" for j in range(60)) for i in range(16)]
    _rows(work / "calibration.jsonl", [{"text": text} for text in words])
    _rows(work / "given.jsonl", [{"p": f"say {i}: ", "c": "ab" * (1 + 7 * i % 25)} for i in range(60)])
    _rows(work / "prompts.jsonl", [{"prompt": f"say {i}:"} for i in range(20)])
    _rows(work / "says-rows.jsonl", [{"q": f"say {i}: ", "answer": str(i)} for i in range(4)])
    choices = [{"q": f"is {i} ", "options": ["odd", "even", "both"], "label": i % 2} for i in range(4)]
    _rows(work / "chooses-rows.jsonl", choices)
    _rows(work / "reads-rows.jsonl", [{"text": text[: 40 + 9 * i]} for i, text in enumerate(words[:4])])
    for name, kind, more in (
        ("says", "generate", {"prompt": "{q}"}),
        ("chooses", "choice", {"prompt": "{q}"}),
        ("reads", "perplexity", {"length": 64}),
    ):
        _json(work / f"{name}.yaml", {"name": name, "kind": kind, "data": f"{name}-rows.jsonl", **more})


def _rows(path: Path, rows: list[Fields]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _json(path: Path, fields: Fields) -> None:
    path.write_text(json.dumps(fields, indent=1), encoding="utf-8")  # JSON is YAML


def jobs(work: Path, families: Sequence[str], *, whole: bool) -> list[Job]:
    """All jobs, longest first, with their recipes written to `work`. `whole`: the quickstart as it is, uncut."""
    return [_quickstart(whole), *_launched(work), *_checkpoints(work, families), *_without_recipe()]


def _run(name: str, command: str, recipe: str, *more: str, **options: Any) -> Job:
    return Job(name, (command, recipe, *more, "--runs", "runs"), f"runs/{name}", **options)


def _quickstart(whole: bool) -> Job:
    name, path = "quickstart-whole" if whole else "quickstart", "embedded:quickstart"  # as each checkout has it
    return _run(name, "run", path, f"name={name}", *(() if whole else QUICKSTART), seconds=7200.0)


def _launched(work: Path) -> list[Job]:
    """The same training on two processes, by each launcher."""
    made = []
    for name, (launcher, training) in LAUNCHERS.items():
        _json(work / f"two-{name}.yaml", recipe(f"two-{name}", "llama", KINDS["depth-kl"], **training))
        made.append(_run(f"two-{name}", "train", f"two-{name}.yaml", launcher=launcher))
    return made


def _checkpoints(work: Path, families: Sequence[str]) -> list[Job]:
    """Families, kinds of pruning and ways to train in turn; their numbers share no divisor, so none meet twice."""
    made = []
    for number in range(CHECKPOINTS):
        family = families[number % len(families)]
        kind = list(KINDS)[number % len(KINDS)]
        prune = KINDS[kind]
        if family.endswith("_moe") and kind in NOT_FOR_EXPERTS:
            kind, prune = "experts", EXPERTS
        training = list(TRAININGS)[number % len(TRAININGS)]
        name = f"{number + 1:02}-{family}-{kind}".replace(":", "of")
        fields = recipe(name, family, prune, **{**TRAININGS[training], **CHANGES.get(kind, {})})
        _json(work / f"{name}.yaml", fields)
        made.append(_run(name, "export", f"{name}.yaml", last="verify.json"))
    return made


def _without_recipe() -> list[Job]:
    """Commands that take checkpoints."""
    tasks = ("embedded:stories", "embedded:facts", "embedded:tales")
    small = ("--limit", "24", "--max-new-tokens", "64", "--batch-size", "24", "--out", "measure.json")
    probed = ("--prompts", "prompts.jsonl", "--texts", "calibration.jsonl", "--task", "chooses.yaml", "--samples", "4")
    probed += ("--steps", "8", "--length", "48", "--seeds", "0")
    taught = ("embedded:fable-2m", "embedded:tasks/calibration.jsonl", "teacher.jsonl", "--top", "8", "--length", "64")
    return [
        Job("measure", ("measure", "embedded:fable-2m", "--tasks", *tasks, *small), "measure.json"),
        Job("diagnose", ("diagnose", "models/llama", "models/mistral", "--out", "diagnosis", *probed), "diagnosis"),
        Job("teacher", ("teacher", *taught), "teacher.jsonl"),
    ]
