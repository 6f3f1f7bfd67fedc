"""Benchmarks compare like with like: what they time computes the same, and what they count is what is computed."""

import argparse
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import psutil
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
    # Products in place, which torch leaves out.
    in_place = {torch.ops.aten.addmm_: lambda _sum, a, b, **_options: 2 * a[0] * a[1] * b[1]}
    for name in ("plain", "recover"):
        row = by_name["cut", name]
        built = row.build()
        built.loss(bench.ids_BT)  # the first call builds what is kept
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            built.loss(bench.ids_BT).backward()
        counted = counter.get_flop_counts()["Global"]
        products = sum(count for what, count in counted.items() if "mm" in str(what) and "bmm" not in str(what))
        sequences, length = bench.ids_BT.shape
        attention = sequences * length * 2 * length * bench.shape.width * (sum(row.passes) + row.passes[2])
        expected = flops(bench.shape, bench.ids_BT.shape, 16, row.passes) - attention
        assert products == pytest.approx(expected, rel=0.04)  # the first trained block passes less back


@pytest.fixture
def options(tmp_path):
    only = ["kl", "ce", "kl, given text"]
    return argparse.Namespace(only=only, seeds=2, tokens=1000, out=tmp_path, jobs=2)


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


def row(variant, seed, kl, generation, **more):
    figures = {"kl": kl, "held_out": {"kl": kl, "variance": kl}, "generation": generation, "choice": None}
    return {"variant": variant, "seed": seed, "perplexity": math.e, "tasks": {}, **figures, **more}


def test_quality_compares_seed_by_seed():
    from quality_table import markdown

    found = [row("kl", 0, 0.5, 0.4), row("kl", 1, 0.7, 0.6), row("ce", 1, 0.6, 0.3), row("ce", 0, 0.3, 0.5)]
    table = markdown(found, ["kl", "ce"])
    assert "| kl | 2 |" in table and "0.6000 ± 0.1414" in table and "50.0% ± 14.1%" in table
    (ce,) = [line for line in table.splitlines() if line.startswith("| ce |") and "[" in line]
    cells = [cell.strip() for cell in ce.split("|")]
    assert cells[2] == "-0.1500 [-0.2000, -0.1000] 2/2" and cells[5] == "-10.0% [-30.0%, +10.0%] 1/2"


def test_quality_compares_what_learnt_from_the_same_text():
    from quality_table import markdown

    found = [row("kl", 0, 0.5, 0.4, text="a"), row("kl", 0, 0.9, 0.4, text="b"), row("kl", 1, 0.7, 0.6, text="c")]
    found += [row("ce", 0, 0.8, 0.3, text="b"), row("ce", 1, 0.6, 0.3, text="d")]  # of "d" there is no default
    found.append(row("kl, given text", 1, 0.8, 0.3, text=None))
    lines = [line for line in markdown(found, ["kl", "ce", "kl, given text"]).splitlines() if "[" in line]
    (ce,) = [line for line in lines if line.startswith("| ce |")]
    (given,) = [line for line in lines if line.startswith("| kl, given text |")]
    assert "-0.1000 [-0.1000, -0.1000] 1/1" in ce and "+0.1000 [+0.1000, +0.1000] 0/1" in given


def test_quality_tells_texts_apart_by_how_they_begin(tmp_path):
    from quality_work import text_id

    def written(name, *lines):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dense-1.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return text_id(tmp_path / name)

    assert written("short", "one") == written("long", "one", "two") != written("other", "two")


def test_quality_fades_the_variance_by_half(options):
    from quality_work import VARIANTS

    from recover.config.recipe import load_recipe

    recipe = BENCHMARKS.parent / "recipes/smollm2-135m-drop3.yaml"
    for name, weight in (("kl + 1 var -> 0", 1.0), ("kl + 3 var -> 0", 3.0)):
        loss = load_recipe(recipe, VARIANTS[name].fields).train.loss
        assert loss.kl == 1.0
        assert [loss.at(share).variance for share in (0.0, 0.25, 0.5, 1.0)] == [weight, weight / 2, 0.0, 0.0]


class Counting:
    """A bench without a model. Each task notes what was done when it began."""

    def __init__(self, options):
        self.done = options.out / "done"

    def do(self, task):
        if task.name == "bad":
            raise ValueError("what was wrong")
        if task.name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if task.name == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)
        before = self.done.read_text().split() if self.done.exists() else []
        with self.done.open("a") as file:
            file.write(task.name + "\n")
        return [{"name": task.name, "before": before}]


class Piece(NamedTuple):
    name: str
    needs: frozenset = frozenset()

    @property
    def key(self):
        return self.name


def test_a_crew_keeps_to_what_tasks_need_and_outlives_what_fails(options, capsys):
    from crew import Crew

    pieces = [Piece("last", frozenset({"first", "second"})), Piece("bad"), Piece("never", frozenset({"bad"}))]
    pieces += [Piece("first"), Piece("killed"), Piece("second")]
    rows = []
    Crew(Counting, options, pieces).run(60, rows.append)
    assert [row["name"] for row in rows if row["name"] == "last"] == ["last"]
    assert {row["name"] for row in rows} == {"first", "second", "last"}
    (last,) = [row for row in rows if row["name"] == "last"]
    assert set(last["before"]) == {"first", "second"}
    said = capsys.readouterr().out
    assert "ValueError: what was wrong" in said and "exit code -9" in said and "1 tasks not done, 2 failed" in said


