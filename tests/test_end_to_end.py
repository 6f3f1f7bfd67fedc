"""Whole runs on the embedded model, cut small: each kind of pruning, a run that does nothing, a stop, bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import faulty
import pytest
import safetensors.torch
import torch
from small_run import DEPTH, MASKED, QUICKSTART, SMALL, begun, finished, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from recover.base.artifacts import read_json, read_jsonl
from recover.base.errors import DataError, ModelError, RecipeError, RecoverError
from recover.run import stages
from recover.run.directory import WRITTEN, RunDirectory

CALIBRATION = "{data: 'embedded:tasks/calibration.jsonl', samples: 2, length: 64}"


@pytest.mark.parametrize(
    ("prune", "blocks", "zeros"),
    [
        (*DEPTH, 10, 0.0),
        (*MASKED[:1], 12, 0.4),
        *(
            pytest.param("prune=" + prune, *rest, marks=pytest.mark.slow)
            for prune, *rest in (
                (f"{{kind: wanda, pattern: '2:4', calibration: {CALIBRATION}}}", 12, 0.5),
                (f"{{kind: sparsegpt, pattern: '4:8', calibration: {CALIBRATION}}}", 12, 0.5),
                ("{kind: depth, unit: sublayer, sites: ['mlp:3', 'attention:4']}", 11, 0.0),
                (f"{{kind: width, mlp: 0.25, multiple: 8, calibration: {CALIBRATION}}}", 12, 0.0),
                ("{kind: magnitude, sparsity: 0.25}", 12, 0.25),
                (f"{{kind: depth, count: 1, score: angular, calibration: {CALIBRATION}}}", 11, 0.0),
                (f"{{kind: depth, count: 2, contiguous: true, calibration: {CALIBRATION}}}", 10, 0.0),
                (f"{{kind: depth, count: 2, score: taylor, calibration: {CALIBRATION}}}", 10, 0.0),
                (f"{{kind: depth, count: 1, score: perplexity, repair: linear, calibration: {CALIBRATION}}}", 11, 0.0),
                (f"{{kind: depth, count: 1, score: variance, repair: rescale, calibration: {CALIBRATION}}}", 11, 0.0),
                (f"{{kind: depth, unit: pair, count: 2, calibration: {CALIBRATION}}}", 10, 0.0),
                (f"{{kind: depth, unit: attention, count: 2, calibration: {CALIBRATION}}}", 12, None),
                (f"{{kind: depth, unit: mlp, count: 2, calibration: {CALIBRATION}}}", 12, None),
                (f"{{kind: wanda, sparsity: 0.5, allocation: owl, calibration: {CALIBRATION}}}", 12, 0.5),
                (f"{{kind: wanda, sparsity: 0.3, allocation: kl, calibration: {CALIBRATION}}}", 12, 0.3),
                (f"{{kind: sparsegpt, sparsity: 0.5, calibration: {CALIBRATION}}}", 12, 0.5),
                (f"{{kind: width, mlp: 0.25, score: fluctuation, multiple: 8, calibration: {CALIBRATION}}}", 12, 0.0),
            )
        ),
    ],
)
def test_a_run_ends_in_a_checkpoint_that_stock_classes_load(tmp_path_factory, prune, blocks, zeros):
    """Runs that other tests look at too; of other kinds, tests of their own hold that an export is what was trained."""
    overrides = MASKED if prune in MASKED else (prune,)
    directory = RunDirectory(finished(tmp_path_factory, *overrides))
    assert [row["stale"] for row in stages.status(directory.root)] == [None] * len(stages.names(deploy=False))
    assert read_json(directory.verify)["ok"]
    model = AutoModelForCausalLM.from_pretrained(directory.deploy, dtype=torch.float32)
    assert type(model).__module__.startswith("transformers.models.llama")
    assert len(model.model.layers) == model.config.num_hidden_layers
    assert model.config.num_hidden_layers == blocks or (zeros is None and model.config.num_hidden_layers <= blocks)
    linears = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    found = sum(int((linear.weight == 0).sum()) for linear in linears) / sum(x.weight.numel() for x in linears)
    assert zeros is None or found == pytest.approx(zeros, abs=0.005)
    prompt = AutoTokenizer.from_pretrained(directory.deploy)("Lisbon is a city in", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4).shape[1] > prompt["input_ids"].shape[1]
    epochs = read_jsonl(directory.epochs)
    assert [record["epoch"] for record in epochs] == [1, 2]
    best = max(epochs, key=lambda record: (record["score"], -record["epoch"]))
    assert read_json(directory.train / "best.json")["epoch"] == best["epoch"]
    strange = [path for path in directory.root.rglob("*") if path.is_file() and not known(directory, path)]
    assert not strange, "WRITTEN of run_directory.py does not list all that a run writes"
    report = read_json(directory.report_json)
    assert report["missing"] == [] and report["headline"]["recovered"]["generation"] is not None


def known(directory: RunDirectory, path: Path) -> bool:
    """Whether a file lies where a run is known to write it, or in a folder that is published, or is only added to."""
    below = path.relative_to(directory.root)
    published = (
        below.parts[0] == "deploy" or below.parts[1] in ("epoch-1", "epoch-2") if len(below.parts) > 1 else False
    )
    if published or below.parts[:2] == ("train", "data"):
        return True
    if below.parts[:2] == ("train", "checkpoints") and len(below.parts) > 3:  # the last one stays, to go on from
        below = below.parents[len(below.parts) - 4]
        path = directory.root / below
    names = WRITTEN.get(below.parent.as_posix(), "")
    return path.name == ".lock" or bool(re.fullmatch(rf"{names}|(?:epochs|times|checkpoints)\.jsonl", path.name))


def test_a_second_run_does_nothing_and_a_changed_field_is_named(tmp_path, capsys):
    depth = "prune={kind: depth, blocks: [3]}"
    directory = run(tmp_path, depth, until="before")
    stamp = directory.done("before")
    run(tmp_path, depth, until="before")
    assert directory.done("before") == stamp
    capsys.readouterr()
    run(tmp_path, "prune={kind: depth, blocks: [5]}", until="prune")
    assert "prune.blocks: [3] -> [5]" in capsys.readouterr().out
    assert read_json(directory.prune / "plan.json")["dropped"] == [5]
    stale = {row["stage"]: row["stale"] for row in stages.status(directory.root)}
    assert stale["dense"] is None and "prune" in stale["before"]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_training_goes_on_where_it_was(tmp_path_factory, tmp_path, number, capsys):
    begun(tmp_path_factory, tmp_path, *DEPTH)
    overrides = ["train.tokens=1000", "train.save_steps=3", *DEPTH]
    words, log = ["run", QUICKSTART, "--runs", tmp_path, *SMALL, *overrides], tmp_path / "log"
    process = faulty.start(lambda: faulty.command(*words), log)
    checkpoints = tmp_path / "quickstart" / "train" / "checkpoints"
    deadline = time.monotonic() + 240
    while not list(checkpoints.glob("checkpoint-[1-9]*/MANIFEST.json")):
        assert time.monotonic() < deadline and not os.waitpid(process, os.WNOHANG)[0], log.read_text()
        time.sleep(0.05)
    os.kill(process, number)
    code, output = faulty.end(process), log.read_text()
    assert code == 128 + number, output
    assert "Traceback" not in output
    directory = RunDirectory(tmp_path / "quickstart")
    assert directory.done("before") is not None and directory.done("train") is None
    run(tmp_path, *overrides, until="train")
    output = capsys.readouterr().out
    assert "going on from checkpoint-" in output and "dense    done" in output
    assert directory.done("train") is not None


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["cpu_zero2", "cpu_zero3"])
def test_two_processes_under_deepspeed_do_the_whole_job_as_one_does(tmp_path, launch):
    one = run(tmp_path / "one")
    config = QUICKSTART.parent.parent / "launch" / f"{launch}.yaml"
    launcher = ["accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    job = ["-m", "recover", "run", str(QUICKSTART), "--runs", str(tmp_path / "two"), *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = QUICKSTART.parent.parent  # the launch files name their JSON from here
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *job], env=environment, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = RunDirectory(tmp_path / "two" / "quickstart")
    assert read_json(one.before / "probe.json") == read_json(two.before / "probe.json")
    losses = [[record["train"]["loss"] for record in read_jsonl(directory.epochs)] for directory in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert read_json(one.before / "probe.json")["choices"][0]["items"] == 6
    headlines = [read_json(directory.after / "measure.json")["headline"] for directory in (one, two)]
    assert headlines[0].pop("retrieval") is headlines[1].pop("retrieval") is None  # no such task; approx knows no None
    assert headlines[0] == pytest.approx(headlines[1], rel=1e-5)


def broken_model(folder: Path, **config: Any) -> Path:
    """A copy of the embedded model with changes to its config."""
    from recover.config.recipe import embedded

    folder.mkdir()
    for path in embedded("fable-2m").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


def truncated(folder: Path) -> Path:
    path = broken_model(folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return folder


def not_finite(folder: Path) -> Path:
    path = broken_model(folder) / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.norm.weight"][0] = float("nan")
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    return folder


BAD_MODELS = {
    "unknown type": (lambda folder: broken_model(folder, model_type="made_up"), "made_up"),
    "truncated weights": (truncated, "model.safetensors"),
    "weights that are NaN": (not_finite, "norm"),
    "weights of another size": (
        lambda folder: broken_model(folder, vocab_size=512),
        "vocab_size is 512 in config.json, and model.embed_tokens.weight has 1,024 rows",
    ),
    "no folder": (lambda folder: folder, "model"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_is_refused_by_name(tmp_path, case):
    make, named = BAD_MODELS[case]
    with pytest.raises(ModelError, match=named):
        run(tmp_path / "runs", f"model.source={make(tmp_path / 'model')}", until="dense")
    assert RunDirectory(tmp_path / "runs" / "quickstart").done("dense") is None


@pytest.mark.parametrize(
    ("override", "kind", "named"),
    [
        ("prune={kind: depth, blocks: [1,2,3,4,5,6,7,8,9,10,11,0]}", RecipeError, "12"),
        (f"prune={{kind: depth, count: 12, calibration: {CALIBRATION}}}", RecipeError, "12"),
        ("prune={kind: depth, blocks: [0]}", RecipeError, "block 0"),
        ("train.length=4096", RecipeError, "train.length"),
        ("measure.tasks=[nowhere.yaml]", RecoverError, "nowhere.yaml"),
        ("train.length=20", DataError, "leaves none of train.length 20"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_loaded(tmp_path, override, kind, named):
    with pytest.raises(kind, match=named):
        run(tmp_path, override, until="plan")


def test_an_empty_data_set_is_refused_at_plan(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        run(tmp_path, f"train.data.0.prompts={tmp_path / 'empty.jsonl'}", until="plan")
