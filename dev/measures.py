"""What can be counted of the division of `recover/` into files: a number a line.

    python dev/measures.py            # of this checkout
    python dev/measures.py FOLDER     # of another one

Files imported by one other: a sign that a file was cut where it was full, not where an idea ends. Imports inside
functions: the price of staying light at import. `dict[str, Any]`: records without a type.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ALLOWED = {"__init__.py", "__main__.py", "api.py", "cli.py"}  # loose at the top by right


def modules(package: Path) -> dict[str, Path]:
    """Dotted name of each module, and its file."""
    found = sorted(package.rglob("*.py"))
    return {".".join(path.relative_to(package.parent).with_suffix("").parts): path for path in found}


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names that are imported, wherever."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def owner(name: str, known: dict[str, Path]) -> str | None:
    """The module of ours that this name is, or lies in."""
    while name:
        for module in (name, f"{name}.__init__"):
            if module in known:
                return module
        name = name.rpartition(".")[0]
    return None


def measures(root: Path) -> dict[str, int]:
    """Of the checkout in `root`."""
    package = root / "recover"
    known = modules(package)
    importers: dict[str, set[str]] = defaultdict(set)
    inner = lines = untyped = 0
    for module, path in known.items():
        text = path.read_text()
        lines += text.count("\n")
        for node in ast.walk(tree := ast.parse(text)):
            untyped += isinstance(node, ast.Subscript) and ast.unparse(node) == "dict[str, Any]"
        inner += sum(
            isinstance(node, ast.Import | ast.ImportFrom)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in function.body
        )
        for name in imported(tree):
            if (other := owner(name, known)) and other != module:
                importers[other].add(module)
    files = [path for path in known.values() if path.name != "__init__.py"]
    loose = [path for path in files if path.parent == package and path.name not in ALLOWED]
    return {
        "files in recover/": len(files),
        "loose at the top": len(loose),
        "imported by exactly one other": sum(len(users) == 1 for users in importers.values()),
        "imports inside functions": inner,
        "dict[str, Any]": untyped,
        "lines of recover/": lines,
        "lines of tests/": sum(path.read_text().count("\n") for path in (root / "tests").rglob("*.py")),
    }


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    for name, value in measures(root).items():
        print(f"{value:7,}  {name}")


if __name__ == "__main__":
    main()
