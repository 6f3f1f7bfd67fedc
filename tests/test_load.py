"""Loading: what is whole loads as it is, what is not is refused with a ModelError that names the file or the cause."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, ids, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from recover.base.errors import DataError, ModelError, RecipeError
from recover.config import recipe
from recover.models.arch import as_linears, linears_of
from recover.models.load import check_account, check_fit, describe, load_model, load_tokenizer
from recover.models.source import context_named, exported_dtype, stored_dtype
from recover.text.prompts import text_ids

WEIGHTS, INDEX, SHARD = "model.safetensors", "model.safetensors.index.json", "model-00002-of-00005.safetensors"


def tokenizer_of(words: int = 250, **special: str) -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **special)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """`one`: a model in one file; `many`: in five shards; both with a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    for name, size in (("one", "5GB"), ("many", "200KB")):
        tiny("llama").save_pretrained(root / name, max_shard_size=size)
        tokenizer_of(eos_token="</s>").save_pretrained(root / name)
    return root


def cfg(folder: Path | str, **options) -> recipe.Model:
    return recipe.Model(source=str(folder), **options)


@pytest.mark.parametrize("name", ["one", "many"])
def test_loads_what_was_saved(stored, name):
    model = load_model(cfg(stored / name))
    assert not model.training and torch.equal(model(ids()).logits, tiny("llama")(ids()).logits)
    assert {p.dtype for p in load_model(cfg(stored / name, dtype="bfloat16")).parameters()} == {torch.bfloat16}
    tokenizer = load_tokenizer(cfg(stored / name))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    check_fit(model, tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_and_is_described(tmp_path, family):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    as_linears(model)  # rounded as what is loaded
    assert torch.equal(load_model(cfg(tmp_path))(ids()).logits, model(ids()).logits)
    check_account(cfg(tmp_path))  # by names and sizes alone, nothing is missing or left over
    description = describe(cfg(tmp_path, dtype="bfloat16"))
    parameters = sum(p.numel() for p in model.parameters())
    assert (description.blocks, description.width, description.vocabulary) == (6, 64, 256)
    assert description.parameters == parameters and description.bytes == 2 * parameters
    assert description.embedding_parameters == 256 * 64 * (1 if model.config.tie_word_embeddings else 2)


def test_gpt2_loads_as_it_is_published(tmp_path):
    """Names without `transformer.`, causal masks as tensors, sizes by its own names, null for four times the width."""
    model = tiny("gpt2", n_inner=None)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["n_embd"] == 64 and config["n_inner"] is None and "hidden_size" not in config
    edit_json(tmp_path / "config.json", n_ctx=256, task_specific_params={"text-generation": {"do_sample": True}})
    state = {name.removeprefix("transformer."): value for name, value in load_file(tmp_path / WEIGHTS).items()}
    state |= {f"h.{block}.attn.bias": torch.ones(1, 1, 256, 256) for block in range(6)}
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    loaded = load_model(cfg(tmp_path))
    torch.testing.assert_close(loaded(ids()).logits, model(ids()).logits, rtol=1e-5, atol=1e-5)
    as_linears(model)
    assert torch.equal(loaded(ids()).logits, model(ids()).logits), "rounded alike"
    assert {type(each) for each in linears_of(loaded).values()} == {torch.nn.Linear}
    assert torch.equal(load_model(cfg(tmp_path, offload="disk"))(ids()).logits, model(ids()).logits)
    description = describe(cfg(tmp_path))
    assert (description.intermediate, description.context, description.kv_heads) == (256, 256, 4)
    assert context_named(cfg(tmp_path)) == 256
    state["h.1.mlp.c_fc.weight"] = state["h.1.mlp.c_fc.weight"].to(torch.int8)
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"h.1.mlp.c_fc.weight is stored as I8, and config.json names no quantization"):
        load_model(cfg(tmp_path))
    for name, value in (("n_layer", 10**9), ("n_embd", 0), ("n_inner", -1), ("n_positions", "x")):
        edit_json(tmp_path / "config.json", **{name: value})
        with pytest.raises(ModelError, match=rf"config.json: {name} is .*; expected a whole number from 1 to"):
            describe(cfg(tmp_path))
        edit_json(tmp_path / "config.json", **{name: config[name]})


def rewrite(path: Path, change: Callable[[bytearray], bytes | bytearray]) -> None:
    path.write_bytes(change(bytearray(path.read_bytes())))


