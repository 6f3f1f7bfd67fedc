"""The memory arithmetic against tensors that a real step keeps, and against figures measured on a GPU."""

import pytest
import torch
from tiny import ids, tiny
from transformers import AutoConfig

from recover.base import memory
from recover.base.memory import GIB, Shape, Training, training_parts
from recover.config.recipe import Lora, Loss, Model, parse_recipe
from recover.distill.distiller import Distiller
from recover.models.load import describe, load_model
from recover.models.plan import Plan
from recover.models.site import sites_of
from recover.models.stored_weights import comes_and_goes, stored_in
from recover.models.twin import Twin
from recover.prune.depth.depth import fitted
from recover.prune.sparsity import prune_sparsegpt
from recover.run.estimate import estimate

TOKENS, RANK = 2 * 40, 5  # no other size of a test is either


def shape(**changes):
    fields = {"blocks": 6, "width": 64, "intermediate": 96, "heads": 4, "kv_heads": 2, "head_size": 16}
    return Shape(**{"parameters": 0, "vocabulary": 256, **fields, **changes})


def twin_of(shape, dtype):
    sizes = {"hidden_size": shape.width, "intermediate_size": shape.intermediate, "head_dim": shape.head_size}
    heads = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads}
    model = tiny(num_hidden_layers=shape.blocks, **sizes, **heads).to(dtype)
    twin = Twin(model, Plan("depth", shape.blocks, (2, 4)))
    twin.add_lora(Lora(rank=RANK))
    return twin


def kept_bytes(twin, *, checkpointing=False):
    """Bytes of the tensors that autograd keeps in one step of the distiller, each storage once, weights left out."""
    if checkpointing:
        twin.base.gradient_checkpointing_enable({"use_reentrant": False})
        twin.base.enable_input_require_grads()
    twin.model.train()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*twin.model.parameters(), *twin.model.buffers()]}
    found = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        factor = RANK in tensor.shape and TOKENS not in tensor.shape  # a half-precision copy of an adapter's matrix
        if storage.data_ptr() not in own and not factor:
            found[storage.data_ptr()] = storage  # the storage itself: its address must not be used again
        return tensor

    tokens_BT = ids(2, 40)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        twin.model(
            input_ids=tokens_BT,
            attention_mask=torch.ones_like(tokens_BT),
            labels=tokens_BT,
            distill=Distiller(twin, Loss(chunk=32)),
        )
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize(
    "changes",
    [{}, {"width": 128}, {"intermediate": 192}, {"heads": 8}, {"kv_heads": 4}, {"head_size": 32}],
    ids=lambda changes: next(iter(changes), "plain"),
)
@pytest.mark.parametrize(
    ("dtype", "element", "lean"),
    [
        pytest.param(torch.bfloat16, 2, True, id="bf16-lean"),
        pytest.param(torch.float32, 4, False, id="fp32-stock"),
        pytest.param(torch.bfloat16, 2, False, id="bf16-stock", marks=pytest.mark.slow),
        pytest.param(torch.float32, 4, True, id="fp32-lean", marks=pytest.mark.slow),
    ],
)
def test_a_block_keeps_as_much_as_the_formula_says(changes, dtype, element, lean, monkeypatch):
    if not lean:
        monkeypatch.setattr("recover.models.twin.make_lean", lambda *_: None)
    six, eight = (shape(**changes, blocks=blocks) for blocks in (6, 8))
    found = (kept_bytes(twin_of(eight, dtype)) - kept_bytes(twin_of(six, dtype))) / 2 / TOKENS
    assert found == pytest.approx(memory.block_bytes_per_token(six, RANK, element, lean=lean), rel=0.002)


@pytest.mark.parametrize(("dtype", "element"), [(torch.bfloat16, 2), (torch.float32, 4)], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    "changes", [{}, {"num_experts_per_tok": 3}, {"num_local_experts": 12}, {"intermediate_size": 64}]
)
def test_a_block_with_experts_keeps_as_much_as_the_formula_says(changes, dtype, element, tmp_path):
    found = {}
    for blocks in (6, 8):
        model = tiny("mixtral", num_hidden_layers=blocks, **changes).to(dtype)
        twin = Twin(model, Plan("depth", blocks, (2, 4)))
        twin.add_lora(Lora(rank=RANK))
        found[blocks] = kept_bytes(twin)
    model.config.save_pretrained(tmp_path)
    described = describe(Model(source=str(tmp_path)))
    expected = memory.block_bytes_per_token(described, RANK, element)
    assert (found[8] - found[6]) / 2 / TOKENS == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "glm4_moe", "deepseek_v3"])
