"""The gate before a model folder: what is read of it is listed, is a file, has a bound, and stays what was checked."""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf_checkpoint import checkpoint
from safetensors.torch import load_file, save_file
from tiny import WITHOUT_ROPE, tiny
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from typer.testing import CliRunner

from recover.base import hub as commits
from recover.base.errors import ArtifactError, ModelError
from recover.cli import app
from recover.config import recipe
from recover.export.gguf.write import write_gguf
from recover.models import gate, settings, source
from recover.models.arch import ARCHS
from recover.models.load import describe, load_model, load_tokenizer
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.run.input_digests import digests
from recover.train.checkpoints import read_adapter, write_adapter

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"

opened: list[str] | None = None


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if opened is not None and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_hear)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(recipe.embedded("fable-2m"), tmp_path / "model"))


def edit(path: Path, **fields: object) -> None:
    held = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**held, **fields}))


def roads(folder: Path, out: Path) -> dict[str, Callable[[], object]]:
    """Every way on which the folder is read."""
    cfg = recipe.Model(source=str(folder))
    other = recipe.Model(source="embedded:fable-2m", tokenizer=str(folder))
    return {
        "describe": lambda: describe(cfg),
        "load_model": lambda: load_model(cfg),
        "load_tokenizer": lambda: load_tokenizer(cfg),
        "model.tokenizer": lambda: load_tokenizer(other),
        "gguf": lambda: write_gguf(folder, out / "out.gguf"),
    }


def in_time(work: Callable[[], object], seconds: float = 20) -> str:
    """What the work raises, as one of our errors; it does not wait for what never comes."""
    said: list[str] = []

    def do() -> None:
        try:
            work()
        except ModelError as error:
            said.append(str(error))

    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "hangs"
    return "".join(said)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_refused_on_every_road_before_it_is_opened(
    folder: Path, tmp_path: Path, name: str, kind: str
) -> None:
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "device":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    for road, work in roads(folder, tmp_path).items():
        said = in_time(work)
        assert re.search(rf"{re.escape(name)}: is a {kind}; expected a file", said), (road, said)


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "tokenizer_config.json"])
def test_a_file_larger_than_any_of_its_kind_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    with open(folder / name, "ab") as file:
        file.truncate(2**31)
    for work in roads(folder, tmp_path).values():
        assert re.search(rf"{re.escape(name)}: 2,147,483,648 bytes; expected at most", in_time(work))


def test_a_link_to_a_private_file_is_refused_and_one_to_a_shared_file_is_not(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "id_ed25519").write_text("secret")
    shared = tmp_path / "shared"
    shared.mkdir()
    for name in ("tokenizer.json", "model.safetensors"):
        shutil.move(folder / name, shared / name)
        (folder / name).symlink_to(shared / name)
    load_model(recipe.Model(source=str(folder)))
    (folder / "chat_template.jinja").symlink_to(tmp_path / "id_ed25519")
    for work in roads(folder, tmp_path).values():
        said = in_time(work)
        assert "chat_template.jinja: is a link to" in said and "secret" not in said


def test_nothing_is_opened_that_is_not_listed(folder: Path, tmp_path: Path) -> None:
    global opened
    for name in ("params.json", "trainer_state.json", "README.md", "training_args.bin", "consolidated.00.pth"):
        (folder / name).write_text("{}")
    checked = set(gate.listed(folder)) | {""}
    for road, work in roads(folder, tmp_path).items():
        opened = []
        try:
            work()
        finally:
            heard, opened = opened, None
        inside = {os.path.relpath(name, folder) for name in heard if name.startswith(f"{folder}/")}
        assert "config.json" in inside and inside <= checked | {"recover.json", "MANIFEST.json"}, road


def test_a_folder_that_changes_while_it_is_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = AutoModelForCausalLM.from_pretrained

    def slow(*arguments: Any, **options: Any) -> Any:
        loaded = stock(*arguments, **options)
        edit(folder / "generation_config.json", top_k=3)
        return loaded

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", slow)
    with pytest.raises(ModelError, match=r"generation_config\.json: changed while it was read \(1 such files\)"):
        load_model(recipe.Model(source=str(folder)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("configuration_files", ["config.4.0.0.json"]),
        ("transformers_weights", "other.safetensors"),
        ("per_layer_config", {"0": {"num_attention_heads": 2}}),
        ("fusion_config", {"x": True}),
    ],
)
def test_a_key_that_stands_for_another_model_is_refused(folder: Path, tmp_path: Path, key: str, value: object) -> None:
    (folder / "config.4.0.0.json").write_text((folder / "config.json").read_text())
    edit(folder / "config.json", **{key: value})
    for road, work in roads(folder, tmp_path).items():
        if road not in ("load_tokenizer", "model.tokenizer"):
            assert re.search(rf"config\.json: {key} is there, and .*take it out", in_time(work)), road


