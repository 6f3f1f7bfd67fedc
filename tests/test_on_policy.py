"""Laws of the text that the pruned model writes while it learns: whose it is, how much, when; and none is lost."""

import os
import signal

import pytest
import torch
import two_processes
from byte_tokenizer import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from test_trainer import adapter, at_step, depth_twin, folder, go
from test_two_processes import assert_same_course, launched, torchrun
from tiny import tiny
from transformers import GenerationConfig, TrainerCallback
from twins import removed

from recover.base.artifacts import read_json
from recover.base.errors import DataError, StopRequested
from recover.config.recipe import PrunedText
from recover.maths.repeats import loop
from recover.train import course, trainer
from recover.train.data import build_dataset, collator, training_order
from recover.train.sources import Sample
from recover.train.trainer import RecoverTrainer
from recover.train.written_text import answered, cut_to, without_loop

__all__ = ["at_step", "folder"]  # fixtures

TOKENS = 1100


def own(folder, **changes):
    return {"tokens": TOKENS, **two_processes.own_text(folder, **changes)}


def records(folder):
    """What was written, in order."""
    return [read_json(path) for path in sorted((folder / "train/pruned_text").iterdir())]


@pytest.fixture
def caught(monkeypatch):
    """caught.steps: (step, rows of ids, of labels) of each step as trained on; caught.adapters: weights before it."""

    class Caught(TrainerCallback):
        def __init__(self):
            self.steps, self.adapters = [], []

        def on_step_begin(self, args, state, control, model=None, **_):
            trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            self.adapters.append(trained)

    catch = Caught()
    init, fetch = RecoverTrainer.__init__, RecoverTrainer.get_batch_samples

    def with_callback(trainer, *arguments, **named):
        init(trainer, *arguments, **named)
        trainer.add_callback(catch)

    def fetched(trainer, *arguments):
        batches, tokens = fetch(trainer, *arguments)
        for batch in batches:
            lengths = batch["packing"][1].diff().tolist()
            rows = (batch[name][0].split(lengths) for name in ("input_ids", "labels"))
            catch.steps.append((trainer.state.global_step, *rows))
        return batches, tokens

    monkeypatch.setattr(RecoverTrainer, "__init__", with_callback)
    monkeypatch.setattr(RecoverTrainer, "get_batch_samples", fetched)
    return catch


def stock(adapters):
    """A stock model without the dropped blocks, W + s B A in place of W (s = alpha / rank = 2)."""
    plain = tiny()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            lora = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            if f"{lora}A.default.weight" in adapters:
                parameter += 2 * adapters[f"{lora}B.default.weight"] @ adapters[f"{lora}A.default.weight"]
    return removed(plain, (2, 4))


def greedy(model, prompt, limit):
    """The model's continuation by `generate`."""
    ids_BT = torch.tensor([byte_tokenizer()(prompt)["input_ids"]])
    how = GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=2, pad_token_id=0)
    return model.generate(ids_BT, generation_config=how)[0, ids_BT.shape[1] :].tolist()


def test_each_text_is_what_the_pruned_model_writes_at_that_step(folder, caught):
    go(folder, **own(folder, temperature=0), lr=3e-2)
    found = records(folder)
    assert [record["step"] for record in found] == [0, 2, 4, 6]
    untrained = stock(caught.adapters[0])
    changed = 0
    for record in found:
        model = stock(caught.adapters[record["step"]])
        for _, prompt, ids in record["rows"]:
            assert ids == greedy(model, prompt, 12)[: len(ids)]
            changed += ids != greedy(untrained, prompt, 12)[: len(ids)]
    assert changed > 3  # else the law would hold of a model that is never asked again


def test_texts_grow_from_short_to_long(folder, caught):
    go(folder, **own(folder, temperature=0, first_new_tokens=2), lr=3e-2)
    found = records(folder)
    steps = 1 + max(step for step, *_ in caught.steps)
    assert [record["longest"] for record in found] == [round(2 + 10 * record["step"] / steps) for record in found]
    for record in found:
        model = stock(caught.adapters[record["step"]])
        for _, prompt, ids in record["rows"]:
            whole = greedy(model, prompt, record["longest"])
            assert ids == whole[: len(ids)] and len(ids) <= record["longest"]
    assert max(len(ids) for _, _, ids in found[0]["rows"]) == 2


