"""What is exported loads in stock transformers, is the model that was trained, and damage to it is found."""

from __future__ import annotations

import copy
import errno
import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from safetensors.torch import load_file, save_file
from small_run import Here
from tiny import FAMILIES, HYBRIDS, ids, tiny
from transformers import AutoModelForCausalLM
from twins import fill_adapters

from recover.base import artifacts
from recover.base.errors import ArtifactError, ExportError
from recover.config import recipe
from recover.export.merge import merge, pruned_config
from recover.export.verify import check, fresh_process, verify, write_expected
from recover.export.write import write_checkpoint
from recover.models.arch import blocks_of, linears_of
from recover.models.plan import Plan, save_plan
from recover.models.twin import Twin
from recover.prune import registry

DROPPED = (2, 4)
# A state that is multiplied at every token carries rounding further, and so do heads without a scale.
SENSITIVE = {*HYBRIDS, "gemma4_text", "gemma4_unified_text"}


def trained(twin: Twin, blocks: str = "all") -> Twin:
    """The twin with LoRA whose two factors are random, as after training."""
    twin.add_lora(recipe.Lora(rank=3, blocks=blocks))  # type: ignore[arg-type]
    fill_adapters(twin)
    return twin


def depth_twin(family: str = "llama", **overrides) -> Twin:
    return trained(Twin(tiny(family, **overrides), Plan("depth", 6, DROPPED)))


def masked_twin(pattern: str = "2:4", family: str = "llama", **overrides) -> Twin:
    cfg = recipe.Magnitude(kind="magnitude", pattern=pattern, sparsity=None if ":" in pattern else 0.5)  # type: ignore[arg-type]
    plan, masks, _ = registry.prune(Twin(tiny(family, **overrides), Plan.none(6)), cfg, [])
    return trained(Twin(tiny(family, **overrides), plan, masks))


def exported(twin: Twin, root: Path, dtype: torch.dtype = torch.float32, **options) -> Path:
    """The deploy folder, with the plan and the expected logits beside it."""
    merged = merge(twin, dtype)
    save_plan(twin.plan, _masks(twin), root / "prune")
    write_expected(root / "expected.safetensors", twin, merged, ids(2, 40))
    return write_checkpoint(merged, byte_tokenizer(), root / "deploy", card="# card", record={"seed": 0}, **options)


def _masks(twin: Twin) -> dict[str, torch.Tensor]:
    return {name: linear.keep for name, linear in linears_of(twin.model).items() if name in twin.plan.masks}  # type: ignore[union-attr, misc]


def checked(root: Path) -> dict:
    return check(root / "deploy", root / "expected.safetensors", root / "prune" / "plan.json")


@torch.no_grad()
def logits(model, prompt=None) -> torch.Tensor:
    return model(input_ids=ids(2, 40) if prompt is None else prompt, use_cache=False).logits.float()


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_pruned_and_merged_reloads_as_the_pruned_view(family, tmp_path):
    twin = depth_twin(family)
    folder = exported(twin, tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded).__module__.startswith("transformers.models.")
    scale = logits(twin.model).abs().max()
    rounding = 3e-5 if family in SENSITIVE else 2e-6
    assert (logits(loaded.eval()) - logits(twin.model)).abs().max() < rounding * max(1.0, float(scale)) * 3
    assert len(blocks_of(loaded)) == loaded.config.num_hidden_layers == 4
    numbers = [m.layer_idx for m in loaded.modules() if getattr(m, "layer_idx", None) is not None]
    assert sorted(set(numbers)) == [0, 1, 2, 3]
    record = checked(tmp_path)
    assert record["ok"], record["problems"]
    assert record["parameters"] == loaded.num_parameters() and len(record["generated"]) == 16


