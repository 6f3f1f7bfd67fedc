"""What is written as GGUF is the checkpoint in llama.cpp's terms; what it would compute otherwise is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_checkpoint import GEMMA3, LLAMA31, ROWS, VARIANTS, by_llama_cpp, checkpoint, words
from safetensors.torch import load_file, save_file
from tiny import FULL, SLIDING, ids, tiny, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from recover.base.errors import ArtifactError, ExportError, ModelError
from recover.config import recipe
from recover.export.gguf import write as writing
from recover.export.gguf.write import planned_bytes, quantized_bytes, write_gguf
from recover.models.load import load_model


def read(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Metadata and tensors (as float32) by the reader of the package `gguf`."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}
    return fields, tensors


def row_in_checkpoint(row: int, width: int) -> int:
    """The reference: llama.cpp turns rows 2p and 2p + 1 of a head as a pair, transformers rows p and p + width / 2."""
    head, inside = divmod(row, width)
    pair, second = divmod(inside, 2)
    return head * width + pair + second * (width // 2)


def changed(folder: Path, name: str, **fields) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


RENAMED = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.": "ffn_",
    "_proj": "",
}
OLMO2 = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
AROUND = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GEMMAS = ("gemma", "gemma2", "gemma3_text")  # norms multiply by one more than the checkpoint holds
HALVES = (*("qwen2", "qwen3", "olmo2", "qwen3_moe", "olmoe"), *GEMMAS)  # llama.cpp turns rows as transformers does


def stacked(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The matrices of all experts as one tensor, under the name of those of expert 0 without its number."""
    found = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    for name in (name for name in state if ".experts.0." in name):
        matrices = [name.replace(".experts.0.", f".experts.{expert}.") for expert in range(len(state))]
        found[name.replace(".experts.0", "")] = torch.stack([state[each] for each in matrices if each in state])
    return found


def renamed(name: str, variant: str = "llama") -> str:
    if "moe" in variant and "mlp." in name:
        name = name.replace("mlp.gate.", "ffn_gate_inp.")
        name = re.sub(r"mlp\.(gate|up|down)_proj", r"ffn_\1_exps", name)
    others = {"olmo2": OLMO2, "gemma2": AROUND, "gemma3_text": AROUND}.get(variant, {})
    for old, new in (RENAMED | others).items():
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_is_the_checkpoints_with_rotary_rows_where_llama_cpp_has_them(variant, tmp_path):
    folder = checkpoint(tmp_path / "deploy", variant)
    _, tensors = read(write_gguf(folder, tmp_path / "out.gguf"))
    state = stacked(load_file(folder / "model.safetensors"))
    extra = {"rope_freqs.weight"} if variant in ("llama_rope3", "granite_biased") else set()
    assert {renamed(name, variant) for name in state} | extra == set(tensors)
    width = 32 if variant in ("mistral", "qwen3") else 16
    for name, tensor in state.items():
        expected = tensor.numpy()
        if ("q_proj" in name or "k_proj" in name) and variant not in HALVES:
            expected = np.stack([expected[row_in_checkpoint(row, width)] for row in range(len(expected))])
        expected = expected + 1 if variant in GEMMAS and tensor.dim() == 1 else expected
        assert np.array_equal(tensors[renamed(name, variant)], expected), name


