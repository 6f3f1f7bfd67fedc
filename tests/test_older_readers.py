"""An export of each family is read by the newest transformers 4 as by this one: same logits, same tokens.

Version 4 is installed into a folder of its own, with what it needs but torch; where that cannot be had, the test is
skipped and says why. Stock peft trains on an export, merges, saves and reads back: in this environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_checkpoint import ROWS, words
from older_reader import TEXT
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import FAMILIES, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from recover.export.merge import merge
from recover.export.write import write_checkpoint
from recover.models.arch import linears_of
from recover.models.plan import Plan
from recover.models.twin import Twin

pytestmark = pytest.mark.slow
READER = Path(__file__).with_name("older_reader.py")
OLD = "transformers>=4.57,<5"
# Families that version 4 does not know.
NOT_IN_4 = {"ministral3", "granite_swa", "qwen3_5_text", "gemma4_text", "gemma4_unified_text", "nemotron_h"}
NOT_OF_PEFT = {family: {"out_proj"} for family in ("falcon_h1", "nemotron_h")}  # linears of Mamba that peft refuses
# apertus: version 4 keeps the numbers of its activation in bfloat16, whatever dtype is asked for.
ROUGH = {"apertus": 1e-3}
PROMPT = torch.arange(3, 43).reshape(2, 20)


def deployed(family: str, folder: Path) -> Path:
    """A depth-pruned export of this family with a tokenizer of words."""
    model = merge(Twin(tiny(family, vocab_size=ROWS), Plan("depth", 6, sites=(2,))), torch.float32)
    return write_checkpoint(model, words(), folder, card="", record={})


@pytest.fixture(scope="module")
def deploys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("deploys")
    return {family: deployed(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def version_4(deploys: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    """What the newest transformers 4 says of every export, and its logits by family."""
    root = tmp_path_factory.mktemp("transformers4")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--target", str(root / "packages")]
    done = subprocess.run([*pip, OLD, "numpy", "safetensors"], capture_output=True, text=True, timeout=500)
    if done.returncode:
        pytest.skip(f"{OLD} cannot be installed here: {done.stderr.strip().splitlines()[-1][:200]}")
    environment = os.environ | {"PYTHONPATH": str(root / "packages"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    folders = [str(folder) for family, folder in deploys.items() if family not in NOT_IN_4]
    command = [sys.executable, str(READER), str(root / "logits"), *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), load_file(root / "logits")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NOT_IN_4])
def test_transformers_4_computes_what_this_one_does(family, deploys, version_4):
    told, logits = version_4
    assert told["version"].startswith("4.") and family not in told["refused"], told["refused"].get(family)
    model = AutoModelForCausalLM.from_pretrained(deploys[family], attn_implementation="eager")
    with torch.no_grad():
        expected = model.eval()(input_ids=PROMPT, use_cache=False).logits
    assert (logits[family] - expected).abs().max() < ROUGH.get(family, 2e-5) * max(1.0, float(expected.abs().max()))
    assert told["tokens"][family] == AutoTokenizer.from_pretrained(deploys[family])(TEXT)["input_ids"]


def wide(folder: Path) -> Any:
    """The stock model in float64: a merge rounds W + s B A, and some families make a hundred times as much of that."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # torch has no grouped product in float64
    return model.eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROMPT).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_peft_trains_merges_and_reads_back(family, deploys, tmp_path):
    model = wide(deploys[family])
    targets = sorted({name.rpartition(".")[2] for name in linears_of(model)} - NOT_OF_PEFT.get(family, set()))
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    before, expected = logits_of(wide(deploys[family])), logits_of(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    read = PeftModel.from_pretrained(wide(deploys[family]), tmp_path / "adapter")
    assert torch.equal(logits_of(read.eval()), expected)
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    found = logits_of(wide(tmp_path / "merged"))
    assert (found - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    assert (before - expected).abs().max() > 0.1, "the adapters do something"
