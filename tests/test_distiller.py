"""Laws of the two passes in one forward: against two plain models, one of them with its blocks really removed."""

import copy

import pytest
import torch
from peft.tuners import lora
from tiny import ATTENDS, FAMILIES, ids, only, tiny

from recover.config.recipe import Lora, Loss
from recover.distill.distiller import Distiller, scored_rows, scored_tokens, without_mask
from recover.models.masked_lora import SwitchedLora
from recover.models.plan import MaskRecord, Plan
from recover.models.twin import Twin

DROPPED = (2, 4)
WEIGHTS = Loss(kl=1.0, variance=0.3, ce=0.2)


def batch(tokens=12):
    """Three sequences, right-padded, prompts not scored."""
    input_ids = ids(3, tokens)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 9:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def depth_twin(blocks="after_cut", dropped=DROPPED, family="llama", seed=7, **overrides):
    twin = Twin(tiny(family, **overrides), Plan("depth", 6, dropped))
    twin.add_lora(Lora(rank=4, blocks=blocks))
    scramble(twin, seed)
    return twin


def scramble(twin, seed):
    """B = 0 at the start would hide most mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(twin):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def trained(twin):
    return [parameter for parameter in twin.model.parameters() if parameter.requires_grad]


def forward(twin, cfg=WEIGHTS, **changes):
    twin.model.train()
    return twin.model(**{**batch(), **changes}, distill=Distiller(twin, cfg))


def textbook(dense, pruned, data):
    """KL + variance + CE over full logits of two models, scored positions only; sums."""
    keep = data["labels"][:, 1:] != -100
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        y = dense(**inputs).logits[:, :-1][keep].double()
    z = pruned(**inputs).logits[:, :-1][keep].double()
    p = torch.softmax(y, -1)
    kl = (p * (torch.log_softmax(y, -1) - torch.log_softmax(z, -1))).sum()
    dz = z - y
    variance = ((p * dz**2).sum(-1) - (p * dz).sum(-1) ** 2).sum() / 2
    ce = torch.nn.functional.cross_entropy(z, data["labels"][:, 1:][keep], reduction="sum")
    return WEIGHTS.kl * kl + WEIGHTS.variance * variance + WEIGHTS.ce * ce


def gradients(loss, twin):
    return torch.autograd.grad(loss, trained(twin))


def distance(found, expected):
    """Largest |a - b| / (1 + |b|), NaN if any is."""
    pairs = zip(found, expected, strict=True)
    return torch.stack([((one - other).abs() / (1 + other.abs())).max() for one, other in pairs]).max().item()


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "qwen2_sliding", "phi3"])
@pytest.mark.parametrize("blocks", ["all", "after_cut"])
def test_value_and_gradient_are_those_of_two_plain_models(family, blocks):
    twin = depth_twin(blocks, family=family)
    dense = tiny(family)
    out = forward(twin)
    expected = textbook(dense, twin.model, batch())
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-4)
    assert distance(gradients(out.loss, twin), gradients(expected, twin)) < 2e-4


def test_the_shared_prefix_runs_once_and_changes_nothing():
    twin = depth_twin("after_cut")
    distiller = Distiller(twin, WEIGHTS)
    assert distiller.shared_blocks == DROPPED[0]
    calls = []
    twin.blocks[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    once = twin.model.train()(**batch(), distill=distiller)
    assert len(calls) == 1
    distiller.shared_blocks = 0
    twice = twin.model(**batch(), distill=distiller)
    assert len(calls) == 3
    assert torch.equal(once.loss, twice.loss)
    assert all(map(torch.equal, gradients(once.loss, twin), gradients(twice.loss, twin)))
    assert twin.closed_blocks == DROPPED


@pytest.mark.parametrize("blocks", ["all", "after_cut"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(blocks, reentrant):
    twin = depth_twin(blocks)
    plain = gradients(forward(twin).loss, twin)
    twin.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    twin.model.enable_input_require_grads()
    for parameter in trained(twin):
        parameter.grad = None
    forward(twin).loss.backward()
    assert distance([parameter.grad for parameter in trained(twin)], plain) < 1e-6


def test_identical_views_give_exactly_nothing():
    twin = Twin(tiny(), Plan.none(6))
    twin.add_lora(Lora(rank=4))
    out = forward(twin, Loss(kl=1.0, variance=1.0))
    assert out.loss.item() == 0
    assert all(gradient.count_nonzero() == 0 for gradient in gradients(out.loss, twin))


def test_bf16_identical_views_give_exactly_nothing_and_float32_gradients():
    model = tiny().to(torch.bfloat16)
    twin = Twin(model, Plan.none(6))
    twin.add_lora(Lora(rank=4))
    out = forward(twin, Loss(kl=1.0))
    assert out.loss.item() == 0 and out.loss.dtype is torch.float32
    assert {gradient.dtype for gradient in gradients(out.loss, twin)} == {torch.float32}


def test_bf16_gradients_point_where_float32_ones_do():
    exact = depth_twin()
    half = Twin(tiny().to(torch.bfloat16), Plan("depth", 6, DROPPED))
    half.add_lora(Lora(rank=4, blocks="after_cut"))
    scramble(half, 7)
    flat = [torch.cat([g.flatten() for g in gradients(forward(twin).loss, twin)]) for twin in (exact, half)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.999


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_that_share_their_input_compute_what_pefts_own_do(monkeypatch, dtype, dropout):
    """peft widens each adapter's input to float32, and autocast rounds it back: a copy, and the same numbers."""
    found = []
    for cast in (SwitchedLora._cast_input_dtype, lora.Linear._cast_input_dtype):
        monkeypatch.setattr(SwitchedLora, "_cast_input_dtype", cast)
        twin = Twin(tiny().to(dtype), Plan("depth", 6, DROPPED))
        twin.add_lora(Lora(rank=4, dropout=dropout))
        scramble(twin, 7)
        torch.manual_seed(3)
        out = forward(twin)
        found.append((out.loss, gradients(out.loss, twin)))
    (loss, ours), (other, theirs) = found
    assert torch.equal(loss, other)
    # What comes back to a shared input is added up in half precision, and not always in the same order.
    flat = [torch.cat([gradient.flatten() for gradient in each]).double() for each in (ours, theirs)]
    assert (flat[0] - flat[1]).norm() < torch.finfo(dtype).eps / 2 * flat[1].norm()


