"""Every file in launch/ is one that accelerate and DeepSpeed take, and the README names each."""

import json
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

LAUNCH = Path(__file__).parent.parent / "launch"
YAMLS = sorted(LAUNCH.glob("*.yaml"))
JSONS = sorted(LAUNCH.glob("*.json"))


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_accelerate_takes_it_and_the_deepspeed_file_is_there(path):
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.num_processes >= 1
    deepspeed = config.deepspeed_config or {}
    assert (config.distributed_type == "DEEPSPEED") == bool(deepspeed)
    if deepspeed:
        named = LAUNCH.parent / deepspeed["deepspeed_config_file"]
        assert named in JSONS
        assert deepspeed["zero3_init_flag"] is False  # weights are loaded whole, pruned, then shared out


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.name)
def test_deepspeed_leaves_sizes_to_the_recipe_and_adapters_in_float32(path):
    config = json.loads(path.read_text())
    for field in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert config[field] == "auto"
    assert config["bf16"] == config["fp16"] == {"enabled": False}
    assert "optimizer" not in config and "scheduler" not in config
    zero = config["zero_optimization"]
    assert zero["stage"] in (2, 3)
    # Persistent parameters are gathered in one buffer of one dtype: a bfloat16 model with float32 adapters would fail.
    assert zero["stage"] == 2 or zero["stage3_param_persistence_threshold"] == 0


def test_the_readme_names_every_file():
    text = (LAUNCH / "README.md").read_text()
    assert [path.name for path in LAUNCH.iterdir() if path.name != "README.md" and path.name not in text] == []


def test_the_slurm_script_is_a_shell_script():
    subprocess.run(["bash", "-n", str(LAUNCH / "slurm.sh")], check=True)
