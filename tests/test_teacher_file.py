"""Laws of a teacher's file: training from it is training from the teacher, and wrong rows are named."""

import json
from pathlib import Path

import pytest
import torch
import two_processes
from byte_tokenizer import byte_tokenizer
from safetensors.torch import load_file
from tiny import tiny

from recover.base.errors import DataError, RecipeError
from recover.commands.teacher import teacher_rows, write_teacher
from recover.config.recipe import GivenText, Recover, TeacherText, load_recipe
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.run import stages
from recover.train.sources import read_rows, samples_of
from recover.train.teacher_file import (
    TeacherStates,
    check_teacher,
    file_row,
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
    samples = teacher_samples(source(path), cut, 256, folder)
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
    overrides = [f"recover.data=[{{kind: teacher, source: {path}}}]", "recover.loss={kl: 1.0}"]
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
        check_teacher(source(path), 256)
    assert f"{path}:2: " in str(caught.value) and message in str(caught.value)


def test_a_file_without_anything_to_learn_is_refused(tmp_path):
    path = tmp_path / "teacher.jsonl"
    with pytest.raises(DataError, match=r"teacher.jsonl: no such file"):
        check_teacher(source(path), 256)
    path.write_text(
        json.dumps({"input_ids": [5, 9], "completion_mask": [1, 0], "top_ids": [], "top_logprobs": []}) + "\n"
    )
    with pytest.raises(DataError, match="no row holds a token to learn"):
        check_teacher(source(path), 256)
    with pytest.raises(DataError, match=r"within recover\.length 8"):
        teacher_samples(source(path), 8, 256, tmp_path)


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
        Recover.model_validate({"data": [{"kind": "teacher", "source": "x"}], **changes})


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