@pytest.mark.parametrize(
    ("variant", "overrides", "said"),
    [
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1, 1]}, r"block 2 has no rotary.*in every block 4 of this family"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1, 1, 0]}, r"block 3 has rotary positions \(no_rope_layers\)"),
        (
            "qwen3_moe",
            {"mlp_only_layers": [1]},
            "some blocks have a plain MLP.*'qwen3moe' takes experts in every block",
        ),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False; GGUF is written for True"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads is 2; GGUF is written for 4"),
        ("phi3", {"hidden_act": "gelu"}, "hidden_act is gelu; GGUF is written for silu"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_act is silu; GGUF is written for gelu_pytorch_tanh"),
        ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings is False; GGUF is written for True"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar is 24; GGUF is written for 16"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping is null; GGUF is written for a number"),
        ("gemma2", {"layer_types": [SLIDING] * 6}, r"attention of block 1 slides \(layer_types\), .* every block 2 of"),
        ("gemma3_text", {"layer_types": [SLIDING, FULL] * 3}, r"attention of block 1 is to all tokens \(layer_types\)"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0; GGUF is written for None"),
        (
            "gemma3_text",
            {"rope_parameters": GEMMA3 | {SLIDING: {"rope_type": "default", "rope_theta": 3e4}}},
            "rotary positions of blocks that slide are .*30000.0.*written for base 10000 without scaling",
        ),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5; GGUF is written for 1.0",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused_before_a_file_is_written(variant, overrides, said, tmp_path):
    folder = checkpoint(tmp_path / "deploy", variant, **overrides)
    with pytest.raises(ExportError, match=said):
        write_gguf(folder, tmp_path / "out.gguf")
    assert not [*tmp_path.glob("*gguf*")]


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_matrices_are_cast_once_and_vectors_are_float32(dtype, kind, tmp_path):
    folder = checkpoint(tmp_path / "deploy", "qwen2")
    path = write_gguf(folder, tmp_path / "out.gguf", dtype)
    kinds = {tensor.name: (len(tensor.shape), tensor.tensor_type.name) for tensor in gguf.GGUFReader(path).tensors}
    assert {found for dims, found in kinds.values() if dims == 2} == {kind}
    assert {found for dims, found in kinds.values() if dims == 1} == {"F32"}
    state, (_, tensors) = load_file(folder / "model.safetensors"), read(path)
    for name, tensor in state.items():
        expected = tensor.to(getattr(torch, dtype)).float() if tensor.dim() > 1 else tensor
        assert np.array_equal(tensors[renamed(name)], expected.numpy()), name


STEPS = {"q8_0": 127, "q5_0": 16, "q5_1": 31, "q4_0": 8, "q4_1": 15}  # of the largest weight, or of the whole span


@pytest.mark.parametrize("dtype", STEPS)
def test_a_quantized_file_is_the_checkpoint_to_half_a_step(dtype, tmp_path):
    """Reference: each 32 weights of a row have a grid; embedding and head have the grid of eight bits."""
    folder = checkpoint(tmp_path / "deploy", "llama")
    path = write_gguf(folder, tmp_path / "out.gguf", dtype)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    fields, tensors = read(path)
    assert fields["general.file_type"] == getattr(gguf.LlamaFileType, f"MOSTLY_{dtype.upper()}")
    for name, tensor in load_file(folder / "model.safetensors").items():
        found, kind = tensors[renamed(name)], kinds[renamed(name)]
        exact = tensor.numpy()
        if tensor.dim() == 1:
            assert kind == "F32" and np.array_equal(found, exact), name
            continue
        if "q_proj" in name or "k_proj" in name:
            exact = np.stack([exact[row_in_checkpoint(row, 16)] for row in range(len(exact))])
        fine = renamed(name) in ("token_embd.weight", "output.weight")
        assert kind == ("Q8_0" if fine else dtype.upper()), name
        grids = exact.reshape(-1, 32)
        span = np.ptp(grids, axis=1) if kind.endswith("_1") else np.abs(grids).max(axis=1)
        step = span / STEPS[kind.lower()]
        off = np.abs(found.reshape(-1, 32) - grids).max(axis=1)
        # A grid of -8 to 7 ends a step before its largest weight; scale and least weight are float16.
        most = (1.0 if kind in ("Q4_0", "Q5_0") else 0.5) + STEPS[kind.lower()] / 2**11
        assert (off <= step * most + np.abs(grids).max(axis=1) / 2**10).all(), (name, (off / step).max())
        assert (off > 0).any(), name


def test_experts_are_quantized_and_routers_stay_as_they_are(tmp_path):
    folder = checkpoint(tmp_path / "deploy", "qwen3_moe", moe_intermediate_size=64)
    path = write_gguf(folder, tmp_path / "out.gguf", "q4_0")
    kinds = {tensor.name: (tensor.tensor_type.name, len(tensor.shape)) for tensor in gguf.GGUFReader(path).tensors}
    assert {kinds[f"blk.{block}.ffn_{name}_exps.weight"] for block in range(6) for name in ("gate", "up", "down")} == {
        ("Q4_0", 3)
    }
    assert {kinds[f"blk.{block}.ffn_gate_inp.weight"] for block in range(6)} == {("F32", 2)}
    assert quantized_bytes(folder)["q4_0"] == sum(planned_bytes(AutoConfig.from_pretrained(folder), "q4_0"))


def test_rows_that_no_grid_divides_stay_wide(tmp_path):
    path = write_gguf(recipe.embedded("fable-2m"), tmp_path / "fable.gguf", "q4_0")  # rows of 112
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["token_embd.weight"] == "F16" and "Q4_0" in kinds.values()
    assert read(path)[1]["blk.0.ffn_down.weight"].shape == (112, 288)


def test_the_dtype_is_the_checkpoints_unless_asked_for(tmp_path):
    path = write_gguf(recipe.embedded("fable-2m"), tmp_path / "fable.gguf")
    assert read(path)[0]["general.file_type"] == 32  # mostly bfloat16
    with pytest.raises(ExportError, match="float64 has no GGUF form here; expected one of float32, float16, bfloat16"):
        write_gguf(recipe.embedded("fable-2m"), path, "float64")


def test_heads_that_are_not_as_wide_as_the_model_are_written_as_a_family_that_takes_them(tmp_path, capsys):
    """llama.cpp's loader for Qwen 2 takes q and o as square matrices; the rest of the file says how texts are split."""
    fields, tensors = read(write_gguf(checkpoint(tmp_path / "narrow", "qwen2_narrow"), tmp_path / "narrow.gguf"))
    assert fields["general.architecture"] == "llama" and fields["llama.attention.key_length"] == 16
    assert tensors["blk.0.attn_q.weight"].shape == (32, 64) and tensors["blk.0.attn_q.bias"].shape == (32,)
    assert "llama.cpp from b8929 (April 2026) on loads the file" in capsys.readouterr().err
    fields, _ = read(write_gguf(checkpoint(tmp_path / "whole", "qwen2"), tmp_path / "whole.gguf"))
    assert fields["general.architecture"] == "qwen2" and "b8929" not in capsys.readouterr().err


def test_metadata_of_a_llama(tmp_path):
    folder = checkpoint(tmp_path / "deploy")
    (folder / "recover.json").write_text(json.dumps({"recipe": {"name": "my-run"}}))
    fields, _ = read(write_gguf(folder, tmp_path / "out.gguf"))
    expected = {
        "general.architecture": "llama",
        "general.name": "my-run",
        "general.file_type": 0,
        "llama.block_count": 6,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": np.float32(1e-6),
        "llama.vocab_size": ROWS,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 9,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": words().chat_template,
    }
    assert {name: fields.get(name) for name in expected} == expected
    assert "tokenizer.ggml.unknown_token_id" not in fields and "llama.rope.scaling.type" not in fields


def test_the_vocabulary_has_a_token_for_each_row_and_the_merges_in_order(tmp_path):
    fields, _ = read(write_gguf(checkpoint(tmp_path / "deploy"), tmp_path / "out.gguf"))
    tokenizer = words()
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[:1024] == tokenizer.convert_ids_to_tokens(range(1024)) and len(set(tokens)) == ROWS == len(types)
    assert types[:3] == [3, 3, 3] and set(types[3:1024]) == {1} and set(types[1024:]) == {5}
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]] == [tuple(pair) for pair in merges]


