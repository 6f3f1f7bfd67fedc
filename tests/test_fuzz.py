"""Damaged and hostile files end in one line that says where and what: never a traceback, a hang, or all of memory."""

import json
import random
import re
import resource
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf_checkpoint import checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from recover.base.errors import ModelError, RecoverError
from recover.cli import app
from recover.config import recipe
from recover.export.gguf.write import write_gguf
from recover.models.gguf_folder import check_head
from recover.models.load import describe, load_model, load_tokenizer
from recover.models.source import locate

SECONDS = 10.0  # far more than any of these takes
ROOM = 2 * 2**30  # bytes of address space more than before
QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture(scope="module")
def gguf_file(whole: Path) -> bytes:
    return write_gguf(whole, whole.parent / "model.gguf").read_bytes()


@pytest.fixture
def bounded() -> Iterator[None]:
    """Little memory, and little time for all of it."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def one_line(work: Any, *arguments: Any) -> str | None:
    """What the work raises; it must be one of our errors, in one line, soon."""
    began = time.monotonic()
    try:
        work(*arguments)
        said = None
    except RecoverError as error:
        said = str(error)
        assert said and "\n" not in said and len(said) < 1500
    assert time.monotonic() - began < SECONDS
    return said


VALUES = st.one_of(
    st.sampled_from([None, True, -1, 0, 10**9, 10**30, 1.5, 1e300, "8", "", "\x1b[2J", [], [None] * 3, {}, {"a": [1]}]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
        max_leaves=4,
    ),
)
KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "rope_theta"),
    *("rope_scaling", "tie_word_embeddings", "attention_bias", "mlp_bias", "model_type", "architectures", "dtype"),
    *("torch_dtype", "quantization_config", "layer_types", "sliding_window", "auto_map", "eos_token_id", "id2label"),
    *("per_layer_config", "text_config", "pretraining_tp", "use_cache", "output_attentions", "transformers_version"),
    *("_name_or_path", "to_dict", "sub_configs", "is_encoder_decoder", "generation_config", "tokenizer_class"),
)


def damaged_config(whole: Path, changes: dict[str, Any]) -> str | None:
    path = whole / "config.json"
    sound = path.read_text()
    try:
        path.write_text(json.dumps({**json.loads(sound), **changes}))
        cfg = recipe.Model(source=str(whole))
        said = one_line(describe, cfg)
        return said or one_line(load_model, cfg)
    finally:
        path.write_text(sound)


Quiet = settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
Long = settings(Quiet, max_examples=2500)


@Quiet
@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=2))
def test_any_value_in_a_config(whole: Path, bounded: None, changes: dict[str, Any]) -> None:
    damaged_config(whole, changes)


@pytest.mark.slow
@Long
@given(changes=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), VALUES, min_size=1, max_size=4))
def test_very_many_values_in_a_config(whole: Path, bounded: None, changes: dict[str, Any]) -> None:
    damaged_config(whole, changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**9}, r"config\.json: num_hidden_layers is 1000000000; expected .* from 1 to 4,096"),
        ({"num_hidden_layers": "8"}, "num_hidden_layers is '8'; expected a whole number"),
        ({"hidden_size": None}, "hidden_size is None; expected a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4 and num_key_value_heads 3; expected a multiple"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"vocab_size": 10**10}, r"means at least 640[\d,]+ parameters, and its weights are [\d,]+ bytes"),
        ({"hidden_size": 2**20, "intermediate_size": 2**20}, "they do not belong together"),
        ({"quantization_config": "awq"}, "quantization_config is 'awq'; expected a mapping"),
        ({"rms_norm_eps": "x"}, "cannot be loaded .*rms_norm_eps"),
    ],
)
def test_a_config_that_no_model_has_is_refused_by_name(
    whole: Path, bounded: None, changes: dict[str, Any], words: str
) -> None:
    said = damaged_config(whole, changes)
    assert said is not None and re.search(words, said), said


def test_plan_says_it_in_one_line(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "attention_bias": [], "rms_norm_eps": {}}))
    job = ["plan", str(QUICKSTART), f"model.source={folder}", "--runs", str(tmp_path)]
    done = CliRunner().invoke(app, job)
    assert done.exit_code == 1 and done.stderr.count("\n") == 1 and str(folder) in done.stderr


def damaged(content: bytes, chance: random.Random, most: int) -> bytes:
    """Some bytes of the first `most` changed, or the file cut short, or numbers put in that are far too large."""
    head = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8, 64])):
        head[chance.randrange(min(most, len(head)))] = chance.randrange(256)
    if most > 12 and chance.random() < 0.3:
        at = chance.randrange(4, min(most, len(head)) - 8)
        head[at : at + 8] = struct.pack("<Q", chance.choice([0, 1, 2**31, 2**62, 2**64 - 1, 10**9]))
    return bytes(head[: chance.randrange(len(head))] if chance.random() < 0.15 else head)


def read_gguf(path: Path) -> None:
    load_model(recipe.Model(source=str(path)))
    load_tokenizer(recipe.Model(source=str(path)))


def gguf_heads(content: bytes, folder: Path, seeds: range, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOVER_CACHE", str(folder / "cache"))
    path = folder / "model.gguf"
    for seed in seeds:
        chance = random.Random(seed)
        path.write_bytes(damaged(content, chance, chance.choice([64, 512, 3000, 40_000])))
        one_line(read_gguf, path)
        shutil.rmtree(folder / "cache", ignore_errors=True)


def test_random_bytes_at_the_head_of_a_gguf_file(
    gguf_file: bytes, tmp_path: Path, bounded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf_heads(gguf_file, tmp_path, range(15), monkeypatch)


@pytest.mark.slow
def test_very_many_heads_of_gguf_files(
    gguf_file: bytes, tmp_path: Path, bounded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf_heads(gguf_file, tmp_path, range(100, 700), monkeypatch)


def at_key(content: bytes, key: str) -> int:
    """Where the value of a key begins, behind its type."""
    found = content.index(struct.pack("<Q", len(key)) + key.encode())
    return found + 8 + len(key) + 4


HEADS = {
    "a huge array": ("tokenizer.ggml.tokens", 4, 2**62, r"found [\d,]+ values; expected no more than the [\d,]+ bytes"),
    "a huge text": ("tokenizer.ggml.model", 0, 2**40, r"found [\d,]+ bytes of a text; expected no more than"),
    "a billion blocks": ("llama.block_count", 0, 10**9, r"llama\.block_count is 1000000000, and the file holds 57"),
}


@pytest.mark.parametrize("what", HEADS)
def test_no_count_of_a_gguf_file_is_believed(
    gguf_file: bytes, tmp_path: Path, bounded: None, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    key, behind, number, words = HEADS[what]
    monkeypatch.setenv("RECOVER_CACHE", str(tmp_path / "cache"))
    content = bytearray(gguf_file)
    at = at_key(gguf_file, key) + behind
    content[at : at + (4 if what == "a billion blocks" else 8)] = struct.pack("<Q", number)[
        : 4 if what == "a billion blocks" else 8
    ]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=words) as raised:
        locate(recipe.Model(source=str(path)))
    assert str(raised.value).startswith(str(path))


def test_a_sound_head_passes_and_every_cut_of_it_is_refused(gguf_file: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file)
    check_head(path, path)
    for end in [0, 3, 23, 24, 100, 1000, 20_000]:
        path.write_bytes(gguf_file[:end])
        with pytest.raises(ModelError, match=r"model\.gguf: .*(too short|expected)"):
            check_head(path, path)


def safetensors_heads(whole: Path, folder: Path, seeds: range) -> None:
    there = shutil.copytree(whole, folder / "model")
    content = (there / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", content[:8])[0] + 8
    for seed in seeds:
        chance = random.Random(seed)
        (there / "model.safetensors").write_bytes(damaged(content, chance, chance.choice([8, 64, size])))
        one_line(load_model, recipe.Model(source=str(there)))


def test_random_bytes_at_the_head_of_a_safetensors_file(whole: Path, tmp_path: Path, bounded: None) -> None:
    safetensors_heads(whole, tmp_path, range(40))


@pytest.mark.slow
def test_very_many_heads_of_safetensors_files(whole: Path, tmp_path: Path, bounded: None) -> None:
    safetensors_heads(whole, tmp_path, range(100, 1600))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"])
def test_random_changes_of_the_other_files(whole: Path, tmp_path: Path, name: str) -> None:
    there = shutil.copytree(whole, tmp_path / "model")
    content = (there / name).read_bytes()
    for seed in range(8):
        chance = random.Random(seed)
        (there / name).write_bytes(damaged(content, chance, 2000))
        cfg = recipe.Model(source=str(there))
        one_line(load_tokenizer, cfg)
        if name in ("generation_config.json", "config.json"):
            one_line(load_model, cfg)
