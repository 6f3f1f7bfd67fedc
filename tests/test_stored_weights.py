"""Models whose weights are in a store: every figure is that of resident ones, with two blocks there at most."""

import pytest
import torch
from tiny import FAMILIES, tiny

from recover.base.errors import ModelError
from recover.config.recipe import Lora, Model
from recover.export.merge import merge
from recover.models import stored_weights
from recover.models.load import load_model, ready
from recover.models.plan import Plan
from recover.models.stored_weights import comes_and_goes, each_weight, present, stored_in
from recover.models.twin import Held
from recover.train.state_cache import _weights_sha256
from recover.train.written_text import weights_fingerprint

IDS = torch.arange(24).view(2, 12) % 256


@pytest.fixture
def folder(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# Their files have a tensor for each expert, their classes one for all.
EXPERTS_ONE_BY_ONE = ("qwen3_next", "mixtral", "olmoe", "qwen3_moe", "qwen3_moe_step", "glm4_moe", "deepseek_v3")


def loaded(folder, **fields):
    return ready(load_model(Model(source=str(folder), **fields)))


def there(model):
    """Numbers of the blocks some of whose weights that come and go are in memory."""
    found = (getattr(each, "stored", None) for each in model.parameters() if each.untyped_storage().nbytes())
    return sorted({block.number for block in found if block is not None})


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_a_store_gives_the_logits_of_a_resident_one(family, offload, tmp_path):
    tiny(family).save_pretrained(tmp_path)
    resident = loaded(tmp_path)
    if offload == "disk" and family in EXPERTS_ONE_BY_ONE:
        with pytest.raises(ModelError, match=r"made of several.*use model\.offload: cpu"):
            loaded(tmp_path, offload=offload)
        return
    stored = loaded(tmp_path, offload=offload)
    assert stored.generation_config.to_dict() == resident.generation_config.to_dict()
    assert stored.state_dict().keys() == resident.state_dict().keys()
    gone = [name for name, each in stored.named_parameters() if comes_and_goes(each)]
    matrices = [name for name, each in resident.named_parameters() if ".layers." in name and each.dim() > 1]
    assert gone == matrices
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(resident(IDS).logits, stored(IDS).logits)
            assert len(there(stored)) <= 2


def test_two_blocks_at_most_are_there_in_a_pass(folder):
    model, seen = loaded(folder, offload="cpu"), []
    for block in model.model.layers:
        block.register_forward_hook(lambda *_: seen.append(there(model)))
    with torch.no_grad():
        model(IDS)
        assert seen == [[number] for number in range(6)]  # nothing is known of their order yet
        seen.clear()
        model(IDS)
    assert seen == [*([number, number + 1] for number in range(5)), [0, 5]]


def test_weights_are_here_where_they_are_asked_for_and_nowhere_else(folder):
    resident, model = loaded(folder), loaded(folder, offload="cpu")
    first, second = (model.model.layers[number].mlp.up_proj.weight for number in (1, 4))
    assert there(model) == []
    with present(first), present(first, second), torch.no_grad():
        assert there(model) == [1, 4]
        model(IDS)  # goes through all of them, and leaves those that are asked for
        assert {1, 4} < set(there(model))
        assert torch.equal(second, resident.model.layers[4].mlp.up_proj.weight)
    assert not {1, 4} & set(there(model))
    pairs = zip(each_weight(model), resident.named_parameters(), strict=True)
    assert all(name == other and torch.equal(value, expected) for (name, value), (other, expected) in pairs)


def twins(folder, masked=False, **fields):
    keep = torch.rand(96, 64, generator=torch.Generator().manual_seed(0)) > 0.5
    name, found = "model.layers.1.mlp.up_proj", []
    for more in ({}, fields):
        held = Held(loaded(folder, **more))
        plan, masks = Plan("depth", 6, (2, 4)), {}
        if masked:
            from recover.models.plan import MaskRecord

            plan, masks = Plan("wanda", 6, masks={name: MaskRecord.of(keep, "unstructured")}), {name: keep}
        twin = held.twin(plan, masks)
        torch.manual_seed(0)
        twin.add_lora(Lora(rank=4))
        torch.manual_seed(1)
        for each in twin.model.parameters():
            if each.requires_grad:
                torch.nn.init.normal_(each, std=0.05)
        found.append((held, twin))
    return found


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_steps_and_merges_are_those_of_resident_weights(folder, masked, checkpointing, offload):
    (_, expected), (held, found) = twins(folder, masked, offload=offload)
    for _ in range(2):
        for a, b in zip(step(expected, checkpointing), step(found, checkpointing), strict=True):
            assert torch.equal(a, b)
        assert len(there(found.base)) <= 2
    pairs = zip(*(merge(each, torch.float32).state_dict().items() for each in (expected, found)), strict=True)
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)
    assert weights_fingerprint(expected) == weights_fingerprint(found)
    assert _weights_sha256(expected) == _weights_sha256(found)
    assert held.changed() == []
    again = held.twin(Plan.none(6))
    with torch.no_grad():
        assert torch.equal(again.model(IDS).logits, loaded(folder)(IDS).logits)
    assert stored_in(again.base) is stored_in(found.base)


