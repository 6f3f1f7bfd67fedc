"""Laws of norms and MLPs that keep less for backward: the stock values to the bit, and gradients no less exact."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types

import pytest
import torch
import torch.nn.functional as F
from test_lora_linear import gradients, problem
from tiny import FAMILIES, ids, tiny
from transformers import DynamicCache
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm
from transformers.utils.deprecation import deprecate_kwarg
from twins import fill_adapters, masked_twin

from recover.config.recipe import Lora
from recover.kernels.fused import PlainGate, gated_lora_linear, lora_linear, rotary_or
from recover.models import lean
from recover.models.arch import ARCHS
from recover.models.lean import LeanAttention, LeanMlp, LeanNorm, make_lean, with_fused_rotary
from recover.models.plan import Plan
from recover.models.switched import Switch
from recover.models.twin import Twin

# Whose norms or MLPs are others. An upgrade of transformers that computes one otherwise shows here.
OTHER_MLPS = {"phi3", "glm", "glm4", "apertus", "arcee", "nemotron", "starcoder2", "seed_oss"}
OTHER_MLPS |= {"gpt_neox", "gpt_neox_sequential", "phi", "lfm2", "granitemoehybrid", "falcon_h1", "nemotron_h"}
GPT2 = {"gpt2", "gpt_bigcode"}
OTHER_MLPS |= GPT2
# Of mixtures: plain MLPs, in some blocks; where there are shared experts, each block has an MLP of the kind.
MIXED = {"mixtral": 0, "olmoe": 0, "qwen3_moe": 1, "qwen3_moe_step": 3, "gpt_oss": 0}
OTHER_NORMS = {"gemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "nemotron", "starcoder2", "qwen3_5_text"}
OTHER_NORMS |= {"gemma4_text", "gemma4_unified_text", "gpt_oss", "qwen3_next", "nemotron_h"}
OTHER_NORMS |= {"cohere", "cohere2", "gpt_neox", "gpt_neox_sequential", "phi", "stablelm", "stablelm_parallel"}
OTHER_NORMS |= GPT2
OTHER_ROTARY = {"phi3", "olmo2", "olmo3", "glm", "glm4", "ernie4_5", "nemotron", "qwen3_5_text", "gpt_oss", "glm4_moe"}
OTHER_ROTARY |= {"gemma4_text", "gemma4_unified_text", "cohere", "cohere2", "gpt_neox", "gpt_neox_sequential"}
OTHER_ROTARY |= {"qwen3_next", "nemotron_h", *GPT2}
ATTENDING = {"lfm2": 3, "granitemoehybrid": 3}  # of 6 blocks; the others have a mixer

FORWARD = inspect.unwrap(LlamaAttention.forward)


def twin_of(family, dtype=torch.float32, *, stock=False):
    twin = Twin(tiny(family).to(dtype), Plan("depth", 6, (2, 4)))
    with pytest.MonkeyPatch.context() as patch:
        if stock:
            patch.setattr("recover.models.twin.make_lean", lambda *_: None)
        twin.add_lora(Lora(rank=4))
    fill_adapters(twin)
    twin.model.train()
    return twin


def learned(twin, dtype):
    """Logits, and the gradient of every adapter, as one row."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = twin.model(input_ids=ids()).logits
    twin.model.zero_grad()
    logits.float().square().mean().backward()
    return logits, torch.cat([each.grad.flatten() for each in twin.model.parameters() if each.requires_grad]).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_lean_as_their_rows_say(family):
    modules = list(twin_of(family).base.modules())
    assert sum(isinstance(module, LeanMlp) for module in modules) == (
        0 if family in OTHER_MLPS else MIXED.get(family, 6)
    )
    norms = [module for module in modules if re.search(r"Norm(?!Gated)", type(module).__name__)]
    assert len(norms) >= 7 and {isinstance(norm, LeanNorm) for norm in norms} == {family not in OTHER_NORMS}
    attends = 0 if family in OTHER_ROTARY else ATTENDING.get(family, 6)
    assert sum(isinstance(module, LeanAttention) for module in modules) == attends


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "olmo2"])
def test_values_are_the_stock_ones_to_the_bit_and_gradients_point_the_same_way(family, dtype):
    (ours, mine), (theirs, other) = (learned(twin_of(family, dtype, stock=stock), dtype) for stock in (False, True))
    assert torch.equal(ours, theirs)
    assert (mine - other).norm() <= other.norm() * (1e-6 if dtype == torch.float32 else 0.03)


