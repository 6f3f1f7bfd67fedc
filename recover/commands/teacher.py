"""`recover teacher`: what a model says of a text, to distil from. `cli.py` gives it its place and its errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recover.base import console, units
from recover.base.ownership import refuse_input

EXAMPLES = (
    "recover teacher ORG/LARGE text.jsonl teacher.jsonl --top 64 --dtype bfloat16",
    "recover teacher embedded:fable-2m embedded:tasks/calibration.jsonl teacher.jsonl --top 16 --length 128",
)
Source = Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a folder, a GGUF file, or embedded:NAME.")]
Text = Annotated[
    str, typer.Argument(metavar="TEXT", help="Rows with messages, prompt and completion, or text: JSONL, parquet, hub.")
]
Out = Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="The file to write; replaced when it is there.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Default: as the checkpoint is stored.")]


def teacher(
    model: Source,
    text: Text,
    out: Out,
    top: Annotated[int, typer.Option("--top", min=1, help="Likeliest tokens kept of each position.")] = 64,
    length: Annotated[int, typer.Option("--length", min=8, help="Longest sequence, in tokens.")] = 512,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
    dtype: Dtype = None,
) -> None:
    """Write the likeliest tokens a model gives each position of a text: for distilling where it is not at hand.

    A recipe takes it as recover.data=[{kind: teacher, source: OUT.jsonl}]; the pruned model must have the same
    tokenizer. About 16 bytes for each token that is kept.
    """
    from recover.commands import teaching

    refuse_input(out, (text,))
    rows, tokens = teaching.write_teacher(model, dtype, text, out, top=top, length=length, batch_size=batch_size)
    console.say(f"wrote {out}: {tokens:,} positions of {rows:,} rows ({units.size(out.stat().st_size)})")
