"""Everything that is read is known by what it holds: a change is noticed and named, a branch of a hub is pinned."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from byte_tokenizer import byte_tokenizer
from huggingface_hub import errors
from tiny import tiny

from recover.base import hub
from recover.base.errors import DataError, ModelError
from recover.config.recipe import Model, load_recipe
from recover.models import load, source
from recover.run import stages
from recover.run.directory import RunDirectory
from recover.run.input_digests import digests, repositories
from recover.text.read import rows_at

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
OLD, NEW = "1" * 40, "2" * 40
TASK = "name: {name}\nkind: generate\ndata: '{data}'\nprompt: '{{question}}'\n{more}"


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """A folder of a user: a model folder, a data set's folder, parts behind a pattern, tasks, a package."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer_config.json", "model.safetensors", "tokenizer.model", "merges.txt"):
        (model / name).write_text("{}")
    for name in ("vocab.txt", "chat_template.jinja", "additional_chat_templates/tool.jinja", "modeling_mine.py"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("words")
    for name in ("README.md", "LICENSE.txt", ".gitattributes", "pytorch_model.bin", "DONE.json"):
        (model / name).write_text("for people")
    for name in ("set/train.jsonl", "set/deep/more.jsonl", "set/.cache/x.jsonl", "set/cache-1.arrow"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": "a", "question": "1?", "answer": "1"}) + "\n")
    for name in ("part-1.jsonl", "part-2.jsonl", "shots.jsonl", "own.jsonl", "prompts.jsonl", "given.jsonl"):
        (tmp_path / name).write_text(json.dumps({"prompt": "p", "text": "a", "question": "1?", "answer": "1"}) + "\n")
    (tmp_path / "globbed.yaml").write_text(TASK.format(name="globbed", data="part-*.jsonl", more=""))
    fewshot = "fewshot: {data: shots.jsonl, count: 1}\n"
    (tmp_path / "shots.yaml").write_text(TASK.format(name="shots", data="own.jsonl", more=fewshot))
    (tmp_path / "folder.yaml").write_text(TASK.format(name="folder", data="set", more=""))
    return tmp_path


def leaves(user: Path) -> dict[str, Any]:
    return {
        "model": {"source": str(user / "model"), "revision": None},
        "prune": {"calibration": {"data": str(user / "set")}},
        "probe": {"prompts": str(user / "prompts.jsonl")},
        "train": {
            "data": [{"kind": "given", "source": str(user / "gi*.jsonl")}],
            "cache": {"folder": str(user / "set" / "deep")},
        },
        "measure": {"tasks": [str(user / f"{name}.yaml") for name in ("globbed", "shots", "folder")]},
    }


READ = (
    *("model/config.json", "model/model.safetensors", "model/tokenizer.model", "model/merges.txt", "model/vocab.txt"),
    *("model/chat_template.jinja", "model/additional_chat_templates/tool.jinja", "model/modeling_mine.py"),
    *("set/train.jsonl", "set/deep/more.jsonl", "part-1.jsonl", "shots.jsonl", "own.jsonl", "prompts.jsonl"),
    *("given.jsonl", "globbed.yaml"),
)
NOT_READ = (
    "model/README.md",
    "model/LICENSE.txt",
    "model/.gitattributes",
    "model/pytorch_model.bin",
    "model/DONE.json",
)
LEFT = ("set/.cache/x.jsonl", "set/cache-1.arrow")


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("what", ["changed", "gone"])
def test_a_change_of_what_is_read_is_noticed_and_named(user: Path, tmp_path: Path, name: str, what: str) -> None:
    run = RunDirectory(tmp_path / "run")
    run.mark_done("dense", {"inputs": digests(leaves(user))}, {})
    assert run.stale_reason("dense", {"inputs": digests(leaves(user))}) is None
    (user / name).write_text("other words") if what == "changed" else (user / name).unlink()
    said = run.stale_reason("dense", {"inputs": digests(leaves(user))}) or ""
    path = user / name
    assert f"{path} was changed" in said if what == "changed" else f"{path} is not read any more" in said
    assert not re.search(r"[0-9a-f]{20}", said)


@pytest.mark.parametrize("name", [*NOT_READ, *LEFT])
def test_what_is_for_people_or_made_in_passing_does_not_count(user: Path, name: str) -> None:
    before = digests(leaves(user))
    (user / name).write_text("other words")
    assert digests(leaves(user)) == before and str(user / name) not in before


def test_a_new_file_behind_a_pattern_or_in_a_folder_counts(user: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.mark_done("dense", {"inputs": digests(leaves(user))}, {})
    for name in ("part-3.jsonl", "set/other.jsonl"):
        (user / name).write_text("{}\n")
    said = run.stale_reason("dense", {"inputs": digests(leaves(user))}) or ""
    assert said == f"{user / 'part-3.jsonl'} is new; {user / 'set/other.jsonl'} is new"


def test_a_file_that_was_written_again_as_it_was_is_the_same(user: Path) -> None:
    before = digests(leaves(user))
    for name in READ:
        (user / name).write_text((user / name).read_text())
    assert digests(leaves(user)) == before


def test_data_of_a_package_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lib" / "my_rows"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('not to be imported')")
    (package / "rows.jsonl").write_text("{}\n")
    task = tmp_path / "packed.yaml"
    task.write_text(TASK.format(name="packed", data="package:my_rows/rows.jsonl", more=""))
    monkeypatch.syspath_prepend(str(package.parent))
    before = digests({"measure": {"tasks": [str(task)]}})
    assert str(package / "rows.jsonl") in before
    (package / "rows.jsonl").write_text('{"a": 1}\n')
    assert digests({"measure": {"tasks": [str(task)]}}) != before


# The hub, by a stand-in for the public functions of `huggingface_hub`.


class Standin:
    """A hub with one model and one data set, whose branch moves; each read says which commit it was asked for."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders, self.head, self.reads, self.asked = folders, OLD, [], 0
        self.there = True

    def repo_info(self, name: str, *, repo_type: str, revision: str | None, timeout: float) -> Any:
        self.asked += 1
        if not self.there:
            raise OSError("Network is unreachable")
        if name not in ("org/tiny", "org/rows"):
            response: Any = SimpleNamespace(headers={}, request=None, status_code=404)
            raise errors.RepositoryNotFoundError("404", response=response)
        assert timeout <= 10 and repo_type in ("model", "dataset")
        return SimpleNamespace(sha=self.head)

    def snapshot_download(self, name: str, *, revision: str | None = None, **_: Any) -> str:
        self.reads.append(revision)
        return str(self.folders[revision or self.head])


@pytest.fixture
def standin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    folders = {}
    for commit, seed in ((OLD, 0), (NEW, 1)):
        folder = folders[commit] = tmp_path / "hub" / commit
        tiny("llama", seed=seed).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    found = Standin(folders)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(repo_info=found.repo_info))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: SimpleNamespace(repos=frozenset()))
    hub.forget()
    yield found
    hub.forget()


def test_a_model_is_read_from_one_commit_whatever_the_branch_does(standin: Standin) -> None:
    cfg = Model(source="org/tiny")
    assert source.locate(cfg).name == OLD
    standin.head = NEW
    assert source.locate(cfg).name == OLD and standin.reads == [OLD, OLD] and standin.asked == 1
    assert hub.pinned() == {"model org/tiny@default": OLD}


def test_a_tokenizer_of_another_repository_has_a_commit_of_its_own(standin: Standin) -> None:
    cfg = Model(source="org/other", revision="v1", tokenizer="org/tiny")
    load.load_tokenizer(cfg)
    assert standin.reads == [OLD] and hub.pinned() == {"model org/tiny@default": OLD}


def test_a_commit_that_is_named_is_asked_of_nobody(standin: Standin) -> None:
    assert source.locate(Model(source="org/tiny", revision=NEW)).name == NEW
    assert standin.asked == 0


def test_a_run_goes_on_with_the_commit_it_began_with(standin: Standin, tmp_path: Path, capsys) -> None:
    recipe = load_recipe(QUICKSTART, ["model.source=org/tiny"])
    run = RunDirectory(tmp_path / "run")
    with run.lock():
        stages.pin(recipe, run, anew=False)
        stages.note_commits(run)
    marks = digests({"model": {"source": "org/tiny", "revision": None}})
    assert marks == {"model org/tiny@default": OLD} and run.commits_on_record() == marks
    run.mark_done("dense", {"inputs": marks}, {})
    standin.head = NEW
    stages.pin(recipe, run, anew=False)
    assert hub.pinned() == marks
    said = " ".join(capsys.readouterr().err.split())
    assert "has moved on to commit 222222222222; this run stays with 111111111111" in said and "--fresh" in said
    stages.pin(recipe, run, anew=True)
    assert hub.pinned() == {"model org/tiny@default": NEW}
    now = digests({"model": {"source": "org/tiny", "revision": None}})
    assert run.stale_reason("dense", {"inputs": now}) == ("model org/tiny@default: commit 111111111111 -> 222222222222")


def test_a_run_without_a_network_goes_on_with_what_it_has_on_record(standin: Standin, tmp_path: Path) -> None:
    recipe, run = load_recipe(QUICKSTART, ["model.source=org/tiny"]), RunDirectory(tmp_path / "run")
    with run.lock():
        stages.pin(recipe, run, anew=False)
        stages.note_commits(run)
    standin.there = False
    stages.pin(recipe, run, anew=False)
    assert source.locate(recipe.model).name == OLD


def test_a_data_set_is_read_from_one_commit(standin: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, subset: str | None, *, split: str, revision: str | None) -> Any:
        asked.append((name, revision))
        return datasets.Dataset.from_list([{"text": "a"}])

    class Json:  # as the reader of `datasets` that the hub's files ask for
        __module__ = "datasets.packaged_modules.json.json"
        config = SimpleNamespace(data_files=None)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, revision: Json() if revision == OLD else None)
    assert rows_at("org/rows")[0].value == {"text": "a"}
    standin.head = NEW
    assert len(rows_at("org/rows")) == 1 and asked == [("org/rows", OLD)] * 2


def test_repositories_of_a_recipe_are_all_found(user: Path) -> None:
    (user / "far.yaml").write_text(TASK.format(name="far", data="org/rows", more="fewshot: {data: org/shots}\n"))
    recipe = leaves(user)
    recipe["model"] = {"source": "org/tiny", "tokenizer": "org/words", "revision": "v2"}
    recipe["prune"]["calibration"]["data"] = "wikitext"
    recipe["train"]["data"].append({"kind": "dense", "prompts": "org/asked"})
    recipe["measure"]["tasks"].append(str(user / "far.yaml"))
    found = sorted(map(str, repositories(recipe)))
    assert found == [
        *("dataset org/asked@default", "dataset org/rows@default", "dataset org/shots@default"),
        *("dataset wikitext@default", "model org/tiny@v2", "model org/words@default"),
    ]
    assert repositories(load_recipe(QUICKSTART).model_dump(mode="json")) == []


@pytest.mark.parametrize(
    ("name", "there", "said"),
    [
        ("org/tini", True, "the hub has no model 'org/tini', or shows it to its members only: check the name"),
        (
            "org/tiny",
            False,
            r"be reached \(OSError: Network is unreachable\), and no copy of it is in the cache",
        ),
        ("mine/model-7", True, r"no folder of this name is here \(there is 'mine/model_7'\)"),
        ("a/b/c", True, "no such folder or .gguf file, and not a hub id"),
        ("what is this", True, "no such folder or .gguf file, and not a hub id"),
        ("mine/modle_7/", True, "no such folder or .gguf file .there is 'mine/model_7'., and not a hub id"),
    ],
)
def test_a_wrong_name_of_a_model_is_refused_at_once_in_our_words(
    standin: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, there: bool, said: str
) -> None:
    (tmp_path / "mine" / "model_7").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    standin.there = there
    for read in (load.describe, load.load_tokenizer, load.load_model):
        before = time.monotonic()
        with pytest.raises(ModelError, match=said):
            read(Model(source=name))
        assert time.monotonic() - before < 3
    assert standin.asked <= 1 and standin.reads == []


@pytest.mark.parametrize(("name", "there"), [("org/row", True), ("org/rows", False), ("my rows", True), ("a--b", True)])
def test_a_wrong_name_of_data_is_refused_at_once_in_our_words(standin: Standin, name: str, there: bool) -> None:
    standin.there = there
    with pytest.raises(DataError, match="neither a local file nor a data set that can be had") as error:
        rows_at(name)
    assert name in str(error.value) and standin.asked <= 1


def test_without_a_network_the_copy_in_the_cache_is_taken(standin: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(commit: str, refs: list[str], changed: float) -> Any:
        return SimpleNamespace(commit_hash=commit, refs=frozenset(refs), last_modified=changed)

    def cache(*revisions: Any) -> Callable[[], Any]:
        repository = SimpleNamespace(repo_type="model", repo_id="org/tiny", revisions=revisions)
        return lambda: SimpleNamespace(repos=(repository,))

    standin.there = False
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", cache(copy(OLD, ["main"], 1.0), copy(NEW, [], 2.0)))
    assert hub.commit(hub.Repository("model", "org/tiny")) == OLD
    hub.forget()
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", cache(copy(OLD, [], 1.0), copy(NEW, [], 2.0)))
    assert hub.commit(hub.Repository("model", "org/tiny")) == NEW
    with pytest.raises(hub.NoCommit, match="cannot be reached"):
        hub.commit(hub.Repository("model", "org/tiny", "v9"))


def test_the_real_hub_out_of_reach_is_said_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    hub.forget()
    before = time.monotonic()
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        load.describe(Model(source="nobody/such-model-is-here"))
    assert time.monotonic() - before < 8
