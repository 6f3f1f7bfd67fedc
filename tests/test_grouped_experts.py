"""Adapters on experts by grouped products: what the loop over experts gives, forward and backward, and no wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_decode import prompts, texts
from tiny import ids, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from twins import fill_adapters

from recover.base import console
from recover.config.recipe import Lora
from recover.kernels.fused import record
from recover.models import experts as module
from recover.models.arch import experts_of
from recover.models.experts import IN, OUT, Pairs, mixtures_of, taken_one_by_one, used_parameters
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.text.decode import write

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="there is no accelerator")
# Stored either way round, with bias and without.
FAMILIES = {"qwen3_moe": 8, "gpt_oss": 4}


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(module, "_said", set())


def layer_of(family: str, dtype: torch.dtype, rank: int = 3) -> Any:
    """Experts with adapters around them, both of which are random."""
    twin = Twin(tiny(family).to(DEVICE, dtype), Plan.none(6))
    twin.add_lora(Lora(rank=rank, parts=("experts",)))
    fill_adapters(twin)
    for name, parameter in twin.model.named_parameters():
        if name.endswith("_proj_bias"):
            parameter.data.normal_(generator=torch.Generator(DEVICE).manual_seed(2))
    return twin.blocks[0].mlp.experts


def adapters(layer: Any) -> dict[str, Tensor]:
    """By matrix and factor."""
    found = {}
    while hasattr(layer, "parameter_name"):
        found[f"{layer.parameter_name} A"] = layer.lora_A["default"].weight
        found[f"{layer.parameter_name} B"] = layer.lora_B["default"].weight
        layer = layer.base_layer
    return found


def routed(tokens: int, used: int, experts: list[int], seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, who gets them, router weights, and the gradient of what comes out, in float64."""
    made = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 64, generator=made, dtype=torch.float64)
    places = torch.stack([torch.randperm(len(experts), generator=made)[:used] for _ in range(tokens)])
    weights = torch.rand(tokens, used, generator=made, dtype=torch.float64)
    gradient = torch.randn(tokens, 64, generator=made, dtype=torch.float64)
    return tuple(each.to(DEVICE) for each in (hidden, torch.tensor(experts)[places], weights, gradient))  # type: ignore[return-value]


def both_ways(layer: Any, way: str, dtype: torch.dtype, *given: Tensor) -> dict[str, Tensor]:
    """What comes out, and all gradients."""
    layer.get_base_layer().config._experts_implementation = way
    hidden, index, weights, gradient = given
    hidden, weights = (each.to(dtype, copy=True).requires_grad_() for each in (hidden, weights))
    for each in adapters(layer).values():
        each.grad = None
    out = layer(hidden, index, weights)
    assert out.dtype == dtype
    out.backward(gradient.to(dtype))
    grads = {name: each.grad for name, each in adapters(layer).items()}
    return {"out": out.detach(), "hidden": hidden.grad, "weights": weights.grad, **grads}  # type: ignore[dict-item]


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize(("tokens", "used"), [(1, 1), (1, 2), (37, 1), (37, 2)])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_is_what_the_loop_gives(dtype, family, tokens, used, rank):
    """To float64 it is no further than the loop in the same dtype; some experts get no token."""
    asked = [0, 2, FAMILIES[family] - 1]
    given = routed(tokens, used, asked)
    layer = layer_of(family, dtype, rank)
    looped, grouped = (both_ways(layer, way, dtype, *given) for way in ("eager", "grouped_mm"))
    exact = layer_of(family, dtype, rank).double()  # the same weights: rounded before
    expected = both_ways(exact, "eager", torch.float64, *given)
    assert len(expected) == 7
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]  # of sums over few rows
    for name, value in expected.items():
        assert off(grouped[name], value) < max(1.5 * off(looped[name], value), rounding), name
    idle = [expert for expert in range(FAMILIES[family]) if expert not in given[1]]
    assert idle
    for name, grad in grouped.items():
        if name.endswith(" A"):
            assert not grad.unflatten(0, (-1, rank))[idle].any() and grad.any()
        if name.endswith(" B"):
            assert not grad.unflatten(1, (rank, -1))[..., idle].any() and grad.any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_that_learnt_nothing_leave_the_stock_output_to_the_bit(dtype, family):
    layer = layer_of(family, dtype)
    for name, each in adapters(layer).items():
        each.data.mul_(0 if name.endswith(" B") else 1)
    hidden, index, weights, _ = routed(37, 2, list(range(FAMILIES[family])))
    given = hidden.to(dtype), index, weights.to(dtype)
    assert torch.equal(layer(*given), layer.get_base_layer()(*given))


