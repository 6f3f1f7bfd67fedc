"""Speeds are compared by turns: what the machine does in between must not look like a property of a model."""

import copy
import importlib
import itertools
import math
import random
from pathlib import Path

import pytest
import torch
import yaml
from cached import cache_of
from report_run import build_run
from tiny import tiny
from torch import nn

from recover.measure import speed
from recover.measure.speed import compare_speed, kv_bytes_per_token, paired_ratio, spread, take_turns
from recover.report import collect, compare, render, words


class Machine:
    """Seconds that a piece of work takes on a machine that changes: `slowness(moment)` times the work."""

    def __init__(self, slowness):
        self.slowness, self.moment = slowness, 0

    def turn(self, work):
        def run():
            self.moment += 1
            return (work * self.slowness(self.moment),)

        return run


def ratio_on(slowness, first=1.0, second=1.0, repeats=11):
    machine = Machine(slowness)
    pairs = take_turns(machine.turn(first), machine.turn(second), least=repeats, most=repeats)
    return paired_ratio([(a[0], b[0]) for a, b in pairs])


MACHINES = {
    "cold at first": lambda moment: 1.0 + 9.0 * math.exp(-moment / 2),
    "warming up": lambda moment: 1.0 - 0.01 * moment,
    "throttling": lambda moment: 1.0 + 0.02 * moment,
    "shared from half way on": lambda moment: 2.0 if moment > 11 else 1.0,
    "noisy": lambda moment: 1.0 + 0.1 * random.Random(moment).random(),
}


@pytest.mark.parametrize("slowness", MACHINES.values(), ids=MACHINES)
def test_equal_models_show_no_difference_whatever_the_machine_does(slowness):
    low, high = ratio_on(slowness)["interval"]
    assert low <= 1.0 <= high


@pytest.mark.parametrize("slowness", MACHINES.values(), ids=MACHINES)
def test_a_model_that_takes_half_as_long_again_is_found_so(slowness):
    found = ratio_on(slowness, second=1.5)
    assert found["interval"][0] > 1.0 and found["value"] == pytest.approx(1.5, rel=0.06)


def test_timed_one_after_the_other_the_same_machine_would_have_lied():
    machine = Machine(MACHINES["cold at first"])
    one, two = ([machine.turn(1.0)()[0] for _ in range(3)] for _ in range(2))
    assert sorted(one)[1] / sorted(two)[1] > 2


def test_turns_alternate_and_each_pair_names_its_sides():
    order = []

    def turn(side):
        def run():
            order.append(side)
            return (side,)

        return run

    pairs = take_turns(turn(1.0), turn(2.0), least=4, most=4)
    assert order == [1, 2, 2, 1, 1, 2, 2, 1] and pairs == [((1.0,), (2.0,))] * 4


def test_turns_are_as_many_as_fit_the_seconds(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))

    def count(**limits):
        return len(take_turns(tuple, tuple, **limits))

    assert count(least=3, most=9, seconds=0) == 3
    assert count(least=3, most=9, seconds=100) == 9
    assert count(least=1, most=9, seconds=5) == 5


def test_spread_is_median_and_tenths():
    values = [5.0, 1.0, 9.0, 3.0, 2.0, 8.0, 7.0]
    expected = torch.quantile(torch.tensor(values, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9]).double())
    found = spread(values)
    assert [found["interval"][0], found["value"], found["interval"][1]] == pytest.approx(expected.tolist())


def test_the_false_alarm_rate_of_equal_models_is_what_the_docstring_says():
    draw = random.Random(5)

    def alarms(repeats, runs=4000):
        found = 0
        for _ in range(runs):
            low, high = paired_ratio([(1.0, math.exp(draw.gauss(0, 0.1))) for _ in range(repeats)])["interval"]
            found += not low <= 1.0 <= high
        return found / runs

    assert 1 / 150 < alarms(11) < 1 / 50
    assert 1 / 40 < alarms(7) < 1 / 12


