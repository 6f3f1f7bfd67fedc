"""What real users have, kind by kind: each input beside one that had once failed, with its right value.

Readers of files, tokenizers and templates, folders of models, numbers of a recipe, tasks: a plan says in one line what
is wrong, or takes it.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from byte_tokenizer import byte_tokenizer
from click.testing import Result
from safetensors.torch import load_file, save_file
from tiny import tiny
from typer.testing import CliRunner

from recover.cli import app
from recover.text import read
from recover.text.prompts import encode_prompt

CHAT = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TASK = 'name: qa\nkind: generate\ndata: qa.jsonl\nprompt: "{question}"\n'
TEXTS = [f"words number {number} to read again" for number in range(24)]
LINES = "".join(f"{json.dumps({'text': text})}\n" for text in TEXTS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    tiny("qwen3").save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    recipe = {
        "name": "my",
        "model": {"source": "./model"},
        "prune": {"kind": "depth", "count": 1, "calibration": {"data": "./text.jsonl", "samples": 4, "length": 32}},
        "probe": {"samples": 2, "steps": 4},
        "train": {
            "epochs": 1,
            "tokens": 300,
            "length": 64,
            "batch_size": 4,
            "data": [{"kind": "dense", "prompts": "./prompts.jsonl", "max_new_tokens": 12}],
        },
        "measure": {"tasks": ["./task.yaml"], "max_new_tokens": 8},
    }
    (folder / "my.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "text.jsonl").write_text(LINES)
    (folder / "prompts.jsonl").write_text('{"prompt": "say a word"}\n' * 24)
    (folder / "qa.jsonl").write_text('{"question": "which word?", "answer": "this"}\n' * 8)
    (folder / "task.yaml").write_text(TASK)
    return folder


@pytest.fixture
def mine(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    read.say_once.cache_clear()
    folder = Path(shutil.copytree(made, tmp_path / "user"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    return folder


def plan(folder: Path, *overrides: str) -> Result:
    arguments = ["plan", str(folder / "my.yaml"), "--untimed", "--runs", str(folder / "runs"), *overrides]
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})


def held(done: Result, said: str) -> None:
    """The plan passes where nothing is to be said; else it refuses in one line, which holds it."""
    if not said:
        assert done.exit_code == 0, done.output
        return
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.exit_code in (1, 2) and len(errors) == 1 and said in errors[0], done.output
    assert "Traceback" not in done.output


def given(source: str, **columns: str) -> str:
    return f"train.data=[{json.dumps({'kind': 'given', 'source': source, 'columns': columns or {'text': 'text'}})}]"


def sheet(between: str) -> bytes:
    return "".join(f"{text}{between}{end}\n" for end, text in [("id", "text"), *enumerate(TEXTS)]).encode()


def packed(text: str) -> bytes:
    return gzip.compress(text.encode(), mtime=0)


def table(names: list[str]) -> bytes:
    out = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays([pa.array(TEXTS)] * len(names), names=names), out)
    return out.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("crlf.jsonl", LINES.replace("\n", "\r\n").encode(), ""),
        ("bom.csv", b"\xef\xbb\xbf" + sheet(",").replace(b"\n", b"\r\n"), ""),
        ("semicolons.csv", sheet(";"), ""),
        ("tabs.csv", sheet("\t"), ""),
        ("lines.JSONL", LINES.encode(), ""),
        ("two members.jsonl.gz", packed(LINES) + packed(LINES), ""),
        ("cut.jsonl.gz", packed(LINES)[:-20], "cannot be read: Compressed file ended"),
        ("twice.jsonl", b'{"text": "one", "text": "two"}\n', "twice.jsonl:1: not JSON (the key 'text' occurs twice"),
        ("digits.jsonl", b'{"text": "one", "x": ' + b"9" * 5000 + b"}\n", "digits.jsonl:1: not JSON (a number of more"),
        ("list.json", b'[{"text": "one", "x": ' + b"9" * 5000 + b"}]\n", "list.json:1: not JSON (a number of more"),
        ("two.parquet", table(["text", "text"]), "two.parquet: cannot be read as a data set"),
        ("empty.parquet", b"", "empty.parquet: cannot be read as a data set, split 'train': Parquet file size is 0"),
        ("nul.jsonl", LINES.encode() + b"\0" * 64, "nul.jsonl:25: not JSON"),
    ],
)
def test_files_as_people_have_them(mine: Path, name: str, content: bytes, said: str) -> None:
    (mine / name).write_bytes(content)
    held(plan(mine, given(name)), said)


def test_paths_as_people_write_them(mine: Path) -> None:
    (mine / "link.jsonl").symlink_to(mine / "nowhere")
    held(plan(mine, given("link.jsonl")), f"link.jsonl: no such file: a link to {mine / 'nowhere'}, which is not there")
    held(plan(mine, given("$HOME/text.jsonl")), "variables such as $HOME are not filled in")
    held(plan(mine, given("~/text.jsonl")), "")
    (mine / "folder").mkdir()
    held(plan(mine, given("./folder")), "folder: an empty folder; expected files of rows in it")
    (mine / "folder" / "some.jsonl").write_text(LINES)
    held(plan(mine, given("./folder")), "")
    (mine / "folder" / "more.csv").write_bytes(sheet(","))
    held(plan(mine, given("./folder")), "files of several kinds (.csv, .jsonl), of which only one would be read")
    held(plan(mine, given("folder/*.jsonl")), "")


def with_template(folder: Path, template: str) -> None:
    (folder / "model" / "chat_template.jinja").write_text(template)


def chat(folder: Path, *messages: dict[str, Any], **more: Any) -> str:
    (folder / "chat.jsonl").write_text(f"{json.dumps({'messages': list(messages), **more})}\n" * 24)
    return given("chat.jsonl", messages="messages")


USER, ANSWER = {"role": "user", "content": "how?"}, {"role": "assistant", "content": "so"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "get", "arguments": "{}"}}]}


def test_a_template_writes_the_same_date_on_every_day() -> None:
    """Prompts of a run do not depend on the day on which a stage is made."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHAT
    assert tokenizer.decode(encode_prompt(tokenizer, "how?")).startswith("26 Jul 2024<user>how?")


