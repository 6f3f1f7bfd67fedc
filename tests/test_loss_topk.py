"""Laws of the loss over k known tokens and a tail: against a textbook of k + 1 classes in float64, and the exact KL."""

import pytest
import torch
from test_loss import HEADS, N, V, states

from recover.config.recipe import Loss
from recover.distill.loss import distillation_loss
from recover.distill.loss_terms import TopK, topk_of


def logits(h, head, bias=None, scale=1.0, softcap=None):
    z = (h @ head.T + (0 if bias is None else bias)) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def textbook(z, top, labels, weights):
    """k + 1 probabilities of both sides side by side, and torch's own divergence and cross-entropy."""
    total = torch.zeros((), dtype=torch.float64)
    for z_V, ids, logp, label in zip(z, top.ids_NK.tolist(), top.logp_NK.double(), labels.tolist(), strict=True):
        q = z_V.softmax(-1)
        others = [token for token in range(V) if token not in ids]
        p_classes = torch.cat([logp.exp(), (1 - logp.exp().sum()).clamp_min(0)[None]])
        q_classes = (
            torch.cat([q[ids], q[others].sum()[None]]) if others else torch.cat([q[ids], torch.ones(1).double()])
        )
        kl = torch.nn.functional.kl_div(q_classes.log(), p_classes, reduction="sum")
        total = total + weights.kl * kl - weights.ce * z_V.log_softmax(-1)[label]
    return total


def options(head_options, bias):
    return {**head_options, **({"bias": bias} if head_options.get("bias") else {})}


def both(weights, k, head_options=None, dtype=torch.float64, chunk=5, spread=1.0):
    """(value, gradient) of ours and of the textbook."""
    pruned, dense, head, bias, labels = states(spread=spread)
    chosen = options(head_options or {}, bias)
    top = topk_of(logits(dense, head, **chosen), k)
    narrow = pruned.to(dtype).requires_grad_()
    named = {name: value.to(dtype) if torch.is_tensor(value) else value for name, value in chosen.items()}
    named["bias_V"] = named.pop("bias", None)
    sums = distillation_loss(narrow, top, head.to(dtype), weights, labels_N=labels, chunk=chunk, **named)
    (gradient,) = torch.autograd.grad(sums.total, narrow)
    wide = pruned.clone().requires_grad_()
    expected = textbook(logits(wide, head, **chosen), top, labels, weights)
    return (sums.total.detach(), gradient), (expected.detach(), torch.autograd.grad(expected, wide)[0]), sums


@pytest.mark.parametrize("k", [1, 8, V - 1, V])
@pytest.mark.parametrize("weights", [Loss(kl=1.0), Loss(kl=0.7, ce=0.5)], ids=["kl", "kl + ce"])
def test_value_and_gradient_are_the_textbook_s(k, weights):
    found, expected, _ = both(weights, k)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("head_options", HEADS, ids=str)
def test_every_kind_of_head(head_options):
    found, expected, _ = both(Loss(kl=1.0), 8, head_options)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spread", [1.0, 0.01])
def test_float32_gradients_are_near_the_float64_ones(spread):
    found, expected, _ = both(Loss(kl=1.0), 8, dtype=torch.float32, spread=spread)
    assert ((found[1].double() - expected[1]).norm() / expected[1].norm()).item() < 1e-5 / spread


def test_chunks_change_nothing():
    whole, _, _ = both(Loss(kl=1.0, ce=0.5), 8, chunk=N)
    cut, _, _ = both(Loss(kl=1.0, ce=0.5), 8, chunk=3)
    torch.testing.assert_close(whole, cut, rtol=1e-12, atol=1e-13)


def test_it_grows_with_k_up_to_the_exact_divergence():
    """What k tokens lose is p_t KL(p given tail || q given tail), and never negative."""
    pruned, dense, head, _, _ = states()
    p, q = (logits(h, head).softmax(-1) for h in (dense, pruned))
    exact = distillation_loss(pruned, dense, head, Loss(kl=1.0)).terms["kl"]
    before = -1.0
    for k in (1, 2, 4, 16, 64, V):
        top = topk_of(logits(dense, head), k)
        found = distillation_loss(pruned, top, head, Loss(kl=1.0)).terms["kl"]
        assert before <= found <= exact + 1e-9
        tail_p, tail_q = (share.scatter(-1, top.ids_NK, 0.0) for share in (p, q))
        masses = tail_p.sum(-1), tail_q.sum(-1)
        inside = torch.xlogy(tail_p, (tail_p / masses[0][:, None]) / (tail_q / masses[1][:, None])).nan_to_num(0.0)
        torch.testing.assert_close(exact - found, inside.sum(), rtol=1e-9, atol=1e-9)
        before = found.item()
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def test_a_model_equal_to_the_teacher_has_nothing_to_learn():
    _, dense, head, _, _ = states()
    same = dense.clone().requires_grad_()
    sums = distillation_loss(same, topk_of(logits(dense, head), 8), head, Loss(kl=1.0))
    assert abs(sums.total.item()) < 1e-12 and torch.autograd.grad(sums.total, same)[0].abs().max() < 1e-13


def test_a_teacher_that_is_sure_and_a_model_that_is_not_stay_finite():
    head = torch.eye(V)
    pruned = torch.zeros(2, V)
    pruned[0, 0], pruned[1, 1] = 200.0, -200.0
    pruned.requires_grad_()
    top = TopK(torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0.0, -120.0], [0.0, -90.0]]))  # tails of 0
    sums = distillation_loss(pruned, top, head, Loss(kl=1.0))
    assert sums.total.isfinite() and sums.total > 100 and torch.autograd.grad(sums.total, pruned)[0].isfinite().all()


def test_no_tokens_give_nothing():
    pruned, dense, head, _, _ = states(n=0)
    assert distillation_loss(pruned, topk_of(logits(dense, head), 4), head, Loss(kl=1.0)).total == 0
