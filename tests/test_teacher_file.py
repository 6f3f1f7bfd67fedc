"""Laws of a teacher's file: training from it is training from the teacher, and wrong rows are named."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import two_processes
from byte_tokenizer import byte_tokenizer
from pyarrow import parquet
from safetensors.torch import load_file
from test_conversation import ADDED, chatty
from tiny import tiny
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from recover.base.errors import DataError, RecipeError
from recover.commands.files import teacher_rows, write_teacher
from recover.config.recipe import GivenText, TeacherText, Train, load_recipe
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.run import stages
from recover.train.sources import read_rows, samples_of
from recover.train.teacher_file import (
    TeacherStates,
    check_teacher,
    file_row,
    marks,
    packed,
    read_teacher,
    teacher_samples,
    unpacked,
)
from recover.train.train import train

LOSS = {"kl": 1.0, "ce": 0.1}


@pytest.fixture
def folder(tmp_path):
    two_processes.write_text(tmp_path)
    return tmp_path


def source(path):
    return TeacherText(kind="teacher", source=str(path))


def given_samples(folder):
    cfg = GivenText(kind="given", source=str(folder / "given.jsonl"), columns={"prompt": "p", "completion": "c"})
    return [sample for row in read_rows(cfg.source) for sample in samples_of(row, cfg, byte_tokenizer(), 64)]


def write(folder, k):
    path = folder / f"teacher-{k}.jsonl"
    rows = teacher_rows(tiny(), given_samples(folder), k)
    path.write_text("".join(json.dumps(file_row(row)) + "\n" for row in rows))
    return path


def adapter_of(folder, name, cfg):
    twin = Twin(tiny(), Plan("depth", 6, (2, 4)))
    best = train(twin, byte_tokenizer(), cfg, folder / name, lambda epoch, _: float(epoch), seed=3)
    return load_file(best / "adapter_model.safetensors"), json.loads((best.parent / "best.json").read_text())


def test_training_from_the_whole_distribution_is_training_from_the_dense_model(folder):
    """k = V: nothing is lost but the rounding of the file."""
    path = write(folder, 256)
    exact, losses = adapter_of(folder, "exact", two_processes.cfg(folder, loss=LOSS))
    data = [{"kind": "teacher", "source": str(path)}]
    found, others = adapter_of(folder, "file", two_processes.cfg(folder, loss=LOSS, data=data))
    assert [e["loss"] for e in others["epochs"]] == pytest.approx([e["loss"] for e in losses["epochs"]], rel=1e-5)
    for name, value in found.items():
        torch.testing.assert_close(value, exact[name], rtol=0, atol=2e-4)
    few, _ = adapter_of(
        folder, "few", two_processes.cfg(folder, loss=LOSS, data=[{**data[0], "source": str(write(folder, 4))}])
    )
    assert any((few[name] - exact[name]).abs().max() > 2e-4 for name in few)


def test_rows_come_back_as_they_were_written_cut_to_length(folder):
    path, cut = write(folder, 5), 20
    rows = list(read_teacher(source(path), 256))
    samples = teacher_samples(source(path), cut, 256, byte_tokenizer(), folder)
    assert [s.ids for s in samples] == [row.sample.ids[:cut] for row in rows if sum(row.sample.mask[1:cut])]
    states = TeacherStates(source(path), folder)
    assert states.cache.missing(row.cut(cut).key for row in rows if len(row.cut(cut).top)) == set()
    for row in rows:
        top = unpacked(packed(row.top))
        assert torch.equal(top.ids_NK.long(), row.top.ids_NK) and torch.equal(top.logp_NK, row.top.logp_NK)


def test_the_file_says_what_the_model_gives(folder):
    sample = given_samples(folder)[3]
    (row,) = teacher_rows(tiny(), [sample], 7)
    with torch.no_grad():
        logp_TV = tiny()(input_ids=torch.tensor([sample.ids])).logits[0].log_softmax(-1)
    scored = [index for index, learnt in enumerate(sample.mask[1:]) if learnt]
    expected = logp_TV[scored].topk(7)
    assert torch.equal(row.top.ids_NK, expected.indices)
    torch.testing.assert_close(row.top.logp_NK, expected.values, rtol=1e-5, atol=1e-5)


def test_rows_of_the_head_that_are_no_tokens_count_as_tail(folder):
    sample = given_samples(folder)[3]
    (every,), (some,) = teacher_rows(tiny(), [sample], 256), teacher_rows(tiny(), [sample], 200, 200)
    assert some.top.ids_NK.max() < 200 and some.top.logp_NK.exp().sum(1).max() < 0.999
    order = every.top.ids_NK.argsort(1)[:, :200]
    expected = every.top.logp_NK.gather(1, order)
    torch.testing.assert_close(some.top.logp_NK.gather(1, some.top.ids_NK.argsort(1)), expected, rtol=0, atol=0)


def test_plan_reads_the_whole_file(tmp_path):
    path = tmp_path / "teacher.jsonl"
    overrides = [f"train.data=[{{kind: teacher, source: {path}}}]", "train.loss={kl: 1.0}"]
    path.write_text(json.dumps(GOOD) + "\n")
    stages.run(load_recipe(QUICKSTART, overrides), tmp_path, until="plan")
    path.write_text(json.dumps({**GOOD, "input_ids": [5, 10**6, 7]}) + "\n")
    with pytest.raises(DataError, match=r"teacher\.jsonl:1: input_ids: from 5 to 1000000, the model has 0 to"):
        stages.run(load_recipe(QUICKSTART, overrides), tmp_path, until="plan")


QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
GOOD = {"input_ids": [5, 9, 7], "completion_mask": [0, 1, 1], "top_ids": [[9, 4], [7, 2]], "top_logprobs": [[-0.1, -2.5], [-1.0, -1.5]]}  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_ids": None}, "2: no column 'top_ids'"),
        ({"top_ids": [[9, 4]]}, "one list of k for each token that completion_mask marks, but a first one (2)"),
        ({"top_ids": [[9, 4], [7]]}, "expected lists of numbers of equal lengths"),
        ({"top_ids": [[9, 4], [7, 256]]}, "top_ids: from 4 to 256, the model has 0 to 255"),
        ({"input_ids": [5, -1, 7]}, "input_ids: from -1 to 7"),
        ({"top_ids": [[9, 9], [7, 2]]}, "a token stands twice"),
        ({"top_logprobs": [[0.9, 0.1], [0.5, 0.5]]}, "natural logarithms of probabilities are at most 0"),
        ({"top_logprobs": [[-0.1, -0.1], [-1.0, -1.5]]}, "add up to 1.81"),
        ({"top_logprobs": [[-0.1, float("nan")], [-1.0, -1.5]]}, "top_logprobs: found"),
        ({"completion_mask": [0, 1]}, "completion_mask: expected 3 numbers"),
        ({"completion_mask": [0, 0, 1]}, "one list of k for each token"),
        ({"completion_mask": [0, 2, 0]}, "completion_mask: expected 3 numbers, 0 or 1"),
        ({"top_ids": [[9], [7]], "top_logprobs": [[-0.1], [-1.0]]}, "1 tokens a position, the rows before have 2"),
        ({"input_ids": "text"}, "expected lists of numbers"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(tmp_path, changes, message):
    row = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    path = tmp_path / "teacher.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError) as caught:
        check_teacher(source(path), 256, byte_tokenizer())
    assert f"{path}:2: " in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize("name", ["t.jsonl.gz", "t.ndjson", "t.json", "t.parquet"])
def test_a_file_may_be_of_any_form_that_holds_lists(tmp_path, name):
    rows = [{**GOOD, "tokenizer": marks(byte_tokenizer())}] * 3
    if name.endswith("parquet"):
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        text = json.dumps(rows) if name.endswith("json") and "nd" not in name else "\n".join(map(json.dumps, rows))
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    found = list(read_teacher(source(tmp_path / name), 256, marks(byte_tokenizer())))
    assert [row.sample.ids for row in found] == [GOOD["input_ids"]] * 3


def test_a_file_without_anything_to_learn_is_refused(tmp_path):
    path = tmp_path / "teacher.jsonl"
    with pytest.raises(DataError, match=r"teacher.jsonl: no such file"):
        check_teacher(source(path), 256, byte_tokenizer())
    path.write_text(
        json.dumps({"input_ids": [5, 9], "completion_mask": [1, 0], "top_ids": [], "top_logprobs": []}) + "\n"
    )
    with pytest.raises(DataError, match="no row holds a token to learn"):
        check_teacher(source(path), 256, byte_tokenizer())
    with pytest.raises(DataError, match=r"within train\.length 8"):
        teacher_samples(source(path), 8, 256, byte_tokenizer(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"kl": 1.0, "variance": 0.1}}, r"loss\.variance: needs the whole distribution"),
        ({"loss": {"temperature": 2.0}}, r"loss\.temperature: needs the whole"),
        ({"loss": {"scored": "all"}}, "stands alone"),
        ({"cache": {"folder": "x"}}, "stands alone"),
        ({"data": [{"kind": "teacher", "source": "x"}, {"kind": "given", "source": "y"}]}, "stands alone"),
    ],
)
def test_what_a_file_cannot_do_is_refused_by_the_recipe(changes, message):
    with pytest.raises(ValueError, match=message):
        Train.model_validate({"data": [{"kind": "teacher", "source": "x"}], **changes})


def test_any_checkpoint_writes_one(tmp_path):
    text, out = tmp_path / "text.jsonl", tmp_path / "teacher.jsonl"
    text.write_text('{"text": "Olga has 3 roses."}\n{"prompt": "1+1=", "completion": "2"}\n')
    rows, tokens = write_teacher("embedded:fable-2m", None, str(text), out, top=8, length=64, batch_size=2)
    found = list(read_teacher(source(out), 10**6))
    assert (rows, tokens) == (2, sum(len(row.top) for row in found)) and {row.top.ids_NK.shape[1] for row in found} == {
        8
    }
    with pytest.raises(RecipeError, match="--top: 1000000 tokens, the tokenizer has"):
        write_teacher("embedded:fable-2m", None, str(text), out, top=10**6, length=64, batch_size=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["teacher.jsonl", "text.jsonl"]


def changed(vocabulary=None, **fields):
    """The byte tokenizer with another vocabulary, or merges, or special tokens."""
    core = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    core["model"]["vocab"] = (vocabulary or dict)(core["model"]["vocab"])
    core["model"]["merges"] = fields.pop("merges", [])
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **fields}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)), **named)


def permuted(vocabulary):
    names = sorted(vocabulary, key=vocabulary.get)
    return {token: index for index, token in enumerate([*names[:5], *names[:4:-1]])}


def longer(vocabulary):
    """One more token, made of two letters."""
    return {**vocabulary, "th": len(vocabulary)}


@pytest.mark.parametrize(
    ("tokenizer", "differs"),
    [
        (changed(), set()),
        (changed(permuted), {"vocabulary", "splitting"}),
        (changed(longer), {"vocabulary", "splitting"}),
        (changed(longer, merges=[["t", "h"]]), {"vocabulary", "splitting"}),
        (changed(lambda tokens: {**tokens, **{f"[PAD{n}]": n for n in range(256, 260)}}), set()),
        (changed(eos_token="<s>"), {"eos"}),
        (chatty(ADDED), {"template"}),
    ],
)
def test_the_marks_of_a_tokenizer_tell_what_differs(tokenizer, differs):
    own, found = marks(byte_tokenizer()), marks(tokenizer)
    assert {name for name in own if own[name] != found[name]} == differs
    merged = marks(changed(longer, merges=[["t", "h"]]))
    assert merged["vocabulary"] == marks(changed(longer))["vocabulary"]
    assert merged["splitting"] != marks(changed(longer))["splitting"]


def taught(folder, teacher, **rows):
    """The file that `recover teacher` writes with this tokenizer, and what a reader with the byte tokenizer says."""
    model = folder / "teacher"
    tiny(vocab_size=280).save_pretrained(model)
    teacher.save_pretrained(model)
    text, out = folder / "text.jsonl", folder / "taught.jsonl"
    text.write_text(json.dumps(rows or {"text": "Olga has three roses."}) + "\n")
    write_teacher(str(model), None, str(text), out, top=4, length=64, batch_size=2)
    return out


def test_a_file_made_with_another_tokenizer_is_refused_by_plan_and_by_training(tmp_path):
    out = taught(tmp_path, changed(permuted))
    message = rf"{out}:1: made with another tokenizer: vocabulary [0-9a-f]{{12}}, the model's has [0-9a-f]{{12}}"
    with pytest.raises(DataError, match=message):
        check_teacher(source(out), 280, byte_tokenizer())
    with pytest.raises(DataError, match=message):
        teacher_samples(source(out), 64, 280, byte_tokenizer(), tmp_path)
    overrides = [f"train.data=[{{kind: teacher, source: {out}}}]", "train.loss={kl: 1.0}"]
    with pytest.raises(DataError, match=message):
        stages.run(load_recipe(QUICKSTART, overrides), tmp_path, until="plan")
    check_teacher(source(taught(tmp_path, byte_tokenizer())), 280, byte_tokenizer())


def test_two_teachers_in_one_file_are_told_apart(tmp_path):
    out = taught(tmp_path, byte_tokenizer())
    first = out.read_text()
    out.write_text(first + taught(tmp_path, changed(permuted)).read_text())
    with pytest.raises(DataError, match=r"taught\.jsonl:2: made with another tokenizer"):
        check_teacher(source(out), 280, byte_tokenizer())


CHAT = {"prompt": "Who has the ring?", "completion": "Olga."}


@pytest.mark.parametrize(
    ("teacher", "row", "said"),
    [
        (byte_tokenizer(), {}, None),
        (changed(eos_token="<s>"), {}, "eos <s>, the model's </s>."),
        (chatty(ADDED), {}, None),
        (chatty(ADDED), CHAT, ", the model's none. What is learnt"),
        (byte_tokenizer(), CHAT, None),
    ],
)
def test_another_end_or_template_is_said(tmp_path, capsys, teacher, row, said):
    out = taught(tmp_path, teacher, **row)
    capsys.readouterr()
    check_teacher(source(out), 280, byte_tokenizer())
    found = " ".join(capsys.readouterr().err.split())
    assert ("taught.jsonl: written with the model's vocabulary, but" in found) == (said is not None)
    assert said is None or said in found


def test_a_file_of_an_earlier_version_is_taken_with_a_word(tmp_path, capsys):
    path = tmp_path / "old.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD) + "\n")
    check_teacher(source(path), 256, byte_tokenizer())
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("old.jsonl: rows without the marks of their tokenizer") == 1
    path.write_text(json.dumps({**GOOD, "tokenizer": "gpt2"}) + "\n")
    with pytest.raises(DataError, match=r"old\.jsonl:1: tokenizer: found str, expected the marks"):
        check_teacher(source(path), 256, byte_tokenizer())
