"""The benchmark on several GPUs: it counts the tokens that are trained, starts from text alone, finds what is torn."""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import faulty
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from safetensors.torch import save_file

from recover.base.artifacts import read_json, write_json, write_manifest
from recover.config.recipe import GivenText
from recover.train.checkpoints import Checkpoints
from recover.train.sources import read_rows, samples_of

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "several_gpus"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    monkeypatch.syspath_prepend(str(FOLDER))


def test_rows_of_the_rate_are_as_long_as_they_count(tmp_path):
    import training_rate

    path = tmp_path / "text.jsonl"
    training_rate.write_text(path, sequences=5, length=48)
    cfg = GivenText(kind="given", source=str(path))
    samples = [sample for row in read_rows(str(path)) for sample in samples_of(row, cfg, byte_tokenizer(), 48)]
    assert [len(sample.ids) for sample in samples] == [48] * 5
    assert len({tuple(sample.ids) for sample in samples}) == 5
    steps = [{"seconds": second, "loss": 1.0} for second in (9.0, 10.0, 11.0, 12.0, 14.0, 16.0, 19.0, 99.0)]
    options = argparse.Namespace(batch=2, length=48, steps=3)  # the last one was profiled
    found = training_rate.figures(steps, [7], options)
    assert found["times"] == [2.0, 2.0, 3.0] and found["tokens_per_second"] == 2 * 48 / 2.0


def test_a_profile_tells_computing_from_moving_and_from_nothing():
    import step_profile

    def event(name, start, duration, cat="kernel"):
        return {"name": name, "ts": start, "dur": duration, "cat": cat}

    events = [event("gemm", 0, 4000), event("gemm", 3000, 2000), event("ncclDevKernel_AllGather", 4000, 3000)]
    events += [event("Memcpy PtoP (Device -> Device)", 9000, 1000, "gpu_memcpy"), event("gemm", 9500, 1500)]
    events += [event("cudaLaunchKernel", 0, 11000, "cuda_runtime")]
    found = step_profile.of_trace(events)
    assert found["milliseconds"] == 11 and found["computing"] == 6.5 and found["between_gpus"] == 4
    assert found["only_between_gpus"] == 2.5 and found["idle"] == 2 and found["kernels"] == 5
    assert found["top"][0] == {"name": "gemm", "calls": 3, "milliseconds": 7.5}


def test_a_copy_of_a_run_keeps_its_pruning_and_its_text_and_nothing_that_was_learnt(tmp_path):
    from launching import untrained_copy

    files = [
        "prune/DONE.json",
        "before/measure.json",
        "train/data/dense-1.jsonl",
        "train/DONE.json",
        "epochs.jsonl",
    ]
    files += ["train/epoch-1/adapter_model.safetensors", "after/measure.json", "deploy/DONE.json", "report.html"]
    for name in files:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("{}")
    copy = untrained_copy(tmp_path / "run", tmp_path / "copy")
    left = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert left == {"prune/DONE.json", "before/measure.json", "train/data/dense-1.jsonl"}


def test_a_checkpoint_that_is_not_whole_is_found(tmp_path):
    from kills import half_published

    (tmp_path / "training.json").write_text(json.dumps({"fingerprint": "x"}))
    checkpoints = Checkpoints(tmp_path, "x")
    for step in (1, 2):
        checkpoints.save(step, {"weight/a": torch.zeros(3)}, {"row": 0})
    assert half_published(tmp_path) == []
    (tmp_path / "checkpoints/checkpoint-2/trained.safetensors").write_bytes(b"torn")
    assert len(half_published(tmp_path)) == 1


def test_two_runs_are_held_against_each_other_number_by_number():
    from whole import apart, leaves

    assert apart({"a": [1.0, 2.0], "b": "x"}, {"a": [1.0, 2.5], "b": "x"}) == 0.2
    assert apart({"kl": 2e-9}, {"kl": 1e-9}) == 0.5 and apart({"kl": 2e-9}, {"kl": 1e-9}, least=1e-3) == pytest.approx(
        1e-6
    )
    assert apart({"a": 1}, {"b": 1}) == apart([1], [1, 2]) == apart("x", "y") == apart(None, 1.0) == math.inf
    assert list(leaves({"b": ["x", "y"], "a": {"c": "z"}})) == ["z", "x", "y"]


