"""The text that pruning is measured on: given, or written by the dense model after given prompts.

prune/written-<fingerprint>.jsonl   the ids of some prompts, each with its answer
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from typing import TYPE_CHECKING

from recover.base.artifacts import read_jsonl, write_text
from recover.run.context import RunContext

if TYPE_CHECKING:
    from torch import LongTensor


def calibration(context: RunContext) -> list[LongTensor]:
    """The batches of `prune.calibration`, none without one. What the dense model wrote before is read, not written.

    Raises DataError for text that cannot be used, and for a prompt that leaves no room for an answer.
    """
    from recover.prune.calibrate import calibration_batches

    cfg = getattr(context.recipe.prune, "calibration", None)
    if cfg is None or cfg.answer is None:
        return context.calibration
    return calibration_batches(cfg, context.tokenizer, context.recipe.seed, partial(answered, context, cfg.answer))


def answered(context: RunContext, tokens: int, prompts: list[str]) -> list[list[int]]:
    """The ids of each prompt and of up to `tokens` that the dense model writes after it, greedily."""
    from recover.text.generate import generate
    from recover.text.prompts import encode_prompt
    from recover.train.dense_text import weights_fingerprint

    twin, tokenizer = context.dense(), context.tokenizer
    asked = [list(encode_prompt(tokenizer, prompt)) for prompt in prompts]
    made = json.dumps([weights_fingerprint(twin), context.recipe.model.dtype, tokens, asked])
    path = context.directory.prune / f"written-{hashlib.sha256(made.encode()).hexdigest()[:16]}.jsonl"
    if path.exists():
        return read_jsonl(path)
    size, title = min(len(prompts), context.recipe.measure.batch_size), "dense model writes calibration text"
    with twin.dense() as dense:
        texts = generate(dense, tokenizer, prompts, max_new_tokens=tokens, batch_size=size, title=title)
    rows = [[*prompt, *text.ids] for prompt, text in zip(asked, texts, strict=True)]
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))
    return rows
