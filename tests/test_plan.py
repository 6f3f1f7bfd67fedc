"""Plans and masks come back as they were, or not at all."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from recover.base import artifacts
from recover.base.errors import ArtifactError
from recover.models.plan import MASKS, PLAN, MaskRecord, Plan, load_plan, save_plan
from recover.models.site import Site

NAME = "model.layers.1.mlp.up_proj"


def masked_plan(seed: int = 0) -> tuple[Plan, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    masks = {NAME: torch.rand(7, 9, generator=generator) > 0.4, "model.layers.0.mlp.up_proj": torch.ones(4, 8) > 0}
    records = {name: MaskRecord.of(keep_OI, "unstructured") for name, keep_OI in masks.items()}
    plan = Plan("wanda", 6, masks=records, parameters_dense=100, parameters_pruned=100, nonzero=60)
    return plan, masks


def test_depth_plan_round_trip(tmp_path):
    scores = [{"round": 1, "blocks": [3], "score": 0.25, "by": "kl", "chosen": True}]
    plan = Plan("depth", 6, (4, 3), scores=scores, parameters_dense=10, parameters_pruned=8, nonzero=8)
    save_plan(plan, {}, tmp_path)
    assert load_plan(tmp_path) == (plan, {}, {})
    assert plan.dropped == (3, 4) and plan.kept == (0, 1, 2, 5)


KEYS = {  # of plan.json: older versions read no others
    *("kind", "blocks", "dropped", "scores", "masks", "parameters_dense", "parameters_pruned", "nonzero"),
    *("calibration", "dropped_attention", "dropped_mlp", "weights", "config", "repair"),
    *("masks_sha256", "weights_sha256"),
}


def test_the_file_is_as_older_versions_read_and_wrote_it(tmp_path):
    plan = Plan("depth", 8, (Site(6, "mlp"), 4, 3, Site(2, "attention"), Site(1, "mlp")))
    save_plan(plan, {}, tmp_path)
    value = json.loads((tmp_path / PLAN).read_text())
    assert value.keys() == KEYS
    assert (value["dropped"], value["dropped_attention"], value["dropped_mlp"]) == ([3, 4], [2], [1, 6])
    written = {"kind": "depth", "blocks": 8, "dropped": [4, 3], "dropped_attention": [2], "dropped_mlp": [6, 1]}
    (tmp_path / PLAN).write_text(json.dumps(written))
    assert load_plan(tmp_path).plan == plan
    (tmp_path / PLAN).write_text(json.dumps({"kind": "depth", "blocks": 8, "dropped": [4]}))
    assert load_plan(tmp_path).plan == Plan("depth", 8, (4,))


def test_masked_plan_round_trip(tmp_path):
    plan, masks = masked_plan()
    save_plan(plan, masks, tmp_path)
    found, found_masks, _ = load_plan(tmp_path)
    assert found == plan and found_masks.keys() == masks.keys()
    assert all(torch.equal(found_masks[name], masks[name]) for name in masks)
    assert plan.sparsity == sum(int((~keep).sum()) for keep in masks.values()) / (63 + 32)


def test_masks_of_an_earlier_plan_do_not_stay(tmp_path):
    save_plan(*masked_plan(), tmp_path)
    save_plan(Plan.none(4), {}, tmp_path)
    assert load_plan(tmp_path) == (Plan.none(4), {}, {}) and not (tmp_path / MASKS).exists()


def test_every_flipped_bit_of_the_masks_is_found(tmp_path):
    save_plan(*masked_plan(), tmp_path)
    whole = (tmp_path / MASKS).read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        (tmp_path / MASKS).write_bytes(bytes(damaged))
        with pytest.raises(ArtifactError, match=r"masks\.safetensors: damaged: its sha256 is"):
            load_plan(tmp_path)


def test_truncated_and_missing_masks_are_refused(tmp_path):
    save_plan(*masked_plan(), tmp_path)
    path = tmp_path / MASKS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="damaged"):
        load_plan(tmp_path)
    path.unlink()
    with pytest.raises(ArtifactError, match="missing, and the plan beside it names 2 masked weights"):
        load_plan(tmp_path)


def rehash(folder) -> None:
    """Make the plan's hash that of the masks beside it, as a plan written for other masks would have it."""
    value = json.loads((folder / PLAN).read_text())
    value["masks_sha256"] = artifacts.sha256(folder / MASKS)
    (folder / PLAN).write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda packed: packed | {NAME: packed[NAME] | 128}, r"zeros, the certificate says"),
        (lambda packed: packed | {NAME: packed[NAME][:-1]}, r"cannot hold a mask of shape \(7, 9\)"),
        (lambda packed: packed | {NAME: packed[NAME].float()}, r"values of torch.float32 cannot hold"),
        (lambda packed: packed | {"other": packed[NAME].clone()}, r"name different weights: \['other'\]"),
    ],
)
def test_masks_that_break_the_certificate_are_refused(tmp_path, change, message):
    save_plan(*masked_plan(1), tmp_path)
    packed = safetensors.torch.load_file(tmp_path / MASKS)
    safetensors.torch.save_file(change(packed), tmp_path / MASKS)
    rehash(tmp_path)
    with pytest.raises(ArtifactError, match=message):
        load_plan(tmp_path)


def test_masks_that_are_no_safetensors_are_refused(tmp_path):
    save_plan(*masked_plan(), tmp_path)
    (tmp_path / MASKS).write_bytes(b"not a tensor file")
    rehash(tmp_path)
    with pytest.raises(ArtifactError, match="cannot be read as safetensors"):
        load_plan(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "plan: Input should be"),
        ({"kind": "depth"}, "blocks: Field required"),
        ({"kind": 3, "blocks": 4}, "kind: Input should be a valid string"),
        ({"kind": "depth", "blocks": 4, "dropped": [4]}, r"\[4\] are not distinct blocks of a model with 4"),
        ({"kind": "depth", "blocks": 4, "dropped": [1, 1]}, "are not distinct"),
        ({"kind": "none", "blocks": 4, "extra": 1}, "extra: Unexpected keyword argument"),
        (
            {"kind": "wanda", "blocks": 4, "masks": {"a": {"shape": [2], "zeros": 1}}},
            r"a\.shape.*a\.pattern",
        ),
    ],
)
def test_a_file_that_is_no_plan_is_refused_by_field(tmp_path, value, message):
    (tmp_path / PLAN).write_text(json.dumps(value))
    with pytest.raises(ArtifactError, match=message) as caught:
        load_plan(tmp_path)
    assert str(tmp_path / PLAN) in str(caught.value)


def test_a_mask_without_its_certificate_is_our_own_mistake(tmp_path):
    plan, masks = masked_plan()
    masks[NAME] = ~masks[NAME]
    with pytest.raises(AssertionError, match="not as certified"):
        save_plan(plan, masks, tmp_path)


def test_summary_says_what_goes():
    assert Plan("depth", 6, (2,), parameters_dense=10, nonzero=8).summary() == (
        "depth: blocks 2 dropped, of 6 blocks; 8 of 10 weights left (80.0%)"
    )
    assert masked_plan()[0].summary().startswith("wanda: ")
    assert Plan.none(3).summary() == "nothing pruned: 3 blocks"