def test_experts_are_counted_as_they_are(family, tmp_path):
    """Active: without what the experts that a token does not go through hold, tensor by tensor."""
    model = tiny(family)
    model.config.save_pretrained(tmp_path)
    described = describe(Model(source=str(tmp_path)))
    idle = 0
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            experts, used = len(parameter), model.config.num_experts_per_tok
            idle += (experts - used) * parameter[0].numel()
    assert described.active == model.num_parameters() - idle < described.parameters == model.num_parameters()
    sizes = [sum(each.numel() for each in block.parameters()) for block in model.model.layers]
    assert list(described.block_parameters) == sizes
    twin = Twin(model, Plan("depth", 6, (2,)))
    twin.add_lora(Lora(rank=RANK))
    trained = sum(parameter.numel() for parameter in twin.model.parameters() if parameter.requires_grad)
    if family == "deepseek_v3":  # whose attention has other matrices
        return
    assert trained == memory.adapter_parameters(described, RANK, blocks=5)
    parts = ("linears", "experts", "router")
    twin = Twin(tiny(family), Plan.none(6))
    twin.add_lora(Lora(rank=RANK, parts=parts))
    trained = sum(parameter.numel() for parameter in twin.model.parameters() if parameter.requires_grad)
    assert trained == memory.adapter_parameters(described, RANK, 6, parts)
    if family not in ("qwen3_moe", "glm4_moe"):  # without shared experts and plain MLPs
        return
    twin = Twin(tiny(family), Plan.none(6))
    twin.add_lora(Lora(rank=RANK, parts=("shared",)))
    trained = sum(parameter.numel() for parameter in twin.model.parameters() if parameter.requires_grad)
    attention = memory.adapter_parameters(described, RANK, 6)
    assert trained == memory.adapter_parameters(described, RANK, 6, ("linears", "shared")) - attention


def test_with_checkpointing_a_block_keeps_its_input():
    six, eight = (twin_of(shape(blocks=blocks), torch.bfloat16) for blocks in (6, 8))
    found = (kept_bytes(eight, checkpointing=True) - kept_bytes(six, checkpointing=True)) / 2 / TOKENS
    parts = [training_parts(shape(blocks=blocks), Training(TOKENS, rank=RANK, checkpointing=True)) for blocks in (6, 8)]
    assert found == (parts[1]["activations"] - parts[0]["activations"]) / 2 / TOKENS


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_adapters_and_cache_are_counted_as_they_are(family):
    model = tiny(family)
    described = shape(head_size=model.config.head_dim)
    twin = Twin(model, Plan("depth", 6, (2,)))
    twin.add_lora(Lora(rank=RANK))
    trained = sum(parameter.numel() for parameter in twin.model.parameters() if parameter.requires_grad)
    assert trained == memory.adapter_parameters(described, RANK, blocks=5)
    assert memory.kv_bytes_per_token(described, 4) == 2 * 6 * 2 * 16 * 4


QWEN_7B = Shape(7_615_616_512, 28, 3584, 18944, 28, 4, 128, 152_064)


@pytest.mark.parametrize(
    ("kept", "checkpointing", "measured"), [(21, False, 50), (21, True, 18), (4, False, 22), (4, True, 17)]
)
def test_within_a_fifth_of_what_one_h200_showed(kept, checkpointing, measured):
    """Qwen2.5-7B's shape, 8,192 tokens; a step whose adapters shared their inputs, so the formula lies above it."""
    training = Training(8192, kept_blocks=kept, checkpointing=checkpointing, lean=False)  # as they were then
    parts = training_parts(QWEN_7B, training)
    total = (sum(parts.values()) - parts["runtime"]) / GIB  # the allocator's own figure has no context in it
    assert measured * 0.97 < total < measured * 1.2


