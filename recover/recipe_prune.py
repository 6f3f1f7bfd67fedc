"""The part of a recipe that says how the model is pruned: one leaf a `kind`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from recover.leaf import Leaf

Pattern = Literal["unstructured", "2:4", "4:8"]


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
