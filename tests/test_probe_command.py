"""Two checkpoints by the command: what is loaded, what is refused before it is, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from probe_reference import CFG, of
from tiny import tiny
from twins import removed
from typer.testing import CliRunner

from recover.base.errors import DataError, ModelError, RecipeError
from recover.commands import diagnose, options
from recover.config import recipe
from recover.models.load import check_tokenizers, load_any, load_model, load_tokenizer
from recover.probe.probe import probe
from recover.probe.records import Final, Sublayer
from recover.probe.views import load_pair

FABLE = recipe.Model(source="embedded:fable-2m")


@pytest.fixture(scope="module")
def smaller(tmp_path_factory) -> Path:
    """fable-2m without two blocks, as an export of a run would lie there."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    model = removed(load_model(FABLE), (5, 8))
    model.save_pretrained(run / "deploy")
    load_tokenizer(FABLE).save_pretrained(run / "deploy")
    return run


@pytest.mark.parametrize(
    "method, message",
    [
        ("awq", "quantized with 'awq', which the package 'gptqmodel' reads, and it is not installed: pip install"),
        ("gptq", "pip install gptqmodel"),
        ("torchao", "pip install torchao"),
        ("bitsandbytes", "pip install bitsandbytes"),
        ("hqq", "expected one of awq, gptq, bitsandbytes, torchao, fp8, mxfp4, a GGUF"),
    ],
)
def test_a_quantized_checkpoint_asks_for_its_package(tmp_path, monkeypatch, method, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tiny("llama").config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(ModelError, match=message):
        load_any(recipe.Model(source=str(tmp_path)))


def test_tokenizers_in_which_an_id_is_another_token_are_refused():
    class Words:
        def __init__(self, *words: str) -> None:
            self.words = words

        def get_vocab(self):
            return {word: number for number, word in enumerate(self.words)}

    check_tokenizers(Words("a", "b"), Words("a", "b", "<added>"))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"2 ids are different tokens \(1 is 'b' and 'c', 2 is 'c' and 'b'\)"):
        check_tokenizers(Words("a", "b", "c"), Words("a", "c", "b"))  # type: ignore[arg-type]


def command(*arguments: str):
    app = typer.Typer()
    app.command()(options.diagnose)
    return CliRunner().invoke(app, list(arguments), catch_exceptions=True)


def lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_command_writes_every_record_and_goes_on(tmp_path, smaller):
    asks = ["Olga carries 81 roses. A crow steals 44.", "Greta counts 8 buttons. A stranger adds 6."]
    told = lines(tmp_path / "p.jsonl", [{"prompt": ask} for ask in asks])
    read = lines(tmp_path / "t.jsonl", [{"text": ask} for ask in asks])
    pairs = lines(tmp_path / "r.jsonl", [{"query": asks[0], "documents": [asks[1], asks[0], "rain"]}])
    choices = tmp_path / "c.yaml"
    lines(tmp_path / "c.jsonl", [{"question": "The crow is", "options": ["black", "a fish"], "label": 0}])
    choices.write_text("{name: crow, kind: choice, data: c.jsonl, prompt: '{question}'}")
    out = tmp_path / "out"
    arguments = ["embedded:fable-2m", str(smaller / "deploy"), "--out", str(out), "--steps", "4", "--seeds", "0"]
    arguments += ["--prompts", told, "--texts", read, "--retrieval", pairs, "--task", str(choices)]
    arguments += ["--blocks", "0,1,2,3,4,6,7,9,10,11"]
    result = command(*arguments)
    assert result.exit_code == 0, result.exception
    kinds = {json.loads(line)["probe"] for line in (out / "probe.jsonl").read_text().splitlines()}
    every = {"final", "block", "sublayer", "step", "divergence", "sampled", "choice", "retrieval", "identity"}
    assert kinds == every
    found = json.loads((out / "probe.json").read_text())
    assert found["prompts"] == 2 and found["other"] == str(smaller / "deploy")
    rows = [json.loads(line) for line in (out / "positions.jsonl").read_text().splitlines()]
    assert len(rows) == found["final"]["positions"] and {row["prompt"] for row in rows} == {0, 1}
    before = {path: path.stat().st_mtime_ns for path in out.rglob("batch-*.pt")}
    assert len(before) == 2
    assert command(*arguments, "--parquet").exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("batch-*.pt")} == before
    assert json.loads((out / "probe.json").read_text()) == found
    from datasets import Dataset

    assert Dataset.from_parquet(str(out / "positions.parquet"))["kl"][:] == [row["kl"] for row in rows]


def test_the_blocks_of_an_export_of_ours_are_known_from_its_plan(smaller):
    from recover.models.plan import Plan, save_plan

    with pytest.raises(ModelError, match="12 blocks, the other one 10"):
        load_pair(FABLE, recipe.Model(source=str(smaller / "deploy")))
    save_plan(Plan("depth", 12, (5, 8)), {}, smaller / "prune")
    kept = diagnose.planned_blocks(str(smaller / "deploy"))
    assert kept == [0, 1, 2, 3, 4, 6, 7, 9, 10, 11]
    pair, _ = load_pair(FABLE, recipe.Model(source=str(smaller / "deploy")), kept)
    assert pair.closed == {5, 8} and diagnose.planned_blocks("embedded:fable-2m") is None


@pytest.mark.parametrize(
    "rows, message",
    [
        (None, "nothing to probe with"),
        ([], "holds no rows"),
        ([{"text": "a"}], r"p.jsonl:1: 'prompt': found None, expected a text"),
    ],
)
def test_files_that_cannot_be_used_are_refused_before_a_model_is_loaded(tmp_path, rows, message):
    path = tmp_path / "p.jsonl"
    if rows is not None:
        lines(path, rows)
    wanted = diagnose.Wanted(prompts=None if rows is None else path)
    with pytest.raises(DataError, match=message):
        diagnose.diagnosis(FABLE, recipe.Model(source="nowhere/none"), wanted, CFG, tmp_path / "out")


@pytest.mark.parametrize(
    "option, value, message", [("--blocks", "0,x", "numbers with commas"), ("--steps", "0", "steps: found 0")]
)
def test_a_wrong_option_is_named(tmp_path, option, value, message):
    result = command("a", "b", "--out", str(tmp_path), option, value)
    assert isinstance(result.exception, RecipeError) and message in str(result.exception)


def test_a_gguf_file_of_the_dense_model_is_the_dense_model(tmp_path, monkeypatch):
    from recover.export.gguf.write import write_gguf

    monkeypatch.setenv("RECOVER_CACHE", str(tmp_path / "cache"))
    write_gguf(recipe.embedded("fable-2m"), tmp_path / "fable.gguf", "float32")
    pair, tokenizer = load_pair(FABLE, recipe.Model(source=str(tmp_path / "fable.gguf")))
    records = probe(pair, tokenizer, ["Greta counts 8 buttons."], recipe.Probe(steps=4))
    assert all(set(record.metrics["kl"].values()) == {0.0} for record in of(records, Final))
    assert all(set(r.kl.values()) == {0.0} for r in of(records, Sublayer) if r.counterfactual == "pruned")
