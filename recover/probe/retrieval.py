"""A model used as an embedder: do its pooled hidden states still rank documents as the dense model's do?

Rows of the file: {"query": "...", "documents": ["...", ...], "relevant": [0, 3]}; `relevant` may be left out.

Shapes: B batch, T tokens, D width, E texts, G documents of one query.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recover.base import console, dist
from recover.base.errors import DataError, ModelError
from recover.maths import divergence as spaces
from recover.maths.score import ndcg
from recover.models.twin import Twin
from recover.probe.records import Retrieval
from recover.probe.trajectory import Batch, batches_of, check_ids, positions
from recover.probe.views import Pair, View, hidden_states, running
from recover.text.prompts import text_ids
from recover.text.read import rows_at

POOLINGS = ("last", "mean")


@dataclasses.dataclass(frozen=True)
class Query:
    """One query, its documents, and which of them are relevant (None: the file does not say)."""

    query: str
    documents: tuple[str, ...]
    relevant: tuple[int, ...] | None = None


def read_queries(path: Path) -> list[Query]:
    """Every row of the file. Raises DataError: it cannot be read, is empty, or by line, what is wrong with a row."""
    found = [_query(row.where, row.value) for row in rows_at(str(path))]
    if not found:
        raise DataError(
            f"{path}: holds no rows, expected lines such as {{'query': '...', 'documents': ['...', '...']}}"
        )
    return found


def _query(where: str, row: Any) -> Query:
    documents = row.get("documents") if isinstance(row, dict) else None
    if not isinstance(documents, list) or len(documents) < 2 or not all(isinstance(x, str) and x for x in documents):
        raise DataError(f"{where}: 'documents': found {documents!r}, expected a list of two or more texts")
    query, relevant = row.get("query"), row.get("relevant")
    if not isinstance(query, str) or not query:
        raise DataError(f"{where}: 'query': found {query!r}, expected a text")
    if relevant is None:
        return Query(query, tuple(documents))
    if not isinstance(relevant, list) or not relevant or not all(i in range(len(documents)) for i in relevant):
        raise DataError(f"{where}: 'relevant': found {relevant!r}, expected indices from 0 to {len(documents) - 1}")
    return Query(query, tuple(documents), tuple(relevant))


def retrieval_drift(
    twin: Twin | Pair,
    tokenizer: Any,
    queries: Sequence[Query],
    *,
    task: str | None = None,
    length: int | None = None,
    batch_size: int = 16,
) -> list[Retrieval]:
    """One record for each way of pooling (last token, mean), the same on every process.

    `length`: tokens read of each text; None: all.

    Raises:
        DataError: no queries, or a text that is empty or too long for a model.
        ModelError: embeddings that are not finite, naming the text.
    """
    pair = Pair.of(twin)
    if not queries:
        raise DataError("no queries to retrieve with")
    texts = list(dict.fromkeys(text for each in queries for text in (each.query, *each.documents)))
    ids = [text_ids(tokenizer, text, special=True)[:length] for text in texts]
    check_ids(ids, pair.pruned, steps=0)
    batches = batches_of(ids, pair.dense, size=batch_size, steps=0)
    embedded = {view.name: _embed(view, batches, texts) for view in (pair.dense, pair.pruned)}
    place = {text: number for number, text in enumerate(texts)}
    return [
        _record(pooling, task, queries, place, *(embedded[view.name][pooling] for view in (pair.dense, pair.pruned)))
        for pooling in POOLINGS
    ]


def _embed(view: View, batches: list[Batch], texts: list[str]) -> dict[str, Tensor]:
    parts = dist.over(
        batches, lambda mine: [_pooled(view, batch) for batch in console.track(mine, f"embed, {view.name}")]
    )
    found = {pooling: torch.cat([part[pooling] for part in parts]) for pooling in POOLINGS}
    for value_ED in found.values():
        bad_E = ~torch.isfinite(value_ED).all(-1)
        if bad_E.any():
            text = texts[int(bad_E.nonzero()[0])]
            raise ModelError(
                f"the {view.name} view gives an embedding that is not finite for {text[:60]!r}: load the model in "
                "float32 or bfloat16; if it stays so, its weights are damaged"
            )
    return found


def _pooled(view: View, batch: Batch) -> dict[str, Tensor]:
    """Padding is on the left: the last column is the last token of every text."""
    weight_BT1 = batch.mask_BT[..., None].double() / batch.mask_BT.sum(-1)[:, None, None]
    found: dict[str, Tensor] = {}

    def pool(h_BTD: Tensor) -> Tensor:
        found["last"] = h_BTD[:, -1].double().cpu()
        # where, not a product alone: a NaN on padding times 0 stays a NaN
        found["mean"] = torch.where(weight_BT1 > 0, h_BTD.double() * weight_BT1, 0).sum(1).cpu()
        return h_BTD[:, -1]

    with running(view) as model, hidden_states(view, pool):
        model(
            input_ids=batch.ids_BT,
            attention_mask=batch.mask_BT,
            position_ids=positions(batch.mask_BT),
            use_cache=False,
            logits_to_keep=1,
        )
    return found


def _record(
    pooling: str,
    task: str | None,
    queries: Sequence[Query],
    place: dict[str, int],
    dense_ED: Tensor,
    pruned_ED: Tensor,
) -> Retrieval:
    correlation, order, first = [], [], []
    relevance: dict[str, list[float]] = {"dense": [], "pruned": []}
    for each in queries:
        rows = [place[text] for text in each.documents]
        scores = {
            name: torch.nn.functional.cosine_similarity(x_ED[place[each.query]][None], x_ED[rows])
            for name, x_ED in (("dense", dense_ED), ("pruned", pruned_ED))
        }
        correlation.append(rank_correlation(scores["dense"], scores["pruned"]))
        order.append(ndcg_of(scores["pruned"], gains_of(scores["dense"])))
        first.append(int(scores["dense"].argmax() == scores["pruned"].argmax()))
        if each.relevant is not None:
            gain_G = torch.zeros(len(rows), dtype=torch.float64)
            gain_G[list(each.relevant)] = 1
            for name, score_G in scores.items():
                relevance[name].append(ndcg_of(score_G, gain_G))
    shapes = dense_ED.shape == pruned_ED.shape
    embedding_E = spaces.one_minus_cosine(dense_ED, pruned_ED) if shapes else torch.empty(0)
    return Retrieval(
        pooling,
        len(queries),
        sum(len(each.documents) for each in queries),
        spaces.quantiles(embedding_E),
        spaces.quantiles(correlation),
        spaces.quantiles(order),
        sum(first) / len(first),
        {name: spaces.quantiles(values) for name, values in relevance.items()} if relevance["dense"] else None,
        task,
    )


def ranks(score_G: Tensor) -> Tensor:
    """Rank of each score from the smallest, 0 first; equal scores share the mean of their ranks."""
    below_G = (score_G[None, :] < score_G[:, None]).sum(-1)
    equal_G = (score_G[None, :] == score_G[:, None]).sum(-1)
    return below_G.double() + (equal_G - 1).double() / 2


def rank_correlation(first_G: Tensor, second_G: Tensor) -> float:
    """Spearman's: Pearson's correlation of the ranks. Scores all equal have no order: 1 if both are, else 0."""
    a_G, b_G = (ranks(x_G) - (len(x_G) - 1) / 2 for x_G in (first_G, second_G))
    length = a_G.norm() * b_G.norm()
    if length == 0:
        return float(torch.equal(a_G, b_G))
    return float((a_G @ b_G) / length)


def gains_of(score_G: Tensor) -> Tensor:
    """The dense ranking as graded relevance, from 0 for its last document to 1 for its first."""
    return ranks(score_G) / (len(score_G) - 1)


def ndcg_of(score_G: Tensor, gain_G: Tensor) -> float:
    """nDCG@10 of the ranking by score."""
    return ndcg(gain_G[torch.argsort(score_G, descending=True, stable=True)].tolist())
