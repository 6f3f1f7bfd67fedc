"""What a plan warns of."""

import pytest
import torch
from tiny import tiny

from recover.base import dist
from recover.config.recipe import parse_recipe
from recover.models.load import describe
from recover.run.estimate import warnings


@pytest.mark.parametrize(
    ("device", "dtype", "said"),
    [("cpu", "bfloat16", True), ("cpu", "float16", True), ("cpu", "float32", False), ("cuda", "bfloat16", False)],
)
def test_a_recipe_for_a_gpu_does_not_run_on_the_cpu_without_a_word(monkeypatch, tmp_path, device, dtype, said):
    monkeypatch.setattr(dist, "device", lambda: torch.device(device))
    tiny().save_pretrained(tmp_path)
    found = parse_recipe(
        {
            "name": "half",
            "model": {"source": str(tmp_path), "dtype": dtype},
            "prune": {"kind": "magnitude", "sparsity": 0.5},
            "train": {"data": [{"kind": "dense", "prompts": "embedded:prompts"}]},
            "measure": {"tasks": ["embedded:stories"]},
        },
        "my.yaml",
    )
    lines = [line for line in warnings(found, describe(found.model)) if "no GPU" in line]
    assert [f"in {dtype}" in line for line in lines] == [True] * said
