"""Laws of the twin: its pruned view is the physically pruned model, its dense view the untouched one, bit for bit."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, ids, tiny
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from twins import Distill, fill_adapters, masked_twin, random_masks, removed, stepwise

from recover.base.errors import ModelError
from recover.config import recipe
from recover.models.arch import ARCHS, as_linears, linears_of
from recover.models.plan import MaskRecord, Plan
from recover.models.switched import MaskedLinear
from recover.models.twin import Twin

# Which blocks go. (1, 2, 4) and (1, 3, 5) empty the first full-attention layer of the cache in gemma3 and gemma2, (3,)
# the first sliding one in qwen2.
DROPS = [(3,), (1, 3, 5), (1, 2, 4)]


def test_every_supported_family_is_tried():
    assert {model_type for model_type, _ in FAMILIES.values()} == set(ARCHS)


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_is_removed(family):
    """Logits of the pruned view = logits of a model without those blocks: in one pass and cached, padded and not."""
    dense, input_ids = tiny(family), ids()
    whole = torch.ones_like(input_ids)
    padded = whole.clone()
    padded[0, :7] = 0
    twin = Twin(copy.deepcopy(dense), Plan.none(6))
    stock = copy.deepcopy(dense)
    as_linears(stock)  # as a twin has it: rounded alike
    before = stock(input_ids).logits
    for dropped in DROPS:
        if 5 in dropped and twin.arch.last_stays:
            continue
        reference = removed(dense, dropped)
        as_linears(reference)
        with torch.no_grad(), twin.closed(set(dropped)):
            for mask in (whole, padded):
                expected = reference(input_ids, attention_mask=mask).logits
                assert torch.equal(twin.model(input_ids, attention_mask=mask).logits, expected), dropped
            assert torch.equal(stepwise(twin.model, input_ids, padded), stepwise(reference, input_ids, padded)), dropped
            assert not torch.equal(twin.model(input_ids).logits, before), "a drop that changes nothing"
    assert torch.equal(twin.model(input_ids).logits, before)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "qwen2_sliding"])
def test_generation_with_cache_is_generation_without(family):
    dense, input_ids = tiny(family), ids(tokens=12)
    twin = Twin(copy.deepcopy(dense), Plan("depth", 6, (1, 3)))
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
        "attention_mask": torch.ones_like(input_ids),
    }
    reference = removed(dense, (1, 3))
    for wrap in (lambda: twin.base, lambda: twin.add_lora(recipe.Lora(rank=2))):
        model = wrap()
        with_cache = model.generate(input_ids=input_ids, use_cache=True, **options)
        assert torch.equal(with_cache, model.generate(input_ids=input_ids, use_cache=False, **options))
        assert torch.equal(with_cache, reference.generate(input_ids, **options))
        with twin.dense():
            assert torch.equal(model.generate(input_ids=input_ids, **options), dense.generate(input_ids, **options))


@pytest.mark.parametrize("masked", [False, True])
def test_dense_view_is_the_untouched_model(masked):
    """Before and after pruned passes, training steps, exceptions, nested excursions; training flags come back."""
    dense, input_ids = tiny("llama"), ids()
    reference = dense(input_ids).logits.detach()
    weights = {name: value.clone() for name, value in dense.state_dict().items()}
    twin = masked_twin(dense) if masked else Twin(dense, Plan("depth", 6, (2, 4)))
    names = set(twin.base.state_dict())
    assert names == set(weights), "a state dict's names must stay the stock model's"

    def dense_is_untouched() -> None:
        with twin.dense() as model:
            assert torch.equal(model(input_ids).logits, reference)
        assert not torch.equal(twin.model(input_ids).logits, reference)

    dense_is_untouched()
    twin.add_lora(recipe.Lora(rank=4, dropout=0.3))
    fill_adapters(twin)
    dense_is_untouched()
    twin.model.train()
    optimizer = torch.optim.AdamW([p for p in twin.model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        with twin.dense() as model:
            assert not torch.is_grad_enabled() and not model.training
            target = model(input_ids).logits
            assert torch.equal(target, reference)
        assert twin.base.training and all(m.training for m in twin.model.modules())
        (twin.model(input_ids=input_ids).logits - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        dense_is_untouched()
    with pytest.raises(RuntimeError, match="inside"), twin.dense():
        raise RuntimeError("inside")
    assert not twin.switch.dense
    with twin.dense(), twin.dense():
        pass
    with twin.dense():
        with twin.dense():
            pass
        assert torch.equal(twin.base(input_ids).logits, reference), "an inner excursion ended the outer one"
    dense_is_untouched()
    for name, value in weights.items():
        stock = dict(twin.model.named_parameters())
        key = next(k for k in stock if k.replace("base_model.model.", "").replace(".base_layer", "") == name)
        assert torch.equal(stock[key], value), name


@pytest.mark.parametrize("masked", [False, True])
def test_zero_adapters_are_pruned_only(masked):
    dense, input_ids = tiny("llama"), ids()
    twin = masked_twin(dense) if masked else Twin(dense, Plan("depth", 6, (2, 4)))
    pruned = twin.model(input_ids).logits
    twin.add_lora(recipe.Lora(rank=4))
    assert torch.equal(twin.model(input_ids=input_ids).logits, pruned)
    fill_adapters(twin)
    assert not torch.equal(twin.model(input_ids=input_ids).logits, pruned)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_those_without_checkpointing(masked, reentrant):
    """The dense excursion is inside the forward; were dense the resting view, backward would recompute that."""
    gradients = []
    for checkpointing in (False, True):
        twin = masked_twin(tiny("llama")) if masked else Twin(tiny("llama"), Plan("depth", 6, (2, 4)))
        model = twin.add_lora(recipe.Lora(rank=4))
        fill_adapters(twin)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=ids(), attention_mask=torch.ones_like(ids()), distill=Distill(twin))["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert len(plain) == (6 if masked else 4) * 7 * 2
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, checkpointed[name]), name


def test_distill_goes_through_the_peft_model():
    """With `distill=` the forward is `distill.run` on the causal LM, whoever wraps it; without, the stock forward."""

    class Echo:
        def run(self, model, **batch):
            return {"class": type(model).__name__, "batch": batch}

    twin = Twin(tiny("llama"), Plan("depth", 6, (2,)))
    peft_model = twin.add_lora(recipe.Lora(rank=2))
    out = peft_model(input_ids=ids(), labels=ids(), distill=Echo(), return_dict=True)
    assert out["class"] == "LlamaForCausalLM"
    assert set(out["batch"]) == {"input_ids", "attention_mask", "labels"} and out["batch"]["attention_mask"] is None
    assert peft_model(input_ids=ids(), labels=ids()).loss is not None


def test_lora_sits_where_the_recipe_says():
    def blocks_with_lora(**options) -> set[int]:
        twin = Twin(tiny("llama"), Plan("depth", 6, (2, 4)))
        twin.add_lora(recipe.Lora(rank=2, **options))
        names = [name for name, p in twin.model.named_parameters() if p.requires_grad]
        assert all("lora_" in name for name in names)
        return {int(name.split(".layers.")[1].split(".")[0]) for name in names}

    assert blocks_with_lora() == {0, 1, 3, 5}
    assert blocks_with_lora(blocks="after_cut") == {3, 5}


def test_adapters_of_a_low_precision_model_are_float32():
    for twin in (Twin(tiny("llama").bfloat16(), Plan("depth", 6, (2,))), masked_twin(tiny("llama").bfloat16())):
        twin.add_lora(recipe.Lora(rank=2))
        assert {p.dtype for n, p in twin.model.named_parameters() if "lora_" in n} == {torch.float32}
        assert twin.model(input_ids=ids()).logits.dtype == torch.bfloat16


def test_an_adapter_read_back_is_switched_too(tmp_path):
    """Saved by peft as ordinary files, loaded by peft onto a new twin, adopted: same logits in both views."""
    from peft import PeftModel

    input_ids = ids()
    for make in (masked_twin, lambda model: Twin(model, Plan("depth", 6, (2, 4)))):
        first = make(tiny("llama"))
        first.add_lora(recipe.Lora(rank=4))
        fill_adapters(first)
        first.model.save_pretrained(tmp_path / "adapter")
        second = make(tiny("llama"))
        second.adopt(PeftModel.from_pretrained(second.base, tmp_path / "adapter"))
        assert torch.equal(second.model(input_ids=input_ids).logits, first.model(input_ids=input_ids).logits)
        with second.dense() as model:
            assert torch.equal(model(input_ids).logits, tiny("llama")(input_ids).logits)


def test_merging_and_saving_keep_every_zero(tmp_path):
    twin, input_ids = masked_twin(tiny("llama")), ids()
    keep = {name: linear.keep for name, linear in linears_of(twin.model).items() if isinstance(linear, MaskedLinear)}
    twin.add_lora(recipe.Lora(rank=4))
    fill_adapters(twin)
    trained = twin.model(input_ids=input_ids).logits
    merged = twin.model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(stock) is LlamaForCausalLM
    for name, keep_OI in keep.items():
        weight = stock.get_submodule(name).weight
        assert torch.equal(weight[~keep_OI], torch.zeros_like(weight[~keep_OI])), name
        assert (weight[keep_OI] != 0).all(), name
    assert torch.allclose(stock(input_ids).logits, trained, atol=1e-5)


def test_folded_is_the_same_view():
    twin, input_ids = masked_twin(tiny("llama")), ids()
    twin.add_lora(recipe.Lora(rank=4))
    fill_adapters(twin)
    with torch.no_grad():
        pruned = twin.model(input_ids=input_ids).logits
        with twin.dense() as model:
            reference = model(input_ids).logits
        with twin.folded():
            for _ in range(2):
                assert torch.equal(twin.model(input_ids=input_ids).logits, pruned)
                with twin.dense() as model:
                    assert torch.equal(model(input_ids).logits, reference)
            with torch.enable_grad():
                assert twin.model(input_ids=input_ids).logits.requires_grad
    assert all(module.folded is None for module in twin.base.modules() if isinstance(module, MaskedLinear))


def test_closed_blocks_come_back_on_exceptions():
    twin = Twin(tiny("llama"), Plan("depth", 6, (2, 4)))
    with pytest.raises(RuntimeError), twin.closed({3}):
        assert twin.closed_blocks == (3,)
        raise RuntimeError
    assert twin.closed_blocks == (2, 4)


def test_hidden_states_keep_dense_numbering():
    """A closed block hands its input on, so that block b's output is hidden_states[b + 1] in both views."""
    twin = Twin(tiny("llama"), Plan("depth", 6, (2,)))
    hidden = twin.model(ids(), output_hidden_states=True).hidden_states
    assert len(hidden) == 7 and torch.equal(hidden[2], hidden[3]) and not torch.equal(hidden[3], hidden[4])


