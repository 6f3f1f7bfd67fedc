"""`train.stop`: a training ends when generation rises no more, and its rate falls to zero before it does."""

import os
import signal

import pytest
import torch
import two_processes
from byte_tokenizer import byte_tokenizer
from safetensors.torch import load_file
from test_trainer import at_step  # noqa: F401
from tiny import tiny

from recover.base.artifacts import read_json, read_jsonl
from recover.base.errors import StopRequested
from recover.config.recipe import StopEarly
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.train.course import early_ends
from recover.train.train import train

ENDS = [10, 20, 30, 40]


@pytest.mark.parametrize(
    ("scores", "stop", "ends"),
    [
        ([0.1, 0.5, 0.7, 0.9], {}, ENDS),
        ([0.5, 0.5], {}, [10, 20, 22]),
        ([0.5, 0.505], {}, [10, 20, 22]),
        ([0.5, 0.52], {}, ENDS),
        ([0.5, 0.5, 0.9], {}, [10, 20, 22]),  # measured behind the fall: the first call stands
        ([0.5, 0.4, 0.45], {"patience": 2, "decay": 0.2}, [10, 20, 30, 36]),
        ([0.5, 0.4, 0.6], {"patience": 2}, ENDS),
        ([0.5, 0.5], {"decay": 0}, [10, 20]),
        ([0.5, 0.6, 0.6], {"decay": 0.9}, [10, 20, 30, 40]),
        ([0.1, 0.5, 0.7, 0.7], {}, ENDS),  # the last epoch ends by itself
        ([0.5, None, 0.4], {}, ENDS),
        ([], {}, ENDS),
    ],
)
def test_the_first_epochs_that_bring_nothing_end_it(scores, stop, ends):
    assert early_ends(ENDS, scores, StopEarly(**stop)) == ends
    assert early_ends(ENDS, scores, None) == ENDS


def test_epochs_before_a_lengthening_do_not_end_what_came_to_it():
    assert early_ends(ENDS, [0.5, 0.5], StopEarly(), begin=20) == ENDS
    assert early_ends(ENDS, [0.5, 0.5, 0.5], StopEarly(), begin=20) == [10, 20, 30, 33]


def go(folder, name, scores, **changes):
    fields = {"tokens": 1500, "batch_size": 2, "epochs": 4, "lr": 3e-3, "scheduler": "constant", "loss": {"kl": 1.0}}
    cfg = two_processes.cfg(folder, **{**fields, "stop": {"decay": 0.3}, **changes})
    twin = Twin(tiny(), Plan("depth", 6, (2, 4)))
    return train(twin, byte_tokenizer(), cfg, folder / name, lambda epoch, _: scores[epoch - 1], seed=3)


def test_the_rate_falls_to_zero_before_it_ends_and_the_end_is_measured(tmp_path, capsys):
    two_processes.write_text(tmp_path)
    best = go(tmp_path, "train", [0.5, 0.5, 0.8, 0.9])
    steps, record = read_jsonl(tmp_path / "train/steps.jsonl"), read_json(tmp_path / "train/best.json")
    ends = [each["step"] for each in record["epochs"]]
    assert best.name == "epoch-3" and [each["score"] for each in record["epochs"]] == [0.5, 0.5, 0.8]
    assert len(steps) == ends[2] == ends[1] + -(-3 * ends[1] // 10)
    rates = [step["lr"] for step in steps]
    fall = rates[ends[1] :]
    assert {*rates[2 : ends[1]]} == {3e-3} and fall[0] == 3e-3 and 0 < fall[-1] < 1.5 * 3e-3 / len(fall)
    assert fall == sorted(fall, reverse=True)
    assert "more tokens bring no more generation (train.stop)" in capsys.readouterr().out
    assert read_json(tmp_path / "train/training.json")["finished"]


def test_a_fall_that_is_stopped_goes_on_to_the_same_bits(tmp_path, at_step, monkeypatch):  # noqa: F811
    two_processes.write_text(tmp_path)
    scores = [0.5, 0.5, 0.8, 0.9]
    straight = load_file(go(tmp_path, "straight", scores) / "adapter_model.safetensors")
    step = read_json(tmp_path / "straight/best.json")["epochs"][1]["step"] + 2
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StopRequested):
        go(tmp_path, "train", scores)
    monkeypatch.undo()
    found = load_file(go(tmp_path, "train", scores) / "adapter_model.safetensors")
    assert all(torch.equal(found[name], straight[name]) for name in straight)


def test_without_a_fall_it_ends_at_once(tmp_path):
    two_processes.write_text(tmp_path)
    go(tmp_path, "train", [0.5, 0.5, 0.8, 0.9], stop={"decay": 0})
    assert len(read_json(tmp_path / "train/best.json")["epochs"]) == 2
