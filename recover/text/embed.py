"""Texts as vectors: a language model used as an embedder.

Legend: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recover.base import console
from recover.base.errors import ModelError
from recover.text.generate import context_of, evaluating, stock
from recover.text.prompts import batches_by_length, left_pad, text_ids


def embeddings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    length: int,
    batch_size: int,
    title: str = "embed",
) -> list[np.ndarray]:
    """One float32 vector of length 1 per text: the mean over its tokens of the last hidden state, after the final norm.

    `length`: tokens read of each text.

    Raises:
        ModelError: a vector is not finite.
    """
    inner: Any = stock(model)
    length = min(length, context_of(inner) or length)
    rows = [text_ids(tokenizer, text, special=True)[:length] for text in texts]
    found: dict[int, np.ndarray] = {}
    with torch.no_grad(), evaluating(inner):
        for batch in console.track(batches_by_length(list(map(len, rows)), batch_size), title, unit="batch"):
            vectors_BD = _pooled(inner, [rows[item] for item in batch])
            if not torch.isfinite(vectors_BD).all():
                raise ModelError(
                    f"{title}: the model gives hidden states that are not finite; its weights may hold NaN"
                )
            found.update(zip(batch, vectors_BD.cpu().numpy(), strict=True))
    return [found[item] for item in range(len(texts))]


def _pooled(model: Any, rows: list[list[int]]) -> torch.Tensor:
    ids_BT, mask_BT = left_pad(rows, 0, model.device)
    position_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    body = getattr(model, model.base_model_prefix)
    hidden_BTD = body(
        input_ids=ids_BT, attention_mask=mask_BT, position_ids=position_BT, use_cache=False
    ).last_hidden_state
    # Padding is left out by choice, not by a factor of 0: what stands there need not be finite.
    mean_BD = hidden_BTD.float().masked_fill(~mask_BT.bool()[..., None], 0.0).sum(1) / mask_BT.sum(-1, keepdim=True)
    return torch.nn.functional.normalize(mean_BD, dim=-1)
