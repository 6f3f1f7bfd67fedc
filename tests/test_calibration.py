"""Calibration text that the dense model writes: its own greedy answers, written once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recover.base.errors import DataError
from recover.config.recipe import load_recipe, local_path
from recover.prune.calibrate import calibration_record
from recover.run.context import RunContext, calibration
from recover.run.directory import RunDirectory
from recover.text.prompts import encode_prompt
from recover.text.read import json_lines

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
PROMPTS, ANSWER = "embedded:tasks/prompts.jsonl", 6
FIELDS = (f"data={PROMPTS}", "column=prompt", f"answer={ANSWER}", "samples=4", "length=32", "batch_size=3")


@pytest.fixture(scope="module")
def twin():
    return RunContext(load_recipe(QUICKSTART), RunDirectory(Path("/nowhere"))).dense()


@pytest.fixture
def context(tmp_path, twin):
    def of(*fields: str) -> RunContext:
        recipe = load_recipe(QUICKSTART, [f"prune.calibration.{field}" for field in (*FIELDS, *fields)])
        made = RunContext(recipe, RunDirectory(tmp_path))
        made._twin = ("dense", twin)
        return made

    return of


@torch.no_grad()
def answer_by_hand(context: RunContext, prompt: list[int]) -> list[int]:
    """A token at a time, each the likeliest after all before it, without a cache."""
    ids = [*prompt]
    while len(ids) < len(prompt) + ANSWER and (len(ids) == len(prompt) or ids[-1] != context.tokenizer.eos_token_id):
        ids.append(int(context.dense().model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids


def test_written_text_is_prompts_with_the_dense_models_greedy_answers(context):
    one = context()
    batches = calibration(one)
    assert [tuple(ids_BT.shape) for ids_BT in batches] == [(3, 32), (1, 32)]
    end = one.tokenizer.eos_token_id
    bos = [one.tokenizer.bos_token_id] if int(batches[0][0, 0]) == one.tokenizer.bos_token_id else []
    joined = [int(token) for ids_BT in batches for row in ids_BT for token in row[len(bos) :]]
    there = {row["prompt"] for _, row in json_lines(local_path(PROMPTS))}
    asked = {tuple(encode_prompt(one.tokenizer, prompt)) for prompt in there}
    documents, start = 0, 0
    while end in joined[start:]:
        stop = joined.index(end, start) + 1
        document = joined[start:stop]
        prompt = next(document[:n] for n in range(len(document), 0, -1) if tuple(document[:n]) in asked)
        expected = answer_by_hand(one, prompt)
        assert document == (expected if expected[-1] == end else [*expected, end])
        documents, start = documents + 1, stop
    assert documents >= 2
    assert calibration_record(one.recipe.prune.calibration, batches)["answer"] == ANSWER  # type: ignore[union-attr]


def test_it_is_written_once_and_anew_when_asked_for_otherwise(context, monkeypatch):
    first = calibration(context())
    assert len(list(context().directory.prune.glob("written-*.jsonl"))) == 1

    def written(*_args, **_keywords):
        raise AssertionError("written again")

    with monkeypatch.context() as patch:
        patch.setattr("recover.run.context.generate", written)
        again = calibration(context())
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
        with pytest.raises(AssertionError, match="written again"):
            calibration(context("answer=7"))


def test_without_answer_no_model_is_asked_and_a_wrong_column_is_named(context, monkeypatch):
    monkeypatch.setattr(RunContext, "dense", lambda _: pytest.fail("the model was loaded"))
    given = calibration(context("data=embedded:tasks/calibration.jsonl", "column=text", "answer=null"))
    assert sum(len(ids_BT) for ids_BT in given) == 4
    with pytest.raises(DataError, match=r"no text in column 'text', found \['prompt'\]: set calibration.column"):
        calibration(context("column=text"))
