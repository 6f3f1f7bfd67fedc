"""Any checkpoint on any tasks: load, measure, one record with all that a reader needs to do it again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from recover.base import console, dist, provenance
from recover.base.artifacts import write_json
from recover.base.errors import RecipeError
from recover.config.base import Dtype
from recover.config.recipe import Measure, Model

Record = dict[str, Any]

# kind -> (key of its figure, words for it)
FIGURES = {
    "generate": ("exact_match", "exact match"),
    "code": ("pass_at_1", "pass@1"),
    "choice": ("accuracy", "accuracy"),
    "retrieval": ("score", "nDCG@10"),
    "perplexity": ("perplexity", "perplexity"),
}


@dataclass(frozen=True)
class Wanted:
    """Our task files, the harness's task names, and where tasks of its kind lie that it does not know."""

    tasks: tuple[str, ...]
    harness: tuple[str, ...] = ()
    include: Path | None = None


def measure_checkpoint(source: str, dtype: str | None, wanted: Wanted, cfg: Measure) -> Record:
    """The record of a checkpoint (hub id, folder, GGUF, embedded:NAME); tasks are read before any weight is.

    The same on every process of a launch.

    Raises:
        RecipeError, DataError, ModelError: a task, the model, or an item cannot be used; the harness is not installed.
    """
    from recover.base.quiet import quiet_libraries
    from recover.measure.tasks import check_allowed, load_task, measure
    from recover.models.load import check_fit, load_tokenizer
    from recover.probe.sources import load_any

    quiet_libraries()
    tasks = [load_task(name) for name in wanted.tasks]
    _check_names([task.name for task in tasks])
    check_allowed(tasks, cfg)
    if wanted.harness:
        from recover.measure.harness import require

        require()
    chosen = model_cfg(source, dtype)
    tokenizer = load_tokenizer(chosen)
    model = load_any(chosen)
    check_fit(model, tokenizer)
    record: Record = {"model": source, "dtype": chosen.dtype, "settings": cfg.model_dump(mode="json")}
    if tasks:
        record |= measure(model, tokenizer, tasks, cfg)[0]
    if wanted.harness:
        from recover.measure.harness import harness

        record["lm_eval"] = dist.on_main(lambda: harness(model, tokenizer, wanted.harness, cfg, include=wanted.include))
    return record


def _check_names(names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(f"--tasks: more than one task is called {twice[0]!r}: give each a name of its own")


def model_cfg(source: str, dtype: str | None) -> Model:
    """The model in the dtype that was asked for, else in the one its config names."""
    from recover.models.source import read_config

    known = get_args(Dtype)
    if dtype is not None and dtype not in known:
        raise RecipeError(f"--dtype: found {dtype!r}, expected one of {', '.join(known)}")
    if dtype is None:
        config = read_config(Model(source=source))
        stored = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
        dtype = stored if stored in known else "float32"
    return Model(source=source, dtype=dtype)  # type: ignore[arg-type]


def say(record: Record) -> None:
    """Print one row a task, and what the figures leave out."""
    tasks: dict[str, Record] = record.get("tasks") or {}
    rows = [_row(name, task) for name, task in tasks.items()]
    rows += [[name, "lm-eval", *each] for name, each in (record.get("lm_eval") or {}).get("rows", ())]
    title = f"{record['model']}, {record['dtype']}"
    console.table(title, ["task", "kind", "items", "figure", "value", "95% interval", "chance"], rows)
    for name, task in tasks.items():
        if task.get("truncated"):
            console.warn(
                f"task {name}: {task['truncated']} of {task['items']} texts ran into the limit of tokens; "
                f"{task['truncated_right']} of them count as right (--max-new-tokens)"
            )
    for name, task in tasks.items():
        if task.get("mistakes"):
            console.say(f"task {name}: {_mistakes(task)}")
        if task.get("pass_at_k"):
            figures = [f"pass@{k} {found['value']:.1%}" for k, found in task["pass_at_k"].items()]
            console.say(f"task {name}, sampled: {', '.join(figures)}")
    if record.get("tokens_per_second"):
        console.say(f"{record['tokens_per_second']:,.0f} tokens/s written, {record['seconds']:,.1f} s in all")


def _row(name: str, task: Record) -> list[Any]:
    key, figure = FIGURES[task["kind"]]
    low_high = task.get("interval95")
    interval = None if low_high is None else f"{low_high[0]:.1%} – {low_high[1]:.1%}"
    value = f"{task[key]:.4g}" if key == "perplexity" else f"{task[key]:.1%}"
    chance = task.get("chance")
    return [name, task["kind"], task["items"], figure, value, interval, None if chance is None else f"{chance:.1%}"]


def _mistakes(task: Record) -> str:
    """How many texts are right, and which mistake the others are."""
    words = {"loop": "loop", "endless": "do not end", "no_answer": "hold no answer", "unparsed": "do not parse"}
    counts = {**words, "content": "well formed and wrong"}
    right = task["items"] - sum(task["mistakes"].values())
    found = [f"{task['mistakes'][kind]} {said}" for kind, said in counts.items() if task["mistakes"].get(kind)]
    return ", ".join([f"{right} of {task['items']} right", *found])


def write(record: Record, path: Path) -> None:
    """Write the record with versions and machine."""
    if dist.is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**record, "environment": provenance.environment()})
        console.say(f"wrote {path}")
