"""Any two models as a pair: what is refused by name, and texts drawn, texts given, batches kept and found again."""

from __future__ import annotations

import copy
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from probe_reference import (
    CFG,
    DROPPED,
    NO_TOKENIZER,
    STEPS,
    differences,
    dropping,
    endless,
    of,
    prompts,
    read,
    textbook_kl,
)
from tiny import ids
from torch import nn
from twins import removed

from recover.base import dist
from recover.base.errors import DataError, ModelError
from recover.config import recipe
from recover.maths import divergence as spaces
from recover.probe import probe as probing
from recover.probe.probe import Store, findings, positions_of, probe, records_of, texts
from recover.probe.records import Block, Final, Identity, Sampled, Step, Sublayer, summary
from recover.probe.trajectory import batches_of, sampled
from recover.probe.views import Lens, Pair, View

FABLE = recipe.Model(source="embedded:fable-2m")
KEPT = [number for number in range(6) if number not in DROPPED]


def pair_of(dense=None) -> Pair:
    dense = dense or endless()
    return Pair.of_models(dense, removed(dense, DROPPED), KEPT)


# Pairs


def test_a_pair_of_two_models_of_different_depth_gives_what_the_twin_gives():
    dense = endless()
    expected = probe(dropping(copy.deepcopy(dense)), NO_TOKENIZER, prompts(), CFG)
    found = probe(pair_of(dense), NO_TOKENIZER, prompts(), CFG)
    expected = [r for r in expected if not (isinstance(r, Block) and r.closed)]
    for record, other in zip(found, expected, strict=True):
        if not isinstance(record, Identity):
            assert differences(record.to_json(), other.to_json(), record.probe) == []


@pytest.mark.parametrize("numbers", [[0, 1, 3], [0, 1, 3, 6], [0, 3, 1, 5], [0, 1, 1, 5]])
def test_a_mapping_that_does_not_fit_is_refused(numbers):
    with pytest.raises(ModelError, match=r"the mapping .* does not fit: expected 4 numbers"):
        Pair.of_models(endless(), removed(endless(), DROPPED), numbers)


def test_two_depths_without_a_mapping_are_refused():
    with pytest.raises(ModelError, match="the dense model has 6 blocks, the other one 4: say which 4"):
        Pair.of_models(endless(), removed(endless(), DROPPED))


def test_models_of_two_widths_are_compared_where_they_can_be():
    """One vocabulary is enough for logits and probabilities; hidden states have nothing in common."""
    dense, other = endless(), endless(hidden_size=48, head_dim=16)
    pair = Pair.of_models(dense, other)
    records = probe(pair, NO_TOKENIZER, prompts(), CFG)
    assert not of(records, Block) and not of(records, Sublayer)
    final = of(records, Final)[1].metrics
    assert "embedding" not in final and final["kl"]["mean"] > 0 and final["logit"]["mean"] > 0
    assert len(of(records, Step)) == STEPS and summary(records)["blocks"] == []


def test_a_prompt_too_long_for_the_other_model_alone_is_refused():
    other = endless(max_position_embeddings=64)
    said = r"prompt 1 has 60 tokens; with probe\.steps 8 that is more than the 64 positions"
    with pytest.raises(DataError, match=said):
        probe(Pair.of_models(endless(), other), NO_TOKENIZER, [[5] * 9, [5] * 60], CFG)


