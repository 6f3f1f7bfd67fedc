"""Laws of a linear layer with LoRA in one step: peft's values and gradients, and no less exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft.tuners import lora
from tiny import ids, tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from twins import fill_adapters, masked_twin

from recover.config.recipe import Lora, Loss
from recover.distill.distiller import Distiller
from recover.kernels import fused
from recover.kernels.fused import cast_together, lora_linear, lowered
from recover.models import lean, masked_lora
from recover.models.masked_lora import MaskedLora, SwitchedLora, lora_layers
from recover.models.plan import Plan
from recover.models.twin import Twin

OUT, IN, RANK, SCALING = 24, 20, 3, 1.7


def problem(dtype=torch.float64, factors=torch.float64, *, shape=(2, 5), out=OUT, into=IN, rank=RANK, seed=0):
    """x (*shape, I), W, bias, A, B; x, A and B want gradients. Rounded before, so that only computing differs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x = normal(*shape, into).to(dtype).requires_grad_()
    a, b = ((normal(*size) / size[1] ** 0.5).to(factors).requires_grad_() for size in [(rank, into), (out, rank)])
    return x, (normal(out, into) / into**0.5).to(dtype), normal(out).to(dtype), a, b


def textbook(x, weight, bias, a, b, scaling):
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, a), b)


def gradients(output, inputs, upstream):
    return torch.autograd.grad(output, inputs, upstream.to(output.dtype))


@pytest.mark.parametrize("scaling", [SCALING, 2.0, 0.5, 1.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 5), (7,), (), (0, 4)])
def test_equals_the_naive_computation_in_value_and_gradient(shape, bias, scaling):
    x, weight, bias_O, a, b = problem(shape=shape)
    bias_O = bias_O if bias else None
    ours, naive = (each(x, weight, bias_O, a, b, scaling) for each in (lora_linear, textbook))
    assert ours.shape == naive.shape
    torch.testing.assert_close(ours, naive, rtol=1e-13, atol=1e-13)
    upstream = torch.randn_like(naive)
    for found, expected in zip(
        gradients(ours, (x, a, b), upstream), gradients(naive, (x, a, b), upstream), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_gradcheck_also_where_rows_are_not_contiguous_and_where_only_some_gradients_are_wanted():
    x, weight, bias, a, b = problem(shape=(4, 3))
    assert torch.autograd.gradcheck(lambda *t: lora_linear(t[0].transpose(0, 1), weight, bias, *t[1:], 0.7), (x, a, b))
    assert torch.autograd.gradcheck(lambda *t: lora_linear(x.detach(), weight, bias, *t, 0.7), (a, b))
    assert torch.autograd.gradcheck(lambda x: lora_linear(x, weight, None, a.detach(), b.detach(), 0.7), (x,))
    y = lora_linear(x, weight, bias, a, b, 0.7)
    ones = torch.ones((), dtype=y.dtype).expand_as(y)  # as a sum gives it: all strides are 0
    upstreams = (ones, ones.contiguous())
    assert all(map(torch.equal, *(torch.autograd.grad(y, (x, a, b), each, retain_graph=True) for each in upstreams)))


class Peft:
    """The same numbers through peft's own layer, under autocast as the distiller sets it."""

    def __init__(self, weight, bias, a, b):
        base = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype).requires_grad_(False)
        base.weight.data, base.bias.data = weight, bias
        config = lora.LoraConfig(r=a.shape[0], lora_alpha=SCALING * a.shape[0])
        self.layer = lora.Linear(base, "default", config=config, r=a.shape[0], lora_alpha=SCALING * a.shape[0])
        self.factors = self.layer.lora_A["default"].weight, self.layer.lora_B["default"].weight
        for parameter, value in zip(self.factors, (a, b), strict=True):
            parameter.data = value.detach().clone()

    def __call__(self, x):
        with torch.autocast("cpu", dtype=x.dtype, enabled=x.dtype != torch.float32):
            return self.layer(x)


