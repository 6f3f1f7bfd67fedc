"""A text model inside a wrapper: pruned and recovered as a causal LM, exported as the same wrapper, other parts as they
were, bit for bit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from safetensors.torch import load_file, save_file
from test_load import cfg
from tiny import COMMON, GEMMA4, LLAMA4, ids
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText
from twins import fill_adapters

from recover.base.errors import ModelError
from recover.config import recipe
from recover.export.merge import merge
from recover.export.verify import TRAINED, check, write_expected
from recover.export.write import plain_card, write_checkpoint
from recover.models.arch import linears_of
from recover.models.load import describe, load_model
from recover.models.plan import Plan, save_plan
from recover.models.site import Site
from recover.models.twin import Twin
from recover.models.wrapper import WRAPPERS, wrapped_of
from recover.prune import registry

WEIGHTS, IMAGE = "model.safetensors", 250  # IMAGE: the token that stands for a piece of an image
BASE = {key: value for key, value in COMMON.items() if key != "tie_word_embeddings"} | {"head_dim": 16}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 64,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
PICTURE = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
PATCHES = {
    "pixel_values": torch.rand(16, 96, generator=torch.Generator().manual_seed(3)),
    "image_grid_thw": torch.tensor([[1, 4, 4]]),
}
# model type -> (settings of the text model, other settings, what an image is, how many tokens stand for it)
WRAPPED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Tensor], int]] = {
    "gemma3": (
        {"sliding_window": 8, "query_pre_attn_scalar": 16},
        {"vision_config": SIGLIP, "mm_tokens_per_image": 4, "image_token_index": IMAGE},
        {"pixel_values": PICTURE},
        4,
    ),
    "mistral3": (
        {"model_type": "ministral3", "rope_parameters": LLAMA4},
        {
            "vision_config": {**SIGLIP, "model_type": "pixtral", "head_dim": 16},
            "image_token_index": IMAGE,
            "spatial_merge_size": 1,
            "tie_word_embeddings": False,
        },
        {"pixel_values": PICTURE, "image_sizes": torch.tensor([[28, 28]])},
        4,
    ),
    "llava": (
        {"model_type": "llama"},
        {
            "vision_config": {**SIGLIP, "model_type": "clip_vision_model", "projection_dim": 32},
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
        },
        {"pixel_values": PICTURE},
        4,
    ),
    "qwen2_vl": (
        {"rope_parameters": MROPE},
        {
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 64,
                "num_heads": 2,
                "patch_size": 4,
                "mlp_ratio": 2,
            },
            "image_token_id": IMAGE,
            "tie_word_embeddings": True,
        },
        PATCHES,
        4,
    ),
    "qwen2_5_vl": (
        {"rope_parameters": MROPE},
        {"vision_config": {**QWEN_VISION, "fullatt_block_indexes": [1], "window_size": 16}, "image_token_id": IMAGE},
        PATCHES,
        4,
    ),
    "qwen3_vl": (
        {"rope_parameters": MROPE},
        {
            "vision_config": {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
            "image_token_id": IMAGE,
        },
        PATCHES,
        4,
    ),
}
WRAPPED["qwen3_5"] = (
    {
        "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
        "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0, "mrope_interleaved": True},
    },
    {"vision_config": {**QWEN_VISION, "num_position_embeddings": 16}, "image_token_id": IMAGE},
    PATCHES,
    4,
)
GRID = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).view(1, 16, 2)
WRAPPED["gemma4"] = (
    {**GEMMA4, "hidden_size_per_layer_input": 0},
    {
        "vision_config": {
            **{key: value for key, value in SIGLIP.items() if key != "image_size"},
            **{"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2},
            "position_embedding_size": 16,
        },
        "image_token_id": IMAGE,
    },
    {"pixel_values": torch.rand(1, 16, 48, generator=torch.Generator().manual_seed(3)), "image_position_ids": GRID},
    4,
)
WRAPPED["gemma4_unified"] = (
    GEMMA4,
    {
        "vision_config": {
            **{"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 64, "mm_posemb_size": 16},
            "output_proj_dims": 64,
        },
        "image_token_id": IMAGE,
    },
    {
        "pixel_values": torch.rand(1, 4, 192, generator=torch.Generator().manual_seed(3)),
        "image_position_ids": GRID[:, :4],
    },
    4,
)
PLANNED = {"parameters_dense": 0, "parameters_pruned": 0, "blocks": 6, "masks": {}, "kind": "none"}
GONE: Any = (2, Site(4, "attention"), Site(5, "mlp"))


def whole(model_type: str, folder: Path) -> Any:
    """A tiny wrapper of this type, saved with a tokenizer and the settings of a processor."""
    text, others, _, _ = WRAPPED[model_type]
    config = AutoConfig.for_model(model_type, text_config={**BASE, **text}, **others)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                torch.nn.init.normal_(parameter, mean=parameter.data.mean().item(), std=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}')
    return model


@torch.no_grad()
def logits(model: Any, **inputs: Tensor) -> Tensor:
    return model(**(inputs or {"input_ids": ids(2, 40, vocabulary=240)}), use_cache=False).logits


def with_image(model_type: str) -> dict[str, Tensor]:
    _, _, image, tokens = WRAPPED[model_type]
    before, after = ids(1, 5, vocabulary=240), ids(1, 7, vocabulary=240)
    prompt = torch.cat([before, torch.full((1, tokens), IMAGE), after], 1)
    more = {"mm_token_type_ids": (prompt == IMAGE).long()} if model_type.startswith("qwen") else {}
    return {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), **image, **more}


def trained(twin: Twin) -> Twin:
    twin.add_lora(recipe.Lora(rank=3))
    fill_adapters(twin)
    return twin


def exported(twin: Twin, root: Path, **options: Any) -> Path:
    merged = merge(twin, torch.float32)
    masks: Any = {name: linear.keep for name, linear in linears_of(twin.model).items() if name in twin.plan.masks}  # pyright: ignore[reportAttributeAccessIssue]
    save_plan(twin.plan, masks, root / "prune")
    write_expected(root / "expected.safetensors", twin, merged, ids(2, 40, vocabulary=240))
    return write_checkpoint(
        merged, byte_tokenizer(), root / "deploy", card=plain_card("x", PLANNED), record={}, **options
    )


def others(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of no text model, by their names in a checkpoint."""
    return {name: value for name, value in tensors.items() if re.search("vision|visual|projector", name)}


