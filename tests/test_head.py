"""One road from a hidden state to logits: pruning, probing and training see the same ones, to the last bit."""

from __future__ import annotations

import pytest
import torch
from tiny import ids, tiny

from recover.config.recipe import Loss
from recover.distill import loss
from recover.maths.divergence import Head, all_finite
from recover.models.arch import head_of
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.probe.views import Lens, View
from recover.prune.stream import final_hidden, row_sum

FAMILIES = ("llama", "granite", "gemma2")  # plain, with a scale, with a softcap


def reference(head: Head, h_ND: torch.Tensor) -> torch.Tensor:
    z_NV = head.scale * (h_ND.double() @ head.weight_VD.double().T)
    return z_NV if head.softcap is None else head.softcap * torch.tanh(z_NV / head.softcap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_probing_and_training_see_the_same_logits(family, dtype, monkeypatch):
    twin = Twin(tiny(family).to(dtype), Plan.none(6))
    h_ND = final_hidden(twin, ids(2, 12))  # type: ignore[arg-type]
    assert h_ND.dtype == dtype
    seen: list[torch.Tensor] = []

    def pruning(z_dense_NV, z_pruned_NV):
        seen.extend((z_dense_NV, z_pruned_NV))
        return torch.zeros(len(z_dense_NV))

    row_sum(twin, pruning, h_ND, h_ND)
    seen.append(Lens(View.of_model("dense", twin.model)).logits(h_ND))
    terms = loss.loss_terms

    def training(y_CV, z_CV, *rest):
        seen.extend((y_CV.clone(), z_CV.clone()))
        return terms(y_CV, z_CV, *rest)

    monkeypatch.setattr(loss, "loss_terms", training)
    weight_VD, bias_V, scale, softcap = head_of(twin.model)
    loss.distillation_loss(h_ND, h_ND, weight_VD, Loss(), bias_V=bias_V, scale=scale, softcap=softcap)

    assert len(seen) == 5 and all(torch.equal(z_NV, seen[0]) for z_NV in seen)
    exact_NV = reference(head_of(twin.model), h_ND)
    assert seen[0].dtype == torch.float32
    assert (seen[0] - exact_NV).abs().max() < 1e-5 * exact_NV.abs().max()  # bf16 logits are off by up to 4e-3


def test_a_ready_head_gives_the_same_bits_and_float64_stays():
    head = head_of(tiny("granite").to(torch.bfloat16))
    h_ND = torch.randn(5, head.weight_VD.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(head.ready().logits(h_ND), head.frozen().logits(h_ND))
    wide = Head(head.weight_VD.detach().double(), scale=head.scale)
    assert torch.equal(wide.logits(h_ND.double()), (h_ND.double() @ wide.weight_VD.T) * head.scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_pulled_back_is_the_gradient(family):
    head = Head(*head_of(tiny(family).double())).frozen()
    generator = torch.Generator().manual_seed(1)
    h_ND = torch.randn(4, head.weight_VD.shape[1], dtype=torch.float64, generator=generator).requires_grad_()
    up_NV = torch.randn(4, head.weight_VD.shape[0], dtype=torch.float64, generator=generator)
    (expected_ND,) = torch.autograd.grad(reference(head, h_ND), h_ND, up_NV)
    _, slope_NV = head.logits_and_slope(h_ND.detach())
    torch.testing.assert_close(head.pull_back(up_NV.clone(), slope_NV), expected_ND)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_all_finite_finds_one_value_among_many_and_no_sum_that_overflows(dtype):
    large = torch.full((64, 64), 60_000).to(dtype)  # their sum is infinite in float16
    assert all_finite(large) and all_finite(large[:0])
    if dtype.is_floating_point:
        for bad in (float("nan"), float("inf"), float("-inf")):
            one, both = large.clone(), large.clone()
            one[3, 5] = both[0, 0] = bad
            both[9, 9] = -bad
            assert not all_finite(one) and not all_finite(both)
