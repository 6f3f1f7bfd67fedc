"""Which learning rate is best at which rank, alpha and length of training: KL on answers to prompts held out of it.

    python benchmarks/rates.py recipes/quickstart.yaml --blocks 3 11 --out OUT --tokens 12000 --ranks 4 16 64 \
        --alphas 2r 64 8s --rates 1e-3 2e-3 4e-3 8e-3
    python benchmarks/rates.py recipes/quickstart.yaml --blocks 3 11 --out OUT --tokens 96000 --ranks 16 --alphas 64 \
        --rates 2.5e-4 5e-4 1e-3 2e-3

The recipe's `recover`, one epoch, on text that the dense model writes from the prompts of its first source but for
`--held` of them; from these it writes what all trainings are judged on. `--blocks`: those that are dropped. An alpha is
a number, a multiple of the rank (2r), or of its square root (8s). Rows go to OUT/rates.jsonl as they come, and what
stands there is not done again: the setting, KL and cross-entropy per token of the answers (`kl`, `ce`) and of all text
(`kl_all`, `ce_all`), seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from recover.base.console import quiet_libraries
from recover.config.recipe import DenseText, Recipe, Train, load_recipe
from recover.distill.distiller import Distiller
from recover.models.load import load_model, load_tokenizer, ready
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.train.data import build_dataset, collator
from recover.train.sources import read_prompts
from recover.train.train import train

GROUP = 16  # rows that are judged at once


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    quiet_libraries()
    recipe = load_recipe(options.recipe, options.set)
    options.out.mkdir(parents=True, exist_ok=True)
    split(recipe, options.held, options.out)
    path = options.out / "rates.jsonl"
    known = {json.loads(line)["setting"] for line in path.read_text().splitlines()} if path.exists() else set()
    for tokens, rank, alpha, rate in settings(options):
        setting = f"{tokens} tokens, rank {rank}, alpha {alpha:g}, lr {rate:g}"
        if setting not in known:
            cfg = configured(recipe.train, options.out / "learnt.jsonl", tokens, lr=rate, rank=rank, alpha=alpha)
            row = {"setting": setting, "tokens": tokens, "rank": rank, "alpha": alpha, "lr": rate}
            row |= trained(recipe, cfg, options)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{setting}: KL {row['kl']:.4f}, over all text {row['kl_all']:.4f}", flush=True)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", required=True, help="that are dropped")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    parser.add_argument("--ranks", type=int, nargs="+", required=True)
    parser.add_argument("--alphas", nargs="+", default=["64"])
    parser.add_argument("--rates", type=float, nargs="+", required=True)
    parser.add_argument("--held", type=int, default=250, help="prompts that no training learns from (%(default)s)")
    parser.add_argument("--judged-tokens", type=int, default=7900, help="that trainings are judged on (%(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="recipe fields")
    return parser.parse_args(arguments)


def settings(options: argparse.Namespace) -> Iterator[tuple[int, int, float, float]]:
    for tokens in options.tokens:
        for rank in options.ranks:
            for alpha in dict.fromkeys(alpha_of(each, rank) for each in options.alphas):
                for rate in options.rates:
                    yield tokens, rank, alpha, rate


def alpha_of(text: str, rank: int) -> float:
    """The alpha that `64`, `2r` or `8s` is at this rank."""
    number, of = (text[:-1], text[-1]) if text[-1] in "rs" else (text, "")
    return float(number) * {"": 1.0, "r": rank, "s": math.sqrt(rank)}[of]


def split(recipe: Recipe, held: int, out: Path) -> None:
    """learnt.jsonl and judged.jsonl: the prompts of the first source, in random order, but for the last, and these."""
    source = recipe.train.data[0]
    assert isinstance(source, DenseText), "the first source is to be of kind dense"
    prompts = [row.value["prompt"] for row in read_prompts(source.prompts, source.split, source.subset)]
    random.Random(5).shuffle(prompts)
    for name, part in (("learnt", prompts[:-held]), ("judged", prompts[-held:])):
        (out / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in part))


def configured(cfg: Train, prompts: Path, tokens: int, **changes: Any) -> Train:
    """The recipe's training on text from these prompts."""
    lora = {**cfg.lora.model_dump(), "rank": changes.pop("rank", 1), "alpha": changes.pop("alpha", 1.0)}
    data = [{**cfg.data[0].model_dump(), "prompts": str(prompts)}]
    return Train.model_validate(
        {**cfg.model_dump(), "epochs": 1, "tokens": tokens, "data": data, "lora": lora, **changes}
    )


def trained(recipe: Recipe, cfg: Train, options: argparse.Namespace) -> dict[str, float]:
    """Figures of the model after one training."""
    tokenizer, texts, folder = load_tokenizer(recipe.model), options.out / "data", options.out / "training"
    model = ready(load_model(recipe.model))
    twin = Twin(model, Plan("depth", model.config.num_hidden_layers, tuple(sorted(options.blocks))))
    asked = configured(recipe.train, options.out / "judged.jsonl", options.judged_tokens, batch_size=1)
    rows = build_dataset(asked, twin, tokenizer, recipe.seed, texts).with_format("numpy")
    shutil.rmtree(folder, ignore_errors=True)
    texts.mkdir(exist_ok=True)
    folder.mkdir()
    (folder / "data").symlink_to(texts.absolute())
    began = time.monotonic()
    train(twin, tokenizer, cfg, folder, lambda *_: None, recipe.seed)
    seconds = round(time.monotonic() - began, 1)
    answers, everything = (sums(twin, cfg, rows, scored) for scored in ("completion", "all"))
    return {**answers, **{f"{name}_all": value for name, value in everything.items()}, "seconds": seconds}


@torch.no_grad()
def sums(twin: Twin, cfg: Train, rows: Any, scored: str) -> dict[str, float]:
    """KL and cross-entropy per scored token over the rows."""
    distiller, collate, device = Distiller(twin, cfg.loss), collator(0, scored), next(twin.base.parameters()).device
    twin.model.eval()
    total = {"kl": 0.0, "ce": 0.0, "tokens": 0.0}
    for start in range(0, len(rows), GROUP):
        batch = collate([rows[at] for at in range(start, min(start + GROUP, len(rows)))])
        found = twin.model(
            **distiller.given({name: each.to(device) for name, each in batch.items()}), distill=distiller
        )
        total = {name: value + float(found[name]) for name, value in total.items()}
    return {name: total[name] / total["tokens"] for name in ("kl", "ce")}


if __name__ == "__main__":
    main()