def test_half_precision_adapters_are_multiplied_under_autocast_as_training_does():
    """Float32 adapters beside bfloat16 weights; gradients come in the adapters' dtype."""
    layer = layer_of("qwen3_moe", torch.bfloat16)
    given = routed(37, 2, list(range(8)))
    found = {}
    for way in ("eager", "grouped_mm"):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            found[way] = both_ways(layer, way, torch.bfloat16, *given)
    for name, value in found["eager"].items():
        assert value.dtype == found["grouped_mm"][name].dtype
        assert off(found["grouped_mm"][name], value.double()) < 2e-2, name
    assert all(each.dtype == torch.float32 for each in adapters(layer).values())


class Asked(TorchDispatchMode):
    """Which operators of those ran that bring a number of a tensor to the host."""

    WAITS = ("_local_scalar_dense", "bincount", "nonzero", "unique", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        self.found |= {wait for wait in self.WAITS if name.startswith(wait)}
        return func(*args, **(kwargs or {}))


def test_no_number_comes_to_the_host():
    layer, given = layer_of("gpt_oss", torch.bfloat16), routed(37, 2, [0, 1, 3])
    for way, expected in (("grouped_mm", False), ("eager", True)):
        with Asked() as asked:
            both_ways(layer, way, torch.bfloat16, *given)
        assert bool(asked.found) == expected, asked.found


def test_pairs_are_where_they_are_said_to_be():
    index = torch.tensor([[3, 0], [0, 5], [5, 3]])
    pairs = Pairs.of(index, 7)
    assert pairs.expert_S.tolist() == [0, 0, 3, 3, 5, 5] and pairs.order_S.tolist() == [1, 2, 0, 5, 3, 4]
    assert pairs.ends_E.tolist() == [2, 2, 2, 4, 4, 6, 6] and pairs.ends_E.dtype == torch.int32
    assert torch.equal(pairs.expert_S[pairs.place_NP], index)


def test_what_a_product_leaves_in_the_gradient_of_an_idle_expert_is_not_learnt():
    factor = torch.ones(4, 2, 3, requires_grad=True)
    left = torch.full((4, 2, 3), torch.nan)
    left[[1, 3]] = 2.0
    module._Asked.apply(factor, torch.tensor([0, 3, 3, 9], dtype=torch.int32)).backward(left)
    assert torch.equal(factor.grad, left.nan_to_num(0))


@pytest.mark.parametrize(
    ("way", "dtype", "reason"),
    [
        ("eager", torch.float32, "experts_implementation is eager"),
        ("batched_mm", torch.bfloat16, "experts_implementation is batched_mm"),
        ("grouped_mm", torch.float64, "torch has no grouped product in float64"),
    ],
)
def test_where_there_is_no_grouped_product_the_loop_is_run_and_why_is_said_once(monkeypatch, way, dtype, reason):
    said: list[str] = []
    monkeypatch.setattr(console, "warn", said.append)
    layer, given = layer_of("qwen3_moe", dtype), routed(5, 2, [0, 1, 2])
    found = both_ways(layer, way, dtype, *given)
    assert all(torch.equal(each, found[name]) for name, each in both_ways(layer, way, dtype, *given).items())
    assert len(said) == 1 and reason in said[0] and "one expert after the other" in said[0]


@pytest.mark.parametrize(("width", "reason"), [(60, "no multiples of 16 bytes"), (64, "")])
def test_rows_that_are_not_aligned_are_left_to_the_loop(width, reason):
    twin = Twin(tiny("qwen3_moe", hidden_size=width, initializer_range=0.02).to(torch.bfloat16), Plan.none(6))
    experts = mixtures_of(twin.model)[0].experts
    found = module._not_grouped(experts)
    assert found.endswith(reason) and bool(found) == bool(reason)


@pytest.mark.parametrize("name", [IN, OUT])
def test_one_matrix_alone_may_have_adapters(name):
    layer = layer_of("gpt_oss", torch.float32)
    experts, given = layer.get_base_layer(), routed(9, 2, [0, 1, 3])
    hidden, index, weights = (each.to(torch.float32) if each.is_floating_point() else each for each in given[:3])
    while layer.parameter_name != name:
        layer = layer.base_layer
    found = {}
    for way in ("eager", "grouped_mm"):
        experts.config._experts_implementation = way
        found[way] = experts(hidden, index, weights, factors={name: layer.factors()})
    torch.testing.assert_close(found["grouped_mm"], found["eager"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found["eager"], experts(hidden, index, weights), atol=1e-2)


@pytest.mark.parametrize(("family", "count", "used"), [("qwen3_moe", 8, 2), ("gpt_oss", 4, 2)])
def test_of_a_mixture_the_parameters_count_that_a_token_goes_through(family, count, used):
    model = tiny(family)
    assert experts_of(model.config) == (count, used)
    named = dict(Twin(model, Plan.none(6)).base.named_parameters())
    idle = sum(each.numel() for name, each in named.items() if ".experts." in name) * (count - used) // count
    assert 0 < idle == sum(each.numel() for each in named.values()) - used_parameters(model)
    assert used_parameters(tiny("llama")) == tiny("llama").num_parameters()


def test_a_pass_waits_for_experts_with_masks_and_those_without_a_grouped_product():
    twin = Twin(tiny("qwen3_moe"), Plan.none(6))
    assert not taken_one_by_one(twin.base)
    mixtures_of(twin.base)[2].experts.masks = (OUT,)
    assert taken_one_by_one(twin.base)
    mixtures_of(twin.base)[2].experts.masks = ()
    twin.base.config._experts_implementation = "eager"
    assert taken_one_by_one(twin.base) and not taken_one_by_one(Twin(tiny("llama"), Plan.none(6)).base)


@on_a_gpu
@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_records_them_and_replays_what_is_launched(family, rank):
    """Forward and backward, with other tokens for other experts at the replay; the host is not waited for."""
    count, dtype = FAMILIES[family], torch.bfloat16
    layer = layer_of(family, dtype, rank)
    learnt = list(adapters(layer).values())
    first, second = (routed(37, 2, some, seed) for some, seed in ((list(range(count)), 1), ([0, 1, count - 1], 2)))
    hidden, index, weights, gradient = first
    hidden, weights = (each.to(dtype).requires_grad_() for each in (hidden, weights))
    gradient, index = gradient.to(dtype), index.clone()

    def step() -> tuple[Tensor, ...]:
        out = layer(hidden, index, weights)
        return out, *torch.autograd.grad(out, (hidden, weights, *learnt), gradient)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph, recorded = record(step, torch.cuda.graph_pool_handle())
    with torch.no_grad():
        for into, other in zip((hidden, index, weights, gradient), second, strict=True):
            into.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, other) for one, other in zip(recorded, launched, strict=True))
    assert all(each.isfinite().all() and each.any() for each in launched)


@on_a_gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recovered_mixture_writes_by_recorded_steps(family, monkeypatch):
    monkeypatch.setattr(console, "warn", pytest.fail)  # a recording that fails would only warn
    twin = Twin(tiny(family).to(DEVICE, torch.bfloat16), Plan.none(6))
    twin.add_lora(Lora(rank=3, parts=("linears", "experts", "router")))
    fill_adapters(twin)
    twin.model.eval()
    found = texts(write, twin.base, prompts(24), limit=30, rows=24)
    assert found == texts(write, twin.base, prompts(24), limit=30, rows=24) and any(found.values())
    twin.base(ids().to(DEVICE))  # nothing recorded has been left behind that the plain way trips over