def test_what_is_torn_in_a_run_directory_is_found_and_what_is_being_written_is_not(tmp_path):
    from whole_kills import half_published

    folder = tmp_path / "train" / "epoch-1"
    folder.mkdir(parents=True)
    save_file({"a": torch.zeros(3)}, folder / "adapter_model.safetensors")
    write_manifest(folder)
    write_json(tmp_path / "dense" / "measure.json", {"generation": 1.0})
    (tmp_path / ".deploy.7.writing").mkdir()
    (tmp_path / ".deploy.7.writing" / "model.safetensors").write_bytes(b"torn")
    assert half_published(tmp_path) == []
    (tmp_path / "deploy").mkdir()
    (tmp_path / "dense" / "measure.json").write_text('{"generation": ')
    (folder / "adapter_model.safetensors").write_bytes(b"torn")
    found = half_published(tmp_path)
    assert [line.split(":")[0] for line in found] == [
        "dense/measure.json",
        "deploy",
        "train/epoch-1",
        "train/epoch-1/adapter_model.safetensors",
    ]


def test_a_process_dies_inside_the_function_that_was_named_at_the_call_that_was_named(tmp_path):
    import watched

    def killed():
        made: Any = types.ModuleType("made")
        made.work = lambda number: (print(number, flush=True), time.sleep(5 * number))
        sys.modules["made"] = made
        watched.PLACES = {"here": ("made", "work", 1, 0.05)}
        watched.kill_inside("here", tmp_path / "note.json")
        made.work(0)
        made.work(1)
        print("alive", flush=True)

    code, output = faulty.run(tmp_path / "run", killed)
    assert code == -signal.SIGKILL and output == "0\n1\n"
    note = read_json(tmp_path / "note.json")
    assert note["inside"] and note["innermost"] == "<lambda>"


def test_rates_are_shares_of_what_as_many_single_gpus_do():
    from turns import order, table

    def row(launch, what, processes, rate):
        more = {"seconds": 0.5, "before_bytes": 0, "peak_bytes": [2e9] * processes, "losses": [1.5]}
        return {"row": f"{launch}, {what}", "what": what, "processes": processes, "tokens_per_second": rate, **more}

    rows = [row("one GPU", "0.5B", 1, 100.0), row("one GPU", "0.5B+kernels", 1, 80.0)]
    rows.append(row("2 x gpu", "0.5B+shards", 2, 152.0))
    rows.append({"row": "2 x zero3, 7B", "what": "7B", "error": "out of memory"})
    *_, shards, failed = table(rows)
    assert shards == "| 2 x gpu, 0.5B+shards | 152 | 1.52 | 76.0% | 95.0% | 500 | 2.0, 2.0 | 1.5 |"
    assert failed.startswith("| 2 x zero3, 7B | 'out of memory' |") and failed.count("|") == shards.count("|")
    assert order(["zero2", "zero3", "gpu"]) == ["gpu", "zero3", "zero2"]


@pytest.mark.slow
def test_all_of_it_on_two_cpu_processes(tmp_path):
    """Laws, rates and a kill; the job's parts are whole runs, which test_end_to_end.py holds."""
    command = [
        sys.executable,
        str(FOLDER / "several_gpus.py"),
        "law",
        "speed",
        "kills",
        "--tiny",
        "--out",
        str(tmp_path),
    ]
    more = ["--engines", "zero3", "--trials", "1", "--gpus", "2"]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *more],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=580,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    law, speed, kills = (read_json(tmp_path / f"{part}.json")["rows"] for part in ("law", "speed", "kills"))
    assert law and all(row["loss"] < 1e-6 and row["gradient"] < 1e-5 and row["same_texts"] for row in law)
    assert {row["processes"] for row in speed} == {1, 2} and all(len(row["times"]) == 8 for row in speed)
    (trial,) = kills
    assert trial["alive"] == 0 and trial["half_published"] == [] and trial["finished"]
    assert float(trial["loss"]) < 1e-4
