"""No key of a model folder makes code be fetched or run, in any spelling, at any depth, in any settings file."""

import importlib.util
import json
from pathlib import Path

import pytest
from tiny import tiny
from transformers.integrations import hub_kernels
from typer.testing import CliRunner

from recover.base.errors import ModelError
from recover.cli import app
from recover.config import recipe
from recover.config.recipe import embedded, load_recipe
from recover.models.load import describe, load_model, load_tokenizer
from recover.models.settings import check, code_named
from recover.report.collect import collect
from recover.run import stage_work
from recover.run.context import RunContext
from recover.run.directory import RunDirectory

KERNEL = "someone/kernel"
SPELLINGS = ("attn_implementation", "_attn_implementation", "attn_implementation_internal")
REFUSED = [
    *({spelling: KERNEL} for spelling in (*SPELLINGS, "_attn_implementation_internal")),
    {"attn_implementation": "paged|someone/kernel"},
    {"attn_implementation": "someone/kernel@main:function"},
    {"attn_implementation": {"": "sdpa", "text_config": KERNEL}},
    {"text_config": {"attn_implementation": KERNEL}},
    {"per_layer_config": {"3": {"_attn_implementation": KERNEL}}},
    {"per_layer_config": [{"_attn_implementation": KERNEL}]},
    {"experts_implementation": KERNEL},
    {"experts_implementation": "deepgemm"},  # a name whose kernel transformers fetches
    {"mamba_implementation": "x"},
    {"kernel_config": {"RMSNorm": "someone/kernel:Norm"}},
    {"use_kernels": True},
    {"allow_all_kernels": True},
    {"trust_remote_code": True},
    {"custom_generate": KERNEL},
    {"_auto_class": "AutoConfig"},
]
ALLOWED = [
    {"attn_implementation": None, "_attn_implementation": "sdpa", "_attn_implementation_autoset": True},
    {"attn_implementation": {"": "eager", "text_config": "flex_attention"}, "experts_implementation": "grouped_mm"},
    {"conv_kernel": [4, 3], "kernel_size": 4, "use_kernels": False, "_sliding_window_pattern": 6},
    {"_name_or_path": "someone/model", "_commit_hash": None, "auto_map": {"AutoConfig": "configuration_x.X"}},
    {"quantization_config": {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}, "_version": 1}}}},
]


@pytest.mark.parametrize("settings", REFUSED, ids=json.dumps)
def test_what_could_choose_code_is_refused_by_key_and_value(settings: dict) -> None:
    key = next(iter(settings))
    with pytest.raises(ModelError, match=rf"^config.json: {key}.* would fetch or run code.*expected .*model.attention"):
        check({"model_type": "llama", **settings}, "config.json")


@pytest.mark.parametrize("settings", ALLOWED, ids=json.dumps)
def test_what_published_files_hold_is_taken(settings: dict) -> None:
    check({"model_type": "llama", **settings}, "config.json")


def test_a_kernel_of_a_package_is_allowed_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"attn_implementation": "flash_attention_2"}
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "flash_attn" else found(name))
    with pytest.raises(ModelError, match="expected eager or sdpa or flex_attention"):
        check(asked, "config.json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "flash_attn" else found(name))
    check(asked, "config.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    there = tmp_path / "model"
    there.mkdir()
    for path in embedded("fable-2m").iterdir():
        (there / path.name).write_bytes(path.read_bytes())
    return there


def edit(path: Path, **fields: object) -> None:
    held = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**held, **fields}))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_no_kernel_is_asked_for_before_it_is_refused(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda name, **_: asked.append(name))
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda *_, **__: True)
    edit(folder / name, attn_implementation=KERNEL)
    cfg = recipe.Model(source=str(folder))
    for load in (describe, load_model, load_tokenizer):
        with pytest.raises(ModelError, match=rf"{name}: attn_implementation is '{KERNEL}'"):
            load(cfg)
    done = CliRunner().invoke(app, ["gguf", str(folder), str(tmp_path / "out.gguf")])
    assert done.exit_code == 1
    job = ["plan", "recipes/quickstart.yaml", "--untimed", f"model.source={folder}", "--runs", str(tmp_path)]
    assert CliRunner().invoke(app, job).exit_code == 1
    assert asked == []


