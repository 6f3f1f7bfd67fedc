"""Which sites go: the units that may go, and the search among them by the recipe's score.

A search that scores once takes the units of lowest score. A greedy search adds the unit that costs least on top of
those that are gone. A `beam` carries several sets from drop to drop, the greedy one always among them, so it ends no
worse. `swap` goes on from there: each member in turn gives way to the unit that fits the others best, until no single
exchange lowers the score. No set is scored twice in a round of drops, nor in all exchanges together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, NotRequired, TypedDict

from torch import LongTensor

from recover.base.errors import PruneError
from recover.base.journal import Entry, Journal
from recover.config.prune import Depth
from recover.models.arch import blocks_of, lone_of, staying
from recover.models.site import SUBLAYERS, Site, Sublayer, sites_in, sites_of
from recover.prune.depth.scores import Score, Span, score_of

if TYPE_CHECKING:
    from recover.models.twin import Twin

# Every round of a search that closes sites runs the model once per candidate. In a model with more units than this,
# only so many candidates, those of lowest block influence, are run (or twice the count, if that is more).
CANDIDATES = 40
NAMES = {"block": "blocks", "attention": "attentions", "mlp": "MLPs", "sublayer": "sublayers", "pair": "pairs"}


def units_of(unit: str, blocks: int, lone: Sequence[Sublayer] = ()) -> list[Span]:
    """Every unit that may go, in the order in which the model runs them: all without the attention of block 0.

    `lone`: what each block is, where it is one sublayer; with that the block goes.
    """
    if lone and unit in ("sublayer", *SUBLAYERS):
        return [sites_in(block) for block in range(1, blocks) if unit in ("sublayer", lone[block])]
    if unit == "pair":
        return pairs_of(blocks)
    if unit == "block":
        return [sites_in(block) for block in range(1, blocks)]
    sites = [Site(block, part) for block in range(blocks) for part in SUBLAYERS if unit in ("sublayer", part)]
    return [(site,) for site in sites if site != Site(0, "attention")]


def most_units(unit: str, blocks: int, lone: Sequence[Sublayer] = ()) -> int:
    """How many units can go at most; pairs overlap, so they are fewer than candidates."""
    return blocks - 1 if unit == "pair" else len(units_of(unit, blocks, lone))


def named_sites(cfg: Depth, lone: Sequence[Sublayer] = ()) -> frozenset[Site]:
    """What `cfg.blocks` or `cfg.sites` names; nothing if the recipe gives a count.

    Raises PruneError for a sublayer that a block is not, where each is one (`lone`).
    """
    sites = _named(cfg)
    if not lone or cfg.unit == "block":
        return sites
    absent = sorted(site for site in sites if site.block < len(lone) and site.part != lone[site.block])
    if absent:
        is_one = f"block {absent[0].block} is one sublayer, {lone[absent[0].block]}"
        raise PruneError(f"{'prune.sites' if cfg.unit == 'sublayer' else 'prune.blocks'}: {absent[0]}: {is_one}")
    return sites_of(site.block for site in sites)


def _named(cfg: Depth) -> frozenset[Site]:
    if cfg.unit == "block":
        return sites_of(cfg.blocks or ())
    if cfg.unit == "sublayer":
        pairs = (text.split(":") for text in cfg.sites or ())
        return frozenset(Site(int(block), "attention" if part == "attention" else "mlp") for part, block in pairs)
    part = "attention" if cfg.unit == "attention" else "mlp"  # a pair is never named
    return frozenset(Site(block, part) for block in cfg.blocks or ())


# A pair is an attention and an MLP that go together, so that a stored block goes with them.
#
# `site.pack_sites` lets an MLP join the attention right before it, in what is left, and joins nothing else: what is
# left takes (its sublayers) - (its attentions with an MLP right after) blocks. With p attentions and p MLPs gone from L
# blocks, 2 (L - p) sublayers are left, and they take L - p blocks exactly if an MLP is right after each attention: if
# attention and MLP alternate as in a stock model. So one attention and one MLP save a block exactly if they are
# neighbours: those of one block, or an MLP and the attention of the next block. Any others leave two MLPs in a row in
# one place and two attentions in another. What alternates still does without two neighbours, so pairs can go one by
# one, also two that became neighbours because all between them went before.


def pairs_of(blocks: int, closed: Collection[Site] = frozenset()) -> list[Span]:
    """Every two neighbours of what is left once pairs are `closed`, in order; the attention of block 0 is in none."""
    left = sorted(sites_of(range(blocks)) - set(closed))
    return list(pairwise(left[1:]))


def lowest_apart(pairs: Sequence[Span], scores: Sequence[float], count: int) -> list[int]:
    """Indices, ascending, of the `count` pairs of lowest total score of which no two share a site; on ties the first.

    `pairs` in order, so that only a pair and the next one can share a site. Raises ValueError if there are too few.
    """
    # best[k]: (total, indices) of k pairs among those seen; `skipping`: the same without the last one seen.
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ()), *[(math.inf, ())] * count]
    skipping = best
    for index, score in enumerate(scores):
        free = skipping if index and set(pairs[index - 1]) & set(pairs[index]) else best
        taken = [(total + score, (*chosen, index)) for total, chosen in free[:-1]]
        extended = [best[0], *(min(old, new, key=_total) for old, new in zip(best[1:], taken, strict=True))]
        best, skipping = extended, best
    total, chosen = best[count]
    if total == math.inf:
        raise ValueError(f"no {count} of {len(pairs)} pairs are apart")
    return list(chosen)


def _total(found: tuple[float, tuple[int, ...]]) -> float:
    return found[0]


def choose(twin: Twin, cfg: Depth, batches: list[LongTensor], journal: Journal | None = None) -> SearchResult:
    """The `cfg.count` units that matter least by `cfg.score`; on ties the first. Raises PruneError without text.

    Each round of a search is an entry of the `journal`: what is there is not measured again.
    """
    assert cfg.count is not None
    journal = journal or Journal()
    if not batches:
        raise PruneError(f"prune.score: '{cfg.score}' is measured on text: give prune.calibration")
    units = units_of(cfg.unit, len(blocks_of(twin.model)), lone_of(twin.model))
    if cfg.contiguous:
        units = _may_go(twin, _runs(cfg, units), 1)
        return _once(score_of(twin, cfg.score, batches), cfg, units, 1, [])
    units = _may_go(twin, units, cfg.count)
    before: list[Candidate] = []
    if cfg.closing and len(units) >= CANDIDATES:
        pool = min(max(CANDIDATES, 2 * cfg.count), len(units))
        units, before = _least_influence(twin, units, pool, batches, journal)
    score = score_of(twin, cfg.score, batches)
    if cfg.rounds:
        return SetSearch(score, cfg, partial(_left, twin, cfg, units), journal, list(before)).run()
    return _once(score, cfg, units, cfg.count, before)


def _may_go(twin: Twin, units: list[Span], count: int) -> list[Span]:
    """Those without what stays, in most models the attention of block 0, which is in none: it tells how many tokens a
    cache has. Raises PruneError where fewer than `count` are left."""
    stays = staying(twin.model)
    left = [unit for unit in units if not stays & set(unit)]
    if len(left) < count:
        named = ", ".join(map(str, sorted(stays)))
        raise PruneError(
            f"prune.count: {count} of {len(left)} that may go: drop at most {len(left)} (staying: {named})"
        )
    return left


def _runs(cfg: Depth, units: list[Span]) -> list[Span]:
    """All runs of `cfg.count` neighbours; a run of pairs is one of twice as many sublayers."""
    assert cfg.count is not None
    length = cfg.count
    if cfg.unit == "pair":
        units, length = [(site,) for site in sorted({site for pair in units for site in pair})], 2 * cfg.count
    return [sum(units[start : start + length], ()) for start in range(len(units) - length + 1)]


def _least_influence(
    twin: Twin, units: list[Span], pool: int, batches: list[LongTensor], journal: Journal
) -> tuple[list[Span], list[Candidate]]:
    """The units that a search tries, and the scores (round 0) that kept the others out of it."""

    def influence() -> Entry:
        values = score_of(twin, "block_influence", batches)(units, frozenset(), f"influence of {len(units)} candidates")
        records = [candidate_of(0, unit, value, "block_influence") for unit, value in zip(units, values, strict=True)]
        lowest(records, pool)
        return Entry(records)

    records = journal.once("round 0", influence).value
    return [units[index] for index in chosen_of(records)], records


def _once(score: Score, cfg: Depth, spans: list[Span], count: int, before: list[Candidate]) -> SearchResult:
    """The `count` spans of lowest score, each scored alone."""
    values = score(spans, frozenset(), f"{cfg.score} of {len(spans)} candidates")
    records = [candidate_of(1, span, value, cfg.score) for span, value in zip(spans, values, strict=True)]
    if cfg.unit == "pair" and count > 1:
        kept = marked(records, lowest_apart(spans, values, count))
    else:
        kept = lowest(records, count)
    return SearchResult(frozenset(site for index in kept for site in spans[index]), before + records)


def _left(twin: Twin, cfg: Depth, units: list[Span], closed: frozenset[Site]) -> list[Span]:
    """Of the units those that are still whole; of pairs also those that the drops before have made neighbours.

    Those are few, at most one a drop, so all of them are tried even where `units` are a few of many.
    """
    if cfg.unit != "pair":
        return [unit for unit in units if unit[0] not in closed]
    blocks = len(blocks_of(twin.model))
    there, dense = set(units), set(pairs_of(blocks))
    stays = staying(twin.model)
    left = [pair for pair in pairs_of(blocks, closed) if not stays & set(pair)]
    return [pair for pair in left if pair in there or pair not in dense] or left


class Candidate(TypedDict):
    """What a search notes of a unit that it tried, in the plan's `scores`."""

    round: int  # of the search, from 1; 0: before it
    blocks: list[int]
    parts: list[str]  # sites, as `attention:5`
    score: float
    by: str  # name of the score
    chosen: bool
    beside: NotRequired[list[str]]  # with `beam` or `swap`: what was closed with it


