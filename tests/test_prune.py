"""Pruners against brute force: blocks are really removed, weights really zeroed, formulas written out."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from tiny import ids, tiny

from recover.base.errors import DataError, PruneError
from recover.config.recipe import Calibration, Depth, Magnitude, Wanda
from recover.models.arch import blocks_of, linears_of
from recover.models.plan import MaskRecord, Plan
from recover.models.twin import Twin
from recover.prune import registry
from recover.prune.calibrate import calibration_batches
from recover.prune.depth import search

CALIBRATION = Calibration(data="given", samples=5, length=24, batch_size=2)


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return list(ids(5, 24, seed=3).split(2))


def dense_twin(model) -> Twin:
    return Twin(model, Plan.none(len(blocks_of(model))))


def drop(model, twin_batches, **cfg) -> Plan:
    if "count" in cfg:
        cfg["calibration"] = CALIBRATION
    plan, masks, _ = registry.prune(dense_twin(model), Depth(kind="depth", **cfg), twin_batches)
    assert masks == {}
    return plan


def without(model, dropped) -> torch.nn.Module:
    """A copy whose blocks are gone, as an export would have it."""
    model = copy.deepcopy(model)
    kept = [block for index, block in enumerate(model.model.layers) if index not in dropped]
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [kind for i, kind in enumerate(model.config.layer_types) if i not in dropped]
    return model


@torch.no_grad()
def brute_force_kl(model, dropped, batches) -> float:
    """Mean KL(dense || pruned) a token, from the two models' own logits, in float64."""
    pruned, total, tokens = without(model, dropped), 0.0, 0
    for ids_BT in batches:
        p = model(input_ids=ids_BT, use_cache=False).logits.double().softmax(-1)
        q = pruned(input_ids=ids_BT, use_cache=False).logits.double().softmax(-1)
        total += float((p * (p / q).log()).sum())
        tokens += ids_BT.numel()
    return total / tokens


def table(plan: Plan, number: int) -> dict[tuple[int, ...], float]:
    return {tuple(record["blocks"]): record["score"] for record in plan.scores if record["round"] == number}


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "phi3", "qwen2_sliding"])
def test_greedy_kl_is_brute_force(family, batches):
    model = tiny(family)
    for linear in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
        linear.weight.data *= 0.1  # where there is no norm behind, block 2 goes first: then blocks after it score anew
    reference = copy.deepcopy(model)
    plan = drop(model, batches, count=2, score="kl")
    closed: list[int] = []
    for number in (1, 2):
        expected = {(b,): brute_force_kl(reference, {*closed, b}, batches) for b in range(1, 6) if b not in closed}
        assert table(plan, number) == pytest.approx(expected, rel=1e-3)
        best = min(expected, key=lambda span: expected[span])
        assert [r["blocks"] for r in plan.scores if r["round"] == number and r["chosen"]] == [list(best)]
        closed += best
    assert plan.dropped == tuple(sorted(closed))


def test_contiguous_kl_is_brute_force_over_spans(tiny_llama, batches):
    reference = copy.deepcopy(tiny_llama)
    plan = drop(tiny_llama, batches, count=3, score="kl", contiguous=True)
    expected = {(s, s + 1, s + 2): brute_force_kl(reference, {s, s + 1, s + 2}, batches) for s in (1, 2, 3)}
    assert table(plan, 1) == pytest.approx(expected, rel=1e-3)
    assert plan.dropped == min(expected, key=lambda span: expected[span])


def stream(model, batches) -> torch.Tensor:
    """Residual stream (L + 1, N, D) before, between and after the blocks, off the outputs of the blocks."""
    rows: list[list[torch.Tensor]] = [[] for _ in range(len(model.model.layers) + 1)]
    hooks = [model.model.embed_tokens.register_forward_hook(lambda _m, _a, output: rows[0].append(output))]
    for index, block in enumerate(model.model.layers):
        hooks.append(block.register_forward_hook(lambda _m, _a, output, i=index: rows[i + 1].append(output)))
    with torch.no_grad():
        for ids_BT in batches:
            model(input_ids=ids_BT)
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat([h.flatten(0, 1) for h in block]) for block in rows]).double()


