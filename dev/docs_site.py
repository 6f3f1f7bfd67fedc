"""The documentation site, from the Markdown of the repository, and the links in it. mkdocs.yml names this as a hook.

    python dev/docs_site.py build            build/site, as `make docs` does; ends with 1 where a link leads nowhere
    python dev/docs_site.py build --if-had   the same; where mkdocs-material is not installed, that is said, and no more
    python dev/docs_site.py pictures RUN     docs/images/report-*.png, of the report of a run; needs Chromium

Pages that lie outside docs/ are shown too (`OUTSIDE`). A link to another file of the repository leads to the public
repository where mkdocs.yml has a `repo_url`, and is plain words where it has none.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
DOCS = "docs"
# A page of the repository -> the page of the site.
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "reporting.md",
    "checkpoints/README.md": "run-folder.md",
    "launch/README.md": "launch.md",
    "recover/embedded/fable-2m/README.md": "fable-2m.md",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
FENCE = re.compile(r"^ {0,3}(```+|~~~+)")
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$")
ELSEWHERE = re.compile(r"^[a-z][a-z0-9+.-]*:")


class Link(NamedTuple):
    """A link of a page: its line from 1, what it points to in the repository (no anchor), and the anchor."""

    line: int
    target: str
    anchor: str


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is no code."""
    fence = ""
    for number, line in enumerate(text.splitlines(), 1):
        found = FENCE.match(line)
        if found and (not fence or found[1].startswith(fence)):
            fence = "" if fence else found[1]
        elif not fence and not line.startswith("    "):
            yield number, line


def links(page: str, text: str) -> Iterator[Link]:
    """Links of a page of the repository to files and headings in it, relative to its root."""
    for number, line in prose(text):
        for found in LINK.finditer(re.sub(r"`[^`]*`", lambda code: "`" * len(code[0]), line)):
            if not ELSEWHERE.match(found[3]):
                yield Link(number, *_resolved(page, found[3]))


def _resolved(page: str, address: str) -> tuple[str, str]:
    path, _, anchor = address.partition("#")
    target = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
    return target.replace(os.sep, "/"), anchor


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    found: dict[str, int] = {}
    for _, line in prose(text):
        if heading := HEADING.match(line):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).replace("`", "")
            slug = re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
            found[slug] = found.get(slug, -1) + 1
    return {f"{slug}-{again}" if again else slug for slug, count in found.items() for again in range(count + 1)}


def site_address(page: str, address: str, repository: str | None) -> str | None:
    """What a link of a page (by its path in the repository) is on the site; None where it leads nowhere there."""
    if ELSEWHERE.match(address):
        return address
    target, anchor = _resolved(page, address)
    here = f"#{anchor}" if anchor else ""
    shown = _shown(target)
    if shown is None:
        return f"{repository.rstrip('/')}/blob/main/{target}{here}" if repository else None
    return f"{os.path.relpath(shown, os.path.dirname(_shown(page) or page) or '.').replace(os.sep, '/')}{here}"


def _shown(path: str) -> str | None:
    """The page of the site that shows a page of the repository; None where none does."""
    if path == "README.md":
        return "index.md"
    if path in OUTSIDE:
        return OUTSIDE[path]
    return path.removeprefix(f"{DOCS}/") if path.startswith(f"{DOCS}/") else None


# What mkdocs calls.


def on_files(files: Any, config: Any) -> Any:
    """The pages from outside docs/."""
    from mkdocs.structure.files import File

    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The text of a page with its links as the site has them."""
    shown = page.file.src_uri
    source = next((path for path, name in OUTSIDE.items() if name == shown), f"{DOCS}/{shown}")

    def rewritten(found: re.Match[str]) -> str:
        address = site_address(source, found[3], config.repo_url)
        return found[2] if address is None else f"{found[1]}[{found[2]}]({address})"

    plain = {number for number, _ in prose(markdown)}
    lines = enumerate(markdown.split("\n"), 1)
    return "\n".join(LINK.sub(rewritten, line) if number in plain else line for number, line in lines)


# A picture of the report: its name, the element that it begins above, and its height.
PICTURES = (
    ("report-top", "header", 1050),
    ("report-measures", "#measures", 820),
    ("report-samples", "#samples", 620),
    ("report-items", "#changed", 480),
    ("report-recovery", "#recovery", 560),
    ("report-damage", "#figure-blocks", 560),
)


def pictures(run: Path) -> int:
    """Parts of a run's report as PNG, for the page that says how to read one."""
    sys.path.append(str(ROOT / "tests"))
    from chromium import Browser

    with Browser() as browser:
        browser.open(run / "report.html", width=1000)
        browser.evaluate("document.querySelector('details.item')?.setAttribute('open', '')")
        for name, selector, height in PICTURES:
            top = browser.evaluate(f"document.querySelector('{selector}')?.getBoundingClientRect().top + scrollY")
            if top is None:
                print(f"{name}.png is left as it is: the report of {run} has no {selector}")
                continue
            browser.picture(ROOT / DOCS / "images" / f"{name}.png", top=max(0, int(top) - 16), height=height)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    what = parser.add_subparsers(dest="what", required=True)
    build = what.add_parser("build", help="the site")
    build.add_argument("--if-had", action="store_true", help="build nothing where mkdocs-material is not installed")
    build.add_argument("--config", type=Path, default=ROOT / "mkdocs.yml", help="another mkdocs.yml")
    what.add_parser("pictures", help="of a report").add_argument("run", type=Path)
    wanted = parser.parse_args(arguments)
    if wanted.what == "pictures":
        return pictures(wanted.run)
    missing = importlib.util.find_spec("material") is None or importlib.util.find_spec("mkdocs") is None
    if missing:
        print("docs: mkdocs-material is not installed (pip install 'recover[docs]')")
        return 0 if wanted.if_had else 1
    # Not --quiet: with it mkdocs forgets its warnings, and --strict has nothing to fail for.
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--clean", "-f", str(wanted.config)]
    done = subprocess.run(words, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout + "\n".join(line for line in done.stderr.splitlines() if not line.startswith("INFO")))
    else:
        print("docs: built; open its index.html, or with a search: python -m http.server -d build/site")
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
