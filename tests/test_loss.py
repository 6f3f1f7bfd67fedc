"""Laws of the distillation loss, against textbook formulas in float64 and autograd."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from recover.base.memory import rows_for
from recover.config.recipe import Loss
from recover.distill.loss import distillation_loss
from recover.distill.loss_terms import computed, loss_terms

N, D, V = 23, 16, 97
MIXTURES = [
    {"kl": 1.0},
    {"kl": 1.0, "variance": 0.3},
    {"kl": 0.0, "reverse_kl": 1.0},
    {"kl": 0.0, "ce": 1.0},
    {"kl": 0.1, "variance_r": 1.0},
    {"kl": 0.0, "jsd": 1.0, "jsd_beta": 0.3},
    {"kl": 0.7, "variance": 0.2, "variance_r": 0.3, "reverse_kl": 0.4, "jsd": 0.6, "ce": 0.5},
]
HEADS = [{}, {"softcap": 3.0}, {"scale": 0.25}, {"bias": True}, {"bias": True, "scale": 1.7, "softcap": 5.0}]


def states(seed=0, dtype=torch.float64, spread=1.0, n=N):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(n, D, generator=generator, dtype=torch.float64)
    pruned = dense + spread * torch.randn(n, D, generator=generator, dtype=torch.float64)
    head = torch.randn(V, D, generator=generator, dtype=torch.float64)
    bias = torch.randn(V, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (n,), generator=generator)
    return pruned.to(dtype), dense.to(dtype), head.to(dtype), bias.to(dtype), labels


def textbook(pruned, dense, head, weights, labels, bias=None, scale=1.0, softcap=None):
    """Plain softmaxes over full logits; every term as in a textbook, the total by the recipe's convention."""

    def logits(h):
        z = h @ head.T
        z = (z if bias is None else z + bias) * scale
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    t = weights.temperature
    y, z = logits(dense), logits(pruned)
    p, q = torch.softmax(y / t, -1), torch.softmax(z / t, -1)
    kl = (p * (p.log() - q.log())).sum(-1).sum()
    reverse_kl = (q * (q.log() - p.log())).sum(-1).sum()
    dz = z - y
    variance = ((p * dz**2).sum(-1) - (p * dz).sum(-1) ** 2).sum() / (2 * t**2)
    r = p**2 / (p**2).sum(-1, keepdim=True)
    variance_r = ((r * dz**2).sum(-1) - (r * dz).sum(-1) ** 2).sum() / (2 * t**2)
    b = weights.jsd_beta
    m = b * p + (1 - b) * q
    jsd = (b * p * (p / m).log() + (1 - b) * q * (q / m).log()).sum()
    ce = torch.nn.functional.cross_entropy(z, labels, reduction="sum")
    total = weights.kl * kl + weights.variance * variance + weights.reverse_kl * reverse_kl
    total = t**2 * (total + weights.variance_r * variance_r + weights.jsd * jsd) + weights.ce * ce
    terms = {"kl": kl, "variance": variance, "reverse_kl": reverse_kl, "variance_r": variance_r, "jsd": jsd, "ce": ce}
    return {"total": total, **terms}