@pytest.mark.parametrize("score", ["angular", "block_influence"])
@pytest.mark.parametrize("contiguous", [True, False])
def test_similarity_scores_equal_the_formula_on_the_residual_stream(tiny_llama, batches, score, contiguous):
    h_LND = stream(tiny_llama, batches)
    plan = drop(tiny_llama, batches, count=2, score=score, contiguous=contiguous)
    length = 2 if contiguous else 1
    expected = {}
    for start in range(1, 6 - length + 1):
        cosine = torch.nn.functional.cosine_similarity(h_LND[start], h_LND[start + length], dim=-1)
        row = torch.arccos(cosine) / torch.pi if score == "angular" else 1 - cosine
        expected[tuple(range(start, start + length))] = float(row.mean())
    assert table(plan, 1) == pytest.approx(expected, rel=1e-5)
    ranked = sorted(expected, key=lambda span: expected[span])
    assert plan.dropped == tuple(sorted(sum(ranked[: 2 // length], ())))


def test_deep_models_try_only_the_blocks_of_least_influence(tiny_llama, batches, monkeypatch):
    monkeypatch.setattr(search, "CANDIDATES", 3)
    plan = drop(tiny_llama, batches, count=1, score="kl")
    influence = table(plan, 0)
    least = sorted(influence, key=lambda span: influence[span])[:3]
    assert len(influence) == 5 and set(table(plan, 1)) == set(least)
    assert {record["by"] for record in plan.scores if record["round"] == 0} == {"block_influence"}


def test_listed_blocks_and_exact_parameter_counts(tiny_llama):
    expected = sum(p.numel() for p in without(tiny_llama, {2, 4}).parameters())
    dense = sum(p.numel() for p in tiny_llama.parameters())
    plan = drop(tiny_llama, [], blocks=(4, 2))
    assert plan.dropped == (2, 4) and plan.scores == [] and plan.calibration == {}
    assert (plan.parameters_dense, plan.parameters_pruned, plan.nonzero) == (dense, expected, expected)


def test_the_twin_is_left_as_it_was(tiny_llama, batches):
    with torch.no_grad():
        before = tiny_llama(input_ids=batches[0]).logits
    twin = dense_twin(tiny_llama)
    leaves = [
        Depth(kind="depth", count=2, calibration=CALIBRATION),
        Wanda(kind="wanda", sparsity=0.5, calibration=CALIBRATION),
        Magnitude(kind="magnitude", pattern="2:4"),
    ]
    names = list(tiny_llama.state_dict())
    for cfg in leaves:
        registry.prune(twin, cfg, batches)
        with torch.no_grad():
            assert torch.equal(tiny_llama(input_ids=batches[0]).logits, before)
        assert list(tiny_llama.state_dict()) == names and twin.closed_blocks == ()
        assert {type(linear) for linear in linears_of(tiny_llama).values()} == {torch.nn.Linear}


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"count": 6}, "prune.count: 6 blocks to drop, the model has 6: drop at most 5"),
        ({"blocks": tuple(range(6))}, "6 blocks to drop, the model has 6"),
        ({"blocks": (0, 3)}, "block 0 cannot be dropped: the length of the KV cache"),
        ({"blocks": (3, 6)}, r"\[6\] are not blocks of this model: it has 6, numbered from 0"),
        ({"blocks": (-1,)}, r"\[-1\] are not blocks"),
    ],
)
def test_drops_that_cannot_work_are_refused(tiny_llama, batches, cfg, message):
    with pytest.raises(PruneError, match=message):
        drop(tiny_llama, batches, **cfg)


def test_all_blocks_but_the_first_can_go(tiny_llama, batches):
    assert drop(tiny_llama, batches, count=5).dropped == (1, 2, 3, 4, 5)


def test_a_drop_that_changes_no_logit_is_refused(tiny_llama, batches):
    for linear in (tiny_llama.model.layers[3].self_attn.o_proj, tiny_llama.model.layers[3].mlp.down_proj):
        torch.nn.init.zeros_(linear.weight)
    with pytest.raises(PruneError, match=r"dropping blocks \[3\] changes no logit"):
        drop(tiny_llama, batches, blocks=(3,))


def test_scores_without_text_and_text_beyond_the_context_are_refused(tiny_llama, batches):
    with pytest.raises(PruneError, match="'kl' is measured on text"):
        drop(tiny_llama, [], count=1)
    with pytest.raises(PruneError, match="300 tokens, the model's context is 256"):
        drop(tiny(), [ids(1, 300)], count=1)


