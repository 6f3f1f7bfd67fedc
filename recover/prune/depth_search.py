"""Which sites go: the candidates, and the search among them by the recipe's score."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import LongTensor

from recover.base.errors import PruneError
from recover.config.prune import CLOSING
from recover.config.recipe import Depth
from recover.models.arch import blocks_of
from recover.models.site import PARTS, Site, sites_of
from recover.prune.depth_records import Choice, chosen_of, lowest, marked, record_of
from recover.prune.depth_scores import Score, Span, score_of
from recover.prune.depth_sets import SetSearch
from recover.prune.pairs import lowest_apart, pairs_of
from recover.prune.parts import NOWHERE, Part, Parts

if TYPE_CHECKING:
    from recover.models.twin import Twin

# Every round of a search that closes sites runs the model once per candidate. In a model with more units than this,
# only so many candidates, those of lowest block influence, are run (or twice the count, if that is more).
CANDIDATES = 40
NAMES = {"block": "blocks", "attention": "attentions", "mlp": "MLPs", "sublayer": "sublayers", "pair": "pairs"}


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


def named_sites(cfg: Depth) -> frozenset[Site]:
    """What `cfg.blocks` or `cfg.sites` names; nothing if the recipe gives a count."""
    if cfg.unit == "block":
        return sites_of(cfg.blocks or ())
    if cfg.unit == "sublayer":
        pairs = (text.split(":") for text in cfg.sites or ())
        return frozenset(Site(int(block), "attention" if part == "attention" else "mlp") for part, block in pairs)
    part = "attention" if cfg.unit == "attention" else "mlp"  # a pair is never named
    return frozenset(Site(block, part) for block in cfg.blocks or ())


def choose(twin: Twin, cfg: Depth, batches: list[LongTensor], parts: Parts = NOWHERE) -> Choice:
    """The `cfg.count` units that matter least by `cfg.score`; on ties the first. Raises PruneError without text.

    Each round of a search is one of the `parts`: those that are there are not measured again.
    """
    assert cfg.count is not None
    if not batches:
        raise PruneError(f"prune.score: '{cfg.score}' is measured on text: give prune.calibration")
    units = units_of(cfg.unit, len(blocks_of(twin.model)))
    if cfg.contiguous:
        units = _runs(cfg, units)
        return _once(score_of(twin, cfg.score, batches), cfg, units, 1, [])
    before: list[dict[str, Any]] = []
    if cfg.score in CLOSING and len(units) >= CANDIDATES:
        pool = min(max(CANDIDATES, 2 * cfg.count), len(units))
        units, before = _least_influence(twin, units, pool, batches, parts)
    score = score_of(twin, cfg.score, batches)
    if cfg.rounds:
        return SetSearch(score, cfg, partial(_left, twin, cfg, units), parts, list(before)).run()
    return _once(score, cfg, units, cfg.count, before)


def _runs(cfg: Depth, units: list[Span]) -> list[Span]:
    """All runs of `cfg.count` neighbours; a run of pairs is one of twice as many sublayers."""
    assert cfg.count is not None
    length = cfg.count
    if cfg.unit == "pair":
        units, length = [(site,) for site in sorted({site for pair in units for site in pair})], 2 * cfg.count
    return [sum(units[start : start + length], ()) for start in range(len(units) - length + 1)]


def _least_influence(
    twin: Twin, units: list[Span], pool: int, batches: list[LongTensor], parts: Parts
) -> tuple[list[Span], list[dict[str, Any]]]:
    """The units that a search tries, and the scores (round 0) that kept the others out of it."""

    def influence() -> Part:
        values = score_of(twin, "block_influence", batches)(units, frozenset(), f"influence of {len(units)} candidates")
        records = [record_of(0, unit, value, "block_influence") for unit, value in zip(units, values, strict=True)]
        lowest(records, pool)
        return Part(records)

    records = parts.once("round 0", influence).value
    return [units[index] for index in chosen_of(records)], records


def _once(score: Score, cfg: Depth, spans: list[Span], count: int, before: list[dict[str, Any]]) -> Choice:
    """The `count` spans of lowest score, each scored alone."""
    values = score(spans, frozenset(), f"{cfg.score} of {len(spans)} candidates")
    records = [record_of(1, span, value, cfg.score) for span, value in zip(spans, values, strict=True)]
    if cfg.unit == "pair" and count > 1:
        kept = marked(records, lowest_apart(spans, values, count))
    else:
        kept = lowest(records, count)
    return Choice(frozenset(site for index in kept for site in spans[index]), before + records)


def _left(twin: Twin, cfg: Depth, units: list[Span], closed: frozenset[Site]) -> list[Span]:
    """Of the units those that are still whole; of pairs also those that the drops before have made neighbours.

    Those are few, at most one a drop, so all of them are tried even where `units` are a few of many.
    """
    if cfg.unit != "pair":
        return [unit for unit in units if unit[0] not in closed]
    blocks = len(blocks_of(twin.model))
    there, dense = set(units), set(pairs_of(blocks))
    left = pairs_of(blocks, closed)
    return [pair for pair in left if pair in there or pair not in dense] or left
