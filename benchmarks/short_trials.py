"""Which blocks go: does KL before training foretell what training leaves, and does a short training foretell it better?

    python benchmarks/short_trials.py --out trials.jsonl       # two CPU cores, half an hour
    python benchmarks/short_trials.py --out x.jsonl --sets 8,9,10,11 --tokens 16000 --items 8    # that it runs: 40 s

The embedded model without four of its twelve blocks: each run of four next to each other, those that KL chooses on the
calibration text that ships with it (which holds no stories), and those that KL chooses on the dense model's own answers
to the prompts that it learns from. Each is trained anew on a twentieth of the tokens, on an eighth, and on all of them
(LoRA, KL, cosine to 0). A row has KL along dense's own answers to 48 prompts before and after each training, and how
many of the held-out stories are right before and in the end. Rank correlations are printed over all rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import recover
from recover.config.recipe import embedded
from recover.probe.records import summary
from recover.probe.tasks import rank_correlation

MODEL, COUNT = "embedded:fable-2m", 4
GIVEN = {"data": "embedded:tasks/calibration.jsonl", "samples": 24, "length": 128}
OWN = {"data": "embedded:tasks/prompts.jsonl", "column": "prompt", "answer": 96, "samples": 48, "length": 192}
SHARES = (20, 8, 1)  # of the tokens, one over


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a line of JSON for each set, appended")
    parser.add_argument("--sets", nargs="+", default=[], help="kl, own, or numbers of blocks as 8,9,10,11")
    parser.add_argument("--tokens", type=int, default=60_000, help="of a whole training (%(default)s)")
    parser.add_argument("--items", type=int, default=150, help="stories (%(default)s)")
    given = parser.parse_args()
    windows = [",".join(map(str, range(first, first + COUNT))) for first in range(1, 12 - COUNT + 1)]
    rows = []
    for name in given.sets or ["kl", "own", *windows]:
        rows.append(row_of(name, given.tokens, given.items))
        print(json.dumps(rows[-1]), flush=True)
        with given.out.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    if len(rows) > 2:
        kl_RS = torch.tensor([row["kl"] for row in rows])  # of each set, before and after each training
        for place, when in enumerate(("before", *(f"after 1/{share}" for share in SHARES[:-1]))):
            print(f"KL {when} and in the end: {rank_correlation(kl_RS[:, place], kl_RS[:, -1]):.2f}")


def row_of(name: str, tokens: int, items: int) -> dict[str, Any]:
    """A set of blocks: KL before and after each training, stories before and in the end."""
    started, row = time.perf_counter(), {"set": name, "kl": [], "stories": []}
    lines = (embedded("tasks") / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[-48:]]
    text = recover.DenseText(prompts="embedded:tasks/prompts.jsonl", temperature=0, max_new_tokens=100, batch_size=128)
    for budget in (0, *(tokens // share for share in SHARES)):
        model, tokenizer = recover.load(MODEL)
        twin = recover.prune(model, tokenizer, depth(name))
        row["blocks"] = list(twin.plan.dropped)
        if budget:
            with tempfile.TemporaryDirectory() as out:
                fields: Any = {"epochs": 1, "lr": 1e-3, "batch_size": 8, "length": 192, "lora": recover.Lora(rank=32)}
                recover.distill(twin, tokenizer, text, tokens=budget, out=out, **fields)
        records = recover.probe(twin, tokenizer, prompts, recover.Probe(samples=48, steps=48, batch_size=48))
        row["kl"].append(round(summary(records)["final"]["kl"]["mean"], 4))
        if budget in (0, tokens):
            found = recover.measure(
                twin, tokenizer, ["embedded:stories"], limit=items, batch_size=items, max_new_tokens=96
            )
            row["stories"].append(found["tasks"]["stories"]["exact_match"])
    return {**row, "seconds": round(time.perf_counter() - started, 1)}


def depth(name: str) -> recover.Depth:
    if name in ("kl", "own"):
        text: Any = GIVEN if name == "kl" else OWN
        return recover.Depth(count=COUNT, score="kl", calibration=text)
    return recover.Depth(blocks=tuple(map(int, name.split(","))))


if __name__ == "__main__":
    main()
