"""A recipe is one complete run, in YAML: every field typed, unknown fields refused, no torch.

recipe = load_recipe("recipes/quickstart.yaml", ["train.lr=1e-3", "prune.count=3"])

Files that it names lie where it says, whatever folder the command is given from (`place_files`).
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from recover.base import earlier
from recover.base.artifacts import JsonObject
from recover.base.errors import RecipeError
from recover.config import yaml_values
from recover.config.base import Config, Dtype, Quantized, explain
from recover.config.loss import Focus, Loss
from recover.config.prune import (
    Calibrated,
    Calibration,
    Depth,
    Experts,
    Magnitude,
    Prune,
    SparseGpt,
    Sparsity,
    Wanda,
    Width,
)
from recover.config.train import Cache, Data, DenseText, GivenText, Lora, PrunedText, StopEarly, TeacherText, Train

__all__ = [
    "Cache",
    "Calibrated",
    "Calibration",
    "Config",
    "Data",
    "DenseText",
    "Deploy",
    "Depth",
    "Dtype",
    "Experts",
    "Focus",
    "GivenText",
    "Lora",
    "Loss",
    "Magnitude",
    "Prune",
    "PrunedText",
    "SparseGpt",
    "Sparsity",
    "StopEarly",
    "TeacherText",
    "Train",
    "Wanda",
    "Width",
]

# Fields that name files, or a hub id.
FIELDS = (
    "model.source",
    "model.tokenizer",
    "prune.calibration.data",
    "deploy.calibration.data",
    "probe.prompts",
    "train.data.*.prompts",
    "train.data.*.source",
    "measure.tasks.*",
    "train.cache.folder",
)
FOLDERS = ("train.cache.folder",)  # made where there is none; never a hub id
# Endings of files that hold rows; of each but a table, gzipped too.
LINES, TABLES, SHEETS, TEXTS = (".jsonl", ".ndjson", ".json"), (".parquet", ".arrow"), (".csv", ".tsv"), (".txt", ".md")
ROWS = (*LINES, *(f"{ending}.gz" for ending in (*LINES, *SHEETS)), *TABLES, *SHEETS, *TEXTS)
SUFFIXES = {*LINES, *TABLES, *SHEETS, *TEXTS, ".yaml", ".yml", ".gguf", ".gz"}


class Model(Config):
    """The dense model: a hub id, a local folder, a GGUF file, or `embedded:NAME` (shipped with the package).

    It must be whole. Tensors that are missing, left over or of another size are refused by name; so are files of an
    adapter beside whole weights, and a GGUF file with settings that are not taken over. Scaled positions and biases
    are taken over from files of Llama, Mistral, Qwen2 and Qwen3.
    """

    source: str
    revision: str | None = Field(default=None, description="of a hub model: branch, tag or commit")
    tokenizer: str | None = Field(default=None, description="where the tokenizer lies, if not beside the model")
    dtype: Dtype = "float32"
    attention: Literal["sdpa", "eager"] = "sdpa"
    offload: Literal["none", "cpu", "disk"] = Field(
        default="none",
        description="where the blocks' matrices lie while their block does not compute: on the GPU (none), in main "
        "memory (cpu), or in the model's files (disk)",
    )
    load_in: Literal["4bit", "8bit"] | None = Field(
        default=None,
        description="hold the blocks' matrices in so few bits (NF4, int8). What is pruned, and what teaches, is then "
        "the quantized dense model; the export is merged into the weights of the files",
    )
    trust_remote_code: bool = Field(default=False, description="run code that a hub model brings; said aloud when on")

    @model_validator(mode="after")
    def _one_place(self) -> Model:
        if self.load_in is not None and self.offload == "disk":
            raise ValueError(
                f"load_in: {self.load_in} weights are in no file; use offload: cpu (in main memory) or none (on the "
                "GPU) with it"
            )
        return self


class Probe(Config):
    """How drift is measured in the three spaces (theory: `docs/theory.md`)."""

    prompts: str | None = Field(
        default=None,
        description="rows with a `prompt`, or `messages`; a file or data set; default: prompts of the generate tasks",
    )
    subset: str | None = Field(default=None, description="configuration of a data set")
    split: str = Field(default="train", description="of a data set")
    samples: int = Field(default=32, ge=1)
    steps: int = Field(default=48, ge=1, description="decoding steps along the dense model's own trajectory")
    temperatures: tuple[float, ...] = (0.5, 1.0, 2.0)
    seeds: tuple[int, ...] = Field(default=(), description="of texts drawn at T = 1, measured beside the greedy ones")
    sublayers: bool = Field(default=True, description="what each attention and MLP does, closed or replaced by itself")
    layer_positions: int = Field(
        default=2048, ge=1, description="of each batch, at most so many positions enter figures of blocks and sublayers"
    )
    items: int = Field(
        default=100, ge=0, description="of each choice and retrieval task, the first ones, held against dense; 0: none"
    )
    batch_size: int = Field(default=16, ge=1)

    @field_validator("temperatures")
    @classmethod
    def _positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values or min(values) <= 0:
            raise ValueError(f"temperatures must be greater than 0, found {list(values)}")
        return values


class Sampling(Config):
    """How texts are drawn."""

    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=0.95, gt=0, le=1)


class Measure(Config):
    """What is measured of dense, pruned and recovered alike. `tasks`: YAML files, or `embedded:NAME`."""

    tasks: tuple[str, ...] = Field(min_length=1)
    limit: int | None = Field(default=None, ge=1, description="items of each task; default: all")
    epoch_limit: int | None = Field(
        default=None, ge=1, description="items of each task after each epoch; default: as `limit`"
    )
    max_new_tokens: int = Field(default=128, ge=1, description="texts cut here are counted in the report")
    batch_size: int = Field(default=64, ge=1)
    sampling: Sampling | None = Field(default=Sampling(), description="measured beside greedy; null: not at all")
    samples: int = Field(default=3, ge=0, description="texts shown in the report")
    allow_code_execution: bool | Literal["unconfined"] = Field(
        default=False,
        description="let `code` tasks run what the model writes, behind a wall ([security.md](security.md)); refused "
        "where the machine has none. `unconfined`: without a wall, all that you can read and write is the program's",
    )


class Export(Config):
    dtype: Dtype | None = Field(
        default=None, description="default: model.dtype, or the checkpoint's own where that is smaller"
    )
    max_shard_size: str = Field(default="5GB", description="of one file of weights, such as 500MB")

    @field_validator("max_shard_size")
    @classmethod
    def _size(cls, text: str) -> str:
        if not re.fullmatch(r"\d+ ?[KMGT]B", text):
            raise ValueError(f"found {text!r}: expected a number of KB, MB, GB or TB, such as 5GB")
        return text


# Forms that other tools write, and which one.
NO_GGUF = {"fp8": "llm-compressor", "awq": "llm-compressor", "gptq": "llm-compressor", "nf4": "bitsandbytes"}


class Deploy(Config):
    """An optional last stage: the export as one quantized GGUF file, measured on the same tasks.

    It is measured from the weights of the file, dequantized, by recover itself.
    """

    quantize: Quantized | None = Field(
        default=None,
        description="type of the file's matrices; null: no such stage. Those with a k need the extra `gguf`",
    )
    beside: Literal["dense"] | None = Field(
        default=None,
        description="measured beside it: the dense model, quantized to the type whose file is nearest in bytes",
    )
    importance: bool | None = Field(
        default=None,
        description="round by the importance of input channels (llama.cpp's imatrix), with the extra `gguf`; null: "
        "with types with a k, where there is calibration text",
    )
    calibration: Calibration | None = Field(
        default=None, description="text on which importance is measured; null: that of `prune.calibration`"
    )

    @field_validator("quantize", mode="before")
    @classmethod
    def _in_a_gguf_file(cls, value: Any) -> Any:
        if isinstance(value, str) and value in NO_GGUF:
            raise ValueError(
                f"{value} is no type of a GGUF file, which is what this stage writes: leave it out, quantize the "
                f"export with {NO_GGUF[value]}, and measure that folder: recover measure FOLDER --tasks ..."
            )
        return value

    @model_validator(mode="after")
    def _beside_something(self) -> Deploy:
        if self.beside is not None and self.quantize is None:
            raise ValueError("beside needs a file to stand beside: give quantize too, such as q8_0, or leave it out")
        return self

    @model_validator(mode="after")
    def _importance_of_something(self) -> Deploy:
        if self.importance and self.quantize in (None, "q8_0"):
            raise ValueError(
                f"importance: true with quantize: {self.quantize or 'null'}: nothing is rounded by it there; give a "
                "type below 8 bits, such as q4_k_m, or leave importance out"
            )
        if self.calibration is not None and not self.weighed:
            raise ValueError(
                f"calibration is text for importance, which quantize: {self.quantize or 'null'} and importance: "
                f"{json.dumps(self.importance)} leave out: set importance: true, or leave calibration out"
            )
        return self

    @property
    def weighed(self) -> bool:
        """Whether channels are weighed where there is text to measure them on."""
        by_ggml = self.quantize is not None and "_k" in self.quantize
        return by_ggml if self.importance is None else self.importance


class Recipe(Config):
    """One complete run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of the run directory")
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="of calibration, written text, training order and sampling"
    )
    model: Model
    prune: Prune
    probe: Probe = Probe()
    train: Train
    measure: Measure
    export: Export = Export()
    deploy: Deploy = Deploy()
    track: tuple[str, ...] = Field(
        default=(),
        description="trackers that get losses, rates, generation and the report, as accelerate names them: "
        "tensorboard, wandb, mlflow; a run that goes on is the same run there",
    )

    @model_validator(mode="after")
    def _text_for_importance(self) -> Recipe:
        if self.deploy.importance and self.importance_text is None:
            raise ValueError(
                "deploy.importance: true needs text to measure it on, and the recipe has no prune.calibration: give "
                "deploy.calibration, such as {data: my_text.jsonl}, or leave importance out"
            )
        return self

    @property
    def importance_text(self) -> Calibration | None:
        """The text on which stage `deploy` measures the importance of channels; None where it rounds all alike."""
        text = self.deploy.calibration or getattr(self.prune, "calibration", None)
        return text if self.deploy.weighed else None

    @field_validator("track", mode="before")
    @classmethod
    def _one_name(cls, names: Any) -> Any:
        return (names,) if isinstance(names, str) else names


