"""How much of each block goes, by `prune.allocation`: KL of Wanda to the dense model, without any recovery.

    python benchmarks/allocations.py recipes/quickstart.yaml --text recover/embedded/tasks/tales.jsonl

The recipe gives model, calibration and seed; `--text` is other text (JSONL with a `text` column), on which the mean KL
a token (nats) and the perplexity are measured.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

import recover
from recover.config.prune import Wanda
from recover.config.recipe import load_recipe
from recover.maths.divergence import kl, log_probabilities
from recover.models.twin import Twin
from recover.text.prompts import text_ids
from recover.train.sources import read_rows

ALLOCATIONS = ("uniform", "owl", "outliers", "kl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--texts", type=int, default=100, help="the first ones (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of each (default: %(default)s)")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.7])
    parser.add_argument("--only", nargs="+", choices=ALLOCATIONS, default=ALLOCATIONS)
    options = parser.parse_args()
    cfg = load_recipe(options.recipe)
    model, tokenizer = recover.load(cfg.model.source, dtype=cfg.model.dtype)
    rows = read_rows(options.text)[: options.texts]
    texts = [text_ids(tokenizer, row.column("text"), special=True)[: options.length] for row in rows]
    calibration = getattr(cfg.prune, "calibration", None)
    assert calibration is not None, "the recipe's prune.calibration is what every allocation is measured on"
    print("| allocation | sparsity | KL a token | perplexity | least and most of a block |\n|---|---:|---:|---:|---|")
    for sparsity in options.sparsity:
        for allocation in options.only:
            wanda = Wanda(kind="wanda", sparsity=sparsity, allocation=allocation, calibration=calibration)
            twin = recover.prune(model, tokenizer, wanda, seed=cfg.seed)
            damage, nats = measured(twin, texts)
            found = twin.plan.calibration.get("sparsity", [sparsity])
            ends = f"{min(found):.1%} to {max(found):.1%}"
            print(f"| {allocation} | {sparsity:.0%} | {damage:.3f} | {math.exp(nats):.3f} | {ends} |", flush=True)


@torch.no_grad()
def measured(twin: Twin, texts: list[list[int]]) -> tuple[float, float]:
    """KL(dense || pruned) and the nats of the text under the pruned model, each the mean over all tokens."""
    total = nats = 0.0
    tokens = 0
    for ids in texts:
        ids_1T = torch.tensor([ids], device=twin.model.device)
        pruned_TV = twin.model(input_ids=ids_1T).logits[0].float()
        with twin.dense() as dense:
            dense_TV = dense(input_ids=ids_1T).logits[0].float()
        total += float(kl(log_probabilities(dense_TV), log_probabilities(pruned_TV)).sum())
        nats -= float(pruned_TV[:-1].log_softmax(-1).gather(1, ids_1T[0, 1:, None]).sum())
        tokens += len(ids)
    return total / tokens, nats / (tokens - len(texts))


if __name__ == "__main__":
    main()
