"""The Python door: a whole job in one process on one reading of the model, and names that cost nothing until used."""

import inspect
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from small_run import PROMPTS, Here

import recover
from recover import api
from recover.base.errors import ModelError, RecipeError
from recover.export import verify
from recover.models.plan import Plan

FABLE = "embedded:fable-2m"
TEXTS = ["Once there was a fox who lived by the river. " * 8, "The hen said that the corn was hers. " * 8]


def test_the_whole_job_reads_the_model_once(tmp_path, monkeypatch):
    reads = []
    read = api.load_any
    monkeypatch.setattr(api, "load_any", lambda cfg: (reads.append(cfg), read(cfg))[1])
    model, tokenizer = recover.load(FABLE, dtype="float32")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    text = recover.Calibration(data="", samples=2, length=32)
    twin = recover.prune(model, tokenizer, recover.Depth(count=2, calibration=text), text=TEXTS)
    assert len(twin.plan.dropped) == 2 and twin.plan.calibration["samples"] == 2

    ids_BT = torch.tensor([tokenizer("Once there was a fox")["input_ids"]])
    with torch.no_grad(), twin.dense() as dense:
        assert torch.equal(dense(input_ids=ids_BT).logits, model(input_ids=ids_BT).logits)

    records = recover.probe(twin, tokenizer, ["Once there was", "The hen said"], recover.Probe(steps=4))
    final = next(each for each in records if each.probe == "final" and each.temperature == 1.0)
    assert final.metrics["kl"]["mean"] > 0

    tasks = ["embedded:stories", "embedded:tales"]
    of_dense, of_pruned = (
        recover.measure(each, tokenizer, tasks, limit=4, max_new_tokens=16) for each in (model, twin)
    )
    assert of_dense["headline"].keys() == of_pruned["headline"].keys()
    assert of_dense["texts"] != of_pruned["texts"]

    prompts = recover.DenseText(prompts=str(PROMPTS), max_new_tokens=16, batch_size=16)
    scores = []
    folder = recover.distill(
        twin,
        tokenizer,
        prompts,
        tokens=400,
        out=tmp_path / "out",
        score=lambda twin: scores.append(twin) or 0.5,
        epochs=1,
        batch_size=4,
        length=128,
        lora=recover.Lora(rank=2),
    )
    assert scores == [twin] and (folder / "adapter_model.safetensors").is_file()
    with torch.no_grad():
        trained = twin.model(input_ids=ids_BT).logits
        assert not torch.equal(trained, twin.replan(twin.plan).model(input_ids=ids_BT).logits)

    monkeypatch.setattr(verify, "fresh_process", lambda: nullcontext(Here()))  # that it is one: `test_export.py`
    deploy = recover.export(twin, tokenizer, tmp_path / "deploy")
    assert len(reads) == 1
    shipped, same_tokenizer = recover.load(str(deploy), dtype="float32")
    with torch.no_grad():
        assert torch.allclose(shipped(input_ids=ids_BT).logits, trained, atol=1e-4)
    again = recover.measure(shipped, same_tokenizer, tasks, limit=4, max_new_tokens=16)
    assert again["texts"] == recover.measure(twin, tokenizer, tasks, limit=4, max_new_tokens=16)["texts"]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_twin_is_planned_anew_on_the_same_weights():
    model, tokenizer = recover.load(FABLE)
    twin = recover.prune(model, tokenizer, recover.Depth(blocks=(3, 7)))
    other = twin.replan(Plan("depth", twin.plan.blocks, (5,)))
    assert (twin.closed_blocks, other.closed_blocks) == ((3, 7), (5,))
    ours, theirs, stock = (dict(each.named_parameters()) for each in (twin.model, other.model, model))
    assert all(ours[name] is theirs[name] is parameter for name, parameter in stock.items())
    fresh = recover.prune(model, tokenizer, recover.Depth(blocks=(5,)))
    ids_BT = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(other.model(input_ids=ids_BT).logits, fresh.model(input_ids=ids_BT).logits)
    with pytest.raises(ModelError, match="already belongs to a twin"):
        recover.prune(twin.model, tokenizer, recover.Depth(blocks=(5,)))


def test_what_is_missing_or_wrong_is_said():
    model, tokenizer = recover.load(FABLE)
    with pytest.raises(RecipeError, match=r"'count' needs text"):
        recover.prune(model, tokenizer, recover.Depth(count=2))
    with pytest.raises(RecipeError, match=r"recover\.load: dtype: found \"int8\""):
        recover.load(FABLE, dtype="int8")
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        recover.prun  # noqa: B018


def test_names_cost_nothing_until_they_are_used():
    code = (
        "import sys; import recover; light = 'pydantic' not in sys.modules\n"
        "recover.Depth(count=2); recover.run; import recover.run.directory; from recover import prune\n"
        "print(light, 'torch' in sys.modules, callable(recover.run), callable(prune))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "True", "True"]


def test_every_public_name_is_there_and_says_what_it_does():
    for name in recover.__all__:
        value = getattr(recover, name)
        assert (getattr(api, name) if name in recover.FUNCTIONS else value).__doc__, name
    for name in recover.FUNCTIONS:
        assert inspect.signature(getattr(recover, name)) == inspect.signature(getattr(api, name))
        assert "Raises:" in getattr(api, name).__doc__


def test_the_reference_is_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "dev"))
    import api_reference

    assert api_reference.page() == api_reference.PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_notebook_runs_and_says_what_it_says(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "dev"))
    import notebook

    cells = json.loads(notebook.PAGE.read_text(encoding="utf-8"))["cells"]
    found = list(notebook.executed(cells, tmp_path))
    assert len(found) == 8 and all(cell["outputs"] for cell, _, _ in found)
    assert [number for number, (_, _, picture) in enumerate(found) if picture] == [3]
    plan = "".join(found[2][0]["outputs"][0]["text"])
    assert found[2][1] == plan and "blocks 3, 11 dropped" in plan
    assert (tmp_path / "deploy" / "config.json").is_file()
