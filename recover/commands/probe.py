"""`recover diagnose`: any two checkpoints of one tokenizer side by side. `cli.py` gives it its place and its errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from recover.base import console, dist
from recover.base.errors import RecipeError
from recover.config.recipe import Model, Probe, local_path

EXAMPLES = (
    "recover diagnose embedded:fable-2m checkpoints/quickstart/deploy --prompts embedded:tasks/prompts.jsonl "
    "--out drift",
    "recover diagnose ORG/NAME name-q4.gguf --prompts prompts.jsonl --task mcq.yaml --dtype bfloat16 --out drift",
    "recover diagnose ORG/NAME ORG/SMALLER --blocks 0,1,2,5,6 --texts texts.jsonl --out drift",
)
Source = "a hub id, a folder, a GGUF file, a quantized checkpoint, or embedded:NAME"
Dense = Annotated[str, typer.Argument(metavar="DENSE", help=f"The reference: {Source}.")]
Other = Annotated[str, typer.Argument(metavar="OTHER", help="What is held against it, of the same tokenizer.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the records; the same command goes on where it stopped.")]
Prompts = Annotated[Path | None, typer.Option("--prompts", help="JSONL with a `prompt` column: both models write on.")]
Texts = Annotated[Path | None, typer.Option("--texts", help="JSONL with a `text` column: both models read it.")]
Tasks = Annotated[
    list[str] | None, typer.Option("--task", help="Choice or retrieval task (YAML, or embedded:NAME); may be repeated.")
]
Pairs = Annotated[
    Path | None, typer.Option("--retrieval", help="JSONL with `query` and `documents` (and `relevant`): embedding use.")
]
Blocks = Annotated[
    str | None,
    typer.Option("--blocks", help="Where depths differ: the dense block that each block of OTHER is, such as 0,1,4."),
]
Seeds = Annotated[str, typer.Option("--seeds", help="Also texts drawn at T = 1, from these seeds, such as 0,1,2.")]
Temperatures = Annotated[str, typer.Option("--temperatures", help="Of the softmax, such as 0.5,1,2.")]


def probe_pair(
    dense: Dense,
    other: Other,
    out: Out,
    prompts: Prompts = None,
    texts: Texts = None,
    task: Tasks = None,
    retrieval: Pairs = None,
    blocks: Blocks = None,
    samples: Annotated[int, typer.Option("--samples", help="Prompts or texts used, the first ones.")] = 32,
    steps: Annotated[int, typer.Option("--steps", help="Decoding steps.")] = 48,
    seeds: Seeds = "",
    temperatures: Temperatures = "0.5,1,2",
    batch_size: Annotated[int, typer.Option("--batch-size")] = 16,
    length: Annotated[int, typer.Option("--length", help="Tokens read of each text.")] = 512,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    parquet: Annotated[bool, typer.Option("--parquet", help="Figures of positions as parquet, not JSONL.")] = False,
) -> None:
    """Measure how far two checkpoints are apart: in three spaces, by layer, by step, in choices, as embedders."""
    from recover.commands import diagnose

    # The launcher's processes share the work; without one this does nothing.
    dist.start()
    cfg = _config(
        Probe,
        samples=samples,
        steps=steps,
        batch_size=batch_size,
        seeds=_numbers("--seeds", seeds, int),
        temperatures=_numbers("--temperatures", temperatures, float),
    )
    given = [None if path is None else local_path(str(path)) for path in (prompts, texts, retrieval)]
    wanted = diagnose.Wanted(given[0], given[1], task or (), given[2], length)
    first, second = (_config(Model, source=source, dtype=dtype) for source in (dense, other))
    numbers = None if blocks is None else _numbers("--blocks", blocks, int)
    found = diagnose.diagnose(first, second, wanted, cfg, out, numbers=numbers, parquet=parquet)
    diagnose.say(found)
    console.say(f"wrote {out / 'probe.jsonl'}, {out / 'probe.json'}; recover report {out} makes a page of them")
    dist.stop()


def _config(kind: Any, **fields: Any) -> Any:
    try:
        return kind(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise RecipeError(f"{name}: found {first['input']!r}: {first['msg']}") from None


def _numbers(option: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise RecipeError(f"{option}: found {text!r}, expected numbers with commas between them") from None
