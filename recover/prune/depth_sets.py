"""Searches for the set of units whose closing costs least, scored together and not one by one.

A greedy search adds the unit that costs least on top of those that are gone. A `beam` carries several sets from drop to
drop, the greedy one always among them, so it ends no worse. `swap` goes on from there: each member in turn gives way to
the unit that fits the others best, until no single exchange lowers the score. No set is scored twice in a round of
drops, nor in all exchanges together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from recover.config.recipe import Depth
from recover.models.site import Site
from recover.prune.depth_records import Choice, record_of
from recover.prune.depth_scores import Score, Span
from recover.prune.parts import Part, Parts

Sites = frozenset[Site]


class Step(NamedTuple):
    """A unit of a set, and the record that says what the set cost when the unit came in."""

    unit: Span
    record: dict[str, Any]


class Found(NamedTuple):
    """A set of units with its score."""

    steps: tuple[Step, ...]
    score: float

    @property
    def sites(self) -> Sites:
        return frozenset(site for step in self.steps for site in step.unit)


@dataclass
class SetSearch:
    """One search; `left` gives the units that may still go once some sites are gone. A round of a set is a part."""

    score: Score
    cfg: Depth
    left: Callable[[Sites], list[Span]]
    parts: Parts
    records: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> Choice:
        """The set that the search finds, and every record, those that brought in what goes marked as chosen."""
        found, known = self._drops(self.cfg.beam or 1)
        if self.cfg.swap:
            found = self._exchanges(found, known)
        for step in found.steps:
            step.record["chosen"] = True
        return Choice(found.sites, self.records)

    def _drops(self, width: int) -> tuple[Found, dict[Sites, float]]:
        """The best set after `cfg.count` drops, up to `width` sets carried on; and all scores of the last drop."""
        assert self.cfg.count is not None
        carried, known = [Found((), 0.0)], {}
        for number in range(1, self.cfg.count + 1):
            known, reached, greedy = {}, {}, None
            for place, before in enumerate(carried):
                name = f"round {number}" + (f", set {place + 1}" if place else "")
                steps = self._round(name, number, before.sites, known, f"drop {number} of {self.cfg.count}")
                after = [Found((*before.steps, step), step.record["score"]) for step in steps]
                greedy = greedy or min(after, key=_score)  # the greedy set comes first in every round
                for one in after:
                    reached.setdefault(one.sites, one)
            assert greedy is not None
            others = sorted((one for one in reached.values() if one.sites != greedy.sites), key=_score)
            carried = [greedy, *others[: width - 1]]
        return min(carried, key=_score), known

    def _exchanges(self, found: Found, known: dict[Sites, float]) -> Found:
        """A set that no exchange of one unit makes cheaper. It ends: the score falls each time, and sets are finite."""
        number = settled = 0  # settled: how many members in a row are the best there is beside the others
        while settled < len(found.steps):
            member = number % len(found.steps)
            number += 1
            others = Found(found.steps[:member] + found.steps[member + 1 :], 0.0)
            name = f"exchange {number}"
            tried = self._round(name, len(found.steps) + number, others.sites, known, name)
            best = min(tried, key=lambda step: step.record["score"])
            if best.record["score"] < found.score:
                steps = (*found.steps[:member], best, *found.steps[member + 1 :])
                found, settled = Found(steps, best.record["score"]), 0
            settled += 1
        return found

    def _round(self, name: str, number: int, closed: Sites, known: dict[Sites, float], said: str) -> list[Step]:
        """Every unit that may go on top of `closed` with its record; `known` gains the scores of their sets."""
        units = self.left(closed)
        records = self.parts.once(name, partial(self._scored, units, number, closed, known, said)).value
        known |= {closed | set(unit): record["score"] for unit, record in zip(units, records, strict=True)}
        self.records += records
        return [Step(unit, record) for unit, record in zip(units, records, strict=True)]

    def _scored(self, units: list[Span], number: int, closed: Sites, known: dict[Sites, float], said: str) -> Part:
        """The records of these units; a set that is known is not scored again."""
        new = [unit for unit in units if closed | set(unit) not in known]
        scores = dict(zip(new, self.score(new, closed, said), strict=True)) if new else {}
        values = [scores[unit] if unit in scores else known[closed | set(unit)] for unit in units]
        records = [record_of(number, unit, value, self.cfg.score) for unit, value in zip(units, values, strict=True)]
        if not (self.cfg.beam or self.cfg.swap):
            return Part(records)  # it is clear what is closed: what was chosen before
        return Part([record | {"beside": [str(site) for site in sorted(closed)]} for record in records])


def _score(found: Found) -> float:
    return found.score