def test_keys_that_no_class_declares_do_not_reach_the_library(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = describe(recipe.Model(source=str(folder)))
    edit(folder / "config.json", to_dict=1, get_text_config="x", hidden_dropout=0.5, is_causal=False, unsloth=[1])
    assert describe(recipe.Model(source=str(folder))) == before
    said = capsys.readouterr().out
    assert said.count("config.json: get_text_config, hidden_dropout, is_causal and 2 more: transformers does not") == 1
    model = load_model(recipe.Model(source=str(folder)))
    assert not hasattr(model.config, "unsloth") and callable(model.config.to_dict)


def test_keys_that_transformers_reads_out_of_a_gguf_file_are_left_out_without_a_word(folder: Path, capsys) -> None:
    edit(folder / "config.json", _model_name_or_path="x", unk_token_id=0)
    assert not hasattr(load_model(recipe.Model(source=str(folder))).config, "_model_name_or_path")
    assert "does not declare" not in capsys.readouterr().out


def test_what_a_model_is_to_give_back_is_not_for_its_config_to_say(folder: Path) -> None:
    edit(folder / "config.json", return_dict=False, output_hidden_states=True, output_attentions=True)
    ids = torch.tensor([[3, 4, 5]])
    found = load_model(recipe.Model(source=str(folder)))(ids)
    assert found.logits.shape[:2] == ids.shape and found.hidden_states is None


def test_a_generation_config_says_when_a_text_ends_and_how_it_is_drawn_and_no_more(folder: Path) -> None:
    edit(folder / "generation_config.json", temperature=0.7, do_sample=True, num_beams=64, max_time=1, stop_strings="a")
    found = load_model(recipe.Model(source=str(folder))).generation_config
    assert (found.temperature, found.do_sample) == (0.7, True)
    assert not {"max_time", "stop_strings", "num_beams"} & found.to_diff_dict().keys()


@pytest.mark.parametrize("model_type", ARCHS)
def test_a_config_of_every_family_is_the_stock_one(model_type: str, tmp_path: Path) -> None:
    tiny(model_type).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    stock = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    found = settings.config_of(raw, str(tmp_path), tmp_path / "config.json")
    assert found.to_dict() == stock and type(found) is CONFIG_MAPPING[model_type]
    assert set(raw) <= settings.allowed_of(model_type) | settings.SILENT | {"num_hidden_layers"}


@pytest.mark.parametrize("model_type", ARCHS)
def test_what_a_familys_code_reads_of_its_config_is_allowed(model_type: str) -> None:
    model = tiny(model_type)
    code = inspect.getsource(sys.modules[type(model).__module__])
    read = set(re.findall(r"\bconfig\.([a-z]\w*)", code)) | set(re.findall(r'getattr\([\w.]*config, "(\w+)"', code))
    assert {"hidden_size", "num_attention_heads"} <= read
    assert "rope_parameters" in read or model_type in WITHOUT_ROPE
    of_pictures = {"image_token_id", "mm_tokens_per_image", "text_config", "vision_config", "get_text_config"}
    of_classifiers = {"classifier_dropout", "hidden_dropout", "summary_last_dropout"}  # GPT-2's, in the same file
    parts = {kind for kind in CONFIG_MAPPING if kind.startswith(model_type.removesuffix("text").rstrip("_"))}
    if model_type.endswith("_text"):  # the file is also of the parts beside the text model
        of_pictures |= {"audio_config", *(key for kind in parts for key in settings.allowed_of(kind))}
    computed = {name for name in read if isinstance(getattr(type(model.config), name, None), property)}
    assert read - of_pictures - of_classifiers - computed <= settings.allowed_of(model_type)


def test_mistral_with_kinds_of_layers_is_what_transformers_takes_it_for(folder: Path) -> None:
    edit(folder / "config.json", model_type="mistral", layer_types=["full_attention"] * 12, sliding_window=64)
    found = settings.config_of(json.loads((folder / "config.json").read_text()), "x", "x")
    assert found.model_type == "ministral"


def test_everything_that_is_read_is_hashed(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("a")
    (folder / "tokenizer.model").write_text("a")
    (folder / "notes.txt").write_text("a")
    before = digests({"source": str(folder)})
    assert {Path(name).name for name in before} == set(gate.listed(folder)) == set(gate.digests(folder))
    (folder / "chat_template.jinja").write_text("b")
    after = digests({"source": str(folder)})
    assert [Path(name).name for name in before if before[name] != after[name]] == ["chat_template.jinja"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with one repository of two commits, its branch at the first; no network."""
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    scan = functools.partial(huggingface_hub.scan_cache_dir, cache)
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", scan)
    commits.forget()
    repository = cache / "models--someone--model"
    for letter in "ab":
        snapshot = repository / "snapshots" / (letter * 40)
        shutil.copytree(recipe.embedded("fable-2m"), snapshot)
    edit(repository / "snapshots" / ("b" * 40) / "config.json", rms_norm_eps=0.5)
    move(cache, "a")
    return cache


def move(cache: Path, letter: str) -> None:
    ref = cache / "models--someone--model" / "refs" / "main"
    ref.parent.mkdir(exist_ok=True)
    ref.write_text(letter * 40)


def test_a_branch_that_moves_is_one_commit_from_its_first_look_on(hub: Path) -> None:
    cfg = recipe.Model(source="someone/model")
    assert commits.pinned() == {}
    before = source.read_config(cfg)["rms_norm_eps"]
    move(hub, "b")
    assert source.read_config(cfg)["rms_norm_eps"] == before != 0.5
    assert source.locate(cfg).name == "a" * 40
    assert load_model(cfg).config.rms_norm_eps == before
    recorded = commits.pinned()
    assert recorded == {"model someone/model@default": "a" * 40}
    commits.forget()  # as in a new process
    commits.pin(recorded)
    assert source.locate(cfg).name == "a" * 40
    commits.forget()
    assert source.locate(cfg).name == "b" * 40


def test_the_revision_is_of_the_model_and_not_of_another_tokenizer(hub: Path) -> None:
    cfg = recipe.Model(source="embedded:fable-2m", tokenizer="someone/model", revision="v1")
    assert source.locate(cfg, cfg.tokenizer).name == "a" * 40
    assert commits.pinned() == {"model someone/model@default": "a" * 40}


def test_a_snapshot_of_the_hub_passes_the_same_gate(hub: Path) -> None:
    snapshot = hub / "models--someone--model" / "snapshots" / ("a" * 40)
    blobs = hub / "models--someone--model" / "blobs"
    blobs.mkdir()
    for path in list(snapshot.iterdir()):  # as the hub's cache lays it out
        path.rename(blobs / f"0{path.name}")
        path.symlink_to(Path("../../blobs") / f"0{path.name}")
    cfg = recipe.Model(source="someone/model")
    load_model(cfg)
    load_tokenizer(cfg)
    (snapshot / "chat_template.jinja").symlink_to("/etc/passwd")
    with pytest.raises(ModelError, match=r"chat_template\.jinja: is a link to /etc/passwd"):
        load_tokenizer(cfg)


def test_a_gguf_files_folder_passes_the_same_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOVER_CACHE", str(tmp_path / "cache"))
    cfg = recipe.Model(source=str(write_gguf(checkpoint(tmp_path / "m"), tmp_path / "m.gguf")))
    made = source.locate(cfg)
    (made / "tokenizer.json").unlink()
    os.mkfifo(made / "tokenizer.json")
    assert "tokenizer.json: is a pipe; expected a file" in in_time(lambda: load_model(cfg))


def test_a_pattern_that_never_ends_in_a_tokenizer_is_one_line(folder: Path, tmp_path: Path) -> None:
    core = json.loads((folder / "tokenizer.json").read_text())
    core["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "(.|..)+$\\b\\B"}, "behavior": "Isolated", "invert": False},
            core["pre_tokenizer"],
        ],
    }
    (folder / "tokenizer.json").write_text(json.dumps(core))
    done = CliRunner().invoke(
        app, ["measure", str(folder), "--tasks", "embedded:facts", "--limit", "1", "--batch-size", "1"]
    )
    assert done.exit_code == 1, done.output
    assert re.search(r"error: .*(tokenizer).*(retry-limit|Regex)", done.stderr.splitlines()[-1]), done.stderr


def an_adapter(folder: Path) -> tuple[Any, Path]:
    twin = Twin(tiny(), Plan.none(tiny().config.num_hidden_layers))
    model = twin.add_lora(recipe.Lora(rank=2))
    write_adapter(model, folder)
    return model, folder / "adapter_model.safetensors"


@pytest.mark.parametrize("fault", ["missing", "left over", "shape", "not finite", "integers", "cut", "random"])
def test_an_adapter_that_is_not_this_models_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    model, path = an_adapter(tmp_path)
    read_adapter(model, tmp_path)
    state = load_file(path)
    name = sorted(state)[0]
    if fault in ("cut", "random"):
        path.write_bytes(path.read_bytes()[:1000] if fault == "cut" else os.urandom(4096))
    else:
        value = state.pop(name)
        others = {
            "missing": {},
            "left over": {name: value, "other": value.clone()},
            "shape": {name: value[:, :1].contiguous()},
            "not finite": {name: value * float("nan")},
            "integers": {name: value.int()},
        }
        save_file(state | others[fault], path)
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors: .*run the stage again") as raised:
        read_adapter(model, tmp_path)
    assert fault in ("cut", "random") or (name if fault != "left over" else "other") in str(raised.value)
