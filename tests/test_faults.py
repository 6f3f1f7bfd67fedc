"""A training is never lost: killed, stopped, out of disk, damaged or not finite, it goes on or says why not.

Here a few of each; `benchmarks/faults.py` injects each kind many times.
"""

import errno
import math
import os
import random
import shutil
import signal

import faulty
import faulty_launch
import faulty_peers
import pytest
import torch

from recover.base.artifacts import append_jsonl, read_json, read_jsonl
from recover.train.checkpoints import Checkpoints
from recover.train.course import SKIPS_IN_A_ROW, Skips

RANDOM = random.Random(7)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The adapter of a training that nothing happened to; it has 3 steps of 2 micro-steps."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    code, output = faulty.run(folder)
    assert code == 0, output
    return faulty.adapter(folder)


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """(calls that change files, bytes written) of that training."""
    return faulty.disk_calls(tmp_path_factory.mktemp("calls") / "run")


@pytest.mark.parametrize("part", [0.55, *(pytest.param(part, marks=pytest.mark.slow) for part in (0.3, 0.8))])
def test_a_training_killed_while_it_writes_goes_on_to_the_same_bits(straight, calls, tmp_path, part):
    code, output = faulty.on_disk(tmp_path / "run", faulty.Disk(at=round(part * calls[0])))
    assert code == -signal.SIGKILL, output
    assert faulty.goes_on(tmp_path / "run", straight) is None


@pytest.mark.slow
def test_every_call_that_changes_a_file_may_be_the_last(straight, calls, tmp_path):
    """R2, one in three of them; `benchmarks/faults.py` takes all."""
    for at in range(1, calls[0] + 1, 3):
        folder = tmp_path / f"{at}"
        code, output = faulty.on_disk(folder, faulty.Disk(at=at))
        assert code == -signal.SIGKILL, output
        assert faulty.goes_on(folder, straight) is None, at
        shutil.rmtree(folder)


