"""Laws of masked linear layers: equal to the naive dense form, in value and gradient, and nothing big is kept."""

from __future__ import annotations

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recover.models.switched import (
    Factors,
    MaskedLinear,
    Switch,
    effective_weight,
    masked_lora_linear,
    pack,
    unpack,
)

OUT, IN, RANK = 24, 20, 3


def problem(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x (2, 5, I), W, keep, A, B, bias; A, B, x and bias want gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    keep = torch.rand(OUT, IN, generator=generator) > 0.5
    x, a, b, bias = (normal(*shape).requires_grad_() for shape in [(2, 5, IN), (RANK, IN), (OUT, RANK), (OUT,)])
    return x, normal(OUT, IN), keep, a, b, bias


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 7), (64, 33)])
def test_packing_is_numpy_packbits_and_back(shape):
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.3
    packed = pack(keep)
    assert packed.dtype == torch.uint8 and packed.numel() == -(-keep.numel() // 8)
    assert numpy.array_equal(packed.numpy(), numpy.packbits(keep.numpy()))
    assert torch.equal(unpack(packed, shape), keep)


@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_naive_computation_in_value_and_gradient(bias):
    x, weight, keep, a, b, bias_O = problem()
    bias_O = bias_O if bias else None
    naive = F.linear(x, (weight + 0.7 * b @ a) * keep, bias_O)
    ours = masked_lora_linear(x, weight, pack(keep), a, b, 0.7, bias_O)
    assert torch.allclose(ours, naive, rtol=1e-13, atol=1e-13)
    inputs = [x, a, b] + ([bias_O] if bias else [])
    upstream = torch.randn_like(naive)
    for ours_grad, naive_grad in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(naive, inputs, upstream), strict=True
    ):
        assert torch.allclose(ours_grad, naive_grad, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    x, weight, keep, a, b, bias = problem()
    packed = pack(keep)
    assert torch.autograd.gradcheck(
        lambda *t: masked_lora_linear(t[0], weight, packed, t[1], t[2], 0.7, t[3]), (x, a, b, bias)
    )
    assert torch.autograd.gradcheck(lambda x: masked_lora_linear(x, weight, packed, None, None), (x,))
    assert torch.autograd.gradcheck(lambda *t: masked_lora_linear(t[0], None, packed, t[1], t[2], 0.7), (x, a, b))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_low_precision_is_no_worse_than_the_naive_form(dtypes):
    """bf16 weights with fp32 or bf16 adapters: error against fp64, of output and gradients at most the naive one."""
    x, weight, keep, a, b, _ = problem(torch.bfloat16)
    a, b = (t.detach().to(dtypes[1]).requires_grad_() for t in (a, b))
    exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
    truth = F.linear(exact[0], (weight.double() + 0.7 * exact[2] @ exact[1]) * keep)
    naive = F.linear(x, ((weight + 0.7 * b @ a) * keep).to(x.dtype))
    ours = masked_lora_linear(x, weight, pack(keep), a, b, 0.7)
    assert ours.dtype == torch.bfloat16
    upstream = torch.randn_like(naive)
    want = [truth, *torch.autograd.grad(truth, exact, upstream.double())]
    for ours_t, naive_t, true_t in zip(
        [ours, *torch.autograd.grad(ours, (x, a, b), upstream)],
        [naive, *torch.autograd.grad(naive, (x, a, b), upstream)],
        want,
        strict=True,
    ):
        assert (ours_t.double() - true_t).norm() <= (naive_t.double() - true_t).norm() * 1.05 + 1e-6


def test_nothing_of_the_weights_size_is_saved_but_the_weight():
    x, weight, keep, a, b, bias = problem(torch.float32)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = masked_lora_linear(x, weight, pack(keep), a, b, 0.7, bias)
    big = [t for t in saved if t.numel() >= weight.numel()]
    assert [t.data_ptr() for t in big] == [weight.data_ptr()], (
        "a copy of the weight, or a mask of its size, is kept alive"
    )
    out.sum().backward()
    assert weight.grad is None and a.grad is not None


def test_autocast_does_not_round_the_effective_weight():
    x, weight, keep, a, b, _ = problem(torch.float32)
    expected = masked_lora_linear(x, weight, pack(keep), a, b, 0.7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(masked_lora_linear(x, weight, pack(keep), a, b, 0.7), expected)


def test_effective_weight_is_zero_where_the_mask_is_closed_even_if_the_update_is_not_finite():
    _, weight, keep, a, b, _ = problem(torch.float32)
    a.data[0, 0] = float("inf")
    merged = effective_weight(weight, pack(keep), Factors(a.detach(), b.detach(), 1.0))
    assert (merged[~keep] == 0).all() and not torch.signbit(merged[~keep]).any()


def test_converted_in_place_the_dense_weight_and_its_name_stay():
    torch.manual_seed(0)
    linear, switch, x = nn.Linear(IN, OUT), Switch(), torch.randn(4, IN)
    linear.requires_grad_(False)
    keep = torch.rand(OUT, IN) > 0.5
    dense, state = linear(x), {name: t.clone() for name, t in linear.state_dict().items()}
    masked = MaskedLinear.convert(linear, keep, switch)
    assert masked is linear and isinstance(linear, nn.Linear)
    assert {name: t.shape for name, t in linear.state_dict().items()} == {name: t.shape for name, t in state.items()}
    assert all(torch.equal(linear.state_dict()[name], t) for name, t in state.items())
    assert torch.equal(masked.keep, keep)
    assert torch.equal(masked(x), F.linear(x, masked.weight * keep, masked.bias))
    switch.dense = True
    assert torch.equal(masked(x), dense)
    switch.dense = False
    MaskedLinear.convert(linear, ~keep, switch)
    assert torch.equal(masked(x), F.linear(x, masked.weight * ~keep, masked.bias))
    assert torch.equal(masked.to(torch.bfloat16).keep, ~keep), "a cast of the model must not touch the mask"