@pytest.mark.parametrize(
    ("family", "pattern"), [("llama", "2:4"), ("llama", "unstructured"), ("phi3", "4:8"), ("gpt2", "2:4")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_and_merged_keeps_every_zero_after_reload(family, pattern, dtype, tmp_path):
    twin = masked_twin(pattern, family)
    folder = exported(twin, tmp_path, dtype)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == dtype
    for name, keep_OI in _masks(twin).items():
        weight_OI = loaded.get_submodule(name).weight
        weight_OI = weight_OI.T if family == "gpt2" else weight_OI  # stored the other way round
        assert (weight_OI[~keep_OI] == 0).all() and (weight_OI[keep_OI] != 0).float().mean() > 0.99, name
    record = checked(tmp_path)
    assert record["ok"], record["problems"]
    assert record["zeros"]["certified"] == sum(r.zeros for r in twin.plan.masks.values()) <= record["zeros"]["found"]
    if dtype == torch.float32:
        assert (logits(loaded.eval()) - logits(twin.model)).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_is_in_fp32_and_cast_once(dtype):
    twin = depth_twin(tie_word_embeddings=True)
    twin.base.to(torch.bfloat16)
    merged = merge(twin, dtype)
    for new, old in enumerate(twin.plan.kept):
        layer = twin.base.get_submodule(f"model.layers.{old}.mlp.up_proj")
        update = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double() * 2
        expected = (layer.base_layer.weight.double() + update).float().to(dtype)
        found = merged.model.layers[new].mlp.up_proj.weight
        assert found.dtype == dtype and torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=1e-6)
        assert (found == expected).float().mean() > 0.98  # all but the few that sit on a rounding edge
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_merge_equals_peft_where_peft_can():
    twin = depth_twin()
    stock = copy.deepcopy(twin.model).merge_and_unload()
    merged = merge(twin, torch.float32)
    for new, old in enumerate(twin.plan.kept):
        for name, weight in merged.model.layers[new].named_parameters():
            assert torch.allclose(weight, stock.model.layers[old].get_parameter(name), atol=1e-6), name


def test_merge_leaves_the_twin_alone_and_copies_no_unchanged_weight():
    twin = trained(Twin(tiny(), Plan("depth", 6, DROPPED)), "after_cut")
    before = {name: weight.clone() for name, weight in twin.base.state_dict().items()}
    expected = logits(twin.model)
    merged = merge(twin, torch.float32)
    assert merged.model.layers[1].mlp.up_proj.weight.data_ptr() == twin.blocks[1].mlp.up_proj.weight.data_ptr()
    assert merged.model.layers[2].mlp.up_proj.weight.data_ptr() != twin.blocks[3].mlp.up_proj.weight.data_ptr()
    assert all(torch.equal(weight, before[name]) for name, weight in twin.base.state_dict().items())
    assert torch.equal(logits(twin.model), expected)


def test_merge_without_lora_and_without_pruning_is_the_dense_model(tiny_llama):
    expected = logits(tiny_llama)
    assert torch.equal(logits(merge(Twin(tiny_llama, Plan.none(6)), torch.float32)), expected)


def test_merge_refuses_lora_on_a_dropped_block_two_adapters_and_weights_that_overflow():
    from peft import LoraConfig, get_peft_model

    twin = Twin(tiny(), Plan("depth", 6, DROPPED))
    twin.adopt(get_peft_model(twin.base, LoraConfig(target_modules=["up_proj"], task_type="CAUSAL_LM")))  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"LoRA sits on model\.layers\.2\.mlp\.up_proj and 1 other layers"):
        merge(twin, torch.float32)
    twin = depth_twin()
    twin.model.disable_adapter_layers()
    with pytest.raises(ExportError, match=r"expected one active, unmerged adapter"):
        merge(twin, torch.float32)
    twin = depth_twin()
    twin.blocks[1].mlp.up_proj.base_layer.weight.data[0, 0] = 1e6
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: not finite in torch\.float16"):
        merge(twin, torch.float16)


def test_config_lists_are_renumbered_and_others_left_alone():
    config = tiny("qwen2_sliding").config
    config.eos_token_id = [2, 3, 4, 5, 6, 7]  # as long as the model is deep, and yet not one a block
    pruned = pruned_config(config, Plan("depth", 6, (2, 4)))
    assert pruned.eos_token_id == [2, 3, 4, 5, 6, 7] and pruned.num_hidden_layers == 4
    assert pruned.layer_types == [config.layer_types[i] for i in (0, 1, 3, 5)] and pruned.max_window_layers == 2
    smollm = pruned_config(tiny("smollm3").config, Plan("depth", 6, (2, 5)))
    assert smollm.no_rope_layers == [tiny("smollm3").config.no_rope_layers[i] for i in (0, 1, 3, 4)]
    assert config.num_hidden_layers == 6 and "sparsity_config" not in pruned.to_dict()