class SearchResult(NamedTuple):
    """What goes, and every candidate of every round."""

    sites: frozenset[Site]
    candidates: list[Candidate]


def candidate_of(number: int, span: Span, score: float, by: str) -> Candidate:
    """A candidate of round `number`, not chosen yet. Raises PruneError for a score that is not finite."""
    blocks, parts = list(dict.fromkeys(site.block for site in span)), [str(site) for site in span]
    if not math.isfinite(score):
        where = f"prune: the {by} score of blocks {blocks} ({', '.join(parts)}) is {score}"
        raise PruneError(f"{where}. Check the weights, or use model.dtype: float32")
    return {"round": number, "blocks": blocks, "parts": parts, "score": score, "by": by, "chosen": False}


def lowest(records: Sequence[Candidate], count: int) -> list[int]:
    """Mark the `count` records of lowest score as chosen (on ties the first); their indices, ascending."""
    indices = sorted(range(len(records)), key=lambda index: records[index]["score"])[:count]
    return marked(records, sorted(indices))


def marked(records: Sequence[Candidate], chosen: list[int]) -> list[int]:
    """Mark the records of these indices as chosen; the indices."""
    for index in chosen:
        records[index]["chosen"] = True
    return chosen


def chosen_of(records: Sequence[Candidate]) -> list[int]:
    """Indices of the records that are marked, ascending."""
    return [index for index, record in enumerate(records) if record["chosen"]]


