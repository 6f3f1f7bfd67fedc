"""The record of a retrieval task: do pooled hidden states put the relevant document first?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from recover.config.tasks import RetrievalFile, Search
from recover.maths.score import cumulated_gain, interval95, mean, ndcg
from recover.measure.subject import Subject

Record = dict[str, Any]


def measure_retrieval(subject: Subject, file: RetrievalFile, items: Sequence[Search]) -> Record:
    """Record of a retrieval task. `score`: mean nDCG@10; `accuracy`: how often a relevant document comes first.

    Equal cosines count against the model: one for which all texts are alike ranks every relevant document last.
    """
    texts = list(dict.fromkeys(text for item in items for text in (item.query, *item.documents)))
    vectors = dict(zip(texts, subject.embeds(texts, length=file.length, title=f"task {file.name}"), strict=True))
    rankings = [_ranking(vectors, item) for item in items]
    scores = [ndcg([at in item.relevant for at in ranking]) for ranking, item in zip(rankings, items, strict=True)]
    first = [float(ranking[0] in item.relevant) for ranking, item in zip(rankings, items, strict=True)]
    return {
        "kind": "retrieval",
        "items": len(items),
        "score": mean(scores),
        "interval95": interval95(scores),
        "accuracy": mean(first),
        "accuracy_interval95": interval95(first),
        "chance": mean([chance_ndcg(len(item.documents), len(item.relevant)) for item in items]),
        "samples": _samples(items, rankings)[: subject.cfg.samples],
    }


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
