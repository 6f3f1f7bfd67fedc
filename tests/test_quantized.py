"""Checkpoints whose weights have few bits: unpacked exactly where that takes no package, else refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_load import cfg
from test_wrapper import exported, logits, others, whole, with_image
from tiny import ids, tiny
from torch import Tensor
from transformers import AutoModelForImageTextToText

from recover.base.errors import ModelError
from recover.export.merge import merge
from recover.models.arch import ARCHS
from recover.models.load import describe, load_any, load_model
from recover.models.plan import Plan
from recover.models.twin import Twin

WEIGHTS, SIZE, LARGEST = "model.safetensors", 32, 448.0  # SIZE: of a block with one scale


def quantized(weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(numbers of 8 bits, a scale for each block, what they mean), a block at a time."""
    packed_OI, meant_OI = torch.empty_like(weight_OI, dtype=torch.float8_e4m3fn), torch.empty_like(weight_OI)
    scales = torch.empty(weight_OI.shape[0] // SIZE, weight_OI.shape[1] // SIZE)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            block = slice(row * SIZE, (row + 1) * SIZE), slice(column * SIZE, (column + 1) * SIZE)
            scales[row, column] = weight_OI[block].abs().max() / LARGEST
            packed_OI[block] = (weight_OI[block] / scales[row, column]).to(torch.float8_e4m3fn)
            meant_OI[block] = packed_OI[block].float() * scales[row, column]
    return packed_OI, scales, meant_OI


def to_fp8(folder: Path, only: str = "") -> dict[str, Tensor]:
    """Pack the projections of a folder's (text) blocks; gives what every tensor of it means."""
    stored, meant = {}, {}
    for name, weight in load_file(folder / WEIGHTS).items():
        stored[name] = meant[name] = weight
        if name.endswith("proj.weight") and only in name:
            stored[name], stored[f"{name}_scale_inv"], meant[name] = quantized(weight)
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "fp8", "weight_block_size": [SIZE, SIZE], "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return meant


def test_fp8_by_blocks_is_unpacked_exactly_and_pruned_as_any_model(tmp_path, capsys):
    tiny("llama").save_pretrained(tmp_path / "fp8")
    meant = to_fp8(tmp_path / "fp8")
    model = load_model(cfg(tmp_path / "fp8"))
    assert "stored as fp8, and unpacked to float32" in " ".join(capsys.readouterr().out.split())
    assert all(torch.equal(value, meant[name]) for name, value in model.state_dict().items())
    assert describe(cfg(tmp_path / "fp8")).parameters == model.num_parameters()
    assert torch.equal(load_any(cfg(tmp_path / "fp8"))(ids()).logits, model(ids()).logits)
    merged = merge(Twin(model, Plan("depth", 6, (2,))), torch.float32)  # pyright: ignore[reportArgumentType]
    merged.save_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert torch.equal(load_model(cfg(tmp_path / "out"))(ids()).logits, merged(ids()).logits)


def test_a_text_model_in_fp8_inside_a_wrapper_is_unpacked_and_the_rest_copied(tmp_path):
    whole("mistral3", tmp_path / "fp8")
    before, meant = load_file(tmp_path / "fp8" / WEIGHTS), to_fp8(tmp_path / "fp8", only="language_model")
    model = load_model(cfg(tmp_path / "fp8"))
    folder = exported(Twin(model, Plan.none(6)), tmp_path)
    written = load_file(folder / WEIGHTS)
    assert written.keys() == before.keys() and all(torch.equal(written[name], meant[name]) for name in written)
    assert all(torch.equal(written[name], value) for name, value in others(before).items())
    loaded = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert (
        not hasattr(loaded.config, "quantization_config") and logits(loaded, **with_image("mistral3")).isfinite().all()
    )


def test_other_parts_of_a_wrapper_in_fp8_are_refused(tmp_path):
    whole("mistral3", tmp_path)
    to_fp8(tmp_path, only="vision_tower")
    with pytest.raises(ModelError, match=r"belong to no part of it, such as .*vision_tower.*weight_scale_inv"):
        load_model(cfg(tmp_path))


@pytest.mark.skipif("gpt_oss" not in ARCHS, reason="mixtures of experts are not there")
def test_mxfp4_is_unpacked_exactly(tmp_path):
    """Numbers of 4 bits (E2M1), two a byte, the first in the lower half; 32 with one scale, a power of two."""
    width, neurons, experts = 64, 64, 4
    sizes = {"hidden_size": width, "intermediate_size": neurons, "num_local_experts": experts, "num_hidden_layers": 2}
    model = tiny("gpt_oss", **sizes, layer_types=["sliding_attention", "full_attention"])
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat([values, -values])
    meant = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        count, inputs, outputs = tensors.pop(name).shape
        codes = torch.randint(0, 16, (count, outputs, inputs), generator=generator)
        exponents = torch.randint(120, 125, (count, outputs, inputs // 32), generator=generator)
        numbers = values[codes] * torch.exp2(exponents - 127.0).repeat_interleave(32, -1)
        meant[name] = numbers.transpose(1, 2)
        low, high = codes[..., ::2], codes[..., 1::2]
        tensors[f"{name}_blocks"] = (low | high << 4).to(torch.uint8).view(count, outputs, inputs // 32, 16)
        tensors[f"{name}_scales"] = exponents.to(torch.uint8)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = load_model(cfg(tmp_path)).state_dict()
    assert meant and all(torch.equal(found[name], value) for name, value in meant.items())


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "torchao"])
def test_what_is_packed_otherwise_is_refused_before_weights_are_read(method, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=f"quantized with '{method}'.*give the checkpoint it was made from"):
        load_model(cfg(tmp_path))
