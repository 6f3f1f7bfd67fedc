"""The benchmark on several GPUs: it counts the tokens that are trained, starts from text alone, finds what is torn."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer

from recover.base.artifacts import read_json
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
