"""Sublayers dropped, repacked into ordinary blocks; weights that are the pruned view's own."""

import copy
import itertools

import pytest
import torch
from cached import cached
from tiny import FAMILIES, tiny
from transformers import AutoModelForCausalLM
from twins import fill_adapters

from recover.base.errors import ModelError
from recover.config import recipe
from recover.export.merge import merge
from recover.models.arch import ARCHS, arch_of, blocks_of, linears_in, linears_of
from recover.models.plan import Plan, load_plan, save_plan
from recover.models.site import SUBLAYERS, Packed, Site, pack_sites, sites_of, whole_blocks
from recover.models.twin import Twin

ATTENTION, MLP = (2, 5), (1, 4)
GONE = (3, *(Site(block, "attention") for block in ATTENTION), *(Site(block, "mlp") for block in MLP))


def ids(batch: int = 2, tokens: int = 20) -> torch.Tensor:
    return torch.randint(3, 256, (batch, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, tokens=None) -> torch.Tensor:
    return model(input_ids=ids() if tokens is None else tokens, use_cache=False).logits


def zeroed(model, sites):
    """The model with the last linear of each site at 0: another way to say that the site adds nothing."""
    model, arch = copy.deepcopy(model), arch_of(model)
    for site in sites:
        block = blocks_of(model)[site.block]
        if site.part == "mlp" and hasattr(block.get_submodule(arch.mlp), "experts"):
            writing = [p for name, p in block.mlp.named_parameters() if "down_proj" in name]
        else:
            last = set(linears_in(block, arch, site.part)) & set(arch.last_linears)
            writing = [parameter for path in last for parameter in block.get_submodule(path).parameters()]
        for parameter in writing:
            parameter.data.zero_()
    for index in whole_blocks(sites):
        if hasattr(blocks_of(model)[index], "layer_scalar"):  # goes with the block
            blocks_of(model)[index].layer_scalar.fill_(1)
    return model


def trained(twin: Twin) -> Twin:
    twin.add_lora(recipe.Lora(rank=3))
    fill_adapters(twin)
    return twin


def gone(model):
    """Another attention than the last where that stays; whole blocks where each is one sublayer."""
    if arch_of(model).lone:
        return (2, 3, 4)
    if not arch_of(model).last_stays:
        return GONE
    return (*(site for site in GONE if site != Site(5, "attention")), Site(4, "attention"))


def sublayer_twin(family: str = "llama") -> Twin:
    model = tiny(family)
    return Twin(model, Plan("depth", 6, gone(model)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_closed_sublayer_adds_nothing_and_the_dense_view_has_it(family):
    dense = tiny(family)
    twin = Twin(copy.deepcopy(dense), Plan("depth", 6, gone(dense)))
    assert torch.equal(logits(twin.model), logits(zeroed(dense, twin.plan.sites)))
    with twin.dense() as model:
        assert torch.equal(logits(model), logits(dense))
    assert twin.closed_sites == set(twin.plan.sites) and 3 in twin.closed_blocks


@pytest.mark.parametrize("family", ["llama", "gemma2", "smollm3"])
def test_a_closed_attention_keeps_the_cache_right(family):
    twin = sublayer_twin(family)
    with torch.no_grad():
        before = cached(twin.model(input_ids=ids()[:, :11], use_cache=True))
        later = [twin.model(input_ids=ids()[:, i : i + 1], use_cache=True, **before) for i in range(11, 20)]
    stepwise = torch.cat([output.logits for output in later], 1)
    torch.testing.assert_close(stepwise, logits(twin.model)[:, 11:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_repacked_and_merged_reloads_as_the_pruned_view(family, tmp_path):
    twin = trained(sublayer_twin(family))
    merged = merge(twin, torch.float32)
    merged.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(stock), logits(twin.model), rtol=2e-4, atol=2e-4)
    prompt = ids(1, 9)
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with_cache = stock.generate(prompt, use_cache=True, **greedy)
    assert torch.equal(with_cache, stock.generate(prompt, use_cache=False, **greedy))
    # attention 0, MLP 0 | attention 1, MLP 2 | attention 4, MLP 5: nothing is stored for nothing
    packed = (Packed(0, 0), Packed(1, 2), Packed(4, 5))
    if twin.plan.parallel:  # halves of two blocks would read one input: each stays where it is
        packed = (Packed(0, 0), Packed(1, None), Packed(None, 2), Packed(4, None), Packed(None, 5))
    if twin.arch.lone:
        packed = (Packed(0, 0), Packed(1, 1), Packed(5, 5))
    if twin.arch.last_stays:
        packed = (Packed(0, 0), Packed(1, None), Packed(None, 2), Packed(5, 5))
    assert twin.plan.packed == packed and len(blocks_of(stock)) == len(packed)


def test_a_lone_sublayer_gets_a_zeroed_partner():
    plan = Plan("depth", 6, (Site(2, "attention"), Site(4, "mlp")))
    assert plan.packed == (Packed(0, 0), Packed(1, 1), Packed(None, 2), Packed(3, 3), Packed(4, None), Packed(5, 5))
    twin = trained(Twin(tiny(), plan))
    merged = merge(twin, torch.float32)
    torch.testing.assert_close(logits(merged), logits(twin.model), rtol=2e-4, atol=2e-4)
    assert not blocks_of(merged)[2].self_attn.o_proj.weight.any()
    assert not blocks_of(merged)[4].mlp.down_proj.weight.any()


def test_pairing_is_the_shortest_there_is():
    """Against every way to cut the sequence of kept sites into blocks of one, or of an attention and a later MLP."""

    def fewest(parts):
        if not parts:
            return 0
        two = fewest(parts[2:]) if parts[:2] == ("attention", "mlp") else len(parts)
        return 1 + min(fewest(parts[1:]), two)

    every = sorted(sites_of(range(4)))
    for kept in itertools.chain.from_iterable(itertools.combinations(every, n) for n in range(1, 9)):
        packed = pack_sites(kept)
        run = [
            Site(block, part)
            for pair in packed
            for block, part in zip(pair, SUBLAYERS, strict=True)
            if block is not None
        ]
        assert run == list(kept) and len(packed) == fewest(tuple(site.part for site in kept))


def test_every_tensor_of_a_block_belongs_to_a_sublayer():
    """With rows for all families, the repacked export above would have failed; here the rows are complete by name."""
    for family in FAMILIES:
        arch = arch_of(tiny(family))
        blocks = blocks_of(tiny(family))
        tensors = [name for block in blocks for name in block.state_dict()]
        inside = {name.partition(".")[0] for name in tensors}
        known = {arch.attention, arch.mlp, *filter(None, [arch.mixer]), *arch.attention_norms, *arch.mlp_norms}
        shared = set(arch.mlp_norms) if arch.parallel(tiny(family).config) else set()  # both read behind one norm
        assert inside <= known and known - inside <= shared, family
    assert {tiny(family).config.model_type for family in FAMILIES} == set(ARCHS)


def test_lora_sits_on_kept_sublayers_only_and_after_the_cut_if_asked():
    def sites(twin):
        return {
            name.rpartition("model.layers.")[2]
            for name, module in twin.model.named_modules()
            if hasattr(module, "lora_A")
        }

    everywhere, after = sublayer_twin(), sublayer_twin()
    everywhere.add_lora(recipe.Lora(rank=2))
    after.add_lora(recipe.Lora(rank=2, blocks="after_cut"))
    assert {name.split(".")[0] for name in sites(everywhere)} == {"0", "1", "2", "4", "5"}
    assert not {name for name in sites(everywhere) if name.startswith(("1.mlp", "4.mlp", "2.self", "5.self"))}
    # the cut is the MLP of block 1: its attention comes before
    assert {name.split(".")[0] for name in sites(after)} == {"2", "4", "5"}


def test_closing_for_a_moment_takes_sites_and_blocks():
    twin = Twin(tiny(), Plan.none(6))
    with twin.closed([2, Site(4, "mlp")]):
        assert twin.closed_sites == sites_of([2]) | {Site(4, "mlp")} and twin.closed_blocks == (2,)
    assert twin.closed_sites == frozenset()
    assert whole_blocks([Site(1, "mlp"), Site(2, "mlp"), Site(2, "attention")]) == (2,)
    for wrong in ([0], [Site(0, "attention")], [6], [Site(9, "mlp")]):
        with pytest.raises(ModelError, match="cannot be dropped"):
            twin.close(wrong)
    twin.close([Site(0, "mlp")])  # the first MLP may go


def own_weights(model, factor: float = 0.5):
    """Rewritten: one linear at half its weight. Sliced: the MLP of block 1 without its last 32 neurons."""
    linears = linears_of(model)
    mlp = "model.layers.1.mlp"
    weights = {"model.layers.3.mlp.down_proj.weight": linears["model.layers.3.mlp.down_proj"].weight * factor}
    for name in ("gate_proj", "up_proj"):
        weights[f"{mlp}.{name}.weight"] = linears[f"{mlp}.{name}"].weight[:-32]
    weights[f"{mlp}.down_proj.weight"] = linears[f"{mlp}.down_proj"].weight[:, :-32]
    return {name: weight.detach().clone() for name, weight in weights.items()}


def test_own_weights_are_seen_pruned_trained_and_merged(tmp_path):
    dense = tiny()
    reference = copy.deepcopy(dense)
    linears_of(reference)["model.layers.3.mlp.down_proj"].weight.data.mul_(0.5)
    linears_of(reference)["model.layers.1.mlp.down_proj"].weight.data[:, -32:] = 0
    weights = own_weights(dense)
    plan = Plan("width", 6, weights={name: tuple(weight.shape) for name, weight in weights.items()})
    save_plan(plan, {}, tmp_path, weights)
    twin = Twin(copy.deepcopy(dense), *load_plan(tmp_path))
    torch.testing.assert_close(logits(twin.model), logits(reference), rtol=1e-5, atol=1e-5)
    assert dict(twin.model.state_dict()).keys() == dict(dense.state_dict()).keys()
    trained(twin)
    assert not torch.allclose(logits(twin.model), logits(reference), atol=1e-2)
    with twin.dense() as model:
        assert torch.equal(logits(model), logits(dense))


def test_own_weights_under_a_mask_are_rewritten_weights():
    from recover.models.plan import MaskRecord
    from recover.models.switched import MaskedLinear

    dense, name = tiny(), "model.layers.2.mlp.up_proj"
    keep = torch.rand(96, 64, generator=torch.Generator().manual_seed(2)) > 0.5
    own = torch.randn(96, 64, generator=torch.Generator().manual_seed(3)) * 0.1
    plan = Plan("sparsegpt", 6, masks={name: MaskRecord.of(keep, "unstructured")}, weights={f"{name}.weight": (96, 64)})
    twin = Twin(copy.deepcopy(dense), plan, {name: keep}, {f"{name}.weight": own})
    linear = linears_of(twin.model)[name]
    assert isinstance(linear, MaskedLinear) and torch.equal(linear.seen, own)
    reference = copy.deepcopy(dense)
    linears_of(reference)[name].weight.data.copy_(own * keep)
    assert torch.equal(logits(twin.model), logits(reference))
    trained(twin)
    merged = merge(twin, torch.float32)
    torch.testing.assert_close(logits(merged), logits(twin.model), rtol=2e-4, atol=2e-4)
    assert not linears_of(merged)[name].weight[~keep].any()


@pytest.mark.parametrize(
    ("parameter", "shape", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", (97, 64), "has shape"),
        ("model.layers.9.mlp.up_proj.weight", (96, 64), "belongs to no linear layer"),
        ("model.norm.weight", (64,), "belongs to no linear layer"),
    ],
)
def test_weights_that_do_not_fit_are_refused(parameter, shape, message):
    plan = Plan("width", 6, weights={parameter: shape})
    with pytest.raises(ModelError, match=message):
        Twin(tiny(), plan, {}, {parameter: torch.zeros(shape)})
    with pytest.raises(ModelError, match="names 1 weights, 0 are given"):
        Twin(tiny(), plan)


def test_a_plan_says_no_site_twice():
    for wrong in ((1, Site(1, "mlp")), (Site(2, "attention"), Site(2, "attention")), (6,), (Site(-1, "mlp"),)):
        with pytest.raises(ValueError, match="not distinct blocks"):
            Plan("depth", 6, wrong)


def test_both_sublayers_of_a_block_are_the_block():
    plan = Plan("depth", 6, (Site(2, "mlp"), 4, Site(2, "attention"), Site(5, "mlp")))
    assert plan == Plan("depth", 6, (Site(5, "mlp"), 2, 4))
    assert (plan.dropped, plan.dropped_attention, plan.dropped_mlp) == ((2, 4), (), (5,))