@pytest.mark.parametrize(("dropped", "warned"), [((1, 4), True), ((2, 3), False), ((4, 5), False)])
def test_a_broken_attention_period_is_warned_of(dropped, warned, capsys):
    merge(Twin(tiny("gemma2"), Plan("depth", 6, dropped)), torch.float32)
    assert ("no longer alternate attention every 2 blocks as gemma2 does" in capsys.readouterr().err) is warned


def test_the_folder_holds_what_a_stock_tool_needs(tmp_path):
    twin = depth_twin()
    twin.base.generation_config.temperature = 0.7  # beside do_sample=False: loads, and must be saved nevertheless
    twin.base.generation_config.eos_token_id = [2, 9]
    twin.base.config.use_cache = False
    folder = exported(twin, tmp_path, max_shard_size="100KB")
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "README.md", "recover.json", "MANIFEST.json", "tokenizer.json"} <= names
    assert "model.safetensors.index.json" in names and not any(name.endswith((".bin", ".py", ".tmp")) for name in names)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 9] and generation["temperature"] == 0.7 and generation["do_sample"] is True
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["use_cache"] is True
    assert not {"sparsity_config", "quantization_config", "auto_map"} & config.keys()
    assert checked(tmp_path)["ok"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_end_of_text_comes_from_the_tokenizer_or_is_asked_for(tmp_path):
    merged = merge(depth_twin(eos_token_id=None), torch.float32)
    merged.generation_config.eos_token_id = None
    folder = write_checkpoint(merged, byte_tokenizer(), tmp_path / "deploy", card="", record={})
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    merged.generation_config.eos_token_id = None
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ExportError, match="neither the model nor its tokenizer has an end-of-text token"):
        write_checkpoint(merged, tokenizer, tmp_path / "other", card="", record={})


def test_a_model_of_our_class_is_refused(tmp_path):
    with pytest.raises(ExportError, match="not a class of stock transformers"):
        write_checkpoint(depth_twin().base, byte_tokenizer(), tmp_path / "deploy", card="", record={})