def test_a_quantized_head_is_read_by_its_own_kernel():
    class Int8Head(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            scale = linear.weight.abs().max() / 127
            self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
            self.scale = scale

        def forward(self, h):
            return h @ (self.weight.float() * self.scale).T

    model = endless()
    model.lm_head = Int8Head(model.lm_head)
    lens = Lens(View.of_model("quantized", model))
    h_ND = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert lens.vocabulary == 256 and torch.equal(lens.logits(h_ND), model.lm_head(h_ND))
    final = of(probe(Pair.of_models(endless(), model), NO_TOKENIZER, prompts(2), CFG), Final)[1]
    assert 0 < final.metrics["kl"]["mean"] < 1


def test_predictions_stand_beside_the_truth_with_their_errors():
    records = probe(pair_of(), NO_TOKENIZER, prompts(), CFG)
    columns = positions_of(findings(pair_of(), NO_TOKENIZER, prompts(), CFG))
    metrics = of(records, Final)[1].metrics
    for name in ("embedding", "logit", "probability", "kl"):
        predicted_N, exact_N = (torch.tensor(columns[key], dtype=torch.float64) for key in (f"{name}_predicted", name))
        error = predicted_N - exact_N
        assert metrics[f"{name}_error"]["max"] == pytest.approx(error.max().item())
    assert len(columns["prompt"]) == of(records, Final)[0].positions == len(columns["kl@2.0"])
    assert not any(name.startswith("embedding@") for name in columns)


# Sampled texts


def test_equal_models_write_equal_texts_from_every_seed_and_seeds_differ():
    dense = endless()
    cfg = CFG.model_copy(update={"seeds": (0, 1)})
    first, second = of(probe(Pair.of_models(dense, copy.deepcopy(dense)), NO_TOKENIZER, prompts(), cfg), Sampled)
    for record in (first, second):
        assert record.never == 1 and set(record.free_running["gap"].values()) == {0.0}
        assert record.teacher_forced["kl"]["max"] == record.free_running["kl"]["max"] == 0
    view = Pair.of(dropping(dense)).dense
    batch = batches_of(prompts(), view, size=5, steps=STEPS)[0]
    drawn = [sampled(view, batch, steps=STEPS, ends=[], seed=seed).tokens() for seed in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]


def test_sampled_texts_do_not_depend_on_batches():
    view = Pair.of(dropping(endless())).dense
    alone, together = (
        [
            row
            for batch in batches_of(prompts(), view, size=size, steps=STEPS)
            for row in sampled(view, batch, steps=STEPS, ends=[], seed=3).tokens()
        ]
        for size in (1, 5)
    )
    assert alone == together


def test_sampled_tokens_are_drawn_from_the_softmax():
    """One position, many prompt numbers: frequencies against probabilities."""
    model = endless(vocab_size=8, initializer_range=0.3)
    view = View.of_model("dense", model)
    batch = batches_of([[5, 6]] * 2000, view, size=2000, steps=1)[0]
    drawn = torch.tensor(sampled(view, batch, steps=1, ends=[], seed=0).tokens()).flatten()
    with torch.no_grad():
        p = model(torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    assert torch.bincount(drawn, minlength=8) / 2000 == pytest.approx(p, abs=0.04)


def test_sampled_drift_before_the_first_difference_is_teacher_forced_drift():
    cfg = CFG.model_copy(update={"seeds": (0,), "samples": 1, "temperatures": (1.0,)})
    parted = set()
    for prompt in prompts(6):
        record = of(probe(dropping(endless(initializer_range=0.04), (3,)), NO_TOKENIZER, [prompt], cfg), Sampled)[0]
        first = record.first["max"]
        parted.add(first)
        for row in record.steps[: None if first is None else int(first) + 1]:
            forced = row["teacher_forced"]["kl"]["max"]
            assert row["free_running"]["total"]["max"] == pytest.approx(forced, rel=1e-3)
    assert len(parted) > 1


# Given texts


def test_drift_along_given_texts_is_the_textbook_text_by_text():
    dense = endless()
    rows = [ids(1, length, seed=length)[0].tolist() for length in (5, 12, 2)]
    pruned = removed(dense, DROPPED)
    records = records_of(pair_of(dense), texts(Pair.of_models(dense, pruned, KEPT), rows, CFG))
    kl = torch.cat(
        [textbook_kl(*(read(model, row[:1], torch.tensor(row[1:]))[0] for model in (dense, pruned))) for row in rows]
    )
    final = next(record for record in of(records, Final) if record.temperature == 1)
    assert final.positions == len(kl) == 16 and final.prompts == 3
    assert final.metrics["kl"] == pytest.approx(spaces.quantiles(kl), rel=1e-4)
    assert {record.probe for record in records} == {"final", "block", "sublayer"}
    for bad, message in (([], "no texts"), ([[5, 6], [5]], "text 1 has less than two"), ([[5] * 300], "256 positions")):
        with pytest.raises(DataError, match=message):
            texts(pair_of(dense), bad, CFG)


# Batches on disk


def test_a_probe_that_was_stopped_goes_on_and_gives_the_same_to_the_last_bit(tmp_path, monkeypatch):
    cfg = CFG.model_copy(update={"seeds": (4,)})
    pair = pair_of()
    expected = [record.to_json() for record in probe(pair, NO_TOKENIZER, prompts(), cfg)]
    real, done = probing._examine, []

    def stop_at_the_last(comparison, batch, *rest):
        if 4 in batch.prompts and len(done) < 3:
            done.append("stopped")
            raise KeyboardInterrupt
        done.append(batch.prompts)
        return real(comparison, batch, *rest)

    monkeypatch.setattr(probing, "_examine", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        findings(pair, NO_TOKENIZER, prompts(), cfg, store=Store(tmp_path, {"of": "a"}))
    found = findings(pair, NO_TOKENIZER, prompts(), cfg, store=Store(tmp_path, {"of": "a"}))
    assert done == [(0, 1), (2, 3), "stopped", (4,)]
    assert [record.to_json() for record in records_of(pair, found)] == expected


def test_batches_of_another_probe_and_torn_ones_are_done_again(tmp_path, capsys):
    pair = pair_of()
    expected = findings(pair, NO_TOKENIZER, prompts(), CFG, store=Store(tmp_path, {"of": "a"}))
    batch = sorted(tmp_path.glob("batch-*.pt"))[1]
    batch.write_bytes(batch.read_bytes()[:100])
    again = findings(pair, NO_TOKENIZER, prompts(), CFG, store=Store(tmp_path, {"of": "a"}))
    assert [r.to_json() for r in records_of(pair, again)] == [r.to_json() for r in records_of(pair, expected)]
    assert "this batch is done again" in capsys.readouterr().err
    Store(tmp_path, {"of": "b"})
    assert not list(tmp_path.glob("batch-*.pt")) and "of changed" in capsys.readouterr().err


def _rank(rank: int, port: int, folder: Path, answers) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    dist.start()
    cfg = CFG.model_copy(update={"seeds": (4,)})
    pair = pair_of()
    found = findings(pair, NO_TOKENIZER, prompts(), cfg, store=Store(folder, {"of": "a"}))
    answers.put([record.to_json() for record in records_of(pair, found)])
    dist.stop()


def test_two_processes_keep_batches_that_one_goes_on_with_to_the_last_bit(tmp_path, monkeypatch, free_port):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, free_port, tmp_path, answers)) for rank in range(2)]
    for process in ranks:
        process.start()
    first, second = (answers.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(30)
    cfg = CFG.model_copy(update={"seeds": (4,)})
    pair = pair_of()
    expected = [record.to_json() for record in probe(pair, NO_TOKENIZER, prompts(), cfg)]
    assert first == second == expected
    monkeypatch.setattr(probing, "_examine", lambda *_: pytest.fail("a batch was done twice"))
    found = findings(pair, NO_TOKENIZER, prompts(), cfg, store=Store(tmp_path, {"of": "a"}))
    assert [record.to_json() for record in records_of(pair, found)] == expected