@pytest.mark.parametrize(
    ("stops", "config", "expected"),
    [(0, 7, [0, 2, None]), (None, 7, [7, 2, None]), ([5, 2, 8], 7, [5, 2, 8]), ([5, 6, 8, 9], 7, [5, 6, 8])],
)
def test_texts_end_where_generate_ends_them(stops, config, expected, tmp_path, capsys):
    folder = checkpoint(tmp_path / "deploy")
    changed(folder, "generation_config.json", eos_token_id=stops)
    changed(folder, "config.json", eos_token_id=config)
    fields, _ = read(write_gguf(folder, tmp_path / "out.gguf"))
    assert [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")] == expected
    assert ("llama.cpp has place for 3" in capsys.readouterr().err) is (stops == [5, 6, 8, 9])


def test_rope_of_llama_3_1_is_a_tensor_of_factors_and_a_linear_one_a_number(tmp_path):
    folder = checkpoint(tmp_path / "deploy", "llama_rope3")
    _, tensors = read(write_gguf(folder, tmp_path / "out.gguf"))
    plain = tiny("llama").model.rotary_emb.inv_freq.double()
    scaled = tiny("llama", rope_parameters=LLAMA31).model.rotary_emb.inv_freq.double()
    factors = torch.from_numpy(tensors["rope_freqs.weight"].copy()).double()
    assert torch.allclose(plain / factors, scaled, rtol=1e-6) and 1 < factors[2] < 8  # between the two plateaus
    folder = checkpoint(tmp_path / "linear", "llama_linear")
    fields, tensors = read(write_gguf(folder, tmp_path / "out.gguf"))
    assert (fields["llama.rope.scaling.type"], fields["llama.rope.scaling.factor"]) == ("linear", 2.0)
    assert "rope_freqs.weight" not in tensors


@pytest.mark.parametrize(
    ("family", "slides"),
    [
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}),
    ],
)
def test_a_sliding_window_ends_the_context_and_is_warned_of(family, slides, tmp_path, capsys):
    folder = checkpoint(tmp_path / "deploy", family, **slides)
    fields, _ = read(write_gguf(folder, tmp_path / "out.gguf"))
    assert fields[f"{fields['general.architecture']}.context_length"] == 8
    assert "attention slides over 8 tokens, and llama.cpp attends to all" in capsys.readouterr().err


