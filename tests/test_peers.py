"""Peers on the same work: each cut is what its paper says, all learn from the same rows, a name means one thing."""

import argparse
import json
import os
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

import recover
from recover.config.prune import Depth
from recover.models.plan import Plan
from recover.models.twin import Twin

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PEERS = BENCHMARKS / "peers"
CLONE = os.environ.get("WANDA_CLONE")  # a clone of github.com/locuslab/wanda, which is no package


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The benchmark's modules by their names, and no trace of them: other benchmarks have some of the same names."""
    before = set(sys.modules)
    for folder in (BENCHMARKS, BENCHMARKS / "coder", PEERS):
        monkeypatch.syspath_prepend(str(folder))
    yield
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def texts():
    torch.manual_seed(0)
    return [torch.randint(3, 256, (1, length)) for length in (17, 9, 24)]


def qwen2():
    return tiny.tiny("qwen2")


# Names.


def test_a_name_says_what_a_variant_is_made_from():
    from workbench import Parts, parent_of, parts_of

    assert parts_of("influence+sft+truth+x0.5+q4_0") == Parts("influence", "sft", "truth", 0.5, "q4_0")
    assert parts_of("width+kd") == Parts("width", "kd") and parts_of("dense+nf4") == Parts("dense", rounding="nf4")
    chain = ["width+kd+q8_0"]
    while (parent := parent_of(chain[-1])) is not None:
        chain.append(parent)
    assert chain == ["width+kd+q8_0", "width+kd", "width", "dense"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("shortgpt", "expected a cut"),
        ("dense+sft", "'sft' does not stand there"),
        ("maw+truth", "'truth' does not stand there"),
        ("maw+full+full", "'full' does not stand there"),
        ("kl+q4_0+kd", "'kd' does not stand there"),
        ("hand+x2", "'x2' does not stand there"),
        ("maw+kd", "it is for kl, influence, hand, width, masks"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name, said):
    from workbench import parts_of

    with pytest.raises(SystemExit, match=f"^{name.replace('+', '[+]')}: .*{said}"):
        parts_of(name)


def test_every_listed_variant_can_be_made_once_each_behind_what_it_needs():
    from peers import VARIANTS
    from workbench import tasks_for

    tasks = tasks_for(VARIANTS, done={"influence", "width+kd"})
    keys = [task.key for task in tasks]
    assert len(keys) == len(set(keys))
    for place, task in enumerate(tasks):
        assert task.needs <= set(keys[:place]), task
    measured = {task.name for task in tasks if task.measured}
    assert measured == set(VARIANTS) - {"influence", "width+kd"}
    assert {"influence", "width+kd", "text", "truth"} <= {name for name, _ in keys}  # others are made from them
    assert tasks_for(VARIANTS, done=set(VARIANTS)) == []


# Cuts.


@pytest.mark.parametrize(("width", "heads", "groups", "neurons", "depth", "gone"), [(896, 14, 2, 4864, 24, 2)])
def test_neurons_hold_about_the_parameters_of_the_blocks(width, heads, groups, neurons, depth, gone):
    from cuts import Size

    sizes = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": groups}
    size = Size.of(SimpleNamespace(**sizes, intermediate_size=neurons, num_hidden_layers=depth), gone)
    assert size.neurons == 4416  # as the recipe width9 of this model has it
    block = 2 * width * width + 2 * width * (width // heads) * groups + 3 * width * neurons
    freed = 3 * width * depth * (neurons - size.neurons)
    assert abs(freed - gone * block) <= 3 * width * depth * 32


def test_blocks_of_least_influence_are_those_that_our_score_finds(texts):
    from cuts import Size, influence, influences

    from recover.models.site import sites_in
    from recover.prune.depth.scores import influence_score

    model = qwen2()
    blocks = model.config.num_hidden_layers
    found = influences(model, texts)
    ours = influence_score(Twin(qwen2(), Plan.none(blocks)), [ids[0][None] for ids in texts])
    spans = [tuple(sites_in(block)) for block in range(blocks)]
    assert found == pytest.approx(ours(spans, frozenset(), ""), rel=1e-4)
    cut, facts = influence(model, texts, Size(2, 0))
    assert facts["dropped"] == sorted(sorted(range(blocks), key=found.__getitem__)[:2])
    assert cut.config.num_hidden_layers == blocks - 2


def test_a_model_without_blocks_computes_what_our_view_without_them_does(texts):
    from cuts import Size, hand

    twin = recover.prune(qwen2(), None, Depth(blocks=(3, 4)))  # type: ignore[arg-type]
    cut, facts = hand(qwen2(), texts, Size(2, 0))
    assert facts == {"dropped": [3, 4]}
    with torch.no_grad():
        expected = twin.model(input_ids=texts[0]).logits
        assert torch.equal(cut(input_ids=texts[0]).logits, expected)
        written = cut.generate(texts[0], max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=True)
        assert torch.equal(written, cut.generate(texts[0], max_new_tokens=4, min_new_tokens=4, use_cache=False))


def caught(found, _layer, given, _out):
    found.append(given[0][0])


def test_wanda_zeroes_the_least_of_each_row_by_what_the_zeros_before_leave(texts):
    from cuts import Size, wanda

    dense, cut = qwen2(), wanda(qwen2(), texts, Size(0, 0, 0.5))[0]
    for number, (before, after) in enumerate(zip(dense.model.layers, cut.model.layers, strict=True)):
        # The blocks before are as they were left, this one and those behind are dense: what Wanda sees.
        seen = qwen2()
        for done in range(number):
            seen.model.layers[done].load_state_dict(cut.model.layers[done].state_dict())
        inputs = defaultdict(list)
        for name, layer in seen.model.layers[number].named_modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(partial(caught, inputs[name]))
        with torch.no_grad():
            for ids in texts:
                seen(input_ids=ids)
        for name, found in inputs.items():
            norm_I = torch.cat(found).norm(dim=0)
            weight, kept = before.get_submodule(name).weight, after.get_submodule(name).weight
            gone = kept == 0
            assert (gone.sum(dim=1) == weight.shape[1] // 2).all()
            assert torch.equal(kept[~gone], weight[~gone])
            score = weight.abs() * norm_I
            highest_gone = score.masked_fill(~gone, 0).amax(dim=1)
            lowest_kept = score.masked_fill(gone, torch.inf).amin(dim=1)
            assert (highest_gone <= lowest_kept * (1 + 1e-5)).all()


@pytest.mark.skipif(CLONE is None, reason="WANDA_CLONE: a clone of github.com/locuslab/wanda")
def test_wanda_is_that_of_its_authors(texts, monkeypatch):
    """Their own loop and scores, on text of ours, with positions that blocks have wanted since."""
    from cuts import Size, wanda

    monkeypatch.syspath_prepend(str(CLONE))
    from lib import prune  # pyright: ignore[reportMissingImports]

    same = [ids[:, :9] for ids in texts]
    model = qwen2()
    model.seqlen, model.hf_device_map = 9, {}
    positions = torch.arange(9)[None]
    for block in model.model.layers:
        forward = block.forward

        def older(x, forward=forward, **given):
            turned = model.model.rotary_emb(x, positions)
            out = forward(x, position_embeddings=turned, **{**given, "position_ids": positions})
            return (out,)

        block.forward = older
    monkeypatch.setattr(prune, "get_loaders", lambda *_, **__: ([(ids, ids) for ids in same], None))
    asked = argparse.Namespace(nsamples=len(same), seed=0, sparsity_ratio=0.5, use_variant=False)
    prune.prune_wanda(asked, model, None, device=torch.device("cpu"))
    ours = wanda(qwen2(), same, Size(0, 0, 0.5))[0]
    for (name, theirs), (_, mine) in zip(model.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(theirs, mine), name


def test_optipfair_cuts_as_many_neurons_as_it_is_asked_for(texts):
    pytest.importorskip("optipfair")
    from cuts import Size, maw, maw_text

    for cut in (maw, maw_text):
        model, facts = cut(qwen2(), texts, Size(0, 72))
        assert facts == {"neurons": 72}
        assert model.model.layers[0].mlp.down_proj.in_features == 72 and model.config.intermediate_size == 72
        assert torch.isfinite(model(input_ids=texts[0]).logits).all()


# Rounding.


def test_four_bits_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    from workbench import rounded_to_nf4

    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
        theirs = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4"))
        assert torch.equal(rounded_to_nf4(weight), theirs)


def test_four_bits_are_the_nearest_of_sixteen_values_in_each_block():
    from workbench import BLOCK, NF4, four_bits, rounded_to_nf4

    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    for block, found in zip(weight.reshape(-1, BLOCK), rounded_to_nf4(weight).reshape(-1, BLOCK), strict=True):
        grid = torch.tensor(NF4) * block.abs().max()
        assert torch.allclose((found - block).abs(), (grid - block[:, None]).abs().amin(dim=1), atol=1e-6)
    assert torch.equal(rounded_to_nf4(torch.zeros(2, 64)), torch.zeros(2, 64))
    model = qwen2()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    linears = sum(layer.weight.numel() for layer in model.model.modules() if isinstance(layer, nn.Linear))
    others = sum(parameter.numel() for parameter in before.values()) - linears
    assert four_bits(model) == 4 * others + linears // 2 + 4 * linears // BLOCK
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "proj.weight" in name}


# Right answers, and the table.


def test_right_answers_of_the_embedded_model_are_right(tmp_path):
    from truth import embedded

    embedded(tmp_path, tmp_path / "truth")
    rows = [json.loads(line) for line in (tmp_path / "truth" / "prompts.jsonl").read_text().splitlines()]
    assert len(rows) == 5600
    stories = [row for row in rows if row["completion"].startswith(tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))]
    for row in stories[:50]:
        lines = row["completion"].splitlines()
        for line in lines[1:-1]:
            sides = line.split("=")
            assert eval(sides[0].replace("x", "*").replace("×", "*").replace(":", "//")) == int(
                sides[1]
            )  # our own text
    assert len(stories) > 1000


def test_the_table_counts_what_dense_has_right(tmp_path):
    from peers import kept_of, markdown

    def measured(name, right):
        folder = tmp_path / "measured" / name
        folder.mkdir(parents=True)
        share = sum(right) / len(right)
        task = {"kind": "generate", "items": len(right), "exact_match": share}
        task |= {"samples": [{"correct": bool(each)} for each in right]}
        record = {"headline": {"generation": share}, "tasks": {"sums": task}}
        (folder / "measure.json").write_text(json.dumps(record))
        figures = {"parameters": 100, "nonzero": 100, "bytes": 200, "tokens_asked": 10, "seed": 0}
        return {"variant": name, **figures}

    rows = [measured("dense", [1, 1, 1, 0]), {**measured("hand", [1, 0, 0, 1]), "parameters": 90, "cut_seconds": 1.6}]
    share, low, high = kept_of(tmp_path, "hand")
    assert share == pytest.approx(2 / 3) and low < share < high
    table = markdown(list(reversed(rows)), tmp_path)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert [line[0] for line in lines[2:]] == ["dense", "hand"]
    assert lines[3][1] == "90.0%" and lines[3][5] == "2" and lines[3][-1].startswith("66.7% [")
    assert markdown(rows[1:], tmp_path) == "dense has no row yet\n"


# All of it, once.


@pytest.mark.slow
def test_peers_and_ours_learn_from_the_same_rows(tmp_path):
    from peers import main

    arguments = [str(BENCHMARKS.parent / "recipes" / "quickstart.yaml"), "--out", str(tmp_path), "--tokens", "3000"]
    arguments += ["--set", "measure.limit=4", "--only", "dense", "influence+sft", "hand+gkd", "kl+kd", "kl+kd+nf4"]
    assert main(arguments) == 0
    rows = {row["variant"]: row for row in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())}
    assert rows.keys() == {"dense", "influence+sft", "hand+gkd", "kl+kd", "kl+kd+nf4"}
    trained = [rows[name] for name in ("influence+sft", "hand+gkd", "kl+kd")]
    assert len({(row["tokens"], row["steps"], row["parameters"]) for row in trained}) == 1
    assert rows["kl+kd+nf4"]["bytes"] < rows["kl+kd"]["bytes"] < rows["dense"]["bytes"]
    before = (tmp_path / "results.jsonl").read_text()
    assert main(arguments) == 0 and (tmp_path / "results.jsonl").read_text() == before
