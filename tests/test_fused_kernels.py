"""Fused kernels of a training step against the stock modules and float64. Needs a GPU.

Without one they run in Triton's interpreter, on the CPU and slowly, where TRITON_INTERPRET=1 asks for it; it cuts
bfloat16 off where a GPU rounds, so that values in bfloat16 are compared less closely there.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from tiny import FAMILIES, ids, tiny
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from twins import fill_adapters, masked_twin

from recover.config.recipe import Lora, Loss
from recover.distill.distiller import Distiller
from recover.kernels import fused
from recover.kernels.fused import PlainGate, gated_lora_linear
from recover.models.plan import Plan
from recover.models.twin import Twin

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED), reason="the kernels run on a GPU, or in Triton's interpreter"
)


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    monkeypatch.setattr(fused, "DEVICES", (DEVICE,))


def rounding(dtype):
    """Of one number, relative: twice as much where the interpreter cuts off."""
    return torch.finfo(dtype).eps * (2 if INTERPRETED and dtype == torch.bfloat16 else 1)


def normal(*shape, dtype=torch.float32, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(shape, generator=generator)).to(DEVICE, dtype)


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def gradients(y, inputs, upstream):
    return torch.autograd.grad(y, inputs, upstream, retain_graph=True)


def norm_of(width, dtype):
    norm = LlamaRMSNorm(width, eps=1e-5).to(DEVICE, dtype).requires_grad_(False)
    norm.weight.data = normal(width, dtype=dtype, seed=9) + 1
    return norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 64), (3, 7, 96), (1, 4, 3, 16), (2, 3, 3584), (1, 2, 1), (9, 1000)], ids=str)
def test_a_norm_is_the_stock_one_and_its_gradient_no_less_exact(shape, dtype):
    x, norm, upstream = normal(*shape, dtype=dtype, size=3.0), norm_of(shape[-1], dtype), normal(*shape, seed=1)
    x.requires_grad_()
    upstream = upstream.to(dtype)
    ours, stock = fused.rms_norm(x, norm.weight, norm.variance_epsilon), norm(x)
    with torch.no_grad():
        assert torch.equal(fused.rms_norm(x, norm.weight, norm.variance_epsilon), ours)
    torch.testing.assert_close(ours, stock, rtol=4 * rounding(dtype), atol=1e-7)
    if not (INTERPRETED and dtype == torch.bfloat16):
        assert (ours != stock).double().mean() <= (1 if dtype == torch.float32 else 0.02)
    exact = x.detach().double().requires_grad_()
    root = (exact.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    (truth,) = gradients(exact / root * norm.weight.double(), exact, upstream.double())
    (mine,), (theirs,) = gradients(ours, x, upstream), gradients(stock, x, upstream)
    if shape[-1] > 1:  # one number is normalised to its sign: no gradient but rounding
        assert relative(mine, truth) <= max(1.05 * relative(theirs, truth), rounding(dtype))


def test_a_norm_takes_rows_that_are_not_contiguous():
    x, norm = normal(4, 6, 32).transpose(0, 1).requires_grad_(), norm_of(32, torch.float32)
    ours, stock = fused.rms_norm(x, norm.weight, norm.variance_epsilon), norm(x)
    torch.testing.assert_close(ours, stock)
    upstream = normal(4, 6, 32, seed=1).transpose(0, 1)
    torch.testing.assert_close(gradients(ours, x, upstream), gradients(stock, x, upstream), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 96), (3, 7, 1031), (1, 1, 1)], ids=str)
def test_a_gate_is_the_stock_one_and_its_gradient_no_less_exact(shape, dtype):
    gate, up, upstream = (normal(*shape, dtype=dtype, seed=seed, size=4.0) for seed in range(3))
    gate.view(-1)[0] = -200.0  # e^200 is no float32
    gate.requires_grad_(), up.requires_grad_()
    ours, stock = fused.gated(gate, up), F.silu(gate) * up
    torch.testing.assert_close(ours, stock, rtol=max(4 * rounding(dtype), 2e-6), atol=1e-7)
    exact = [each.detach().double().requires_grad_() for each in (gate, up)]
    truth = gradients(F.silu(exact[0]) * exact[1], exact, upstream.double())
    mine, theirs = (gradients(each, (gate, up), upstream) for each in (ours, stock))
    for index in range(2):
        assert mine[index].isfinite().all()
        if gate.numel() > 1:
            allowed = max(1.05 * relative(theirs[index], truth[index]), rounding(dtype), 1e-6)
            assert relative(mine[index], truth[index]) <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [(0, 1, 2, 3), (2, 3), (0, 3), (1, 2)], ids=str)
def test_the_gated_step_with_kernels_is_the_plain_one(asked, dtype):
    gate, up = normal(2, 9, 40, dtype=dtype), normal(2, 9, 40, dtype=dtype, seed=1)
    weight, a, b = normal(24, 40, dtype=dtype, seed=2), normal(4, 40, seed=3), normal(24, 4, seed=4)
    inputs = [(gate, up, a, b)[index].requires_grad_() for index in asked]
    upstream = normal(2, 9, 24, dtype=dtype, seed=5)
    kept = gate.detach().clone(), up.detach().clone(), upstream.clone()
    found = []
    for way in (fused.FusedGate(), PlainGate(F.silu)):
        y = gated_lora_linear(gate, up, way, weight, None, a, b, 0.5)
        found.append((y, *gradients(y, inputs, upstream)))
    assert all(torch.equal(now, before) for now, before in zip((gate, up, upstream), kept, strict=True))
    for ours, plain in zip(*found, strict=True):
        assert relative(ours, plain) < (2e-6 if dtype == torch.float32 else 0.01)


def turned(heads, size, dtype, *, batch=2, tokens=5, shared=False):
    """Query, key (of fewer heads), as a projection leaves them, and cos, sin whose halves differ."""
    q, k = (
        normal(batch, tokens, count, size, dtype=dtype, seed=seed).transpose(1, 2).requires_grad_()
        for seed, count in enumerate(heads)
    )
    cos, sin = (normal(1 if shared else batch, tokens, size, dtype=dtype, seed=seed) for seed in (3, 4))
    return q, k, cos, sin


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads, size, shared", [((4, 2), 16, False), ((3, 1), 6, True), ((28, 4), 128, True), ((40, 40), 80, False)]
)
def test_rotary_is_the_stock_one_to_the_bit_with_its_gradients(heads, size, shared, dtype):
    q, k, cos, sin = turned(heads, size, dtype, shared=shared)
    ours, stock = fused.rotary(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin)
    upstream = [normal(*each.shape, dtype=dtype, seed=seed) for seed, each in enumerate(stock, 5)]
    mine, theirs = (gradients(each, (q, k), upstream) for each in (ours, stock))
    for found, expected in zip((*ours, *mine), (*stock, *theirs), strict=True):
        assert found.shape == expected.shape and found.transpose(1, 2).is_contiguous()
        if INTERPRETED and dtype == torch.bfloat16:
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
        else:
            assert torch.equal(found, expected)
    with torch.no_grad():
        assert all(map(torch.equal, fused.rotary(q, k, cos, sin), ours))


def test_rotary_takes_any_strides():
    q, k, cos, sin = turned((4, 2), 16, torch.float32)
    strange = [each.detach().contiguous().requires_grad_() for each in (q, k)]
    ours, stock = fused.rotary(*strange, cos, sin), apply_rotary_pos_emb(q, k, cos, sin)
    assert all(map(torch.equal, ours, stock))
    one = torch.ones((), device=DEVICE)
    mine = gradients(ours, strange, [one.expand(each.shape) for each in ours])
    assert all(map(torch.equal, mine, gradients(stock, (q, k), [torch.ones_like(each) for each in stock])))


def test_rotary_of_other_shapes_is_left_to_the_stock_function():
    seen = []
    ours = fused.rotary_or(lambda *tensors, **named: seen.append(named) or tensors[:2])
    q, k, cos, sin = turned((4, 2), 16, torch.float32)
    ours(q, k, cos, sin)
    assert not seen
    for others in (
        (q, k, cos[..., :8], sin[..., :8]),  # of a part of each head
        (q, k, cos.double(), sin.double()),
        (q, k, cos[0], sin[0]),
        (q, k, cos.clone().requires_grad_(), sin),
        (q[:, :, :0], k[:, :, :0], cos[:, :0], sin[:, :0]),
    ):
        ours(*others)
    ours(q, k, cos, sin, unsqueeze_dim=2)
    assert len(seen) == 6


def twin_of(family, dtype, *, kernels, masked=False):
    model = tiny(family).to(DEVICE, dtype)
    twin = masked_twin(model) if masked else Twin(model, Plan("depth", 6, (2, 4)))
    twin.add_lora(Lora(rank=4))
    fill_adapters(twin)
    twin.model.to(DEVICE).train()
    twin.switch.kernels = kernels
    return twin


def step(twin):
    """Loss a token of one batch, and the gradient of every adapter, as one row."""
    batch = ids().to(DEVICE)
    twin.model.zero_grad()
    sums = twin.model(input_ids=batch, labels=batch, distill=Distiller(twin, Loss(chunk=16)))
    loss = sums["loss"] / sums["tokens"]
    loss.backward()
    return loss.item(), torch.cat([each.grad.flatten() for each in twin.model.parameters() if each.grad is not None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_every_family_is_the_eager_one(family, dtype):
    (ours, mine), (eager, theirs) = (step(twin_of(family, dtype, kernels=kernels)) for kernels in (True, False))
    if dtype == torch.float32:
        assert ours == pytest.approx(eager, rel=1e-5) and relative(mine, theirs) < 1e-5
        return
    exact = twin_of(family, torch.float32, kernels=False)
    narrow = twin_of(family, dtype, kernels=False)
    for wide, half in zip(exact.model.parameters(), narrow.model.parameters(), strict=True):
        wide.data.copy_(half.data)
    true_loss, truth = step(exact)
    assert ours == pytest.approx(true_loss, rel=0.1)
    assert relative(mine, truth) <= (4.0 if INTERPRETED else 1.3) * relative(theirs, truth)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_step_of_a_masked_model_is_the_eager_one(family):
    (ours, mine), (eager, theirs) = (
        step(twin_of(family, torch.float32, kernels=kernels, masked=True)) for kernels in (True, False)
    )
    assert ours == pytest.approx(eager, rel=1e-5) and relative(mine, theirs) < 1e-5


def counted(monkeypatch):
    """Calls of each kernel from now on."""
    calls = dict.fromkeys(("rms_norm", "gated", "rotate", "gated_backward", "rms_norm_backward"), 0)
    for name in calls:
        stock = getattr(fused.kernels(), name)

        def counting(*arguments, name=name, stock=stock, **options):
            calls[name] += 1
            return stock(*arguments, **options)

        monkeypatch.setattr(fused.kernels(), name, counting)
    return calls


def test_a_step_runs_kernels_in_both_passes(monkeypatch):
    twin, calls = twin_of("llama", torch.float32, kernels=True), counted(monkeypatch)
    step(twin)
    assert calls == {
        "rms_norm": 13 + 9,  # two a block and the last one: 6 blocks dense, 4 pruned
        "gated": 6 + 4,
        "rotate": 6 + 4 + 4,
        "gated_backward": 4,
        "rms_norm_backward": 8,  # in front of the first one nothing asks for a gradient
    }


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_checkpointing_runs_the_same_kernels_again(family, reentrant, monkeypatch):
    plain, again = (twin_of(family, torch.float32, kernels=True) for _ in range(2))
    again.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again.model.enable_input_require_grads()
    expected = step(plain)
    calls = counted(monkeypatch)
    found = step(again)
    assert found[0] == pytest.approx(expected[0], rel=1e-6) and relative(found[1], expected[1]) < 1e-6
    assert calls["gated"] == 6 + 4 + 4 and calls["gated_backward"] == 4


def test_what_does_not_train_is_stock_to_the_bit(monkeypatch):
    stock = tiny().to(DEVICE)
    twin, eager = (twin_of("llama", torch.float32, kernels=kernels) for kernels in (True, False))
    calls, batch = counted(monkeypatch), ids().to(DEVICE)
    with torch.no_grad(), twin.dense() as dense:
        assert torch.equal(dense(batch).logits, stock(batch).logits)
    for each in (twin, eager):
        each.model.eval()
    assert torch.equal(twin.model(input_ids=batch).logits, eager.model(input_ids=batch).logits)
    assert not any(calls.values())
    with twin.dense(teaching=True) as dense:
        torch.testing.assert_close(dense(batch).logits, stock(batch).logits, rtol=1e-4, atol=1e-4)
        assert calls["gated"] == 6
        with twin.dense() as again:
            again(batch)
        assert calls["gated"] == 6
