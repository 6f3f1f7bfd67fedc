"""Take experts out of a trained mixture, measure, recover, measure again; prints a line for each, and writes it down.

    python trial_experts.py FOLDER --out trial --remove 0.25 0.5 0.75
    python trial_experts.py FOLDER --out trial --remove --recover 0.25:reap 0.5:kl --parts router linears+experts

Figures are those of the tasks that ship with the package: stories are written, facts and tales are chosen. `random`
takes away experts by lot, `--seed` of them. The dense model's text is written once for all recoveries. What stands in
`OUT/rows.jsonl` is not done again.
"""

import argparse
import dataclasses
import json
import random
import shutil
import time
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

import recover
from recover.models.twin import Twin

TASKS = ("embedded:stories", "embedded:facts", "embedded:tales")
CHOICES = Path(recover.__file__).parent / "embedded" / "tasks" / "facts.jsonl"  # rows say which kind they are
TEXT = recover.DenseText(
    prompts="embedded:tasks/prompts.jsonl", temperature=0, max_new_tokens=100, batch_size=128
)  # as recipes/quickstart.yaml


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of rows, text and adapters")
    parser.add_argument("--remove", type=float, nargs="*", default=[0.25, 0.5], help="shares of the experts")
    parser.add_argument("--scores", nargs="*", default=["reap", "frequency", "kl", "random"])
    parser.add_argument("--recover", nargs="*", default=[], metavar="SHARE:SCORE")
    parser.add_argument("--parts", nargs="*", default=["router", "linears+experts"], help="what learns, a run each")
    parser.add_argument("--samples", type=int, default=24, help="texts of 128 tokens by which experts are chosen")
    parser.add_argument(
        "--answer", type=int, help="choose on prompts and the model's own answers, up to so many tokens"
    )
    parser.add_argument("--tokens", type=int, default=190_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--limit", type=int, help="items of each task")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Trial:
    """One trained model, and the rows of what was done to it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, self.tokenizer = recover.load(str(args.folder), dtype="float32")
        self.rows_path = args.out / "rows.jsonl"
        args.out.mkdir(parents=True, exist_ok=True)
        lines = self.rows_path.read_text().splitlines() if self.rows_path.exists() else []
        self.rows = {row["label"]: row for row in map(json.loads, lines)}

    def run(self) -> None:
        """Dense, then every share and score, then every recovery."""
        self.row("dense", self.model)
        for share, score in product(self.args.remove, self.args.scores):
            label = self.label(share, score)
            if label not in self.rows:
                began = time.perf_counter()
                twin = self.without(share, score)
                self.row(label, twin, chosen=time.perf_counter() - began, plan=twin.plan.summary())
        for wanted, parts in product(self.args.recover, self.args.parts):
            share, score = wanted.split(":")
            self.recovered(float(share), score, tuple(parts.split("+")))

    def label(self, share: float, score: str) -> str:
        """What a row of these is called."""
        seed = f" seed {self.args.seed}" if score == "random" else ""
        own = " own answers" if self.args.answer and score != "random" else ""
        return f"{share:.1%} by {score}{seed}{own}"

    def without(self, share: float, score: str) -> Twin:
        """A twin that lacks this share of its experts."""
        prompts = "embedded:tasks/prompts.jsonl", "prompt"
        data, column = prompts if self.args.answer else ("embedded:tasks/calibration.jsonl", "text")
        cfg = recover.Experts(
            share=share,
            score="frequency" if score == "random" else score,
            calibration=recover.Calibration(
                data=data, column=column, samples=self.args.samples, length=128, answer=self.args.answer
            ),
        )
        twin = recover.prune(self.model, self.tokenizer, cfg, seed=self.args.seed)
        return by_lot(twin, self.args.seed) if score == "random" else twin

    def recovered(self, share: float, score: str, parts: tuple[str, ...]) -> None:
        """A row of what training these parts brings back."""
        args = self.args
        label = f"{self.label(share, score)} + {'+'.join(parts)} {args.tokens:,} lr {args.lr:g} rank {args.rank}"
        if label in self.rows:
            return
        out, text = args.out / label.replace(" ", "_"), args.out / "text"
        if text.exists():
            shutil.copytree(text, out / "data", dirs_exist_ok=True)
        twin, began = self.without(share, score), time.perf_counter()
        recover.distill(
            twin,
            self.tokenizer,
            TEXT,
            tokens=args.tokens,
            out=out,
            seed=args.seed,
            epochs=args.epochs,
            length=192,
            batch_size=8,
            lr=args.lr,
            lora=recover.Lora(rank=args.rank, parts=parts),
        )
        if not text.exists():
            shutil.copytree(out / "data", text)
        trained = sum(weight.numel() for weight in twin.model.parameters() if weight.requires_grad)
        self.row(label, twin, trained=trained, training=time.perf_counter() - began)

    def row(self, label: str, model: PreTrainedModel | Twin, **more: Any) -> None:
        """Measure, print and write down."""
        if label in self.rows:
            return
        began = time.perf_counter()
        record = recover.measure(
            model, self.tokenizer, TASKS, limit=self.args.limit, max_new_tokens=96, batch_size=128, seed=self.args.seed
        )
        row = {"model": self.args.folder.name, "label": label, **figures(record["tasks"]), **more}
        row["measuring"] = time.perf_counter() - began
        self.rows[label] = row
        with self.rows_path.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}, flush=True)


def by_lot(twin: Twin, seed: int) -> Twin:
    """The twin with as many experts in every block as it has, drawn by lot from all of them."""
    rng = random.Random(seed)
    every = {record["block"]: range(len(record["experts"])) for record in twin.plan.scores}
    kept = {block: tuple(sorted(rng.sample(every[block], len(left)))) for block, left in twin.plan.experts.items()}
    return twin.replan(dataclasses.replace(twin.plan, experts=kept))


def figures(tasks: dict[str, Any]) -> dict[str, float]:
    """Shares right of stories, facts and tales; of the texts, the share that loops; perplexity of given text."""
    stories, chosen = tasks["stories"], tasks["facts"]["each"]
    kinds = [json.loads(line)["kind"] for line in CHOICES.read_text().splitlines()][: len(chosen)]
    of_kind = {kind: [right for right, one in zip(chosen, kinds, strict=True) if one == kind] for kind in set(kinds)}
    return {
        "stories": stories["exact_match"],
        "facts": sum(of_kind["fact"]) / len(of_kind["fact"]),
        "tales": sum(of_kind["tale"]) / len(of_kind["tale"]),
        "loops": stories["mistakes"]["loop"] / stories["items"],
        "perplexity": tasks["tales"]["perplexity"],
    }


def main() -> None:
    """All that was asked for."""
    Trial(parse()).run()


if __name__ == "__main__":
    main()
