"""Stage deploy: the export as a quantized GGUF file, measured, and the dense model of about as many bytes beside it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import yaml
from gguf_checkpoint import ROWS, llama_cpp, said, words
from report_run import build_run
from small_run import DEPTH, finished, run
from tiny import tiny
from transformers import AutoConfig
from typer.testing import CliRunner

from recover import cli
from recover.base.artifacts import read_json
from recover.base.errors import ModelError, RecipeError
from recover.config import recipe
from recover.config.recipe import dump_recipe, load_recipe
from recover.export.gguf import write as writing
from recover.export.gguf.write import nearest, planned_bytes, quantized_bytes, write_gguf
from recover.measure.tasks import load_task, measure
from recover.models.load import load_model, load_tokenizer
from recover.report.collect import collect
from recover.report.render import render
from recover.report.verdict import against_alternative
from recover.run import stages
from recover.run.directory import RunDirectory
from recover.text.prompts import encode_prompt

BOTH = ("deploy.quantize=q4_0", "deploy.beside=dense")


def stamps(directory: RunDirectory) -> dict[str, str | None]:
    return {stage: directory.finished(stage) for stage in stages.STAGES if not stages.OF[stage].always}


def perplexity(data: Any, model: str) -> float:
    return next(row for row in data["measures"] if row["task"] == "tales" and row["main"])[model]["value"]


def types(path: Path) -> set[str]:
    return {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def _measured_later(directory: RunDirectory) -> None:
    """`recover measure RUN` fills the columns of the files too, and forgets them with the files."""
    rows = Path(recipe.__file__).parents[1] / "embedded" / "tasks" / "stories.jsonl"
    task = {"name": "later", "kind": "generate", "data": str(rows), "prompt": "{prompt}", "target": "answer"}
    path = directory.root.parent / "later.yaml"
    path.write_text(yaml.safe_dump(task))
    later = ["measure", str(directory.root), "--tasks", str(path), "--limit", "3"]
    done = CliRunner().invoke(cli.app, later)
    assert done.exit_code == 0, done.output
    record = read_json(directory.more / "later.json")
    assert list(record["models"]) == ["dense", "pruned", "recovered", "deployed", "alternative"]
    alone = measure(
        load_model(recipe.Model(source=str(directory.gguf / "model.gguf"))),
        load_tokenizer(recipe.Model(source=str(directory.gguf / "model.gguf"))),
        [load_task(str(path))],
        recipe.Measure.model_validate(_settings(record)),
    )[0]
    assert record["models"]["deployed"]["length"] == alone["tasks"]["later"]["length"]
    assert record["models"]["deployed"]["agreement"] is not None
    data: Any = collect(directory.root)
    row = next(row for row in data["measures"] if row["task"] == "later" and row["main"])
    assert row["deployed"] is not None and row["alternative"] is not None and data["mixed"] == []
    stamp = directory.gguf / "DONE.json"
    text = stamp.read_text()
    again = {key: value for key, value in json.loads(text).items() if key != "digest"}
    stamp.write_text(json.dumps({**again, "finished": "2030-01-01T00:00:00"}))
    data = collect(directory.root)
    row = next(row for row in data["measures"] if row["task"] == "later" and row["main"])
    assert row["recovered"] is not None and row.get("deployed") is None
    assert any("on earlier files of stage deploy" in line for line in data["mixed"])
    stamp.write_text(text)
    (directory.more / "later.json").unlink()


def _settings(record: Any) -> Any:
    return {name: value for name, value in record["settings"].items() if name != "dtype"}


def test_a_finished_run_gets_a_file_and_two_columns(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished(tmp_path_factory, *DEPTH), tmp_path / "quickstart")
    done = stamps(run(tmp_path, *DEPTH))
    directory = run(tmp_path, *DEPTH, *BOTH)
    assert stamps(directory) == done | {"deploy": directory.finished("deploy")}, "nothing else was done again"
    data = read_json(directory.report_json)
    assert list(data["headline"]) == ["dense", "pruned", "recovered", "deployed", "alternative"]
    assert data["mixed"] == [] and data["missing"] == []
    files = data["served"]["files"]
    for file in files.values():
        assert (directory.root / file["path"]).stat().st_size == file["bytes"]
    assert files["deployed"]["quantize"] == "q4_0" and "Q4_0" in types(directory.gguf / "model.gguf")
    # 10 of 12 blocks at the same type are nearer in bytes than 12 at a finer one.
    assert files["alternative"]["quantize"] == "q4_0" and files["alternative"]["bytes"] > files["deployed"]["bytes"]
    # The weights are those of the file: near the model that it was made from, and not equal.
    for file, source, other in (("deployed", "recovered", "dense"), ("alternative", "dense", "recovered")):
        own, made_from, strange = (perplexity(data, model) for model in (file, source, other))
        assert own != made_from and abs(own - made_from) < abs(own - strange) / 3
    page, text = directory.report_html.read_text(), directory.report_md.read_text()
    assert "dequantized, with the file" in page
    assert "The files that are served" in text and "gguf/dense/model.gguf" in text and "kept, alternative" in text
    _measured_later(directory)
    planned = read_json(directory.plan / "estimate.json")["gguf"]
    assert planned["quantize"] == "q4_0" and planned["beside"] == "q4_0"
    for name, model in (("bytes", "deployed"), ("beside_bytes", "alternative")):  # vocabulary and names come on top
        assert 0.9 < planned[name] / files[model]["bytes"] <= 1

    before = stamps(directory)
    run(tmp_path, *DEPTH, *BOTH)
    assert stamps(directory) == before
    with open(directory.gguf / "model.gguf", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\0" if file.read(1) != b"\0" else b"\1")
    capsys.readouterr()
    run(tmp_path, *DEPTH, *BOTH)
    assert "deploy, again: gguf/model.gguf is not what was written" in capsys.readouterr().out.replace("\n", " ")
    now = stamps(directory)
    assert now["deploy"] != before["deploy"] and now["export"] == before["export"]

    run(tmp_path, *DEPTH, "deploy.quantize=q8_0")
    data: Any = read_json(directory.report_json)
    assert list(data["headline"])[3:] == ["deployed"] and data["served"]["files"]["deployed"]["quantize"] == "q8_0"
    assert not (directory.gguf / "dense" / "model.gguf").exists()
    run(tmp_path, *DEPTH)
    data = read_json(directory.report_json)
    assert list(data["headline"]) == ["dense", "pruned", "recovered"] and data["served"] is None
    assert data["mixed"] == []
    assert [row["stage"] for row in stages.status(directory.root)].count("deploy") == 0
    for fields, done in (("", "all"), (BOTH[0], "8 of 9")):  # as `recover list` has it, and not as it was made
        (directory.root / "recipe.yaml").write_text(dump_recipe(load_recipe(directory.recipe, [fields] * bool(fields))))
        assert done in CliRunner().invoke(cli.app, ["list", str(tmp_path)]).output
        (directory.gguf / "DONE.json").unlink(missing_ok=True)


def test_a_recipe_without_has_no_such_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for option in ({"until": "deploy"}, {"start": "deploy"}):
        with pytest.raises(RecipeError, match=r"deploy\.quantize=q8_0"):
            run(tmp_path, *DEPTH, **option)
    with pytest.raises(RecipeError, match="deploy: beside needs a file"):
        run(tmp_path, "deploy.beside=dense", until="plan")
    with pytest.raises(RecipeError, match=r"deploy\.quantize: found .q4_k_s.\. "):
        run(tmp_path, "deploy.quantize=q4_k_s", until="plan")
    monkeypatch.setattr(writing, "_ggml", lambda: None)
    with pytest.raises(RecipeError, match=r"deploy\.quantize: q4_k_m is made by llama.cpp's own code, which is not"):
        run(tmp_path, "deploy.quantize=q4_k_m", until="plan")


@pytest.mark.parametrize("family", ["olmo3", pytest.param("glm4", marks=pytest.mark.slow)])
def test_a_family_that_gguf_is_not_written_for_is_refused_by_plan(tmp_path: Path, family: str) -> None:
    tiny(family, vocab_size=ROWS).save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    fields = ("model.source=" + str(tmp_path / "model"), "prune={kind: depth, blocks: [3]}")
    run(tmp_path, *fields, until="plan")
    with pytest.raises(RecipeError, match=rf"deploy\.quantize: .*'{family}' is not written as GGUF; expected llama"):
        run(tmp_path, *fields, "deploy.quantize=q8_0", until="plan")


def test_a_family_whose_blocks_alternate_is_warned_of_before_blocks_go(tmp_path: Path, capfd: Any) -> None:
    tiny("gemma2", vocab_size=ROWS, tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    fields = ("model.source=" + str(tmp_path / "model"), "deploy.quantize=q8_0")
    run(tmp_path, *fields, "prune={kind: depth, blocks: [3]}", until="plan")
    said = "llama.cpp lets attention slide in all blocks of gemma2 but every block 2"
    assert said in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    ("kind", "tool"), [("fp8", "llm-compressor"), ("awq", "llm-compressor"), ("nf4", "bitsandbytes")]
)
def test_forms_of_other_tools_are_refused_with_the_tool(kind: str, tool: str) -> None:
    said = f"{kind} is no type of a GGUF file.*quantize the export with {tool}, and measure that folder"
    with pytest.raises(ValueError, match=said):
        recipe.Deploy(quantize=kind)


@pytest.mark.parametrize(
    ("family", "fields", "said"),
    [
        ("granite", {}, "architecture granite is not supported"),  # as transformers has it
        ("smollm3", {"no_rope_layer_interval": 4}, "architecture smollm3 is not supported"),
        ("olmo2", {}, "architecture olmo2 is not supported"),
        ("qwen3_moe", {"mlp_only_layers": []}, "lacks 6 tensors"),  # its size of an expert is not read of the file
    ],
)
def test_a_file_that_could_not_be_measured_is_refused_by_plan(
    tmp_path: Path, family: str, fields: dict[str, Any], said: str
) -> None:
    tiny(family, vocab_size=ROWS, **fields).save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    asked = (f"model.source={tmp_path / 'model'}", "prune={kind: depth, blocks: [3]}", "deploy.quantize=q8_0")
    with pytest.raises(RecipeError, match=rf"deploy\.quantize: .*of {family} is written and could not be measured"):
        run(tmp_path, *asked, until="plan")
    with pytest.raises(ModelError, match=said):
        load_model(recipe.Model(source=str(write_gguf(tmp_path / "model", tmp_path / "out.gguf"))))


def test_planned_bytes_are_those_that_are_written() -> None:
    folder = recipe.embedded("fable-2m")
    sizes = quantized_bytes(folder)
    config: Any = AutoConfig.from_pretrained(folder)
    assert {kind: sum(planned_bytes(config, kind)) for kind in sizes} == sizes
    assert nearest({"q8_0": 10, "q5_1": 8, "q4_0": 6}, 9) == "q8_0", "of two as near the finer one"
    assert nearest({"q8_0": 10, "q5_1": 8, "q4_0": 6}, 7.9) == "q5_1"


def test_llama_cpp_writes_the_texts_that_are_measured(tmp_path: Path) -> None:
    """What is measured of a file is what llama.cpp serves of it: the same greedy texts, from the same tokens."""
    path = write_gguf(recipe.embedded("fable-2m"), tmp_path / "model.gguf", "q4_0")
    server = llama_cpp(path)
    source = recipe.Model(source=str(path))
    model, tokenizer = load_model(source), load_tokenizer(source)
    cfg = recipe.Measure(tasks=("embedded:stories",), limit=4, max_new_tokens=96, sampling=None)
    _, texts = measure(model, tokenizer, [load_task("embedded:stories")], cfg)
    for row in texts["stories"]:
        ids = list(encode_prompt(tokenizer, row.get("prompt", "")))
        asked = {"prompt": ids, "n_predict": 96, "temperature": 0, "cache_prompt": False}
        assert said(server.handle_completions(asked))["choices"][0]["text"].strip() == row["text"].strip()


# Rights of 40 items each: deployed, alternative; bytes of the alternative; what is said.
ENDS = "Quantizing without pruning serves better here."
CASES = {
    "alternative": (20, 36, 1_010, f"generation of the quantized dense model is better by 40.0 points .* {ENDS}"),
    "larger": (20, 36, 1_200, r"At ×1\.20 the bytes.*quantized dense model is better by 40\.0 points \[[^]]*\]\.$"),
    "deployed": (36, 20, 990, r"generation of the deployed file is better by 40\.0 points \[[^]]*\]\.$"),
    "equal": (30, 31, 1_000, r"about as many bytes.*generation of the two is not told apart .*−2\.5 points"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_report_says_who_serves_better(tmp_path: Path, case: str) -> None:
    deployed, alternative, size, said = CASES[case]
    root = build_run(tmp_path)
    fields = yaml.safe_load((root / "recipe.yaml").read_text())
    fields["deploy"] = {"quantize": "q4_0", "beside": "dense"}
    (root / "recipe.yaml").write_text(yaml.safe_dump(fields))
    measured = read_json(root / "after" / "measure.json")
    (root / "gguf" / "dense").mkdir(parents=True)
    for folder, right in (("gguf", deployed), ("gguf/dense", alternative)):
        measured["tasks"]["sums"] |= {"items": 40, "each": [int(n < right) for n in range(40)]}
        (root / folder / "measure.json").write_text(json.dumps(measured))
    files = {
        "deployed": {"path": "gguf/model.gguf", "quantize": "q4_0", "bytes": 1_000},
        "alternative": {"path": "gguf/dense/model.gguf", "quantize": "q4_0", "bytes": size},
    }
    (root / "gguf" / "files.json").write_text(json.dumps(files))
    data = collect(root)
    assert re.search(said, against_alternative(data) or "")
    assert data["summary"].endswith(against_alternative(data) or "-")
    assert (ENDS in data["summary"]) == (case == "alternative")
    render(root, data)
    assert (against_alternative(data) or "-") in (root / "report.md").read_text()
