"""A finished training that more tokens are asked of goes on behind its last step, and does not start over."""

import itertools
import os
import shutil
import signal

import pytest
import torch
import two_processes
from byte_tokenizer import byte_tokenizer
from safetensors.torch import load_file
from small_run import DEPTH, finished
from small_run import run as whole_run
from test_trainer import at_step  # noqa: F401
from tiny import tiny

from recover.base.artifacts import read_json, read_jsonl, write_json
from recover.base.errors import DataError, StopRequested
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.train import train as training
from recover.train.course import all_ends
from recover.train.data import build_dataset
from recover.train.train import train
from recover.train.trainer import RecoverTrainer

LOSS = {"kl": 1.0, "ce": 0.1}
SHORT, LONG = 700, 1500  # of the 1,610 tokens that there are


@pytest.fixture
def folder(tmp_path):
    two_processes.write_text(tmp_path)
    return tmp_path


def twin():
    return Twin(tiny(), Plan("depth", 6, (2, 4)))


def go(folder, tokens, name="train", **changes):
    given = two_processes.cfg(
        folder, **{"tokens": tokens, "batch_size": 4, "warmup": 0.2, "lr": 3e-3, "loss": LOSS, **changes}
    )
    path = train(twin(), byte_tokenizer(), given, folder / name, lambda epoch, _: float(epoch), seed=3)
    return load_file(path / "adapter_model.safetensors")


def texts(rows):
    return [tuple(row) for row in rows["input_ids"]]


