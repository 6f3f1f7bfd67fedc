"""Names of earlier versions: read wherever they still stand, and never written anew.

What trains was called `recover`: the section of a recipe, the stage, and its folder in a run. A recipe, an override and
a stage that say so are taken, with a word on the first one. A run made then keeps its folder, and its stamps count as
if they said `train`: nothing is trained again for a name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recover.base import console
from recover.base.artifacts import JsonObject
from recover.base.errors import RecipeError

NOW = {"recover": "train"}  # a section of the recipe, the stage, its folder: then, and now
MADE = ("training.json", "DONE.json")  # of which a folder holds one once it is trained in

_said: set[str] = set()


def current(name: str) -> str:
    """A section, a stage or a dotted field (`recover.lr`) by the name that it has now."""
    first, dot, rest = name.partition(".")
    return f"{NOW.get(first, first)}{dot}{rest}"


def keys(tree: Mapping[str, Any]) -> JsonObject:
    """The same values under the names of now."""
    return {current(name): value for name, value in tree.items()}


def sections(tree: JsonObject, where: str) -> JsonObject:
    """The fields of a recipe, its sections by their names of now. A word is said where an earlier one stands.

    Raises:
        RecipeError: a section stands there under both names.
    """
    for then, now in NOW.items():
        if then in tree and now in tree:
            raise RecipeError(
                f"{where}: found '{now}' and '{then}', which is what '{now}' was called before: join them in '{now}'"
            )
        if then in tree:
            _say(then, where)
    return keys(tree)


def override(text: str) -> str:
    """An override by the name that its field has now; a word is said where it was another."""
    field, equals, value = text.partition("=")
    where = f"override '{text}'"
    return _told(field.strip(), where) + equals + value


def stage(name: str) -> str:
    """A stage by the name that it has now; a word is said where it was another."""
    return _told(name, "stage")


def stamp(value: Any) -> Any:
    """What DONE.json holds, with stages and fields by their names of now; anything that is no stamp as it is."""
    if not isinstance(value, dict) or not isinstance(value.get("fingerprint"), dict):
        return value
    marks = keys(value["fingerprint"])
    if isinstance(marks.get("stages"), dict):
        marks["stages"] = keys(marks["stages"])
    return {**value, "stage": current(str(value.get("stage"))), "fingerprint": marks}


def place(root: Path, name: str) -> Path:
    """Where a file or folder of a run lies (`train/best.json`): in the folder of before, where that was trained in."""
    first, slash, rest = name.partition("/")
    for then, now in NOW.items():
        if first == now and _made(root / then) and not _made(root / now):
            first = then
    return root / f"{first}{slash}{rest}"


def _made(folder: Path) -> bool:
    return any(os.path.exists(folder / name) for name in MADE)


def _told(name: str, where: str) -> str:
    now = current(name)
    if now != name:
        _say(name.partition(".")[0], where)
    return now


def _say(then: str, where: str) -> None:
    """Once in a process for each name."""
    if then not in _said:
        _said.add(then)
        console.warn(f"{where}: '{then}' is called '{NOW[then]}' now, section and stage; it is read all the same")
