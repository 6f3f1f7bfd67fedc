"""Task files for tests, each with its data beside it."""

import json

GENERATE = {"kind": "generate", "prompt": "{q}"}
CHOICE = {"kind": "choice", "prompt": "{q}"}


def make_task(folder, rows, name="task", **fields):
    """A task file with its data beside it; rows are dicts, or raw lines."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"name": name, "data": f"{name}.jsonl", **fields}))  # JSON is YAML
    return str(path)
