"""What is installed with this package: as a lock of versions, as a bill of materials, held against known faults.

    python dev/dependencies.py lock      constraints.txt: the versions that are installed here, which are those tested
    python dev/dependencies.py sbom      sbom.cdx.json: the same as a bill of materials (CycloneDX), with licences
    python dev/dependencies.py audit     pip-audit over constraints.txt; said and skipped where it has no database

The requirements are those of pyproject.toml, and what they require in turn. constraints.txt holds no hashes: pip takes
hashes for all packages or for none, and torch's build is another one for each machine (CPU, CUDA).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
LOCK, BILL = ROOT / "constraints.txt", ROOT / "sbom.cdx.json"
EXTRAS = ("test",)  # of this package; `eval`, `audit` and `docs` are not part of what is tested
HEAD = """\
# Versions of everything that `make quickstart` and `make test` install, as they were tested together (Python {python}).
# Written by `python dev/dependencies.py lock`; pip install -c constraints.txt -e .
"""
AUDIT_SECONDS = 180
UNREACHED = ("ConnectionError", "ConnectTimeout", "ReadTimeout", "Max retries", "ServiceError", "Could not connect")


def requirements(extras: Iterable[str] = EXTRAS) -> list[Requirement]:
    """What pyproject.toml asks for, here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    found = [Requirement(line) for line in lines]
    return [each for each in found if each.marker is None or each.marker.evaluate()]


def installed() -> dict[str, metadata.Distribution]:
    """Name -> distribution of each requirement, and of what it requires in turn, as it is installed here.

    Raises SystemExit for one that is not.
    """
    found: dict[str, metadata.Distribution] = {}
    todo = [(each.name, frozenset(each.extras)) for each in requirements()]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            found[canonicalize_name(name)] = there = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise SystemExit(f"{name}: not installed; expected what `make test` installs") from None
        todo += [(each.name, frozenset(each.extras)) for each in _required(there, extras)]
    return dict(sorted(found.items()))


def _required(there: metadata.Distribution, extras: frozenset[str]) -> Iterator[Requirement]:
    for line in there.requires or ():
        each = Requirement(line)
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield each


def lock() -> str:
    """The text of constraints.txt; a version without its local part, which says how a package was built."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    lines = [f"{name}=={Version(there.version).public}" for name, there in installed().items()]
    return HEAD.format(python=python) + "\n".join(lines) + "\n"


def bill() -> dict[str, Any]:
    """A bill of materials in the form of CycloneDX 1.6: each package with version, address and licence."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    parts = [_component(name, there) for name, there in installed().items()]
    names = {part["bom-ref"].partition("@")[0]: part["bom-ref"] for part in parts}
    own = f"pkg:pypi/{project['name']}@{project['version']}"
    direct = sorted({names[f"pkg:pypi/{canonicalize_name(each.name)}"] for each in requirements()})
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(parts))}",  # the same for the same parts
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": own,
                "name": project["name"],
                "version": project["version"],
                "purl": own,
                "licenses": [{"license": {"id": project["license"]}}],
            }
        },
        "components": parts,
        "dependencies": [{"ref": own, "dependsOn": direct}],
    }


def _component(name: str, there: metadata.Distribution) -> dict[str, Any]:
    address = f"pkg:pypi/{name}@{Version(there.version).public}"
    licence = _licence(there)
    return {
        "type": "library",
        "bom-ref": address,
        "name": name,
        "version": Version(there.version).public,
        "purl": address,
        **({"licenses": [licence]} if licence else {}),
    }


def _licence(there: metadata.Distribution) -> dict[str, Any] | None:
    """As the package says it: an expression, a short name, or its classifiers."""
    said = there.metadata
    if expression := said.get("License-Expression"):
        return {"expression": expression}
    named = said.get("License") or ""
    classes = [line for line in said.get_all("Classifier") or () if line.startswith("License ::")]
    classified = [line.rpartition(" :: ")[2] for line in classes]
    name = named if named and "\n" not in named and len(named) < 80 else " AND ".join(classified)
    return {"license": {"name": name}} if name and name != "UNKNOWN" else None


def audit() -> int:
    """1 where a locked version has a known fault, or pip-audit broke; 0 also where its database cannot be reached."""
    if importlib.util.find_spec("pip_audit") is None:
        return _skipped("pip-audit is not installed (pip install 'recover[audit]')")
    words = [sys.executable, "-m", "pip_audit", "-r", str(LOCK), "--no-deps", "--disable-pip", "--progress-spinner=off"]
    try:
        done = subprocess.run([*words, "--format=json"], capture_output=True, text=True, timeout=AUDIT_SECONDS)
    except subprocess.TimeoutExpired:
        return _skipped(f"no answer from the database of known faults in {AUDIT_SECONDS} seconds")
    try:
        code, said = verdict(json.loads(done.stdout)["dependencies"])
    except (ValueError, KeyError, TypeError):
        if any(word in done.stderr for word in UNREACHED):
            return _skipped("the database of known faults cannot be reached")
        print(done.stderr)
        return done.returncode or 1
    print(said)
    return code


def verdict(found: list[dict[str, Any]]) -> tuple[int, str]:
    """(exit code, words) of what pip-audit found of each package."""
    looked_at = [each for each in found if "skip_reason" not in each]
    faults = [
        f"{each['name']} {each['version']}: {fault['id']}, mended in {', '.join(fault['fix_versions']) or 'no version'}"
        for each in looked_at
        for fault in each["vulns"]
    ]
    if not looked_at:
        return 0, f"audit: skipped: the database of known faults knows none of the {len(found)} packages"
    left = f"; {len(found) - len(looked_at)} could not be looked up" if len(looked_at) < len(found) else ""
    said = f"audit: {len(faults)} known faults in {len(looked_at)} packages{left}"
    return min(len(faults), 1), "\n".join([said, *faults])


def _skipped(why: str) -> int:
    print(f"audit: skipped: {why}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("lock", "sbom", "audit"))
    what = parser.parse_args(arguments).what
    if what == "audit":
        return audit()
    path, text = (LOCK, lock()) if what == "lock" else (BILL, json.dumps(bill(), indent=1) + "\n")
    path.write_text(text)
    print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