def test_tools_beside_a_conversation_are_said(mine: Path) -> None:
    with_template(mine, CHAT)
    done = plan(mine, chat(mine, USER, ANSWER, tools=[{"name": "get"}]))
    held(done, "")
    assert "chat.jsonl: column 'tools' is not given to the chat template" in done.stderr
    read.say_once.cache_clear()
    assert "is not given" not in plan(mine, chat(mine, USER, ANSWER, tools=None)).stderr


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([USER, CALL, {"role": "tool", "content": "5"}, ANSWER], "it leaves out the call of 'get' in message 1"),
        ([{"from": "human", "value": "how?"}], "ShareGPT's form; call 'from' role and 'value' content"),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}, ANSWER], "type 'image'"),
        ([{"role": "user", "content": 5}, ANSWER], "found content 5, expected a text"),
        ([{"role": "developer", "content": "be brief"}, USER, ANSWER], ""),
    ],
)
def test_conversations_as_people_have_them(mine: Path, messages: list[dict[str, Any]], said: str) -> None:
    with_template(mine, CHAT)
    held(plan(mine, chat(mine, *messages)), said)


def test_a_template_that_is_no_text_is_named(mine: Path) -> None:
    (mine / "model" / "chat_template.jinja").write_bytes(("é" + CHAT).encode("latin-1"))
    held(plan(mine), "model/chat_template.jinja: cannot be read as UTF-8 text")


def settings(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        path = model / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return write


FULL = {"layer_types": None}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (settings("config.json", num_hidden_layers=7, **FULL), "11 tensors are missing from the weights"),
        (settings("config.json", num_hidden_layers=4, **FULL), "22 tensors belong to no part of it"),
        (settings("config.json", intermediate_size=97), "is [64, 96] in the weights, [64, 97] by config.json"),
        (tensors(lambda held: {f"_orig_mod.{name}": held[name] for name in held}), "a model inside torch.compile"),
        (tensors(lambda held: {f"module.{name}": held[name] for name in held}), "inside DistributedDataParallel"),
        (tensors(lambda held: {name.removeprefix("model."): held[name] for name in held}), ""),
        (settings("config.json", pad_token_id=300), "config.json: pad_token_id is 300, and vocab_size 256"),
        (settings("config.json", pad_token_id=-1), ""),
        (settings("config.json", dtype="float8_e4m3fn"), "config.json: dtype is 'float8_e4m3fn'; expected one of"),
        (settings("config.json", torch_dtype="auto"), ""),
        (settings("config.json", torch_dtype="float17"), "config.json: torch_dtype is 'float17'; expected one of"),
        (settings("config.json", eos_token_id=[2, 5]), ""),
        (settings("generation_config.json", eos_token_id="</s>"), "eos_token_id is '</s>'; expected one id or a list"),
        (settings("generation_config.json", eos_token_id=[2, 256]), "eos_token_id is [2, 256]; expected one id or"),
        (lambda model: (model / "generation_config.json").write_text("{"), "generation_config.json: cannot be read"),
        (lambda model: (model / "generation_config.json").write_text("[]"), "generation_config.json: found []"),
        (lambda model: (model / "generation_config.json").unlink(), ""),
    ],
)
def test_folders_of_models_as_people_have_them(mine: Path, change: Callable[[Path], None], said: str) -> None:
    """What can be known of the weights by name and size is known before any is read."""
    change(mine / "model")
    held(plan(mine), said)


def test_a_generation_config_that_ends_elsewhere_is_said(mine: Path) -> None:
    settings("generation_config.json", eos_token_id=[7, 9])(mine / "model")
    done = plan(mine)
    held(done, "")
    assert "ends texts at 7, 9, and the tokenizer's end token is '</s>' (2)" in done.stderr


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lora.rank=97", "train.lora.rank: 97 is more than the widest matrix of the model has rows, 96"),
        ("train.lora.rank=96", ""),
        ("seed=4294967296", "seed: found 4294967296: it should be less than 4294967296"),
        ("train.loss.temperature=1e-9", "train.loss.temperature: found 1e-09: it should be greater than or equal"),
        ("train.lr=1.5", "train.lr: found 1.5: expected at most 1"),
    ],
)
def test_numbers_as_people_mistype_them(mine: Path, override: str, said: str) -> None:
    held(plan(mine, override), said)


@pytest.mark.parametrize(
    ("more", "row", "said"),
    [
        ("", {"answer": None}, "qa.jsonl:1: column 'answer' holds null, expected a value"),
        ("answer: '(a+)+$'\n", {}, "answer: '(a+)+$' takes more than a second on 'aaaa' repeated"),
        ("answer: '-?\\d[\\d,]*'\n", {}, ""),
    ],
)
def test_tasks_as_people_write_them(mine: Path, more: str, row: dict[str, Any], said: str) -> None:
    (mine / "task.yaml").write_text(TASK + more)
    (mine / "qa.jsonl").write_text(f"{json.dumps({'question': 'which word?', 'answer': 'this', **row})}\n" * 8)
    held(plan(mine), said)
