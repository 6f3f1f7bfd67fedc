"""Settings files of an export are those of transformers 4 and of 5, and the tokenizer is the source's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from tiny import FAMILIES, FULL, SLIDING, WITHOUT_ROPE, tiny
from transformers import AutoConfig, AutoTokenizer

from recover.config import recipe
from recover.export.merge import merge
from recover.export.write import old_rope, write_checkpoint
from recover.models.load import load_tokenizer
from recover.models.plan import Plan
from recover.models.twin import Twin

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 2e4,
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [2.0 + i / 4 for i in range(8)],
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 7e4, "factor": 4.0}
PER_TYPE = {FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}, SLIDING: {"rope_theta": 3e4}}
# Gemma 4 came with version 5: its two kinds of rotary positions have no older spelling, and an export says so.
NEWER = [family for family in FAMILIES if family.startswith("gemma4")]
ROPES = [
    *((family, {}) for family in FAMILIES if family not in (*NEWER, *WITHOUT_ROPE)),
    ("llama", {"rope_parameters": LLAMA3}),
    ("mistral", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}}),
    ("qwen2", {"rope_parameters": YARN}),
    ("olmo2", {"rope_parameters": LINEAR}),
    ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5}}),
    ("gemma3_text", {"rope_parameters": PER_TYPE}),
    ("granite", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}),
]


def written(folder: Path, family: str = "llama", tokenizer=None, dtype=torch.float32, **overrides) -> Path:
    model = merge(Twin(tiny(family, **overrides), Plan.none(6)), dtype)
    return write_checkpoint(model, tokenizer or byte_tokenizer(), folder, card="", record={})


def settings(folder: Path, name: str = "config.json") -> dict:
    return json.loads((folder / name).read_text())


def rope_of(folder: Path) -> dict:
    rope = AutoConfig.from_pretrained(folder).to_dict()["rope_parameters"]
    return {key: value for key, value in rope.items() if key != "type" and value is not None}


@pytest.mark.parametrize(("family", "options"), ROPES)
def test_the_older_spelling_says_all_that_the_newer_does(family, options, tmp_path):
    dense = tiny(family, **options).config
    folder = written(tmp_path / "deploy", family, **options)
    expected = {key: value for key, value in dense.to_dict()["rope_parameters"].items() if value is not None}
    assert rope_of(folder) == expected, "both spellings together"
    config = settings(folder)
    assert "rope_theta" in config and "rope_scaling" in config and config["torch_dtype"] == config["dtype"]
    for newer in ("rope_parameters", "dtype", "transformers_version"):
        del config[newer]
    (folder / "config.json").write_text(json.dumps(config))
    assert rope_of(folder) == expected, "the older spelling alone"
    assert AutoConfig.from_pretrained(folder).dtype == torch.float32


def test_the_values_of_version_4():
    llama3 = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    assert old_rope("llama", LLAMA3) == {"rope_theta": 5e5, "rope_scaling": llama3}
    assert old_rope("llama", {"rope_type": "default", "rope_theta": 7.0}) == {"rope_theta": 7.0, "rope_scaling": None}
    # As the configs of these two in version 4 demand it: so many keys, and the type by its older name.
    assert old_rope("olmo2", LINEAR) == {"rope_theta": 7e4, "rope_scaling": {"type": "linear", "factor": 4.0}}
    long = old_rope("phi3", {**LONG, "original_max_position_embeddings": 64, "partial_rotary_factor": 1.0})
    assert set(long["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    assert long["original_max_position_embeddings"] == 64 and long["partial_rotary_factor"] == 1.0
    gemma = old_rope("gemma3_text", PER_TYPE)
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (1e6, 3e4)
    assert gemma["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


OTHER = {FULL: {"rope_type": "default", "rope_theta": 1e6}, SLIDING: {**LINEAR}}


@pytest.mark.parametrize(
    ("family", "options"), [("gemma3_text", {"rope_parameters": OTHER}), *((family, {}) for family in NEWER)]
)
def test_positions_that_version_4_has_no_words_for_are_left_as_they_are_and_said(family, options, tmp_path, capsys):
    both = tiny(family, **options).config.to_dict()["rope_parameters"]
    folder = written(tmp_path / "deploy", family, **options)
    assert "rope_scaling" not in settings(folder) and rope_of(folder) == both
    assert "have no form in the config of transformers 4" in " ".join(capsys.readouterr().err.split())


def test_code_that_is_not_exported_is_not_named(tmp_path):
    named = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    assert "auto_map" not in settings(written(tmp_path / "deploy", "phi3", auto_map=named))


@pytest.fixture
def source(tmp_path) -> Path:
    """A folder as transformers 4 saved it, with files and spelling that version 5 would not write."""
    folder = tmp_path / "source"
    tiny("llama").save_pretrained(folder)
    byte_tokenizer(bos=True).save_pretrained(folder)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "additional_special_tokens": [],
        "model_max_length": 2048,
        "chat_template": "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def test_files_of_the_sources_tokenizer_are_copied(source, tmp_path):
    tokenizer = load_tokenizer(recipe.Model(source=str(source)))
    folder = written(tmp_path / "deploy", tokenizer=tokenizer)
    for name in ("tokenizer.json", "special_tokens_map.json", "merges.txt"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    # The padding token is ours: the source names none.
    config = settings(source, "tokenizer_config.json")
    assert settings(folder, "tokenizer_config.json") == config | {"pad_token": "</s>"}
    assert not (folder / "chat_template.jinja").exists()


def test_a_tokenizer_that_is_not_the_sources_any_more_is_saved(source, tmp_path):
    tokenizer = load_tokenizer(recipe.Model(source=str(source)))
    tokenizer.chat_template = "{{ messages[0]['content'] }}</s>"
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    folder = written(tmp_path / "deploy", tokenizer=tokenizer)
    read = AutoTokenizer.from_pretrained(folder)
    assert read.chat_template == tokenizer.chat_template and read.get_vocab() == tokenizer.get_vocab()
    assert not (folder / "merges.txt").exists()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi3"])
def test_a_saved_tokenizer_has_words_of_both_versions_and_no_token_more(family, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    folder = written(tmp_path / "deploy", family, tokenizer=tokenizer, vocab_size=260)
    config = settings(folder, "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|im_start|>"] and "extra_special_tokens" not in config
    assert not {"is_local", "local_files_only", "backend"} & config.keys()
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()


# What readers look up in config.json without a default: vLLM and SGLang by `architectures`, MLX and llama.cpp's
# converter by names of their own lists, all of them at the top and in the words of transformers 4.
LOOKED_UP = (
    *("architectures", "model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "torch_dtype"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id"),
)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2"])
def test_what_other_readers_look_up_is_there(family, tmp_path):
    folder = written(tmp_path / "deploy", family)
    config, generation = settings(folder), settings(folder, "generation_config.json")
    assert [name for name in LOOKED_UP if name not in config] == []
    assert config["architectures"] == [type(tiny(family)).__name__] and config["num_hidden_layers"] == 6
    assert isinstance(config["rope_theta"], float | int) and config["torch_dtype"] == "float32"
    ends = generation["eos_token_id"]
    assert 2 in (ends if isinstance(ends, list) else [ends]), "vLLM ends texts by generation_config.json"
    words = settings(folder, "tokenizer_config.json")
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast" and words["eos_token"] == "</s>"
    assert (folder / "tokenizer.json").is_file() and not {"is_local", "local_files_only", "backend"} & words.keys()


@pytest.mark.parametrize("rope", [LLAMA3, YARN, LINEAR])
def test_scaling_has_the_word_that_each_reader_asks_for(rope, tmp_path):
    """MLX refuses a scaling without `factor` and one of `type` and `rope_type`; vLLM one where the two differ."""
    scaling = settings(written(tmp_path / "deploy", "llama", rope_parameters=rope))["rope_scaling"]
    assert scaling["factor"] == rope["factor"] and scaling["rope_type"] == rope["rope_type"]
    assert scaling.get("type", rope["rope_type"]) == rope["rope_type"]


def test_kinds_of_blocks_are_in_the_words_of_both_versions(tmp_path):
    dense = tiny("granitemoehybrid").config
    folder = written(tmp_path / "deploy", "granitemoehybrid")
    assert settings(folder)["layer_types"] == ["mamba", "mamba", "attention", "mamba", "attention", "attention"]
    assert AutoConfig.from_pretrained(folder).layer_types == dense.layer_types