def test_masked_twins_learn_inside_their_mask():
    model = tiny()
    name = "model.layers.1.mlp.down_proj"
    keep = torch.rand(64, 96, generator=torch.Generator().manual_seed(3)) > 0.5
    masked = copy.deepcopy(model)
    masked.get_submodule(name).weight.data.mul_(keep)
    twin = Twin(model, Plan("magnitude", 6, masks={name: MaskRecord.of(keep, "unstructured")}), {name: keep})
    twin.add_lora(Lora(rank=4))
    out = forward(twin)
    torch.testing.assert_close(out.loss.double(), textbook(tiny(), masked, batch()), rtol=1e-5, atol=1e-4)
    assert Distiller(twin, WEIGHTS).shared_blocks == 0


def test_what_is_not_scored_does_not_count():
    """Poison: NaN hidden states wherever no token is scored; padding tokens replaced by others."""
    twin = depth_twin()
    clean = forward(twin)
    clean_gradients = gradients(clean.loss, twin)
    rows, _ = scored_rows(batch()["labels"])
    unscored = torch.ones(3 * 12, dtype=torch.bool).index_fill_(0, rows, False).view(3, 12)
    twin.base.model.norm.register_forward_hook(lambda _m, _a, h: h.masked_fill(unscored[:, :, None], float("nan")))
    other_padding = batch()["input_ids"].masked_fill(batch()["attention_mask"] == 0, 77)
    poisoned = forward(twin, input_ids=other_padding)
    assert torch.equal(poisoned.loss, clean.loss)
    assert distance(gradients(poisoned.loss, twin), clean_gradients) < 1e-6


def test_a_batch_without_scored_tokens_gives_zero_and_gradients():
    twin = depth_twin()
    out = forward(twin, labels=torch.full((3, 12), -100))
    assert out.loss.item() == 0 and out.tokens.item() == 0
    assert all(gradient.count_nonzero() == 0 for gradient in gradients(out.loss, twin))


def test_sums_add_up_over_sequences():
    twin = depth_twin()
    whole = forward(twin)
    rows = [{name: value[i : i + 1] for name, value in batch().items()} for i in range(3)]
    parts = [twin.model(**row, distill=Distiller(twin, WEIGHTS)) for row in rows]
    for name in ("loss", "kl", "variance", "ce", "tokens"):
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name], rtol=1e-5, atol=1e-5)
    assert whole.tokens == scored_tokens(batch()["labels"]) == 8 + 5 + 8


@pytest.mark.parametrize(("share", "weight"), [(0.0, 0.8), (0.1, 0.6), (0.3, 0.2), (0.4, 0.0), (0.9, 0.0)])
def test_a_fading_weight_is_at_each_step_a_fixed_one(share, weight):
    twin = depth_twin()
    twin.model.train()
    distiller = Distiller(twin, Loss(kl=1.0, variance=0.8, variance_until=0.4, ce=0.2))
    distiller.stand_at(0.35)  # whatever was before
    distiller.stand_at(share)
    found = twin.model(**batch(), distill=distiller)
    fixed = forward(twin, Loss(kl=1.0, variance=distiller.weights.variance, ce=0.2))
    assert distiller.weights.variance == pytest.approx(weight, abs=1e-12)
    assert all(torch.equal(found[name], fixed[name]) for name in ("loss", "kl", "variance"))
    assert all(map(torch.equal, gradients(found.loss, twin), gradients(fixed.loss, twin)))


def test_the_dense_weights_stay_untouched():
    twin = depth_twin()
    before = {name: value.clone() for name, value in tiny().state_dict().items()}
    out = forward(twin)
    out.loss.backward()
    torch.optim.SGD(trained(twin), lr=1.0).step()
    with twin.dense() as dense:
        logits = dense(input_ids=batch()["input_ids"]).logits
    assert torch.equal(logits, tiny()(input_ids=batch()["input_ids"]).logits)
    frozen = {name.replace(".base_layer", ""): value for name, value in twin.base.state_dict().items()}
    assert all(torch.equal(frozen[name], value) for name, value in before.items())


@pytest.mark.parametrize("family", only(FAMILIES, ATTENDS))
def test_right_padding_needs_no_mask(family):
    """Two views, loss and gradients: the same with the mask of the padding, and without one as in training."""
    found = []
    for change in (lambda data: data, without_mask):
        twin = depth_twin("all", family=family, **({"sliding_window": 4} if "sliding" in family else {}))
        out = forward(twin, **change(batch()))
        found.append((out, gradients(out.loss, twin)))
    (masked, expected), (plain, got) = found
    for name in ("loss", "kl", "variance", "ce"):
        torch.testing.assert_close(plain[name], masked[name], rtol=1e-4, atol=1e-4)
    assert distance(got, expected) < 1e-3
    assert not torch.equal(masked.loss, torch.zeros_like(masked.loss))
