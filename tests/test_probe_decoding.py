"""Decoding for a probe by steps that a GPU can replay: the texts and states of the view's own cache; few waits."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from probe_reference import STEPS, dropping, endless, prompts
from tiny import ATTENDS, FAMILIES, HYBRIDS, only
from torch.utils._python_dispatch import TorchDispatchMode
from twins import fill_adapters

from recover.config.recipe import Lora
from recover.maths import divergence as spaces
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.probe import compare, trajectory
from recover.probe.compare import Comparison, Finite, Rows, equal, to_host
from recover.probe.sublayers import transitions
from recover.probe.trajectory import Recorded, Stock, along, batches_of, greedy, rows_of, sampled
from recover.probe.views import LENSES, Pair


class Replays:
    """Stands for the recorder of a GPU: takes each step for real."""

    made: ClassVar[list[Replays]] = []

    def __init__(self, step) -> None:
        self.step, self.steps, self.forgotten = step, 0, False
        Replays.made.append(self)

    def run(self, visible: int, steps: int) -> None:
        assert not self.forgotten
        for _ in range(steps):
            self.step()
        self.steps += steps

    def forget(self) -> None:
        self.forgotten = True


def recorded(monkeypatch) -> list[Replays]:
    """From here on texts are read as on a GPU, and each reader's recorder is in the list."""
    monkeypatch.setattr(Replays, "made", [])
    monkeypatch.setattr(trajectory, "Recorder", Replays)
    monkeypatch.setattr(trajectory, "may_record", lambda model: True)
    monkeypatch.setattr(trajectory, "steps_unseen", lambda device: 3)
    return Replays.made


def views(twin: Twin):
    pair = Pair.of(twin)
    return pair.dense, pair.pruned


@pytest.mark.parametrize("family", only((family for family in FAMILIES if family not in HYBRIDS), ATTENDS))
def test_recorded_steps_write_the_texts_of_the_models_own_cache(family, monkeypatch):
    twin = dropping(endless(family))
    batch = batches_of(prompts(), views(twin)[0], size=5, steps=STEPS)[0]
    expected = [greedy(view, batch, steps=STEPS, ends=[]) for view in views(twin)]
    drawn = [sampled(view, batch, steps=STEPS, ends=[], seed=3) for view in views(twin)]
    made = recorded(monkeypatch)
    for view, stock, noisy in zip(views(twin), expected, drawn, strict=True):
        found = greedy(view, batch, steps=STEPS, ends=[])
        assert torch.equal(found.tokens_BS, stock.tokens_BS) and torch.equal(found.scored_BS, stock.scored_BS)
        torch.testing.assert_close(found.cached_ND, stock.cached_ND, rtol=1e-4, atol=1e-5)
        assert sampled(view, batch, steps=STEPS, ends=[], seed=3).tokens() == noisy.tokens()
    assert [each.steps for each in made] == [STEPS - 1] * 4 and all(each.forgotten for each in made)


def test_recorded_steps_take_adapters_along_and_end_where_texts_do(monkeypatch):
    twin = dropping(endless("qwen2"))
    twin.add_lora(Lora(rank=2))
    fill_adapters(twin)
    batch = batches_of(prompts(), views(twin)[1], size=5, steps=STEPS)[0]
    whole = greedy(views(twin)[1], batch, steps=STEPS, ends=[])
    ends = sorted({row[1] for row in whole.tokens()})  # all end at the second token, if not before
    expected = greedy(views(twin)[1], batch, steps=STEPS, ends=ends)
    recorded(monkeypatch)
    found = greedy(views(twin)[1], batch, steps=STEPS, ends=ends)
    assert found.tokens_BS.shape == expected.tokens_BS.shape and found.tokens_BS.shape[1] <= 2
    assert found.tokens() == expected.tokens() and torch.equal(found.scored_BS, expected.scored_BS)
    torch.testing.assert_close(found.cached_ND, expected.cached_ND, rtol=1e-4, atol=1e-5)


