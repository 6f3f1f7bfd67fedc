"""The law of distribution: losses, gradients and parameters do not depend on how a step is cut up, on any engine.

Two processes are made once for all engines, as forks: starting costs more than training. Launchers start them in the
slow tests; what a launcher says is read in `test_dist.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

import faulty
import pytest
import torch
import two_processes
from safetensors.torch import load_file

from recover.base.artifacts import read_json

TESTS = Path(__file__).parent
# Another order of additions moves fp32 gradients by 1e-6 relative; one AdamW step is as large as lr whatever the
# gradient, so a parameter whose gradient is near 0 may move by more.
LOSS, GRADIENT, PARAMETER = 1e-6, 1e-5, 5e-5


def fast(*variants, slow=()):
    """Each engine and each way of a step once; what joins two that are there is slow."""
    return [*variants, *(pytest.param(variant, marks=pytest.mark.slow) for variant in slow)]


COURSES = fast("plain", "zero2", "zero3", slow=["plain:1", "plain:2", "zero3:2"])
SHARDED = fast(
    *("plain+shards", "plain+loaded+checkpointing"),
    slow=["plain:2+shards", "zero2+shards+checkpointing", "plain:2+loaded"],
)
FROM_STATES = fast("zero2+dense", "zero3+prefix", slow=["zero2+shards+prefix"])
AVERAGED = fast("plain:1+average", slow=["plain+average", "zero2+average"])  # by micro-batches of one, in two processes
FOCUSED = fast("zero2:2+focus", slow=["plain:1+focus"])
AUTO = fast("zero3+auto", slow=["plain+auto", "plain:1+auto", "zero2+auto"])


def launched(command, folder, timeout=300):
    """The command's result; its end is shown if it failed."""
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    return result


