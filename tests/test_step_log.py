"""Laws of `steps.jsonl`: every step once, in order, whatever stopped the training or sent it back."""

import json
import os
import signal

import pytest
import two_processes
from byte_tokenizer import byte_tokenizer
from tiny import tiny
from transformers import TrainerCallback

from recover.base.artifacts import read_jsonl
from recover.base.errors import StopRequested
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.report.training import curve
from recover.train.train import train
from recover.train.trainer import RecoverTrainer

STEPS = two_processes.STEPS


def go(folder, after_epoch=lambda epoch, _: float(epoch), **changes):
    two_processes.write_text(folder)
    twin = Twin(tiny(), Plan("depth", 6, (2, 4)))
    cfg = two_processes.cfg(folder, save_steps=1, **changes)
    train(twin, byte_tokenizer(), cfg, folder / "train", after_epoch, seed=3)
    return folder / "train" / "steps.jsonl"


def stop_before_step(monkeypatch, number):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step + 1 == number:
                os.kill(os.getpid(), signal.SIGTERM)

    init = RecoverTrainer.__init__

    def with_stop(trainer, *arguments, **named):
        init(trainer, *arguments, **named)
        trainer.add_callback(Stop())

    monkeypatch.setattr(RecoverTrainer, "__init__", with_stop)


def stopped_early(folder, monkeypatch):
    """The file of a training that was stopped, and how many steps it has."""
    stop_before_step(monkeypatch, 2)
    with pytest.raises(StopRequested):
        go(folder)
    monkeypatch.undo()
    path = folder / "train" / "steps.jsonl"
    stopped = len(read_jsonl(path))
    assert 0 < stopped < STEPS
    return path, stopped


def untimed(lines):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return read_jsonl(go(tmp_path_factory.mktemp("straight")))


def test_each_step_has_a_line_with_what_it_learnt(straight):
    assert [line["step"] for line in straight] == [*range(1, STEPS + 1)]
    expected = {"loss", "kl", "variance", "reverse_kl", "ce", "grad_norm", "lr", "variance_weight"}
    assert all(expected <= line.keys() for line in straight)
    for name in ("tokens", "seconds"):
        values = [line[name] for line in straight]
        assert values == sorted(set(values)) and values[0] > 0
    assert straight[-1]["loss"] != straight[0]["loss"]


def test_every_term_that_has_a_weight_is_logged_and_they_add_up_to_the_loss(tmp_path):
    weights = {"kl": 1.0, "variance": 0.2, "variance_r": 0.3, "reverse_kl": 0.4, "jsd": 0.5, "ce": 0.1}
    epochs = []
    path = go(tmp_path, lambda _, record: epochs.append(record), loss={**weights, "temperature": 2.0})
    for line in [*read_jsonl(path), *(record["train"] for record in epochs)]:
        total = sum((1 if name == "ce" else 4) * weight * line[name] for name, weight in weights.items())
        assert line["loss"] == pytest.approx(total, rel=1e-5) and all(line[name] > 0 for name in weights)
    found = curve(path, {"train": {"loss": weights}})
    assert found is not None and weights.keys() < found["points"].keys()


def test_the_curve_of_the_report_has_the_means_of_the_epochs(tmp_path):
    epochs = []

    def after_epoch(epoch, record):
        epochs.append(record)
        return float(epoch)

    recipe = {"train": two_processes.cfg(tmp_path).model_dump()}
    found = curve(go(tmp_path, after_epoch), recipe)
    assert found is not None and found["last_step"] == STEPS and found["tokens_per_second"] > 0
    points = found["points"]
    for name in ("loss", "kl", "variance", "ce"):
        assert mean_per_token(points["tokens"], points[name]["mean"]) == pytest.approx(
            mean_per_token([each["tokens"] for each in epochs], [each["train"][name] for each in epochs]), rel=1e-3
        )
    assert "reverse_kl" not in points  # it has no weight


def mean_per_token(tokens, means):
    parts = [up_to - before for before, up_to in zip([0, *tokens], tokens, strict=False)]
    return sum(part * mean for part, mean in zip(parts, means, strict=True)) / tokens[-1]


def test_a_stopped_training_writes_the_lines_of_a_straight_one(straight, tmp_path, monkeypatch):
    path, stopped = stopped_early(tmp_path, monkeypatch)
    # As if it had been killed behind its last checkpoint, in the middle of a line.
    with path.open("a") as file:
        file.write(json.dumps({"step": stopped + 1, "loss": 9.0}) + '\n{"step": ')
    assert untimed(read_jsonl(go(tmp_path))) == untimed(straight)


def test_a_damaged_file_costs_its_lines_and_not_the_training(straight, tmp_path, monkeypatch, capsys):
    path, done = stopped_early(tmp_path, monkeypatch)
    path.write_text("{}\n")
    assert untimed(read_jsonl(go(tmp_path))) == untimed(straight)[done:]
    assert "the training curve begins anew" in " ".join(capsys.readouterr().err.split())


def test_another_training_does_not_keep_them(straight, tmp_path):
    go(tmp_path, tokens=1500)
    assert untimed(read_jsonl(go(tmp_path))) == untimed(straight)
