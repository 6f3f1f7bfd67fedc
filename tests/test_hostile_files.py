"""Files that a stranger made to stop, fill or mislead the program; an attack on it found each of them."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import byte_tokenizer
from task_folder import GENERATE, make_task

from recover.base.errors import DataError, ModelError, RecipeError, RecoverError
from recover.config import recipe, yaml_values
from recover.config.recipe import Calibration, Model, TeacherText, load_recipe
from recover.export import write
from recover.measure.tasks import load_task
from recover.models import tokenizers
from recover.models.load import describe, load_tokenizer
from recover.models.source import check_weights, locate
from recover.prune.calibrate import read_texts
from recover.run.input_digests import digests
from recover.text.prompts import ids_of
from recover.text.read import matching, rows_at
from recover.text.rows import filled
from recover.train.teacher_file import read_teacher


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(recipe.embedded("fable-2m"), tmp_path / "model"))


def tokenizer_with(folder: Path, **parts: Any) -> Model:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    return Model(source=str(folder))


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(parts)}


TWICE = replace({"String": "a"}, "aa")
GROWING: dict[str, dict[str, Any]] = {
    "a letter becomes eight, thirty times": {"normalizer": sequence(*[TWICE] * 30)},
    "sequences within one another": {"normalizer": sequence(*[sequence(*[TWICE] * 3)] * 10)},
    "nothing becomes eight letters": {"normalizer": sequence(*[replace({"String": ""}, "a" * 8)] * 3)},
    "a pattern": {"normalizer": sequence(*[replace({"Regex": "."}, "a" * 7)] * 3)},
    "bytes of bytes": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 9}},
    "a million letters before each text": {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
    "ten thousand tokens around each text": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 10**4,
            "pair": [],
            "special_tokens": {},
        }
    },
    "a token that stands for ten thousand": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1] * 10**4, "tokens": ["<s>"] * 10**4}},
        }
    },
    "a thousand parts": {"normalizer": sequence(*[{"type": "NFC"}] * 1000)},
    "texts that are decoded": {"decoder": {"type": "Sequence", "decoders": [TWICE] * 30}},
}


@pytest.mark.parametrize("what", GROWING)
def test_a_tokenizer_that_writes_without_end_is_refused_before_it_is_built(folder: Path, what: str) -> None:
    cfg = tokenizer_with(folder, **GROWING[what])
    with pytest.raises(
        ModelError, match=r"tokenizer\.json: its (normalizer|pre_tokenizer|post_processor|decoder) makes"
    ):
        load_tokenizer(cfg)


def test_the_parts_that_tokenizers_have_are_taken(folder: Path) -> None:
    parts = [{"type": "NFKC"}, {"type": "Lowercase"}, replace({"Regex": " {2,}"}, "▁"), replace({"String": " "}, "▁")]
    tokenizer_with(folder, normalizer=sequence(*parts, {"type": "Prepend", "prepend": "▁"}))
    tokenizers.check_parts(folder)


def test_ids_far_apart_are_refused_before_a_library_counts_up_to_them(folder: Path) -> None:
    cfg = tokenizer_with(folder)
    found = json.loads((folder / "tokenizer.json").read_text())
    tokens = len(found["model"]["vocab"])
    found["model"]["vocab"]["far"] = tokens + tokenizers.MOST_HOLES
    (folder / "tokenizer.json").write_text(json.dumps(found))
    tokenizers.check_parts(folder)  # as many as may be
    found["model"]["vocab"]["far"] = 2**30
    (folder / "tokenizer.json").write_text(json.dumps(found))
    with pytest.raises(ModelError, match=r"tokenizer\.json: .* tokens have ids up to 1,073,741,824, which leaves"):
        load_tokenizer(cfg)
    tokenizer_with(folder)
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 2**30}))
    with pytest.raises(ModelError, match=r"vocab\.json: 2 tokens have ids up to 1,073,741,824"):
        load_tokenizer(cfg)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_a_million_added_tokens_are_counted_before_a_library_takes_minutes_for_them(folder: Path, name: str) -> None:
    by_id = {str(number): {"content": f"<{number}>"} for number in range(300_000)}
    added = {
        "tokenizer.json": {"added_tokens": [*by_id.values()]},
        "tokenizer_config.json": {"added_tokens_decoder": by_id},
        "added_tokens.json": by_id,
    }
    (folder / name).write_text(json.dumps(added[name]))
    with pytest.raises(ModelError, match=rf"{name}: adds 300,000 tokens .* at most 131,072"):
        load_tokenizer(Model(source=str(folder)))


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(?:a|aa)+$", r"(\w+\s?)+$"])
def test_a_pattern_that_backtracks_is_refused_when_the_tokenizer_is_loaded(folder: Path, pattern: str) -> None:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    with pytest.raises(ModelError, match=r"tokenizer"):
        load_tokenizer(tokenizer_with(folder, pre_tokenizer=split))


class PanicException(BaseException):
    """As a library in Rust raises it."""


def test_a_tokenizer_that_gives_up_on_a_text_is_told_by_the_text() -> None:
    tokenizer: Any = byte_tokenizer()

    def gives_up(*_: object, **__: object) -> None:
        raise PanicException("retry-limit-in-match over")

    class Stubborn(type(tokenizer)):
        __call__ = gives_up

    tokenizer.__class__ = Stubborn
    with pytest.raises(DataError, match=r"the text 'Olga' \(4 characters\): the tokenizer gives up \(retry-limit"):
        ids_of(tokenizer, "Olga", special=False)


@pytest.mark.parametrize("name", ["my_config.json", "xconfig.json", "hf_quant_config.json"])
def test_settings_that_nobody_reads_are_not_opened(folder: Path, name: str) -> None:
    os.mkfifo(folder / name)
    thread = threading.Thread(target=lambda: locate(Model(source=str(folder))), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "waits for a pipe"


def test_a_list_of_weights_that_lists_none_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ModelError, match=r"index\.json: has no 'weight_map'"):
        check_weights(locate(Model(source=str(folder))))


LETTERS = "abcdefghijklmnop"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{after}: &{after} [{','.join(['*' + letter] * 9)}]\n" for letter, after in itertools.pairwise(LETTERS)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{after}: &{after} {{<<: [{','.join(['*' + letter] * 9)}]}}\n" for letter, after in itertools.pairwise(LETTERS)
)


@pytest.mark.parametrize("text", [BOMB, MERGES])
def test_aliases_that_stand_for_billions_are_refused_wherever_yaml_is_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text + "name: *p\ndata: d.jsonl\n")
    said = r"aliases stand for [\d,]+ values, where \d+ are written; expected at most 10,000 more"
    for read in (lambda: load_recipe(path, []), lambda: load_task(str(path))):
        with pytest.raises(RecipeError, match=said):
            read()
    assert digests({"measure": {"tasks": [str(path)]}}).keys() == {str(path)}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{text}license: mit\n---\n")
    assert write._said(write._card_of(Model(source=str(folder)), "folder")) == {}


def test_a_message_has_an_end_however_many_fields_are_wrong(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(f"name: x\nmodel: {{source: a}}\nrecover: {{data: [{', '.join('a' * 200)}]}}\n")
    with pytest.raises(RecipeError, match=r"x\.yaml: \d+ more such fields") as raised:
        load_recipe(tmp_path / "x.yaml", [])
    assert len(str(raised.value).splitlines()) == 21


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", "? &a [*a]\n: 1", "a: &a [1, [2, *a]]"])
def test_an_alias_of_what_it_is_in_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"x:1:\d+: an alias stands for what it is a part of"):
        yaml_values.load(text, "x")


def test_aliases_that_people_write_are_taken() -> None:
    text = "base: &b {x: 1, y: [1, 2]}\none: *b\ntwo: {<<: *b, x: 2}\n"
    assert yaml_values.load(text, "x")["two"] == {"x": 2, "y": [1, 2]}
    assert yaml_values.load("", "x") is None


def test_yaml_is_a_file_of_the_size_that_people_write(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "large.yaml").write_text("#" * (2**22 + 1))
    for path, said in (
        (tmp_path / "pipe.yaml", r"pipe\.yaml: is a pipe or device; expected a YAML file"),
        (Path("/dev/zero"), r"/dev/zero: is a pipe or device"),
        (tmp_path / "large.yaml", r"large\.yaml: 4,194,305 bytes; expected at most 4,194,304"),
    ):
        with pytest.raises(RecipeError, match=said):
            yaml_values.read(path)


def test_a_pattern_of_a_task_that_nests_too_deep_is_refused(tmp_path: Path) -> None:
    path = make_task(tmp_path, [{"q": "a", "answer": "1"}], **{**GENERATE, "answer": "(" * 500 + "a" + ")" * 500})
    with pytest.raises(RecipeError, match="not a regular expression"):
        load_task(path)


def test_a_prompt_that_a_row_fills_without_end_is_refused() -> None:
    with pytest.raises(DataError, match=r"d:1: prompt .* takes more than 33,554,432 characters of this row"):
        filled("{q}" * 10_000, {"q": "a" * 10_000}, "d:1")
    assert filled("{q} " * 1000, {"q": "ab"}, "d:1") == "ab " * 1000


def test_a_folder_that_may_not_be_looked_through_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> Any:
        raise PermissionError(13, "Permission denied", "/x/y")

    monkeypatch.setattr(Path, "glob", denied)
    with pytest.raises(DataError, match=r"\*\.jsonl: cannot look for its files: /x/y: Permission denied"):
        matching(tmp_path / "**" / "*.jsonl")


ROW = {"input_ids": [1, 5, 9, 7], "completion_mask": [0, 1, 0, 1], "top_ids": [[5, 4], [7, 3]]}
UNEQUAL: list[tuple[dict[str, Any], Callable[[list[Any]], Any]]] = [
    ({"top_ids": []}, lambda found: found),
    ({}, lambda _: []),
    ({"top_ids": [[], []]}, lambda found: found),
    ({}, lambda _: 0.5),
    ({"top_ids": []}, lambda _: [[]]),
]


@pytest.mark.parametrize(("change", "logprobs"), UNEQUAL)
def test_lists_of_a_teacher_that_do_not_belong_together(
    tmp_path: Path, change: dict[str, Any], logprobs: Callable[[list[Any]], Any]
) -> None:
    path = tmp_path / "teacher.jsonl"
    found = logprobs([[-0.1, -3.0], [-0.5, -1.5]])
    path.write_text(json.dumps(ROW | change | {"top_logprobs": found}))
    with pytest.raises(DataError, match=r"teacher\.jsonl:1: (top_ids and top_logprobs have shapes|expected)"):
        list(read_teacher(TeacherText(kind="teacher", source=str(path)), 64))


LONG = "a" * 5000
NAMES = {
    "long": LONG,
    "a long table": f"{LONG}.parquet",
    "a long model": f"{LONG}.gguf",
    "a long recipe": f"{LONG}.yaml",
    "many folders": "/" + "a/" * 4000,
    "a zero": "a\0b",
    "half a letter": "\ud800.jsonl",
    "stars": "*" * 300,
    "stars in a name": "x/**a/*.jsonl",
}
READERS: dict[str, Callable[[str], object]] = {
    "a model": lambda name: locate(Model(source=name)),
    "its config": lambda name: describe(Model(source=name)),
    "a tokenizer": lambda name: load_tokenizer(Model(source="embedded:fable-2m", tokenizer=name)),
    "a task": load_task,
    "rows": rows_at,
    "texts": lambda name: read_texts(Calibration(data=name)),
    "a recipe": load_recipe,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_no_file_can_have_is_that_of_no_file(name: str, reader: str) -> None:
    with pytest.raises(RecoverError) as raised:
        READERS[reader](NAMES[name])
    assert len(str(raised.value)) < 5000
    digests({"model": {"source": NAMES[name]}, "measure": {"tasks": [NAMES[name]]}})