A_RECIPE = "; `recover init MODEL` writes a recipe, and embedded:quickstart is one that comes with the package"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, or `embedded:NAME`, with `key.path=value` overrides, files in it as absolute paths.

    Raises:
        RecipeError: no such file, not YAML, or every field that is wrong, each with what was meant.
    """
    path = local_path(str(path))
    tree = earlier.sections(yaml_values.read(path, instead=A_RECIPE), str(path))
    place_files(tree, path.parent)
    origins = {}
    for override in overrides:
        key = yaml_values.apply_override(tree, earlier.override(override))
        place_files(tree, Path.cwd(), within=key)
        origins[key] = f"override '{override}'"
    return parse_recipe(tree, str(path), origins)


def parse_recipe(mapping: Mapping[str, Any], where: str, origins: Mapping[str, str] | None = None) -> Recipe:
    """The recipe in a mapping; RecipeError has a line for each wrong field and its place (`origins`, `where`)."""
    try:
        return Recipe.model_validate(mapping)
    except ValidationError as error:
        raise RecipeError("\n".join(explain(error, Recipe, where, origins or {}))) from None


def completed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of a recipe that an earlier version wrote, with the fields that came later: each has its default.

    What is no section, or none of now, stays as it is.
    """
    found = dict(fields)
    for name, field in Recipe.model_fields.items():
        if name in found:
            section: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, field])  # pyright: ignore[reportArgumentType, reportInvalidTypeForm]
            with suppress(ValidationError):
                found[name] = section.dump_python(section.validate_python(found[name]), mode="json")
    return found