def test_every_wrapper_is_tried() -> None:
    assert set(WRAPPED) == set(WRAPPERS)


@pytest.mark.parametrize("model_type", WRAPPED)
def test_the_text_model_computes_what_the_wrapper_does_on_text_and_nothing_else_is_loaded(model_type, tmp_path):
    dense = whole(model_type, tmp_path / "dense")
    text = load_model(cfg(tmp_path / "dense"))
    torch.testing.assert_close(logits(text), logits(dense), rtol=1e-5, atol=1e-5)
    assert not [name for name, _ in text.named_modules() if "vision" in name or "visual" in name]
    described = describe(cfg(tmp_path / "dense"))
    assert described.parameters == text.num_parameters() < dense.num_parameters() and described.blocks == 6
    assert described.parameters + described.beside == dense.num_parameters()


@pytest.mark.parametrize("model_type", WRAPPED)
def test_the_export_is_the_same_wrapper_around_the_pruned_text_model(model_type, tmp_path):
    dense = whole(model_type, tmp_path / "dense")
    twin = trained(Twin(load_model(cfg(tmp_path / "dense")), Plan("depth", 6, GONE)))
    folder = exported(twin, tmp_path, max_shard_size="200KB")
    record = check(folder, tmp_path / "expected.safetensors", tmp_path / "prune" / "plan.json")
    assert record["ok"] and record["blocks"] == 5, record["problems"]
    pair: Any = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    loaded, info = pair
    assert type(loaded) is type(dense) and not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    near = max(2e-4, TRAINED * record["rounding"])  # a recurrence carries rounding far
    torch.testing.assert_close(logits(loaded.eval()), logits(twin.model), rtol=2e-4, atol=near)
    before = load_file(tmp_path / "dense" / WEIGHTS)
    after = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    assert others(before).keys() == others(after).keys() != set()
    assert all(torch.equal(value, after[name]) for name, value in others(before).items())
    said = (folder / "README.md").read_text()
    assert "AutoModelForImageTextToText" in said and "pipeline_tag: image-text-to-text" in said
    assert (folder / "preprocessor_config.json").is_file() and len(list(folder.glob("*.safetensors"))) > 1
    seen, unseen = (
        logits(loaded, **with_image(model_type)),
        logits(loaded, input_ids=with_image(model_type)["input_ids"]),
    )
    assert seen.isfinite().all() and (seen - unseen).abs().max() > 1e-3
    again = load_model(cfg(folder))  # an export is a model like any other
    torch.testing.assert_close(logits(again), logits(twin.model), rtol=2e-4, atol=near)