def test_broken_weights_are_named(tiny_llama, batches):
    torch.nn.init.constant_(tiny_llama.model.layers[2].mlp.up_proj.weight, float("inf"))
    with pytest.raises(PruneError, match=r"prune: the kl score of blocks .* is nan"):
        drop(copy.deepcopy(tiny_llama), batches, count=1)
    with pytest.raises(PruneError, match=r"model\.layers\.2\.mlp\.down_proj: sees inputs that are not finite"):
        registry.prune(dense_twin(tiny_llama), Wanda(kind="wanda", sparsity=0.5, calibration=CALIBRATION), batches)


def keep_by_loop(score_OI: torch.Tensor, pattern: str, fraction: float) -> torch.Tensor:
    keep_OI = torch.ones(score_OI.shape, dtype=torch.bool)
    n, m = map(int, pattern.split(":")) if ":" in pattern else (0, score_OI.shape[1])
    gone = m - n if n else round(fraction * m)
    for row, scores in enumerate(score_OI.tolist()):
        for start in range(0, len(scores), m):
            group = range(start, start + m)
            for column in sorted(group, key=lambda index: (scores[index], index))[:gone]:
                keep_OI[row, column] = False
    return keep_OI


@torch.no_grad()
def inputs_by_masking(model, masks, batches, block: int) -> dict[str, torch.Tensor]:
    """Inputs (N, I) of every linear layer of one block, in a copy whose weights masked so far are really zero."""
    model = copy.deepcopy(model)
    linears = linears_of(model)
    for name, keep_OI in masks.items():
        linears[name].weight *= keep_OI
    seen: dict[str, list[torch.Tensor]] = {}
    for name, linear in linears.items():
        if name.startswith(f"model.layers.{block}."):
            linear.register_forward_hook(lambda _m, args, _o, name=name: seen.setdefault(name, []).append(args[0]))
    for ids_BT in batches:
        model(input_ids=ids_BT)
    return {name: torch.cat([x.flatten(0, 1) for x in xs]) for name, xs in seen.items()}


@pytest.mark.parametrize(
    ("family", "pattern", "sparsity"),
    [("llama", "unstructured", 0.6), ("llama", "2:4", None), ("phi3", "4:8", None), ("gemma2", "unstructured", 0.5)],
)
def test_wanda_is_the_textbook_formula_with_pruned_blocks_feeding_later_ones(family, pattern, sparsity, batches):
    reference = tiny(family)
    cfg = Wanda(kind="wanda", pattern=pattern, sparsity=sparsity, calibration=CALIBRATION)
    plan, masks, _ = registry.prune(dense_twin(tiny(family)), cfg, batches)
    done: dict[str, torch.Tensor] = {}
    for block in range(6):
        found = {}
        for name, x_NI in inputs_by_masking(reference, done, batches, block).items():
            norm_I = x_NI.double().square().sum(0).sqrt()
            score_OI = reference.get_submodule(name).weight.detach().double().abs() * norm_I
            expected_OI = keep_by_loop(score_OI, pattern, cfg.fraction)
            assert (masks[name] == expected_OI).float().mean() > 0.999, name  # a near-tie may fall either way
            found[name] = masks[name]
        done |= found
    assert done.keys() == masks.keys() == linears_of(reference).keys()
    assert plan.masks == {name: MaskRecord.of(keep_OI, pattern) for name, keep_OI in masks.items()}
    for keep_OI in masks.values():
        gone = round(cfg.fraction * keep_OI.shape[1])
        assert ((~keep_OI).sum(1) == gone).all()
    assert plan.parameters_dense - plan.nonzero == sum(int((~keep_OI).sum()) for keep_OI in masks.values())


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.3), ("2:4", None)])
def test_magnitude_keeps_the_largest_weights_of_every_row(tiny_llama, pattern, sparsity):
    cfg = Magnitude(kind="magnitude", pattern=pattern, sparsity=sparsity)
    plan, masks, _ = registry.prune(dense_twin(tiny_llama), cfg, [])
    for name, linear in linears_of(tiny_llama).items():
        assert torch.equal(masks[name], keep_by_loop(linear.weight.detach().abs(), pattern, cfg.fraction)), name
    assert plan.kind == "magnitude" and plan.dropped == () and plan.calibration == {}


