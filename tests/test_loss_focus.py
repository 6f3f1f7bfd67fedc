"""Laws of weighted positions: against autograd of weights that are written out and detached, in float64."""

import os
import signal

import pytest
import torch
import two_processes
from byte_tokenizer import byte_tokenizer
from safetensors.torch import load_file
from test_loss import HEADS, MIXTURES, N, V, relative, states
from tiny import tiny
from transformers import TrainerCallback

from recover.base.errors import StopRequested
from recover.config.recipe import Loss, Train
from recover.distill.loss import distillation_loss
from recover.distill.loss_terms import FOCUS, TOTAL, focused, loss_terms, topk_of
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.train.course import FOCUS_DECAY, Totals
from recover.train.train import train
from recover.train.trainer import RecoverTrainer

MEASURES = ["disagreement", "kl", "entropy"]


def focus(by, power=1.0, **mixture):
    return Loss.model_validate({**mixture, "focus": {"by": by, "power": power}})


def logits(h, head, bias=None, scale=1.0, softcap=None):
    z = (h @ head.T + (0 if bias is None else bias)) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def measured(by, p, q):
    """Of each row, from probabilities alone."""
    if by == "kl":
        return (p * (p / q).log()).sum(-1)
    return -(p * p.log()).sum(-1) if by == "entropy" else 1 - torch.minimum(p, q).sum(-1)


def per_token(y, z, labels, weights):
    """Each token's loss without focus, by the plain formulas one token at a time, with autograd's gradient."""
    t = weights.temperature
    p, log_p, log_q = (y / t).softmax(-1), (y / t).log_softmax(-1), (z / t).log_softmax(-1)
    q, dz = log_q.exp(), (z - y) / t
    r = p**2 / (p**2).sum(-1, keepdim=True)
    m = weights.jsd_beta * p + (1 - weights.jsd_beta) * q
    jsd = weights.jsd_beta * p * (p / m).log() + (1 - weights.jsd_beta) * q * (q / m).log()
    total = weights.kl * (p * (log_p - log_q)).sum(-1) + weights.reverse_kl * (q * (log_q - log_p)).sum(-1)
    for weight, w in ((weights.variance, p), (weights.variance_r, r)):
        total = total + weight * ((w * dz**2).sum(-1) - (w * dz).sum(-1) ** 2) / 2
    total = t**2 * (total + weights.jsd * jsd.sum(-1))
    return total + weights.ce * torch.nn.functional.cross_entropy(z, labels, reduction="none"), p, q


@pytest.mark.parametrize("mean", [None, 0.3])
@pytest.mark.parametrize("power", [0.5, 2.0])
@pytest.mark.parametrize("by", MEASURES)
@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_the_gradient_is_that_of_detached_weights(mixture, by, power, mean):
    for head_options, temperature, chunk in ((HEADS[0], 1.0, 7), (HEADS[4], 2.0, N)):
        weights = focus(by, power, **mixture, temperature=temperature)
        pruned, dense, head, bias, labels = states()
        given = {name: value for name, value in head_options.items() if name != "bias"}
        bias = bias if head_options.get("bias") else None
        ours_h, truth_h = pruned.clone().requires_grad_(), pruned.clone().requires_grad_()
        ours = distillation_loss(
            ours_h, dense, head, weights, labels_N=labels, bias_V=bias, chunk=chunk, focus_mean=mean, **given
        )
        y, z = (logits(h, head, bias, **given) for h in (dense, truth_h))
        each, p, q = per_token(y, z, labels, weights)
        weight = measured(by, p, q).detach() ** power
        truth = (each * (1.0 if mean is None else weight / mean)).sum()
        torch.testing.assert_close(ours.total, truth, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ours.focus, weight.sum(), rtol=1e-10, atol=1e-10)
        found, expected = (torch.autograd.grad(*pair)[0] for pair in ((ours.total, ours_h), (truth, truth_h)))
        assert relative(found, expected) < 1e-10


@pytest.mark.parametrize("spread", [1.0, 1e-3])
@pytest.mark.parametrize("by", MEASURES)
def test_in_float32_too(by, spread):
    def found(dtype):
        pruned, dense, head, _, _ = states(dtype=dtype, spread=spread)
        h = pruned.requires_grad_()
        sums = distillation_loss(h, dense, head, focus(by, 0.5), chunk=7, focus_mean=0.01)
        return sums.focus.double(), torch.autograd.grad(sums.total, h)[0].double()

    (ours, gradient), (truth, true_gradient) = found(torch.float32), found(torch.float64)
    torch.testing.assert_close(ours, truth, rtol=3e-3, atol=0)
    assert relative(gradient, true_gradient) < 3e-3