@pytest.mark.parametrize("model_type", WRAPPED)
def test_without_pruning_the_export_sees_what_the_dense_wrapper_sees(model_type, tmp_path):
    dense = whole(model_type, tmp_path / "dense")
    folder = exported(Twin(load_model(cfg(tmp_path / "dense")), Plan.none(6)), tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert torch.equal(logits(loaded, **with_image(model_type)), logits(dense, **with_image(model_type)))
    assert load_file(folder / WEIGHTS).keys() == load_file(tmp_path / "dense" / WEIGHTS).keys()


def test_tensors_that_no_class_reads_are_copied_too_and_said(tmp_path, capsys):
    """Heads that draft tokens (MTP) are no part of any class: they go on as they are, or are said to be left out."""
    whole("qwen3_5", tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / WEIGHTS)
    drafts = {"mtp.fc.weight": torch.rand(64, 128), "mtp.layers.0.mlp.up_proj.weight": torch.rand(96, 64)}
    save_file(tensors | drafts, tmp_path / "dense" / WEIGHTS, metadata={"format": "pt"})
    folder = exported(Twin(load_model(cfg(tmp_path / "dense")), Plan("depth", 6, GONE)), tmp_path)
    written = load_file(folder / WEIGHTS)
    assert all(torch.equal(written[name], value) for name, value in drafts.items())
    assert "mtp.fc.weight and 1 more" in " ".join(capsys.readouterr().out.split())


def test_masks_and_narrowing_reach_the_export_and_are_certified_there(tmp_path):
    whole("gemma3", tmp_path / "dense")
    width = recipe.Width(kind="width", mlp=0.4, calibration=recipe.Calibration(data="text"))
    for kind, prune in {"masked": recipe.Magnitude(kind="magnitude", pattern="2:4"), "narrow": width}.items():
        dense = load_model(cfg(tmp_path / "dense"))
        plan, masks, weights = registry.prune(Twin(dense, Plan.none(6)), prune, [ids(2, 20)])  # pyright: ignore[reportArgumentType]
        twin = Twin(load_model(cfg(tmp_path / "dense")), plan, masks, weights)
        merged = merge(twin, torch.float32)
        save_plan(plan, masks, tmp_path / kind / "prune", weights)
        write_expected(tmp_path / kind / "expected.safetensors", twin, merged, ids(2, 40))
        folder = write_checkpoint(merged, byte_tokenizer(), tmp_path / kind / "deploy", card="", record={})
        record = check(folder, tmp_path / kind / "expected.safetensors", tmp_path / kind / "prune" / "plan.json")
        assert record["ok"], record["problems"]
        assert record["zeros"]["found"] >= record["zeros"]["certified"] == sum(m.zeros for m in plan.masks.values())
        inner = json.loads((folder / "config.json").read_text())["text_config"]
        assert inner["intermediate_size"] == (56 if kind == "narrow" else 96)


def test_a_stock_process_loads_and_writes_with_the_export(tmp_path):
    whole("gemma3", tmp_path / "dense")
    folder = exported(trained(Twin(load_model(cfg(tmp_path / "dense")), Plan("depth", 6, GONE))), tmp_path)
    program = (
        "import sys, torch; from transformers import AutoModelForImageTextToText as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1]).eval(); ids = torch.arange(3, 12)[None]\n"
        "texts = [model.generate(ids, do_sample=False, max_new_tokens=8, use_cache=use) for use in (True, False)]\n"
        "assert torch.equal(*texts) and 'recover' not in sys.modules; print(type(model).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Gemma3ForConditionalGeneration" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: {k: v for k, v in t.items() if "multi_modal_projector" not in k},
            "2 tensors are missing .*projector",
        ),
        (
            lambda t: t | {"strange.weight": torch.ones(2)},
            r"1 tensors belong to no part of it, such as strange\.weight",
        ),
        (
            lambda t: {k: v[:-1].clone() if k.endswith("position_embedding.weight") else v for k, v in t.items()},
            r"position_embedding\.weight is \[3, 32\] in the weights, \[4, 32\]",
        ),
        (lambda t: {k: v for k, v in t.items() if "layers.3.mlp.up_proj" not in k}, r"1 tensors are missing .*up_proj"),
    ],
)
def test_tensors_of_every_part_are_accounted_for(change, said, tmp_path):
    whole("gemma3", tmp_path)
    save_file(change(load_file(tmp_path / WEIGHTS)), tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"(?s){said}"):
        load_model(cfg(tmp_path))


def test_settings_of_a_part_are_checked_as_those_of_a_model(tmp_path):
    whole("llava", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, said in (
        ({"num_hidden_layers": 2**20}, "num_hidden_layers is 1048576"),
        ({"transformers_weights": "x"}, "transformers_weights is there"),
        ({"model_type": "jamba"}, "'jamba' is not supported"),
    ):
        changed = config | {"text_config": config["text_config"] | change}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ModelError, match=said):
            load_model(cfg(tmp_path))


def test_a_model_of_its_own_has_no_wrapper(tiny_llama):
    assert wrapped_of(tiny_llama) is None and wrapped_of(merge(Twin(tiny_llama, Plan.none(6)), torch.float32)) is None
