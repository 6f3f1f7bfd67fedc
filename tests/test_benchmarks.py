"""Benchmarks compare like with like: what they time computes the same, and what they count is what is computed."""

import argparse
import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def rows():
    import step
    from step_cost import SMALL

    bench = step.Bench(SMALL, torch.device("cpu"), batch=2, length=33, chunk=16)
    return bench, {(row.student, row.name): row for row in step.rows_of(bench)}


def test_a_step_of_recover_is_a_step_of_two_plain_models(rows):
    import step

    bench, by_name = rows
    names = ["plain", "recover", "recover, after the cut"]
    plain, ours, after = (step.first_step(bench, by_name["cut", name].build()) for name in names)
    assert plain["kl"] > 0.1 and plain["gradient"] > 0.1
    for found in (ours, after):
        assert found["kl"] == pytest.approx(plain["kl"], rel=1e-5)
        assert found["gradient"] == pytest.approx(plain["gradient"], rel=1e-4)


def test_the_flops_of_a_row_are_those_of_its_products(rows):
    from step_cost import flops

    bench, by_name = rows
    for name in ("plain", "recover"):
        row = by_name["cut", name]
        built = row.build()
        built.loss(bench.ids_BT)  # the first call builds what is kept
        with FlopCounterMode(display=False) as counter:
            built.loss(bench.ids_BT).backward()
        counted = counter.get_flop_counts()["Global"]
        products = sum(count for what, count in counted.items() if "mm" in str(what) and "bmm" not in str(what))
        sequences, length = bench.ids_BT.shape
        attention = sequences * length * 2 * length * bench.shape.width * (sum(row.passes) + row.passes[2])
        expected = flops(bench.shape, bench.ids_BT.shape, 16, row.passes) - attention
        assert products == pytest.approx(expected, rel=0.04)  # the first trained block passes less back


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(only=["kl", "ce", "kl, given text"], seeds=2, tokens=1000, out=tmp_path)


def test_quality_goes_seed_by_seed_and_does_nothing_twice(options):
    import quality_work as work

    tasks = work.tasks_for(options, [])
    trained = [(task.seed, task.variant) for task in tasks if task.kind == "train"]
    assert trained == [(seed, name) for seed in (0, 1) for name in options.only]
    rows = [{"variant": name, "seed": 0, "tokens_asked": 1000} for name in options.only]
    rows.append({"variant": "pruned", "seed": 0, "tokens_asked": None})
    left = work.tasks_for(options, rows)
    assert [task.seed for task in left if task.kind in ("train", "text")] == [1, 1, 1, 1]
    assert work.tasks_for(options, rows + [{**row, "seed": 1} for row in rows]) == []
    other = [{**row, "tokens_asked": 2000} for row in rows]
    assert len([task for task in work.tasks_for(options, other) if task.kind == "train"]) == 6


def test_quality_compares_seed_by_seed():
    from quality_table import markdown

    def row(variant, seed, kl, generation):
        figures = {"kl": kl, "held_out": {"kl": kl, "variance": kl}, "generation": generation, "choice": None}
        return {"variant": variant, "seed": seed, "perplexity": math.e, "tasks": {}, **figures}

    found = [row("kl", 0, 0.5, 0.4), row("kl", 1, 0.7, 0.6), row("ce", 1, 0.6, 0.3), row("ce", 0, 0.3, 0.5)]
    table = markdown(found, ["kl", "ce"])
    assert "| kl | 2 |" in table and "0.6000 ± 0.1414" in table and "50.0% ± 14.1%" in table
    (ce,) = [line for line in table.splitlines() if line.startswith("| ce |") and "[" in line]
    cells = [cell.strip() for cell in ce.split("|")]
    assert cells[2] == "-0.1500 [-0.2000, -0.1000] 2/2" and cells[5] == "-10.0% [-30.0%, +10.0%] 1/2"
