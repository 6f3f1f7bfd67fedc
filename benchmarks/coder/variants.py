"""Named variants of a base recipe: which fields they set, and which work of a run several of them have in common."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recover.base.errors import RecipeError
from recover.config import yaml_values
from recover.config.recipe import Recipe, load_recipe

HERE = Path(__file__).resolve().parent
TABLES = "tables"
SEED = "-seed"  # run folders are NAME-seedN


@dataclass(frozen=True)
class Variant:
    """A run to be made: `name` as it was asked for, the parts of it that say how it is pruned, the fields it sets."""

    name: str
    pruning: str
    overrides: tuple[str, ...]
    seed: int

    @property
    def run(self) -> str:
        """Name of the run folder."""
        return f"{self.name.replace('+', '_')}{SEED}{self.seed}"

    def recipe(self, base: Path) -> Recipe:
        """The whole recipe. Raises SystemExit naming the variant where its fields are wrong."""
        try:
            return load_recipe(base, [*self.overrides, f"seed={self.seed}", f"name={self.run}"])
        except RecipeError as error:
            raise SystemExit(f"{self.name}: {error}") from None


class Known:
    """The names of a variants file."""

    def __init__(self, path: Path = HERE / "variants.yaml") -> None:
        groups = yaml_values.read(path)
        self.path = path
        self.tables: dict[str, list[str]] = groups.pop(TABLES, {})
        self.fields: dict[str, list[str]] = {}
        for group in groups.values():
            twice = set(group) & set(self.fields)
            if twice:
                raise SystemExit(
                    f"{path}: {sorted(twice)[0]!r} stands in more than one group: give each a name of its own"
                )
            self.fields |= group

    def variant(self, name: str, base: Path, seed: int, more: tuple[str, ...] = ()) -> Variant:
        """The variant that joins the named parts with `+`; `more` fields are set last.

        A name that ends in @N is of seed N, whatever `seed` says.

        Raises:
            SystemExit: a part is not known.
        """
        name, _, own = name.partition("@")
        if own and not own.isdecimal():
            raise SystemExit(f"{name}@{own}: found {own!r} behind @, expected a seed")
        fields: list[str] = []
        pruning: list[str] = []
        for part in name.split("+"):
            if part not in self.fields:
                raise SystemExit(f"{name}: {part!r} is not in {self.path}; known: {', '.join(self.fields)}")
            fields += self.fields[part]
            if any(field.startswith("prune") for field in self.fields[part]):
                pruning.append(part)
        filled = tuple(_filled(field, base) for field in fields)
        return Variant(name, "+".join(pruning), (*filled, *more), int(own) if own else seed)


def _filled(field: str, base: Path) -> str:
    text = " ".join(field.split())
    if "{calibration}" in text:
        calibration = getattr(load_recipe(base).prune, "calibration", None)
        if calibration is None:
            raise SystemExit(f"{base}: its prune has no calibration, which the field {text!r} takes over")
        text = text.replace("{calibration}", calibration.model_dump_json())
    return text.replace("{data}", str(HERE / "data")).replace("{tasks}", str(HERE / "tasks"))


def common_work(recipe: Recipe) -> dict[str, str]:
    """What the run makes that another can take over: name -> digest of the recipe fields that decide it.

    `dense`: the dense model's figures; `prune`: the pruning, and the figures of the pruned model; `text 0`, ...: what
    the dense model writes for each source of text, whose budget may differ.
    """
    tree = recipe.model_dump(mode="json")
    start = {"seed": tree["seed"], "model": tree["model"]}
    work = {
        "dense": {**start, "measure": tree["measure"]},
        "prune": {**start, "prune": tree["prune"], "probe": tree["probe"], "measure": tree["measure"]},
    }
    for number, source in enumerate(tree["train"]["data"]):
        if source["kind"] == "dense":
            fields = {name: value for name, value in source.items() if name != "share"}
            work[f"text {number}"] = {**start, "source": fields, "length": tree["train"]["length"]}
    return {name: _digest(fields) for name, fields in work.items()}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