def test_shards_are_read_and_transformers_reads_the_file_back(tmp_path):
    folder = checkpoint(tmp_path / "deploy")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    path = write_gguf(folder, tmp_path / "out.gguf")
    read_back = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
    expected = model.state_dict()
    assert read_back.keys() == expected.keys()
    assert all(torch.equal(read_back[name], expected[name]) for name in expected)


def test_a_file_of_phi3_is_read_back_as_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("RECOVER_CACHE", str(tmp_path / "cache"))
    folder = checkpoint(tmp_path / "deploy", "phi3_grouped")
    model, tokens = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids(2, 20, vocabulary=1000)
    read_back = load_model(recipe.Model(source=str(write_gguf(folder, tmp_path / "out.gguf"))))
    assert torch.equal(read_back(tokens).logits, model(tokens).logits)


def test_other_families_and_options_are_refused_by_name(tmp_path):
    out = tmp_path / "out.gguf"
    tiny("olmo3").save_pretrained(tmp_path / "olmo3")
    with pytest.raises(ExportError, match="model type 'olmo3' is not written as GGUF; expected llama, mistral, qwen2"):
        write_gguf(tmp_path / "olmo3", out)
    folder = checkpoint(tmp_path / "deploy")
    with pytest.raises(ExportError, match=r"out\.bin: expected a file name that ends in \.gguf"):
        write_gguf(folder, tmp_path / "out.bin")
    for fields, message in (
        ({"hidden_act": "gelu"}, "hidden_act is gelu; GGUF is written for silu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type is dynamic"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            r"partial_rotary_factor is 0\.5; GGUF is written for 1\.0",
        ),
        ({"attention_bias": True}, r"the weights lack model\.layers\.0\.self_attn\.k_proj\.bias \(24 such tensors\)"),
    ):
        shutil.copytree(folder, tmp_path / "changed", dirs_exist_ok=True)
        changed(tmp_path / "changed", "config.json", **fields)
        with pytest.raises(ExportError, match=message):
            write_gguf(tmp_path / "changed", out)
    assert not out.exists()


def test_tensors_without_a_place_and_values_that_overflow_are_refused(tmp_path):
    out = tmp_path / "out.gguf"
    folder = checkpoint(tmp_path / "biased", "qwen3", attention_bias=True)
    message = r"llama\.cpp's 'qwen3' has no place for model\.layers\.0\.self_attn\.k_proj\.bias \(24 such tensors\)"
    with pytest.raises(ExportError, match=message):
        write_gguf(folder, out)
    folder = checkpoint(tmp_path / "deploy")
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_gguf(folder, out)
    before = out.read_bytes()
    with pytest.raises(ExportError, match=r"blk\.1\.ffn_up\.weight: not finite in float16"):
        write_gguf(folder, out, "float16")
    assert out.read_bytes() == before and sorted(path.name for path in tmp_path.iterdir()) == [
        "biased",
        "deploy",
        out.name,
    ]
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: missing"):
        write_gguf(folder, out)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    folder, out = checkpoint(tmp_path / "deploy"), tmp_path / "out.gguf"
    out.write_bytes(b"old")

    def full(*_paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ArtifactError, match=r"out\.gguf: disk full: [\d,]+ bytes to write, [\d,]+ bytes free"):
        write_gguf(folder, out)
    assert out.read_bytes() == b"old" and sorted(path.name for path in tmp_path.iterdir()) == ["deploy", "out.gguf"]


