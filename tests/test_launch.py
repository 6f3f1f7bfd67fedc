"""Every file in launch/ is one that accelerate and DeepSpeed take and that starts what it says; the README is true."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate.commands.launch as accelerate_launch
import deepspeed.runtime.config as deepspeed_config
import pytest
import torch.distributed.run
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from tiny import tiny_config
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

from recover.base import memory
from recover.config.recipe import Train
from recover.config.train import split_batch
from recover.train.train import training_arguments

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
YAMLS = sorted(LAUNCH.glob("*.yaml"))
JSONS = sorted(LAUNCH.glob("*.json"))
PROCESSES = {"cpu": 1, "multi_node": 16}  # the others: 2
AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def by_name(path):
    return path.name


@pytest.mark.parametrize("path", YAMLS, ids=by_name)
def test_accelerate_takes_it_and_the_deepspeed_file_is_there(path):
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.num_processes == PROCESSES.get(path.stem, 2)
    deepspeed = config.deepspeed_config or {}
    assert (config.distributed_type == "DEEPSPEED") == bool(deepspeed)
    if deepspeed:
        assert ROOT / deepspeed["deepspeed_config_file"] in JSONS
        assert deepspeed["zero3_init_flag"] is False  # weights are loaded whole, pruned, then shared out
        # What the JSON file says may not be said here too: accelerate refuses both, or one would win in silence.
        assert set(deepspeed) <= {"deepspeed_config_file", "zero3_init_flag", "deepspeed_multinode_launcher"}
    assert (config.mixed_precision or "no") == "no"  # adapters stay float32


@pytest.mark.parametrize("path", YAMLS, ids=by_name)
def test_a_file_shares_out_what_its_name_says(path):
    named = (load_config_from_file(str(path)).deepspeed_config or {}).get("deepspeed_config_file")
    expected = {"cpu": None, "gpu": None, "multi_node": "zero2"}.get(path.stem, path.stem.removeprefix("cpu_"))
    assert named == (expected and f"launch/{expected}.json")
    if named:
        zero = json.loads((ROOT / named).read_text())["zero_optimization"]
        assert f"zero{zero['stage']}" == expected.split("_")[0]
        assert ("offload_param" in zero) == ("offload_optimizer" in zero) == ("offload" in expected)


@pytest.mark.parametrize("path", JSONS, ids=by_name)
def test_deepspeed_leaves_sizes_to_the_recipe_and_adapters_in_float32(path):
    config = json.loads(path.read_text())
    assert {field: config[field] for field in AUTO} == dict.fromkeys(AUTO, "auto")
    assert config["bf16"] == config["fp16"] == {"enabled": False}
    assert "optimizer" not in config and "scheduler" not in config
    zero = config["zero_optimization"]
    assert zero["stage"] in (2, 3)
    # Persistent parameters are gathered in one buffer of one dtype: a bfloat16 model with float32 adapters would fail.
    assert zero["stage"] == 2 or zero["stage3_param_persistence_threshold"] == 0
    assert zero["reduce_bucket_size"] == memory.BUCKET


# As the trainer resolves it.


@pytest.mark.parametrize("path", JSONS, ids=by_name)
@pytest.mark.parametrize(("processes", "micro"), [(1, 4), (2, None), (8, 2), (16, 1)])
def test_deepspeed_takes_it_with_what_the_trainer_fills_in(path, processes, micro, tmp_path, monkeypatch):
    cfg = Train.model_validate(
        {"data": [{"kind": "dense", "prompts": "p"}], "batch_size": 32, "micro_batch_size": micro, "max_grad_norm": 0.5}
    )
    split = split_batch(cfg, processes)
    # One process is here; how many there are matters to the arguments for their backend only.
    arguments = training_arguments(cfg, dataclasses.replace(split, processes=1), 10, 0, tmp_path)
    monkeypatch.setattr(type(arguments), "world_size", property(lambda _: processes))
    resolved = HfTrainerDeepSpeedConfig(str(path))
    resolved.trainer_config_process(arguments)
    resolved.trainer_config_finalize(arguments, SimpleNamespace(config=tiny_config("llama")), 10)
    unset_hf_deepspeed_config()  # or models loaded later in this process would be shared out
    assert '"auto"' not in json.dumps(resolved.config)
    monkeypatch.setattr(deepspeed_config.dist, "get_world_size", lambda *_: processes)
    monkeypatch.setattr(deepspeed_config.dist, "get_rank", lambda *_: 0)
    config = deepspeed_config.DeepSpeedConfig(resolved.config)
    assert config.world_size == processes and config.train_batch_size == 32
    assert config.train_micro_batch_size_per_gpu == split.micro
    assert config.gradient_accumulation_steps == split.accumulation
    assert config.gradient_clipping == 0.5
    assert not config.bfloat16_config.enabled and not config.float16_config.enabled
    zero = config.zero_config
    assert zero.reduce_bucket_size == memory.BUCKET
    assert zero.stage == 2 or zero.max_live_parameters == memory.LIVE_PARAMETERS
    assert bool(zero.offload_param) == bool(zero.offload_optimizer) == ("offload" in path.stem)


# What would be started.


@pytest.fixture
def started(monkeypatch):
    """`accelerate launch` up to the point where it would start processes: (its arguments, their environment)."""
    found = []

    class Process:
        returncode = 0

        def __init__(self, command, env):
            found.append((command, env))

        def wait(self):
            """Done."""

    monkeypatch.setattr(torch.distributed.run, "run", lambda arguments: found.append((arguments, dict(os.environ))))
    monkeypatch.setattr(accelerate_launch, "subprocess", SimpleNamespace(Popen=Process))
    monkeypatch.chdir(ROOT)

    def launch(*words):
        found.clear()
        accelerate_launch.launch_command(accelerate_launch.launch_command_parser().parse_args([*words]))
        return found[0]

    return launch


@pytest.mark.parametrize("path", YAMLS, ids=by_name)
def test_what_it_starts(path, started):
    arguments, environment = started("--config_file", str(path), "-m", "recover", "run", "a.yaml", "train.lr=1e-3")
    named = (load_config_from_file(str(path)).deepspeed_config or {}).get("deepspeed_config_file")
    assert environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") == named
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    if path.stem == "cpu":
        assert arguments == [sys.executable, "-m", "recover", "run", "a.yaml", "train.lr=1e-3"]
        return
    assert arguments.training_script == "recover" and arguments.module
    assert arguments.training_script_args == ["run", "a.yaml", "train.lr=1e-3"]
    machines = 2 if path.stem == "multi_node" else 1
    assert int(arguments.nproc_per_node) * machines == PROCESSES.get(path.stem, 2)
    assert int(arguments.nnodes.split(":")[0]) == machines


@pytest.mark.parametrize("name", ["gpu", "zero2", "zero3", "zero3_offload"])
def test_the_number_of_processes_can_be_set_over_it(name, started):
    arguments, _ = started("--config_file", f"launch/{name}.yaml", "--num_processes", "8", "-m", "recover", "run", "a")
    assert arguments.nproc_per_node == "8"


# Slurm.

SCONTROL = "printf 'alpha\\nbeta\\n'"
# Both machines at once, as srun would: its own options first, then the command.
SRUN = 'while [[ $1 == --* ]]; do shift; done; for i in 0 1; do SLURM_NODEID=$i "$@" & done; wait -n; wait -n'
ACCELERATE = 'printf "%s\\n" "$@" > "$SEEN/$SLURM_NODEID"'


def slurm(folder, words, *, scontrol=SCONTROL, accelerate=ACCELERATE, **variables):
    """Run slurm.sh on a machine of false Slurm commands; the finished process."""
    for name, body in {"scontrol": scontrol, "srun": SRUN, "accelerate": accelerate}.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "alpha,beta", "SLURM_NNODES": "2", "SLURM_JOB_ID": "4012345"}
    environment = {**os.environ, **job, **variables, "PATH": f"{folder}:{os.environ['PATH']}", "SEEN": str(folder)}
    command = ["bash", str(LAUNCH / "slurm.sh"), *words]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_slurm_script_is_a_shell_script_and_says_how_it_is_called(tmp_path):
    subprocess.run(["bash", "-n", str(LAUNCH / "slurm.sh")], check=True)
    done = slurm(tmp_path, [])
    assert done.returncode == 1 and "usage: sbatch launch/slurm.sh RECIPE" in done.stderr


def test_slurm_starts_one_launcher_a_machine_with_its_rank(tmp_path, started):
    words = ["my recipes/a.yaml", "prune={kind: depth, blocks: [3]}", "name=it's"]
    done = slurm(tmp_path, words, SLURM_GPUS_ON_NODE="4")
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        command = (tmp_path / f"{rank}").read_text().splitlines()
        assert command[0] == "launch" and command[-3:] == words
        arguments, environment = started(*command[1:])
        assert arguments.training_script_args == ["run", *words]
        assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "4", rank)
        assert arguments.rdzv_endpoint == "alpha:22345"  # the first machine, a port of this job
        assert environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == "launch/zero2.json"


def test_slurm_passes_a_failure_on(tmp_path):
    assert slurm(tmp_path, ["a.yaml"], accelerate="exit 3").returncode == 3


@pytest.mark.slow
def test_two_machines_under_slurm_do_a_whole_run(tmp_path):
    """Two launchers on this machine find each other as two machines do: multi_node.yaml, on CPUs, to the report."""
    small = ["measure.limit=6", "measure.max_new_tokens=24", "measure.sampling=null", "probe.samples=2"]
    small += ["probe.steps=4", "train.tokens=600", "train.epochs=2", "train.batch_size=4"]
    small.append("prune={kind: depth, blocks: [3]}")
    done = slurm(
        tmp_path,
        ["recipes/quickstart.yaml", "--runs", str(tmp_path / "runs"), *small],
        scontrol="printf '127.0.0.1\\n127.0.0.1\\n'",
        accelerate=f'shift; exec {sys.executable} -m accelerate.commands.launch "$@"',
        SLURM_GPUS_ON_NODE="1",
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-12000:]
    assert (tmp_path / "runs" / "quickstart" / "report.html").exists()


@pytest.mark.slow
def test_one_process_through_accelerate_is_the_same_command(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/cpu.yaml", "-m", "recover"]
    words = ["plan", "recipes/quickstart.yaml", "--runs", str(tmp_path)]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    plain = subprocess.run(
        [sys.executable, "-m", "recover", *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    sizes = [[line.split() for line in each.stdout.splitlines() if "parameters" in line] for each in (done, plain)]
    assert sizes[0] == sizes[1] and "1,586,480" in sizes[0][0] and [*tmp_path.iterdir()] == []


# The README.


def test_the_readme_names_every_file():
    text = (LAUNCH / "README.md").read_text()
    assert [path.name for path in LAUNCH.iterdir() if path.name != "README.md" and path.name not in text] == []


def test_the_readmes_tables_are_what_the_function_gives(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "dev"))
    import launch_tables

    text = launch_tables.PAGE.read_text(encoding="utf-8")
    assert launch_tables.filled(text) == text
