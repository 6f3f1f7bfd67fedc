"""Execute the code cells of docs/notebook.ipynb in their order and write the notebook back with what they gave.

    python dev/notebook.py

A cell's output is what it prints, and the SVG in `picture` if it set one. No Jupyter is needed for this.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "notebook.ipynb"


def executed(cells: list[dict[str, Any]], folder: Path) -> Iterator[tuple[dict[str, Any], str, str | None]]:
    """(code cell, what it printed, the SVG it set as `picture`) one by one, in `folder`; one namespace for all."""
    names: dict[str, Any] = {}
    with contextlib.chdir(folder):
        for cell in cells:
            if cell["cell_type"] != "code":
                continue
            names.pop("picture", None)
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("".join(cell["source"]), "notebook cell", "exec"), names)
            yield cell, printed.getvalue(), names.get("picture")


def main() -> None:
    notebook = json.loads(PAGE.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        for number, (cell, printed, picture) in enumerate(executed(notebook["cells"], Path(folder)), 1):
            stream = {"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)}
            shown = {"output_type": "display_data", "metadata": {}, "data": {"image/svg+xml": picture}}
            cell["execution_count"] = number
            cell["outputs"] = ([stream] if printed else []) + ([shown] if picture else [])
    PAGE.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + os.linesep, encoding="utf-8")


if __name__ == "__main__":
    main()