def test_sharing_out_takes_memory_off_training_but_not_off_measuring():
    plain = Training(2048, checkpointing=True, processes=8)
    stages = {zero: Training(2048, checkpointing=True, processes=8, zero=zero) for zero in (2, 3)}
    offload = Training(2048, checkpointing=True, processes=8, zero=3, offload=True)
    totals = [training_parts(QWEN_7B, each) for each in (plain, stages[2], stages[3], offload)]
    assert totals[1]["adapters"] < totals[0]["adapters"] and totals[1]["weights"] == totals[0]["weights"]
    assert totals[2]["weights"] == pytest.approx(totals[0]["weights"] / 8) and totals[3]["weights"] == 0
    whole = QWEN_7B.parameters * 2
    assert all(memory.peak_bytes(QWEN_7B, each) > whole for each in (plain, *stages.values(), offload))
    assert memory.launch_for(QWEN_7B, int(0.9 * whole), 128, processes=1).startswith("offload")
    assert memory.launch_for(QWEN_7B, 3 * GIB, 128) == "none"


def test_matrices_of_a_block_are_counted_as_they_are():
    block = tiny("qwen2").model.layers[0]
    assert memory.matrix_parameters(shape()) == sum(each.numel() for each in block.parameters() if each.dim() == 2)


@pytest.mark.parametrize("processes", [2, 8])
def test_shared_weights_take_what_others_own_off_training(processes):
    plain, sharded = (Training(2048, processes=processes, sharded=each) for each in (1, processes))
    away = memory.matrix_parameters(QWEN_7B) * 2 * (1 - 1 / processes)
    totals = [sum(training_parts(QWEN_7B, each).values()) for each in (plain, sharded)]
    assert totals[0] - totals[1] == pytest.approx((28 - 2) * away)
    saved = memory.measuring_bytes(QWEN_7B, plain) - memory.measuring_bytes(QWEN_7B, sharded)
    assert saved == pytest.approx((28 - 2) * away)  # in every stage
    for_training = Training(2048, processes=processes, sharded=processes, zero=2)
    assert memory.measuring_bytes(QWEN_7B, for_training) == memory.measuring_bytes(QWEN_7B, plain)
    # Two H100s, blocks 16 to 23 of 28 dropped, 8,192 tokens at once: 37.6 GB whole, 31.5 GB shared.
    if processes == 2:
        assert totals[0] - totals[1] == pytest.approx(37.6e9 - 31.5e9, rel=0.02)
    # While they are shared out for a training alone, a share lies beside the whole.
    assert memory.sharing_out_bytes(QWEN_7B, for_training) > 2 * QWEN_7B.parameters + memory.RUNTIME_BYTES
    assert memory.peak_bytes(QWEN_7B, for_training) >= memory.sharing_out_bytes(QWEN_7B, for_training)
    assert memory.sharing_out_bytes(QWEN_7B, sharded) == 0


@pytest.mark.parametrize("fields", [{"offload": "cpu"}, {"offload": "disk"}, {"load_in": "8bit"}, {"load_in": "4bit"}])
def test_weights_in_a_store_are_counted_as_they_are(fields, tmp_path):
    if "4bit" in fields.values():
        pytest.importorskip("bitsandbytes")
    tiny("qwen2", hidden_size=128, intermediate_size=256).save_pretrained(tmp_path)
    cfg = Model(source=str(tmp_path), **fields)
    described, model = describe(cfg), load_model(cfg)
    bits = int(fields.get("load_in", "0bit").removesuffix("bit"))
    training = Training(0, element=4, place=fields.get("offload", "gpu"), bits=bits)
    stays = sum(each.nbytes for each in model.parameters() if not comes_and_goes(each))
    held = stored_in(model)._store.nbytes if bits else 0
    assert training_parts(described, training)["weights"] == pytest.approx(stays + held, rel=0.05)
    block = sum(each.nbytes for each in model.model.layers[0].parameters() if comes_and_goes(each))
    assert training_parts(described, training)["engine"] == 2 * block
    expected = 6 * block if fields.get("offload") == "cpu" else 0
    assert memory.host_bytes(described, training) == expected
    whole = memory.measuring_bytes(described, Training(0, element=4))
    assert whole - memory.measuring_bytes(described, training) == pytest.approx(4 * block - held, rel=0.05)


