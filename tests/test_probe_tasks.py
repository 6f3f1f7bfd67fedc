"""What a run says of its choice and retrieval tasks is what a diagnosis says of them, on any number of processes."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from probe_reference import CFG, differences, dropping, endless
from small_run import QUICKSTART, TEXT
from task_folder import CHOICE, make_task
from twins import removed
from words import word_tokenizer

from recover.base import dist
from recover.base.artifacts import read_json
from recover.commands import diagnose
from recover.config import recipe
from recover.config.recipe import load_recipe
from recover.measure.tasks import Task, load_task
from recover.models.load import load_model, load_tokenizer
from recover.probe.records import record_of, summary
from recover.probe.tasks import task_drift
from recover.run import stages
from recover.run.directory import RunDirectory

FABLE = recipe.Model(source="embedded:fable-2m")
DROPPED = (5, 8)
ITEMS = 3


def documents(folder: Path, **fields) -> str:
    texts = ["Olga carries 81 roses.", "Rain falls on the sea.", "A crow steals 44 buttons.", "Greta is in Lisbon."]
    rows = [
        {"query": text[:-5], "documents": texts[: 2 + number], "relevant": [0]} for number, text in enumerate(texts)
    ]
    return make_task(folder, rows[: fields.get("limit")], name="texts", kind="retrieval", length=6)


def facts(folder: Path, limit: int | None = None) -> str:
    file = recipe.embedded("tasks/facts.yaml")
    text = file.read_text().replace("facts.jsonl", str(file.with_name("facts.jsonl")))
    (folder / "facts.yaml").write_text(text + (f"\nlimit: {limit}\n" if limit else ""))
    return str(folder / "facts.yaml")


def test_a_run_says_of_its_tasks_what_a_diagnosis_says_of_the_same_items(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "few").mkdir()
    tasks = json.dumps(["embedded:stories", facts(tmp_path / "run"), documents(tmp_path / "run")])
    small = ["measure.limit=5", "measure.max_new_tokens=4", "measure.sampling=null", "probe.samples=1", "probe.steps=2"]
    prune = f"prune={{kind: depth, blocks: {list(DROPPED)}}}"
    overrides = [*TEXT, *small, prune, f"measure.tasks={tasks}", f"probe.items={ITEMS}", "probe.batch_size=3"]
    directory = stages.run(load_recipe(QUICKSTART, overrides), tmp_path / "runs", until="before")
    found = read_json(directory.before / "probe.json")
    assert [(row["task"], row["items"]) for row in found["choices"]] == [("facts", ITEMS)]
    assert [(row["task"], row["pooling"]) for row in found["retrieval"]] == [("texts", "last"), ("texts", "mean")]
    assert found["prompts"] == 1  # what a probe says of prompts stands beside it

    other = tmp_path / "deploy"
    removed(load_model(FABLE), DROPPED).save_pretrained(other)
    load_tokenizer(FABLE).save_pretrained(other)
    kept = [block for block in range(12) if block not in DROPPED]
    wanted = diagnose.Wanted(tasks=[facts(tmp_path / "few", ITEMS), documents(tmp_path / "few", limit=ITEMS)])
    expected = diagnose.diagnosis(FABLE, recipe.Model(source=str(other)), wanted, CFG, tmp_path / "out", numbers=kept)
    for kind in ("choices", "retrieval"):
        assert len(found[kind]) == len(expected[kind])
        for row, same in zip(found[kind], expected[kind], strict=True):
            assert differences(row, same, kind) == []
    assert found["choices"][0]["vocabulary"]["kl"]["mean"] > 1e-3  # not of two equal models


def tiny_tasks(folder: Path) -> list[Task]:
    asked = [{"q": f"w{n} w{n + 1}", "options": [f"w{n + 2}", f"w{n + 3} w4"], "label": n % 2} for n in range(5, 12)]
    sought = [{"query": f"w{n}", "documents": [f"w{n} w3", "w9 w8 w7", "w5"], "relevant": [0]} for n in range(10, 14)]
    written = [{"q": "w5", "answer": "w6"}]
    return [
        load_task(make_task(folder, asked, name="asked", **CHOICE)),
        load_task(make_task(folder, sought, name="sought", kind="retrieval")),
        load_task(make_task(folder, written, name="written", kind="generate", prompt="{q}")),
    ]


def records_of(tasks: list[Task], items: int | None = None) -> list[dict]:
    twin = dropping(endless())
    return [record.to_json() for record in task_drift(twin, word_tokenizer(), tasks, items=items, batch_size=4)]


def test_only_the_first_items_of_each_task_count_and_none_of_none(tmp_path):
    tasks = tiny_tasks(tmp_path)
    found = summary([record_of(each) for each in records_of(tasks)])
    assert [row["items"] for row in found["choices"]] == [7]
    assert [row["queries"] for row in found["retrieval"]] == [4, 4]
    first = [Task(task.file, task.items[:2]) for task in tasks]
    assert records_of(tasks, 2) == records_of(first) != records_of(tasks)
    assert records_of(tasks, 0) == []


def _rank(rank: int, port: int, tasks: list[Task], answers) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    dist.start()
    answers.put((rank, records_of(tasks)))
    dist.stop()


def test_two_processes_give_the_records_of_one_to_the_last_bit(tmp_path, free_port):
    context = multiprocessing.get_context("fork")
    answers, tasks = context.Queue(), tiny_tasks(tmp_path)
    ranks = [context.Process(target=_rank, args=(rank, free_port, tasks, answers)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = dict(answers.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(30)
    assert found[0] == found[1] == records_of(tasks)


@pytest.mark.parametrize(
    ("override", "stale"),
    [
        ("probe.items=7", {"plan", "before", "after"}),
        ("probe.seeds=[1]", {"plan", "before", "after"}),
        ("probe.steps=7", {"plan", "before", "after"}),
        ("measure.limit=7", {"plan", "dense", "before", "after", "deploy"}),
    ],
)
def test_a_field_of_the_probe_makes_stale_what_reads_it_and_no_training_that_does_not(tmp_path, override, stale):
    directory = RunDirectory(tmp_path)
    first, second = (load_recipe(QUICKSTART, overrides) for overrides in ([], [override]))
    prints = {name: [stages.fingerprint(name, each, directory) for each in (first, second)] for name in stages.STAGES}
    assert {name for name, (one, other) in prints.items() if one != other} == stale