def test_the_command_writes_the_file_and_says_so(tmp_path):
    import typer

    from recover.commands.options import gguf as command

    app = typer.Typer()
    app.command()(command)
    folder = str(recipe.embedded("fable-2m"))
    done = CliRunner().invoke(app, [folder, str(tmp_path / "fable.gguf"), "--dtype", "float16"])
    assert done.exit_code == 0 and "fable.gguf (3.8 MB)" in done.stdout
    assert read(tmp_path / "fable.gguf")[0]["general.file_type"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_what_transformers_does(variant, tmp_path):
    folder = checkpoint(tmp_path / "deploy", variant)
    path = write_gguf(folder, tmp_path / "out.gguf")
    prompts = [ids(1, length, vocabulary=1024)[0].tolist() for length in (1, 9, 200)]
    found = by_llama_cpp(path, prompts, ROWS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in prompts])
    rounding = 3e-4 if variant in GEMMAS else 2e-5  # llama.cpp has GELU as a table in half precision
    assert (found - expected).abs().max() < rounding * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_llama_cpp_computes_on_a_quantized_file_what_is_read_of_it(dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    path = write_gguf(checkpoint(tmp_path / "deploy", "llama"), tmp_path / "out.gguf", dtype)
    prompts = [ids(1, length, vocabulary=1024)[0].tolist() for length in (1, 9, 200)]
    found = by_llama_cpp(path, prompts, ROWS)
    model = load_model(recipe.Model(source=str(path)))
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in prompts])
    # Products of quantized weights are taken with activations of eight bits.
    assert (found - expected).abs().max() < 2e-2 * expected.abs().max()


WIDER = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 9, "head_dim": 64}
GGML = writing._ggml() is not None
NO_GGML = "llama.cpp's code is not here: pip install xllamacpp"
FIRST_AND_LAST = {0, 3, 6, 7, 8}  # of nine blocks: an eighth at either end, and each third one between


def kinds_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.skipif(not GGML, reason=NO_GGML)
@pytest.mark.parametrize(
    ("dtype", "most", "number"), [("q4_k_m", "Q4_K", 15), ("q5_k_m", "Q5_K", 17), ("q6_k", "Q6_K", 18)]
)
def test_types_with_a_k_are_near_and_finer_where_llama_cpp_has_them_finer(dtype, most, number, tmp_path):
    folder = checkpoint(tmp_path / "deploy", "llama", **WIDER)
    path = write_gguf(folder, tmp_path / "out.gguf", dtype)
    fields, tensors = read(path)
    assert fields["general.file_type"] == number
    for name, kind in kinds_of(path).items():
        if not name.startswith("blk") or "norm" in name:
            continue
        block, part = int(name.split(".")[1]), name.split(".")[2]
        finer = part in ("attn_v", "ffn_down") and block in FIRST_AND_LAST
        assert kind == ("Q6_K" if finer else most), name
    assert kinds_of(path)["output.weight"] == "Q6_K" and kinds_of(path)["token_embd.weight"] == most
    exact = load_file(folder / "model.safetensors")
    off = {
        name: float(np.linalg.norm(tensors[renamed(name)] - tensor.numpy()) / np.linalg.norm(tensor.numpy()))
        for name, tensor in exact.items()
        if "down_proj" in name
    }
    rounded = {"q4_k_m": (0.05, 0.09), "q5_k_m": (0.02, 0.05), "q6_k": (0.01, 0.02)}[dtype]
    assert rounded[0] < off["model.layers.1.mlp.down_proj.weight"] < rounded[1]
    assert off["model.layers.0.mlp.down_proj.weight"] < 0.02
    sizes = writing.quantized_bytes(folder)
    assert sizes["q4_k_m"] < sizes["q5_k_m"] < sizes["q6_k"] < sizes["q8_0"]
    assert sizes[dtype] == sum(tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors)


def by_llama_cpps_rule(name: str, file: str, blocks: int, experts: int, seventy: bool) -> str:
    """The reference: `llama_tensor_get_type_impl` of llama.cpp (src/llama-quant.cpp), branch by branch."""
    most = {"q4_k_m": "q4_k", "q5_k_m": "q5_k", "q6_k": "q6_k"}[file]
    block, part = int(name.split(".")[1]), name.split(".")[2]
    more_bits = block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2
    kind = most
    if part in ("attn_v", "attn_qkv"):
        if file in ("q4_k_m", "q5_k_m") and more_bits:
            kind = "q6_k"
        if seventy and kind == "q4_k":
            kind = "q5_k"
        if experts == 8:
            kind = "q8_0"
    elif part == "attn_k" and experts == 8:
        kind = "q8_0"
    elif part.startswith("ffn_down"):
        if file in ("q4_k_m", "q5_k_m") and more_bits:
            kind = "q6_k"
    elif part == "attn_output" and experts == 8 and file == "q4_k_m":
        kind = "q5_k"
    return kind


