"""Are recover's figures those of lm-evaluation-harness? One choice and one generative task, same items, same model.

    pip install 'recover[eval]'
    python benchmarks/lm_eval_agreement.py            # embedded:fable-2m, whole and with a block dropped; CPU, 90 s

Both read the same JSONL; the harness's task files are written here from ours. The pruned model is measured too: where
everything is right, agreement says little.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from recover.base import console
from recover.base.console import quiet_libraries
from recover.config import recipe
from recover.measure.tasks import harness, load_task, measure
from recover.models.load import load_model, load_tokenizer, ready
from recover.models.plan import Plan
from recover.models.twin import Twin

DATA = Path(recipe.__file__).parents[1] / "embedded" / "tasks"
DROPPED = (4,)  # leaves both tasks in the middle
ENDLESS = "\n\n\n\n\n\n"  # the harness wants a text that ends an answer; the end token does


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=200, help="items of each task (default: %(default)s)")
    limit = parser.parse_args().limit
    quiet_libraries()
    cfg = recipe.Measure(
        tasks=("embedded:facts", "embedded:stories"), limit=limit, batch_size=64, max_new_tokens=96, sampling=None
    )
    source = recipe.Model(source="embedded:fable-2m")
    model, tokenizer = ready(load_model(source)), load_tokenizer(source)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder))
        twin = Twin(model, Plan("depth", model.config.num_hidden_layers, DROPPED))
        with twin.dense():
            rows += compare("dense", model, tokenizer, cfg, Path(folder))
        rows += compare(f"without block {DROPPED[0]}", model, tokenizer, cfg, Path(folder))
    console.table("the same items", ["model", "task", "items", "recover", "lm-eval", "difference"], rows)


def compare(name: str, model: Any, tokenizer: Any, cfg: recipe.Measure, folder: Path) -> list[list[Any]]:
    """One row a task."""
    ours = measure(model, tokenizer, [load_task(task) for task in cfg.tasks], cfg)[0]["tasks"]
    theirs = harness(model, tokenizer, ("our_facts", "our_stories"), cfg, include=folder)["results"]
    pairs = (
        ("facts", ours["facts"]["items"], ours["facts"]["accuracy"], theirs["our_facts"]["acc,none"]),
        (
            "stories",
            ours["stories"]["items"],
            ours["stories"]["exact_match"],
            theirs["our_stories"]["exact_match,last_number"],
        ),
    )
    return [[name, task, items, a, b, f"{a - b:+.4f}"] for task, items, a, b in pairs]


def write_tasks(folder: Path) -> None:
    """Our facts and stories as the harness has tasks."""
    common = {
        "dataset_path": "json",
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
    }
    facts = {
        **common,
        "task": "our_facts",
        "dataset_kwargs": {"data_files": {"test": str(DATA / "facts.jsonl")}},
        "doc_to_choice": "{{options}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    stories = {
        **common,
        "task": "our_stories",
        "output_type": "generate_until",
        "dataset_kwargs": {"data_files": {"test": str(DATA / "stories.jsonl")}},
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [ENDLESS], "max_gen_toks": 96, "do_sample": False},
        "filter_list": [
            {
                "name": "last_number",
                "filter": [
                    {"function": "regex", "regex_pattern": r"(-?\d+)", "group_select": -1},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (facts, stories):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(task))  # JSON is YAML


if __name__ == "__main__":
    main()
