"""GSM8K, 5-shot, strict and flexible match: item by item what lm-evaluation-harness says of the same model?

    pip install 'recover[eval]'
    python benchmarks/lm_eval_gsm8k.py MODEL TEST.jsonl TRAIN.jsonl --limit 50

Both files are GSM8K's own (`question`, `answer`). The harness runs its own task file `gsm8k`, on these files, with the
first examples instead of drawn ones; ours is the one of docs/recipe.md. Prompts, texts and verdicts are compared.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from recover.base import console
from recover.base.console import quiet_libraries
from recover.commands.measure import model_cfg
from recover.config import recipe
from recover.maths.score import extract, is_right
from recover.measure.tasks import load_task, measure
from recover.models.load import load_model, load_tokenizer, ready

PAGE = Path(__file__).parent.parent / "docs" / "recipe.md"
Verdicts = dict[str, list[bool]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("test", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("--limit", type=int, default=50, help="items, the first ones (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    given = parser.parse_args()
    quiet_libraries()
    cfg = recipe.Measure(
        tasks=("gsm8k",),
        limit=given.limit,
        batch_size=given.batch_size,
        max_new_tokens=given.max_new_tokens,
        sampling=None,
        samples=given.limit,
    )
    chosen = model_cfg(given.model, "float32")
    model, tokenizer = ready(load_model(chosen)), load_tokenizer(chosen)
    with tempfile.TemporaryDirectory() as folder:
        prompts, texts, mine = ours(model, tokenizer, cfg, Path(folder), given.test, given.train)
        their_prompts, their_texts, theirs = harness(model, tokenizer, cfg, Path(folder), given.test, given.train)
    count = len(prompts)
    rows = [["prompt", count, "", "", same(prompts, their_prompts)], ["text", count, "", "", same(texts, their_texts)]]
    for name in mine:
        right = [sum(verdicts[name]) for verdicts in (mine, theirs)]
        rows.append([name, count, *right, same(mine[name], theirs[name])])
    console.table("the same items", ["what", "items", "right, recover", "right, lm-eval", "equal items"], rows)


def same(a: list[Any], b: list[Any]) -> int:
    """How many items are equal."""
    return sum(x == y for x, y in zip(a, b, strict=True))


def ours(
    model: Any, tokenizer: Any, cfg: recipe.Measure, folder: Path, test: Path, train: Path
) -> tuple[list[str], list[str], Verdicts]:
    """(prompts, texts, verdicts) of the task in docs/recipe.md."""
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    tree = yaml.safe_load(next(block for block in blocks if "flexible" in block))
    tree["data"], tree["fewshot"]["data"] = str(test.resolve()), str(train.resolve())
    path = folder / "ours.yaml"
    path.write_text(yaml.safe_dump(tree))
    task = load_task(str(path))
    record, written = measure(model, tokenizer, [task], cfg)
    samples, texts = record["tasks"]["gsm8k"]["samples"], [each["text"] for each in written["gsm8k"]]
    file: Any = task.file
    reading = file.also["flexible"]
    flexible = [
        is_right(
            extract(text, reading.answer),
            [extract(item.targets[0], reading.answer) or item.targets[0]],
            ignore=reading.ignore,
        )
        for item, text in zip(task.items, texts, strict=False)
    ]
    prompts = [item.prompt for item in task.items[: cfg.limit]]
    return prompts, texts, {"strict": [each["correct"] for each in samples], "flexible": flexible}


def harness(
    model: Any, tokenizer: Any, cfg: recipe.Measure, folder: Path, test: Path, train: Path
) -> tuple[list[str], list[str], Verdicts]:
    """(prompts, texts, verdicts) of the harness's own task on these files."""
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    own = yaml.safe_load((Path(str(lm_eval.__file__)).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
    files = {"test": str(test.resolve()), "train": str(train.resolve())}
    own |= {"task": "same_gsm8k", "dataset_path": "json", "dataset_kwargs": {"data_files": files}}
    own |= {"fewshot_config": {"sampler": "first_n"}}
    own = {key: value for key, value in own.items() if key not in ("dataset_name", "tag")}
    own["generation_kwargs"]["max_gen_toks"] = cfg.max_new_tokens
    (folder / "same_gsm8k.yaml").write_text(yaml.safe_dump(own))
    evaluate: Callable[..., Any] = lm_eval.simple_evaluate
    wrapper: Callable[..., Any] = HFLM
    found = evaluate(
        model=wrapper(pretrained=model, tokenizer=tokenizer, batch_size=cfg.batch_size),
        tasks=["same_gsm8k"],
        limit=cfg.limit,
        task_manager=TaskManager(include_path=str(folder)),
        bootstrap_iters=0,
        log_samples=True,
    )
    verdicts: Verdicts = {}
    by_filter: dict[str, list[Any]] = {}
    for sample in found["samples"]["same_gsm8k"]:
        by_filter.setdefault(sample["filter"], []).append(sample)
    for ours_name, name in (("strict", "strict-match"), ("flexible", "flexible-extract")):
        by_filter[name].sort(key=lambda sample: sample["doc_id"])
        verdicts[ours_name] = [bool(sample["exact_match"]) for sample in by_filter[name]]
    listed = by_filter["strict-match"]
    prompts = [sample["arguments"][0][0] for sample in listed]
    return prompts, [sample["resps"][0][0] for sample in listed], verdicts


if __name__ == "__main__":
    main()