@pytest.mark.parametrize(
    ("gib", "fields"),
    [
        (24, {"train.gradient_checkpointing": True}),
        (14, {"model.offload": "cpu", "train.gradient_checkpointing": True}),
        (80, {}),
    ],
)
def test_a_run_that_does_not_fit_is_told_the_nearest_setting_that_does(gib, fields):
    tries = [({}, Training(4096, kept_blocks=28))]
    found = memory.fitting(QWEN_7B, tries, memory.Room(gib * GIB, 64 * GIB))
    assert found is not None and found.fields == fields
    assert memory.fitting(QWEN_7B, tries, memory.Room(2 * GIB, 64 * GIB)) is None


def test_more_of_anything_never_takes_less():
    base = Training(2048, chunk=1024)
    more = [Training(4096), Training(2048, rank=64), Training(2048, chunk=2048), Training(2048, masked=True)]
    assert all(memory.peak_bytes(QWEN_7B, each) > memory.peak_bytes(QWEN_7B, base) for each in more)


def small_recipe(prune):
    calibration = {"data": "org/text"}
    return parse_recipe(
        {
            "name": "small",
            "model": {"source": "org/model"},
            "prune": {"calibration": calibration, **prune},
            "train": {"data": [{"kind": "dense", "prompts": "embedded:prompts"}], "length": 64},
            "measure": {"tasks": ["embedded:sums"]},
        },
        "my.yaml",
    )


@pytest.fixture
def description(tmp_path):
    tiny().save_pretrained(tmp_path)
    return describe(Model(source=str(tmp_path)))


def bytes_beside(prune, plain, description):
    figures = [estimate(small_recipe(each), description, rate=1e9) for each in (prune, plain)]
    return figures[0]["memory_bytes_per_process"] - figures[1]["memory_bytes_per_process"]


def test_the_plan_stage_counts_the_weights_that_sparsegpt_rewrites(description):
    prune = {"kind": "sparsegpt", "sparsity": 0.5}
    plan = prune_sparsegpt(Twin(tiny(), Plan.none(6)), small_recipe(prune).prune, [ids(2, 24)]).plan
    own = sum(torch.Size(shape).numel() for shape in plan.weights.values())
    assert bytes_beside(prune, {"kind": "wanda", "sparsity": 0.5}, description) == 4 * own > 0


@pytest.mark.parametrize("count", [1, 2])
def test_the_plan_stage_counts_the_weights_that_a_repair_rewrites(count, description):
    plain = {"kind": "depth", "blocks": [2, 4][:count]}
    weights, _ = fitted(Twin(tiny(), Plan.none(6)), sites_of((2,)), "linear", [ids(2, 24)], {}, 4, 6)
    own = sum(weight.numel() for weight in weights.values())
    assert bytes_beside({**plain, "repair": "linear"}, plain, description) == count * 4 * own > 0


def test_a_model_of_30_billion_uses_three_of_them(tmp_path):
    """Qwen3-30B-A3B: 30.5B parameters and 3.3B activated, says its card; routers are some ten-thousandths."""
    sizes = {"num_hidden_layers": 48, "hidden_size": 2048, "head_dim": 128, "num_experts": 128, "vocab_size": 151_936}
    AutoConfig.for_model("qwen3_moe", **sizes, moe_intermediate_size=768, num_experts_per_tok=8).save_pretrained(
        tmp_path
    )
    described = describe(Model(source=str(tmp_path)))
    assert (described.parameters, described.active) == (30_532_122_624, 3_353_032_704)
    assert memory.adapter_parameters(described, 16, 48, ("router",)) == 48 * 128 * 2048


@pytest.mark.parametrize("lean", [True, False])
def test_blocks_that_are_one_sublayer_take_together_what_blocks_of_two_take(lean):
    """Six attentions and six MLPs, each in a block of its own, against six blocks of both."""
    both, lone = shape(), shape(blocks=12, lone_mlps=6)
    whole, each = (memory.block_bytes_per_token(one, RANK, 2, lean=lean) for one in (both, lone))
    assert whole == 2 * each
    assert memory.adapter_parameters(both, RANK, 6) == memory.adapter_parameters(lone, RANK, 12)
    assert 6 * memory.matrix_parameters(both) == 12 * memory.matrix_parameters(lone)
