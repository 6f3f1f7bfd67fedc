"""A loss term that is registered from outside: recipe, both ways to compute, training, log and report take it."""

from __future__ import annotations

import pytest
import torch
import two_processes
from byte_tokenizer import byte_tokenizer
from test_loss import relative, states
from test_report_curve import a_run, drawn
from tiny import tiny

from recover.base.artifacts import read_jsonl
from recover.config.loss import TERMS, LossTerm, register
from recover.config.recipe import Loss, Train
from recover.distill.loss import distillation_loss, with_others
from recover.distill.loss_terms import FUSED, computed, loss_terms, rows
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.report.training import curve
from recover.train.train import train

HELLINGER = LossTerm("hellinger", "Hellinger", "test_loss_term:hellinger", style="line dashed")


def hellinger(chunk, weights):
    """1 - sum sqrt(p q) per token, the squared Hellinger distance."""
    root_CV = (chunk.p_CV * chunk.q_CV).sqrt()
    alike_C1 = root_CV.sum(-1, keepdim=True)
    return 1 - alike_C1.squeeze(-1), lambda weight: (0.5 * weight) * (chunk.q_CV * alike_C1 - root_CV)


@pytest.fixture
def term():
    yield register(HELLINGER)
    del TERMS["hellinger"]


def textbook(pruned, dense, head, t):
    p, q = ((h @ head.T / t).softmax(-1) for h in (dense, pruned))
    return (1 - (p * q).sqrt().sum(-1)).sum(), (p * (p / q).log()).sum()


@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_it_adds_its_value_and_its_gradient(term, t, kl):
    pruned, dense, head, _, _ = states()
    ours_h, truth_h = pruned.clone().requires_grad_(), pruned.clone().requires_grad_()
    weights = Loss(kl=kl, terms={"hellinger": 0.7}, temperature=t)
    ours = distillation_loss(ours_h, dense, head, weights, chunk=7)
    value, divergence = textbook(truth_h, dense, head, t)
    truth = t * t * (0.7 * value + kl * divergence)
    torch.testing.assert_close(ours.terms["hellinger"], value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.total, truth, rtol=1e-10, atol=1e-10)
    found, expected = (torch.autograd.grad(*pair)[0] for pair in ((ours.total, ours_h), (truth, truth_h)))
    assert relative(found, expected) < 1e-10


def fused(y, z, labels, weights, dtype):
    """In the place of the GPU's kernel, which knows its own terms only."""
    values, gradient = loss_terms(y, z, labels, weights.model_copy(update={"terms": {}}), dtype)
    return values[: 2 + len(FUSED)].clone(), gradient, None


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_beside_the_fused_kernel_it_is_the_same(term, weight, dtype):
    pruned, dense, head, _, labels = states(dtype=torch.float32, spread=0.3)
    y, z = dense @ head.T, pruned @ head.T
    weights = Loss(kl=1.0, variance=0.2, jsd=0.1, ce=0.3, terms={"hellinger": weight})
    values, gradient, lost = with_others(fused, y, z, labels, weights, dtype)
    plain, exact = loss_terms(y, z, labels, weights, torch.float32)
    torch.testing.assert_close(values, plain, rtol=1e-5, atol=1e-6)
    assert len(values) == len(rows()) and (values[-1].count_nonzero() > 0) == (weight > 0)
    assert (gradient is None) == (dtype is None)
    if gradient is None:
        return
    assert gradient.dtype is dtype
    torch.testing.assert_close(gradient.float(), exact, rtol=1e-2, atol=1e-6)
    if weight > 0 and dtype is torch.bfloat16:
        worst, column = (exact - gradient.float()).abs().max(-1)
        assert lost is not None
        torch.testing.assert_close(lost.error_C.abs(), worst, rtol=0.1, atol=1e-7)
        assert (lost.column_C == column).float().mean() > 0.9
    else:
        assert lost is None


def test_a_training_learns_by_it_logs_it_and_the_report_draws_it(term, tmp_path):
    two_processes.write_text(tmp_path)
    cfg = two_processes.cfg(tmp_path, loss={"kl": 0.5, "terms": {"hellinger": 2.0}})
    twin = Twin(tiny(), Plan("depth", 6, (2, 4)))
    epochs = []
    folder = tmp_path / "train"
    train(twin, byte_tokenizer(), cfg, folder, lambda epoch, record: epochs.append(record), seed=3)
    lines = read_jsonl(folder / "steps.jsonl")
    for record in [*lines, *(each["train"] for each in epochs)]:
        assert record["hellinger"] > 0
        assert record["loss"] == pytest.approx(0.5 * record["kl"] + 2 * record["hellinger"], rel=1e-5)
    assert lines[-1]["hellinger"] < lines[0]["hellinger"]
    found = curve(folder / "steps.jsonl", {"train": cfg.model_dump()})
    assert found is not None and found["ends"]["hellinger"][0] is not None
    run = a_run(tmp_path / "run", lines, **cfg.loss.model_dump(include={"kl", "terms"}))
    assert all(">KL<" in svg and ">Hellinger<" in svg for svg in drawn(run))
    del TERMS["hellinger"]  # a report that is made where the package is not
    assert all(">hellinger<" in svg for svg in drawn(run))
    register(term)


def test_a_recipe_is_held_against_what_is_registered(term):
    assert computed(Loss(terms={"hellinger": 0.5}))[-1] == "hellinger"
    assert "hellinger" not in computed(Loss())
    assert Loss(terms={"hellinger": 0.5}).model_dump()["terms"] == {"hellinger": 0.5}
    assert "terms" not in Loss().model_dump()
    for weights, message in (
        ({"helinger": 1.0}, "no term 'helinger' is registered; registered are: hellinger"),
        ({"kl": 1.0}, "'kl' is a field of the loss: give 'loss.kl'"),
        ({"hellinger": -1.0}, "expected a weight of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Loss(terms=weights)
    with pytest.raises(ValueError, match=r"loss\.terms\.hellinger: needs the whole distribution"):
        data = [{"kind": "teacher", "source": "x.jsonl"}]
        Train.model_validate({"data": data, "loss": {"terms": {"hellinger": 1.0}}})


@pytest.mark.parametrize("name", ["hellinger", "kl", "chunk", "tokens", "grad_norm", "a-b"])
def test_a_name_is_taken_once(term, name):
    with pytest.raises(ValueError, match=repr(name)):
        register(LossTerm(name, "x", "test_loss_term:hellinger"))


def test_what_needs_labels_says_so(term):
    TERMS["hellinger"] = LossTerm("hellinger", "x", "test_loss_term:hellinger", labels=True)
    pruned, dense, head, _, _ = states()
    with pytest.raises(ValueError, match=r"loss\.terms\.hellinger has a weight"):
        distillation_loss(pruned, dense, head, Loss(terms={"hellinger": 1.0}))