@pytest.mark.parametrize(
    ("start", "share", "longest"), [(0, 0, 64), (0, 0.5, 160), (0, 1, 256), (0.5, 0.5, 64), (0.5, 0.75, 160)]
)
def test_the_longest_text_grows_from_its_start_to_the_end(start, share, longest):
    fields = {"kind": "pruned", "prompts": "x", "start": start, "max_new_tokens": 256}
    assert PrunedText.model_validate({**fields, "first_new_tokens": 64}).longest_at(share) == longest
    assert PrunedText.model_validate(fields).longest_at(share) == 256


def test_a_first_text_longer_than_the_longest_is_refused(folder):
    with pytest.raises(ValidationError, match="first_new_tokens: 20 is more than max_new_tokens, 12"):
        two_processes.cfg(folder, **own(folder, first_new_tokens=20))


def test_a_loop_is_learnt_up_to_where_it_goes_round_again():
    text = [9, 8, 7, *([1, 2, 3, 4] * 10)]
    assert without_loop(text) == [9, 8, 7, 1, 2, 3, 4, 1]
    assert without_loop([5] * 40) == [5, 5]
    assert without_loop([*text, 2]) == [*text, 2]  # ended: 2 is the end token
    assert without_loop([]) == []


@pytest.mark.parametrize("cut", [False, True])
def test_loops_are_cut_where_that_is_asked_for(folder, caught, monkeypatch, cut):
    """A model that writes nothing but loops, and one text that is none."""
    looped, straight = [7, 6] * 20, list(range(10, 40))
    monkeypatch.setattr(
        trainer, "write_together", lambda _m, _t, prompts, *_: [straight, *([looped] * (len(prompts) - 1))]
    )
    go(folder, **own(folder, max_new_tokens=40, cut_loops=cut))
    for record in records(folder):
        assert record["looping"] == pytest.approx(1 - 1 / len(record["rows"]))
        lengths = sorted(len(ids) for _, _, ids in record["rows"])
        assert (lengths[:-1] == [3] * (len(lengths) - 1)) == cut
        assert all(ids == [7, 6, 7] or ids == straight[: len(ids)] for _, _, ids in record["rows"]) == cut
    assert loop(looped) == (0, 2)


def test_what_was_written_is_trained_on_in_its_window(folder, caught):
    go(folder, **own(folder))
    written = {row: (record["step"], ids) for record in records(folder) for row, _, ids in record["rows"]}
    seen = 0
    for step, input_ids, labels in caught.steps:
        for position, (ids_T, labels_T) in enumerate(zip(input_ids, labels, strict=True)):
            row = 8 * step + position
            learnt = labels_T[labels_T != -100].tolist()
            assert ids_T[labels_T != -100].tolist() == learnt
            if row in written:
                assert learnt == written[row][1] and 0 <= step - written[row][0] < 2
                seen += 1
    assert seen == len(written) > 20


def test_a_step_has_its_text_on_the_device(folder, monkeypatch):
    """As from a loader: graphs record what they are given."""
    brought, prepare, begin = [], RecoverTrainer._prepare_inputs, RecoverTrainer.training_step

    def prepared(trainer, inputs):
        found = prepare(trainer, inputs)
        brought.append(found["input_ids"])
        return found

    def began(trainer, model, inputs, *rest):
        assert any(inputs["input_ids"] is each for each in brought)
        return begin(trainer, model, inputs, *rest)

    monkeypatch.setattr(RecoverTrainer, "_prepare_inputs", prepared)
    monkeypatch.setattr(RecoverTrainer, "training_step", began)
    go(folder, **own(folder))
    assert brought


def test_cross_entropy_on_its_own_text_is_refused(folder):
    with pytest.raises(ValidationError, match=r"loss\.ce: cross-entropy on text of kind 'pruned'"):
        two_processes.cfg(folder, **{**own(folder), "loss": {"ce": 0.1}})


def test_what_lies_on_disk_before_the_first_step_cannot_hold_its_own_text(folder):
    with pytest.raises(ValidationError, match=r"cache: is filled before the first step, and text of kind 'pruned'"):
        two_processes.cfg(folder, **own(folder), cache={"folder": "x"})
    changes = own(folder)
    changes["data"][0] = {"kind": "teacher", "source": "x"}
    with pytest.raises(ValidationError, match=r"text of kind 'pruned' is not in a teacher's file"):
        two_processes.cfg(folder, **changes)