def flip(at: int) -> Callable[[bytearray], bytearray]:
    def change(data: bytearray) -> bytearray:
        data[at] ^= 0xFF
        return data

    return change


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def point_outside(folder: Path) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder.parent / "outside.safetensors").write_bytes((folder / SHARD).read_bytes())
    edit_json(
        folder / INDEX, weight_map={k: "../outside.safetensors" if v == SHARD else v for k, v in weight_map.items()}
    )


def swap_shards(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD.replace("2-of", "3-of")).read_bytes())


def put(folder: Path, value: float) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["model.layers.3.mlp.up_proj.weight"][5, 7] = value
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def drop_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["model.norm.weight"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "pytorch_model.bin")


FAULTS = {
    "cut short": (
        "one",
        lambda f: rewrite(f / WEIGHTS, lambda b: b[: len(b) // 2]),
        f"{WEIGHTS}: corrupt or cut short",
    ),
    "bytes appended": (
        "one",
        lambda f: rewrite(f / WEIGHTS, lambda b: b + b"more"),
        f"{WEIGHTS}: corrupt or cut short",
    ),
    "header flipped": ("one", lambda f: rewrite(f / WEIGHTS, flip(40)), f"{WEIGHTS}: corrupt or cut short"),
    "header length flipped": ("one", lambda f: rewrite(f / WEIGHTS, flip(5)), f"{WEIGHTS}: corrupt or cut short"),
    "empty file": ("one", lambda f: rewrite(f / WEIGHTS, lambda b: b""), f"{WEIGHTS}: corrupt or cut short"),
    "shard cut short": ("many", lambda f: rewrite(f / SHARD, lambda b: b[:-1]), f"{SHARD}: corrupt or cut short"),
    "shard missing": ("many", lambda f: (f / SHARD).unlink(), f"{SHARD}: missing"),
    "shards swapped": ("many", swap_shards, f"{SHARD}: lacks model"),
    "weight map leaves the folder": ("many", point_outside, r"points to '\.\./outside\.safetensors'"),
    "index is a list": ("many", lambda f: (f / INDEX).write_text("[]"), f"{INDEX}: has no 'weight_map'"),
    "no weights": ("one", lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS}: missing"),
    "pickle weights": ("one", pickle_only, r"pickle files \(pytorch_model\.bin\)"),
    "no config": ("one", lambda f: (f / "config.json").unlink(), r"config\.json: missing"),
    "config cut short": (
        "one",
        lambda f: (f / "config.json").write_text('{"a'),
        r"config\.json: cannot be read as JSON",
    ),
    "no model type": ("one", lambda f: (f / "config.json").write_text("{}"), "has no 'model_type'"),
    "unknown type": ("one", lambda f: edit_json(f / "config.json", model_type="zzz"), "'zzz' is not supported"),
    "kernel from a hub": (
        "one",
        lambda f: edit_json(f / "config.json", _attn_implementation_internal="someone/kernel"),
        "_attn_implementation_internal is 'someone/kernel', with which a library would fetch or run code",
    ),
    "more blocks than weights": (
        "one",
        lambda f: edit_json(f / "config.json", num_hidden_layers=8),
        r"18 tensors are missing from the weights, such as model\.layers\.6",
    ),
    "fewer blocks than weights": (
        "one",
        lambda f: edit_json(f / "config.json", num_hidden_layers=5),
        "9 tensors belong to no part of it",
    ),
    "other width": (
        "one",
        lambda f: edit_json(f / "config.json", intermediate_size=100),
        r"\[96, 64\] in the weights, \[100, 64\] by|\[64, 96\] in the weights, \[64, 100\] by",
    ),
    "tensor missing": ("one", drop_tensor, r"1 tensors are missing from the weights, such as model\.norm\.weight"),
    "NaN": ("one", lambda f: put(f, float("nan")), r"model\.layers\.3\.mlp\.up_proj\.weight holds NaN or infinite"),
    "infinity": ("one", lambda f: put(f, float("-inf")), "holds NaN or infinite"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_folder_is_refused(stored, tmp_path, fault):
    source, break_it, words = FAULTS[fault]
    folder = tmp_path / "model"
    shutil.copytree(stored / source, folder)
    break_it(folder)
    with pytest.raises(ModelError, match=words):
        load_model(cfg(folder))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("/nowhere/model", "no such folder"),
        ("./model.gguf", "no such folder or .gguf file"),
        ("a/b/c", "no such folder"),
        ("two words", "not a hub id"),
        ("someone/some-model", "no folder of this name is here, and the hub, .* cannot be reached"),
        (__file__, "not a folder and not a .gguf file"),
    ],
)
def test_a_missing_source_is_refused(source, words):
    for load in (load_model, load_tokenizer, describe):
        with pytest.raises(ModelError, match=words):
            load(cfg(source))
    with pytest.raises(RecipeError, match="not shipped with the package"):
        load_model(cfg("embedded:nothing"))


def test_a_corrupt_gguf_file_is_refused_and_nothing_is_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("RECOVER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match=r"model\.gguf: byte 8: found version 0"):
        load_model(cfg(tmp_path / "model.gguf"))
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_a_tokenizer_that_does_not_fit_is_refused(stored, tmp_path):
    model = load_model(cfg(stored / "one"))
    with pytest.raises(ModelError, match=r"gives id 299 \('w299'\), the model's vocabulary ends at 255"):
        check_fit(model, tokenizer_of(300, eos_token="</s>"))
    tokenizer_of().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load_tokenizer(cfg(stored / "one", tokenizer=str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer: cannot be loaded"):
        load_tokenizer(cfg(stored / "one", tokenizer=str(tmp_path)))


def with_tokens(*tokens: str, **special: str) -> PreTrainedTokenizerFast:
    """Words up to id 255, as many as the model has rows, and these tokens past them."""
    tokenizer = tokenizer_of(256, eos_token="</s>")
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    for name, token in special.items():
        setattr(tokenizer, name, token)
    return tokenizer


def test_a_token_past_the_embedding_is_refused_where_a_text_gives_it(stored, capsys):
    model, tokenizer = load_model(cfg(stored / "one")), with_tokens("<image>")
    check_fit(model, tokenizer)
    assert text_ids(tokenizer, "w5 w255", special=True) == [5, 255]
    for text in ("w5 <image> w6", "<image>"):
        with pytest.raises(
            DataError, match=r"gives the token '<image>' \(id 256\), and the model's vocabulary ends at"
        ):
            text_ids(tokenizer, text, special=True)
    with pytest.raises(ModelError, match=r"end-of-text token '<end>' has id 256.*so that no text would end"):
        check_fit(model, with_tokens("<end>", eos_token="<end>"))
    assert "is used in its place" not in capsys.readouterr().err
    padded = with_tokens("<pad>", pad_token="<pad>")
    check_fit(model, padded)
    assert padded.pad_token_id == 2 and "'</s>' is used in its place" in capsys.readouterr().err


def test_a_folder_without_a_tokenizer_says_so_whatever_its_class_would_need(stored, tmp_path):
    shutil.copytree(stored / "one", tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").unlink()
    for settings in ({"tokenizer_class": "LlamaTokenizer"}, None):
        (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)
        if settings:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        with pytest.raises(ModelError, match=r"holds no tokenizer \(tokenizer\.json or tokenizer\.model\): copy it"):
            load_tokenizer(cfg(tmp_path))


def test_a_vocabulary_that_was_resized_in_one_place_says_in_which(stored, tmp_path, capfd):
    shutil.copytree(stored / "one", tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "config.json", vocab_size=280)
    with pytest.raises(ModelError, match=r"vocab_size is 280 in config\.json, and .* has 256 rows.*Set vocab_size to"):
        load_model(cfg(tmp_path))
    assert "MISMATCH" not in capfd.readouterr().err, "no library's report before ours"


def test_a_tied_head_may_be_stored_too(tmp_path):
    model = tiny("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert torch.equal(load_model(cfg(tmp_path))(ids()).logits, model(ids()).logits)


def test_a_model_without_sdpa_falls_back_to_eager_and_says_so(stored, capsys, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "_supports_sdpa", False)
    assert load_model(cfg(stored / "one")).config._attn_implementation == "eager"
    assert "model.attention" in capsys.readouterr().err


STORED = [
    ({"dtype": "bfloat16"}, "bfloat16"),
    ({"torch_dtype": "bfloat16"}, "bfloat16"),
    ({}, "bfloat16"),  # the config is silent: as the weights are
    ({"dtype": "auto"}, "bfloat16"),
    ({"torch_dtype": None}, "bfloat16"),
    ({"dtype": "float64"}, "bfloat16"),
]


@pytest.mark.parametrize(("named", "expected"), STORED)
def test_a_checkpoint_is_exported_as_it_was_stored_unless_asked_for(named, expected, tmp_path):
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config | named))
    stored = stored_dtype(cfg(tmp_path))
    assert stored == expected
    assert exported_dtype("float32", stored, None) == expected
    assert exported_dtype("float32", stored, "float32") == "float32"


@pytest.mark.parametrize(
    ("model", "stored"), [("bfloat16", "float32"), ("bfloat16", "float16"), ("float16", "float32")]
)
def test_a_model_that_ran_in_half_precision_is_exported_in_it(model, stored):
    assert exported_dtype(model, stored, None) == model
