"""What `recover.cache` takes on disk, from the recipe and the model's configuration alone."""

from __future__ import annotations

import shutil
from pathlib import Path

from recover.base.errors import RecipeError
from recover.config.recipe import Recipe
from recover.models.load import Description

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def cache_bytes(recipe: Recipe, model: Description) -> int:
    """At least so many: width x bytes of a number for each scored token, once more with the prefix.

    A prefix holds positions without loss too (prompts, unless `loss.scored` is all), which only the text can tell.
    """
    cfg = recipe.recover
    if cfg.cache is None:
        return 0
    return cfg.tokens * model.width * ELEMENT_BYTES[recipe.model.dtype] * (1 + cfg.cache.prefix)


def refuse_cache(recipe: Recipe, model: Description) -> None:
    """Raise RecipeError where the disk has no room. What lies in the folder already counts as part of what is needed.

    Training refuses again, by the text itself, before it computes anything.
    """
    cfg = recipe.recover.cache
    if cfg is None:
        return
    folder = Path(cfg.folder).absolute()
    there = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    needed = cache_bytes(recipe, model)
    if needed > free + there:
        raise RecipeError(
            f"recover.cache.folder: {folder} needs at least {needed:,} bytes, and has {there:,} of them and {free:,} "
            "free: make room, name another folder, lower recover.tokens, or leave recover.cache out"
        )
