"""Two processes of which neither may hold the model go through every stage; each figure is that of one that may."""

import json
import os
import subprocess
import sys
from pathlib import Path

import limited
import pytest
import torch
from safetensors.torch import load_file

TESTS = Path(__file__).parent
QUICKSTART = TESTS.parent / "recipes" / "quickstart.yaml"
MIB = 150  # that a process may have of its own: two blocks, and what is computed with them
CALIBRATION = "{data: 'embedded:tasks/calibration.jsonl', samples: 2, length: 48}"
FIELDS = (
    "measure.tasks=[embedded:facts, embedded:stories]",
    "measure.limit=1",
    "measure.max_new_tokens=4",
    "measure.sampling=null",
    "measure.batch_size=2",
    "probe.samples=2",
    "probe.steps=2",
    "probe.items=0",
    "probe.batch_size=2",
    f"prune={{kind: depth, count: 3, contiguous: true, score: angular, calibration: {CALIBRATION}}}",
    "train.data=[{kind: dense, prompts: 'embedded:tasks/prompts.jsonl', temperature: 0, max_new_tokens: 8,"
    " batch_size: 4}]",
    "train.tokens=60",
    "train.epochs=1",
    "train.batch_size=4",
    "train.lora.rank=4",
    "train.gradient_checkpointing=true",
    "train.lr=1e-3",
    "export.max_shard_size=20MB",
)
TIMES = ("seconds", "tokens_per_second")


def run(folder, name, *fields, processes, mebibytes):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(TESTS / "limited.py"), str(QUICKSTART)]
    command += [str(folder / name), str(mebibytes), f"model.source={folder / 'model'}", *FIELDS, *fields]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    # Memory that is given back goes back to the system at once, so that it can be counted.
    more = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    return subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True, check=False)


def figures(root):
    found = {}
    for stage in ("dense", "before"):
        measured = json.loads((root / stage / "measure.json").read_text())
        found[stage] = {name: value for name, value in measured.items() if name not in TIMES}
    found["plan"] = json.loads((root / "prune" / "plan.json").read_text())
    found["headline"] = json.loads((root / "after" / "measure.json").read_text())["headline"]  # trained: sums in order
    return found | {"probe": json.loads((root / "before" / "probe.json").read_text())}


def losses(root):
    return [json.loads(line)["loss"] for line in (root / "train" / "steps.jsonl").read_text().splitlines()]


def exported(root):
    return {name: value for path in (root / "deploy").glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_model_that_neither_process_may_hold_goes_through_every_stage(tmp_path):
    assert limited.write_model(tmp_path / "model") > 1.25 * MIB * 2**20
    refused = run(tmp_path, "refused", processes=1, mebibytes=MIB)
    assert refused.returncode == 9 and "OVER THE LIMIT" in refused.stdout  # so the limit is one
    one = run(tmp_path, "one", processes=1, mebibytes=0)
    assert one.returncode == 0, one.stdout[-2000:] + one.stderr[-4000:]
    shares = ("train.shard_weights=true", "train.micro_batch_size=2")
    two = run(tmp_path, "two", *shares, processes=2, mebibytes=MIB)
    assert two.returncode == 0, two.stdout[-2000:] + two.stderr[-4000:]
    alone, together = tmp_path / "one" / "quickstart", tmp_path / "two" / "quickstart"
    assert figures(together) == figures(alone)
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)
    assert json.loads((together / "verify.json").read_text())["ok"]
    expected, found = exported(alone), exported(together)
    assert expected.keys() == found.keys()
    for name, value in expected.items():  # bfloat16: at most the next number
        torch.testing.assert_close(found[name].float(), value.float(), rtol=2**-7, atol=1e-6, msg=name)
