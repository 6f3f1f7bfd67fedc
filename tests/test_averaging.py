"""Laws of averaged adapters: what is averaged, that the training does not feel it, and that a resume goes on alike."""

import os
import signal

import pytest
import torch
import two_processes
from byte_tokenizer import byte_tokenizer
from safetensors.torch import load_file
from tiny import tiny
from transformers import TrainerCallback

from recover.base import dist
from recover.base.artifacts import read_json
from recover.base.errors import ArtifactError, RecipeError, StopRequested, TrainingError
from recover.config.recipe import Train
from recover.config.train import refuse_averaging_shares
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.run import estimate
from recover.train import course
from recover.train.optimizer_state import Average, averaged_steps
from recover.train.train import train
from recover.train.trainer import RecoverTrainer

LONG = {"tokens": 2400, "average": 0.4, "lr": 3e-3}  # nine steps, so four of epoch 1 and all but one of epoch 2


class Watch(TrainerCallback):
    """The trained parameters after each step, in the order of the training; `before(step)` comes ahead of it."""

    def __init__(self, before=lambda step: None):
        self.after, self.before = {}, before

    def on_step_begin(self, args, state, control, **_):
        self.before(state.global_step + 1)

    def on_step_end(self, args, state, control, model=None, **_):
        self.after[state.global_step] = {
            name.replace(".default", ""): parameter.detach().clone().cpu()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """watched(name, watch, **changes): a whole recovery in a folder of its own, and what it measured."""
    init = RecoverTrainer.__init__
    current, trainers = [], []

    def with_callback(trainer, *arguments, **named):
        init(trainer, *arguments, **named)
        trainers.append(trainer)
        for watch in current:
            trainer.add_callback(watch)

    monkeypatch.setattr(RecoverTrainer, "__init__", with_callback)

    def go(name, watch, **changes):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        two_processes.write_text(tmp_path)
        current[:] = [watch]
        twin, measured = Twin(tiny(), Plan("depth", 6, (2, 4))), []

        def after_epoch(epoch, _context):
            measured.append({n.replace(".default", ""): p.detach().clone() for n, p in learning(twin)})
            return float(epoch)

        train(twin, byte_tokenizer(), two_processes.cfg(tmp_path, **changes), folder, after_epoch, seed=3)
        return folder, measured

    go.trainers = trainers
    return go


def learning(twin):
    return [(name, value) for name, value in twin.model.named_parameters() if value.requires_grad]


def adapters(folder):
    return [load_file(path / "adapter_model.safetensors") for path in sorted(folder.glob("epoch-*"))]


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].cpu(), expected[name].cpu()) for name in expected)


def test_an_epochs_adapter_is_the_mean_of_those_of_its_last_steps(watched):
    watch, plain = Watch(), Watch()
    folder, measured = watched("averaged", watch, **LONG)
    watched("plain", plain, **{**LONG, "average": None})
    steps = max(watch.after)
    windows = averaged_steps(0.4, steps, [entry["step"] for entry in read_json(folder / "best.json")["epochs"]])
    assert len(windows) == 2 and all(1 < len(window) < steps for window in windows)
    for found, seen, window in zip(adapters(folder), measured, windows, strict=True):
        assert_equal(found, seen)  # what is measured is what is kept
        for name, value in found.items():
            mean = torch.stack([watch.after[step][name].double() for step in window]).mean(0)
            torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-8)
            assert not torch.equal(value, watch.after[window[-1]][name])
    for step, expected in plain.after.items():  # the training is as it would have been
        assert_equal(watch.after[step], expected)


@pytest.mark.parametrize("step", [5, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, 8))])
def test_a_stopped_run_goes_on_to_the_same_mean(watched, step):
    folder, _ = watched("straight", Watch(), **LONG)
    expected = adapters(folder)

    def stop(at):
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StopRequested):
        watched("stopped", Watch(stop), **LONG)
    found, _ = watched("stopped", Watch(), **LONG)
    for ours, theirs in zip(adapters(found), expected, strict=True):
        assert_equal(ours, theirs)


