"""Searches for whole sets of blocks: laws of a local optimum, and brute force over all sets."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import ids, tiny

from recover.config.recipe import Calibration, Depth
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.prune import registry
from recover.prune.depth import search
from recover.prune.depth.scores import Span, score_of
from recover.prune.depth.search import SearchResult, choose, search_passes, units_of

CALIBRATION = Calibration(data="given", samples=3, length=16, batch_size=2)
BLOCKS = 7
TEXT: Any = [ids(1, 8)]


SEARCHES: dict[str, dict[str, Any]] = {"greedy": {}, "swap": {"swap": True}, "beam": {"beam": 4}}
SEARCHES["both"] = {"swap": True, "beam": 2}


def cfg(search: str, **fields: Any) -> Depth:
    return Depth(kind="depth", **{"count": 3, "calibration": CALIBRATION, **SEARCHES[search], **fields})


class Table:
    """A score of sets that is looked up, so that a search can be led anywhere; it notes what it is asked."""

    def __init__(self, seed: int, blocks: int = BLOCKS) -> None:
        drawn, self.asked = torch.Generator().manual_seed(seed), []
        sets = [frozenset(found) for size in range(1, 5) for found in combinations(range(1, blocks), size)]
        self.values = dict(zip(sets, torch.rand(len(sets), generator=drawn).tolist(), strict=True))

    def __call__(self, spans: list[Span], closed: frozenset[Any], description: str) -> list[float]:
        sets = [frozenset(site.block for site in closed | set(span)) for span in spans]
        self.asked += sets
        return [self.values[found] for found in sets]


def found_by(monkeypatch, table: Table, how: str, **fields: Any) -> tuple[frozenset[int], SearchResult]:
    monkeypatch.setattr(search, "score_of", lambda *_: table)
    twin = Twin(tiny(num_hidden_layers=BLOCKS), Plan.none(BLOCKS))
    choice = choose(twin, cfg(how, **fields), TEXT)
    return frozenset(site.block for site in choice.sites), choice


@pytest.mark.parametrize("seed", range(12))
def test_beam_and_swap_end_no_worse_than_greedy_and_no_exchange_betters_a_swap(monkeypatch, seed):
    table = Table(seed)
    value = {name: table.values[found_by(monkeypatch, table, name)[0]] for name in SEARCHES}
    assert max(value.values()) == value["greedy"]
    table.asked.clear()
    swapped, choice = found_by(monkeypatch, table, "swap")
    others = set(range(1, BLOCKS)) - swapped
    neighbours = [swapped - {gone} | {new} for gone in swapped for new in others]
    assert table.values[swapped] == value["swap"] <= min(table.values[found] for found in neighbours)
    assert len(table.asked) == len(set(table.asked))  # no set is scored twice
    chosen = [record for record in choice.candidates if record["chosen"]]
    assert sorted(block for record in chosen for block in record["blocks"]) == sorted(swapped)
    beside = {tuple(record["blocks"]): record["beside"] for record in choice.candidates if record["round"] == 1}
    assert beside and set(map(tuple, beside.values())) == {()}


def test_the_laws_above_are_not_empty(monkeypatch):
    """Among the tables are those where each search betters greedy."""
    better: dict[str, int] = dict.fromkeys(("swap", "beam"), 0)
    for seed in range(12):
        table = Table(seed)
        value = {name: table.values[found_by(monkeypatch, table, name)[0]] for name in ("greedy", *better)}
        better = {name: better[name] + (value[name] < value["greedy"]) for name in better}
    assert min(better.values()) >= 3


def test_a_beam_that_holds_everything_is_brute_force(monkeypatch):
    for seed in range(4):
        table = Table(seed)
        best = min((found for found in table.values if len(found) == 3), key=lambda found: table.values[found])
        assert found_by(monkeypatch, table, "beam", beam=20)[0] == best
        assert sum(len(found) == 3 for found in set(table.asked)) == 20


def test_the_greedy_set_stays_in_a_beam_that_others_would_fill(monkeypatch):
    table = Table(0, blocks=6)
    table.values = {found: 1.0 + len(found) for found in table.values}
    table.values |= {frozenset({1}): 0.1, frozenset({2}): 0.2, frozenset({1, 5}): 0.9}  # greedy: 1, then 5
    table.values |= {frozenset({2, 3}): 0.3, frozenset({2, 4}): 0.4, frozenset({1, 4, 5}): 0.1}
    monkeypatch.setattr(search, "score_of", lambda *_: table)
    twin = Twin(tiny(num_hidden_layers=6), Plan.none(6))
    choice = choose(twin, cfg("beam", beam=2), TEXT)
    assert {site.block for site in choice.sites} == {1, 4, 5}


def test_scores_of_a_real_model_are_those_of_the_whole_sets():
    """By whichever way a set is reached, its score is that of all its blocks closed at once."""
    batches: Any = list(ids(3, 16, seed=3).split(2))
    twin = Twin(tiny(num_hidden_layers=5), Plan.none(5))
    spans = units_of("block", 5)
    whole = score_of(twin, "kl", batches)
    for how in ({"swap": True}, {"beam": 2}, {"beam": 2, "swap": True}):
        plan = registry.prune(twin, cfg("greedy", count=2, **how), batches).plan
        assert len(plan.dropped) == 2
        for record in plan.scores:
            blocks = {*record["blocks"], *(int(text.split(":")[1]) for text in record["beside"])}
            span = tuple(sorted(site for unit in spans if unit[0].block in blocks for site in unit))
            assert record["score"] == pytest.approx(whole([span], frozenset(), "one")[0], rel=1e-5)


@pytest.mark.parametrize("search", ["greedy", "swap", "beam"])
def test_the_plan_says_how_many_candidates_a_search_closes(monkeypatch, search):
    told = search_passes(cfg(search), BLOCKS)
    closed = []
    for seed in range(6):
        table = Table(seed)
        found_by(monkeypatch, table, search)
        closed.append(len(table.asked))
    assert {"greedy": closed == [told] * 6, "swap": min(closed) == told, "beam": max(closed) <= told}[search]
    assert search_passes(Depth(kind="depth", blocks=(1,)), BLOCKS) == 0
    run = Depth(kind="depth", count=2, score="kl", contiguous=True, calibration=CALIBRATION)
    assert search_passes(run, BLOCKS) == 5


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"score": "taylor"}, "a score of kl, variance, perplexity"),
        ({"contiguous": True}, "without 'contiguous'"),
        ({"iterative": False}, "iterative: false"),
        ({"count": None, "blocks": (2,)}, "needs a 'count'"),
        ({"unit": "pair"}, "a pair may rest on others"),
    ],
)
def test_a_search_of_sets_refuses_what_scores_units_alone(fields, said):
    with pytest.raises(ValidationError, match=said):
        cfg("swap", **fields)
