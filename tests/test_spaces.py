"""Laws of the three spaces: exact identities, second-order agreement, direction of KL, shift, zero, precision.

References are the textbook's definitions in numpy float64, written differently from the code.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recover.maths import divergence as spaces

ROWS, VOCABULARY = 64, 300


def logits(scale: float = 3.0, drift: float = 1.0, seed: int = 0, dtype=torch.float64):
    """(z_dense, dz) of random rows."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, ROWS, VOCABULARY, generator=generator, dtype=dtype)
    return scale * draw[0], drift * draw[1]


def textbook(z_dense: torch.Tensor, z_pruned: torch.Tensor, temperature: float) -> dict[str, np.ndarray]:
    """p, q, r, KL both ways and cosine by definition, in numpy float64."""
    z, y = z_dense.double().numpy() / temperature, z_pruned.double().numpy() / temperature
    p = np.exp(z - z.max(-1, keepdims=True))
    q = np.exp(y - y.max(-1, keepdims=True))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return {
        "p": p,
        "q": q,
        "r": p**2 / (p**2).sum(-1, keepdims=True),
        "kl": (p * (np.log(p) - np.log(q))).sum(-1),
        "reverse_kl": (q * (np.log(q) - np.log(p))).sum(-1),
        "cosine": (p * q).sum(-1) / np.sqrt((p**2).sum(-1) * (q**2).sum(-1)),
    }


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_probability_drift_is_the_textbook_to_1e_10(temperature):
    z, dz = logits()
    found, truth = spaces.probability_drift(z, z + dz, temperature), textbook(z, z + dz, temperature)
    dz = dz.numpy()
    variances = {
        "var_p": (truth["p"] * dz**2).sum(-1) - (truth["p"] * dz).sum(-1) ** 2,
        "var_r": (truth["r"] * dz**2).sum(-1) - (truth["r"] * dz).sum(-1) ** 2,
    }
    expected = {
        "kl": truth["kl"],
        "reverse_kl": truth["reverse_kl"],
        "probability": 1 - truth["cosine"],
        **variances,
        "kl_predicted": variances["var_p"] / (2 * temperature**2),
        "probability_predicted": variances["var_r"] / (2 * temperature**2),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy(), value, rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("scale, drift", [(1.0, 0.1), (3.0, 1.0), (12.0, 8.0)])
def test_theorems_in_exact_form_hold_to_1e_10(scale, drift):
    z, dz = logits(scale, drift)
    for temperature in (0.5, 1.0, 3.0):
        log_p, log_q = (spaces.log_probabilities(x, temperature) for x in (z, z + dz))
        torch.testing.assert_close(
            spaces.kl_of_shift(log_p, dz / temperature), spaces.kl(log_p, log_q), rtol=1e-10, atol=1e-10
        )
        cosine = 1 - spaces.one_minus_cosine(log_p.exp(), log_q.exp())
        torch.testing.assert_close(spaces.cosine_of_shift(log_p, dz / temperature), cosine, rtol=1e-10, atol=1e-10)
    a, b = spaces.parallel_and_orthogonal(z, z + dz)
    torch.testing.assert_close(spaces.drift_of_parts(a, b), spaces.one_minus_cosine(z, z + dz), rtol=1e-10, atol=1e-10)
    cosine = torch.nn.functional.cosine_similarity(z, z + dz)
    torch.testing.assert_close(spaces.one_minus_cosine(z, z + dz), 1 - cosine, rtol=1e-10, atol=1e-10)


def test_parallel_and_orthogonal_parts_put_the_difference_together():
    x, dx = logits()
    a, b = spaces.parallel_and_orthogonal(x, x + dx)
    torch.testing.assert_close(dx.square().sum(-1), (a**2 + b**2) * x.square().sum(-1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("a, factor", [(1.0, 4.0), (-0.5, 0.25)])
def test_the_first_predictor_is_blind_to_the_parallel_part(a, factor):
    """Pure scaling of x by 1 + a beside a small orthogonal part: b^2 / 2 is (1 + a)^2 times the truth."""
    x = torch.zeros(1, 8, dtype=torch.float64)
    x[0, 0] = 1
    y = (1 + a) * x
    y[0, 1] = 1e-4
    ratio = spaces.predicted_drift(x, y) / spaces.one_minus_cosine(x, y)
    assert ratio.item() == pytest.approx(factor, rel=1e-6)
    far = -1.5 * x
    far[0, 1] = 0.5
    torch.testing.assert_close(
        spaces.drift_of_parts(*spaces.parallel_and_orthogonal(x, far)), spaces.one_minus_cosine(x, far)
    )


def test_predictors_are_exact_to_second_order_and_the_remainder_is_of_third():
    z, dz = logits()
    for name, predicted in (("kl", "kl_predicted"), ("probability", "probability_predicted")):
        off = []
        for size in (1e-2, 1e-3, 1e-4):
            drift = spaces.probability_drift(z, z + size * dz, 1.0)
            off.append((spaces.ratio(drift[predicted], drift[name]) - 1).abs().max().item())
        assert off[2] < 1e-3, name
        assert off[1] == pytest.approx(off[0] / 10, rel=0.3), name  # first order in dz: a third-order remainder
        assert off[2] == pytest.approx(off[1] / 10, rel=0.3), name
    x = z + 1e-4 * dz
    torch.testing.assert_close(spaces.predicted_drift(z, x), spaces.one_minus_cosine(z, x), rtol=1e-3, atol=0)


def test_both_directions_of_kl_part_at_third_order_as_k3_over_6_and_k3_over_3():
    z, dz = logits(drift=1e-3)
    drift = spaces.probability_drift(z, z + dz, 1.0)
    p = torch.softmax(z, -1)
    third = (p * (dz - (p * dz).sum(-1, keepdim=True)) ** 3).sum(-1)
    clear = third.abs() > third.abs().median()  # where k3 is nearly 0 the fourth order takes over
    forward = ((drift["kl"] - drift["kl_predicted"]) / third)[clear]
    backward = ((drift["reverse_kl"] - drift["kl_predicted"]) / third)[clear]
    torch.testing.assert_close(forward, torch.full_like(forward, 1 / 6), rtol=0.02, atol=0)
    torch.testing.assert_close(backward, torch.full_like(backward, 1 / 3), rtol=0.02, atol=0)


def test_kl_is_dense_to_pruned():
    """By hand: p = (1/2, 1/2), q = (3/4, 1/4): KL(p||q) = ln(4/3) / 2, KL(q||p) = 3/4 ln 3 - ln 2."""
    dense = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    pruned = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    drift = spaces.probability_drift(dense, pruned, 1.0)
    assert drift["kl"].item() == pytest.approx(np.log(4 / 3) / 2, rel=1e-12)
    assert drift["reverse_kl"].item() == pytest.approx(0.75 * np.log(3) - np.log(2), rel=1e-12)


def test_kl_counts_what_the_pruned_view_forgets_more_than_what_it_adds():
    dense = torch.tensor([[0.0, 0.0, -20.0]], dtype=torch.float64)
    forgets = torch.tensor([[0.0, -20.0, -20.0]], dtype=torch.float64)
    adds = torch.tensor([[0.0, 0.0, 0.0]], dtype=torch.float64)
    assert spaces.probability_drift(dense, forgets, 1.0)["kl"] > 5  # a token of the dense view is gone
    assert spaces.probability_drift(dense, adds, 1.0)["kl"] < 0.5
    assert spaces.probability_drift(dense, adds, 1.0)["reverse_kl"] > 5


def test_a_shift_of_logits_changes_no_probability_and_no_centred_cosine_but_the_raw_one():
    z, dz = logits()
    shift = torch.linspace(-50, 50, ROWS, dtype=torch.float64)[:, None]
    for name, value in spaces.probability_drift(z, z + dz, 1.0).items():
        torch.testing.assert_close(
            spaces.probability_drift(z, z + dz + shift, 1.0)[name], value, rtol=1e-10, atol=1e-10
        )
    plain, shifted = spaces.logit_drift(z, z + dz), spaces.logit_drift(z, z + dz + shift)
    for name in ("logit", "logit_predicted", "top1", "top5"):
        torch.testing.assert_close(shifted[name], plain[name], rtol=1e-10, atol=1e-10)
    assert (shifted["logit_raw"] - plain["logit_raw"]).abs().max() > 0.1


MAGNITUDES = st.just(0.0) | st.floats(1e-16, 1e4)  # squares of smaller numbers leave float32


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scale=MAGNITUDES,
    drift=MAGNITUDES,
    vocabulary=st.integers(1, 400),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_drift_is_finite_and_never_negative(seed, scale, drift, vocabulary, dtype):
    generator = torch.Generator().manual_seed(seed)
    z = (scale * torch.randn(3, vocabulary, generator=generator)).to(dtype)
    y = (z + drift * torch.randn(3, vocabulary, generator=generator)).to(dtype)
    table = spaces.probability_drift(z, y, 1.0) | spaces.logit_drift(z, y) | spaces.state_drift(z, y)
    for name, value in table.items():
        assert torch.isfinite(value).all() and (value >= 0).all(), name
    for name in ("probability", "embedding", "logit", "logit_raw"):
        assert (table[name] <= 2 + 1e-5).all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_equal_views_have_exactly_zero_drift(dtype):
    z = logits(scale=10)[0].to(dtype)
    table = spaces.state_drift(z, z.clone()) | spaces.logit_drift(z, z.clone()) | spaces.lens_drift(z, z.clone())
    for temperature in (0.3, 1.0, 2.0):
        table |= {f"{name}{temperature}": x for name, x in spaces.probability_drift(z, z.clone(), temperature).items()}
    for name, value in table.items():
        assert torch.equal(value.double(), torch.full_like(value.double(), float(name.startswith("top")))), name


@pytest.mark.parametrize("size, relative", [(1.0, 1e-6), (1e-2, 1e-4), (1e-4, 1e-2)])
def test_float32_keeps_its_digits_near_zero(size, relative):
    """Against float64: KL and 1 - cos lose digits as 1e-7 / dz, down to 4e-9 here, where 1 - <u, v> has none left."""
    z, dz = (x.float() for x in logits(drift=size))
    pruned = z + dz
    truth = spaces.probability_drift(z.double(), pruned.double(), 1.0) | spaces.logit_drift(z.double(), pruned.double())
    found = spaces.probability_drift(z, pruned, 1.0) | spaces.logit_drift(z, pruned)
    for name in ("kl", "reverse_kl", "probability", "logit", "logit_raw"):
        torch.testing.assert_close(found[name].double(), truth[name], rtol=relative, atol=0, msg=name)
    usual = 1 - torch.nn.functional.cosine_similarity(z, pruned).double()
    if size == 1e-4:
        assert ((usual - truth["logit_raw"]).abs() > truth["logit_raw"]).any()


def test_kl_survives_a_token_that_only_the_pruned_view_knows():
    """p underflows in float32 and e^d overflows there; KL is finite, and right."""
    z, y = torch.zeros(1, 4), torch.zeros(1, 4)
    z[0, 0], y[0, 0] = -300.0, 300.0
    found = spaces.probability_drift(z, y, 1.0)
    assert found["kl"].item() == pytest.approx(300 - np.log(3), rel=1e-6)
    assert torch.isfinite(found["reverse_kl"]).all()


def test_lens_drift_is_the_full_drift_at_temperature_one():
    z, dz = logits()
    full = spaces.logit_drift(z, z + dz) | spaces.probability_drift(z, z + dz, 1.0)
    for name, value in spaces.lens_drift(z, z + dz).items():
        torch.testing.assert_close(value, full[name], rtol=0, atol=0)


def test_a_zero_row_is_orthogonal_to_all_but_itself():
    zero, one = torch.zeros(1, 4), torch.ones(1, 4)
    assert spaces.one_minus_cosine(zero, zero).item() == 0
    assert spaces.one_minus_cosine(zero, one).item() == spaces.one_minus_cosine(one, zero).item() == 1


def test_agreement_counts_first_tokens_and_common_tokens():
    dense = torch.tensor([[9.0, 8, 7, 6, 5, 0, 0, 0], [9.0, 8, 7, 6, 5, 0, 0, 0]])
    pruned = torch.tensor([[9.0, 0, 7, 6, 5, 8, 0, -1], [0.0, 8, 7, 6, 9, 5, 0, -1]])
    top1, top5 = spaces.agreement(dense, pruned)
    assert top1.tolist() == [1, 0]
    assert top5.tolist() == [0.8, 0.8]
    top1, top5 = spaces.agreement(dense[:, :3], dense[:, :3])
    assert top1.tolist() == top5.tolist() == [1, 1]


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_quantiles_are_numpy_percentiles(count):
    values = torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    found = spaces.quantiles(values)
    expected = np.percentile(values.numpy(), [50, 90, 99, 100])
    assert [found[name] for name in ("p50", "p90", "p99", "max")] == pytest.approx(expected.tolist(), rel=1e-12)
    assert found["mean"] == pytest.approx(values.numpy().mean(), rel=1e-12)
    assert spaces.quantiles(values.tolist()) == found


def test_quantiles_of_nothing_are_none_and_of_nan_refused():
    assert set(spaces.quantiles(torch.empty(0)).values()) == {None} == set(spaces.quantiles([]).values())
    with pytest.raises(AssertionError, match="non-finite"):
        spaces.quantiles(torch.tensor([1.0, float("nan")]))


def test_ratio_leaves_out_rows_without_drift():
    assert spaces.ratio(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.0])).tolist() == [2.0]