def test_masks_that_cannot_be_are_refused_by_layer():
    odd = tiny(intermediate_size=98)
    with pytest.raises(PruneError, match=r"layers\.0\.mlp\.down_proj: pattern 2:4 needs whole groups of 4 inputs"):
        registry.prune(dense_twin(odd), Magnitude(kind="magnitude", pattern="2:4"), [])
    with pytest.raises(PruneError, match=r"q_proj: prune.sparsity 0.001 rounds to 0 of its 64 inputs"):
        registry.prune(dense_twin(tiny()), Magnitude(kind="magnitude", sparsity=0.001), [])
    broken = tiny()
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(PruneError, match=r"model\.layers\.1\.mlp\.up_proj: scores are not finite"):
        registry.prune(dense_twin(broken), Magnitude(kind="magnitude", sparsity=0.5), [])


def calibration(path, **fields) -> Calibration:
    return Calibration(data=str(path), **({"samples": 3, "length": 16, "batch_size": 2} | fields))


def test_samples_are_whole_seeded_and_start_with_bos_where_the_tokenizer_says_so(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"document number {i}"}) + "\n" for i in range(20)))
    for bos in (False, True):
        found = calibration_batches(calibration(path), byte_tokenizer(bos=bos), seed=1)
        assert [batch.shape for batch in found] == [(2, 16), (1, 16)]
        again = calibration_batches(calibration(path), byte_tokenizer(bos=bos), seed=1)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        assert bool((torch.cat(found)[:, 0] == 1).all()) is bos
    other = calibration_batches(calibration(path), byte_tokenizer(), seed=2)
    assert not torch.equal(other[0], calibration_batches(calibration(path), byte_tokenizer(), seed=1)[0])


def test_documents_are_joined_by_eos_and_nothing_is_lost(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "abcdefg"}\n\n{"text": "hijklmn"}\n')
    tokenizer = byte_tokenizer()
    (batch,) = calibration_batches(calibration(path, samples=1), tokenizer, seed=0)
    pieces = "".join(tokenizer.convert_ids_to_tokens(batch[0].tolist())).split("</s>")
    assert sorted(pieces) == ["", "abcdefg", "hijklmn"]


def test_a_text_file_is_one_document_and_too_little_text_is_said(tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("\ufeff" + "word " * 8)
    (batch,) = calibration_batches(calibration(path), byte_tokenizer(), seed=0)
    assert batch.shape == (2, 16)
    assert "41 tokens in all: 2 samples of 16 and not calibration.samples: 3" in capsys.readouterr().err
    with pytest.raises(DataError, match="41 tokens in all, one sample needs 64"):
        calibration_batches(calibration(path, length=64), byte_tokenizer(), seed=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 tokens in all"),
        (b'{"text": "a"}\n{"text": 1}\n', r"text\.jsonl:2: no text in column 'text', found \['text'\]"),
        (b'{"body": "a"}\n', r"text\.jsonl:1: no text in column 'text', found \['body'\]: set calibration.column"),
        (b'{"text": "a"\n', r"text\.jsonl:1: not JSON"),
        (b"[1]\n", r"text\.jsonl:1: found list, expected one JSON object a line"),
        (b'{"text": "\xff"}\n', "not UTF-8 text"),
        (b"[" * 100_000 + b"\n", r"text\.jsonl:1: not JSON"),
    ],
)
def test_files_that_are_no_text_are_refused_by_line(tmp_path, content, message):
    path = tmp_path / "text.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        calibration_batches(calibration(path), byte_tokenizer(), seed=0)


def test_parquet_and_what_is_no_data_set(tmp_path):
    import datasets

    path = tmp_path / "text.parquet"
    datasets.Dataset.from_dict({"body": ["some text to read"] * 6}).to_parquet(str(path))
    assert len(calibration_batches(calibration(path, column="body"), byte_tokenizer(), seed=0)) == 2
    with pytest.raises(DataError, match=r"no column 'text', found \['body'\]"):
        calibration_batches(calibration(path), byte_tokenizer(), seed=0)
    with pytest.raises(DataError, match="neither a local text file nor a data set that can be had"):
        calibration_batches(calibration(tmp_path / "absent"), byte_tokenizer(), seed=0)
    with pytest.raises(DataError, match=r"absent.txt: no such file"):
        calibration_batches(calibration(tmp_path / "absent.txt"), byte_tokenizer(), seed=0)
