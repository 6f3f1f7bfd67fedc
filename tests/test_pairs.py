"""Pairs of an attention and an MLP: which save a stored block, which are chosen, and that the export is smaller."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
from cached import cache_of
from pydantic import ValidationError
from tiny import ids, tiny

from recover.base.errors import PruneError
from recover.config.recipe import Calibration, Depth
from recover.export.merge import merge
from recover.models.load import Description
from recover.models.plan import Plan
from recover.models.site import Site, pack_sites, sites_of, zeroed_partners
from recover.models.twin import Twin
from recover.prune import registry
from recover.prune.depth import search
from recover.prune.depth.depth import depth_cost, depth_warnings, share_gone, share_unstored
from recover.prune.depth.search import lowest_apart, pairs_of

CALIBRATION = Calibration(data="given", samples=4, length=24, batch_size=2)
FIRST = Site(0, "attention")


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return list(ids(4, 24, seed=3).split(2))


def pair_leaf(**fields) -> Depth:
    return Depth(kind="depth", unit="pair", calibration=CALIBRATION, **fields)


def pruned(model, batches, **fields) -> Plan:
    twin = Twin(model, Plan.none(model.config.num_hidden_layers))
    return registry.prune(twin, pair_leaf(**fields), batches).plan


def weak_in_the_middle(model):
    """The MLP of block 1 and the attention of block 2 add next to nothing, what then are neighbours a little more."""
    for block, attention, mlp in ((1, 0.2, 0.02), (2, 0.02, 0.2)):
        model.model.layers[block].self_attn.o_proj.weight.data *= attention
        model.model.layers[block].mlp.down_proj.weight.data *= mlp
    return model


def stored(blocks: int, gone) -> int:
    return len(pack_sites(sites_of(range(blocks)) - set(gone)))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_pairs_that_go_one_by_one_are_all_the_sets_that_save_a_block_a_pair(number):
    blocks, reached = 5, {frozenset[Site]()}
    for _ in range(number):
        reached = {gone | set(pair) for gone in reached for pair in pairs_of(blocks, gone)}
    attentions = [Site(block, "attention") for block in range(1, blocks)]  # the first has to stay
    mlps = [Site(block, "mlp") for block in range(blocks)]
    every = itertools.product(itertools.combinations(attentions, number), itertools.combinations(mlps, number))
    assert reached == {frozenset(a + m) for a, m in every if stored(blocks, a + m) == blocks - number}


def test_lowest_apart_is_the_lowest_of_all_choices():
    source = random.Random(0)
    for _ in range(40):
        pairs = sorted(source.sample(pairs_of(6), source.randint(4, 10)))
        scores, count = [source.random() for _ in pairs], source.randint(1, 2)
        choices = itertools.combinations(range(len(pairs)), count)
        apart = [c for c in choices if len({site for index in c for site in pairs[index]}) == 2 * count]
        expected = min(apart, key=lambda choice: sum(scores[index] for index in choice))
        assert lowest_apart(pairs, scores, count) == list(expected)
    assert lowest_apart(pairs_of(4), [1.0] * 6, 3) == [0, 2, 4]
    with pytest.raises(ValueError, match="no 2 of 2 pairs are apart"):
        lowest_apart(pairs_of(4)[:2], [1.0, 1.0], 2)


@torch.no_grad()
def exported_kl(model, gone, batches) -> float:
    """KL(dense || pruned) a token, with the stock model that an export of these drops is."""
    sites = tuple(map(str, sorted(gone)))
    twin = Twin(copy.deepcopy(model), Plan.none(model.config.num_hidden_layers))
    plan = registry.prune(twin, Depth(kind="depth", unit="sublayer", sites=sites), []).plan
    smaller = merge(Twin(copy.deepcopy(model), plan), torch.float32)
    assert smaller.config.num_hidden_layers == len(plan.packed)
    rows = torch.cat(batches)
    z, y = (m(input_ids=rows, use_cache=False).logits.double().log_softmax(-1) for m in (model, smaller))
    return float((z.exp() * (z - y)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_each_drop_is_the_best_pair_that_saves_a_block(family, batches):
    if family == "llama":
        model, blocks = weak_in_the_middle(tiny(num_hidden_layers=4)), 4
    else:
        model, blocks = tiny(family, num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2), 4
    plan = pruned(copy.deepcopy(model), batches, count=3)
    left, gone = sites_of(range(blocks)) - {FIRST}, set()
    for number in (1, 2, 3):
        found = {tuple(r["parts"]): r["score"] for r in plan.scores if r["round"] == number}
        couples = [(a, m) for a in left - gone for m in left - gone if (a.part, m.part) == ("attention", "mlp")]
        saving = [couple for couple in couples if stored(blocks, gone | set(couple)) == blocks - number]
        expected = {tuple(map(str, sorted(c))): exported_kl(model, gone | set(c), batches) for c in saving}
        assert found == pytest.approx(expected, rel=2e-3)
        best = min(saving, key=lambda couple: expected[tuple(map(str, sorted(couple)))])
        assert [r["parts"] for r in plan.scores if r["round"] == number and r["chosen"]] == [
            list(map(str, sorted(best)))
        ]
        gone |= set(best)
    assert set(plan.sites) == gone
    apart = ["attention:1", "mlp:2"]  # neighbours only because what lay between them went first
    assert (apart in [r["parts"] for r in plan.scores if r["chosen"]]) == (family == "llama")


@pytest.mark.parametrize(
    "cfg",
    [
        {},
        {"score": "taylor"},
        {"score": "block_influence", "iterative": True},
        {"score": "variance", "iterative": False},
        {"contiguous": True},
        {"score": "angular", "contiguous": True},
    ],
)
@pytest.mark.parametrize(
    ("candidates", "count"),
    [(40, 1), (4, 3), (40, 5), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((4, 1), (40, 3), (4, 5)))],
)
def test_the_export_has_a_block_less_for_each_pair(cfg, candidates, count, batches, monkeypatch):
    monkeypatch.setattr(search, "CANDIDATES", candidates)
    model = tiny()
    plan = pruned(copy.deepcopy(model), batches, count=count, **cfg)
    assert len(plan.packed) == 6 - count and zeroed_partners(plan.packed) == 0
    assert "zeroed" not in plan.summary()
    inside = sum(p.numel() for p in model.model.layers[0].parameters())
    assert plan.parameters_dense - plan.parameters_pruned == count * inside
    assert plan.parameters_pruned == plan.nonzero
    twin = Twin(copy.deepcopy(model), plan)
    merged = merge(twin, torch.float32)
    assert merged.config.num_hidden_layers == 6 - count
    assert sum(p.numel() for p in merged.parameters()) == plan.parameters_pruned
    rows = torch.cat(batches)
    with torch.no_grad():
        output = merged(input_ids=rows, use_cache=True)
        assert torch.equal(output.logits, twin.model(input_ids=rows, use_cache=False).logits)
    assert len(cache_of(output)) == 6 - count


def test_few_candidates_are_those_of_least_influence_and_neighbours_made_by_drops(batches, monkeypatch):
    monkeypatch.setattr(search, "CANDIDATES", 6)
    plan = pruned(weak_in_the_middle(tiny()), batches, count=3)
    influence = [r for r in plan.scores if r["round"] == 0]
    assert len(influence) == len(pairs_of(6)) and {r["by"] for r in influence} == {"block_influence"}
    pool = {tuple(r["parts"]) for r in sorted(influence, key=lambda r: r["score"])[:6]}
    dense = {tuple(map(str, pair)) for pair in pairs_of(6)}
    first, *later = [{tuple(r["parts"]) for r in plan.scores if r["round"] == n} for n in (1, 2, 3)]
    assert first == pool
    assert all(tried - pool == tried - dense for tried in later)
    assert later[0] - pool == {("attention:1", "mlp:2")}
    assert all(len(tried - dense) <= number for number, tried in enumerate(later, 1))


def test_pairs_that_cannot_be_are_refused(batches):
    with pytest.raises(ValidationError, match="list what goes as 'sites' with unit: sublayer"):
        pair_leaf(sites=("attention:1", "mlp:1"))
    with pytest.raises(ValidationError, match="unit: pair is chosen by 'count'"):
        pair_leaf(blocks=(1,))
    message = "6 pairs to drop, the model has 6 blocks: drop at most 5"
    with pytest.raises(PruneError, match=message):
        pruned(tiny(), batches, count=6)
    with pytest.raises(PruneError, match=message):
        depth_cost(pair_leaf(count=6), DESCRIPTION)


DESCRIPTION = Description(
    model_type="llama",
    blocks=6,
    width=64,
    intermediate=96,
    heads=4,
    kv_heads=2,
    head_size=16,
    vocabulary=256,
    context=256,
    tied=False,
    parameters=1,
    embedding_parameters=0,
    bytes=4,
)


def test_the_estimate_knows_that_each_pair_saves_a_block():
    cfg = pair_leaf(count=1)
    assert share_gone(cfg, DESCRIPTION) == share_unstored(cfg, DESCRIPTION) == pytest.approx(1 / 6)
    assert depth_warnings(cfg, DESCRIPTION) == []