def test_without_such_text_the_course_is_as_it_was():
    """The order that this seed gave before there was text with a start."""
    lengths = [(7 * i) % 11 for i in range(30)]
    expected = [4, 26, 15, 6, 3, 14, 12, 1, 9, 29, 18, 7, 27, 13, 2, 0, 5, 16, 20, 17, 28, 24, 10, 21, 19, 23, 25, 22]
    assert training_order(lengths, 3, 5) == [*expected, 11, 8]
    assert training_order(lengths, 3, 5, dict.fromkeys(range(30), 0.0)) == [*expected, 11, 8]


def test_rows_without_such_text_have_no_further_columns(folder):
    rows = build_dataset(two_processes.cfg(folder), depth_twin(), byte_tokenizer(), 3, folder / "data")
    assert set(rows.features) == {"input_ids", "completion_mask"}


@given(st.lists(st.integers(1, 40), min_size=30, max_size=90), st.integers(1, 6), st.floats(0, 0.4))
@settings(max_examples=60, deadline=None)
def test_text_begins_after_its_start_and_none_is_lost(lengths, batch_size, start):
    late = dict.fromkeys(range(0, len(lengths), 3), start)
    order = training_order(lengths, batch_size, 1, late)
    assert len(set(order)) == len(order) == len(lengths) // batch_size * batch_size
    first = min((position for position, index in enumerate(order) if index in late), default=len(order))
    assert first // batch_size >= start * (len(order) // batch_size)


def test_too_little_other_text_before_the_start_is_refused(folder):
    with pytest.raises(DataError, match="text of kind 'pruned' start earlier"):
        training_order([1] * 20, 2, 0, dict.fromkeys(range(15), 0.5))
    with pytest.raises(ValidationError, match=r"starts after 80% of the steps, and the other sources hold 50%"):
        two_processes.cfg(folder, **own(folder, start=0.8))


samples = st.builds(lambda p, a: Sample([7] * (p + a), [0] * p + [1] * a), st.integers(1, 9), st.integers(1, 30))


@given(st.lists(samples, min_size=1, max_size=12), st.integers(0, 300), st.sampled_from(["completion", "all"]))
@settings(max_examples=150, deadline=None)
def test_the_longest_answers_are_cut_to_the_budget_and_no_more_than_that(whole, budget, scored):
    cut = cut_to(whole, budget, scored)
    tokens = sum(sample.scored(scored) for sample in cut)
    lengths, before = ([sum(sample.mask) for sample in some] for some in (cut, whole))
    assert tokens <= budget or set(lengths) == {1}
    assert all(short.ids == long.ids[: len(short.ids)] for short, long in zip(cut, whole, strict=True))
    shortened = [after for after, length in zip(lengths, before, strict=True) if after < length]
    assert all(after == max(lengths) for after in shortened)
    if shortened and tokens <= budget:
        assert tokens + len(shortened) > budget  # one token more of each would have been too many


def test_tokens_are_as_planned_or_fewer(folder):
    contexts = []
    go(folder, after_epoch=lambda _, context: contexts.append(context) or 1.0, **own(folder, temperature=1.0))
    cfg = two_processes.cfg(folder, **own(folder))
    planned = build_dataset(cfg, depth_twin(), byte_tokenizer(), 3, folder / "train/data")
    scored = (collator(0, "completion")([*planned])["labels"][:, 1:] != -100).sum().item()
    missing = records(folder)[-1]["owed"]
    assert contexts[-1]["tokens"] == scored - missing and 0 <= missing < 0.1 * scored
    assert sum(planned["writer"][row] == 1 for row in range(len(planned))) > 20


def test_an_answer_that_ends_at_once_is_its_end_token():
    assert answered([5, 6], [2]).scored("completion") == 1
    batch = collator(0, "completion")([{"input_ids": [5, 6, 2], "completion_mask": [0, 0, 1]}])
    assert batch["labels"].tolist() == [[-100, -100, 2]]