def test_a_full_disk_is_named_and_loses_nothing(straight, calls, tmp_path):
    code, output = faulty.on_disk(tmp_path / "run", faulty.Disk(room=calls[1] // 2))
    assert code == 1 and "disk full" in output and "bytes to write" in output, output
    assert faulty.goes_on(tmp_path / "run", straight) is None


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_an_error_of_the_disk_is_ours_and_loses_nothing(straight, calls, tmp_path, number):
    for at in RANDOM.sample(range(1, calls[0]), 6):
        folder = tmp_path / f"{at}"
        code, output = faulty.on_disk(folder, faulty.Disk(at=at, error=number))
        assert code in (0, 1), output
        assert code == 0 or "ArtifactError" in output
        assert not list(folder.rglob(".*.tmp")) or code == 1
        assert faulty.goes_on(folder, straight) is None, at


@pytest.mark.parametrize("number", [signal.SIGUSR1])
def test_a_signal_is_answered_with_a_checkpoint(straight, tmp_path, number):
    code = faulty.interrupted(tmp_path / "run", [number], after=0.4)
    assert code in (128 + number, 0)
    assert faulty.goes_on(tmp_path / "run", straight) is None


@pytest.mark.parametrize("micro_step", [3])
def test_a_stop_within_a_step_does_not_wait_for_its_end(straight, tmp_path, micro_step):
    """Micro-step 3 is the first of step 2: what is saved is the end of step 1."""
    code, output = faulty.stopped_at(tmp_path / "run", micro_step)
    assert code == 128 + signal.SIGTERM, output
    assert read_jsonl(tmp_path / "run/train/checkpoints.jsonl")[-1]["step"] == 1
    assert faulty.goes_on(tmp_path / "run", straight) is None


SETTINGS = [
    {},
    {"micro_batch_size": 2},
    {"micro_batch_size": 1, "gradient_checkpointing": True},
    {"micro_batch_size": 8, "lora": {"rank": 4}},
    {"micro_batch_size": 4, "dtype": torch.bfloat16},
    {"lora": {"rank": 4, "dropout": 0.2, "blocks": "after_cut"}, "scheduler": "linear", "weight_decay": 0.1},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_a_stop_anywhere_changes_no_bit(tmp_path, changes):
    assert faulty.run(tmp_path / "straight", **changes)[0] == 0
    expected = faulty.adapter(tmp_path / "straight")
    for micro_step in range(1, 3 * 8 // changes.get("micro_batch_size", 4) + 1):
        folder = tmp_path / f"{micro_step}"
        code, output = faulty.stopped_at(folder, micro_step, **changes)
        assert code == 128 + signal.SIGTERM, output
        assert faulty.goes_on(folder, expected, **changes) is None, micro_step


@pytest.mark.parametrize("where", faulty.POISONS)
def test_a_nan_costs_one_step_and_nothing_else(tmp_path, where):
    """Step 2 of 6; what is trained on besides is the same, so the losses are not far from a clean run's."""
    code, output = faulty.poisoned_at(tmp_path / "run", where, math.nan, range(3, 4), tokens=1500)
    assert code == 0, output
    training = read_json(tmp_path / "run/train/training.json")
    assert (training["skipped"], training["rollbacks"]) == (1, 0)
    (finding,) = training["findings"]
    assert finding["step"] == 2 and finding["sequences"] == [9, 16] and "not finite" in finding["found"]
    assert finding["tensors"][0].startswith("gradient of base_model.model.model.layers.")
    assert all(math.isfinite(epoch["loss"]) for epoch in read_json(tmp_path / "run/train/best.json")["epochs"])


def test_a_nan_in_the_last_step_is_trained_again(straight, tmp_path):
    code, output = faulty.poisoned_at(tmp_path / "run", "loss", math.inf, range(6, 7))
    assert code == 0 and "back to checkpoint-2" in output, output
    assert faulty.same(faulty.adapter(tmp_path / "run"), straight)
    assert read_json(tmp_path / "run/train/training.json")["rollbacks"] == 1


def test_a_cause_that_stays_ends_in_a_diagnosis(tmp_path):
    code, output = faulty.poisoned_at(tmp_path / "run", "gradient", math.inf, range(7, 10_000), tokens=1500)
    assert code == 1 and "TrainingError: step 4: the gradient is not finite" in output, output
    assert "after 3 returns to a checkpoint" in output and "sequences 25-32" in output
    warned = [line for line in output.splitlines() if line.startswith("warning: step")]
    assert len(warned) == 1 and len(warned[0]) < 200 and "lower train.lr" in warned[0], warned


def test_rollbacks_come_sooner_each_time():
    skips, rows, lines = Skips(), [], []
    for skips.rollbacks in range(4):
        skips.row = 0
        skips.found = "nan"
        while not skips.too_many(last_step=False):
            lines.append(skips.skip(1, (1, 2), []))
        rows.append(skips.row)
    assert rows == [SKIPS_IN_A_ROW, 4, 2, 1]
    assert len(lines) == 15 and [bool(line) for line in lines] == [True] + 14 * [False]


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1 to 3, the last two of which are kept."""
    checkpoints = Checkpoints(tmp_path, "this training")
    for step in (1, 2, 3):
        values = {"weight/a": torch.full((40, 3), float(step)), "exp_avg/a": torch.rand(40, 3)}
        checkpoints.save(step, values, {"row": 0, "applied": step})
    return checkpoints


def test_retention_keeps_what_is_fallen_back_on(saved):
    saved.save(4, {"weight/a": torch.zeros(1)}, {"row": 1})
    saved.save(5, {"weight/a": torch.zeros(1)}, {"row": 2})
    names = sorted(path.name for path in saved.folder.iterdir())
    assert names == ["checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-5"]
    assert saved.newest()[1]["step"] == 5 and saved.newest(good=True)[1]["step"] == 3


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["trained.safetensors", "state.json", "MANIFEST.json"])
def test_a_flipped_bit_is_named_and_the_checkpoint_before_is_taken(saved, capsys, name):
    path = saved.folder / "checkpoint-3" / name
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 37):
        flip(path, bit)
        checkpoint, state = Checkpoints(saved.folder.parent, "this training").newest()
        assert checkpoint.name == "checkpoint-2" and state["step"] == 2
        message = capsys.readouterr().err
        assert "not resuming from checkpoint-3: " in message and (name in message or name == "MANIFEST.json")
        path.write_bytes(whole)
    assert saved.newest()[1]["step"] == 3


def swap(folder):
    one, other = folder / "checkpoint-2", folder / "checkpoint-3"
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)


DAMAGE = {
    "truncated": lambda folder: os.truncate(folder / "checkpoint-3/trained.safetensors", 100),
    "empty": lambda folder: os.truncate(folder / "checkpoint-3/state.json", 0),
    "appended": lambda folder: append_jsonl(folder / "checkpoint-3/trained.safetensors", "more"),
    "missing": lambda folder: (folder / "checkpoint-3/trained.safetensors").unlink(),
    "unlisted": lambda folder: (folder / "checkpoint-3/more.bin").write_bytes(b""),
    "duplicate keys": lambda folder: (folder / "checkpoint-3/MANIFEST.json").write_text('{"files": {}, "files": {}}'),
    "of another step": lambda folder: shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-9"),
    "a file of another": lambda folder: shutil.copy(folder / "checkpoint-2/state.json", folder / "checkpoint-3"),
    "swapped": swap,
    "a folder without files": lambda folder: (folder / "checkpoint-7").mkdir(),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_not_taken(saved, damage):
    DAMAGE[damage](saved.folder)
    found = Checkpoints(saved.folder.parent, "this training").newest()
    if damage == "swapped":
        assert found is None
        return
    checkpoint, state = found
    assert checkpoint.name == (
        "checkpoint-3" if damage in ("of another step", "a folder without files") else "checkpoint-2"
    )
    assert state["step"] == int(checkpoint.name[-1])


def test_checkpoints_of_another_training_are_not_taken(saved):
    assert Checkpoints(saved.folder.parent, "that training").newest() is None


@pytest.mark.parametrize("text", ["", "{", "[]\n", '{"step": 3}\n', "\xff\n"])
def test_a_broken_list_of_checkpoints_loses_none(saved, text):
    saved.lines.write_text(text)
    assert Checkpoints(saved.folder.parent, "this training").newest()[1]["step"] == (2 if "step" in text else 3)


@pytest.mark.parametrize("name", ["training.json", "best.json", "checkpoints.jsonl"])
def test_a_broken_record_loses_no_training(straight, tmp_path, name):
    assert faulty.stopped_at(tmp_path / "run", 5)[0] == 128 + signal.SIGTERM
    flip(tmp_path / "run/train" / name, 3)
    code, output = faulty.run(tmp_path / "run")
    assert code == 0 and "going on from checkpoint-2" in output, output
    assert faulty.same(faulty.adapter(tmp_path / "run"), straight)


def test_two_trainings_in_one_folder_refuse(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    first = faulty.start(lambda: faulty.train_tiny(folder), tmp_path / "first.log")
    while not (folder / "train").exists():
        pass
    code, output = faulty.run(folder)
    assert code == 1 and "works on this run" in output
    assert faulty.end(first) == 0


CHANGES = [  # (engine and processes of the first part, of the second)
    ("plain", 1, "plain", 2),
    ("plain", 2, "plain", 1),
    ("zero2", 2, "plain", 1),
    ("plain", 1, "zero2", 2),
    ("zero3", 2, "plain", 2),
    ("plain", 1, "zero3", 2),
    ("zero2", 2, "zero2", 2),
    ("zero3", 2, "zero3", 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "processes", "then", "processes_then"), CHANGES)
def test_another_number_of_processes_goes_on(tmp_path, engine, processes, then, processes_then):
    assert faulty_launch.moved(tmp_path, (engine, processes), (then, processes_then)) is None


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["plain", "zero2", "zero3"])
def test_a_nan_on_one_process_is_skipped_on_both(tmp_path, engine):
    assert faulty_launch.poisoned_together(tmp_path, engine) is None


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["plain", "zero2", "zero3"])
def test_all_end_soon_after_one_process_is_lost(tmp_path, engine):
    for rank, micro_step, way in (("1", "3", "kill"), ("0", "4", "raise")):
        problem, _ = faulty_peers.lost(tmp_path / way, engine, faulty_peers.in_step, rank, micro_step, way)
        assert problem is None
