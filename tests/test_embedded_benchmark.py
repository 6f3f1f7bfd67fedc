"""The embedded mixtures: what trains fast is the stock class, and experts taken by lot are as many as by a score."""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from recover.models.plan import Plan

EMBEDDED = Path(__file__).parent.parent / "benchmarks" / "embedded"
PAD, VOCABULARY = 2, 31


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The benchmark's modules by their names, and no trace of them: other benchmarks have some of the same names."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(EMBEDDED))
    yield
    for name in set(sys.modules) - before:
        if str(EMBEDDED) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def mixture(chosen: int):
    import train_experts

    shape = {"blocks": 3, "width": 24, "heads": 3, "hidden": 12, "experts": 5, "chosen": chosen}
    args = argparse.Namespace(**shape, balance=0.5, seed=0)
    return train_experts.new_model(args, VOCABULARY, {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": PAD})


def packed_rows() -> torch.Tensor:
    """Three rows of 17 tokens, the last of them padded from its ninth place on."""
    rows_BT = torch.randint(3, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(1))
    rows_BT[2, 9:] = PAD
    return rows_BT


def unevenness(router_logits: tuple[torch.Tensor, ...], keep_N: list[bool], chosen: int) -> torch.Tensor:
    """Of each block: experts x sum of (share of the tokens' choices) x (mean probability); token after token."""
    blocks = []
    for logits_NE in router_logits:
        counts, sums, tokens = [0.0] * logits_NE.shape[1], [torch.zeros(())] * logits_NE.shape[1], sum(keep_N)
        for logits_E, keep in zip(logits_NE, keep_N, strict=True):
            if keep:
                probability_E = logits_E.exp() / logits_E.exp().sum()
                for expert in probability_E.argsort(descending=True)[:chosen]:
                    counts[expert] += 1 / (tokens * chosen)
                sums = [total + p / tokens for total, p in zip(sums, probability_E, strict=True)]
        blocks.append(len(counts) * sum(count * mean for count, mean in zip(counts, sums, strict=True)))
    return sum(blocks) / len(blocks)


@pytest.mark.parametrize("chosen", [1, 2, 5])
def test_the_fast_pass_of_a_mixture_has_the_losses_and_gradients_of_the_stock_class(chosen):
    from train_experts import Fast

    model, rows_BT = mixture(chosen), packed_rows()
    with torch.no_grad():  # as new, all routers and norms are nearly the same
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())), alpha=0.2)
    stock = model(input_ids=rows_BT, use_cache=False, output_router_logits=True)
    targets = [(b, t) for b in range(3) for t in range(1, 17) if rows_BT[b, t] != PAD]
    own = -sum(stock.logits[b, t - 1].log_softmax(-1)[rows_BT[b, t]] for b, t in targets) / len(targets)
    expected = own + 0.5 * unevenness(stock.router_logits, (rows_BT != PAD).flatten().tolist(), chosen)
    expected.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    found = Fast(model, dtype=torch.float32, pad=PAD, compiled=False).loss(rows_BT)
    found.backward()
    torch.testing.assert_close(found, expected)
    assert len(gradients) == 3 * 11 + 2
    for name, weight in model.named_parameters():
        assert gradients[name].any(), name
        torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_fast_pass_that_is_not_the_stock_one_is_refused_before_training(capsys):
    from train_experts import check

    model = mixture(chosen=2)
    check(model, PAD)
    assert "agree" in capsys.readouterr().out
    model.model.layers[1].mlp.gate.top_k = 1
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(50)
    with pytest.raises(ArithmeticError, match=r"from the stock logits, expected less than 0\.001"):
        check(model, PAD)


def test_experts_by_lot_are_as_many_as_by_a_score_and_drawn_from_all():
    from trial_experts import by_lot

    kept, every = {0: (1, 3, 4), 2: (0, 1, 2)}, [{"block": block, "experts": [{}] * 9} for block in (0, 2)]
    twin = SimpleNamespace(plan=Plan("experts", 3, scores=every, experts=kept), replan=lambda plan: plan)
    drawn = [by_lot(twin, seed).experts for seed in range(40)]
    assert drawn[7] == by_lot(twin, 7).experts
    for block in (0, 2):
        left = [each[block] for each in drawn]
        assert {len(set(each)) for each in left} == {3} and all(each == tuple(sorted(each)) for each in left)
        assert {expert for each in left for expert in each} == set(range(9)) and len(set(left)) > 20