Scores = dict[frozenset[Site], float]  # of sets, by the sites that are closed


class Member(NamedTuple):
    """A unit of a set, and the record that says what the set cost when the unit came in."""

    unit: Span
    record: Candidate


class UnitSet(NamedTuple):
    """A set of units with its score."""

    members: tuple[Member, ...]
    score: float

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset(site for member in self.members for site in member.unit)


@dataclass
class SetSearch:
    """One search; `left` gives the units that may still go once some sites are gone. A round of a set is an entry."""

    score: Score
    cfg: Depth
    left: Callable[[frozenset[Site]], list[Span]]
    journal: Journal
    records: list[Candidate] = field(default_factory=list)

    def run(self) -> SearchResult:
        """The set that the search finds, and every record, those that brought in what goes marked as chosen."""
        found, known = self._drops(self.cfg.beam or 1)
        if self.cfg.swap:
            found = self._exchanges(found, known)
        for step in found.members:
            step.record["chosen"] = True
        return SearchResult(found.sites, self.records)

    def _drops(self, width: int) -> tuple[UnitSet, Scores]:
        """The best set after `cfg.count` drops, up to `width` sets carried on; and all scores of the last drop."""
        assert self.cfg.count is not None
        carried, known = [UnitSet((), 0.0)], {}
        for number in range(1, self.cfg.count + 1):
            known, reached, greedy = {}, {}, None
            for place, before in enumerate(carried):
                name = f"round {number}" + (f", set {place + 1}" if place else "")
                steps = self._round(name, number, before.sites, known, f"drop {number} of {self.cfg.count}")
                after = [UnitSet((*before.members, step), step.record["score"]) for step in steps]
                greedy = greedy or min(after, key=_score)  # the greedy set comes first in every round
                for one in after:
                    reached.setdefault(one.sites, one)
            assert greedy is not None
            others = sorted((one for one in reached.values() if one.sites != greedy.sites), key=_score)
            carried = [greedy, *others[: width - 1]]
        return min(carried, key=_score), known

    def _exchanges(self, found: UnitSet, known: Scores) -> UnitSet:
        """A set that no exchange of one unit makes cheaper. It ends: the score falls each time, and sets are finite."""
        number = settled = 0  # settled: how many members in a row are the best there is beside the others
        while settled < len(found.members):
            member = number % len(found.members)
            number += 1
            others = UnitSet(found.members[:member] + found.members[member + 1 :], 0.0)
            name = f"exchange {number}"
            tried = self._round(name, len(found.members) + number, others.sites, known, name)
            best = min(tried, key=lambda step: step.record["score"])
            if best.record["score"] < found.score:
                steps = (*found.members[:member], best, *found.members[member + 1 :])
                found, settled = UnitSet(steps, best.record["score"]), 0
            settled += 1
        return found

    def _round(self, name: str, number: int, closed: frozenset[Site], known: Scores, said: str) -> list[Member]:
        """Every unit that may go on top of `closed` with its record; `known` gains the scores of their sets."""
        units = self.left(closed)
        records = self.journal.once(name, partial(self._scored, units, number, closed, known, said)).value
        known |= {closed | set(unit): record["score"] for unit, record in zip(units, records, strict=True)}
        self.records += records
        return [Member(unit, record) for unit, record in zip(units, records, strict=True)]

    def _scored(self, units: list[Span], number: int, closed: frozenset[Site], known: Scores, said: str) -> Entry:
        """The records of these units; a set that is known is not scored again."""
        new = [unit for unit in units if closed | set(unit) not in known]
        scores = dict(zip(new, self.score(new, closed, said), strict=True)) if new else {}
        values = [scores[unit] if unit in scores else known[closed | set(unit)] for unit in units]
        records = [candidate_of(number, unit, value, self.cfg.score) for unit, value in zip(units, values, strict=True)]
        if not (self.cfg.beam or self.cfg.swap):
            return Entry(records)  # it is clear what is closed: what was chosen before
        return Entry([record | {"beside": [str(site) for site in sorted(closed)]} for record in records])


def _score(found: UnitSet) -> float:
    return found.score


def search_passes(cfg: Depth, blocks: int, lone: Sequence[Sublayer] = ()) -> int:
    """How many candidates a search closes, each for one pass of the calibration text; 0 without a search.

    Exact for greedy (of pairs about), the most that a beam needs, and of exchanges the fewest: one turn of the members
    that betters nothing.
    """
    if cfg.count is None or not cfg.closing:
        return 0
    there = len(units_of(cfg.unit, blocks, lone))
    if cfg.contiguous:
        return there - cfg.count + 1
    if there >= CANDIDATES:
        there = min(max(CANDIDATES, 2 * cfg.count), there)
    if not cfg.rounds:
        return there
    drops = [there - gone for gone in range(cfg.count)]
    exchanges = (cfg.count - 1) * (there - cfg.count) if cfg.swap else 0
    return drops[0] + (cfg.beam or 1) * sum(drops[1:]) + exchanges