def test_a_mean_goes_back_with_the_training(watched, monkeypatch, capsys):
    """Step 4 is found bad once: back to the checkpoint of step 2, and steps that were undone are not in the mean."""
    monkeypatch.setattr(course, "SKIPS_IN_A_ROW", 1)
    folder, _ = watched("straight", Watch(), **LONG, save_steps=2)
    expected = adapters(folder)
    spoilt = []

    def spoil(step):
        if step == 4 and not spoilt:
            spoilt.append(step)
            watched.trainers[-1].course.skips.found = "spoilt by this test"

    found, _ = watched("back", Watch(spoil), **LONG, save_steps=2)
    assert "back to checkpoint-2" in capsys.readouterr().out
    for ours, theirs in zip(adapters(found), expected, strict=True):
        assert_equal(ours, theirs)


def one(value):
    return torch.nn.Parameter(torch.tensor([float(value)]))


def test_a_skipped_step_adds_nothing():
    parameter = one(0)
    average = Average({"a": parameter}, [range(2, 6)])
    for step, value in enumerate([100.0, 1.0, 2.0, 50.0, 6.0], start=1):
        parameter.data.fill_(value)
        average.add(step, skipped=step == 4)
    with average.in_place():
        assert parameter.item() == pytest.approx((1 + 2 + 6) / 3)
    assert parameter.item() == 6.0
    average.add(6, skipped=False)
    assert average.count == 0 and not average.means


def test_an_epochs_mean_has_nothing_of_the_one_before():
    parameter = one(0)
    average = Average({"a": parameter}, averaged_steps(0.5, 4, [2, 4]))
    found = []
    for step, value in enumerate([1.0, 3.0, 10.0, 20.0], start=1):
        parameter.data.fill_(value)
        average.add(step, skipped=step == 3)
        found.append([mean.item() for mean in average.means])
    assert found == [[1.0], [2.0], [], [20.0]]


@pytest.mark.parametrize(
    ("share", "steps", "ends", "windows"),
    [
        (0.2, 10, [10], [(9, 10)]),
        (0.001, 10, [5, 10], [(5, 5), (10, 10)]),
        (1.0, 10, [10], [(1, 10)]),
        (1 / 3, 10, [3, 7, 10], [(1, 3), (5, 7), (8, 10)]),
        (1 / 3, 11, [4, 7, 11], [(1, 4), (5, 7), (8, 11)]),
    ],
)
def test_windows_are_a_share_of_all_steps_and_never_overlap(share, steps, ends, windows):
    assert [(window[0], window[-1]) for window in averaged_steps(share, steps, ends)] == windows
    assert averaged_steps(None, steps, ends) == []


def test_values_of_another_adapter_are_refused():
    average = Average({"a": one(0)}, [range(1, 3)])
    average.add(1, skipped=False)
    values = {"weight/a": torch.zeros(1), **average.values()}
    other = Average({"b": one(0)}, [range(1, 3)])
    with pytest.raises(ArtifactError, match="averaged tensors"):
        other.take(dict(values), 1)
    with pytest.raises(ArtifactError, match="averaged tensors"):
        average.take({"weight/a": torch.zeros(1)}, 1)
    average.take(values, 1)
    assert list(values) == ["weight/a"] and average.count == 1


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_shares_of_adapters_are_not_averaged(monkeypatch, stage):
    cfg = Train.model_validate({"data": [{"kind": "given", "source": "x.jsonl"}], "average": 0.2})
    monkeypatch.setattr(dist, "zero_stage", lambda: stage)
    if stage < 3:
        refuse_averaging_shares(cfg)
        return
    with pytest.raises(TrainingError, match=r"train\.average.*zero2\.yaml"):
        refuse_averaging_shares(cfg)
    with pytest.raises(RecipeError, match=r"train\.average"):
        estimate._refuse_training(cfg)
