"""A retrieval task: do pooled hidden states put the relevant document first?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from recover.base.errors import DataError
from recover.config.tasks import RetrievalFile, Row
from recover.maths.score import cumulated_gain, interval95, mean, ndcg
from recover.measure.model import Generations, Measured, ModelUnderTest, Record, Work
from recover.text.read import listed
from recover.text.rows import column


@dataclass(frozen=True)
class Search:
    """One item of a retrieval task; `relevant` are indices of documents."""

    query: str
    documents: tuple[str, ...]
    relevant: tuple[int, ...]


def _search(file: RetrievalFile, row: Row, where: str) -> Search:
    query, documents = column(row, file.query, where), listed(column(row, file.documents, where))
    if file.candidates == "all" and isinstance(documents, str):
        documents, relevant = [documents], [0]
    else:
        found = listed(column(row, file.relevant, where))
        numbers = found if isinstance(found, list) else [found]
        relevant = [int(at) if str(at).isdecimal() and not isinstance(at, bool) else at for at in numbers]
    if not isinstance(query, str) or not query.strip():
        raise DataError(f"{where}: column '{file.query}': found {query!r}, expected a text")
    least = 2 if file.candidates == "own" else 1
    texts = isinstance(documents, list) and all(isinstance(each, str) and each.strip() for each in documents)
    if not texts or len(documents) < least:
        raise DataError(f"{where}: column '{file.documents}': found {documents!r}, expected a list of {least}+ texts")
    if not relevant or any(isinstance(at, bool) or at not in range(len(documents)) for at in relevant):
        raise DataError(
            f"{where}: column '{file.relevant}': found {relevant!r}, expected indices from 0 to {len(documents) - 1}"
        )
    return Search(query, tuple(documents), tuple(relevant))


def _together(file: RetrievalFile, items: list[Search]) -> list[Search]:
    """`candidates: all`: each query among the documents of all of them, each text once."""
    if file.candidates != "all":
        return items
    documents = tuple(dict.fromkeys(text for item in items for text in item.documents))
    place = {text: index for index, text in enumerate(documents)}
    if len(documents) < 2:
        raise DataError("candidates: all, but all rows have the same document: nothing is ranked")
    return [
        replace(item, documents=documents, relevant=tuple(sorted({place[item.documents[at]] for at in item.relevant})))
        for item in items
    ]


def measure_retrieval(
    model: ModelUnderTest, file: RetrievalFile, items: Sequence[Search], _reference: Generations | None = None
) -> Measured:
    """Record of a retrieval task. `score`: mean nDCG@10; `accuracy`: how often a relevant document comes first.

    Equal cosines count against the model: one for which all texts are alike ranks every relevant document last.
    """
    texts = list(dict.fromkeys(text for item in items for text in (item.query, *item.documents)))
    vectors = dict(zip(texts, model.embed(texts, length=file.length, title=f"task {file.name}"), strict=True))
    rankings = [_ranking(vectors, item) for item in items]
    scores = [ndcg([at in item.relevant for at in ranking]) for ranking, item in zip(rankings, items, strict=True)]
    first = [float(ranking[0] in item.relevant) for ranking, item in zip(rankings, items, strict=True)]
    record = {
        "kind": "retrieval",
        "items": len(items),
        "score": mean(scores),
        "interval95": interval95(scores),
        "accuracy": mean(first),
        "accuracy_interval95": interval95(first),
        "chance": mean([chance_ndcg(len(item.documents), len(item.relevant)) for item in items]),
        "each": scores,
        "samples": _samples(items, rankings)[: model.cfg.samples],
    }
    return Measured(record)


def _ranking(vectors: dict[str, np.ndarray], item: Search) -> list[int]:
    """Documents from near to far; of equally near ones the relevant come last."""
    near = [float(vectors[item.query] @ vectors[document]) for document in item.documents]
    return sorted(range(len(near)), key=lambda at: (-near[at], at in item.relevant))


def chance_ndcg(documents: int, relevant: int) -> float:
    """What a random ranking reaches in the mean."""
    return relevant / documents * cumulated_gain([1] * documents) / cumulated_gain([1] * relevant)


def _samples(items: Sequence[Search], rankings: Sequence[Sequence[int]]) -> list[Record]:
    return [
        {
            "prompt": item.query,
            "text": item.documents[ranking[0]],
            "expected": item.documents[item.relevant[0]],
            "correct": ranking[0] in item.relevant,
        }
        for item, ranking in zip(items, rankings, strict=True)
    ]


WORK = Work(_search, measure_retrieval, together=_together, asked=lambda _file, item: item.query)