def test_a_crew_ends_in_time_whatever_its_workers_do(options, monkeypatch, capsys):
    import crew

    hand_out, late = crew.Crew._hand_out, []

    def handed_out(self):
        hand_out(self)
        late.extend(task for task in self.busy.values() if task == Piece("deaf"))

    # The time is over once the second piece is handed out, however slow the machine is.
    monkeypatch.setattr(crew.Crew, "_hand_out", handed_out)
    monkeypatch.setattr(crew, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 1000 * bool(late)))
    monkeypatch.setattr(crew, "GRACE_SECONDS", 0.2)
    options.jobs = 1
    rows = []
    crew_of_one = crew.Crew(Counting, options, [Piece("first"), Piece("deaf")])
    processes = list(crew_of_one.workers.values())
    crew_of_one.run(500, rows.append)
    assert [row["name"] for row in rows] == ["first"] and not any(process.is_alive() for process in processes)
    assert "1 tasks not done" in capsys.readouterr().out


def test_rows_at_equal_time_wait_for_those_they_take_as_long_as(options):
    import on_policy

    from recover.config.recipe import load_recipe

    cfg = load_recipe(BENCHMARKS.parent / "recipes/smollm2-135m-drop3.yaml").train
    options.arms, options.temperature, options.seeds = ["0.5"], 1.0, [4, 7]
    tasks = on_policy.tasks_for(cfg, options)
    assert len(tasks) == 1 + 2 * 5 and tasks[0].needs == set()
    assert {task.seed for task in tasks[1:6]} == {4}
    keys = {task.key for task in tasks}
    for task in tasks[1:]:
        assert ("plan", 0) in task.needs <= keys
        equal = task.row.startswith("equal time")
        assert ("on-policy 0.5", task.seed) in task.needs if equal else task.needs == {("plan", 0)}


def test_waits_are_counted_by_stage_at_the_line_that_asked(monkeypatch, capsys):
    import warnings

    import stages as benchmark

    from recover.probe import compare

    waits = benchmark.Waits()
    waits.stage = "before"
    monkeypatch.setattr(warnings, "showwarning", waits)
    asked = lambda: warnings.warn("called a synchronizing CUDA operation", stacklevel=1)  # noqa: E731
    monkeypatch.setattr(compare.torch, "stack", lambda tensors: (asked(), tensors[0][None])[1])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = waits
        for _ in range(3):
            compare.equal([(torch.ones(2), torch.ones(2))])
        warnings.warn("another thing", stacklevel=1)
    (where,) = waits.found["before"]
    assert where.startswith("probe/compare.py:") and where.endswith(" equal") and waits.found["before"][where] == 3
    row = {"stage": "before", "seconds": 2.0, "parts": {"probing": 1.5, "other": 0.5}, "calls": 1}
    benchmark.show([row], waits)
    assert "| before | 2.0 | probing 1.5, other 0.5 | 3 |" in capsys.readouterr().out


def test_a_profile_of_steps_counts_kernels_by_launch_and_finds_what_ran_in_gaps():
    """Two steps of 1 ms after the first one: a graph of two kernels, one kernel by itself, a gap of 0.4 ms."""
    import training_profile

    events = [
        {"cat": "user_annotation", "name": training_profile.STEP, "ts": ts, "dur": 1000.0, "tid": 1}
        for ts in (0.0, 1000.0, 2000.0)
    ]
    for number, start in enumerate((0.0, 1000.0, 2000.0)):
        calls = (("cudaGraphLaunch", 2 * number), ("cudaLaunchKernel", 2 * number + 1))
        events += [
            {"cat": "cuda_runtime", "name": name, "ts": start, "dur": 1.0, "tid": 1, "args": {"correlation": each}}
            for name, each in calls
        ]
        kernels = (("gemm", 0.0, 300.0, 0), ("flash", 300.0, 200.0, 0), ("adam", 500.0, 100.0, 1))
        events += [
            {
                "cat": "kernel",
                "name": name,
                "ts": start + at,
                "dur": dur,
                "tid": 7,
                "args": {"correlation": 2 * number + i},
            }
            for name, at, dur, i in kernels
        ]
        frames = (("torch/x.py(1): outer", 550.0, 440.0), ("recover/y.py(2): mine", 560.0, 430.0))
        events += [
            {"cat": "python_function", "name": name, "ts": start + at, "dur": dur, "tid": 1} for name, at, dur in frames
        ]
        events += [{"cat": "python_function", "name": "a loader", "ts": start + 700.0, "dur": 200.0, "tid": 2}]
    events.sort(key=lambda event: event["ts"])
    lines = training_profile.summary(events, "cuda")
    assert lines[0].startswith("2 steps, milliseconds a step: 1.00; device busy 0.60, idle 0.40, of that 0.40 in gaps")
    found = [line.split(maxsplit=2) for line in lines]
    assert ["0.500", "2.0", "graph of 2 kernels, 1.0 times a step"] in found
    assert ["0.100", "1.0", "launched one by one"] in found and ["0.300", "1.0", "gemm"] in found
    assert found[-1] == ["0.100", "1.0", "adam"]
    gaps = training_profile.idle(events, "cuda")[2:]
    assert [line.split(maxsplit=2)[2] for line in gaps] == ["recover/y.py(2): mine <- recover/y.py(2): mine"] * 2
    assert [line.split()[:2] for line in gaps] == [["0.40", "0.60"]] * 2


