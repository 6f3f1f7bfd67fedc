"""`auto` values of a recipe: what they depend on, that `plan` says them, and that one rate serves every rank."""

from pathlib import Path

import pytest
import torch
import two_processes
from byte_tokenizer import byte_tokenizer
from tiny import tiny

from recover.api import _facts
from recover.base.artifacts import read_json
from recover.base.errors import RecipeError
from recover.config.defaults import Facts, prior_rate, settled
from recover.config.recipe import load_recipe
from recover.config.train import AUTO, Train
from recover.models.load import describe
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.run import stages
from recover.run.estimate import settle
from recover.train.train import train

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
LARGE = Facts(width=4096, parameters=7_000_000_000, gone=0.1)
SMALL = Facts(width=112, parameters=1_880_816, gone=0.157)
ALL = {"tokens": "auto", "batch_size": "auto", "lr": "auto", "warmup": "auto", "scheduler": "auto"}


def config(**changes):
    data = [{"kind": "dense", "prompts": "x.jsonl", "max_new_tokens": 256}]
    return Train.model_validate({"data": data, **changes})


def test_every_field_that_takes_auto_is_settled_but_the_rate():
    cfg = config(**ALL, lora={"rank": "auto", "alpha": "auto"})
    assert {*cfg.auto} == {*AUTO}
    found, chosen = settled(cfg, LARGE)
    assert found.auto == ("lr",) and {each.field for each in chosen} == {*AUTO} - {"lr"}
    assert all(len(each.why) > 10 for each in chosen)
    values = {each.field: each.value for each in chosen}
    assert (found.tokens, found.batch_size, found.warmup) == tuple(
        values[x] for x in ("tokens", "batch_size", "warmup")
    )
    assert (found.lora.rank, found.lora.alpha) == (values["lora.rank"], values["lora.alpha"])
    assert settled(found, LARGE) == (found, [])


@pytest.mark.parametrize(
    ("facts", "tokens", "rank"),
    [(SMALL, 300_000, 32), (Facts(576, 134_515_008, 0.079), 11_000_000, 32), (LARGE, 30_000_000, 64)],
)
def test_tokens_follow_what_goes_and_rank_the_width(facts, tokens, rank):
    found, _ = settled(config(tokens="auto", lora={"rank": "auto"}), facts)
    assert (found.tokens, found.lora.rank) == (tokens, rank)
    more, _ = settled(config(tokens="auto"), Facts(facts.width, facts.parameters, facts.gone * 1.5))
    assert more.tokens >= found.tokens


@pytest.mark.parametrize(("tokens", "size"), [(100_000, 8), (1_000_000, 16), (3_000_000, 32), (30_000_000, 32)])
def test_rows_a_step_give_steps_enough(tokens, size):
    found, _ = settled(config(tokens=tokens, batch_size="auto", warmup="auto"), LARGE)
    steps = tokens / 128 / found.batch_size
    assert found.batch_size == size and 0.03 <= found.warmup <= 0.1
    assert found.warmup * steps >= 15 or found.warmup == 0.1


def test_what_is_given_stays_as_it_is():
    cfg = config(tokens=5000, lora={"rank": 7})
    assert settled(cfg, LARGE) == (cfg, [])
    found, chosen = settled(config(tokens=5000, lora={"rank": 7, "alpha": "auto"}), LARGE)
    assert [each.field for each in chosen] == ["lora.alpha"] and (found.tokens, found.lora.rank) == (5000, 7)
    twin = Twin(tiny(), Plan("depth", 6, (2,)))
    assert twin.add_lora(cfg.lora).peft_config["default"].lora_alpha == 14  # 2 x rank, as ever


def test_plan_says_what_auto_is_and_the_run_holds_numbers(tmp_path, capsys):
    overrides = ("train.lr=auto", "train.tokens=auto", "train.lora={rank: auto, alpha: auto}", "prune.count=null")
    small = ("prune.blocks=[3, 11]", "measure.limit=2", "measure.sampling=null", "probe.samples=2")
    directory = stages.run(load_recipe(QUICKSTART, [*overrides, *small]), tmp_path, until="dense")
    text = " ".join(capsys.readouterr().out.split())
    assert "train.tokens: 290000: one for each of 294,355 parameters that go" in text
    assert "train.lora.alpha: 64.0" in text and "train.lr: auto: 5% of train.tokens" in text
    written = load_recipe(directory.recipe).train
    assert (written.tokens, written.lora.rank, written.lora.alpha, written.auto) == (290_000, 32, 64.0, ("lr",))
    fields = [each["field"] for each in read_json(directory.plan / "estimate.json")["auto"]]
    assert fields == ["tokens", "lora.rank", "lora.alpha", "lr"]


def test_zeros_count_as_pruned():
    recipe = load_recipe(QUICKSTART, ["prune={kind: magnitude, sparsity: 0.5}", "train.tokens=auto"])
    found, _ = settle(recipe)
    model = describe(recipe.model)
    inside = model.parameters - model.embedding_parameters
    assert found.train.tokens == pytest.approx(0.5 * inside, rel=0.05)


def test_a_pruning_that_cannot_be_is_refused_by_its_field():
    with pytest.raises(RecipeError, match="blocks"):
        settle(load_recipe(QUICKSTART, ["prune={kind: depth, blocks: [99]}", "train.tokens=auto"]))


def test_a_twin_has_the_facts_of_its_recipe():
    found = _facts(Twin(tiny(), Plan("depth", 6, (2,), parameters_dense=100, parameters_pruned=60, nonzero=50)))
    assert found.width == 64 and found.gone > 0.9
    assert _facts(Twin(tiny(), Plan.none(6))).gone == 0.0


def loss_of(folder, rank, alpha):
    """Mean loss over the first few steps, the first of which all adapters make from the same model."""
    folder.mkdir()
    two_processes.write_text(folder)
    changes = {"lora": {"rank": rank, "alpha": alpha}, "lr": 2e-3, "loss": {"kl": 1.0}, "epochs": 1, "warmup": 0.0}
    twin = Twin(tiny(), Plan("depth", 6, (2, 4)))
    train(twin, byte_tokenizer(), two_processes.cfg(folder, **changes), folder / "train", lambda *_: None, 0)
    return read_json(folder / "train" / "best.json")["loss"]


def test_one_rate_goes_as_far_at_every_rank_where_alpha_is_fixed(tmp_path):
    """At alpha = 2 x rank a step grows with the rank: a rate that suits one rank is too high for a larger one."""
    ranks = (4, 16, 32)
    fixed = [loss_of(tmp_path / f"fixed-{rank}", rank, 8.0) for rank in ranks]
    grown = [loss_of(tmp_path / f"grown-{rank}", rank, None) for rank in ranks]
    assert fixed[0] == grown[0]
    assert max(fixed) - min(fixed) < 0.005
    assert min(fixed) - max(grown[1:]) > 0.03


def test_the_prior_goes_down_with_width_and_alpha():
    assert prior_rate(4096, 64) < prior_rate(896, 64) < prior_rate(112, 64) == 1e-3
    assert prior_rate(4096, 128) == pytest.approx(prior_rate(4096, 64) / 2)
    assert torch.isfinite(torch.tensor(prior_rate(8, 0.01)))
