"""Sublayers and blocks that go, against copies without them; scores against loops; repairs against least squares."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from pydantic import ValidationError
from tiny import ids, tiny

from recover.base.errors import PruneError
from recover.config.recipe import Calibration, Depth
from recover.export.merge import merge
from recover.export.write import _what_was_pruned
from recover.models.arch import arch_of, blocks_of
from recover.models.load import Description
from recover.models.plan import Plan, load_plan, save_plan
from recover.models.site import Site, sites_of
from recover.models.twin import Twin
from recover.prune import registry
from recover.prune.depth.depth import RIDGE, depth_cost, depth_warnings, share_gone, share_unstored
from recover.prune.stream import residual_stream

CALIBRATION = Calibration(data="given", samples=5, length=24, batch_size=2)


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return list(ids(5, 24, seed=3).split(2))


def pruned(model, batches, **cfg):
    twin = Twin(model, Plan.none(len(blocks_of(model))))
    cfg = Depth(kind="depth", calibration=CALIBRATION, **cfg)
    return registry.prune(twin, cfg, batches)


def site(text: str) -> Site:
    part, block = text.split(":")
    return Site(int(block), part)  # type: ignore[arg-type]


class Nothing(torch.nn.Module):
    """In place of a sublayer: adds nothing."""

    def __init__(self, *, attention: bool) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states, *_args, **_kwargs):
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.attention else zeros


def without(model, sites) -> torch.nn.Module:
    """A copy in which the modules of these sites are gone."""
    model, arch = copy.deepcopy(model), arch_of(model)
    for block, part in sites:
        name = arch.attention if part == "attention" else arch.mlp
        setattr(blocks_of(model)[block], name, Nothing(attention=part == "attention"))
    return model


@torch.no_grad()
def output_score(name, model, sites, batches) -> float:
    """The score by its definition, token by token, from the logits of two models in float64."""
    smaller, values = without(model, sites), []
    for row in torch.cat(batches):
        z = model(input_ids=row[None], use_cache=False).logits[0].double()
        y = smaller(input_ids=row[None], use_cache=False).logits[0].double()
        for position in range(len(row)):
            p, q, dz = z[position].softmax(-1), y[position].softmax(-1), y[position] - z[position]
            if name == "kl":
                values.append(float((p * (p / q).log()).sum()))
            elif name == "variance":
                values.append(float((p * dz**2).sum() - (p * dz).sum() ** 2) / 2)
            elif position + 1 < len(row):
                values.append(-float(q[row[position + 1]].log()))
    mean = sum(values) / len(values)
    return math.exp(mean) if name == "perplexity" else mean


def table(plan, number: int) -> dict[tuple[str, ...], float]:
    return {tuple(record["parts"]): record["score"] for record in plan.scores if record["round"] == number}


def chosen(plan, number: int) -> list[str]:
    return [text for r in plan.scores if r["round"] == number and r["chosen"] for text in r["parts"]]


SUBLAYERS = [str(s) for s in sorted(sites_of(range(4))) if s != Site(0, "attention")]


@pytest.mark.parametrize(
    ("family", "score"),
    [("llama", "kl"), ("gemma2", "variance"), ("olmo2", "perplexity"), ("granite", "perplexity"), ("phi", "kl")],
)
def test_rounds_over_sublayers_are_brute_force(family, score, batches):
    model = tiny(family, num_hidden_layers=4)
    reference = copy.deepcopy(model)
    plan = pruned(model, batches, unit="sublayer", count=2, score=score).plan
    gone: list[str] = []
    for number in (1, 2):
        expected = {
            (text,): output_score(score, reference, [*map(site, gone), site(text)], batches)
            for text in SUBLAYERS
            if text not in gone
        }
        assert table(plan, number) == pytest.approx(expected, rel=2e-3)
        assert chosen(plan, number) == list(min(expected, key=lambda key: expected[key]))
        gone += chosen(plan, number)
    assert set(plan.sites) == set(map(site, gone))
    assert all(r["by"] == score and r["blocks"] == [site(r["parts"][0]).block] for r in plan.scores)


@torch.no_grad()
def reference_stream(model, batches) -> dict[str, torch.Tensor]:
    """What each sublayer reads and adds, (in, out), in float64: Llama only, through its norms and residuals by hand."""
    found: dict[str, list] = {}
    for block, layer in enumerate(model.model.layers):
        for part, norm in (("attention", layer.input_layernorm), ("mlp", layer.post_attention_layernorm)):
            norm.register_forward_pre_hook(
                lambda _m, a, key=f"{part}:{block}": found.setdefault(key, []).append(a[0].double().flatten(0, 1))
            )
    model.model.norm.register_forward_pre_hook(
        lambda _m, a: found.setdefault("end", []).append(a[0].double().flatten(0, 1))
    )
    for ids_BT in batches:
        model(input_ids=ids_BT)
    return {key: torch.cat(rows) for key, rows in found.items()}


@pytest.mark.parametrize("score", ["angular", "block_influence"])
def test_similarity_of_sublayers_and_anew_after_a_drop(score, batches):
    model = tiny()
    reference = copy.deepcopy(model)
    plan = pruned(model, batches, unit="attention", count=2, score=score, iterative=True).plan
    gone: list[str] = []
    for number in (1, 2):
        h = reference_stream(without(reference, map(site, gone)), batches)
        expected = {}
        for block in range(1, 6):
            if f"attention:{block}" not in gone:
                cos = torch.cosine_similarity(h[f"attention:{block}"], h[f"mlp:{block}"], dim=-1)
                row = cos.clamp(-1, 1).acos() / math.pi if score == "angular" else 1 - cos
                expected[(f"attention:{block}",)] = float(row.mean())
        assert table(plan, number) == pytest.approx(expected, rel=1e-4)
        gone += chosen(plan, number)
    assert set(plan.dropped_attention) == {site(text).block for text in gone} and plan.dropped == ()


def test_one_round_takes_the_lowest_of_it(batches):
    for score in ("kl", "taylor"):
        plan = pruned(tiny(), batches, unit="mlp", count=3, score=score, iterative=False).plan
        scores = {record["blocks"][0]: record["score"] for record in plan.scores}
        assert {record["round"] for record in plan.scores} == {1} and set(scores) == set(range(6))
        assert plan.dropped_mlp == tuple(sorted(sorted(scores, key=lambda block: scores[block])[:3]))


def gated_loss(model, what: str, index: int, gate: float, row: torch.Tensor) -> float:
    """Mean -log p(next token) with what one unit adds to the stream times `gate`."""
    block = model.model.layers[index]
    if what == "block":
        hook = block.register_forward_hook(lambda _m, args, out: args[0] + gate * (out - args[0]))
    elif what == "attention":
        hook = block.self_attn.register_forward_hook(lambda _m, _args, out: (gate * out[0], *out[1:]))
    else:
        hook = block.mlp.register_forward_hook(lambda _m, _args, out: gate * out)
    with torch.no_grad():
        log_q = model(input_ids=row[None], use_cache=False).logits[0].double().log_softmax(-1)
    hook.remove()
    return -float(log_q[:-1].gather(1, row[1:, None]).mean())


@pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
def test_taylor_is_the_slope_of_the_loss_along_the_gate(unit, batches):
    model = tiny(num_hidden_layers=4).double()
    reference = copy.deepcopy(model)
    plan = pruned(model, batches, unit=unit, count=1, score="taylor").plan
    step = 1e-2  # norms are in float32 whatever the model is
    for record in plan.scores:
        (index,) = record["blocks"]
        slopes = [
            abs(gated_loss(reference, unit, index, 1 + step, r) - gated_loss(reference, unit, index, 1 - step, r))
            for r in torch.cat(batches)
        ]
        assert record["score"] == pytest.approx(sum(slopes) / len(slopes) / (2 * step), rel=1e-3)


STREAMS = ["gemma2", "olmo2", "granite", "phi3", "exaone4", "glm4", "starcoder2", "apertus"]
STREAMS += ["stablelm", "stablelm_parallel", "cohere2", "phi", "gpt_neox", "gpt_neox_sequential", "gpt2"]


@pytest.mark.parametrize("family", STREAMS)
def test_the_stream_is_the_same_whatever_the_family(family, batches):
    """Each point lies between two sublayers: closing one makes the points around it equal, and only then."""
    twin = Twin(tiny(family), Plan.none(6))
    closed = {Site(2, "attention"), Site(4, "mlp"), 3}
    h = residual_stream(twin, batches[0], closed)
    still = {point for point in range(12) if torch.equal(h[point], h[point + 1])}
    assert set(h) == set(range(13)) and still == {4, 6, 7, 9}


@pytest.mark.parametrize(
    ("unit", "runs"),
    [
        ("attention", [[(b, "attention"), (b + 1, "attention")] for b in range(1, 3)]),
        ("mlp", [[(b, "mlp"), (b + 1, "mlp")] for b in range(3)]),
        ("sublayer", [list(pair) for pair in itertools.pairwise(sorted(sites_of(range(4)))[1:])]),
    ],
)
def test_runs_of_neighbours(unit, runs, batches):
    model = tiny(num_hidden_layers=4)
    reference = copy.deepcopy(model)
    plan = pruned(model, batches, unit=unit, count=2, contiguous=True).plan
    expected = {tuple(str(Site(*pair)) for pair in run): output_score("kl", reference, run, batches) for run in runs}
    assert table(plan, 1) == pytest.approx(expected, rel=2e-3)
    assert set(plan.sites) == set(map(site, min(expected, key=lambda key: expected[key])))
    pruned(reference, batches, unit=unit, count=2, contiguous=True, score="angular")


def test_on_ties_the_first_goes(batches):
    model = tiny()
    for block in (4, 2):
        torch.nn.init.zeros_(model.model.layers[block].self_attn.o_proj.weight)
    plan = pruned(model, batches, unit="attention", count=3).plan
    assert (chosen(plan, 1), chosen(plan, 2)) == (["attention:2"], ["attention:4"])
    assert table(plan, 1)[("attention:2",)] == table(plan, 1)[("attention:4",)] == 0


def test_halves_of_two_blocks_that_run_side_by_side_are_not_stored_together(batches):
    model = tiny("phi")
    with pytest.raises(PruneError, match=r"prune.unit: 'pair' joins half of a block with half of the next"):
        pruned(copy.deepcopy(model), batches, unit="pair", count=1)
    sites = ("mlp:1", "attention:2", "attention:4", "mlp:4")
    plan = pruned(copy.deepcopy(model), batches, unit="sublayer", sites=sites).plan
    whole = sum(p.numel() for p in blocks_of(model)[0].parameters())
    mlp, attention = (
        sum(p.numel() for p in getattr(blocks_of(model)[0], n).parameters()) for n in ("mlp", "self_attn")
    )
    assert plan.parallel and len(plan.packed) == 5
    assert plan.parameters_dense - plan.parameters_pruned == whole
    # the norm of block 2 is read by the MLP that stays
    assert plan.parameters_dense - plan.nonzero == whole + mlp + attention
    merged = merge(Twin(copy.deepcopy(model), plan), torch.float32)
    assert plan.parameters_pruned == sum(p.numel() for p in merged.parameters())


LISTS = [
    {"unit": "block", "blocks": (2, 4)},
    {"unit": "attention", "blocks": (1, 4)},
    {"unit": "mlp", "blocks": (0, 3)},
    {"unit": "sublayer", "sites": ("mlp:1", "attention:2", "attention:4", "mlp:4", "mlp:5")},
]


@pytest.mark.parametrize("cfg", LISTS, ids=lambda cfg: cfg["unit"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_counts_are_those_of_the_exported_model(family, cfg, batches):
    model = tiny(family)
    dense = sum(p.numel() for p in model.parameters())
    plan = pruned(copy.deepcopy(model), batches, **cfg).plan
    merged = merge(Twin(copy.deepcopy(model), plan), torch.float32)
    arch, gone = arch_of(model), 0
    for block, part in plan.sites:
        names = (arch.attention, *arch.attention_norms) if part == "attention" else (arch.mlp, *arch.mlp_norms)
        gone += sum(p.numel() for name in names for p in blocks_of(model)[block].get_submodule(name).parameters())
    assert (plan.parameters_dense, plan.nonzero) == (dense, dense - gone)
    assert plan.parameters_pruned == sum(p.numel() for p in merged.parameters())
    zeroed = sum(
        not module.weight.any()
        for block in blocks_of(merged)
        for module in (block.self_attn.o_proj, block.mlp.down_proj)
    )
    assert zeroed == {"block": 0, "attention": 2, "mlp": 2, "sublayer": 1}[cfg["unit"]]
    said = f"{zeroed} zeroed partners"
    assert (said in plan.summary()) == (zeroed > 0)
    assert (f"{zeroed} sublayers are zeroed partners" in _what_was_pruned(plan.to_json())) == (zeroed > 0)


def test_two_sites_of_a_block_are_a_block(batches):
    plan = pruned(tiny(), batches, **LISTS[3]).plan
    assert (plan.dropped, plan.dropped_attention, plan.dropped_mlp) == ((4,), (2,), (1, 5))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"unit": "attention", "count": 6}, "6 attentions to drop, the model has 6 blocks: drop at most 5"),
        ({"unit": "mlp", "count": 7}, "7 MLPs to drop, the model has 6 blocks: drop at most 6"),
        ({"unit": "sublayer", "count": 12}, "12 sublayers to drop, the model has 6 blocks: drop at most 11"),
        ({"unit": "attention", "blocks": (3, 0)}, "prune.blocks: the attention of block 0 cannot be dropped"),
        ({"unit": "sublayer", "sites": ("attention:0",)}, "prune.sites: the attention of block 0 cannot be dropped"),
        ({"unit": "sublayer", "sites": ("mlp:6",)}, r"prune.sites: \[6\] are not blocks of this model: it has 6"),
        ({"unit": "mlp", "blocks": (9,)}, r"prune.blocks: \[9\] are not blocks"),
    ],
)
def test_what_cannot_go_is_refused_before_and_by_the_pruner(cfg, message, batches):
    with pytest.raises(PruneError, match=message):
        pruned(tiny(), batches, **cfg)
    with pytest.raises(PruneError, match=message):
        depth_cost(Depth(kind="depth", calibration=CALIBRATION, **cfg), DESCRIPTION)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"unit": "sublayer", "blocks": (2,)}, "'blocks' is not for unit: sublayer: list what goes in 'sites'"),
        ({"unit": "mlp", "sites": ("mlp:2",)}, "'sites' is not for unit: mlp: list what goes in 'blocks'"),
        ({"unit": "sublayer", "sites": ("head:2",)}, "String should match pattern"),
        ({"unit": "sublayer", "sites": ("mlp:2", "mlp:2")}, "'sites' must name at least one site and none twice"),
        ({"unit": "sublayer"}, "give either 'count'"),
        ({"blocks": (2,), "repair": "linear"}, "'repair: linear' needs 'calibration'"),
        (
            {"count": 2, "contiguous": True, "iterative": True, "calibration": CALIBRATION},
            "'contiguous' drops one run at once",
        ),
    ],
)
def test_recipes_that_say_two_things_are_refused(cfg, message):
    with pytest.raises(ValidationError, match=message):
        Depth(kind="depth", **cfg)


def test_a_site_that_changes_no_logit_is_named(batches):
    model = tiny()
    torch.nn.init.zeros_(model.model.layers[3].mlp.down_proj.weight)
    with pytest.raises(PruneError, match="dropping mlp:3 changes no logit: these sites do nothing"):
        pruned(model, batches, unit="mlp", blocks=(3,))


DESCRIPTION = Description(
    model_type="llama",
    blocks=6,
    width=64,
    intermediate=96,
    heads=4,
    kv_heads=2,
    head_size=16,
    vocabulary=256,
    context=256,
    tied=False,
    parameters=1,
    embedding_parameters=0,
    bytes=4,
)


@pytest.mark.parametrize("cfg", LISTS, ids=lambda cfg: cfg["unit"])
def test_the_estimate_knows_what_is_stored_and_what_is_run(cfg, batches):
    model = tiny()
    plan = pruned(copy.deepcopy(model), batches, **cfg).plan
    recipe = Depth(kind="depth", **cfg)
    inside = sum(p.numel() for p in blocks_of(model).parameters())
    norms = 2 * 64 * 6 / inside
    assert share_gone(recipe, DESCRIPTION) == pytest.approx((plan.parameters_dense - plan.nonzero) / inside, abs=norms)
    stored = (plan.parameters_dense - plan.parameters_pruned) / inside
    assert share_unstored(recipe, DESCRIPTION) == pytest.approx(stored)
    zeroed = any("zeroed partner" in line for line in depth_warnings(recipe, DESCRIPTION))
    assert zeroed == (cfg["unit"] != "block")


def fit_and_held_out(batches):
    """Of five samples the first and the last are held out."""
    rows = torch.cat(batches)
    return rows[1:4], rows[[0, 4]]


@torch.no_grad()
def least_squares(model, sites, rows, kind, block: int) -> torch.Tensor:
    """The repaired down_proj of a Llama-like block by lstsq on stacked rows: the cut is `sites`, right behind it."""
    scale = getattr(model.config, "residual_multiplier", 1.0)
    end = max(b for b, _ in sites) + 1
    target, states, outputs = [], [], []
    following = [*model.model.layers, model.model.norm][end]
    following.register_forward_pre_hook(lambda _m, a: target.append(a[0].double().flatten(0, 1)))
    cut = without(model, sites)
    blocks_of(cut)[block].register_forward_hook(lambda _m, _a, out: states.append(out.double().flatten(0, 1)))
    down = blocks_of(cut)[block].mlp.down_proj
    down.register_forward_hook(lambda _m, _a, out: outputs.append(out.double().flatten(0, 1)))
    model(input_ids=rows)
    cut(input_ids=rows)
    # `without` copied the hook on the next block too: the first target is the dense model's
    r, o = target[0] - states[0], outputs[0] * scale
    ridge = (RIDGE * o.square().sum(0)).sqrt()
    if kind == "rescale":
        change = torch.stack([(o[:, d] @ r[:, d]) / (o[:, d] @ o[:, d] + ridge[d] ** 2) for d in range(o.shape[1])])
        transform = torch.eye(len(change)).double() + change.diag()
    else:
        stacked = torch.cat([o, ridge.diag()]), torch.cat([r, torch.zeros(len(ridge), len(ridge)).double()])
        transform = torch.eye(len(ridge)).double() + torch.linalg.lstsq(*stacked).solution.T
    return (transform @ down.weight.double()).float()


@pytest.mark.parametrize("family", ["llama", "granite"])
@pytest.mark.parametrize("kind", ["rescale", "linear"])
def test_a_repair_is_least_squares_behind_the_cut(family, kind, batches):
    from recover.prune.depth import depth

    model = tiny(family)
    sites = sorted(sites_of((3, 4)))
    fit, _ = fit_and_held_out(batches)
    twin = Twin(copy.deepcopy(model), Plan.none(6))
    weights, errors = depth.fitted(twin, frozenset(sites), kind, [fit], {}, 6, 10)
    expected = least_squares(copy.deepcopy(model), sites, fit, kind, block=2)
    assert list(weights) == ["model.layers.2.mlp.down_proj.weight"]
    torch.testing.assert_close(weights["model.layers.2.mlp.down_proj.weight"], expected, rtol=1e-3, atol=1e-5)
    assert errors["error_after"] < errors["error_before"]


@torch.no_grad()
def mean_kl(dense, model, rows) -> float:
    p = dense(input_ids=rows, use_cache=False).logits.double().softmax(-1)
    q = model(input_ids=rows, use_cache=False).logits.double().softmax(-1)
    return float((p * (p / q).log()).sum()) / rows.numel()


BIASES = {"mlp_bias": True, "attention_bias": True}


@pytest.mark.parametrize(
    ("family", "overrides", "cfg"),
    [
        ("llama", BIASES, {"unit": "block", "blocks": (2, 4)}),
        ("qwen3", {}, {"unit": "sublayer", "sites": ("mlp:1", "attention:3", "mlp:3", "attention:4")}),
        ("granite", BIASES, {"unit": "attention", "blocks": (1, 5)}),
    ],
)
def test_the_record_says_what_the_exported_model_does(family, overrides, cfg, batches, tmp_path):
    model = tiny(family, **overrides)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.bias", "down_proj.bias")):
            parameter.data *= 5  # every sublayer adds the same to each token: what goes is in reach of what stays
    plan, masks, weights = pruned(copy.deepcopy(model), batches, repair="rescale", **cfg)
    assert plan.repair["kept"] is True and plan.repair["kl_after"] < plan.repair["kl_before"]
    save_plan(plan, masks, tmp_path, weights)
    twin = Twin(copy.deepcopy(model), *load_plan(tmp_path))
    fit, held_out = fit_and_held_out(batches)
    bare = Twin(copy.deepcopy(model), Plan("depth", 6, plan.sites))
    assert plan.repair["kl_before"] == pytest.approx(mean_kl(model, bare.model, held_out), rel=1e-3)
    assert plan.repair["kl_after"] == pytest.approx(mean_kl(model, twin.model, held_out), rel=1e-3)
    assert plan.repair["kl_after"] == pytest.approx(mean_kl(model, merge(twin, torch.float32), held_out), rel=1e-3)
    assert (plan.repair["tokens_fitted"], plan.repair["tokens_held_out"]) == (fit.numel(), held_out.numel())
    dense = residual_stream(Twin(copy.deepcopy(model), Plan.none(6)), fit)
    repaired = residual_stream(twin, fit, plan.sites)
    kls = [plan.repair["kl_before"]]
    for cut in plan.repair["cuts"]:
        assert cut["kl_before"] == kls[-1] and cut["kept"] == (cut["kl_after"] < cut["kl_before"])
        if not cut["kept"]:
            continue
        kls.append(cut["kl_after"])
        last = site(cut["dropped"][-1])
        point = 2 * last.block + (1 if last.part == "attention" else 2)
        error = (dense[point] - repaired[point]).double().square().sum(-1).mean()
        assert cut["error_after"] == pytest.approx(float(error), rel=1e-4)
        assert cut["error_after"] < cut["error_before"]
    assert kls[-1] == plan.repair["kl_after"]


def test_a_repair_that_makes_it_worse_is_left_out_and_said(capsys):
    """A whole matrix fitted to 8 tokens fits nothing else."""
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan, _, weights = pruned(model, [ids(2, 8, seed=3)], blocks=(1, 3), repair="linear")
    assert plan.repair["kl_after"] == plan.repair["kl_before"] and plan.repair["kept"] is False
    assert [cut["kept"] for cut in plan.repair["cuts"]] == [False, False]
    assert all(cut["kl_after"] >= cut["kl_before"] for cut in plan.repair["cuts"])
    assert weights == {} and plan.weights == {}
    assert "this repair is left out" in capsys.readouterr().err
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4", "glm4"])
def test_families_with_a_norm_behind_are_not_repaired(family, batches):
    with pytest.raises(
        PruneError, match=rf"prune.repair: 'linear' cannot be folded into {family}: behind each sublayer"
    ):
        pruned(tiny(family), batches, blocks=(2,), repair="linear")


def test_a_repair_needs_samples_to_measure_on():
    with pytest.raises(PruneError, match="needs samples to fit and others to measure on, found 1"):
        pruned(tiny(), [ids(1, 24)], blocks=(2,), repair="linear")
