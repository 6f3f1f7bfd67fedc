"""What every part of a recipe is: typed, unknown fields refused, frozen; no torch."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, model_validator

Dtype = Literal["float32", "bfloat16", "float16"]


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
