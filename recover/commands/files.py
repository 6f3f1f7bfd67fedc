"""Files that a model is written to for use elsewhere.

`recover teacher`: the likeliest tokens that a model gives each position of a text, in a file to distil from. `recover
gguf`: an exported checkpoint as one file for llama.cpp.

Legend: B batch, T tokens, N scored positions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recover.base import console
from recover.base.artifacts import writing
from recover.base.console import quiet_libraries
from recover.base.errors import DataError, RecipeError
from recover.commands.measure import model_cfg
from recover.config.recipe import Calibration, GivenText, Model
from recover.distill.distiller import scored_rows
from recover.distill.loss_terms import TopK, topk_of
from recover.export.gguf.importance import Importance, importance_of, read_importance
from recover.export.gguf.write import require_ggml, weighs, write_gguf
from recover.models.arch import head_of
from recover.models.attention import row_positions
from recover.models.load import check_fit, describe, load_any, load_model, load_tokenizer, ready
from recover.prune.calibrate import calibration_batches
from recover.report.words import shown_source
from recover.train.data import collator
from recover.train.sources import Row, Sample, SampleRow, read_rows, samples_of
from recover.train.teacher_file import Marks, TeacherRow, file_row, marks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 1024  # positions whose logits are held at once


def write_teacher(
    model: str, dtype: str | None, text: str, path: Path, *, top: int, length: int, batch_size: int
) -> tuple[int, int]:
    """Write `path`, whole or not at all; (rows, positions) in it. The rows are those that training cuts the text into.

    Raises:
        RecipeError: more tokens asked for than there are. DataError, ModelError: text or model cannot be used.
        ArtifactError: the file could not be written.
    """
    quiet_libraries()
    cfg = model_cfg(model, dtype)
    rows, tokenizer = read_rows(text), load_tokenizer(cfg)
    own = marks(tokenizer)
    samples: list[Sample] = []
    of_sample: list[Marks] = []
    for row in rows:
        cfg_row = _given(text, row)
        found = samples_of(row, cfg_row, tokenizer, length)
        samples += found
        of_sample += [own if "text" not in cfg_row.columns else _without_template(own)] * len(found)
    loaded = load_any(cfg)
    check_fit(loaded, tokenizer)
    tokens = len(tokenizer)  # a head may have more rows, for padding, and another model of the family fewer
    if top > tokens:
        raise RecipeError(f"--top: {top} tokens, the tokenizer has {tokens}")
    starts = console.track(range(0, len(samples), batch_size), "teacher reads", unit="batches")
    done = (row for start in starts for row in teacher_rows(loaded, samples[start : start + batch_size], top, tokens))
    return _write(path, zip(done, of_sample, strict=True))


def _without_template(own: Marks) -> Marks:
    """Of plain text, which no template wrote."""
    return {name: mark for name, mark in own.items() if name != "template"}


def _given(text: str, row: Row) -> GivenText:
    """How a row is to be read, by the columns that it has."""
    names = [("messages",), ("prompt", "completion"), ("text",)]
    found = next((wanted for wanted in names if set(wanted) <= row.value.keys()), ("text",))
    return GivenText(kind="given", source=text, columns={name: name for name in found})  # type: ignore[misc]


@torch.no_grad()
def teacher_rows(
    model: PreTrainedModel, samples: list[Sample], top: int, tokens: int | None = None
) -> list[TeacherRow]:
    """Each sample with the model's top k of the first `tokens`, in one batch."""
    rows: list[SampleRow] = [{"input_ids": sample.ids, "completion_mask": sample.mask} for sample in samples]
    device = next(model.parameters()).device
    padded: Any = collator(0, "completion")(rows)
    batch = {name: value.to(device) for name, value in padded.items()}
    rows_N, _ = scored_rows(batch.pop("labels"))
    batch["position_ids"] = row_positions(batch["attention_mask"])
    base: Any = model.base_model
    h_ND = base(**batch, use_cache=False).last_hidden_state.flatten(0, 1).index_select(0, rows_N)
    head = head_of(model)
    chunks = [topk_of(head.logits(h_CD), top, tokens) for h_CD in h_ND.split(CHUNK)]
    ids_NK, logp_NK = (torch.cat([getattr(chunk, name) for chunk in chunks]).cpu() for name in ("ids_NK", "logp_NK"))
    counts = [sample.scored("completion") for sample in samples]
    parts = zip(samples, ids_NK.split(counts), logp_NK.split(counts), strict=True)
    return [TeacherRow(sample, TopK(ids, logp)) for sample, ids, logp in parts]


def _write(path: Path, rows: Iterator[tuple[TeacherRow, Marks]]) -> tuple[int, int]:
    count = tokens = 0
    with writing(path) as file:
        for row, own in rows:
            file.write(json.dumps(file_row(row, own), allow_nan=False).encode() + b"\n")
            count, tokens = count + 1, tokens + len(row.top)
    return count, tokens


def gguf(deploy: Path, out: Path, dtype: str | None, importance: str | None) -> None:
    """Write an exported checkpoint as one GGUF file, rounded by `importance` (rows of text, or a file of it)."""
    weights = None
    if importance is not None:
        if dtype is None or not weighs(dtype):
            raise RecipeError(
                f"--importance: {dtype or 'a checkpoint that is not quantized'} has no use of it; give --dtype too, "
                "one below 8 bits such as q4_k_m, or leave it out"
            )
        require_ggml(dtype, weighed=True)
        weights = read_importance(Path(importance)) if importance.endswith(".gguf") else _measured(deploy, importance)
    path = write_gguf(deploy, out, dtype, weights)
    console.say(f"wrote {path} ({console.size(path.stat().st_size)})")


def _measured(folder: Path, text: str) -> Importance:
    """The importance of a checkpoint's channels on a text, of 64 samples of up to 512 tokens."""
    cfg, given = Model(source=str(folder)), Calibration(data=text)
    quiet_libraries()
    length = min(given.length, describe(cfg).context or given.length)
    try:
        batches = calibration_batches(given.model_copy(update={"length": length}), load_tokenizer(cfg), seed=0)
    except DataError as error:
        raise DataError(f"--importance {text}: {error}") from error
    return importance_of(ready(load_model(cfg)), batches, shown_source(given.data))
