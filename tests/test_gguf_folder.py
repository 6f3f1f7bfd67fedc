"""A GGUF file as a model: its folder holds what transformers reads of the file, and is made once, by one run."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import gguf
import pytest
import torch
from gemma_gguf import gemma_file, sentencepiece
from gguf_checkpoint import by_llama_cpp, checkpoint
from tiny import ids, tiny_config
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from recover.base import artifacts
from recover.base.errors import ModelError
from recover.config import recipe
from recover.export.gguf.write import write_gguf
from recover.models import gguf_folder, source
from recover.models.gguf_folder import TEXT, completed
from recover.models.load import describe, load_model, load_tokenizer
from recover.models.source import locate


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RECOVER_CACHE", str(tmp_path / "cache"))
    return write_gguf(checkpoint(tmp_path / "deploy"), tmp_path / "model.gguf")


def cfg(path: Path) -> recipe.Model:
    return recipe.Model(source=str(path))


@pytest.fixture
def written(monkeypatch) -> list[Path]:
    """The files that are converted, as often as they are."""
    found: list[Path] = []
    write = gguf_folder.write_stock

    def noted(path: Path, folder: Path, *, shown: Path) -> None:
        found.append(shown)
        write(path, folder, shown=shown)

    monkeypatch.setattr(source, "write_stock", noted)
    return found


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2"])  # transformers misreads others, which are refused
def test_the_folder_holds_what_transformers_reads_of_the_file(tmp_path, monkeypatch, capsys, variant):
    monkeypatch.setenv("RECOVER_CACHE", str(tmp_path / "cache"))
    path = write_gguf(checkpoint(tmp_path / "deploy", variant), tmp_path / "model.gguf")
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    expected = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    found = load_model(cfg(path))
    weights = expected.state_dict()
    assert found.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in found.state_dict().items())
    assert not hasattr(found.config, "quantization_config") and found.dtype == torch.float32
    assert found.generation_config.eos_token_id == expected.generation_config.eos_token_id
    stock = AutoTokenizer.from_pretrained(**where).get_vocab()
    assert (
        "does not declare" not in capsys.readouterr().out
    )  # of keys that only transformers' reader of the file writes
    rows = found.config.vocab_size  # a token past them is the default of a class, and not of the file
    assert load_tokenizer(cfg(path)).get_vocab() == {token: index for token, index in stock.items() if index < rows}


@pytest.mark.parametrize("variant", ["llama_linear", "llama_rope3", "llama_tied_biased", "qwen3", "mistral"])
def test_scaled_positions_biases_and_head_sizes_are_those_of_the_folder(tmp_path, monkeypatch, variant):
    monkeypatch.setenv("RECOVER_CACHE", str(tmp_path / "cache"))
    folder = checkpoint(tmp_path / "deploy", variant)
    found, expected = load_model(cfg(write_gguf(folder, tmp_path / "model.gguf"))), load_model(cfg(folder))
    assert found.config.rope_parameters == expected.config.rope_parameters
    prompt = torch.arange(5, 205)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(prompt).logits, expected(prompt).logits, rtol=0, atol=1e-4)


def test_tensors_that_transformers_would_fill_with_random_numbers_are_refused(file, monkeypatch):
    made = gguf.GGUFReader.__init__

    def cut(self, *given) -> None:
        made(self, *given)
        self.tensors = [tensor for tensor in self.tensors if tensor.name != "blk.2.ffn_up.weight"]

    monkeypatch.setattr(gguf.GGUFReader, "__init__", cut)
    with pytest.raises(ModelError, match=r"model\.gguf: lacks 1 tensors of its model \(blk\.2\.ffn_up\.weight\)"):
        load_model(cfg(file))
    assert list((file.parent / "cache" / "gguf").iterdir()) == []


def test_a_file_is_opened_once_and_the_package_is_as_before(file, monkeypatch):
    stock, names, opened = gguf.GGUFReader, gguf.get_tensor_name_map, []
    made = stock.__init__
    monkeypatch.setattr(stock, "__init__", lambda self, *given: (opened.append(given[0]), made(self, *given))[1])
    load_model(cfg(file))
    assert [Path(path).name for path in opened] == [file.name]
    assert gguf.GGUFReader is stock and gguf.get_tensor_name_map is names
    assert type(gguf.GGUFReader(file).data).__name__ == "memmap"


def test_it_is_converted_and_hashed_once_until_it_changes(file, written, monkeypatch):
    hashed: list[Path] = []
    digest = artifacts.sha256
    monkeypatch.setattr(artifacts, "sha256", lambda path: (hashed.append(path), digest(path))[1])
    describe(cfg(file))
    load_model(cfg(file))
    load_tokenizer(cfg(file))
    assert written == [file] and hashed.count(file) == 1
    before = locate(cfg(file))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # of the last weight
    file.write_bytes(data)
    os.utime(file, ns=(0, 0))
    assert locate(cfg(file)) != before
    assert written == [file, file] and hashed.count(file) == 2


def test_of_two_runs_the_second_waits_for_the_first(file, written, monkeypatch):
    write, begun = source.write_stock, threading.Event()

    def slowly(path: Path, folder: Path, *, shown: Path) -> None:
        begun.set()
        second.join(1.0)
        assert second.is_alive(), "the second run did not wait"
        write(path, folder, shown=shown)

    monkeypatch.setattr(source, "write_stock", slowly)
    found: list[Path] = []
    second = threading.Thread(target=lambda: (begun.wait(), found.append(locate(cfg(file)))))
    second.start()
    folder = locate(cfg(file))
    second.join()
    assert found == [folder] and written == [file]
    artifacts.check_manifest(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.fixture
def gemma(tmp_path, monkeypatch):
    monkeypatch.setenv("RECOVER_CACHE", str(tmp_path / "cache"))
    tokenizer = sentencepiece()
    return tmp_path / "gemma.gguf", gemma_file(tmp_path / "gemma.gguf", tokenizer), tokenizer


def test_a_gemma_file_is_the_model_and_the_tokenizer_that_it_was_made_from(gemma):
    """Its heads are not of size 256, which transformers takes to scale scores by, whatever the file holds."""
    path, model, tokenizer = gemma
    found, read = load_model(cfg(path)), load_tokenizer(cfg(path))
    assert torch.equal(found(ids(2, 40)).logits, model(ids(2, 40)).logits)
    for text in ("def sentencepiece(words: int = 900)", "  two  blanks\n\n naïve 東 12", TEXT):
        assert read(text)["input_ids"] == [2, *tokenizer(text)["input_ids"]], text


def test_the_largest_gemma_scales_its_scores_by_its_width():
    config = tiny_config("gemma3_text", num_hidden_layers=62, layer_types=None, head_dim=32)
    fields = {"general.architecture": Field("gemma3")}
    assert completed(config, SimpleNamespace(fields=fields, tensors=[])).query_pre_attn_scalar == 64 // 4
    config = tiny_config("gemma3_text", head_dim=32)
    assert completed(config, SimpleNamespace(fields=fields, tensors=[])).query_pre_attn_scalar == 32


class Field(NamedTuple):
    value: Any

    def contents(self) -> Any:
        return self.value


def test_a_tokenizer_that_does_not_use_the_words_of_the_file_is_refused(gemma, monkeypatch):
    """As transformers 5.17 converted Gemma's: a token for each letter."""
    path, _, tokenizer = gemma
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["model"]["merges"] = []
    letters = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)), eos_token="<eos>")
    assert len(letters(TEXT)["input_ids"]) == len(TEXT)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: letters)
    with pytest.raises(
        ModelError, match=rf"converted wrongly.*cuts {len(TEXT)} letters of English into {len(TEXT)} tok"
    ):
        load_tokenizer(cfg(path))