def torchrun(folder, *variants, processes=2):
    script = str(TESTS / "two_processes.py")
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        script,
        str(folder),
        *variants,
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, all eight sequences of a step at once."""
    folder = tmp_path_factory.mktemp("alone")
    two_processes.write_text(folder)
    return two_processes.run(folder, "alone")


@pytest.fixture(scope="module")
def together(request, tmp_path_factory):
    """Two processes, each variant that a test asks for in turn: its name -> what it did."""
    folder = tmp_path_factory.mktemp("together")
    two_processes.write_text(folder)
    ours = [item for item in request.session.items if item.path == request.path]
    given = [item.callspec.params for item in ours if "together" in getattr(item, "fixturenames", ())]
    variants = dict.fromkeys(params["variant"] for params in given)
    faulty.together(lambda _: two_processes.main(folder, list(variants)), folder)
    return {variant: torch.load(folder / f"{variant}.pt") for variant in variants} | {"folder": folder}


def assert_same_course(found, expected, steps=two_processes.STEPS):
    assert len(found["losses"]) == len(expected["losses"]) == steps
    assert found["losses"] == pytest.approx(expected["losses"], abs=LOSS, rel=LOSS)
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        flat, truth = (torch.cat([gradient.flatten() for gradient in step]) for step in (ours, theirs))
        assert truth.norm() > 1e-3
        assert ((flat - truth).norm() / truth.norm()).item() < GRADIENT
    for ours, theirs in zip(found["parameters"], expected["parameters"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=PARAMETER)


@pytest.mark.parametrize("micro", fast(1, slow=[4, 2]))
def test_accumulation_changes_nothing(alone, micro, tmp_path):
    two_processes.write_text(tmp_path)
    assert_same_course(two_processes.run(tmp_path, "cut", micro_batch_size=micro), alone)


@pytest.mark.parametrize("variant", [*COURSES, *SHARDED])
def test_two_processes_do_what_one_does(alone, together, variant):
    assert_same_course(together[variant], alone)


@pytest.mark.parametrize("variant", FROM_STATES)
def test_two_processes_train_from_states_on_disk(alone, together, variant, tmp_path):
    """Filled by both; what the first variant filled, the others read."""
    two_processes.write_text(tmp_path)
    after_cut = {"lora": {"rank": 4, "blocks": "after_cut"}}
    assert_same_course(
        together[variant], two_processes.run(tmp_path, "x", **after_cut) if "prefix" in variant else alone
    )


@pytest.mark.parametrize("variant", ["plain", "zero2", "zero3", "plain+shards"])
def test_the_adapter_on_disk_is_what_was_trained(alone, together, variant):
    found = together[variant]
    assert Path(found["best"]).name == "epoch-2"
    on_disk = load_file(Path(found["best"]) / "adapter_model.safetensors")
    trained = {tuple(parameter.shape): 0 for parameter in found["parameters"]}
    assert len(on_disk) == len(found["parameters"]) and {tuple(value.shape) for value in on_disk.values()} == set(
        trained
    )
    total = sum(value.double().sum() for value in on_disk.values())
    torch.testing.assert_close(total, sum(value.double().sum() for value in found["parameters"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", FOCUSED)
def test_two_processes_weight_positions_as_one_does(together, variant, tmp_path):
    two_processes.write_text(tmp_path)
    assert_same_course(together[variant], two_processes.run(tmp_path, "x", **two_processes.FOCUSED))


@pytest.mark.parametrize("variant", AUTO)
def test_two_processes_try_the_rates_that_one_tries(together, variant, tmp_path, monkeypatch):
    monkeypatch.setattr(two_processes.trials, "SHARE", two_processes.trials.SHARE)
    monkeypatch.setattr(two_processes.trials, "STEPS", two_processes.trials.STEPS)
    two_processes.write_text(tmp_path)
    assert_same_course(together[variant], two_processes.run(tmp_path, "x", **two_processes.auto(tmp_path)))
    ours, theirs = (read_json(Path(f) / "trials.json") for f in (together["folder"] / variant, tmp_path / "x"))
    assert ours["chosen"] == theirs["chosen"] and len(ours["trials"]) == len(theirs["trials"]) == 5
    for found, expected in zip(ours["trials"], theirs["trials"], strict=True):
        assert found["lr"] == expected["lr"] and found["kl"] == pytest.approx(expected["kl"], rel=1e-4)
        assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)


@pytest.mark.parametrize("variant", AVERAGED)
def test_two_processes_average_what_one_does(alone, together, variant, tmp_path):
    two_processes.write_text(tmp_path)
    expected = two_processes.run(tmp_path, "averaged", average=0.5)
    assert_same_course(together[variant], alone)  # the training goes on from the adapters as they are
    runs = (together[variant], expected, alone)
    ours, theirs, last = (load_file(Path(run["best"]).parent / "epoch-1/adapter_model.safetensors") for run in runs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=PARAMETER)
    assert max((ours[name] - value).abs().max() for name, value in last.items()) > 20 * PARAMETER


@pytest.mark.parametrize("variant", ["plain", "zero2", "zero3", "plain+shards"])
def test_every_engine_generates_the_same_after_each_epoch(alone, together, variant):
    assert together[variant]["texts"] == alone["texts"] and len(alone["texts"]) == 6


@pytest.mark.parametrize("variant", fast(*two_processes.MEASURED[1:-1], slow=two_processes.MEASURED[-1:]))
def test_a_process_without_items_keeps_none_waiting(alone, together, variant):
    """Drift, likelihood and text of one item, and of three batches, by two processes."""
    assert together[variant]["measured"] == pytest.approx(alone["measured"], abs=LOSS, rel=20 * LOSS)
    assert len(alone["measured"]) >= 2 + 4 + 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_accelerate_launch_with_our_files(alone, stage, tmp_path):
    two_processes.write_text(tmp_path)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/cpu_zero{stage}.yaml"]
    launched([*command, str(TESTS / "two_processes.py"), str(tmp_path), f"zero{stage}"], tmp_path)
    assert_same_course(torch.load(tmp_path / f"zero{stage}.pt"), alone)


@pytest.mark.slow
def test_weights_are_shared_out_on_each_machine(alone, tmp_path):
    two_processes.write_text(tmp_path)
    launched(torchrun(tmp_path, "plain+shards+machines", processes=4), tmp_path)
    assert_same_course(torch.load(tmp_path / "plain+shards+machines.pt"), alone)