def embedded(name: str) -> Path:
    """The file or folder `embedded:NAME` that is shipped with the package; tasks and recipes by their bare names.

    Raises:
        RecipeError: there is none of this name; the message lists what there is.
    """
    root = Path(__file__).parents[1] / "embedded"
    for path in (root / name, root / "tasks" / f"{name}.yaml", root / "recipes" / f"{name}.yaml"):
        if name and ".." not in path.parts and path.is_relative_to(root) and os.path.exists(path):
            return path
    there = sorted([path.name for path in root.glob("*")] + [path.stem for path in root.glob("*/*.yaml")])
    raise RecipeError(f"embedded:{name}: not shipped with the package. There are: {', '.join(there) or 'none'}")


def local_path(source: str) -> Path:
    """Where a source lies that is no hub id: the shipped file of `embedded:NAME`, else the path that it is."""
    name = source.removeprefix("embedded:")
    return Path(source) if name == source else embedded(name)


def dump_recipe(recipe: Recipe) -> str:
    """YAML that `load_recipe` reads back as an equal recipe, defaults written out."""
    return yaml_values.dump(recipe.model_dump(mode="json"))


def ending(name: str) -> str:
    """The ending of `ROWS` that a name has, in small letters, without `.gz`; else nothing."""
    small = name.lower()
    return next((found.removesuffix(".gz") for found in ROWS if small.endswith(found)), "")


def place_files(tree: JsonObject, folder: Path, *, within: str = "") -> None:
    """Make relative files in an unchecked recipe absolute, as seen from `folder`.

    `within` limits it to one dotted field and what is below. A hub id and `embedded:NAME` stay what they are.
    """
    given = within.split(".") if within else []
    for field in FIELDS:
        steps = field.split(".")
        if all(step in ("*", key) for step, key in zip(steps, given, strict=False)):
            absolute = partial(_absolute, folder=folder, file=field in FOLDERS)
            _change(tree, [*given[: len(steps)], *steps[len(given) :]], absolute)


def without_folders(tree: JsonObject) -> JsonObject:
    """A copy of a recipe's tree in which files are named without the folders of the machine they lie on."""
    shown = copy.deepcopy(tree)
    for field in FIELDS:
        _change(shown, field.split("."), lambda name: os.path.basename(name) if os.path.isabs(name) else name)
    return shown


def _change(node: Any, steps: Sequence[str], change: Callable[[str], str]) -> None:
    """Put what `change` gives in place of every text that lies there; `*` is any key of a list."""
    step, *rest = steps
    keys: list[Any] = []
    if isinstance(node, list):
        keys = [index for index in range(len(node)) if step in ("*", str(index))]
    elif isinstance(node, dict) and step in node:
        keys = [step]
    for key in keys:
        if rest:
            _change(node[key], rest, change)
        elif isinstance(node[key], str):
            node[key] = change(node[key])


def _absolute(name: str, folder: Path, *, file: bool) -> str:
    if not name or name.startswith("embedded:"):
        return name
    path = os.path.abspath(os.path.join(folder, os.path.expanduser(name)))
    file_like = file or name.startswith((".", "/", "~")) or os.path.splitext(name)[1] in SUFFIXES
    return path if file_like or os.path.exists(path) else name
