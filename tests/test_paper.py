"""The paper benchmark's own parts: what it shows it undoes, its 4 bits are the nearest, its figures show its rows."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ids, tiny
from twins import random_masks

from recover.models.arch import linears_of
from recover.models.plan import Plan, Pruned
from recover.models.site import Site
from recover.models.twin import Twin

FOLDER = Path(__file__).parent.parent / "benchmarks" / "paper"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def _shown(twin: Twin) -> dict[str, Pruned]:
    from plans import quantized

    blocks = len(twin.blocks)
    masks = random_masks(twin.model)
    return {
        "blocks": Pruned(Plan("depth", blocks, (2, Site(3, "mlp"))), {}, {}),
        "masks": Pruned(Plan.none(blocks), masks, {}),
        "4 bits": Pruned(Plan.none(blocks), {}, quantized(twin, 4)),
    }


@torch.no_grad()
def test_a_row_is_shown_as_it_says_and_leaves_the_dense_model_to_the_bit():
    from plans import showing

    model = tiny("llama")
    stock = {name: (type(linear), set(vars(linear)["_buffers"])) for name, linear in linears_of(model).items()}
    dense_BTV = model(input_ids=ids()).logits
    twin = Twin(model, Plan.none(len(model.model.layers)))
    for name, pruned in _shown(twin).items():
        with showing(twin, pruned):
            assert not torch.equal(twin.model(input_ids=ids()).logits, dense_BTV), name
            with twin.dense():
                assert torch.equal(twin.model(input_ids=ids()).logits, dense_BTV), name
            assert (twin.closed_sites == {Site(2, "attention"), Site(2, "mlp"), Site(3, "mlp")}) == (name == "blocks")
        assert torch.equal(twin.model(input_ids=ids()).logits, dense_BTV), name
        now = {name: (type(linear), set(vars(linear)["_buffers"])) for name, linear in linears_of(model).items()}
        assert now == stock, name


@torch.no_grad()
def test_masks_and_4_bits_are_those_of_a_model_whose_weights_were_changed_by_hand():
    from plans import showing

    twin = Twin(tiny("llama"), Plan.none(6))
    for name, pruned in _shown(twin).items():
        other = tiny("llama")
        for linear, layer in linears_of(other).items():
            if linear in pruned.masks:
                layer.weight.mul_(pruned.masks[linear])
            if f"{linear}.weight" in pruned.weights:
                layer.weight.copy_(pruned.weights[f"{linear}.weight"])
        if name != "blocks":
            with showing(twin, pruned):
                torch.testing.assert_close(
                    twin.model(input_ids=ids()).logits, other(input_ids=ids()).logits, rtol=0, atol=1e-5
                )


@pytest.mark.parametrize("inputs", [64, 96, 112])
def test_4_bits_are_the_nearest_of_sixteen_values_of_each_group(inputs: int):
    from plans import rounded

    weight_OI = torch.randn(5, inputs, generator=torch.Generator().manual_seed(0))
    found_OI = rounded(weight_OI, 4)
    group = math.gcd(inputs, 64)
    for row, near in zip(weight_OI.split(group, 1), found_OI.split(group, 1), strict=True):
        for w_I, r_I in zip(row, near, strict=True):
            grid_16 = torch.arange(-8, 8) * (w_I.abs().max() / 7)
            nearest_I = grid_16[(w_I[:, None] - grid_16[None]).abs().argmin(-1)]
            torch.testing.assert_close(r_I, nearest_I)


def test_rows_begin_with_the_dense_model_and_those_probed_in_full_and_name_each_once():
    from plans import PROBED, rows_of

    names = [row.name for row in rows_of(30)]
    assert names[: 1 + len(PROBED)] == ["dense", *PROBED]
    assert len(set(names)) == len(names)
    assert {"attention-12", "mlp-8", "block-6", "wanda-2of4"} <= set(names)
    assert max(row.count or 0 for row in rows_of(4)) == 3  # of 4 MLPs one stays


@given(st.lists(st.floats(0, 200), min_size=1, max_size=8))
def test_labels_keep_their_order_and_do_not_cover_each_other(places: list[float]):
    import sys

    sys.path.insert(0, str(FOLDER))
    from drawing import apart

    found = apart(places, 14.0, 0.0, 200.0)
    order = sorted(range(len(places)), key=lambda index: places[index])
    gaps = [found[b] - found[a] for a, b in pairwise(order)]
    assert all(gap >= 14.0 - 1e-9 for gap in gaps)
    assert max(found) <= 200.0
    crowded = any(places[b] - places[a] < 14.0 for a, b in pairwise(order))
    assert crowded or found == places


def test_every_figure_is_a_file_of_its_own_and_shows_each_row(tmp_path: Path):
    from figures import write_figures
    from table import markdown

    rows = [_row("dense", "dense", 0), *(_row(f"mlp-{n}", "mlp", n) for n in (2, 4)), _row("int4", "rounded", None)]
    files = write_figures(rows, tmp_path)
    assert [file.stem for file in files] == ["scores", "spaces", "blocks", "steps_kl", "steps_probability", "options"]
    for file in files:
        root = ElementTree.parse(file).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        style = "".join(root.itertext())
        used = set(re.findall(r'class="([^"]+)"', file.read_text()))
        for name in {name for css in used for name in css.split() if "-" in name}:
            assert re.search(rf"\.{name}\b", style), f"{file.stem}: {name} has no rule"
    table = markdown(list(reversed(rows)))
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        "dense",
        "2 MLPs",
        "4 MLPs",
        "4 bits, to nearest",
    ]


def test_claims_are_figures_of_the_rows_and_those_without_rows_are_left_out():
    from claims import claims

    rows = [_row("dense", "dense", 0), *(_row(f"mlp-{n}", "mlp", n) for n in (2, 4)), _row("int4", "rounded", None)]
    rows[1]["drift"]["final"] |= {"probability": {"mean": 0.9, "p50": 0.0}}  # a tail alone
    said = {line.split("|")[1].strip(): line.split("|")[3].strip() for line in claims(rows).splitlines()[2:]}
    paired = said["... choice against dense, points, on the same questions"]
    assert "4 MLPs -10.0 ± 2.9, 10% of answers changed" in paired  # 1.96 sqrt((0.1 - 0.1²) / 400)
    assert said["... at the last layer"] == "means: in 1 of 3 rows; medians: in 0 of 3 rows"
    assert "4 MLPs 0.4 / 0.41 / – / –" in next(value for claim, value in said.items() if "grows" in claim)
    assert "choice stands when attention goes" in said
    assert not any("texts part" in claim for claim in said)


def _row(name: str, family: str, count: int | None) -> dict:
    size = 0.1 * (count or 0)
    spread = {"mean": size, "p50": size}
    names = ("kl", "kl_predicted", "embedding", "logit", "probability", "probability_predicted", "top1")
    line = {"mean": [size, size + 0.01], "p50": [size, size]}
    drift: dict = {"final": dict.fromkeys(names, spread)}
    if count in (4, None):
        drift["steps"] = {way: {"n": [3, 2], **dict.fromkeys(names, line)} for way in ("forced", "own", "total")}
        drift["blocks"] = [{"block": block, **dict.fromkeys(names, spread)} for block in range(6)]
    inside = {"kl": spread, "probability": spread}
    return {
        "row": name,
        "family": family,
        "count": count,
        "dropped": list(range(count or 0)),
        "nonzero": 1 - size,
        "headline": {"perplexity": 10 + size},
        "tasks": {
            "sums": {"kind": "generate", "exact_match": 0.5 - size, "interval95": [0.0, 0.6]},
            "arc": {"kind": "choice", "accuracy": 0.6, "interval95": [0.5, 0.7], "chance": 0.25},
        },
        "drift": drift,
        "choice": {
            "items": 400,
            "subspace": 4,
            "drift": inside,
            "vocabulary": inside,
            "mass": {"dense": spread},
            "likelihood": {"same_choice": 0.9, "accuracy": {"dense": 0.6, "pruned": 0.5 if count else 0.6}},
        },
    }