def score(epoch, _context):
    return float(epoch)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The adapter and the texts of a run that was never stopped."""
    path = tmp_path_factory.mktemp("straight")
    two_processes.write_text(path)
    return adapter(go(path, **own(path), **DROPOUT)), [record["rows"] for record in records(path)]


DROPOUT = {"lora": {"rank": 4, "dropout": 0.2}, "save_steps": 3}  # its random draws must go on too


def assert_same(found, folder, straight):
    expected, texts = straight
    assert [record["rows"] for record in records(folder)] == texts
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_stopped_run_reads_its_text_and_goes_on_to_the_same_bits(folder, at_step, monkeypatch, straight):
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StopRequested):
        go(folder, **own(folder), **DROPOUT)
    monkeypatch.undo()
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "train/pruned_text").iterdir()}
    assert len(stamps) == 2
    assert_same(adapter(go(folder, **own(folder), **DROPOUT)), folder, straight)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_a_run_that_is_stopped_while_the_model_writes_goes_on_to_the_same_bits(folder, monkeypatch, straight):
    write, calls = trainer.write_together, []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(*arguments)

    monkeypatch.setattr(trainer, "write_together", stopped)
    with pytest.raises(StopRequested):
        go(folder, **own(folder), **DROPOUT)
    assert len(records(folder)) == 1 and (folder / "train/checkpoints/checkpoint-2").exists()
    assert_same(adapter(go(folder, **own(folder), **DROPOUT)), folder, straight)


def test_a_crash_is_gone_on_from_with_the_text_that_was_there(folder, at_step, monkeypatch, straight):
    def crash():
        raise MemoryError("out of memory")

    at_step(6, crash)  # the newest checkpoint is that of step 3, text is there up to step 6
    with pytest.raises(MemoryError):
        go(folder, **own(folder), **DROPOUT)
    monkeypatch.undo()
    inodes = [path.stat().st_ino for path in sorted((folder / "train/pruned_text").iterdir())]
    assert len(inodes) == 3
    assert_same(adapter(go(folder, **own(folder), **DROPOUT)), folder, straight)
    assert [path.stat().st_ino for path in sorted((folder / "train/pruned_text").iterdir())][:3] == inodes


def test_after_going_back_the_text_that_followed_is_written_anew(tmp_path, monkeypatch, capsys):
    """Step 6 is found bad once: back to the checkpoint of step 4, and the text of step 6 is another model's."""
    monkeypatch.setattr(course, "SKIPS_IN_A_ROW", 1)
    init, write, trainers, steps = RecoverTrainer.__init__, trainer.write_together, [], []

    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 5 and len(trainers) == 1 and 5 not in spoilt:
                spoilt.append(5)
                trainers[0].course.skips.found = "spoilt by this test"

    def with_callback(trainer, *arguments, **named):
        init(trainer, *arguments, **named)
        trainers.append(trainer)
        trainer.add_callback(Spoil())

    spoilt: list[int] = []
    monkeypatch.setattr(RecoverTrainer, "__init__", with_callback)
    monkeypatch.setattr(trainer, "write_together", lambda *a: steps.append(trainers[-1].state.global_step) or write(*a))
    adapters, texts = [], []
    for name in ("back", "straight"):
        path = tmp_path / name
        path.mkdir()
        two_processes.write_text(path)
        adapters.append(adapter(go(path, **own(path, every=1))))
        texts.append([record["rows"] for record in records(path)])
    assert "back to checkpoint-4" in capsys.readouterr().out
    assert steps == [0, 1, 2, 3, 4, 5, 5, 6, 0, 1, 2, 3, 4, 5, 6]
    assert texts[0] == texts[1]
    assert all(torch.equal(adapters[0][name], value) for name, value in adapters[1].items())


def test_a_training_begun_anew_does_not_read_an_earlier_ones_text(folder):
    go(folder, **own(folder))
    before = [path.stat().st_ino for path in sorted((folder / "train/pruned_text").iterdir())]
    go(folder, **own(folder), lr=3e-2)
    after = records(folder)
    assert len(after) == len(before) and len({record["fingerprint"] for record in after}) == 1


@pytest.mark.slow
def test_two_processes_write_and_learn_what_one_does(tmp_path_factory):
    alone, together = (tmp_path_factory.mktemp(name) for name in ("alone", "together"))
    for path in (alone, together):
        two_processes.write_text(path)
    expected = two_processes.run(alone, "alone", **two_processes.own_text(alone, temperature=0))
    variants = ["plain:own", "zero2:own", "zero3:own"]
    launched(torchrun(together, *variants), together)
    for variant in variants:
        assert_same_course(torch.load(together / f"{variant}.pt"), expected, steps=5)
        texts = [sorted((path / "pruned_text").iterdir()) for path in (alone / "alone", together / variant)]
        assert [read_json(path)["rows"] for path in texts[0]] == [read_json(path)["rows"] for path in texts[1]]