def run(weights, *, chunk=7, seed=0, dtype=torch.float64, spread=1.0, bias=False, **head_options):
    """(sums, gradient) of the real loss and of the textbook one (float64 truth) on the same numbers."""
    pruned, dense, head, bias_v, labels = states(seed, dtype, spread)
    pruned = pruned.requires_grad_()
    bias_v = bias_v if bias else None
    ours = distillation_loss(pruned, dense, head, weights, labels_N=labels, bias_V=bias_v, chunk=chunk, **head_options)
    (gradient,) = torch.autograd.grad(ours.total * 0.5, pruned)
    truth_h = pruned.detach().double().requires_grad_()
    wide_bias = None if bias_v is None else bias_v.double()
    truth = textbook(truth_h, dense.double(), head.double(), weights, labels, bias=wide_bias, **head_options)
    (truth_gradient,) = torch.autograd.grad(truth["total"] * 0.5, truth_h)
    return ours, gradient, truth, truth_gradient


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_values_and_gradients_are_the_textbooks(mixture, temperature, head):
    weights = Loss(**mixture, temperature=temperature)
    ours, gradient, truth, truth_gradient = run(weights, **head)
    assert ours.terms.keys() == {"kl", "variance", "reverse_kl", "ce"} | {name for name in mixture if name in truth}
    for term, found in {"total": ours.total, **ours.terms}.items():
        torch.testing.assert_close(found, truth[term], rtol=1e-10, atol=1e-10, check_dtype=False)
    assert list(ours.terms) == list(computed(weights)) and ours.focus == 0
    assert ours.tokens.item() == N
    assert relative(gradient, truth_gradient) < 1e-10


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-3])
@pytest.mark.parametrize("mixture", [MIXTURES[i] for i in (0, 1, 2, 4, 5)], ids=str)
def test_fp32_keeps_a_quarter_of_a_percent_however_small_the_drift(mixture, spread):
    """Where q - p is all rounding for a naive subtraction; KL falls from 4 nats to 1e-6 here."""
    _, gradient, _, truth_gradient = run(Loss(**mixture), dtype=torch.float32, spread=spread)
    assert relative(gradient, truth_gradient) < 2.5e-3


