"""A score of depth pruning and a model family that are registered from outside of the package, and run.

Others: a way to prune in test_pruner.py, a loss term in test_loss_term.py, a kind of task in toy_kind.py, a figure in
test_report_page.py.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from report_run import build_run
from tiny import ids, tiny
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from twins import removed

from recover.base.errors import ModelError
from recover.config import prune as configs
from recover.config.prune import DEPTH_SCORES, Depth, DepthScore, register_score
from recover.config.recipe import Model
from recover.models import arch
from recover.models.arch import ARCHS, Arch, blocks_of
from recover.models.load import load_model
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.prune.depth.scores import StreamScore
from recover.prune.registry import prune
from recover.report.collect import collect
from recover.report.exhibits import figures


def growth(h_in_ND, h_out_ND):
    return (h_out_ND.norm(dim=1) / h_in_ND.norm(dim=1)).log().abs()


def growth_score(twin, batches):
    return StreamScore(twin, batches, growth)


GROWTH = DepthScore("growth", "test_from_outside:growth_score", meaning="mean growth of the stream over that {unit}")


@pytest.fixture
def score():
    yield register_score(GROWTH)
    del DEPTH_SCORES["growth"]


def test_a_score_chooses_what_goes(score):
    model, batches = tiny(), list(ids(2, 12).split(1))
    twin = Twin(model, Plan.none(6))
    cfg = Depth.model_validate({"count": 2, "score": "growth"})
    plan = prune(twin, cfg, batches).plan  # type: ignore[arg-type]
    with torch.no_grad():
        states = [model(ids_BT, output_hidden_states=True).hidden_states for ids_BT in batches]
        last = [block_output(model, ids_BT) for ids_BT in batches]
    found = []
    for block in range(6):
        ends = last if block == 5 else [each[block + 1] for each in states]
        grown = [(h.norm(dim=-1) / each[block].norm(dim=-1)).log() for h, each in zip(ends, states, strict=True)]
        found.append(torch.cat(grown, 1).abs().mean())
    expected = sorted(sorted(range(1, 6), key=lambda block: found[block])[:2])
    assert list(plan.dropped) == expected
    assert all(record["by"] == "growth" for record in plan.scores)


def block_output(model, ids_BT):
    """Of the last block: transformers' last hidden state is after the norm."""
    seen: list[torch.Tensor] = []
    hook = blocks_of(model)[-1].register_forward_hook(
        lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    try:
        model(ids_BT)
    finally:
        hook.remove()
    return seen[0]


def test_a_report_says_what_a_score_means(score, tmp_path):
    run = build_run(tmp_path)
    path = run / "prune" / "plan.json"
    plan = json.loads(path.read_text())
    for record in plan["scores"]:
        record["by"] = "growth"
    path.write_text(json.dumps(plan))
    assert "mean growth of the stream over that block" in figures(collect(run))["plan"].see


def test_a_score_is_known_by_one_name(score):
    with pytest.raises(ValueError, match="'growth': there is one of that name"):
        register_score(GROWTH)
    with pytest.raises(ValueError, match="a score of kl, variance, perplexity"):
        Depth.model_validate({"count": 2, "score": "growth", "swap": True})
    assert not Depth.model_validate({"count": 2, "score": "growth"}).rounds
    del configs.DEPTH_SCORES["growth"]
    with pytest.raises(ValueError, match="score"):
        Depth.model_validate({"count": 2, "score": "growth"})
    register_score(GROWTH)


class ToyConfig(LlamaConfig):
    model_type = "toy_family"


class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig


AutoConfig.register("toy_family", ToyConfig)
AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of a family that the package does not know."""
    like = tiny()
    model = ToyForCausalLM(ToyConfig(**{k: v for k, v in like.config.to_dict().items() if k != "model_type"}))
    model.load_state_dict(like.state_dict())
    model.save_pretrained(tmp_path / "toy")
    byte_tokenizer().save_pretrained(tmp_path / "toy")
    return tmp_path / "toy"


@pytest.fixture
def family():
    yield arch.register(Arch("toy_family"))
    del ARCHS["toy_family"]


def test_a_family_is_loaded_and_pruned(folder, family):
    model = load_model(Model(source=str(folder)))
    assert isinstance(model, ToyForCausalLM)
    input_ids = ids()
    reference = removed(copy.deepcopy(model), (2, 4))
    twin = Twin(model, Plan("depth", 6, (2, 4)))
    with torch.no_grad():
        assert torch.equal(twin.model(input_ids).logits, reference(input_ids).logits)
    with pytest.raises(ValueError, match="'toy_family': there is a row of it already"):
        arch.register(Arch("toy_family"))


def test_without_its_row_a_family_is_refused(folder):
    with pytest.raises(ModelError, match=r"model type 'toy_family' is not supported.*Arch\('toy_family'\)"):
        load_model(Model(source=str(folder)))
