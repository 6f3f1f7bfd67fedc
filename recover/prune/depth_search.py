"""Which sites go: candidates, rounds, and the records of both that a plan keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import LongTensor

from recover.errors import PruneError
from recover.models.arch import blocks_of
from recover.models.site import PARTS, Site, sites_of
from recover.prune.depth_scores import Score, Span, score_of
from recover.prune.pairs import lowest_apart, pairs_of
from recover.prune.parts import NOWHERE, Part, Parts
from recover.recipe import Depth

if TYPE_CHECKING:
    from recover.models.twin import Twin

# Every round of a search that closes sites runs the model once per candidate. In a model with more units than this,
# only so many candidates, those of lowest block influence, are run (or twice the count, if that is more).
CANDIDATES = 40
NAMES = {"block": "blocks", "attention": "attentions", "mlp": "MLPs", "sublayer": "sublayers", "pair": "pairs"}
CLOSING = ("kl", "variance", "perplexity")


class Choice(NamedTuple):
    """What goes, and every candidate of every round: `{round, blocks, parts, score, by, chosen}`."""

    sites: frozenset[Site]
    scores: list[dict[str, Any]]


def units_of(unit: str, blocks: int) -> list[Span]:
    """Every unit that may go, in the order in which the model runs them: all without the attention of block 0."""
    if unit == "pair":
        return pairs_of(blocks)
    if unit == "block":
        return [tuple(Site(block, part) for part in PARTS) for block in range(1, blocks)]
    sites = [Site(block, part) for block in range(blocks) for part in PARTS if unit in ("sublayer", part)]
    return [(site,) for site in sites if site != Site(0, "attention")]


def most_units(unit: str, blocks: int) -> int:
    """How many units can go at most; pairs overlap, so they are fewer than candidates."""
    return blocks - 1 if unit == "pair" else len(units_of(unit, blocks))


def named_sites(leaf: Depth) -> frozenset[Site]:
    """What `leaf.blocks` or `leaf.sites` names; nothing if the recipe gives a count."""
    if leaf.unit == "block":
        return sites_of(leaf.blocks or ())
    if leaf.unit == "sublayer":
        pairs = (text.split(":") for text in leaf.sites or ())
        return frozenset(Site(int(block), "attention" if part == "attention" else "mlp") for part, block in pairs)
    part = "attention" if leaf.unit == "attention" else "mlp"  # a pair is never named
    return frozenset(Site(block, part) for block in leaf.blocks or ())


def choose(twin: Twin, leaf: Depth, batches: list[LongTensor], parts: Parts = NOWHERE) -> Choice:
    """The `leaf.count` units that matter least by `leaf.score`; on ties the first. Raises PruneError without text.

    Each round of a search is one of the `parts`: those that are there are not measured again.
    """
    assert leaf.count is not None
    if not batches:
        raise PruneError(f"prune.score: '{leaf.score}' is measured on text: give prune.calibration")
    units = units_of(leaf.unit, len(blocks_of(twin.model)))
    if leaf.contiguous:
        units = _runs(leaf, units)
        return _once(score_of(twin, leaf.score, batches), leaf, units, 1, [])
    before: list[dict[str, Any]] = []
    if leaf.score in CLOSING and len(units) >= CANDIDATES:
        pool = min(max(CANDIDATES, 2 * leaf.count), len(units))
        units, before = _least_influence(twin, units, pool, batches, parts)
    score = score_of(twin, leaf.score, batches)
    if leaf.rounds:
        return _greedy(twin, score, leaf, units, before, parts)
    return _once(score, leaf, units, leaf.count, before)


def _runs(leaf: Depth, units: list[Span]) -> list[Span]:
    """All runs of `leaf.count` neighbours; a run of pairs is one of twice as many sublayers."""
    assert leaf.count is not None
    length = leaf.count
    if leaf.unit == "pair":
        units, length = [(site,) for site in sorted({site for pair in units for site in pair})], 2 * leaf.count
    return [sum(units[start : start + length], ()) for start in range(len(units) - length + 1)]


def _least_influence(
    twin: Twin, units: list[Span], pool: int, batches: list[LongTensor], parts: Parts
) -> tuple[list[Span], list[dict[str, Any]]]:
    """The units that a search tries, and the scores (round 0) that kept the others out of it."""

    def influence() -> Part:
        values = score_of(twin, "block_influence", batches)(units, frozenset(), f"influence of {len(units)} candidates")
        records = [_record(0, unit, value, "block_influence") for unit, value in zip(units, values, strict=True)]
        _lowest(records, pool)
        return Part(records)

    records = parts.once("round 0", influence).value
    return [units[index] for index in _chosen(records)], records


def _once(score: Score, leaf: Depth, spans: list[Span], count: int, before: list[dict[str, Any]]) -> Choice:
    """The `count` spans of lowest score, each scored alone."""
    values = score(spans, frozenset(), f"{leaf.score} of {len(spans)} candidates")
    records = [_record(1, span, value, leaf.score) for span, value in zip(spans, values, strict=True)]
    if leaf.unit == "pair" and count > 1:
        kept = _marked(records, lowest_apart(spans, values, count))
    else:
        kept = _lowest(records, count)
    return Choice(frozenset(site for index in kept for site in spans[index]), before + records)


def _greedy(
    twin: Twin, score: Score, leaf: Depth, units: list[Span], records: list[dict[str, Any]], parts: Parts
) -> Choice:
    """Close the unit of lowest score on top of those already closed, `leaf.count` times."""
    assert leaf.count is not None
    closed: frozenset[Site] = frozenset()
    for number in range(1, leaf.count + 1):
        tried = _left(twin, leaf, units, closed)
        found = parts.once(f"round {number}", partial(_round, score, leaf, tried, closed, number)).value
        closed |= frozenset(tried[_chosen(found)[0]])
        records = records + found
    return Choice(closed, records)


def _round(score: Score, leaf: Depth, tried: list[Span], closed: frozenset[Site], number: int) -> Part:
    """The records of one drop, its choice marked."""
    values = score(tried, closed, f"drop {number} of {leaf.count}")
    records = [_record(number, unit, value, leaf.score) for unit, value in zip(tried, values, strict=True)]
    _lowest(records, 1)
    return Part(records)


def _left(twin: Twin, leaf: Depth, units: list[Span], closed: frozenset[Site]) -> list[Span]:
    """Of the units those that are still whole; of pairs also those that the drops before have made neighbours.

    Those are few, at most one a drop, so all of them are tried even where `units` are a few of many.
    """
    if leaf.unit != "pair":
        return [unit for unit in units if unit[0] not in closed]
    blocks = len(blocks_of(twin.model))
    there, dense = set(units), set(pairs_of(blocks))
    left = pairs_of(blocks, closed)
    return [pair for pair in left if pair in there or pair not in dense] or left


def _record(number: int, span: Span, score: float, by: str) -> dict[str, Any]:
    blocks, parts = list(dict.fromkeys(site.block for site in span)), [str(site) for site in span]
    if not math.isfinite(score):
        where = f"prune: the {by} score of blocks {blocks} ({', '.join(parts)}) is {score}"
        raise PruneError(f"{where}. Check the weights, or use model.dtype: float32")
    return {"round": number, "blocks": blocks, "parts": parts, "score": score, "by": by, "chosen": False}


def _lowest(records: Sequence[dict[str, Any]], count: int) -> list[int]:
    """Mark the `count` records of lowest score as chosen (on ties the first); their indices, ascending."""
    lowest = sorted(range(len(records)), key=lambda index: records[index]["score"])[:count]
    return _marked(records, sorted(lowest))


def _marked(records: Sequence[dict[str, Any]], chosen: list[int]) -> list[int]:
    for index in chosen:
        records[index]["chosen"] = True
    return chosen


def _chosen(records: Sequence[dict[str, Any]]) -> list[int]:
    """Indices of the records that are marked, ascending."""
    return [index for index, record in enumerate(records) if record["chosen"]]
