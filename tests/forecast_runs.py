"""Runs that were never made: by the law to the letter, as rows and as the files of a run directory."""

import json
import math
from pathlib import Path

from recover.base import artifacts
from recover.config.recipe import load_recipe
from recover.forecast import advice
from recover.forecast.runs import Run, State

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
TOKENS = 90_000


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def made(name: str, *, model="m", z=0.0, d=0.8, b=0.3, tokens=TOKENS, choice=0.9, kl=0.4, parameters=1000) -> Run:
    """A run by the law, to the letter: logit z at a third of the tokens, gaining d for each e-fold; KL as t^-b."""

    def at(part: float) -> State:
        folds = math.log(part * 3)
        shares = {"generation": sigmoid(z + d * folds), "choice": choice, "perplexity": sigmoid(1 + 0.1 * folds)}
        return State(round(part * tokens), kl * math.exp(-b * folds), shares)

    before = State(0, 2.0, {"generation": 0.05, "choice": choice, "perplexity": 0.5})
    return Run(
        name, model, parameters, {}, {}, tokens, before, (at(1 / 3), at(2 / 3)), at(1.0), {}, "recover run", None
    )


def several(count: int = 10, **fields) -> list[Run]:
    return [made(f"run-{i}", z=-1 + 2 * i / count, kl=0.3 + 0.02 * i, **fields) for i in range(count)]


def trial(run: Run, *, steps=50, **changes) -> advice.Trial:
    """The trial of a run whose end is not told."""
    fields = {"model": run.model, "parameters": run.parameters, "tokens": run.tokens, "steps": steps}
    return advice.Trial(**{**fields, "before": run.before, "after": run.on_the_way[0], **changes})


def run_folder(root: Path, *, last=(0.4, 0.7, 12.5)) -> Path:
    """The files of a finished run, as few as there must be; dense: 50% of texts, 70% of choices (chance 20%).

    `last`: what the epoch that was kept, the last one, was measured at when it ended; all items gave (0.4, 0.7, 12.5).
    """

    def record(generation: float, choice: float, perplexity: float):
        tasks = {
            "sums": {"kind": "generate", "items": 100, "exact_match": generation},
            "facts": {"kind": "choice", "items": 80, "accuracy": choice, "chance": 0.2},
        }
        return {"tasks": tasks, "headline": {"perplexity": perplexity}}

    files = {
        "dense/measure.json": record(0.5, 0.7, 10.0),
        "before/measure.json": record(0.1, 0.45, 40.0),
        "before/probe.json": {"final": {"kl": {"mean": 1.5}}},
        "after/measure.json": record(0.4, 0.7, 12.5),
        "after/probe.json": {"final": {"kl": {"mean": 0.25}}},
        "prune/plan.json": {"parameters_dense": 1234},
        "env.json": {"argv": ["recover", "run", "/here/recipes/x.yaml", "--runs", "/there"], "git": {"commit": "abc"}},
    }
    for name, value in files.items():
        artifacts.write_json(root / name, value)
    recipe = load_recipe(QUICKSTART).model_dump(mode="json")
    (root / "recipe.yaml").write_text(json.dumps(recipe))
    for epoch, measured in enumerate(((0.3, 0.6, 20.0), last), start=1):
        row = {"epoch": epoch, "tokens": 5000 * epoch, "measure": record(*measured), "drift": {"kl": {"mean": 0.5}}}
        artifacts.append_jsonl(root / "epochs.jsonl", {**row, "score": measured[0], "train": {"loss": 1 / epoch}})
    return root
