"""What a search of depth pruning notes: a record for every candidate, and which were chosen in the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from recover.base.errors import PruneError
from recover.models.site import Site
from recover.prune.depth_scores import Span


class Choice(NamedTuple):
    """What goes, and every candidate of every round: `{round, blocks, parts, score, by, chosen}`."""

    sites: frozenset[Site]
    scores: list[dict[str, Any]]


def record_of(number: int, span: Span, score: float, by: str) -> dict[str, Any]:
    """A candidate of round `number`, not chosen yet. Raises PruneError for a score that is not finite."""
    blocks, parts = list(dict.fromkeys(site.block for site in span)), [str(site) for site in span]
    if not math.isfinite(score):
        where = f"prune: the {by} score of blocks {blocks} ({', '.join(parts)}) is {score}"
        raise PruneError(f"{where}. Check the weights, or use model.dtype: float32")
    return {"round": number, "blocks": blocks, "parts": parts, "score": score, "by": by, "chosen": False}


def lowest(records: Sequence[dict[str, Any]], count: int) -> list[int]:
    """Mark the `count` records of lowest score as chosen (on ties the first); their indices, ascending."""
    indices = sorted(range(len(records)), key=lambda index: records[index]["score"])[:count]
    return marked(records, sorted(indices))


def marked(records: Sequence[dict[str, Any]], chosen: list[int]) -> list[int]:
    """Mark the records of these indices as chosen; the indices."""
    for index in chosen:
        records[index]["chosen"] = True
    return chosen


def chosen_of(records: Sequence[dict[str, Any]]) -> list[int]:
    """Indices of the records that are marked, ascending."""
    return [index for index, record in enumerate(records) if record["chosen"]]