def test_a_reader_is_closed_whatever_happens(monkeypatch):
    twin = dropping(endless())
    made = recorded(monkeypatch)
    batch = batches_of(prompts(), views(twin)[0], size=5, steps=STEPS)[0]

    def choose(z_BV, step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trajectory._decode(views(twin)[0], batch, STEPS, [], choose)
    assert [each.forgotten for each in made] == [True]


def test_a_cpu_and_a_model_of_another_kind_of_cache_are_read_as_anyone_reads_them(monkeypatch):
    model = endless()
    assert type(trajectory.reader_of(model, torch.empty, 1)) is Stock
    recorded(monkeypatch)
    assert type(trajectory.reader_of(model, torch.empty, 1)) is Recorded
    monkeypatch.setattr(trajectory, "fits", lambda model: False)
    assert type(trajectory.reader_of(model, torch.empty, 1)) is Stock


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: values taken from it, and results whose size they decide."""

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket._qualified_op_name.split("::")[1] in self.NAMES
        return func(*args, **(kwargs or {}))


def sublayers_of(pair: Pair):
    batch = batches_of(prompts(), pair.dense, size=5, steps=STEPS)[0]
    text = greedy(pair.dense, batch, steps=STEPS, ends=[])
    found = transitions(pair, text, text.scored_BS)
    at = text.scored_BS.nonzero()
    return text, found, Rows(at[:, 0], at[:, 1])


@pytest.mark.parametrize("adapted", [False, True])
def test_figures_of_sublayers_are_those_of_each_pair_of_states_alone(adapted, monkeypatch):
    monkeypatch.setattr(compare, "ELEMENTS", {"cpu": 256 * 7})
    twin = dropping(endless())
    if adapted:
        twin.add_lora(Lora(rank=2))
        fill_adapters(twin)
    pair = Pair.of(twin)
    comparison = Comparison(pair)
    _, found, rows = sublayers_of(pair)
    figures = comparison.sublayers(found, rows)
    assert list(figures) == [(site, what, lens) for site in found for what in ("closed", "pruned") for lens in LENSES]
    lens_of = comparison.dense
    for (site, what, lens), table in figures.items():
        here = found[site]
        changed = here.before_ND if what == "closed" else here.replaced_ND
        parts = []
        for start in range(0, len(rows), 7):  # rows at a time as there: a product of other rows rounds otherwise
            h_ND, g_ND = (lens_of.states(x[start : start + 7], lens) for x in (here.after_ND, changed))
            z_NV, y_NV = lens_of.logits(h_ND), lens_of.logits(g_ND)
            parts.append(spaces.stream_drift(h_ND, g_ND) | spaces.lens_drift(z_NV, y_NV))
        expected = {name: torch.cat([part[name].double() for part in parts]) for name in parts[0]}
        assert list(table) == list(expected)
        for name, value_N in expected.items():
            assert torch.equal(table[name], value_N) and not torch.signbit(table[name][value_N == 0]).any(), name
    same = [site for site in found if torch.equal(found[site].replaced_ND, found[site].after_ND)]
    assert (len(same) == 0) if adapted else (0 < len(same) < len(found))


def test_how_often_the_device_is_waited_for_does_not_depend_on_blocks_and_rows(monkeypatch):
    counts = []
    for blocks, elements in ((4, 2**20), (6, 2**20), (6, 256)):
        monkeypatch.setattr(compare, "ELEMENTS", {"cpu": elements})
        twin = Twin(endless(num_hidden_layers=blocks), Plan("depth", blocks, (2,)))
        pair = Pair.of(twin)
        text, found, rows = sublayers_of(pair)
        dense, pruned = (along(view, text, blocks_BS=text.scored_BS) for view in (pair.dense, pair.pruned))
        comparison = Comparison(pair)
        with Waits() as waits:
            comparison.sublayers(found, rows)
            comparison.blocks(dense, pruned, rows)
            comparison.final(dense.final_ND, pruned.final_ND, rows, [0.5, 1.0])
        counts.append(waits.count)
    assert counts[0] == counts[1] == counts[2] < 30


def test_the_first_row_that_is_not_finite_is_named_whatever_follows():
    rows = Rows(torch.tensor([4, 4, 9]), torch.tensor([0, 1, 5]))
    for bad in (float("nan"), float("inf"), float("-inf")):
        finite = Finite()
        z_NV = torch.zeros(3, 8)
        finite.checked(z_NV.clone(), rows, "dense view")
        z_NV[2, 7] = bad
        assert finite.checked(z_NV, rows, "pruned view") is z_NV
        finite.checked(torch.full((3, 8), bad), rows, "last view")
        with pytest.raises(
            compare.ModelError, match="prompt 9, decoding step 5: the pruned view gives logits that are"
        ):
            finite.require()
    Finite().require()


def test_small_helpers():
    a, b = torch.arange(3.0), torch.tensor([0.0, 1.0, float("nan")])
    assert equal([]) == [] and equal([(a, a.clone()), (a, b), (b, b)]) == [True, False, False]
    columns = to_host({"x": a.double(), ("y", 1): b.double()})
    assert to_host({}) == {} and list(columns) == ["x", ("y", 1)]
    assert columns["x"].untyped_storage().nbytes() == 3 * 8  # none drags the others along when it is pickled
    mark_BT = torch.tensor([[True, False], [False, True]])
    h_BTD = torch.randn(2, 2, 5)
    assert torch.equal(rows_of(mark_BT)(h_BTD), h_BTD[mark_BT])