def errors(dtype, factors, seed):
    """Of output and the gradients of x, A and B, against float64: ours, and peft's."""
    x, weight, bias, a, b = problem(dtype, factors, shape=(3, 40), out=96, into=64, rank=8, seed=seed)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, a, b)]
    truth = textbook(exact[0], weight.double(), bias.double(), *exact[1:], SCALING)
    upstream = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    peft = Peft(weight, bias, a, b)
    theirs, ours = peft(x), lora_linear(x, weight, bias, a, b, SCALING)
    assert ours.dtype == theirs.dtype == dtype
    want = [truth, *gradients(truth, exact, upstream)]
    mine = [ours, *gradients(ours, (x, a, b), upstream)]
    assert [each.dtype for each in mine] == [dtype, dtype, factors, factors]
    other = [theirs, *gradients(theirs, (x, *peft.factors), upstream)]
    return [
        [((found.double() - true).norm() / true.norm()).item() for found, true in zip(each, want, strict=True)]
        for each in (mine, other)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factors", ["float32", "half"])
def test_half_precision_is_no_less_exact_than_pefts(dtype, factors):
    factors = torch.float32 if factors == "float32" else dtype
    found = torch.tensor([errors(dtype, factors, seed) for seed in range(5)]).mean(0)
    assert (found[0] <= found[1]).all(), found


def test_float32_is_as_exact_as_pefts():
    found = torch.tensor([errors(torch.float32, torch.float32, seed) for seed in range(5)]).mean(0)
    assert (found < 1e-6).all() and (found[0] <= 1.1 * found[1]).all(), found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_power_of_two_in_the_factors_is_one_behind_the_products_bit_for_bit(dtype, monkeypatch):
    x, weight, bias, a, b = problem(dtype, torch.float32, shape=(30,), out=96, into=64, rank=8)
    assert [fused._exact(each) for each in (2.0, 1.0, 0.125, 3.0, 1.7)] == [True] * 3 + [False] * 2
    found = []
    for exact in (fused._exact, lambda _scaling: False):
        monkeypatch.setattr(fused, "_exact", exact)
        y = lora_linear(x, weight, bias, a, b, 4.0)
        found.append((y, *gradients(y, (x, a, b), torch.linspace(-1, 1, y.numel()).view(y.shape))))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("scaling", [2.0, SCALING])
def test_casts_made_together_are_those_made_one_by_one(scaling):
    made = [problem(torch.bfloat16, torch.float32, rank=rank, seed=rank) for rank in (3, 8)]
    factors = [factor for *_, a, b in made for factor in (a, b)]

    def outputs():
        return [lora_linear(*each, scaling) for each in made]

    expected = outputs()
    with cast_together(factors, 2.0, torch.bfloat16):
        assert len({lowered(each, torch.bfloat16, 2.0).plain.untyped_storage().data_ptr() for each in factors}) == 1
        found = outputs()
        with torch.no_grad():
            factors[0].zero_()  # what was cast before stays
        assert torch.equal(
            lowered(factors[0], torch.bfloat16, 2.0).scaled, 2 * lowered(factors[0], torch.bfloat16, 2.0).plain
        )
        assert lowered(factors[0], torch.bfloat16, 2.0).plain.any()
    assert not lowered(factors[0], torch.bfloat16, 2.0).plain.any()  # and is forgotten outside
    for one, other, (x, *_, a, b) in zip(found, expected, made, strict=True):
        upstream = torch.ones_like(one)
        assert torch.equal(one, other)
        assert all(map(torch.equal, gradients(one, (x, a, b), upstream), gradients(other, (x, a, b), upstream)))


def test_nothing_is_cast_together_that_needs_no_cast_or_is_dealt_out():
    *_, a, b = problem(torch.float32, torch.float32)
    for factors, dtype in (([a, b], torch.float32), ([], torch.bfloat16)):
        with cast_together(factors, 2.0, dtype):
            assert lowered(a, torch.bfloat16, 2.0).plain._base is None
    b.ds_id = 0  # as DeepSpeed marks what ZeRO-3 shares out
    with cast_together([a, b], 2.0, torch.bfloat16):
        assert lowered(a, torch.bfloat16, 2.0).plain._base is None


def test_a_step_casts_its_adapters_at_once():
    twin = twin_of(torch.bfloat16)
    distiller = Distiller(twin, Loss())
    kinds: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32 and args[0].ndim == 2:
                kinds.extend("cast" for each in twin.model.parameters() if each.data_ptr() == args[0].data_ptr())
            kinds.extend(["at once"] if func is torch.ops.aten._foreach_copy_.default else [])
            return func(*args, **(kwargs or {}))

    with Seen():
        twin.model(input_ids=ids(), attention_mask=None, labels=ids(), distill=distiller)["loss"].backward()
    assert kinds == ["at once"]
    assert len(distiller.adapters[0]) == 2 * len(lora_layers(twin.model)) and distiller.adapters[1] == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_of_zero_changes_no_bit(dtype):
    x, weight, bias, a, b = problem(dtype, torch.float32, out=96, into=64)
    assert torch.equal(lora_linear(x, weight, bias, a, torch.zeros_like(b), SCALING), F.linear(x, weight, bias))


def test_what_is_kept_for_backward():
    """x itself, so that adapters of one input share it; x A^T; the weight itself; casts of the factors."""
    x, weight, bias, a, b = problem(torch.bfloat16, torch.float32, shape=(40,))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, weight, bias, a, b, SCALING).sum().backward()
    own = {x.data_ptr(), weight.data_ptr()}
    assert own <= {tensor.data_ptr() for tensor in saved}
    others = [tuple(tensor.shape) for tensor in saved if tensor.data_ptr() not in own]
    assert sorted(others) == sorted([(40, RANK), (RANK, IN), (OUT, RANK)])