@pytest.mark.parametrize("variant", ["gemma2", "gemma3_text"])
def test_a_gemma_that_is_written_is_the_model_that_is_read(variant, tmp_path, monkeypatch):
    monkeypatch.setenv("RECOVER_CACHE", str(tmp_path / "cache"))
    tokenizer = sentencepiece(whole=True)
    folder = checkpoint(tmp_path / "deploy", variant, vocab_size=len(tokenizer), max_position_embeddings=512)
    tokenizer.save_pretrained(folder)
    path = write_gguf(folder, tmp_path / "model.gguf")
    options = {"attention": "eager", "source": str(path)}
    found, model = load_model(recipe.Model(**options)), load_model(recipe.Model(**(options | {"source": str(folder)})))
    assert torch.allclose(found(ids(2, 40)).logits, model(ids(2, 40)).logits, atol=1e-4)
    for text in ("def sentencepiece(words: int = 900)", "  two  blanks\n\n naïve 東 12", TEXT):
        assert load_tokenizer(cfg(path))(text)["input_ids"] == tokenizer(text)["input_ids"], text


@pytest.mark.slow
def test_llama_cpp_computes_on_a_gemma_file_what_is_read_of_it(gemma):
    path, _, tokenizer = gemma
    prompts = [[2, *ids(1, length, vocabulary=900)[0].tolist()] for length in (1, 9, 60)]
    rows = len(tokenizer)
    found, model = by_llama_cpp(path, prompts, rows), load_model(cfg(path))
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in prompts])
    # Its GELU is a table in half precision.
    assert (found - expected).abs().max() < 5e-4 * expected.abs().max()