def test_what_does_not_fit_is_refused():
    model = tiny("llama")
    for plan, masks, words in [
        (Plan.none(7), {}, "7 blocks, this model has 6"),
        (Plan("depth", 6, (0,)), {}, "blocks \\[0\\] cannot be dropped"),
        (Plan.none(6), random_masks(model), "plan names 0 masks, 42 are given"),
    ]:
        with pytest.raises(ModelError, match=words):
            Twin(tiny("llama"), plan, masks)
    name = "model.layers.1.mlp.up_proj"
    for key, shape, words in [(name, (3, 3), "has shape \\(3, 3\\)"), ("model.layers.9.x", (3, 3), "no linear layer")]:
        keep = torch.ones(shape, dtype=torch.bool)
        with pytest.raises(ModelError, match=words):
            Twin(tiny("llama"), Plan("magnitude", 6, masks={key: MaskRecord.of(keep, "unstructured")}), {key: keep})
    twin = Twin(model, Plan("depth", 6, (5,)))
    with pytest.raises(ModelError, match="already belongs to a twin"):
        Twin(model, Plan.none(6))
    with pytest.raises(ModelError, match="leaves no block"):
        twin.add_lora(recipe.Lora(blocks="after_cut"))
    with pytest.raises(ModelError, match="drops none"):
        Twin(tiny("llama"), Plan.none(6)).add_lora(recipe.Lora(blocks="after_cut"))
    twin.add_lora(recipe.Lora(rank=2))
    with pytest.raises(ModelError, match="already"):
        twin.add_lora(recipe.Lora(rank=2))
    with pytest.raises(ModelError, match="does not wrap this twin"):
        Twin(tiny("llama"), Plan.none(6)).adopt(twin.model)


@pytest.mark.slow
def test_both_views_under_zero3(free_port):
    script = Path(__file__).with_name("zero3_twin.py")
    environment = os.environ | {"MASTER_PORT": str(free_port), "PYTHONPATH": str(script.parent.parent)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("gradients within") == 9 + len(FAMILIES)