def test_half_precision_gradients_of_a_model_are_no_less_exact():
    half = [twin_of("llama", torch.bfloat16, stock=stock) for stock in (False, True)]
    (_, ours), (_, theirs) = (learned(twin, torch.bfloat16) for twin in half)
    exact = twin_of("llama", stock=True)
    for wide, narrow in zip(exact.model.parameters(), half[0].model.parameters(), strict=True):
        wide.data.copy_(narrow.data)  # the same numbers, computed in float32
    _, truth = learned(exact, torch.float32)
    assert (ours - truth).norm() <= 1.05 * (theirs - truth).norm() <= 0.2 * truth.norm()


def test_a_norms_gradient_is_no_less_exact_than_autograds():
    found = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        norm = LlamaRMSNorm(96).to(torch.bfloat16).requires_grad_(False)
        norm.weight.data = torch.rand(96, generator=generator).to(torch.bfloat16)
        x = torch.randn(2, 30, 96, generator=generator).to(torch.bfloat16).requires_grad_()
        upstream = torch.randn(x.shape, generator=generator).to(torch.bfloat16)
        exact = x.detach().double().requires_grad_()
        root = (exact.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        (truth,) = gradients(exact / root * norm.weight.double(), exact, upstream)
        stock = norm(x)
        make_lean(norm)
        ours = norm(x)
        assert isinstance(norm, LeanNorm) and torch.equal(ours, stock)
        found.append(
            [(gradients(each, x, upstream)[0].double() - truth).norm() / truth.norm() for each in (ours, stock)]
        )
    ours, stock = torch.tensor(found).mean(0)
    assert ours <= stock


def test_the_gated_step_is_the_plain_one_of_the_product():
    up, weight, bias, a, b = problem()
    gate = problem(seed=1)[0]
    inputs = (gate, up, a, b)
    ours = gated_lora_linear(gate, up, PlainGate(F.silu), weight, bias, a, b, 0.7)
    theirs = lora_linear(F.silu(gate) * up, weight, bias, a, b, 0.7)
    assert torch.equal(ours, theirs)
    upstream = torch.randn_like(ours)
    assert all(map(torch.equal, gradients(ours, inputs, upstream), gradients(theirs, inputs, upstream)))
    step = lambda *t: gated_lora_linear(t[0], t[1], PlainGate(F.silu), weight, bias, *t[2:], 0.7)  # noqa: E731
    assert torch.autograd.gradcheck(step, inputs)
    assert torch.autograd.gradcheck(lambda a, b: step(gate.detach(), up.detach(), a, b), (a, b))


def kept_by_mlps(twin):
    """Tensors that the first MLP keeps, of the size of its product."""
    mlp = twin.base.model.layers[0].mlp
    x_BTD = torch.randn(2, 20, 64, requires_grad=True)
    found = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.setdefault(t.data_ptr(), t), lambda t: t):
        mlp(x_BTD)
    return sum(tensor.shape == (2, 20, 96) for tensor in found.values())


def test_an_mlp_keeps_its_product_only_where_it_must():
    twin = twin_of("llama")
    assert kept_by_mlps(twin) == 2
    seen = []
    handle = twin.base.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs))
    assert kept_by_mlps(twin) == 4 and len(seen) == 1
    handle.remove()
    assert kept_by_mlps(twin) == 2
    masked = masked_twin(tiny())
    masked.add_lora(Lora(rank=4))
    assert kept_by_mlps(masked) == 4


def test_a_norm_that_learns_is_autograds():
    norm = LlamaRMSNorm(8)
    make_lean(norm)
    x = torch.randn(3, 8, requires_grad=True)
    norm(x).sum().backward()
    assert norm.weight.grad is not None
    norm.requires_grad_(False)
    assert "RmsNorm" in norm(x).grad_fn.name()


def test_a_second_time_does_nothing():
    twin = twin_of("llama")
    before = [type(module) for module in twin.base.modules()]
    make_lean(twin.base)
    assert [type(module) for module in twin.base.modules()] == before


