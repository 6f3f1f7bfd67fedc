"""The documentation is true: links lead somewhere, recipes and commands are taken, errors are quoted as they are."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from recover.cli import COMMANDS, command
from recover.config.base import field_paths
from recover.config.recipe import Recipe, load_recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    str(path.relative_to(ROOT))
    for folder in (".", "docs", "docs/results", "launch", "checkpoints", "recover/embedded/fable-2m", ".github")
    for path in (ROOT / folder).glob("*.md")
)
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"


def _site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "dev" / "docs_site.py")
    assert spec and spec.loader
    module = sys.modules["docs_site"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SITE = _site()


def lost(page: str, text: str) -> list[str]:
    """Links of a page that lead to no file of the repository, or to no heading of it."""
    found = []
    for link in SITE.links(page, text):
        target = ROOT / link.target
        if link.target != page and not target.exists():
            found.append(f"{page}:{link.line}: {link.target}: no such file")
        elif link.anchor and link.anchor not in SITE.anchors(text if link.target == page else target.read_text()):
            found.append(f"{page}:{link.line}: {link.target} has no heading #{link.anchor}")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page: str) -> None:
    assert lost(page, (ROOT / page).read_text()) == []


def test_a_broken_link_is_found() -> None:
    text = "# One [name](index.md)\n\n[a](#one-name) [b](#two) [c](gone.md) `[d](gone.md)`\n\n    [e](gone.md)\n"
    assert lost("docs/x.md", text) == [
        "docs/x.md:3: docs/x.md has no heading #two",
        "docs/x.md:3: docs/gone.md: no such file",
    ]


def test_the_site_holds_every_page_once() -> None:
    text = re.sub(r"!!python/\S+", "", (ROOT / "mkdocs.yml").read_text())
    named = re.findall(r"[\w./-]+\.md", str(yaml.safe_load(text)["nav"]))
    written = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(named) == sorted([*written, *SITE.OUTSIDE.values()])
    assert all((ROOT / path).is_file() for path in SITE.OUTSIDE)


@pytest.mark.parametrize(
    ("page", "address", "shown"),
    [
        ("docs/a.md", "b.md#c", "b.md#c"),
        ("docs/a.md", "../launch/README.md#c", "launch.md#c"),
        ("launch/README.md", "../docs/results.md", "results.md"),
        ("docs/a.md", "../README.md", "index.md"),
        ("docs/a.md", "b/c.md", "b/c.md"),
        ("docs/b/c.md", "d.md#e", "d.md#e"),
        ("docs/b/c.md", "../a.md", "../a.md"),
        ("docs/b/c.md", "../../launch/README.md#c", "../launch.md#c"),
        ("docs/a.md", "https://example.org", "https://example.org"),
        ("docs/a.md", "../recover/api.py", None),
        ("docs/b/c.md", "../../recover/api.py", None),
    ],
)
def test_links_of_the_site_are_those_of_the_repository(page: str, address: str, shown: str | None) -> None:
    assert SITE.site_address(page, address, None) == shown
    if shown is None:
        assert SITE.site_address(page, address, "https://host/x/") == "https://host/x/blob/main/recover/api.py"


HAS_MKDOCS = importlib.util.find_spec("material") is not None


def built(config: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "dev/docs_site.py", "build", "--config", str(config)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(not HAS_MKDOCS, reason="mkdocs-material is not installed")
def test_the_site_builds() -> None:
    done = built(ROOT / "mkdocs.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not HAS_MKDOCS, reason="mkdocs-material is not installed")
@pytest.mark.parametrize(("link", "code"), [("#here", 0), ("gone.md", 1), ("#gone", 1), ("/gone.md", 1)])
def test_a_site_with_a_lost_link_is_not_built(link: str, code: int, tmp_path: Path) -> None:
    settings = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[0]
    (tmp_path / "mkdocs.yml").write_text(re.sub(r"\n(hooks|docs_dir|site_dir|extra_css): .*", "", settings))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Here\n\n[a link]({link})\n")
    done = built(tmp_path / "mkdocs.yml")
    assert done.returncode == code and (code == 0 or "gone" in done.stdout), done.stdout + done.stderr


# What is written as code.


def blocks(text: str, language: str) -> list[str]:
    """Fenced code of a language, inside lists too."""
    found = re.finditer(rf"^( *)```{language}\n(.*?)^\1```", text, flags=re.M | re.S)
    return ["\n".join(line[len(each[1]) :] for line in each[2].splitlines()) for each in found]


RECIPES = [
    pytest.param(block, id=f"{page}:{number}")
    for page in PAGES
    for number, block in enumerate(blocks((ROOT / page).read_text(), "yaml"))
    if page != "docs/recipe.md" and re.match(r"(#.*\n)*(name: [\w-]+\n(?!kind)|prune:|recover:|train:|model:)", block)
]


def test_recipes_were_found() -> None:
    assert RECIPES


@pytest.mark.parametrize("block", RECIPES)
def test_a_recipe_that_is_shown_is_one(block: str, tmp_path: Path) -> None:
    """Whole, or parts of one: then the others are the quickstart's."""
    shown = yaml.safe_load(block)
    assert {*shown} <= {path.partition(".")[0] for path in field_paths(Recipe)}, shown.keys()
    path = tmp_path / "shown.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(QUICKSTART.read_text()), **shown}))
    assert load_recipe(path, [])


