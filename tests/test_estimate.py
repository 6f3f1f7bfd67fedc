"""What a plan warns of: a CPU in half precision, and too little memory, with what makes a run fit."""

import dataclasses
import re
from typing import Any

import pytest
import torch
import yaml
from tiny import tiny

from recover.base import dist, memory
from recover.config.recipe import Recipe, load_recipe, parse_recipe
from recover.models.load import Description, describe
from recover.run import estimate as estimates
from recover.run.estimate import too_large, warnings


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


GB = 10**9
# Of 7B and 70B: memory of a GPU (None: there is none) and of the machine, GPUs of it.
ROOMS = [(24, 64, 1), (12, 64, 1), (16, 8, 1), (80, 20, 1), (24, 100, 8), (None, 24, 1), (None, 100, 2), (6, 64, 1)]
BIG = {"7B": "7B (Qwen2.5-7B)", "70B": "70B (Llama-3.1-70B)"}


def described(name: str) -> Description:
    shape = memory.PUBLISHED[BIG[name]]
    ends = 2 * shape.vocabulary * shape.width
    block = (shape.parameters - ends) // shape.blocks
    return Description(
        **{each.name: getattr(shape, each.name) for each in dataclasses.fields(shape)},
        model_type="llama",
        tied=False,
        embedding_parameters=ends,
        context=32_768,
        stored="bfloat16",
        bytes=0,
        block_parameters=(block,) * shape.blocks,
    )


def large(**fields: Any) -> Recipe:
    tree: dict[str, Any] = {
        "name": "large",
        "model": {"source": "org/large", "dtype": "bfloat16"},
        "prune": {"kind": "depth", "blocks": [3, 4]},
        "train": {
            "length": 768,
            "batch_size": 32,
            "data": [{"kind": "pruned", "prompts": "p.jsonl", "batch_size": 128}],
        },
        "measure": {"tasks": ["gsm8k"], "max_new_tokens": 512, "batch_size": 256},
    }
    for path, value in fields.items():
        *sections, last = path.split(".")
        here: Any = tree
        for section in sections:
            here = here[int(section)] if section.isdecimal() else here.setdefault(section, {})
        here[last] = value
    return parse_recipe(tree, "my.yaml")


def named(said: str) -> dict[str, Any]:
    """The fields that a sentence names, with their values."""
    found = re.findall(r"((?:model|train|measure)\.[\w.]+): (\w+)", said)
    return {path: yaml.safe_load(value) if value != "none" else value for path, value in found}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", BIG)
@pytest.mark.parametrize(("gpu", "host", "count"), ROOMS)
def test_what_is_named_fits_and_no_less_does(monkeypatch, name, gpu, host, count, dtype):
    """As is said: the recipe with these fields has room; with one of them taken back it has none."""
    monkeypatch.setattr(dist, "world_size", lambda: count)
    monkeypatch.setattr(dist, "local_world_size", lambda: count)
    room = memory.Room(None if gpu is None else gpu * GB, host * GB, count)
    model, own = described(name), {"model.dtype": dtype}
    said = too_large(large(**own), model, room)
    assert said.startswith("main memory has" if gpu is None else "a GPU has")
    fields = named(said.partition(" fits: ")[2] or said.partition("nearest is ")[2])
    assert fields
    left = too_large(large(**own | fields), model, room)
    assert (left == "") == ("The nearest that fits" in said)
    for each in fields:
        less = {path: value for path, value in fields.items() if path != each}
        assert too_large(large(**own | less), model, room) != ""


@pytest.mark.parametrize(
    ("gpu", "host", "name", "expected"),
    [
        # Less at once costs little, and changes nothing.
        (80, 200, "7B", {"train.micro_batch_size"}),
        (12, 64, "7B", {"model.offload"}),
        # Main memory holds no copy of the model: 8 bits, then 4, on the GPU, then in main memory; last the disk.
        (16, 8, "7B", {"model.load_in"}),
        (80, 20, "70B", {"model.load_in"}),
        (24, 64, "70B", {"model.load_in", "model.offload"}),
        (18, 16, "70B", {"model.offload"}),
    ],
)
def test_the_least_trouble_comes_first(gpu, host, name, expected):
    said = too_large(large(), described(name), memory.Room(gpu * GB, host * GB))
    assert "The nearest that fits" in said
    found = named(said)
    assert expected <= {*found} and {path for path in found if path.startswith("model.")} == expected - {
        "train.micro_batch_size"
    }
    if expected == {"model.offload"}:
        assert found["model.offload"] == ("cpu" if host == 64 else "disk")


def test_a_place_that_has_no_room_is_taken_back():
    """A recipe that asks for main memory, on a machine that has little of it."""
    recipe = large(**{"model.offload": "cpu", "train.micro_batch_size": 1, "measure.batch_size": 8})
    said = too_large(recipe, described("7B"), memory.Room(80 * GB, 8 * GB))
    assert said.startswith("main memory has 8 GB for this run, which takes about 13")
    assert named(said)["model.offload"] == "none"


def test_where_nothing_fits_the_nearest_is_named_with_what_it_takes():
    said = too_large(large(), described("70B"), memory.Room(12 * GB, 10 * GB))
    assert "No setting makes it fit here; nearest is model.offload: disk" in said
    assert "(14.2 GB of a GPU): take a machine with so much, or a smaller model" in said


def test_files_that_hold_no_tensor_as_it_is_are_no_place_for_the_weights():
    there, mixed = memory.Room(12 * GB, 10 * GB), dataclasses.replace(described("70B"), in_files=False)
    said = too_large(large(), mixed, there)
    assert "No setting makes it fit here; nearest is model.offload: cpu" in said and "model.load_in: 4bit" in said
    assert "disk" not in said


def test_a_plan_warns_of_main_memory(monkeypatch, tmp_path):
    tiny().save_pretrained(tmp_path)
    recipe = large(**{"model.source": str(tmp_path), "train.length": 64})
    monkeypatch.setattr(estimates.provenance, "machine", lambda: {"memory_bytes": GB, "gpus": []})
    assert any(
        line.startswith("main memory has 700 MB for this run") for line in warnings(recipe, describe(recipe.model))
    )


def test_a_budget_that_long_texts_use_up_before_the_first_step_is_warned_of() -> None:
    def said(tokens: int) -> list[str]:
        small = load_recipe("embedded:quickstart", [f"train.tokens={tokens}", "train.epochs=2", "train.batch_size=8"])
        return [line for line in warnings(small, describe(small.model)) if line.startswith("train.tokens")]

    length = load_recipe("embedded:quickstart").train.length
    assert said(16 * length) == []
    (line,) = said(16 * length - 1)
    assert "make only 15 sequences" in line and "below 16, one step of 8 an epoch" in line
