"""Imports go downwards: read from the source with `ast`, held against the table. No module is imported here."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "recover"

# A module's floor is that of its folder.
FLOORS = {
    "recover.base": 0,  # files, processes, messages
    "recover.config": 1,  # recipes
    "recover.maths": 2,  # tensors and numbers in, tensors and numbers out
    "recover.kernels": 2,
    "recover.report": 3,  # reads the files of a run, and nothing else
    "recover.models": 3,  # a model, dense and pruned
    "recover.text": 4,  # what a model reads and writes
    "recover.distill": 4,
    "recover.prune": 5,
    "recover.measure": 5,
    "recover.export": 6,
    "recover.probe": 6,
    "recover.train": 7,
    "recover.run": 8,
    "recover.commands": 9,
    "recover.api": 9,
    "recover.cli": 10,
    "recover.__main__": 11,
}

HEAVY = {"torch", "transformers", "peft", "trl", "accelerate", "deepspeed", "datasets", "tokenizers", "safetensors"}
# These are imported without torch, and torch only comes when they are called.
LIGHT = {
    "recover.base",
    "recover.config",
    "recover.report",
    "recover.cli",
    "recover.__main__",
    "recover.run.stages",
    "recover.commands.run",
    "recover.commands.options",
}

MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def folder(module: str) -> str:
    """The row of the table that the module belongs to."""
    while module not in FLOORS:
        module = module.rpartition(".")[0]
        assert module, f"{module} has no floor: add a row to the table"
    return module


def light(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in LIGHT)


def imports(tree: ast.AST, *, deferred: bool) -> Iterator[str]:
    """Full names that are imported; without `deferred`, only those that importing the module itself imports."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif deferred or not (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_typing(node)):
            yield from imports(node, deferred=deferred)


def is_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def ours(name: str) -> str | None:
    """The module of this package that an imported name is or lies in."""
    if name.split(".")[0] != "recover":
        return None
    return name if name in MODULES else name.rpartition(".")[0]


@functools.cache
def named(module: str, *, deferred: bool = True) -> list[str]:
    return list(imports(ast.parse(MODULES[module].read_text()), deferred=deferred))


@functools.cache
def imported(module: str, *, deferred: bool = True) -> set[str]:
    return {name for name in map(ours, named(module, deferred=deferred)) if name not in (None, "recover")}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "recover"])
def test_imports_go_downwards(module: str) -> None:
    if MODULES[module].name == "__init__.py":
        assert not imported(module), f"{module}: what it imports, every module of the package imports with it"
        return
    own = folder(module)
    for name in imported(module):
        other = folder(name)
        assert FLOORS[other] < FLOORS[own] or other == own, (
            f"{module} (floor {FLOORS[own]}) imports {name} (floor {FLOORS[other]}): take a callable, or move one"
        )


def test_every_row_of_the_table_has_a_module() -> None:
    assert [
        row for row in FLOORS if row not in MODULES and not any(name.startswith(f"{row}.") for name in MODULES)
    ] == []


def test_no_module_imports_itself_in_a_circle() -> None:
    def reachable(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for name in imported(todo.pop()) - seen:
                seen.add(name)
                todo.append(name)
        return seen

    assert [module for module in MODULES if module in reachable(module)] == []


@pytest.mark.parametrize("module", [name for name in MODULES if name != "recover"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    if MODULES[module].name == "__init__.py" or not light(module):
        return
    todo, seen = [module], set()
    while todo:
        name = todo.pop()
        seen.add(name)
        heavy = {found for found in named(name, deferred=False) if found.split(".")[0] in HEAVY}
        assert not heavy, f"{module} imports {name}, which imports {heavy} at module level"
        todo += [found for found in imported(name, deferred=False) if found not in seen]