@pytest.mark.parametrize("k", [3, V])
@pytest.mark.parametrize("by", ["disagreement", "kl"])
def test_of_a_teachers_top_k_the_rest_is_one_class(by, k):
    pruned, dense, head, _, _ = states()
    weights, top = focus(by, 0.7), topk_of(logits(dense, head), k)
    ours_h, truth_h = pruned.clone().requires_grad_(), pruned.clone().requires_grad_()
    ours = distillation_loss(ours_h, top, head, weights, chunk=5, focus_mean=0.2)
    p, q = logits(dense, head).softmax(-1), logits(truth_h, head).softmax(-1)

    def classes(x):
        known = x.gather(-1, top.ids_NK)
        others = x.scatter(-1, top.ids_NK, 0.0).sum(-1, keepdim=True)
        return torch.cat([known, others], -1) if k < V else known

    each = measured("kl", classes(p), classes(q))
    weight = measured(by, classes(p), classes(q)).detach() ** 0.7
    truth = (each * weight / 0.2).sum()
    torch.testing.assert_close(ours.focus, weight.sum(), rtol=1e-9, atol=1e-9)
    found, expected = (torch.autograd.grad(*pair)[0] for pair in ((ours.total, ours_h), (truth, truth_h)))
    assert relative(found, expected) < 1e-9


def test_a_teachers_file_has_no_entropy():
    data = [{"kind": "teacher", "source": "x.jsonl"}]
    Train.model_validate({"data": data, "loss": {"focus": {"by": "disagreement"}}})
    with pytest.raises(ValueError, match=r"loss\.focus\.by: dense's entropy needs the whole distribution"):
        Train.model_validate({"data": data, "loss": {"focus": {"by": "entropy"}}})


@pytest.mark.parametrize("by", MEASURES)
def test_equal_views_weigh_nothing_and_give_no_nan(by):
    y = torch.randn(4, 9, dtype=torch.float64)
    values, gradient = loss_terms(y, y.clone(), None, focus(by), torch.float64)
    weight = focused(values, focus(by), 0.0)
    assert weight is None and values[TOTAL].count_nonzero() == 0
    assert gradient is not None and gradient.count_nonzero() == 0
    assert (values[FOCUS].count_nonzero() == 0) == (by != "entropy")


def step(focus_sum, tokens):
    return {**dict.fromkeys(Totals(("kl",)).names, 0.0), "focus": focus_sum, "tokens": tokens}


def test_the_mean_runs_over_steps_that_were_made():
    totals = Totals(("kl",))
    assert totals.focus_mean() is None
    for sums in ([step(3.0, 4), step(1.0, 2)], [step(2.0, 8)]):
        for micro in sums:
            totals.add(micro)
        totals.commit()
    totals.add(step(1e9, 1))
    totals.discard()
    assert totals.focus_mean() == pytest.approx((FOCUS_DECAY * 4 + 2) / (FOCUS_DECAY * 6 + 8))
    again = Totals(("kl",))
    again.restore(totals.to_json())
    assert again.focus_mean() == totals.focus_mean()


def go(folder, name="run", action=None, **changes):
    """The adapter, and each step's logs."""
    logs: list[dict] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if action is not None:
                action(state.global_step + 1)

        def on_log(self, args, state, control, logs=None, **_):
            seen.append(logs)

    seen, init = logs, RecoverTrainer.__init__

    def with_callback(trainer, *arguments, **named):
        init(trainer, *arguments, **named)
        trainer.add_callback(Watch())

    RecoverTrainer.__init__ = with_callback
    try:
        cfg = two_processes.cfg(folder, **{**two_processes.FOCUSED, "tokens": 1500, **changes})
        twin = Twin(tiny(), Plan("depth", 6, (2, 4)))
        best = train(twin, byte_tokenizer(), cfg, folder / name, lambda epoch, _: float(epoch), seed=3)
    finally:
        RecoverTrainer.__init__ = init
    return load_file(best / "adapter_model.safetensors"), [row for row in logs if "kl" in row]


def test_a_training_weighs_positions_and_goes_on_to_the_same_bits(tmp_path):
    two_processes.write_text(tmp_path)
    adapter, logs = go(tmp_path)
    plain = {"loss": {**two_processes.FOCUSED["loss"], "focus": None}}
    other, unweighted = go(tmp_path, "plain", **plain)
    assert logs[0]["loss"] == unweighted[0]["loss"]  # no mean is known yet
    for row, alike in ((logs[0], True), (logs[1], False)):
        assert (row["loss"] == pytest.approx(row["kl"] + 0.1 * row["ce"], rel=5e-3)) == alike
    assert any(not torch.equal(adapter[name], other[name]) for name in adapter)

    def stop(at):
        if at == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StopRequested):
        go(tmp_path, "stopped", stop)
    again, _ = go(tmp_path, "stopped")
    assert all(torch.equal(again[name], adapter[name]) for name in adapter)


def test_micro_batches_change_nothing(tmp_path):
    two_processes.write_text(tmp_path)
    whole, logs = go(tmp_path)
    parts, found = go(tmp_path, "parts", micro_batch_size=2)
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in logs], rel=1e-5)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=5e-4)
