"""lm-evaluation-harness through its own API, for figures that others can compare with; an optional extra."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from recover.base.errors import DataError, RecipeError
from recover.config.recipe import Measure
from recover.text.generate import evaluating

Record = dict[str, Any]

INSTALL = "pip install 'recover[eval]' (or: pip install lm-eval)"


def require() -> None:
    """Raises RecipeError if the harness is not installed, before a model is loaded."""
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError(f"--lm-eval: lm-evaluation-harness is not installed: {INSTALL}")


def harness(model: Any, tokenizer: Any, names: Sequence[str], cfg: Measure, *, include: Path | None = None) -> Record:
    """{"results": as the harness gives them, "rows": for a table, "versions"} of its tasks, on a loaded model.

    Greedy or by likelihood as each task says; no chat template. `include`: a folder with further tasks.

    Raises:
        RecipeError: the harness is not installed, or has no task of a name.
        DataError: the data of a task cannot be had.
    """
    require()
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    # Decorators of the harness hide what these two take.
    wrapper: Any = HFLM
    evaluate: Any = lm_eval.simple_evaluate
    manager = TaskManager(include_path=str(include) if include else None)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise RecipeError(f"--lm-eval: the harness has no task {unknown[0]!r}: see `lm-eval ls tasks`")
    try:
        with evaluating(model):
            found = evaluate(
                model=wrapper(pretrained=model, tokenizer=tokenizer, batch_size=cfg.batch_size),
                tasks=list(names),
                limit=cfg.limit,
                task_manager=manager,
                bootstrap_iters=0,
            )
    except (OSError, ValueError) as error:
        raise DataError(f"--lm-eval {','.join(names)}: {' '.join(str(error).split())[:400]}") from error
    return {
        "results": found["results"],
        "rows": _rows(found),
        "versions": {"lm_eval": metadata.version("lm_eval"), "tasks": found.get("versions")},
    }


def _rows(found: Record) -> list[tuple[str, list[Any]]]:
    """(task, [items, metric, value, interval, chance]) of each metric."""
    rows = []
    for name, result in found["results"].items():
        items = (found.get("n-samples") or {}).get(name, {}).get("effective")
        for key, value in result.items():
            metric, _, how = key.partition(",")
            if how and isinstance(value, int | float) and not metric.endswith("_stderr"):
                words = metric if how == "none" else f"{metric} ({how})"
                rows.append((name, [items, words, f"{value:.4g}", None, None]))
    return rows
