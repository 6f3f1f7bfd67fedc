"""Imports go downwards: read from the source with `ast`, held against the table. No module is imported here."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "recover"

# A module's floor is that of its longest prefix here. A new module of a package that spans floors needs its own row.
FLOORS = {
    # F0: base
    "recover.errors": 0,
    "recover.dist": 0,
    "recover.console": 0,
    "recover.artifacts": 0,
    "recover.clock": 0,
    "recover.run_directory": 0,
    "recover.ownership": 0,
    "recover.products": 0,
    "recover.safe_path": 0,
    "recover.signals": 0,
    "recover.threads": 0,
    "recover.provenance": 0,
    "recover.places": 0,
    "recover.quiet": 0,
    "recover.json_lines": 0,
    "recover.problems": 0,
    "recover.strict_json": 0,
    "recover.strict_yaml": 0,
    # F1: recipes and reports; F0, F1 and the command line do without torch until they are called
    "recover.leaf": 1,
    "recover.recipe": 1,
    "recover.recipe_prune": 1,
    "recover.recipe_train": 1,
    "recover.report": 1,
    "recover.memory": 1,
    "recover.forecast": 1.5,
    # F2: tensors in, tensors out
    "recover.models.fused": 2,
    "recover.models.fused_kernels": 2,
    "recover.models.lora_linear": 2,
    "recover.models.masked_linear": 2,
    "recover.models.own_linear": 2,
    "recover.models.pairing": 2,
    "recover.models.site": 2,
    "recover.models.step_kernels": 2,
    "recover.prune.scores": 2,
    "recover.probe.spaces": 2,
    "recover.distill.loss": 2,
    "recover.distill.loss_terms": 2,
    "recover.distill.loss_kernel": 2,
    "recover.distill.loss_topk": 2,
    "recover.measure.collapse": 2,
    "recover.measure.score": 2,
    # F3: models, and below them the plan that a twin is built from
    "recover.prune.plan": 2.5,
    "recover.models": 3,
    # How texts are decoded, for what measures and for what probes
    "recover.measure.decode": 3.5,
    "recover.measure.drawing": 3.5,
    "recover.measure.stops": 3.5,
    "recover.measure.kv": 3.5,
    "recover.measure.prompts": 3.5,
    # F4: the work on one model
    "recover.prune": 4,
    "recover.probe": 4,
    "recover.distill": 4,
    "recover.measure": 4,
    "recover.export.merge": 4,
    "recover.probe.tasks": 4.5,
    # F5: training, writing, verifying
    "recover.train": 5,
    "recover.export": 5,
    # F6: stages
    "recover.inputs": 6,
    "recover.estimate": 6,
    "recover.estimate_depth": 6,
    "recover.estimate_cache": 6,
    "recover.bench": 6,
    "recover.outcome": 6,
    "recover.calibration": 6,
    "recover.work": 6,
    "recover.stages": 6,
    "recover.trial": 6,
    "recover.diagnose": 6,
    "recover.measuring": 6,
    "recover.teaching": 6,
    # F7: command line
    "recover.cli": 7,
    "recover.commands_forecast": 6.5,
    "recover.commands_gguf": 6.5,
    "recover.commands_measure": 6.5,
    "recover.commands_probe": 6.5,
    "recover.commands_report": 6.5,
    "recover.commands_run": 6.5,
    "recover.commands_teacher": 6.5,
    "recover.__main__": 7,
}

HEAVY = {"torch", "transformers", "peft", "trl", "accelerate", "deepspeed", "datasets", "tokenizers", "safetensors"}
LIGHT = {
    "recover.cli",
    "recover.__main__",
    "recover.stages",
    "recover.measuring",
    "recover.commands_measure",
}  # beside F0 and F1

MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def floor(module: str) -> float:
    prefix = module
    while prefix not in FLOORS:
        prefix = prefix.rpartition(".")[0]
        assert prefix, f"{module} has no floor: add a row to the table"
    return FLOORS[prefix]


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
def imported(module: str, *, deferred: bool = True) -> set[str]:
    names = imports(ast.parse(MODULES[module].read_text()), deferred=deferred)
    return {name for name in map(ours, names) if name not in (None, "recover")}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "recover"])
def test_imports_go_downwards(module: str) -> None:
    if MODULES[module].name == "__init__.py":
        assert not imported(module), f"{module}: what it imports, every module of the package imports with it"
        return
    package = module.rpartition(".")[0]
    for name in imported(module):
        same_package = name.rpartition(".")[0] == package and floor(name) == floor(module)
        assert floor(name) < floor(module) or same_package, (
            f"{module} (F{floor(module)}) imports {name} (F{floor(name)}): take a callable instead, or move one"
        )


def test_every_row_of_the_table_has_a_module() -> None:
    assert [
        row for row in FLOORS if row not in MODULES and not any(name.startswith(f"{row}.") for name in MODULES)
    ] == []


def test_no_module_imports_itself_in_a_circle() -> None:
    def reachable(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for name in imported(todo.pop(), deferred=False) - seen:
                seen.add(name)
                todo.append(name)
        return seen

    assert [module for module in MODULES if module in reachable(module)] == []


@pytest.mark.parametrize("module", [name for name in MODULES if name != "recover"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    if MODULES[module].name == "__init__.py" or (floor(module) > 1 and module not in LIGHT):
        return
    todo, seen = [module], set()
    while todo:
        name = todo.pop()
        seen.add(name)
        tree = ast.parse(MODULES[name].read_text())
        heavy = {found for found in imports(tree, deferred=False) if found.split(".")[0] in HEAVY}
        assert not heavy, f"{module} imports {name}, which imports {heavy} at module level"
        todo += [found for found in imported(name, deferred=False) if found not in seen]