def calls(text: str) -> list[str]:
    """Calls of the program in a page: lines of code that begin with it, and code within a sentence."""
    lines = [line.strip() for line in text.splitlines() if re.match(r"(    )+(recover|accelerate launch) ", line)]
    return lines + [found[1] for found in re.finditer(r"`((?:recover) [a-z]+(?: [^`]*)?)`", text)]


CALLS = sorted({(page, call) for page in PAGES for call in calls((ROOT / page).read_text())})


@pytest.mark.parametrize(("page", "call"), CALLS)
def test_a_call_that_is_shown_is_one(page: str, call: str) -> None:
    """Its command and options are there, and the fields that it sets are taken."""
    words = shlex.split(call, comments=True)
    words = words[words.index("recover") + 1 :]
    if words[0].startswith(("{", "-", "COMMAND", "...")):
        return
    assert words[0] in COMMANDS, call
    known = {option for each in command(words[0]).params for option in (*each.opts, *each.secondary_opts)}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= {*known, "--help"}, call
    fields = [word for word in words[1:] if re.match(r"[a-z][\w.]*=[^.]", word)]
    assert load_recipe(QUICKSTART, fields)


def texts_of_the_code() -> str:
    """Every text in the package's code, with a mark where a value stands."""
    found = []
    for path in sorted((ROOT / "recover").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_errors_are_quoted_as_the_program_says_them() -> None:
    page, code = (ROOT / "docs" / "troubleshooting.md").read_text(), texts_of_the_code()
    quoted = re.findall(r"\*\*`([^`]+)`\*\*", page)
    assert len(quoted) > 30
    assert [each for each in quoted if each not in code] == []


def test_make_targets_that_are_named_are_there() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    named: set[Any] = set()
    for page in PAGES:
        named |= {*re.findall(r"`make ([a-z]+)", (ROOT / page).read_text())}
        named |= {*re.findall(r"^    make ([a-z]+)", (ROOT / page).read_text(), flags=re.M)}
    assert named and named <= {*targets}


# Ways in: what nobody runs here is held to what is.


def test_the_image_is_made_by_the_makefile() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    assert copied and all((ROOT / name).exists() and f"!{name}" in kept for name in copied)
    pins = set(re.findall(r"torch==[\d.]+", (ROOT / "Makefile").read_text()))
    assert set(re.findall(r"torch==[\d.]+", "\n".join(lines))) == pins and len(pins) == 1
    made = next(line for line in lines if line.startswith("RUN make "))
    called = subprocess.run(
        ["make", "-n", "install", "VENV=/nowhere", "TORCH=torch==0"], cwd=ROOT, capture_output=True, text=True
    )
    assert made.split()[2] == "install" and called.returncode == 0, called.stderr
    assert "/nowhere/bin/pip install -q torch==0" in called.stdout and "-c constraints.txt -e ." in called.stdout
    for call in re.findall(r"^#   docker run .* recover (.*?) *(?:#.*)?$", "\n".join(lines), flags=re.M):
        assert not call.strip() or call.split()[0] in COMMANDS, call


def test_the_workflow_calls_what_is_there() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    calls = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    for call in calls:
        words = call.split()
        if words[0] == "make":
            assert {*words[1:]} <= {*targets}, call
        elif words[0] == "docker":
            assert words[1] == "build" or words[-1] in COMMANDS, call
        else:
            assert words[0] == "sudo" or (ROOT / words[0]).is_file(), call
    assert ".ci/run" in calls
    least = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert least and least[1] in jobs["check"]["strategy"]["matrix"]["python"]


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert f'version = "{cited["version"]}"' in project and f'license = "{cited["license"]}"' in project
    assert f"## {cited['version']}\n" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name
)
def test_forms_of_issues_are_forms(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    if path.name != "config.yml":
        assert {"name", "description", "body"} <= form.keys()
        asked = [part["id"] for part in form["body"] if part["type"] != "markdown"]
        assert len({*asked}) == len(asked) and all(part["attributes"] for part in form["body"])