def test_a_bf16_model_gets_fp32_logits():
    """bf16 logits would be off by several percent at this drift; only h and dlogits are bf16 here."""
    _, gradient, truth, truth_gradient = run(Loss(), dtype=torch.bfloat16, spread=0.1)
    assert 1e-4 < truth["kl"] / N < 1
    assert gradient.dtype is torch.bfloat16
    assert relative(gradient, truth_gradient) < 5e-3


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_the_chunk_is_a_matter_of_memory_only(mixture):
    weights = Loss(**mixture, temperature=2.0)
    whole, whole_gradient, _, _ = run(weights, chunk=N)
    for chunk in (1, 5, 1000):
        parts, gradient, _, _ = run(weights, chunk=chunk)
        torch.testing.assert_close(parts.total, whole.total, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, whole_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_identical_models_give_exactly_nothing(dtype):
    pruned, _, head, _, labels = states(dtype=dtype)
    h = pruned.clone().requires_grad_()
    weights = Loss(kl=1.0, variance=1.0, variance_r=1.0, reverse_kl=1.0, jsd=1.0, temperature=0.7)
    sums = distillation_loss(h, pruned, head, weights, labels_N=labels, chunk=5)
    sums.total.backward()
    assert (
        sums.total == 0 and len(sums.terms) == 6 and all(sums.terms[name] == 0 for name in sums.terms if name != "ce")
    )
    assert h.grad.count_nonzero() == 0


def test_a_shift_of_all_logits_changes_nothing():
    """A constant on one side only: by a head with one more input, which only the pruned side feeds."""
    pruned, dense, head, _, _ = states()
    shifted_head = torch.cat([head, torch.ones(V, 1, dtype=head.dtype)], 1)
    zero, some = torch.zeros(N, 1, dtype=head.dtype), torch.full((N, 1), 3.0, dtype=head.dtype)
    weights = Loss(kl=1.0, variance=0.5, reverse_kl=0.5)
    plain = distillation_loss(pruned, dense, head, weights)
    shifted = distillation_loss(torch.cat([pruned, some], 1), torch.cat([dense, zero], 1), shifted_head, weights)
    torch.testing.assert_close(shifted.total, plain.total, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("spread", [1e-7, 1e-6, 1e-3, 1.0, 30.0])
def test_no_divergence_is_negative_for_any_token(spread, temperature):
    pruned, dense, head, _, _ = states(dtype=torch.float32, spread=spread, n=200)
    for mixture in MIXTURES[0], {"kl": 0.0, "jsd": 1.0, "jsd_beta": 0.1}, {"kl": 1e-30, "variance_r": 1.0}:
        weights = Loss(**mixture, temperature=temperature)
        values, _ = loss_terms(dense @ head.T, pruned @ head.T, None, weights, None)
        assert (values >= 0).all() and values.isfinite().all()


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_huge_logits_stay_finite_and_right(size):
    """KL of thousands of nats: e^KL overflows, so the value and the gradient must not pass through it."""
    pruned, dense, head, _, labels = states(spread=1.0)
    h = (pruned * size / 4).float().requires_grad_()
    weights = Loss(kl=1.0, reverse_kl=1.0)
    ours = distillation_loss(h, (dense * size / 4).float(), head.float(), weights, labels_N=labels, chunk=5)
    (gradient,) = torch.autograd.grad(ours.total, h)
    log_p = torch.log_softmax((dense * size / 4).float().double() @ head.float().double().T, -1)
    log_q = torch.log_softmax(h.detach().double() @ head.float().double().T, -1)
    kl = (log_p.exp() * (log_p - log_q)).sum()
    assert torch.isfinite(gradient).all()
    torch.testing.assert_close(ours.terms["kl"].double(), kl, rtol=1e-4, atol=1e-4)


def test_no_scored_token_gives_zero_and_keeps_the_graph():
    pruned, dense, head, _, labels = states()
    h = pruned[:0].clone().requires_grad_()
    sums = distillation_loss(h, dense[:0], head, Loss(), labels_N=labels[:0])
    sums.total.backward()
    assert sums.total.item() == 0 and sums.tokens.item() == 0 and h.grad.shape == (0, D)


def test_only_the_pruned_side_gets_a_gradient():
    pruned, dense, head, _, _ = states()
    pruned, dense, head = pruned.requires_grad_(), dense.requires_grad_(), head.requires_grad_()
    distillation_loss(pruned, dense, head, Loss()).total.backward()
    assert pruned.grad is not None and dense.grad is None and head.grad is None


def test_without_gradient_the_values_are_the_same():
    with_gradient, *_ = run(Loss())
    pruned, dense, head, _, labels = states()
    without = distillation_loss(pruned, dense, head, Loss(), labels_N=labels, chunk=7)
    assert without.total == with_gradient.total and not without.total.requires_grad


def test_cross_entropy_needs_labels():
    pruned, dense, head, _, _ = states()
    with pytest.raises(ValueError, match="labels"):
        distillation_loss(pruned, dense, head, Loss(ce=1.0))


def moments(pruned, dense, head):
    """(E_p[(u - E u)^2], ... ^3) summed over tokens, from plain softmaxes."""
    p, u = torch.softmax(dense @ head.T, -1), (pruned - dense) @ head.T
    v = u - (p * u).sum(-1, keepdim=True)
    return (p * v**2).sum(), (p * v**3).sum()


def test_close_to_the_dense_model_every_divergence_is_the_variance():
    """KL = Var/2 + k3/6 + ..., reverse KL = Var/2 + k3/3 + ..., JSD = beta (1 - beta) Var/2 + ..."""
    pruned, dense, head, _, _ = states(spread=3e-4)
    beta = 0.3
    sums = distillation_loss(pruned, dense, head, Loss(kl=0.0, jsd=1.0, jsd_beta=beta))
    variance, third = moments(pruned, dense, head)
    torch.testing.assert_close(sums.terms["variance"], variance / 2, rtol=1e-9, atol=0)
    torch.testing.assert_close(sums.terms["kl"] - sums.terms["variance"], third / 6, rtol=2e-2, atol=0)
    torch.testing.assert_close(sums.terms["reverse_kl"] - sums.terms["variance"], third / 3, rtol=2e-2, atol=0)
    torch.testing.assert_close(sums.total, beta * (1 - beta) * variance / 2, rtol=2e-3, atol=0)


@pytest.mark.parametrize("beta", [1e-5, 1 - 1e-5])
def test_jsd_over_its_smaller_weight_tends_to_one_kl_or_the_other(beta):
    pruned, dense, head, _, _ = states(spread=0.3)
    sums = distillation_loss(pruned, dense, head, Loss(kl=0.0, jsd=1.0, jsd_beta=beta))
    expected = sums.terms["kl"] if beta < 0.5 else sums.terms["reverse_kl"]
    torch.testing.assert_close(sums.total / min(beta, 1 - beta), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("spread", [0.1, 1.0, 1e3])
def test_jsd_is_the_same_from_either_side_and_at_most_log_2(spread):
    pruned, dense, head, _, _ = states(spread=spread)

    def jsd(student, teacher, beta):
        return distillation_loss(student, teacher, head, Loss(kl=0.0, jsd=1.0, jsd_beta=beta)).total / N

    torch.testing.assert_close(jsd(pruned, dense, 0.3), jsd(dense, pruned, 0.7), rtol=1e-9, atol=0)
    half = jsd(pruned, dense, 0.5)
    assert 0 < half <= math.log(2) * (1 + 1e-12)
    assert spread < 1e3 or half > 0.9 * math.log(2)


def test_variances_hardly_see_an_unlikely_token_that_the_student_raises():
    """A token of p = 1e-3, raised by 3 nats: KL asks for 0.019 less of it, Var_p for 0.003, Var_r for next to none."""
    y = torch.tensor([[0.0, math.log(1e-3), math.log(1e-3)]], dtype=torch.float64)
    z = y + torch.tensor([[0.0, 3.0, 0.0]], dtype=torch.float64)
    only = {"kl": Loss(), "variance": Loss(kl=1e-30, variance=1.0), "variance_r": Loss(kl=1e-30, variance_r=1.0)}
    push = {name: loss_terms(y, z, None, weights, y.dtype)[1][0, 1].item() for name, weights in only.items()}
    assert push["kl"] == pytest.approx(1e-3 * (math.e**3 - 1), rel=0.05)
    assert push["variance"] == pytest.approx(3e-3, rel=0.05)
    assert push["variance_r"] == pytest.approx(3e-6, rel=0.05)


@pytest.mark.parametrize("blind", [{"variance": 1.0}, {"variance_r": 1.0}, {"variance": 1.0, "variance_r": 1.0}])
def test_a_recipe_with_variances_alone_is_refused(blind):
    with pytest.raises(ValueError, match="blind to tokens that the student raises"):
        Loss(kl=0.0, **blind)
    Loss(kl=0.0, jsd=0.1, **blind)


@pytest.mark.parametrize(
    ("chunk", "width", "processors", "rows"),
    [(2048, 3584, 132, 1152), (2048, 4096, 132, 1024), (2048, 2048, 132, 2048), (1024, 3584, 132, 1024), (7, 64, 8, 7)],
)
def test_rows_at_once_leave_few_multiprocessors_idle(chunk, width, processors, rows):
    assert rows_for(chunk, width, processors) == rows


def test_the_benchmark_runs_and_its_errors_are_those_of_fp32(tmp_path, capsys):
    path = Path(__file__).parent.parent / "benchmarks" / "loss.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_the_loss", path)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = benchmark
    spec.loader.exec_module(benchmark)
    sizes = "--tokens 24 --width 16 --vocabulary 61 --repeats 1 --rows 8 --chunks 8 16"
    benchmark.main([*sizes.split(), "--out", str(tmp_path)])
    found = json.loads((tmp_path / "loss.json").read_text())
    assert (tmp_path / "loss.md").read_text() in capsys.readouterr().out
    by_name = {row["case"]: row for row in found["cases"]}
    assert min(row["ratio"] for name, row in by_name.items() if name.startswith("three products")) == 1
    limit = 0.005 if torch.cuda.is_available() else 0.002
    assert max(by_name["recover, KL + variance, chunk 8"]["gradient_error"]) < limit
    assert found["kls"] == sorted(found["kls"], reverse=True)
