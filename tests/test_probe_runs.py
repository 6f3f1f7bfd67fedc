"""The probe holds for any batching, processes, adapters and masks, and refuses what it cannot measure."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os

import pytest
import torch
from probe_reference import (
    CFG,
    DROPPED,
    NO_TOKENIZER,
    STEPS,
    apart,
    differences,
    dropping,
    endless,
    of,
    prompts,
    text_of,
    two_models_and_records,
)

from recover.base import dist
from recover.base.errors import DataError, ModelError
from recover.config import recipe
from recover.models.plan import MaskRecord, Plan
from recover.models.switched import MaskedLinear
from recover.models.twin import Twin
from recover.probe import compare
from recover.probe.probe import dense_trajectories, final_drift, probe
from recover.probe.records import Block, Final, record_of, summary
from recover.probe.trajectory import encode
from recover.probe.views import Lens, Pair, View


@pytest.fixture
def both():
    return two_models_and_records()


def test_figures_do_not_depend_on_batches_or_chunks(both, monkeypatch):
    model = both[0]
    expected = json.dumps([record.to_json() for record in both[2]])
    monkeypatch.setattr(compare, "ELEMENTS", {"cpu": 1})
    assert apart(probe(dropping(copy.deepcopy(model)), NO_TOKENIZER, prompts(), CFG), json.loads(expected)) == []
    monkeypatch.undo()
    for size in (1, 5):
        cfg = CFG.model_copy(update={"batch_size": size})
        assert apart(probe(dropping(copy.deepcopy(model)), NO_TOKENIZER, prompts(), cfg), json.loads(expected)) == []


def test_final_drift_is_the_final_record_with_or_without_stored_trajectories(both):
    twin = dropping(copy.deepcopy(both[0]))
    expected = next(record for record in of(both[2], Final) if record.temperature == 1).to_json()
    found = final_drift(twin, NO_TOKENIZER, prompts(), CFG)
    stored = dense_trajectories(twin, NO_TOKENIZER, prompts(), CFG)
    assert final_drift(twin, NO_TOKENIZER, prompts(), CFG, trajectories=stored) == found
    each = found.pop("each")
    assert found == expected and len(each) == expected["prompts"]
    assert sum(positions for _, positions in each) == expected["positions"]
    mean = sum(kl for kl, _ in each) / expected["positions"]
    assert mean == pytest.approx(expected["kl"]["mean"], rel=1e-6)
    assert [kl / n for kl, n in each] == pytest.approx(
        [final_drift(twin, NO_TOKENIZER, [prompt], CFG)["kl"]["mean"] for prompt in prompts()], rel=1e-4
    )


def test_a_pair_of_two_models_gives_what_the_twin_gives(both):
    dense, pruned, records = both
    kept = tuple(i for i in range(6) if i not in DROPPED)
    pair = Pair(View.of_model("dense", dense), View.of_model("pruned", pruned, kept), frozenset(DROPPED))
    found = [record.to_json() for record in probe(pair, NO_TOKENIZER, prompts(), CFG)]
    assert {record["block"] for record in found if record["probe"] == "block"} == set(kept)
    expected = [record.to_json() for record in records if not (isinstance(record, Block) and record.closed)]
    for record, other in zip(found, expected, strict=True):
        if record["probe"] != "identity":
            assert differences(record, other, record["probe"]) == []


def test_masks_count_as_zeros_in_the_weights():
    dense = endless()
    name = "model.layers.1.mlp.up_proj"
    keep = torch.rand(96, 64, generator=torch.Generator().manual_seed(0)) > 0.5
    zeroed = copy.deepcopy(dense)
    zeroed.get_submodule(name).weight.data *= keep
    expected = probe(
        Pair(View.of_model("dense", dense), View.of_model("pruned", zeroed)), NO_TOKENIZER, prompts(2), CFG
    )
    plan = Plan("magnitude", 6, masks={name: MaskRecord.of(keep, "unstructured")})
    twin = Twin(copy.deepcopy(dense), plan, {name: keep})
    assert isinstance(twin.base.get_submodule(name), MaskedLinear)
    assert apart(probe(twin, NO_TOKENIZER, prompts(2), CFG), [record.to_json() for record in expected]) == []


def test_lora_changes_the_pruned_view_alone_and_the_model_is_left_as_it_was(both):
    twin = dropping(copy.deepcopy(both[0]))
    model = twin.add_lora(recipe.Lora(rank=2, dropout=0.5))
    model.train()
    training = [module.training for module in model.modules()]
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    records = probe(twin, NO_TOKENIZER, prompts(), CFG)
    assert apart(records, [record.to_json() for record in both[2]]) == []  # B = 0, dropout off
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    moved = final_drift(twin, NO_TOKENIZER, prompts(), CFG)
    assert final_drift(twin, NO_TOKENIZER, prompts(), CFG) == moved  # dropout is off: nothing is drawn
    assert moved["kl"]["mean"] != pytest.approx(of(records, Final)[1].metrics["kl"]["mean"], rel=1e-2)
    dense = dense_trajectories(twin, NO_TOKENIZER, prompts(), CFG)
    assert [trajectory.tokens()[0] for trajectory in dense] == [
        text_of(both[0], prompts()[trajectory.batch.prompts[0]]).tolist() for trajectory in dense
    ]
    assert [module.training for module in model.modules()] == training
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks


def token_of_only(number, model):
    """A token that one prompt holds, and no other prompt nor its continuation."""
    others = [prompt for i, prompt in enumerate(prompts()) if i != number]
    seen = {token for prompt in others for token in [*prompt, *text_of(model, prompt).tolist()]}
    return next(token for token in prompts()[number] if token not in seen)


@pytest.mark.parametrize("view", ["dense", "pruned"])
def test_logits_that_are_not_finite_are_an_error_that_names_the_prompt(view):
    model = endless()
    if view == "dense":
        model.model.layers[DROPPED[0]].mlp.down_proj.weight.data[0, 0] = float("nan")
        twin, expected = dropping(model), "prompt 0, decoding step 0: the dense view gives"
    else:
        poisoned = copy.deepcopy(model)
        poisoned.model.embed_tokens.weight.data[token_of_only(3, model)] = float("inf")
        twin = Pair(View.of_model("dense", model), View.of_model("pruned", poisoned))
        expected = "prompt 3, decoding step 0: the pruned view gives"
    with pytest.raises(ModelError, match=expected):
        probe(twin, NO_TOKENIZER, prompts(), CFG)
    with pytest.raises(ModelError, match=expected):
        final_drift(twin, NO_TOKENIZER, prompts(), CFG)
    assert not any(module._forward_hooks for module in model.modules())


def test_two_vocabularies_are_refused():
    pair = Pair(View.of_model("dense", endless()), View.of_model("pruned", endless(vocab_size=250)))
    with pytest.raises(ModelError, match="256 logits, the pruned view 250"):
        probe(pair, NO_TOKENIZER, prompts(), CFG)


@pytest.mark.parametrize(
    "bad, message",
    [
        ([], "no prompts"),
        ([[5, 6], []], "prompt 1 has no tokens"),
        ([[5] * 249], "prompt 0 has 249 tokens; with probe.steps 8 that is more than the 256 positions"),
        ([[5], [256]], r"prompt 1 holds a token outside 0\.\.255"),
    ],
)
def test_prompts_that_cannot_be_probed_are_refused(bad, message):
    with pytest.raises(DataError, match=message):
        probe(dropping(endless()), NO_TOKENIZER, bad, CFG)


def test_prompts_are_a_users_turn_where_there_is_a_chat_template():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "hello", "user", "assistant", "there"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert encode(tokenizer, ["hello there"]) == [[1, 4]]
    turns = "{% for turn in messages %}{{ turn.role }} {{ turn.content }} {% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}assistant{% endif %}"
    assert encode(tokenizer, ["hello there"]) == [[2, 1, 4, 3]]
    assert encode(tokenizer, [[1, 2, 3]]) == [[1, 2, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_rounded_below_float32(dtype):
    model = endless().to(dtype)
    lens = Lens(View.of_model("dense", model))
    h_ND = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits = lens.logits(h_ND)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, h_ND.float() @ model.lm_head.weight.float().T)


def test_summary_is_the_same_from_records_and_from_json(both):
    lines = [json.dumps(record.to_json(), allow_nan=False) for record in both[2]]
    found = summary(both[2])
    assert found == summary([record_of(json.loads(line)) for line in lines])
    assert found["prompts"] == 5 and found["final"]["temperature"] == 1.0
    assert [final["temperature"] for final in found["temperatures"]] == [0.5, 1.0, 2.0]
    assert [block["block"] for block in found["blocks"] if block["lens"] == "final_norm"] == list(range(6))
    assert [step["step"] for step in found["steps"]] == list(range(STEPS))
    assert found["identity"]["kl_max"] >= 0 and len(found["divergence"]["each"]) == 5


def _rank(rank: int, port: int, poison: bool, answers) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    dist.start()
    model = endless()
    if poison:  # a token of a prompt that only the second process reads
        model.model.embed_tokens.weight.data[token_of_only(2, model)] = float("nan")
    try:
        answers.put((rank, [record.to_json() for record in probe(dropping(model), NO_TOKENIZER, prompts(), CFG)]))
    except ModelError as error:
        answers.put((rank, str(error)))
    dist.stop()


@pytest.mark.parametrize("poison", [False, True])
def test_two_processes_give_the_records_of_one_to_the_last_bit_and_fail_together(both, poison):
    context = multiprocessing.get_context("fork")
    answers, port = context.Queue(), 29500 + os.getpid() % 2000 + poison
    ranks = [context.Process(target=_rank, args=(rank, port, poison, answers)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = dict(answers.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(30)
    if poison:
        assert found[0] == found[1] and "prompt 2, decoding step 0" in found[0]
    else:
        assert found[0] == found[1] == [record.to_json() for record in both[2]]
