"""Models whose weights are in a store: every figure is that of resident ones, with two blocks there at most."""

import json
import re

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from safetensors.torch import load_file
from tiny import ATTENDS, FAMILIES, tiny

from recover.base.errors import ModelError
from recover.config.recipe import Lora, Model, load_recipe
from recover.export.merge import merge
from recover.export.verify import check, write_expected
from recover.export.write import write_merged
from recover.models import stored_weights
from recover.models.load import describe, load_model, ready
from recover.models.plan import Plan
from recover.models.stored_weights import comes_and_goes, each_weight, present, stored_in
from recover.models.twin import Held
from recover.run import stages
from recover.train.state_cache import _weights_sha256
from recover.train.written_text import weights_fingerprint

IDS = torch.arange(24).view(2, 12) % 256


@pytest.fixture
def folder(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# Their files have a tensor for each expert, their classes one for all.
EXPERTS_ONE_BY_ONE = ("qwen3_next", "mixtral", "olmoe", "qwen3_moe", "qwen3_moe_step", "glm4_moe", "deepseek_v3")
ON_DISK = {*ATTENDS, "gpt2", "phi3", "qwen3_moe"}  # each kind of attention, turned and fused matrices, experts


def loaded(folder, **fields):
    return ready(load_model(Model(source=str(folder), **fields)))


def there(model):
    """Numbers of the blocks some of whose weights that come and go are in memory."""
    found = (getattr(each, "stored", None) for each in model.parameters() if each.untyped_storage().nbytes())
    return sorted({block.number for block in found if block is not None})


@pytest.mark.parametrize(
    ("offload", "family"),
    [
        *(("cpu", family) for family in FAMILIES),
        *(pytest.param("disk", family, marks=() if family in ON_DISK else pytest.mark.slow) for family in FAMILIES),
    ],
)
def test_a_model_in_a_store_gives_the_logits_of_a_resident_one(family, offload, tmp_path):
    tiny(family).save_pretrained(tmp_path)
    resident = loaded(tmp_path)
    assert describe(Model(source=str(tmp_path))).in_files == (family not in EXPERTS_ONE_BY_ONE)
    if offload == "disk" and family in EXPERTS_ONE_BY_ONE:
        with pytest.raises(ModelError, match=r"made of several.*use model\.offload: cpu"):
            loaded(tmp_path, offload=offload)
        return
    stored = loaded(tmp_path, offload=offload)
    assert stored.generation_config.to_dict() == resident.generation_config.to_dict()
    assert stored.state_dict().keys() == resident.state_dict().keys()
    gone = [name for name, each in stored.named_parameters() if comes_and_goes(each)]
    in_blocks = [pair for pair in resident.named_parameters() if re.search(r"\.(layers|h)\.", pair[0])]
    matrices = [name for name, each in in_blocks if each.dim() > 1]
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
    assert stored._store.nbytes < size * numbers
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


EXPORTED = ("llama_tied", "qwen3_moe", "gpt_oss", "phi3", "gemma3_text")


@pytest.mark.parametrize("family", EXPORTED)
def test_an_export_written_one_by_one_is_the_one_written_at_once(family, tmp_path):
    tiny(family).save_pretrained(tmp_path / "model")
    (_, expected), (_, found) = twins(tmp_path / "model", offload="cpu")
    for name, twin in (("at_once", expected), ("one_by_one", found)):
        merged = write_merged(
            twin, torch.bfloat16, byte_tokenizer(), tmp_path / name, card="", record={}, max_shard_size="100KB"
        )
        write_expected(tmp_path / f"{name}.safetensors", twin, merged, IDS)
        (tmp_path / "plan.json").write_text(json.dumps(twin.plan.to_json()))
    at_once, one_by_one = (tensors_of(tmp_path / name) for name in ("at_once", "one_by_one"))
    assert at_once.keys() == one_by_one.keys()
    assert all(torch.equal(at_once[name], value) for name, value in one_by_one.items())
    assert len(list((tmp_path / "one_by_one").glob("*.safetensors"))) > 1
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "at_once" / name).read_text() == (tmp_path / "one_by_one" / name).read_text()
    records = [
        check(tmp_path / name, tmp_path / f"{name}.safetensors", tmp_path / "plan.json")
        for name in ("at_once", "one_by_one")
    ]
    for record in records:
        assert record.pop("files") and record["ok"], record["problems"]
    assert records[0] == records[1]


def tensors_of(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.parametrize("bits", ["8bit"])
def test_an_export_of_few_bits_is_verified_against_its_own_merge(bits, folder, tmp_path):
    (_, _), (_, twin) = twins(folder, load_in=bits)
    merged = write_merged(twin, torch.float32, byte_tokenizer(), tmp_path / "out", card="", record={})
    write_expected(tmp_path / "expected", twin, merged, IDS)
    (tmp_path / "plan.json").write_text(json.dumps(twin.plan.to_json()))
    record = check(tmp_path / "out", tmp_path / "expected", tmp_path / "plan.json")
    assert record["ok"] and record["quantized"] == "8 bits"
    assert record["logits_max_difference"] > 100 * record["rounding"] > 100 * record["logits_max_difference_reload"]


def test_a_plan_refuses_the_disk_where_tensors_do_not_lie_in_the_files_as_they_are(tmp_path):
    tiny("qwen3_moe").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    asked = [f"model.source={tmp_path / 'model'}", "model.offload=disk", "prune={kind: depth, blocks: [2]}"]
    with pytest.raises(ModelError, match=r"made of several.*use model\.offload: cpu"):
        stages.run(load_recipe("embedded:quickstart", asked), tmp_path, until="plan")
