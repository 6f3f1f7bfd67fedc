"""Put a trained folder and its tasks where the package ships them: weights, tokenizer and five JSONL files."""

import argparse
import json
import random
import shutil
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from generators import documents, fact_items, held_out, held_out_stories, held_out_tales

SHIPPED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
)
ITEMS_SEED = 1  # trial.py uses 7: other stories and tales; the held-out facts are one set of 591, in another order


def write_rows(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def recovery_prompts(*, stories: int, others: int) -> list[str]:
    """Train-side prompts for the dense model to answer: so many of stories, so many of facts and tales, shuffled."""
    found = dict.fromkeys(prompt for prompt, _ in islice(documents("prompts", stories=0.45, tales=0.05), 12_000))
    asked = [prompt for prompt in found if prompt.endswith("\n")][:stories]
    rest = [prompt for prompt in found if not prompt.endswith("\n")][:others]
    return random.Random(ITEMS_SEED).sample(asked + rest, len(asked) + len(rest))


def task_rows() -> dict[str, list[dict[str, object]]]:
    """Every task file's rows. The first three are held out; `prompts` and `calibration` are on the training side."""
    stories, tales, facts = held_out_stories(ITEMS_SEED, 260), held_out_tales(ITEMS_SEED, 120), fact_items(ITEMS_SEED)
    choices = [("fact", item) for item in facts[:200]] + [("tale", item) for item in tales[:100]]
    random.Random(ITEMS_SEED).shuffle(choices)
    texts = [one.prompt + one.solution for one in stories[200:]] + [item.text for item in tales[100:] + facts[200:220]]
    prompts = recovery_prompts(stories=2600, others=3000)
    # What a model is pruned by is general text, not the work that breaks: no story with its solution is in it.
    calibration = islice(documents("calibration", stories=0.0, tales=0.1), 256)
    return {
        "stories": [{"prompt": one.prompt, "answer": one.answer} for one in stories[:200]],
        "facts": [
            {"prompt": item.prompt, "options": item.options, "answer": item.answer, "kind": kind}
            for kind, item in choices
        ],
        "tales": [{"text": text} for text in texts],
        "prompts": [{"prompt": prompt} for prompt in prompts],
        "calibration": [{"text": prompt + rest} for prompt, rest in calibration],
    }


def main() -> None:
    """Copy the model, write the tasks, print what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", type=Path, help="what train.py wrote")
    parser.add_argument("--name", default="fable-2m", help="name of the shipped model")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "recover" / "embedded")
    args = parser.parse_args()
    model, tasks = args.out / args.name, args.out / "tasks"
    model.mkdir(parents=True, exist_ok=True)
    tasks.mkdir(parents=True, exist_ok=True)
    for name in SHIPPED:
        shutil.copyfile(args.folder / name, model / name)
    for name, rows in task_rows().items():
        side = name in ("stories", "facts")
        if any(held_out(str(row["prompt"])) != side for row in rows if "prompt" in row):
            raise AssertionError(f"{name}: a row is on the wrong side of the held-out split")
        write_rows(tasks / f"{name}.jsonl", rows)
    for path in sorted([*model.iterdir(), *tasks.iterdir()]):
        print(f"{path.stat().st_size:>9,} {path}")


if __name__ == "__main__":
    main()
