"""What is installed with the package: bounds that were tested, a lock that fits, a bill of materials, an audit."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
OPTIONAL = {"wandb", "reasoning-gym", "triton"}  # imported where they are asked for; Triton comes with torch for a GPU


@pytest.fixture
def dependencies(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "dev"))
    import dependencies

    return dependencies


def locked() -> dict[str, str]:
    lines = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    return dict(line.split("==") for line in lines)


@pytest.mark.parametrize("line", sorted(set(LINES)))
def test_every_requirement_has_a_bound_below_and_above(line: str) -> None:
    kinds = {each.operator for each in Requirement(line).specifier}
    assert kinds == {">=", "<"}, line


@pytest.mark.parametrize("line", sorted(set(LINES)))
def test_the_locked_version_is_within_the_bounds(line: str) -> None:
    each, versions = Requirement(line), locked()
    extras = PROJECT["optional-dependencies"]
    outside = {
        Requirement(line).name
        for extra in ("eval", "audit", "docs", "quantized", "gguf", "ifeval")
        for line in extras[extra]
    }
    if each.name not in outside:
        assert each.specifier.contains(versions[canonicalize_name(each.name)]), line


def test_the_lock_has_all_that_is_installed_with_the_package(dependencies: Any) -> None:
    versions = locked()
    for name in dependencies.installed():
        of_cuda = name.startswith(("nvidia-", "cuda-", "triton"))  # come with torch's build for GPUs
        assert name in versions or of_cuda, f"{name}: not in constraints.txt: python dev/dependencies.py lock"
    assert all(Version(version).local is None for version in versions.values())


def test_nothing_says_where_it_was_written(dependencies: Any) -> None:
    for text in (dependencies.lock(), json.dumps(dependencies.bill()), (ROOT / "constraints.txt").read_text()):
        assert not re.search(r"file:|https?:|/home|/root|/tmp|index-url|" + re.escape(str(ROOT)), text)


def test_the_bill_of_materials_names_each_part_once_with_its_licence(dependencies: Any) -> None:
    bill = dependencies.bill()
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", bill["serialNumber"])
    references = [part["bom-ref"] for part in bill["components"]]
    assert len(set(references)) == len(references) == len(dependencies.installed())
    torch = next(part for part in bill["components"] if part["name"] == "torch")
    assert torch["purl"] == f"pkg:pypi/torch@{torch['version']}" and torch["licenses"]
    assert set(bill["dependencies"][0]["dependsOn"]) <= set(references)
    assert bill == dependencies.bill()


def looked_up(name: str, *faults: str) -> dict[str, Any]:
    return {"name": name, "version": "1.0", "vulns": [{"id": fault, "fix_versions": ["1.1"]} for fault in faults]}


@pytest.mark.parametrize(
    ("found", "code", "words"),
    [
        ([looked_up("a"), looked_up("b")], 0, "audit: 0 known faults in 2 packages"),
        ([looked_up("a", "CVE-1")], 1, "a 1.0: CVE-1, mended in 1.1"),
        ([looked_up("a"), {"name": "b", "skip_reason": "not found"}], 0, "1 could not be looked up"),
        ([{"name": "b", "skip_reason": "not found"}], 0, "audit: skipped: .* knows none of the 1 packages"),
    ],
)
def test_an_audit_that_looked_nothing_up_says_so(dependencies: Any, found: list[Any], code: int, words: str) -> None:
    number, said = dependencies.verdict(found)
    assert number == code and re.search(words, said), said


@pytest.mark.parametrize(
    ("stdout", "stderr", "code"),
    [("", "requests.exceptions.ConnectionError: Max retries exceeded", 0), ("", "ValueError: broken", 1)],
)
def test_an_audit_without_a_database_is_skipped_and_a_broken_one_is_not(
    dependencies: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stdout: str,
    stderr: str,
    code: int,
) -> None:
    monkeypatch.setattr(dependencies.importlib.util, "find_spec", lambda name: object())
    done = subprocess.CompletedProcess([sys.executable], 1, stdout, stderr)
    monkeypatch.setattr(dependencies.subprocess, "run", lambda *_, **__: done)
    assert dependencies.audit() == code
    assert ("skipped" in capsys.readouterr().out) == (code == 0)


def imported() -> set[str]:
    """Top names of what the package imports, in functions too."""
    nodes = [node for path in (ROOT / "recover").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.split(".")[0] for name in named} - {*sys.stdlib_module_names, "recover"}


def test_what_the_package_imports_is_installed_with_it() -> None:
    """GGUF files among the sources that the README names: a base install reads them."""
    base = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    extra = {canonicalize_name(Requirement(line).name) for line in LINES} - base
    left = [*base]
    while left:  # what these bring along
        for line in requires(left.pop()) or ():
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate({"extra": ""}):
                new = {canonicalize_name(one.name)} - base
                base |= new
                left += new
    of = packages_distributions()
    missing = {name for name in imported() if not {*map(canonicalize_name, of.get(name, (name,)))} & base}
    assert "gguf" in base and "gguf" in imported()
    assert {*map(canonicalize_name, missing)} <= extra | OPTIONAL