def test_a_whole_job_is_a_row_a_stage_with_its_memory(tmp_path, capsys):
    import whole_job

    asked = ["--shape", "qwen3.5-9b", "--tiny", "--until", "prune", "--out", str(tmp_path)]
    rows = whole_job.main(
        [*asked, "--set", "measure.tasks=[embedded:facts]", "probe.prompts=embedded:tasks/prompts.jsonl"]
    )
    assert [row["stage"] for row in rows] == ["random weights", "plan", "dense", "prune"]
    assert all(row["done"] and row["seconds"] > 0 and row["gib"]["host"] > 0.05 for row in rows)
    assert [json.loads(line) for line in (tmp_path / "whole_job.jsonl").read_text().splitlines()] == rows
    assert json.loads((tmp_path / "estimate.json").read_text())["parameters_pruned"]
    said = capsys.readouterr().out
    assert "4 of 4 blocks" in said and all(said.count(whole_job.line(row)) == 2 for row in rows)


def test_a_whole_job_takes_as_many_blocks_as_fit_on_the_disk_twice(tmp_path, monkeypatch):
    import whole_job

    shape = whole_job.SHAPES["30b-a3b"]
    given = argparse.Namespace(tiny=False, blocks=None)
    sizes = {blocks: 2 * whole_job.parameters(shape.config(tiny=False, blocks=blocks)) for blocks in (16, 48)}
    assert 61e9 < sizes[48] < 62e9
    for free, blocks in ((2.2 * sizes[48], 48), (2.2 * sizes[16], 16)):
        monkeypatch.setattr(whole_job.shutil, "disk_usage", lambda _, free=free: argparse.Namespace(free=free))
        assert whole_job.fitting(shape, given, tmp_path).num_hidden_layers == blocks


def test_a_whole_job_that_is_over_its_time_has_a_row_of_what_was_begun(tmp_path, capsys):
    import whole_job

    from recover.run import stages

    def takes_long(_stage, _context):
        time.sleep(60)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.Stage, "run", takes_long)
        rows = whole_job.main(["--tiny", "--seconds", "3"])
    assert [(row["stage"], row["done"]) for row in rows] == [("random weights", True), ("plan", False)]
    assert "stopped after" in capsys.readouterr().out


def test_bigger_gives_the_same_losses_wherever_weights_lie(tmp_path):
    import json

    import bigger

    out = tmp_path / "rows.jsonl"
    for row in ("tiny:gpu", "tiny:cpu", "tiny:cpu+checkpointing"):
        arguments = ["--out", str(out), "--stages", "prune", "train", "merge", "--steps", "1"]
        options = bigger.parser_of().parse_args([*arguments, "--row", row])
        bigger.Row(options).run()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["load", "prune", "train", "merge"] * 3
    assert [line["weights"] for line in lines if "weights" in line] == ["resident", "main memory", "main memory"]
    losses = [line["losses"] for line in lines if "losses" in line]
    assert losses[0] == losses[1] == losses[2] and losses[0][-1] < losses[0][0]


@pytest.mark.slow  # four processes
def test_bigger_shares_weights_between_processes_and_ends_them_all(tmp_path, monkeypatch):
    import bigger

    out = tmp_path / "rows.jsonl"
    words = f"--out {out} --stages prune text train merge --steps 1 --rows tiny:gpu tiny:shared".split()
    monkeypatch.setenv("PYTHONPATH", str(Path(bigger.__file__).parents[1]))
    monkeypatch.setattr(sys, "argv", ["bigger.py", *words])
    bigger.main()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["load", "prune", "text", "train", "merge"] * 2
    assert [line.get("processes", 1) for line in lines] == [1] * 5 + [2] * 5
    alone, both = ([line for line in lines if line["row"] == row] for row in ("tiny:gpu", "tiny:shared"))
    assert alone[3]["losses"][0] == both[3]["losses"][0] and both[3]["losses"][-1] < both[3]["losses"][0]
    assert (alone[2]["tokens"], alone[4]["bytes"]) == (both[2]["tokens"], both[4]["bytes"])
    endless = [*words[:-2], "tiny:shared", "--seconds", "25", "--steps", "1_000_000"]
    monkeypatch.setattr(sys, "argv", ["bigger.py", *endless])
    bigger.main()
    *begun, last = [json.loads(line) for line in out.read_text().splitlines()]
    assert begun[-1]["stage"] == "text" and last["code"] == "ended after 25.0 s"
    assert not [each for each in psutil.process_iter(["cmdline"]) if str(out) in (each.info["cmdline"] or [])]