@pytest.fixture
def quick(monkeypatch):
    """Two repeats: what is tested is what is timed, not how fast it is."""
    monkeypatch.setattr(speed, "WARM_SECONDS", 0.0)
    turns = speed.take_turns
    monkeypatch.setattr(speed, "take_turns", lambda *both, **_: turns(*both, least=2, most=2))


def shorter(model, blocks):
    """A copy that keeps its first blocks."""
    cut = copy.deepcopy(model)
    cut.model.layers = nn.ModuleList(cut.model.layers[:blocks])
    cut.config.num_hidden_layers = blocks
    return cut


def test_record_of_a_shallower_model(tiny_llama, quick):
    record = compare_speed(tiny_llama, shorter(tiny_llama, 3), torch.device("cpu"), prompt_length=16, steps=4)
    dense, deployed = record["dense"], record["deployed"]
    assert record["repeats"] == 2 and not record["same_shapes"]
    block = sum(parameter.numel() for parameter in tiny_llama.model.layers[0].parameters())
    assert dense["parameters"] - deployed["parameters"] == 3 * block
    assert dense["file_bytes"] == 4 * dense["parameters"] and dense["dtype"] == "float32"
    assert dense["kv_bytes_per_token"] == 2 * deployed["kv_bytes_per_token"] == 2 * 6 * 2 * 16 * 4
    for side in (dense, deployed):
        for rate in speed.RATES:
            low, high = side["interval"][rate]
            assert 0 < low <= side[rate] <= high
    assert set(record["ratio"]) == set(speed.RATES) and "peak_memory_bytes" not in dense


