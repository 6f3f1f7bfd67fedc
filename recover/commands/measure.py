"""`recover measure`: any checkpoint on any tasks, without a recipe. `cli.py` gives it its place and its errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from recover.base import dist
from recover.base.errors import RecipeError
from recover.base.ownership import refuse_input
from recover.config.recipe import Measure

EXAMPLES = (
    "recover measure embedded:fable-2m --tasks embedded:stories embedded:facts --limit 50",
    "recover measure ORG/NAME --tasks gsm8k.yaml arc_easy.yaml --dtype bfloat16 --batch-size 256 --out figures.json",
    "recover measure checkpoints/quickstart/deploy --tasks humaneval.yaml --allow-code-execution",
    "recover measure ORG/NAME --lm-eval arc_easy,gsm8k --limit 200",
)
Source = Annotated[
    str, typer.Argument(metavar="MODEL", help="A hub id, a folder, a GGUF file, or embedded:NAME.", show_default=False)
]
More = Annotated[
    list[str] | None, typer.Argument(metavar="[TASK]...", help="More tasks, after --tasks.", show_default=False)
]
Tasks = Annotated[list[str] | None, typer.Option("--tasks", help="Task files (YAML), or embedded:NAME; one or more.")]
Harness = Annotated[
    str, typer.Option("--lm-eval", help="Tasks of lm-evaluation-harness, commas between them (extra 'eval').")
]
Include = Annotated[Path | None, typer.Option("--lm-eval-include", help="Folder with harness tasks of your own.")]
Allow = Annotated[
    bool, typer.Option("--allow-code-execution", help="Let code tasks run what the model writes, locked away.")
]
Out = Annotated[
    Path | None, typer.Option("--out", help="JSON file for all figures, samples, versions and machine; replaced.")
]


def measure(
    model: Source,
    more: More = None,
    tasks: Tasks = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Items of each task, the first ones.")] = None,
    out: Out = None,
    lm_eval: Harness = "",
    lm_eval_include: Include = None,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 64,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Texts cut here are counted.")] = 256,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Default: as the checkpoint is stored.")] = None,
    samples: Annotated[int, typer.Option("--samples", help="Texts of each task kept in the JSON.")] = 3,
    allow_code_execution: Allow = False,
) -> None:
    """Measure any checkpoint: what it writes, chooses, retrieves, expects; the same items and prompts for each."""
    names = [*(tasks or ()), *(more or ())]
    harness = tuple(name.strip() for name in lm_eval.split(",") if name.strip())
    if more and not tasks:
        raise RecipeError(f"{more[0]}: found after the model; tasks are named after --tasks")
    if not names and not harness:
        raise RecipeError("nothing to measure: give --tasks task.yaml ..., or --lm-eval arc_easy,gsm8k")
    cfg = _config(
        tasks=tuple(names) or ("none",),
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        samples=samples,
        sampling=None,
        allow_code_execution=allow_code_execution,
    )
    from recover.commands import measuring
    from recover.run import input_digests as inputs

    if out is not None:
        refuse_input(out, (model, *names, *inputs.files_of([str(Path(name).absolute()) for name in names])))
    # The launcher's processes share the items; without one this does nothing.
    dist.start()
    wanted = measuring.Wanted(tuple(names), harness, lm_eval_include)
    record = measuring.measure_checkpoint(model, dtype, wanted, cfg)
    measuring.say(record)
    if out is not None:
        measuring.write(record, out)
    dist.stop()


def _config(**fields: Any) -> Measure:
    try:
        return Measure(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + ".".join(map(str, first["loc"])).replace("_", "-")
        raise RecipeError(f"{name}: found {first['input']!r}: {first['msg']}") from None
