"""The fused form of the loss's formulas, against the plain ones in float64. Needs a GPU."""

import pytest
import torch
from test_loss_term import term  # noqa: F401 (a fixture)

from recover.config.recipe import Loss
from recover.distill.loss import distillation_loss
from recover.distill.loss_terms import FUSED, loss_terms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel runs on a GPU only")

MIXTURES = [
    {"kl": 1.0, "variance": 0.1},
    {"kl": 0.0, "reverse_kl": 1.0},
    {"kl": 0.1, "variance_r": 1.0},
    {"kl": 0.0, "jsd": 1.0, "jsd_beta": 0.3},
    {"kl": 1.0, "focus": {"by": "kl"}},
    {"kl": 1.0, "focus": {"by": "disagreement"}},
    {"kl": 0.5, "ce": 0.5, "focus": {"by": "entropy"}},
    {"kl": 0.7, "variance": 0.2, "variance_r": 0.3, "reverse_kl": 0.4, "jsd": 0.6, "ce": 0.5},
]


def logits(spread, size=4.0, rows=9, vocabulary=5003):
    generator = torch.Generator("cuda").manual_seed(0)
    y = size * torch.randn(rows, vocabulary, generator=generator, device="cuda")
    z = y + spread * torch.randn(rows, vocabulary, generator=generator, device="cuda")
    return y, z, torch.randint(vocabulary, (rows,), generator=generator, device="cuda")


def relative(found, expected):
    """Error as a share of what is expected; where that is zero (a term that is off), the error itself."""
    return ((found.double() - expected).norm() / (expected.norm() or 1.0)).item()


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-3])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_values_and_gradient_are_the_plain_ones(mixture, temperature, spread):
    from recover.distill.loss_kernel import fused_loss_terms

    weights = Loss(**mixture, temperature=temperature)
    y, z, labels = logits(spread)
    values, gradient, _ = fused_loss_terms(y, z, labels, weights, torch.float32)
    true_values, true_gradient = loss_terms(y.double(), z.double(), labels, weights, torch.float64)
    assert relative(gradient, true_gradient) < 3e-4
    for index in range(2 + len(FUSED)):
        assert relative(values[index], true_values[index]) < 1e-3


def test_huge_logits_stay_finite_and_right():
    from recover.distill.loss_kernel import fused_loss_terms

    weights = Loss(kl=1.0, reverse_kl=1.0, jsd=1.0, variance=1e-3)
    y, z, labels = logits(3e3, size=3e3)
    values, gradient, _ = fused_loss_terms(y, z, labels, weights, torch.float32)
    true_values, _ = loss_terms(y.double(), z.double(), labels, weights, torch.float64)
    assert gradient.isfinite().all()
    torch.testing.assert_close(values.double(), true_values, rtol=1e-4, atol=1e-4)


def test_identical_logits_give_exactly_nothing():
    from recover.distill.loss_kernel import fused_loss_terms

    y, _, _ = logits(0.0)
    weights = Loss(kl=1.0, variance=1.0, variance_r=1.0, reverse_kl=1.0, jsd=1.0, temperature=0.7)
    values, gradient, lost = fused_loss_terms(y, y.clone(), None, weights, torch.bfloat16)
    assert values.count_nonzero() == 0 and gradient.count_nonzero() == 0
    assert lost is not None and lost.error_C.count_nonzero() == 0


def test_what_rounding_loses_most_is_known():
    from recover.distill.loss_kernel import fused_loss_terms

    y, z, _ = logits(1.0)
    _, exact, nothing = fused_loss_terms(y, z, None, Loss(), torch.float32)
    _, rounded, lost = fused_loss_terms(y, z, None, Loss(), torch.bfloat16)
    error, column = (exact - rounded.float()).abs().max(-1)
    assert nothing is None and lost is not None
    torch.testing.assert_close(lost.column_C, column)
    torch.testing.assert_close(lost.error_C.abs(), error)


@pytest.mark.parametrize("by", ["kl", "disagreement", "entropy"])
@pytest.mark.parametrize("power", [0.5, 2.0])
def test_a_whole_focused_bf16_loss_is_right_and_waits_for_nothing(by, power):
    generator = torch.Generator("cuda").manual_seed(0)
    dense, noise, weight = (torch.randn(n, 64, generator=generator, device="cuda") for n in (300, 300, 5003))
    dense, weight = dense.bfloat16(), weight.bfloat16()
    pruned = (dense + 0.05 * noise).bfloat16()
    weights = Loss.model_validate({"focus": {"by": by, "power": power}})

    def found(dense, pruned, weight):
        h = pruned.detach().requires_grad_()
        sums = distillation_loss(h, dense, weight, weights, chunk=128, focus_mean=0.3)
        return sums, torch.autograd.grad(sums.total, h)[0]

    true_sums, truth = found(dense.double(), pruned.double(), weight.double())
    found(dense, pruned, weight)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums, gradient = found(dense, pruned, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert relative(gradient, truth) < 4e-3
    for name in ("total", "focus"):
        assert relative(getattr(sums, name), getattr(true_sums, name)) < 1e-3
    assert relative(sums.terms["kl"], true_sums.terms["kl"]) < 1e-3


def test_identical_logits_part_nowhere():
    from recover.distill.loss_kernel import fused_loss_terms

    y, _, _ = logits(0.0)
    for by in ("kl", "disagreement"):
        weights = Loss.model_validate({"focus": {"by": by}})
        values, _, _ = fused_loss_terms(y, y.clone(), None, weights, torch.float32)
        assert values.count_nonzero() == 0


def test_a_term_that_the_kernel_does_not_know_is_added_and_waits_for_nothing(term):  # noqa: F811
    generator = torch.Generator("cuda").manual_seed(0)
    dense, noise, weight = (torch.randn(n, 64, generator=generator, device="cuda") for n in (300, 300, 5003))
    dense, weight = dense.bfloat16(), weight.bfloat16()
    pruned = (dense + 0.05 * noise).bfloat16()
    weights = Loss(variance=0.1, terms={"hellinger": 2.0})

    def found(dense, pruned, weight):
        h = pruned.detach().requires_grad_()
        sums = distillation_loss(h, dense, weight, weights, chunk=128)
        return sums, torch.autograd.grad(sums.total, h)[0]

    true_sums, truth = found(dense.double(), pruned.double(), weight.double())
    found(dense, pruned, weight)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums, gradient = found(dense, pruned, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert relative(gradient, truth) < 4e-3
    for name, value in sums.terms.items():
        assert relative(value, true_sums.terms[name]) < 1e-3


@pytest.mark.parametrize("head", [{}, {"softcap": 3.0}, {"scale": 0.25}], ids=str)
def test_a_whole_bf16_loss_is_right_and_waits_for_nothing(head):
    generator = torch.Generator("cuda").manual_seed(0)
    dense, noise, weight = (torch.randn(n, 64, generator=generator, device="cuda") for n in (300, 300, 5003))
    dense, weight = dense.bfloat16(), weight.bfloat16()
    pruned = (dense + 0.05 * noise).bfloat16()
    weights = Loss(variance=0.1)

    def gradient(dense, pruned, weight):
        h = pruned.detach().requires_grad_()
        return torch.autograd.grad(distillation_loss(h, dense, weight, weights, chunk=128, **head).total, h)[0]

    truth = gradient(dense.double(), pruned.double(), weight.double())
    gradient(dense, pruned, weight)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = gradient(dense, pruned, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert relative(found, truth) < 4e-3
