"""A model is what its files say, whole: nothing applied in silence, nothing drawn at random, nothing left out."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from gguf_checkpoint import checkpoint
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_load import cfg
from tiny import ids, tiny
from typer.testing import CliRunner

from recover import cli
from recover.base.errors import ModelError
from recover.config.recipe import Model
from recover.export.gguf import write as gguf_file
from recover.export.gguf.write import write_gguf
from recover.models import source
from recover.models.load import describe, load_model, load_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def adapted(tmp_path: Path) -> Path:
    """A whole model, and beside it the files of an adapter that were left there."""
    folder = tmp_path / "model"
    model = tiny("llama")
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    tuned = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(str(tmp_path / "adapter"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, folder / name)
    return folder


def commands(folder: Path, recipe: Path) -> dict[str, list[str | Path]]:
    """Every command that reads a model."""
    runs, prompts = ["--runs", folder.parent / "runs"], folder.parent / "prompts.jsonl"
    return {
        **{name: [name, recipe, *runs] for name in ("plan", "run", "prune", "probe", "train", "export")},
        "measure": ["measure", folder, "--tasks", "embedded:stories", "--limit", "1"],
        "diagnose": ["diagnose", "embedded:fable-2m", folder, "--prompts", prompts, "--out", folder.parent / "out"],
        "teacher": ["teacher", folder, prompts, folder.parent / "teacher.jsonl"],
        "gguf": ["gguf", folder, folder.parent / "model.gguf"],
    }


@pytest.mark.parametrize("name", commands(Path("/x/y"), Path("/x")))
def test_an_adapter_beside_whole_weights_is_refused_by_every_command(adapted: Path, name: str) -> None:
    recipe = adapted.parent / "recipe.yaml"
    quickstart = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
    recipe.write_text(quickstart.read_text())
    (adapted.parent / "prompts.jsonl").write_text('{"prompt": "Olga carries 81 roses.", "text": "Olga carries."}\n')
    words = list(map(str, commands(adapted, recipe)[name]))
    if words[1] == str(recipe):
        words += [f"model.source={adapted}"]
    result = CliRunner().invoke(cli.app, words)
    said = " ".join(result.output.split())
    assert result.exit_code == 1 and "holds adapter_config.json beside a whole model" in said, result.output
    assert not list(adapted.parent.glob("runs/*/recipe.yaml"))


def test_the_weights_alone_of_an_adapter_and_a_tokenizer_beside_one_are_fine(adapted: Path) -> None:
    assert load_tokenizer(Model(source="embedded:fable-2m", tokenizer=str(adapted))) is not None
    (adapted / "adapter_config.json").unlink()  # transformers looks for this one
    assert torch.equal(load_model(cfg(adapted))(ids()).logits, tiny("llama")(ids()).logits)


def test_an_adapter_on_the_hub_is_seen_before_weights_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(source, "cached_file", lambda *words, **_: asked.append(words) or str(tmp_path / words[1]))
    monkeypatch.setattr(source, "commit_of", lambda *_: "a" * 40)
    with pytest.raises(ModelError, match=r"someone/model: holds adapter_config\.json"):
        describe(cfg("someone/model"))
    assert asked == [("someone/model", "config.json"), ("someone/model", "adapter_config.json")]


def edited(folder: Path, change: Callable[[Tensors], Tensors], family: str = "llama", **config) -> Path:
    """A model whose weights were changed so, and its config."""
    tiny(family).save_pretrained(folder)
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | config))
    return folder


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if name not in names}


def with_(**more: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, **{name.replace("__", "."): value for name, value in more.items()}}


UP = "model.layers.0.mlp.up_proj.weight"
REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], dict, str]] = {
    "a head": (without("lm_head.weight"), {}, r"missing from the weights, such as lm_head\.weight"),
    "all": (lambda _: {"x": torch.ones(1)}, {}, r"57 tensors are missing"),
    "a stranger": (with_(model__extra__weight=torch.ones(2)), {}, r"belong to no part of it, such as model\.extra"),
    "a scale": (with_(lm_head__weight_scale=torch.ones(2)), {}, r"belong to no part of it, such as lm_head\.weight_s"),
    "another size": (with_(model__norm__weight=torch.ones(8)), {}, r"model\.norm\.weight is \[8\] in .*, \[64\] by"),
    "a vocabulary": (lambda tensors: tensors, {"vocab_size": 280}, r"vocab_size is 280 .* has 256 rows"),
    "integers": (lambda t: {**t, UP: t[UP].to(torch.int8)}, {}, rf"{UP} is stored as I8"),
    "a head that should be tied": (lambda t: t, {"tie_word_embeddings": True}, r"lm_head\.weight and model\.embed_"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_belong_together_is_refused_by_name(tmp_path: Path, what: str) -> None:
    change, config, words = REFUSED[what]
    with pytest.raises(ModelError, match=words):
        load_model(cfg(edited(tmp_path / "model", change, **config)))


def test_two_unlike_matrices_of_a_tied_config_are_refused_by_plan_and_gguf(tmp_path: Path) -> None:
    folder = edited(tmp_path / "model", lambda tensors: tensors, tie_word_embeddings=True)
    byte_tokenizer().save_pretrained(folder)
    quickstart = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
    words = [
        "plan",
        quickstart,
        "--runs",
        tmp_path / "runs",
        f"model.source={folder}",
        "prune={kind: depth, blocks: [3]}",
    ]
    for command in (words, ["gguf", folder, tmp_path / "out.gguf"]):
        result = CliRunner().invoke(cli.app, list(map(str, command)))
        assert result.exit_code == 1 and "unlike in the weights" in " ".join(result.output.split()), result.output
    assert not (tmp_path / "out.gguf").exists() and not (tmp_path / "runs" / "quickstart" / "recipe.yaml").exists()


@pytest.mark.parametrize("half", [False, True])
def test_known_spare_tensors_and_a_stored_tied_head_load(tmp_path: Path, half: bool) -> None:
    spare = with_(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))
    assert torch.equal(load_model(cfg(edited(tmp_path / "a", spare)))(ids()).logits, tiny("llama")(ids()).logits)

    def stored(tensors: Tensors) -> Tensors:
        kind = torch.bfloat16 if half else torch.float32
        embedding = tensors["model.embed_tokens.weight"].to(kind)
        return {**tensors, "model.embed_tokens.weight": embedding, "lm_head.weight": embedding.float().clone()}

    model = load_model(cfg(edited(tmp_path / "b", stored, "llama_tied")))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("equal", [False, True])
def test_a_tensor_in_two_shards_must_be_one(tmp_path: Path, equal: bool) -> None:
    tiny("llama").save_pretrained(tmp_path, max_shard_size="200KB")
    where = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    name = next(iter(where))
    last = next(file for file in where.values() if file != where[name])
    value = load_file(tmp_path / where[name])[name]
    more = {**load_file(tmp_path / last), name: value if equal else torch.zeros_like(value)}
    save_file(more, tmp_path / last, metadata={"format": "pt"})
    if equal:
        assert torch.equal(load_model(cfg(tmp_path))(ids()).logits, tiny("llama")(ids()).logits)
    else:
        with pytest.raises(ModelError, match=r"holds \S+, and \S+ holds another one"):
            load_model(cfg(tmp_path))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECOVER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def written(folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[list], list], **variant) -> Path:
    """A GGUF file whose tensors were changed so."""
    entries = gguf_file._entries
    with monkeypatch.context() as patch:
        patch.setattr(gguf_file, "_entries", lambda *given: change(entries(*given)))
        return write_gguf(checkpoint(folder / "model", **variant), folder / "model.gguf")


def named(*names: str) -> Callable[[list], list]:
    return lambda entries: [entry for entry in entries if entry.name not in names]


def more(name: str, value: torch.Tensor) -> Callable[[list], list]:
    entry = gguf_file.Entry(name, tuple(value.shape), "float32", lambda: value)
    return lambda entries: [*entries, entry]


@pytest.mark.parametrize(
    ("change", "variant", "words"),
    [
        (named("blk.2.ffn_up.weight"), {}, r"lacks 1 tensors of its model \(blk\.2\.ffn_up\.weight\), of 57"),
        (named("token_embd.weight", "output_norm.weight"), {}, r"lacks 2 tensors .*output_norm\.weight, token_embd"),
        (named("blk.0.attn_q.bias"), {"variant": "qwen2"}, r"lacks 1 tensors .*blk\.0\.attn_q\.bias"),
        (more("blk.0.attn_q.bias", torch.ones(64)), {}, r"lacks \d+ tensors .*\.bias"),
    ],
)
def test_a_gguf_file_that_is_not_the_whole_model_is_refused(tmp_path, monkeypatch, cache, change, variant, words):
    path = written(tmp_path, monkeypatch, change, **variant)
    with pytest.raises(ModelError, match=rf"model\.gguf: .*{words}"):
        describe(cfg(path))
    assert list(cache.iterdir()) == []


def test_a_gguf_file_that_counts_no_tensors_is_refused(tmp_path, monkeypatch, cache):
    path = written(tmp_path, monkeypatch, lambda entries: entries)
    data = bytearray(path.read_bytes())
    data[8:16] = struct.pack("<Q", 0)  # after "GGUF" and the version: how many tensors there are
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.gguf: .*lacks 56 tensors.*it holds 0"):
        describe(cfg(path))
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_gguf_file_is_the_folder_it_was_made_from(tmp_path, monkeypatch, cache, variant, tied):
    heads = {"head_dim": 128} if variant == "qwen3" else {}  # others are not read of a GGUF of Qwen3
    ones = more("rope_freqs.weight", torch.ones(8)) if variant == "llama" else lambda entries: entries
    path = written(tmp_path, monkeypatch, ones, variant=variant, tie_word_embeddings=tied, **heads)
    shutil.copy(source.__file__, tmp_path / "adapter_config.json")  # what lies beside a GGUF file is not looked at
    (tmp_path / "generation_config.json").write_text('{"max_length": 3}')
    model, folder = load_model(cfg(path)), load_model(cfg(tmp_path / "model"))
    assert model.generation_config.max_length != 3
    expected = folder(ids()).logits.detach()
    torch.testing.assert_close(model(ids()).logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