def step(twin, checkpointing):
    """Dense logits, then loss and gradients of the pruned view."""
    if checkpointing:
        twin.base.gradient_checkpointing_enable({"use_reentrant": False})
    twin.model.train()
    with twin.dense():
        teacher = twin.model(IDS).logits
    twin.model.zero_grad()
    loss = (twin.model(IDS).logits - teacher).square().mean()
    loss.backward()
    return teacher, loss.detach(), *(p.grad.clone() for p in twin.model.parameters() if p.requires_grad)


def test_a_changed_weight_is_noticed(folder):
    held = Held(loaded(folder, offload="cpu"))
    store = stored_in(held.model)._store
    store._memory[3].view(torch.float32)[5] += 1
    assert held.changed() == ["model.layers.3.self_attn.q_proj.weight"]


def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.up_proj\.weight holds NaN"):
        loaded(tmp_path, offload="cpu")


def test_deepspeed_and_a_store_are_refused_together(folder, monkeypatch):
    monkeypatch.setattr("recover.base.dist.zero_stage", lambda: 2)
    with pytest.raises(ModelError, match=r"model\.offload: DeepSpeed.*launch/gpu\.yaml"):
        loaded(folder, offload="cpu")
    assert stored_weights.stored_in(loaded(folder)) is None


def test_files_of_another_dtype_are_read_as_the_models(tmp_path):
    tiny().to(torch.bfloat16).save_pretrained(tmp_path)
    resident = loaded(tmp_path)
    for offload in ("cpu", "disk"):
        with torch.no_grad():
            assert torch.equal(resident(IDS).logits, loaded(tmp_path, offload=offload)(IDS).logits)


@pytest.mark.parametrize(("bits", "near", "size"), [("4bit", 0.12, 0.6), ("8bit", 0.008, 1.1)])
def test_few_bits_are_near_and_small_and_merge_into_the_weights_of_the_files(folder, bits, near, size):
    if bits == "4bit":
        pytest.importorskip("bitsandbytes")
    (resident, expected), (held, found) = twins(folder, load_in=bits)
    stored = stored_in(held.model)
    assert not stored.exact
    for (name, value), (_, exact) in zip(each_weight(held.model), resident.model.named_parameters(), strict=True):
        if comes_and_goes(value):
            error = (value - exact).norm() / exact.norm()
            assert 0 < error < near, name
        else:
            assert torch.equal(value, exact)
    numbers = sum(each.numel() for each in held.model.parameters() if comes_and_goes(each))
    assert stored._store.nbytes < size * numbers + 2000 * 42  # of scales, which tiny matrices have too many of
    assert held.changed() == []
    teacher, loss, *gradients = step(found, checkpointing=False)
    assert torch.equal(teacher, loaded(folder, load_in=bits)(IDS).logits) and loss > 0
    assert all(each.isfinite().all() for each in gradients)
    pairs = zip(*(merge(each, torch.float32).state_dict().items() for each in (expected, found)), strict=True)
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


def test_int8_is_the_nearest_number_of_its_row(folder):
    held, resident = Held(loaded(folder, load_in="8bit")), loaded(folder)
    for (_, value), (_, exact) in zip(each_weight(held.model), resident.named_parameters(), strict=True):
        if comes_and_goes(value):
            step_O1 = exact.abs().amax(-1, keepdim=True) / 127
            assert ((value - exact).abs() <= step_O1 * 0.5001).all()


def test_few_bits_in_files_are_refused():
    with pytest.raises(ValueError, match="weights are in no file; use offload: cpu"):
        Model(source="x", load_in="4bit", offload="disk")