@pytest.mark.parametrize("teaching", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm3", "granite"])
def test_without_a_gpu_no_view_changes_by_a_bit(family, teaching):
    twin, stock = twin_of(family), tiny(family)
    with twin.dense(teaching=teaching) as dense:
        assert torch.equal(dense(ids()).logits, stock(ids()).logits)


def test_kernels_run_for_training_only():
    twin = twin_of("llama")
    switch = twin.switch
    assert switch.fused(training=True) and not switch.fused(training=False)
    with twin.dense(teaching=True):
        assert switch.fused(training=False)
        with twin.dense():
            assert not switch.fused(training=False)
        assert switch.fused(training=False)
    assert not switch.fused(training=False)
    with pytest.raises(RuntimeError), twin.dense(teaching=True):
        raise RuntimeError
    assert switch == Switch(tuples=switch.tuples)
    switch.kernels = False
    assert not switch.fused(training=True)
    with twin.dense(teaching=True):
        assert not switch.fused(training=True)


def test_rotary_is_replaced_for_lean_attention_alone():
    stock = dict(vars(modeling_llama))
    new = with_fused_rotary(LlamaAttention)
    assert new is not None and new.__code__ is LlamaAttention.forward.__code__
    new = inspect.unwrap(new)  # from the decorator that renames keywords
    assert new.__code__ is FORWARD.__code__
    assert {name for name, value in new.__globals__.items() if value is not stock[name]} == {"apply_rotary_pos_emb"}
    assert dict(vars(modeling_llama)) == stock and twin_of("llama").base.model.layers[0].self_attn.with_kernel
    tensors = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), torch.randn(1, 5, 16), torch.randn(1, 5, 16)
    ours, theirs = (each["apply_rotary_pos_emb"](*tensors) for each in (new.__globals__, stock))
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rotary_on_a_cpu_is_the_stock_one_to_the_bit_and_its_gradient(dtype):
    shapes = (2, 4, 5, 16), (2, 2, 5, 16), (1, 5, 16), (2, 5, 16)
    q, k, *turns = (torch.randn(shape).to(dtype) for shape in shapes)
    q, k = (each.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for each in (q, k))  # as blocks have it
    for cos, sin in (turns, turns[::-1]):
        cos, sin = (each.expand(2, -1, -1) if cos.shape != sin.shape else each for each in (cos, sin))
        ours, stock = (each(q, k, cos, sin) for each in (rotary_or(no_stock), modeling_llama.apply_rotary_pos_emb))
        assert all(map(torch.equal, ours, stock))
        slopes = [torch.randn_like(each) for each in stock]
        mine_and_theirs = (torch.autograd.grad(each, (q, k), slopes) for each in (ours, stock))
        for mine, theirs in zip(*mine_and_theirs, strict=True):
            torch.testing.assert_close(mine, theirs)


def no_stock(*_, **__):
    raise AssertionError("the stock function ran")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gradient_of_a_norm_is_that_of_float64(dtype):
    x, weight_D, dy = torch.randn(3, 7, 24) * torch.logspace(-4, 3, 7)[:, None], torch.randn(24), torch.randn(3, 7, 24)
    x, weight_D, dy = (each.to(dtype) for each in (x, weight_D, dy))
    exact = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(lean_double(exact, weight_D.double()), exact, dy.double())
    found = lean.norm_gradient(dy, x, weight_D, 1e-6)
    assert found.dtype == dtype
    size = expected.abs().amax(-1, keepdim=True)
    assert float(((found.double() - expected).abs() / size).max()) < (5e-3 if dtype == torch.bfloat16 else 1e-6)


def lean_double(x, weight_D):
    return weight_D * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def attention_calling(function):
    """A class with Llama's forward, whose rotary embedding is `function`."""
    names = {**vars(modeling_llama), "apply_rotary_pos_emb": function}
    return with_forward(types.FunctionType(FORWARD.__code__, names, argdefs=FORWARD.__defaults__))


def with_forward(forward):
    return type("Other", (LlamaAttention,), {"forward": forward})


def copied(function, **names):
    return types.FunctionType(function.__code__, {**vars(modeling_llama), **names}, argdefs=function.__defaults__)


class Hub(torch.nn.Module):
    """As the `kernels` package holds a function."""


def test_rotary_is_known_by_its_numbers_behind_decorators_and_not_mistaken():
    plain = modeling_llama.apply_rotary_pos_emb
    hub = type("Func", (Hub,), {"forward": (lambda f: lambda self, *a, **k: f(*a, **k))(copied(plain))})()
    decorated = functools.wraps(plain)(lambda *a, **k: plain(*a, **k))
    written_otherwise = lambda q, k, cos, sin: lean.rotary(q, k, cos, sin)  # noqa: E731
    attention = tiny().model.layers[0].self_attn
    for known in (copied(plain), decorated, hub, written_otherwise):
        assert lean.computes_as_known("rotary", attention, attention_calling(known))
    doubled = lambda q, k, cos, sin, unsqueeze_dim=1: (2 * q, k)  # noqa: E731
    halves = copied(plain, rotate_half=lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2))
    wide = lambda *tensors: [each.bfloat16() for each in plain(*(each.float() for each in tensors))]  # noqa: E731
    for other in (doubled, halves, wide, print):
        assert not lean.computes_as_known("rotary", attention, attention_calling(other))
    assert with_fused_rotary(attention_calling(None)) is None
    assert with_fused_rotary(LlamaRMSNorm) is None


def round_late(norm, hidden_states):
    """As OLMo 2: the weight multiplies in float32."""
    wide = hidden_states.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return (norm.weight * wide).to(hidden_states.dtype)