@pytest.mark.parametrize("file", ["q4_k_m", "q5_k_m", "q6_k"])
@pytest.mark.parametrize(
    ("variant", "overrides", "experts", "seventy"),
    [
        ("llama", {}, 0, False),
        ("phi3", {}, 0, False),
        ("qwen3_moe", {}, 8, False),
        ("qwen3_moe", {"num_experts": 16}, 16, False),
        ("olmoe", {"num_local_experts": 8}, 8, False),
        ("llama", {"num_hidden_layers": 80}, 0, True),
        ("llama", {"num_hidden_layers": 80, "num_key_value_heads": 4}, 0, False),
        ("qwen2", {"num_hidden_layers": 80}, 0, True),
        ("qwen3", {"num_hidden_layers": 80}, 0, False),
    ],
)
def test_each_matrix_has_the_type_that_llama_cpps_quantizer_gives_it(variant, overrides, experts, seventy, file):
    family, differences = VARIANTS[variant]
    sizes = {"num_hidden_layers": 9, "hidden_size": 256, "intermediate_size": 256}
    config = tiny_config(family, **{**sizes, **differences, **overrides})
    matrices = {name for name in writing.tensor_names(config).values() if name.startswith("blk")}
    chosen = {name.split(".")[2] for name in matrices if "norm" not in name and name.endswith("weight")}
    assert chosen >= ({"attn_qkv"} if variant == "phi3" else {"attn_v", "attn_k"}) and "attn_output" in chosen
    for name in sorted(matrices):
        if "norm" in name or "gate_inp" in name or name.endswith("bias"):
            continue
        expected = by_llama_cpps_rule(name, file, config.num_hidden_layers, experts, seventy)
        assert writing._dtype(name, (256, 256), file, config) == expected, name


@pytest.mark.skipif(not GGML, reason=NO_GGML)
def test_a_tied_head_is_fine_and_rows_without_such_grids_take_narrower_ones(tmp_path):
    tied = write_gguf(checkpoint(tmp_path / "tied", "llama_tied_biased", **WIDER), tmp_path / "tied.gguf", "q4_k_m")
    assert kinds_of(tied)["token_embd.weight"] == "Q6_K"
    for dtype, most in (("q4_k_m", "Q5_0"), ("q5_k_m", "Q5_1"), ("q6_k", "Q8_0")):
        path = write_gguf(checkpoint(tmp_path / dtype, "llama"), tmp_path / f"{dtype}.gguf", dtype)  # rows of 64
        assert kinds_of(path)["blk.1.attn_q.weight"] == most and kinds_of(path)["output.weight"] == "Q8_0"


def test_without_llama_cpp_s_code_a_type_with_a_k_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_ggml", lambda: None)
    with pytest.raises(ExportError, match=r"q4_k_m is made by llama.cpp's own code.*pip install 'recover\[gguf\]'"):
        write_gguf(checkpoint(tmp_path / "deploy", "llama"), tmp_path / "out.gguf", "q4_k_m")
    assert not (tmp_path / "out.gguf").exists()
    assert writing.beside("q4_0") == ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0") and "q4_k_m" in writing.beside("q6_k")


@pytest.mark.slow
@pytest.mark.skipif(not GGML, reason=NO_GGML)
@pytest.mark.parametrize("dtype", ["q4_k_m", "q6_k"])
def test_llama_cpp_computes_on_a_file_with_k_what_is_read_of_it(dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    path = write_gguf(
        checkpoint(tmp_path / "deploy", "llama", **{**WIDER, "num_hidden_layers": 2}), tmp_path / "out.gguf", dtype
    )
    prompts = [ids(1, length, vocabulary=1024)[0].tolist() for length in (1, 9, 200)]
    found = by_llama_cpp(path, prompts, ROWS)
    model = load_model(recipe.Model(source=str(path)))
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in prompts])
    # Products are taken with activations of eight bits, 256 of them on one grid.
    assert (found - expected).abs().max() < 4e-2 * expected.abs().max()