def test_what_is_timed_is_a_prompt_and_then_single_tokens(tiny_llama, quick):
    seen = []
    tiny_llama.register_forward_pre_hook(
        lambda _module, _args, named: seen.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    compare_speed(tiny_llama, tiny(), torch.device("cpu"), batch_size=3, prompt_length=16, steps=4)
    assert seen == [(3, 16), *[(3, 1)] * 4] * 4  # two turns of warm-up, two that count


def test_a_short_context_shortens_the_prompt(quick):
    model = tiny(max_position_embeddings=32)
    assert compare_speed(model, model, torch.device("cpu"), steps=16)["workload"]["prompt_length"] == 16


def test_a_masked_model_is_known_by_its_shapes(tiny_llama, quick):
    masked = copy.deepcopy(tiny_llama)
    for parameter in masked.model.layers.parameters():
        parameter.data *= torch.rand_like(parameter) > 0.5
    assert compare_speed(tiny_llama, masked, torch.device("cpu"), prompt_length=8, steps=2)["same_shapes"]
    half = copy.deepcopy(masked).to(torch.bfloat16)
    assert not compare_speed(tiny_llama, half, torch.device("cpu"), prompt_length=8, steps=2)["same_shapes"]


@pytest.mark.parametrize(("family", "heads", "size"), [("llama", 2, 16), ("qwen3", 2, 16), ("phi3", 2, 16)])
def test_kv_bytes_are_those_of_the_cache_itself(family, heads, size):
    model = tiny(family)
    cache = cache_of(model(input_ids=torch.zeros(1, 5, dtype=torch.long), use_cache=True))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_bytes_per_token(model.config, 4) * 5 == held


# In words.


def record_with(interval, same_shapes=False):
    rate = {"value": 1.04, "interval": interval}
    side = {"decode_tokens_per_second": 100.0, "dtype": "float32", "parameters": 10}
    return {
        "dense": side,
        "deployed": side,
        "ratio": {"decode_tokens_per_second": rate},
        "repeats": 9,
        "same_shapes": same_shapes,
        "workload": {"batch_size": 8, "prompt_length": 128, "steps": 32},
    }


@pytest.mark.parametrize(
    ("record", "long", "short"),
    [
        (record_with([1.01, 1.1]), "×1.04 [1.01, 1.10]", "×1.04 [1.01, 1.10]"),
        (record_with([0.99, 1.1]), "×1.04 [0.99, 1.10], no difference measured", "no difference measured"),
        (
            record_with([1.01, 1.1], same_shapes=True),
            "×1.04 [1.01, 1.10], no faster in stock kernels",
            "no faster in stock kernels",
        ),
        ({**record_with([1.01, 1.1]), "ratio": {}}, "–", "not measured"),
        (None, "–", "not measured"),
    ],
)
def test_a_ratio_is_a_gain_only_if_its_interval_leaves_out_1(record, long, short):
    assert words.speed_ratio(record, "decode_tokens_per_second") == long
    assert words.speed_gain(record, "decode_tokens_per_second") == short


def test_speeds_without_turns_have_no_ratio():
    timed_apart = {side: {"decode_tokens_per_second": rate} for side, rate in (("dense", 377.0), ("deployed", 473.0))}
    assert words.speed_value(timed_apart, "decode_tokens_per_second") is None
    assert words.speed_rows(timed_apart)[0][-1] == "–" and words.speed_notes(timed_apart) == []


@pytest.mark.parametrize("kind", ["depth", "wanda"])
def test_the_report_says_what_a_mask_does_not_gain(tmp_path, kind):
    run = build_run(tmp_path, kind=kind)
    render.render(run, collect.collect(run))
    for name in ("report.md", "report.html"):
        text = (run / name).read_text(encoding="utf-8")
        assert ("no faster in stock kernels" in text) == (kind == "wanda")
        assert ("×1.28 [1.23, 1.34]" in text) == (kind == "depth")
        assert "9 repeats, dense and the export by turns" in text


def test_compare_shows_both_sides_and_what_must_not_be_set_side_by_side(tmp_path):
    data = compare.compare([build_run(tmp_path, name="a"), build_run(tmp_path, name="b", kind="wanda")])
    cells = dict(zip(["a", "b"], [compare.speed_row(run) for run in data["runs"]], strict=True))
    assert cells["a"][1:4] == ["26.4M → 21.1M", "106 MB → 84.4 MB", "16.4 kB → 12.3 kB"]
    assert cells["a"][5] == "×1.28 [1.23, 1.34]" and cells["b"][5] == "×1.01 [0.97, 1.06], no faster in stock kernels"
    assert cells["b"][1] == "26.4M" and len(cells["a"]) == len(compare.SPEED_COLUMNS)
    assert data["apart"] == []
    page = compare.render_compare(data, tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "26.4M → 21.1M" in page


@pytest.mark.parametrize(
    ("file", "found", "changed", "warning"),
    [
        ("speed.json", "Small CPU", "Large CPU", "These runs were timed on different machines"),
        ("recipe.yaml", "max_new_tokens: 256", "max_new_tokens: 32", "These runs were measured by different rules"),
        ("recipe.yaml", "batch_size: 64", "batch_size: 32", None),
    ],
)
def test_compare_warns_of_other_machines_and_other_rules(tmp_path, file, found, changed, warning):
    runs = [build_run(tmp_path, name=name) for name in ("a", "b")]
    rules = yaml.safe_load((runs[0] / "recipe.yaml").read_text())
    rules["measure"] |= {"max_new_tokens": 256, "batch_size": 64}
    for run in runs:
        (run / "recipe.yaml").write_text(yaml.safe_dump({**rules, "name": run.name}))
    other = runs[1] / file
    assert found in other.read_text()
    other.write_text(other.read_text().replace(found, changed))
    apart = compare.compare(runs)["apart"]
    assert [line.startswith(warning or "") for line in apart] == [True] * (warning is not None)


# 2:4 in torch's kernels: on a GPU only.


@pytest.fixture
def sparse24(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module("sparse24")


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the benchmark")
def test_the_2_4_benchmark_says_what_it_needs(sparse24, capsys):
    sparse24.main()
    assert capsys.readouterr().out == "needs CUDA\n"


def test_the_2_4_benchmark_prunes_the_smaller_half_of_each_four(sparse24):
    weight_OI = torch.tensor([[4.0, -1.0, 2.0, -3.0, 0.1, 0.4, -0.3, 0.2]])
    assert sparse24.keep_2_of_4(weight_OI)[0].tolist() == pytest.approx([4, 0, 0, -3, 0, 0.4, -0.3, 0])