def test_the_attention_of_the_recipe_wins_over_that_of_the_folder(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    edit(tmp_path / "config.json", attn_implementation="eager")
    assert load_model(recipe.Model(source=str(tmp_path))).config._attn_implementation == "sdpa"
    edit(tmp_path / "config.json", attn_implementation="sdpa")
    cfg = recipe.Model(source=str(tmp_path), attention="eager")
    assert load_model(cfg).config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "fields", [{"vocab_file": "/etc/passwd"}, {"merges_file": "../secret"}, {"init_inputs": ["/etc/passwd"]}]
)
def test_a_tokenizer_reads_no_file_outside_its_folder(folder: Path, fields: dict) -> None:
    edit(folder / "tokenizer_config.json", **fields)
    with pytest.raises(ModelError, match=rf"tokenizer_config.json: {next(iter(fields))} is"):
        load_tokenizer(recipe.Model(source=str(folder)))


def test_paths_that_published_tokenizers_hold_and_nobody_reads_are_taken(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", special_tokens_map_file="/root/x.json", tokenizer_file="/root/t.json")
    load_tokenizer(recipe.Model(source=str(folder)))


def test_code_that_a_folder_names_is_listed() -> None:
    settings = {"auto_map": {"AutoConfig": "configuration_x.X", "AutoTokenizer": [None, "someone/other--token_x.T"]}}
    assert code_named(settings) == {"configuration_x.py", "someone/other: token_x.py"}
    assert code_named({}) == code_named([]) == set()


def record_plan(runs: Path, *overrides: str) -> None:
    """What the first stage of a run writes."""
    recipe = load_recipe("recipes/quickstart.yaml", overrides)
    directory = RunDirectory(runs / recipe.name)
    with directory.lock():
        stage_work.plan(RunContext(recipe, directory))


def test_code_that_is_let_run_is_said_before_and_stands_in_the_report(folder: Path, tmp_path: Path) -> None:
    (folder / "modeling_x.py").write_text("")
    job = ["plan", "recipes/quickstart.yaml", "--untimed", f"model.source={folder}", "--runs", str(tmp_path)]
    assert "trust_remote_code" not in CliRunner().invoke(app, job).stderr
    record_plan(tmp_path, f"model.source={folder}")
    assert "remote_code" not in json.loads((tmp_path / "quickstart" / "env.json").read_text())
    done = CliRunner().invoke(app, [*job, "model.trust_remote_code=true"])
    assert done.exit_code == 0, done.output
    said = [line for line in done.stderr.splitlines() if line.startswith("warning: model.trust_remote_code")]
    code = str(folder / "modeling_x.py")
    assert len(said) == 1 and f"comes with {folder} runs with all your rights: {code}" in said[0]
    record_plan(tmp_path, f"model.source={folder}", "model.trust_remote_code=true")
    assert json.loads((tmp_path / "quickstart" / "env.json").read_text())["remote_code"] == [code]
    assert collect(tmp_path / "quickstart")["provenance"]["env"]["remote_code"] == [code]


def test_nothing_of_a_folder_is_obeyed_by_a_terminal(folder: Path, tmp_path: Path) -> None:
    there = folder.rename(tmp_path / "a\x1b]0;b")
    job = ["plan", "recipes/quickstart.yaml", "--untimed", f"model.source={there}", "--runs", str(tmp_path / "runs")]
    for fields in ({"model_type": "x\x1b[2Jy"}, {"model_type": "llama", "attn_implementation": "a\x9b/b"}):
        edit(there / "config.json", **fields)
        done = CliRunner().invoke(app, job)
        assert done.exit_code in (1, 2)
        assert r"\x1b" in done.output and not {"\x1b", "\x9b"} & set(done.output)
