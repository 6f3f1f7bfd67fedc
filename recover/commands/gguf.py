"""`recover gguf`: an exported checkpoint as one file for llama.cpp. `cli.py` gives it its place and its errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recover.base import console, units
from recover.export.gguf.write import write_gguf

GGUF_EXAMPLES = (
    "recover gguf checkpoints/quickstart/deploy quickstart.gguf",
    "recover gguf checkpoints/quickstart/deploy quickstart-f16.gguf --dtype float16",
    "recover gguf checkpoints/quickstart/deploy quickstart-q8.gguf --dtype q8_0",
)
Deploy = Annotated[
    Path, typer.Argument(metavar="DEPLOY", help="Folder of a checkpoint, such as checkpoints/quickstart/deploy.")
]
GgufOut = Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write; replaced when it is there.")]
GgufDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="float32, float16, bfloat16, or quantized: q8_0, q5_1, q5_0, q4_1, q4_0; else that of the checkpoint.",
        show_default=False,
    ),
]


def gguf(deploy: Deploy, out: GgufOut, dtype: GgufDtype = None) -> None:
    """Write an exported checkpoint as one GGUF file: llama.cpp, and what is built on it, runs and quantizes it."""
    path = write_gguf(deploy, out, dtype)
    console.say(f"wrote {path} ({units.size(path.stat().st_size)})")
