"""What every part of a recipe is: typed, unknown fields refused, frozen, no torch; and what is said about a wrong one.

What is wrong is said in words: the path of each field, what was found, what was expected, what was meant.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from recover.base.errors import RecipeError

Dtype = Literal["float32", "bfloat16", "float16"]
# Matrices of a GGUF file; those with a k by llama.cpp's own code.
Quantized = Literal["q8_0", "q6_k", "q5_k_m", "q5_1", "q5_0", "q4_k_m", "q4_1", "q4_0"]


class Config(BaseModel):
    """One part of a recipe. Frozen, so that what a stage was stamped with stays true."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, fields: Any) -> Any:
        """As text, `true` is refused where a number is due; as it is, it would pass for 1."""
        for name, field in cls.model_fields.items():
            number = {int, float} & {field.annotation, *get_args(field.annotation)}
            if number and isinstance(fields, dict) and isinstance(fields.get(name), bool):
                fields = {**fields, name: str(fields[name]).lower()}
        return fields


Checked = TypeVar("Checked", bound=Config)


def checked(kind: type[Checked], spelled: Callable[[str], str] = str, **fields: Any) -> Checked:
    """A config from options of the command line. RecipeError for the first that is wrong, as it is `spelled`."""
    try:
        return kind(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = spelled(".".join(map(str, first["loc"])))
        raise RecipeError(f"{name}: found {first['input']!r}: {first['msg']}") from None


def option(field: str) -> str:
    """How the command line spells a field."""
    return "--" + field.replace("_", "-")


LONGEST_SHOWN = 60  # characters of a wrong value
# What pydantic says in Python's words -> in those of YAML.
EXPECTED = {
    "tuple_type": "it should be a list, as [a, b]",
    "list_type": "it should be a list, as [a, b]",
    "int_parsing": "it should be a whole number, as 200_000",
    "int_type": "it should be a whole number",
    "int_from_float": "it should be a whole number",
    "float_parsing": "it should be a number, as 1e-3",
    "bool_parsing": "it should be true or false",
}


MOST_LINES = 20  # of one message: who has more mistakes mends these first


def explain(error: ValidationError, root: type[BaseModel], where: str, origins: Mapping[str, str]) -> list[str]:
    """A line for each of `MOST_LINES` problems: where it was set (`origins`, else `where`), its path, what is wrong."""
    lines = []
    problems = error.errors(include_url=False)
    for problem in problems:
        if problem["type"] == "too_short" and any(_below(other["loc"], problem["loc"]) for other in problems):
            continue  # pydantic counts only items that are right; what is wrong with the others is said
        path, parent, here = _walk(root, problem["loc"])
        source = next((origins[key] for key in origins if f"{path}.".startswith(f"{key}.")), where)
        sentence = _sentence(problem, path, parent, here, root)
        lines.append(f"{source}: {path}: {sentence}" if path else f"{source}: {sentence}")
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [f"{where}: {len(lines) - MOST_LINES} more such fields"]
    return lines


def _below(loc: tuple[int | str, ...], above: tuple[int | str, ...]) -> bool:
    return len(loc) > len(above) and loc[: len(above)] == above


def _walk(root: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[str, type[BaseModel], list[type[BaseModel]]]:
    """The path as the user wrote it, the model that its last name belongs to, and the models that may stand there."""
    path: list[str] = []
    parent, here = root, [root]
    for step in loc:
        if isinstance(step, str) and len(here) > 1:  # pydantic adds the `kind` that told a union apart
            here = [model for model in here if step in _kinds(model)]
        elif step != "[key]":
            path.append(str(step))
            if isinstance(step, str) and here:
                parent = here[0]
                field = parent.model_fields.get(step)
                here = list(_models(field.annotation)) if field else []
    return ".".join(path), parent, here


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a field of this type may hold, through unions, tuples and annotations."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated, tuple, list):
        for argument in get_args(annotation):
            yield from _models(argument)


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("kind")
    return get_args(field.annotation) if field else ()


def _sentence(
    problem: Any, path: str, parent: type[BaseModel], here: list[type[BaseModel]], root: type[BaseModel]
) -> str:
    kind, context, found = problem["type"], problem.get("ctx", {}), problem["input"]
    name = path.rpartition(".")[2]
    kinds = [option for model in here for option in _kinds(model)]
    match kind:
        case "extra_forbidden":
            return f"unknown field. {_meant(name, path, parent, root)}"
        case "missing":
            return "is missing" + _description(parent, name)
        case "union_tag_not_found":
            return f"'kind' is missing, expected one of {', '.join(kinds)}"
        case "union_tag_invalid":
            return f"unknown kind {_shown(context['tag'])}. {_nearest(str(context['tag']), kinds)}"
        case "literal_error":
            options = context["expected"].replace(" or ", ", ").replace("'", "").split(", ")
            return f"found {_shown(found)}. {_nearest(str(found), options)}"
        case "value_error":
            return str(context["error"])
        case "too_short":
            return f"found {_shown(found)}: expected at least {context['min_length']}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"found {_shown(found)}: expected fields, as 'name: value' on lines of their own"
    expected = EXPECTED.get(kind) or problem["msg"].replace("Input should", "it should").replace("String", "it")
    if kind == "string_pattern_mismatch" and name == "name":
        expected = "it should be of letters, digits, '.', '_' and '-', and begin with a letter or digit"
    return f"found {_shown(found)}: {expected}{_quotes(kind, found)}"


def _meant(name: str, path: str, model: type[BaseModel], root: type[BaseModel]) -> str:
    if path in field_paths(root):  # right for another kind of the same part: a guess would name the very field again
        return f"Kind {', '.join(map(repr, _kinds(model)))} takes {', '.join(model.model_fields)}"
    if not get_close_matches(name, model.model_fields, n=1, cutoff=0.75):
        elsewhere = [path for path in field_paths(root) if path.rpartition(".")[2] == name]
        if elsewhere:
            return f"Did you mean {' or '.join(repr(path) for path in dict.fromkeys(elsewhere[:3]))}?"
    return _nearest(name, list(model.model_fields))


def _nearest(name: str, options: list[str]) -> str:
    begun = [option for option in options if name and option.startswith(name)]
    close = begun or get_close_matches(name, options, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Expected one of {', '.join(options)}"


def field_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Each field of a model and of those below it, as a dotted path; lists without their places."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for child in _models(field.annotation):
            yield from field_paths(child, f"{prefix}{name}.")


def _description(model: type[BaseModel], name: str) -> str:
    field = model.model_fields.get(name)
    if field is None:
        return ""
    if field.description:
        return f": {field.description}"
    first = next((child.__doc__ for child in _models(field.annotation) if child.__doc__), None)
    return f": {first.splitlines()[0]}" if first else ""


def _quotes(kind: str, found: Any) -> str:
    return "; put it in quotes" if kind == "string_type" and isinstance(found, int | float) else ""


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."