@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_the_finished_part_come_first_and_no_text_comes_twice(folder, packed):
    def rows(tokens, parts=()):
        cfg = two_processes.cfg(folder, tokens=tokens, batch_size=4)
        return texts(build_dataset(cfg, twin(), byte_tokenizer(), 3, folder, packed=packed, parts=parts))

    short = rows(SHORT)
    for steps in (len(short) // 4, 3):  # to its end, and stopped early
        part = {"tokens": SHORT, "ends": [2, steps]}
        long = rows(LONG, [part])
        assert long[: 4 * steps] == short[: 4 * steps]
        assert len(long) == len(rows(LONG)) and len(long) % 4 == 0
        assert len({*long}) == len(long) and {*long[4 * steps :]} & {*short} <= {*short[4 * steps :], *long}
    twice = rows(1600, [{"tokens": SHORT, "ends": [5]}, {"tokens": LONG, "ends": [9]}])
    assert twice[:20] == short[:20] and len({*twice}) == len(twice)


def test_the_text_of_each_source_goes_on(folder):
    """Three sources of unlike kinds, one read several times over: shorter budgets are beginnings of longer ones."""
    (folder / "p.jsonl").write_text("".join(f'{{"prompt": "say {i}:"}}\n' for i in range(6)))
    given = two_processes.cfg(folder).data[0].model_dump()
    few = {"kind": "given", "source": str(folder / "few.txt")}
    (folder / "few.txt").write_text("only a little text, read again\n")
    data = [given, few, {"kind": "dense", "prompts": str(folder / "p.jsonl"), "max_new_tokens": 9, "batch_size": 4}]

    def rows(tokens, parts=()):
        cfg = two_processes.cfg(folder, tokens=tokens, batch_size=2, data=data)
        return texts(build_dataset(cfg, twin(), byte_tokenizer(), 3, folder / "data", parts=parts))

    short = rows(300)
    long = rows(900, [{"tokens": 300, "ends": [len(short) // 2]}])
    assert long[: len(short)] == short and len(long) > 2 * len(short)
    straight = rows(900)
    assert abs(len(long) - len(straight)) <= 2 and sum(map(len, long)) == pytest.approx(
        sum(map(len, straight)), rel=0.1
    )


def test_a_lengthened_training_goes_on_from_weights_and_moments_and_warms_up_again(folder, monkeypatch, capsys):
    ended = go(folder, SHORT)
    recover = folder / "train"
    before, state = read_jsonl(recover / "steps.jsonl"), next((recover / "checkpoints").glob("checkpoint-*"))
    saved = load_file(state / "trained.safetensors")
    begun = []
    fetch = RecoverTrainer.get_batch_samples

    def at_begin(trainer, *arguments):
        for name, parameter in zip(trainer.average.names, trainer.trained, strict=True) if not begun else ():
            moment = trainer.optimizer.state[parameter]["exp_avg"]
            begun.append((name, parameter.detach().clone(), moment.clone()))
        return fetch(trainer, *arguments)

    monkeypatch.setattr(RecoverTrainer, "get_batch_samples", at_begin)
    found = go(folder, LONG)
    assert "the finished training of 700 tokens goes on to 1,500" in capsys.readouterr().out
    assert len(begun) == len(saved) / 3
    for name, weight, moment in begun:
        assert torch.equal(weight, saved[f"weight/{name}"]) and torch.equal(moment, saved[f"exp_avg/{name}"])
    assert sum(float(moment.abs().sum()) for *_, moment in begun) > 0
    steps = read_jsonl(recover / "steps.jsonl")
    assert steps[: len(before)] == before and [step["step"] for step in steps] == [*range(1, len(steps) + 1)]
    rates = [step["lr"] for step in steps]
    fresh = rates[len(before) :]
    assert before[-1]["lr"] < 0.3 * 3e-3 and fresh[0] < 1e-3 and max(fresh) == 3e-3 and fresh[-1] < 0.3 * 3e-3
    assert rates[: len(before)] == [step["lr"] for step in before]
    assert steps[-1]["tokens"] > before[-1]["tokens"] + 500
    best = read_json(recover / "best.json")
    assert [each["epoch"] for each in best["epochs"]] == [1, 2, 3, 4]  # as long as those before
    assert (recover / "epoch-1").exists() and any(not torch.equal(found[name], ended[name]) for name in ended)
    parts = read_json(recover / "training.json")["parts"]
    assert [part["tokens"] for part in parts] == [SHORT, LONG]
    assert [*itertools.chain(*(part["ends"] for part in parts))] == [each["step"] for each in best["epochs"]]


def test_a_lengthened_training_that_is_stopped_goes_on_to_the_same_bits(folder, at_step, monkeypatch):  # noqa: F811
    go(folder, SHORT, "straight")
    straight = go(folder, LONG, "straight")
    go(folder, SHORT)
    step = len(read_jsonl(folder / "train" / "steps.jsonl")) + 3
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StopRequested):
        go(folder, LONG)
    monkeypatch.undo()
    found = go(folder, LONG)
    assert all(torch.equal(found[name], straight[name]) for name in straight)
    again = go(folder, 1600)  # and once more
    assert [part["tokens"] for part in read_json(folder / "train" / "training.json")["parts"]] == [SHORT, LONG, 1600]
    assert any(not torch.equal(again[name], found[name]) for name in found)


def test_a_training_that_patience_ended_is_lengthened_from_where_it_stood(folder):
    scores = iter([0.5, 0.4, 0.6, 0.7, 0.8])
    given = {"tokens": SHORT, "batch_size": 4, "epochs": 3, "patience": 1, "loss": LOSS}
    score = lambda *_: next(scores)  # noqa: E731
    for tokens in (SHORT, LONG):
        cfg = two_processes.cfg(folder, **{**given, "tokens": tokens})
        train(twin(), byte_tokenizer(), cfg, folder / "train", score, seed=3)
    parts = read_json(folder / "train" / "training.json")["parts"]
    assert len(parts[0]["ends"]) == 2 and len(parts[1]["ends"]) == 1
    rows = 4 * parts[1]["ends"][-1]
    assert rows == len(texts(build_dataset(cfg, twin(), byte_tokenizer(), 3, folder, packed=True, parts=parts[:1])))


@pytest.mark.parametrize(
    ("why", "changes"),
    [
        ("fewer tokens", {"tokens": 500}),
        ("as many tokens", {"tokens": SHORT}),
        ("another rate", {"tokens": LONG, "lr": 1e-3}),
        ("another batch", {"tokens": LONG, "batch_size": 8}),
        (
            "a weight that fades over all steps",
            {"tokens": LONG, "loss": {"kl": 1.0, "variance": 0.2, "variance_until": 0.5}},
        ),
    ],
)
def test_what_is_not_the_same_training_begins_anew(folder, why, changes):
    loss = {"loss": changes["loss"]} if "loss" in changes else {}
    go(folder, SHORT, **loss)
    go(folder, **changes)
    parts = read_json(folder / "train" / "training.json")["parts"]
    assert [part["tokens"] for part in parts] == [changes["tokens"]], why
    assert read_jsonl(folder / "train" / "steps.jsonl")[0]["step"] == 1


def made_by_an_earlier_version(folder, monkeypatch, *unknown):
    """A finished training, as by a version that knew none of the fields `unknown`, nor put a config on record."""
    with monkeypatch.context() as then:
        then.setattr(training, "NO_MATTER", {**training.NO_MATTER, **dict.fromkeys(unknown, True)})
        go(folder, SHORT)
    path = folder / "train" / "training.json"
    record = read_json(path)
    assert not {*unknown} & record["config"].keys()
    return path, record


def test_a_field_that_came_later_and_has_its_default_is_the_same_training(folder, monkeypatch, capsys):
    _, record = made_by_an_earlier_version(folder, monkeypatch, "average", "weight_decay", "patience")
    go(folder, LONG)
    assert "the finished training of 700 tokens goes on to 1,500" in capsys.readouterr().out
    made = read_json(folder / "train" / "training.json")
    assert [part["tokens"] for part in made["parts"]] == [SHORT, LONG] and made["lineage"] == record["lineage"]
    go(folder, 1600)
    assert "the finished training of 1,500 tokens goes on to 1,600" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"average": 0.3}, {"weight_decay": 0.1}])
def test_a_field_that_came_later_and_has_another_value_is_another_training(folder, monkeypatch, changes):
    made_by_an_earlier_version(folder, monkeypatch, "average", "weight_decay", "patience")
    go(folder, LONG, **changes)
    assert [part["tokens"] for part in read_json(folder / "train" / "training.json")["parts"]] == [LONG]


def test_a_training_without_its_config_on_record_is_known_by_its_fingerprint(folder, monkeypatch):
    path, record = made_by_an_earlier_version(folder, monkeypatch)
    write_json(path, {name: value for name, value in record.items() if name != "config"})
    go(folder, LONG)
    assert [part["tokens"] for part in read_json(path)["parts"]] == [SHORT, LONG]


def test_without_its_last_checkpoint_it_says_so_and_begins_anew(folder, capsys):
    go(folder, SHORT)
    for path in (folder / "train" / "checkpoints").rglob("trained.safetensors"):
        path.write_bytes(path.read_bytes()[:-9])
    go(folder, LONG)
    assert "cannot be gone on with, and training begins anew" in capsys.readouterr().err
    assert [part["tokens"] for part in read_json(folder / "train" / "training.json")["parts"]] == [LONG]


def test_too_few_tokens_more_for_a_step_are_refused(folder):
    go(folder, SHORT)
    with pytest.raises(DataError, match=r"train\.tokens: 701 make no step of 4 more than the finished training's 700"):
        go(folder, SHORT + 1)


@pytest.mark.parametrize(
    ("parts", "epochs", "tokens", "steps", "ends"),
    [
        ([], 3, 100, 30, [10, 20, 30]),
        ([{"tokens": 100, "ends": [10, 20, 30]}], 3, 200, 60, [10, 20, 30, 40, 50, 60]),
        ([{"tokens": 100, "ends": [10, 20, 30]}], 4, 200, 60, [10, 20, 30, 60]),
        ([{"tokens": 100, "ends": [10, 20, 30]}], 3, 110, 33, [10, 20, 30, 33]),
        ([{"tokens": 100, "ends": [10]}, {"tokens": 200, "ends": [20]}], 1, 300, 30, [10, 20, 30]),
    ],
)
def test_epochs_that_are_new_follow_those_that_were(folder, parts, epochs, tokens, steps, ends):
    assert all_ends(parts, two_processes.cfg(folder, epochs=epochs, tokens=tokens), steps) == ends


def test_a_run_goes_on_when_tokens_are_raised_and_starts_over_when_told_to(tmp_path_factory, tmp_path, capsys):
    shutil.copytree(finished(tmp_path_factory, *DEPTH), tmp_path / "quickstart")
    capsys.readouterr()
    directory = whole_run(tmp_path, *DEPTH, "train.tokens=800", until="train")
    text = " ".join(capsys.readouterr().out.split())
    assert "train.tokens: 600 -> 800" in text and "Training goes on where it ended" in text
    assert "replaces the recovery" not in text
    assert [line["epoch"] for line in read_jsonl(directory.epochs)] == [1, 2, 3]
    assert len(read_json(directory.train / "training.json")["parts"]) == 2
    whole_run(tmp_path, *DEPTH, "train.tokens=300", until="train", start="train")
    assert [line["epoch"] for line in read_jsonl(directory.epochs)] == [1, 2]
    assert len(read_json(directory.train / "training.json")["parts"]) == 1