def test_a_full_disk_leaves_the_old_folder_and_says_what_is_needed(tmp_path, monkeypatch):
    folder = exported(depth_twin(), tmp_path)
    before = artifacts.read_json(folder / "MANIFEST.json")
    merged = merge(depth_twin(), torch.float32)

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(byte_tokenizer().__class__, "save_pretrained", full)
    with pytest.raises(ArtifactError, match=r"deploy: disk full: [\d,]+ bytes to write, [\d,]+ bytes free"):
        write_checkpoint(merged, byte_tokenizer(), folder, card="", record={})
    assert artifacts.read_json(folder / "MANIFEST.json") == before
    artifacts.check_manifest(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deploy", "expected.safetensors", "prune"]


def tampered(folder: Path, change) -> None:
    """Change the weights and make the manifest agree, as a wrong exporter would have written them."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    artifacts.write_manifest(folder)


def _swap_blocks(state):
    first, second = "model.layers.1.", "model.layers.2."
    names = {name: name.replace(first, "?").replace(second, first).replace("?", second) for name in state}
    return {names[name]: tensor for name, tensor in state.items()}


def _lose_one(state):
    return {name: tensor for name, tensor in state.items() if name != "model.layers.1.mlp.up_proj.weight"}


def _add_one(state):
    return state | {"model.layers.9.mlp.up_proj.weight": torch.zeros(96, 64)}


def _break_one(state):
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    return state


def _fill_a_zero(state):
    weight_OI = state["model.layers.1.mlp.up_proj.weight"]
    row, column = (weight_OI == 0).nonzero()[0]
    weight_OI[row, column] = 1e-6  # far too small for the logits to show it
    return state


@pytest.fixture(scope="module")
def right(tmp_path_factory) -> Path:
    """A masked model, rightly exported in bf16."""
    root = tmp_path_factory.mktemp("right")
    exported(masked_twin(), root, torch.bfloat16)
    return root


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_swap_blocks, "logits and the merged model differ by"),
        (_lose_one, r"missing keys: \['model.layers.1.mlp.up_proj.weight'\]"),
        (_add_one, r"unexpected keys: \['model.layers.9.mlp.up_proj.weight'\]"),
        (_break_one, r"model.layers.1.mlp.up_proj.weight: not finite"),
        (_fill_a_zero, r"3 of 4 consecutive inputs are not zero, not 2:4"),
        (_fill_a_zero, r"model.layers.1.mlp.up_proj.weight: \d+ zeros, its certificate says \d+"),
    ],
)
def test_a_wrong_checkpoint_is_found_though_its_hashes_agree(right, change, message, tmp_path):
    shutil.copytree(right, tmp_path, dirs_exist_ok=True)
    tampered(tmp_path / "deploy", change)
    record = checked(tmp_path)
    assert not record["ok"]
    assert re.search(message, "; ".join(record["problems"])), record["problems"]


def test_a_cache_that_is_off_is_found(right, monkeypatch):
    """One pass over the text cannot tell, and tokens may agree; the logits of cached decoding tell."""
    from transformers.cache_utils import DynamicCache

    stock = DynamicCache.update

    def off(self, key, value, *args, **options):
        return stock(self, key if key.shape[2] > 1 else key * 1.5, value, *args, **options)

    monkeypatch.setattr(DynamicCache, "update", off)
    (problem,) = checked(right)["problems"]
    assert problem.startswith("logits with and without a KV cache differ by")


def test_an_adapter_that_was_not_merged_is_found(tmp_path):
    twin = depth_twin()
    bare = merge(Twin(tiny(), Plan("depth", 6, DROPPED)), torch.float32)
    save_plan(twin.plan, {}, tmp_path / "prune")
    write_expected(tmp_path / "expected.safetensors", twin, bare, ids(2, 40))
    write_checkpoint(bare, byte_tokenizer(), tmp_path / "deploy", card="", record={})
    (problem,) = checked(tmp_path)["problems"]
    assert problem.startswith("logits and the training view differ by")


def test_verify_in_a_fresh_process(tmp_path):
    folder = exported(depth_twin(), tmp_path, torch.bfloat16)
    arguments = (folder, tmp_path / "expected.safetensors", tmp_path / "prune" / "plan.json", tmp_path / "verify.json")
    record = verify(*arguments)
    assert record["ok"] and record == artifacts.read_json(tmp_path / "verify.json")
    assert record["dtype"] == "bfloat16" and record["blocks"] == 4
    assert record["files"]["model.safetensors"] == artifacts.sha256(folder / "model.safetensors")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(weights))
    with pytest.raises(ExportError, match=r"is not the model that was trained: .*model\.safetensors has changed"):
        verify(*arguments, process=Here())
    assert artifacts.read_json(tmp_path / "verify.json")["ok"] is False


def test_a_folder_that_does_not_load_is_an_export_error(tmp_path):
    folder = exported(depth_twin(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no_such_type"}))
    artifacts.write_manifest(folder)
    with pytest.raises(ExportError, match="stock transformers cannot load it"):
        checked(tmp_path)


def test_a_process_that_waits_is_gone_when_there_is_nothing_to_verify(tmp_path):
    with pytest.raises(ZeroDivisionError), fresh_process() as process:
        assert process.poll() is None
        raise ZeroDivisionError
    assert process.returncode == -signal.SIGKILL
    with fresh_process() as process:
        process.communicate("")  # as if this process had died
    assert process.returncode == 0


def test_a_process_that_died_while_it_waited_is_an_error_that_says_so(tmp_path):
    with fresh_process() as process:
        process.kill()
        process.wait()
        with pytest.raises(ExportError, match="verification ended with -9 and no record"):
            verify(tmp_path, tmp_path / "e", tmp_path / "p", tmp_path / "verify.json", process=process)
