"""A recipe is one complete run, in YAML: every field typed, unknown fields refused, no torch.

recipe = load_recipe("recipes/quickstart.yaml", ["recover.lr=1e-3", "prune.count=3"])
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from recover import strict_yaml
from recover.errors import RecipeError
from recover.places import place_files
from recover.problems import explain

Dtype = Literal["float32", "bfloat16", "float16"]
Pattern = Literal["unstructured", "2:4", "4:8"]


class Leaf(BaseModel):
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


class Model(Leaf):
    """The dense model: a hub id, a local folder, a GGUF file, or `embedded:NAME` (shipped with the package)."""

    source: str
    revision: str | None = Field(default=None, description="of a hub model: branch, tag or commit")
    tokenizer: str | None = Field(default=None, description="where the tokenizer lies, if not beside the model")
    dtype: Dtype = "float32"
    attention: Literal["sdpa", "eager"] = "sdpa"
    trust_remote_code: bool = Field(default=False, description="run code that a hub model brings; said aloud when on")


class Calibration(Leaf):
    """Text on which scores are measured: a JSONL (`text` column), a text file, or a hub data set."""

    data: str
    split: str = Field(default="train", description="of a hub data set")
    column: str = "text"
    samples: int = Field(default=64, ge=1, description="sequences of `length` tokens")
    length: int = Field(default=512, ge=8, description="tokens a sample, capped here and not by the model's context")
    batch_size: int = Field(default=8, ge=1)


class Depth(Leaf):
    """Drop whole blocks: `count` chosen by `score`, or the listed `blocks`."""

    kind: Literal["depth"]
    unit: Literal["block"] = "block"
    count: int | None = Field(default=None, ge=1, description="how many go, chosen by `score`")
    blocks: tuple[int, ...] | None = Field(default=None, description="which go, from 0; block 0 stays")
    score: Literal["kl", "angular", "block_influence"] = "kl"
    contiguous: bool = Field(default=False, description="drop one run of neighbours")
    calibration: Calibration | None = None

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Depth:
        if (self.count is None) == (self.blocks is None):
            raise ValueError("give either 'count' (and a score) or 'blocks', not both and not neither")
        if self.count is not None and self.calibration is None:
            raise ValueError("'count' needs 'calibration': scores are measured on text")
        if self.blocks is not None and (not self.blocks or len(set(self.blocks)) != len(self.blocks)):
            raise ValueError(f"'blocks' must name at least one block and none twice, found {list(self.blocks)}")
        return self


class Sparsity(Leaf):
    """Weights set to zero inside the linear layers of every block; `pattern` N:M keeps N of M consecutive inputs."""

    pattern: Pattern = "unstructured"
    sparsity: float | None = Field(default=None, gt=0, lt=1, description="fraction of weights set to zero")

    @model_validator(mode="after")
    def _sparsity_or_pattern(self) -> Sparsity:
        if self.pattern == "unstructured" and self.sparsity is None:
            raise ValueError("'sparsity' is needed, a fraction between 0 and 1 (or give pattern: '2:4')")
        if self.pattern != "unstructured" and self.sparsity not in (None, 0.5):
            raise ValueError(
                f"pattern {self.pattern} fixes sparsity at 0.5, found {self.sparsity}: leave 'sparsity' out"
            )
        return self

    @property
    def fraction(self) -> float:
        """Fraction of weights that become zero."""
        return 0.5 if self.sparsity is None else self.sparsity


class Magnitude(Sparsity):
    kind: Literal["magnitude"]


class Wanda(Sparsity):
    kind: Literal["wanda"]
    calibration: Calibration


Prune = Annotated[Depth | Magnitude | Wanda, Field(discriminator="kind")]


class Probe(Leaf):
    """How drift is measured in the three spaces (theory: `docs/theory.md`)."""

    prompts: str | None = Field(
        default=None, description="JSONL with a `prompt` column; default: prompts of the generate tasks"
    )
    samples: int = Field(default=32, ge=1)
    steps: int = Field(default=48, ge=1, description="decoding steps along the dense model's own trajectory")
    temperatures: tuple[float, ...] = (0.5, 1.0, 2.0)
    batch_size: int = Field(default=16, ge=1)

    @field_validator("temperatures")
    @classmethod
    def _positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values or min(values) <= 0:
            raise ValueError(f"temperatures must be greater than 0, found {list(values)}")
        return values


class DenseText(Leaf):
    """Text that the dense model writes itself, from prompts (JSONL, `prompt` column)."""

    kind: Literal["dense"]
    prompts: str
    share: float = Field(default=1.0, gt=0, description="part of the tokens, relative to the other sources")
    temperature: float = Field(default=1.0, ge=0, description="0 = greedy")
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=256, ge=1)
    chat: bool | None = Field(
        default=None, description="wrap prompts in the chat template; default: if the tokenizer has one"
    )
    batch_size: int = Field(default=64, ge=1)


class GivenText(Leaf):
    """A `datasets` source: hub id, `.jsonl`, `.parquet` or `.txt` file."""

    kind: Literal["given"]
    source: str
    split: str = "train"
    columns: dict[Literal["text", "prompt", "completion", "messages"], str] = {"text": "text"}
    share: float = Field(default=1.0, gt=0)


Data = Annotated[DenseText | GivenText, Field(discriminator="kind")]


class Lora(Leaf):
    rank: int = Field(default=16, ge=1)
    alpha: float | None = Field(default=None, gt=0, description="default: 2 x rank")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    blocks: Literal["all", "after_cut"] = Field(
        default="all",
        description="after_cut: only behind the first dropped block; what lies before runs once for both views",
    )


class Loss(Leaf):
    """Weights of the terms; T = temperature; every term is multiplied by T^2 but CE (Hinton's convention)."""

    kl: float = Field(default=1.0, ge=0, description=r"KL(dense \|\| pruned)")
    variance: float = Field(default=0.0, ge=0, description="Var_p(dz) / 2T^2, its second-order form")
    reverse_kl: float = Field(default=0.0, ge=0, description=r"KL(pruned \|\| dense)")
    ce: float = Field(default=0.0, ge=0, description="cross-entropy on the text itself")
    temperature: float = Field(default=1.0, gt=0)
    scored: Literal["completion", "all"] = Field(default="completion", description="which positions carry loss")
    chunk: int = Field(default=1024, ge=1, description="token positions scored at once; a matter of memory only")

    @model_validator(mode="after")
    def _something_to_learn(self) -> Loss:
        if self.kl + self.variance + self.reverse_kl + self.ce == 0:
            raise ValueError("all loss weights are 0: nothing would be learnt")
        if self.variance > 0 and self.kl + self.reverse_kl + self.ce == 0:
            raise ValueError("variance alone is blind to tokens that the student raises: give 'kl' a weight beside it")
        return self


class Recover(Leaf):
    """LoRA distillation from the dense model; the checkpoint that generates best is kept."""

    epochs: int = Field(default=3, ge=1, description="equal parts of the tokens; generation is measured after each")
    tokens: int = Field(default=200_000, ge=1, description="teacher-scored tokens over all epochs")
    data: tuple[Data, ...] = Field(min_length=1)
    length: int = Field(default=512, ge=8, description="longest sequence, in tokens")
    batch_size: int = Field(default=16, ge=1, description="sequences per optimizer step, over all processes")
    micro_batch_size: int | None = Field(
        default=None, ge=1, description="sequences a process holds at once; default: all of its share"
    )
    lora: Lora = Lora()
    loss: Loss = Loss()
    lr: float = Field(default=2e-4, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps")
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    gradient_checkpointing: bool = Field(default=False, description="less memory, about a third more time")
    patience: int | None = Field(
        default=None, ge=1, description="stop after so many epochs without better generation; default: never"
    )
    save_steps: int | None = Field(
        default=None, ge=1, description="steps between checkpoints to resume from; default: each epoch"
    )


class Sampling(Leaf):
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=0.95, gt=0, le=1)


class Measure(Leaf):
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


class Export(Leaf):
    dtype: Dtype | None = Field(default=None, description="default: the model's")
    max_shard_size: str = "5GB"


class Recipe(Leaf):
    """One complete run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of the run directory")
    seed: int = Field(default=0, ge=0, description="of calibration, written text, training order and sampling")
    model: Model
    prune: Prune
    probe: Probe = Probe()
    recover: Recover
    measure: Measure
    export: Export = Export()


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `key.path=value` overrides, files in it as absolute paths.

    Raises:
        RecipeError: no such file, not YAML, or every field that is wrong, each with what was meant.
    """
    path = Path(path)
    tree = strict_yaml.read(path)
    place_files(tree, path.parent)
    origins = {}
    for override in overrides:
        key = strict_yaml.apply_override(tree, override)
        place_files(tree, Path.cwd(), within=key)
        origins[key] = f"override '{override}'"
    return parse_recipe(tree, str(path), origins)


def parse_recipe(mapping: Mapping[str, Any], where: str, origins: Mapping[str, str] | None = None) -> Recipe:
    """The recipe in a mapping; RecipeError has a line for each wrong field and its place (`origins`, `where`)."""
    try:
        return Recipe.model_validate(mapping)
    except ValidationError as error:
        raise RecipeError("\n".join(explain(error, Recipe, where, origins or {}))) from None


def embedded(name: str) -> Path:
    """The file or folder `embedded:NAME` that is shipped with the package; a task needs no folder and no suffix.

    Raises:
        RecipeError: there is none of this name; the message lists what there is.
    """
    root = Path(__file__).parent / "embedded"
    for path in (root / name, root / "tasks" / f"{name}.yaml"):
        if name and ".." not in path.parts and path.is_relative_to(root) and os.path.exists(path):
            return path
    there = sorted([path.name for path in root.glob("*")] + [path.stem for path in root.glob("tasks/*.yaml")])
    raise RecipeError(f"embedded:{name}: not shipped with the package. There are: {', '.join(there) or 'none'}")


def dump_recipe(recipe: Recipe) -> str:
    """YAML that `load_recipe` reads back as an equal recipe, defaults written out."""
    return strict_yaml.dump(recipe.model_dump(mode="json"))