@pytest.fixture
def steps(monkeypatch):
    """What was called for the layers that took one step, in order."""
    taken = []

    for module, name in ((masked_lora, "lora_linear"), (lean, "gated_lora_linear")):
        step = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *inputs, step=step: taken.append(step) or step(*inputs))
    return taken


def twin_of(dtype=torch.float32, **options):
    twin = Twin(tiny("qwen2").to(dtype), Plan("depth", 6, (2, 4)))  # a family with biases
    twin.add_lora(Lora(rank=4, **options))
    fill_adapters(twin)
    twin.model.train()
    return twin


def logits(twin, dtype=torch.float32):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return twin.model(input_ids=ids()).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_adapter_of_a_training_step_takes_one_step_and_learns_as_with_peft(steps, dtype, monkeypatch):
    found = []
    for folded in (True, False):
        if not folded:
            monkeypatch.setattr(SwitchedLora, "foldable", lambda *_: None)
        twin = twin_of(dtype)
        out = logits(twin, dtype)
        out.float().square().mean().backward()
        trained = {name: each.grad for name, each in twin.model.named_parameters() if each.requires_grad}
        assert {grad.dtype for grad in trained.values()} == {torch.float32}
        found.append((out.detach(), trained))
    assert len(steps) == 4 * 7
    (ours, mine), (theirs, other) = found
    close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(ours, theirs, **close)
    for name, gradient in mine.items():
        assert torch.cosine_similarity(gradient.flatten(), other[name].flatten(), dim=0) > 0.99, name


def other_ways():
    """Where peft's own forward must run, and how many layers still take one step."""

    def hooked(twin):
        twin.base.model.layers[1].mlp.up_proj.base_layer.register_forward_hook(lambda *_: None)

    def gathered(twin):  # as by DeepSpeed, layer by layer
        for layer in lora_layers(twin.model):
            layer.lora_A["default"].register_forward_pre_hook(lambda *_: None)

    def trained(twin):
        twin.base.model.layers[1].mlp.up_proj.base_layer.weight.requires_grad_()

    def disabled(twin):
        for layer in lora_layers(twin.model):
            layer.enable_adapters(False)

    def merged(twin):
        twin.model.merge_adapter()

    return {"hooked": (hooked, 27), "gathered": (gathered, 0), "trained": (trained, 27), "disabled": (disabled, 0)} | {
        "merged": (merged, 0)
    }


@pytest.mark.parametrize("way", other_ways())
def test_pefts_own_way_where_one_step_would_miss_something(steps, way):
    change, expected = other_ways()[way]
    twin = twin_of()
    before = logits(twin)
    steps.clear()
    change(twin)
    after = logits(twin)
    assert len(steps) == expected
    if way != "disabled":
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_dropout_and_dtypes_that_differ_go_pefts_way(steps):
    logits(twin_of(dropout=0.2))
    logits(twin_of(torch.bfloat16))  # no autocast: peft widens the input to the adapters' float32
    assert not steps


def test_nothing_of_it_in_the_dense_view_and_masks_keep_their_own_step(steps):
    twin = twin_of()
    with twin.dense() as dense:
        assert torch.equal(dense(ids()).logits, tiny("qwen2")(ids()).logits)
    masked = masked_twin(tiny())
    masked.add_lora(Lora(rank=4))
    assert all(type(layer) is MaskedLora for layer in lora_layers(masked.model))
    logits(masked)
    assert not steps