def with_tail(norm, hidden_states):
    return lean.norm(hidden_states, norm.weight, 2 * norm.variance_epsilon)


def with_limit(mlp, x):
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)).clamp(max=1.0) * mlp.up_proj(x))


def failing(mlp, x):
    raise RuntimeError("not for these shapes")


@pytest.mark.parametrize(
    "stock, kind, other",
    [
        (modeling_llama.LlamaRMSNorm, LeanNorm, round_late),
        (modeling_llama.LlamaRMSNorm, LeanNorm, with_tail),
        (modeling_llama.LlamaMLP, LeanMlp, with_limit),
        (modeling_llama.LlamaMLP, LeanMlp, failing),
    ],
)
def test_what_computes_otherwise_runs_as_it_is_and_is_said_once(stock, kind, other, monkeypatch, capsys):
    twin_of("llama")
    assert "otherwise" not in capsys.readouterr().err
    monkeypatch.setattr(lean, "_found", {})
    monkeypatch.setattr(stock, "forward", other)
    twin = twin_of("llama", torch.bfloat16)
    kinds = [
        next((one for one in (LeanNorm, LeanMlp, LeanAttention) if isinstance(each, one)), None)
        for each in twin.base.modules()
    ]
    assert kind not in kinds and {LeanNorm, LeanMlp, LeanAttention} - {kind} == set(kinds) - {None}
    if other is not failing:
        plain = twin_of("llama", torch.bfloat16, stock=True)
        assert torch.equal(twin.model(input_ids=ids()).logits, plain.model(input_ids=ids()).logits)
    said = capsys.readouterr().err
    assert said.count("transformers computes otherwise") == 1 and f"of {stock.__name__}" in said


def test_a_check_moves_no_random_number_and_no_weight(monkeypatch):
    monkeypatch.setattr(lean, "_found", {})
    model = tiny()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    make_lean(model)
    assert lean._found and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_row_of_a_family_that_says_too_much_is_found_out(monkeypatch):
    monkeypatch.setitem(ARCHS, "olmo2", dataclasses.replace(ARCHS["olmo2"], lean=("norm", "mlp", "rotary")))
    twin = twin_of("olmo2")
    assert not any(isinstance(module, LeanNorm) for module in twin.base.modules())
    monkeypatch.setitem(ARCHS, "llama", dataclasses.replace(ARCHS["llama"], lean=()))
    assert not any(isinstance(module, LeanNorm | LeanMlp | LeanAttention) for module in twin_of("llama").base.modules())


def renaming(*names):
    """Llama's forward under transformers' decorator, once for each pair of names."""
    forward = FORWARD
    for old, new in names:
        forward = deprecate_kwarg(old, "99.0", new_name=new)(forward)
    return forward


@pytest.mark.parametrize(
    "names", [[], [("then", "hidden_states")], [("then", "hidden_states"), ("rope", "position_embeddings")]]
)
def test_a_forward_whose_keywords_are_renamed_is_known_and_takes_the_same_ones(names):
    stock = renaming(*names)
    new = with_fused_rotary(with_forward(stock))
    assert new is not None and [*inspect.signature(new).parameters] == [*inspect.signature(stock).parameters]
    model = tiny()
    h_BTD = torch.randn(2, 5, 64)
    given = {"hidden_states": h_BTD, "position_embeddings": model.model.rotary_emb(h_BTD, torch.arange(5)[None])}
    for old, name in names:
        with pytest.warns(FutureWarning, match=f"`{old}` is deprecated"):
            new(model.model.layers[0].self_attn, **{old: given[name]}, **{k: v for k, v in given.items() if k != name})
        given[old] = given.pop(name)
    ours, theirs = (each(model.model.layers[0].self_attn, attention_mask=None, **given)[0] for each in (new, stock))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_attention_with_another_rotary_takes_the_cache_under_the_names_that_the_stock_one_takes(name):
    model, h_BTD = tiny(), torch.randn(2, 5, 64)
    place = model.model.rotary_emb(h_BTD, torch.arange(5)[None])
    seen = []
    for forward in (with_fused_rotary(LlamaAttention), LlamaAttention.forward):
        cache = DynamicCache()
        forward(model.model.layers[0].self_attn, h_BTD, place, None, **{name: cache})
        seen.append(cache.get_seq_length())
    assert seen[0] == seen[1] and (seen[0] == 5 or name == "cache")


def test_a_decorator_that_is_not_known_is_refused():
    other = functools.wraps(FORWARD)(lambda *a, **k: FORWARD(*a, **k))
    for forward in (
        other,
        deprecate_kwarg("old", "99.0", new_name="hidden_states")(other),
        renaming(("x", "y")).__get__(1),
    ):
        assert with_fused_rotary(with_forward(forward)) is None
