"""Kernels of a pass over one token a row, against plain torch. Needs a GPU, or Triton's interpreter.

The interpreter runs them on the CPU, where TRITON_INTERPRET=1 asks for it; it cuts bfloat16 off where a GPU rounds.
"""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from test_decode import prompts, texts
from test_fused_kernels import DEVICE, DTYPES, INTERPRETED, normal, rounding
from tiny import FAMILIES, HYBRIDS, tiny
from twins import fill_adapters, masked_twin

from recover.config import recipe
from recover.kernels import fused
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.text.decode import drawn, keys, write
from recover.text.generate import plain

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED), reason="the kernels run on a GPU, or in Triton's interpreter"
)


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    monkeypatch.setattr(fused, "DEVICES", (DEVICE,))


def attention_of(groups, columns, size, value, dtype, *, rows=3, heads=2):
    query = normal(rows, heads, groups, size, dtype=dtype)
    keys_, values = (normal(rows, heads, columns, each, dtype=dtype, seed=each) for each in (size, value))
    last = torch.tensor([0, columns // 2, columns - 1], device=DEVICE)[:rows]
    return query, keys_, values, last


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("groups", "columns", "size", "value"), [(1, 7, 16, 16), (3, 130, 64, 64), (7, 64, 64, 40), (4, 65, 96, 96)]
)
def test_attention_reads_up_to_a_rows_last_column(groups, columns, size, value, dtype):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies no matrices of bfloat16")
    query, keys_, values, last = attention_of(groups, columns, size, value, dtype)
    behind = torch.arange(columns, device=DEVICE)[None] > last[:, None]
    added = torch.zeros(3, 1, 1, columns, device=DEVICE, dtype=dtype)
    added[:, 0, 0, 3:5] = torch.finfo(dtype).min  # hidden within the bound too, as by a sliding window
    added[0] = 0
    hidden = added.float().masked_fill(behind[:, None, None], float("-inf"))
    exact = F.scaled_dot_product_attention(query.double(), keys_.double(), values.double(), hidden.double(), scale=0.2)
    keys_[behind[:, None].expand(-1, 2, -1)] = float("nan")  # never read
    values[behind[:, None].expand(-1, 2, -1)] = float("nan")
    found = fused.kernels().attend(query, keys_, values, added, last, 0.2)
    torch.testing.assert_close(
        found.double(), exact, rtol=0, atol=(16 if dtype == torch.float32 else 4) * rounding(dtype)
    )
    alone = fused.kernels().attend(query[1:2], keys_[1:2], values[1:2], added[1:2], last[1:2], 0.2)
    assert torch.equal(alone, found[1:2])


def test_without_a_mask_and_from_parts_of_a_larger_tensor():
    query, keys_, values, last = attention_of(3, 50, 32, 32, torch.float32)
    wide = torch.cat([query, query], -1)[..., :32]
    long = [torch.cat([each, each], 2)[:, :, :50] for each in (keys_, values)]
    found = fused.kernels().attend(wide, *long, None, last, 0.3)
    torch.testing.assert_close(found, fused.kernels().attend(query, keys_, values, None, last, 0.3))
    seen = torch.arange(50, device=DEVICE)[None] <= last[:, None]
    exact = F.scaled_dot_product_attention(query, keys_, values, seen[:, None, None], scale=0.3)
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(16, 16), (64, 40), (1, 1), (3, 20)])
def test_a_key_and_a_value_go_to_their_column_and_nowhere_else(sizes):
    rows, heads, columns = 4, 3, 9
    new = [normal(rows, 2 * heads, size, seed=size)[:, ::2] for size in sizes]
    held = [normal(rows, heads, columns, size, seed=7) for size in sizes]
    at = torch.tensor([0, 8, 3, 3], device=DEVICE)
    expected = [each.clone() for each in held]
    for into, one in zip(expected, new, strict=True):
        into[torch.arange(rows, device=DEVICE), :, at] = one
    fused.kernels().put(*new, *held, at)
    assert all(map(torch.equal, held, expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_of_parts_of_one_product_are_those_of_whole_matrices(dtype):
    both = normal(5, 2, 2 * 1100, dtype=dtype)
    gate, up = both.split(1100, -1)
    found = fused.gated(gate, up)
    assert found.is_contiguous() and torch.equal(found, fused.gated(gate.contiguous(), up.contiguous()))


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.3, 0.01])
@pytest.mark.parametrize(("vocabulary", "dtype"), [(300, torch.float32), (5000, torch.float32), (5000, torch.bfloat16)])
def test_draws_are_those_of_plain_torch(vocabulary, dtype, top_p):
    rows = 64
    logits = normal(rows, vocabulary, dtype=dtype, size=3.0)
    key_B2, place_B = keys(7, range(rows), torch.device(DEVICE)), torch.arange(rows, device=DEVICE) * 3
    expected = drawn(logits, key_B2, place_B, 0.7, top_p)
    found = fused.kernels().draw(logits, key_B2, place_B, 0.7, top_p)
    assert (found == expected).double().mean() >= 0.98  # ties, and where the nucleus ends, up to rounding
    assert torch.equal(found[5:9], fused.kernels().draw(logits[5:9], key_B2[5:9], place_B[5:9], 0.7, top_p))


# Sinks, and classes of transformers whose attention cannot be replaced.
STOCK_ATTENTION = ("granite_swa", "gpt_oss", "stablelm", "stablelm_parallel")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in HYBRIDS])
def test_texts_are_those_of_plain_generate(monkeypatch, family):
    model, asked, calls = cast("Any", tiny(family)).to(DEVICE), prompts(5), []
    expected = texts(plain, model, asked, limit=6, rows=5)
    attend = fused.kernels().attend
    monkeypatch.setattr(fused.kernels(), "attend", lambda *each: (calls.append(1), attend(*each))[1])
    assert texts(write, model, asked, limit=6, rows=3) == expected
    capped = getattr(model.config, "attn_logit_softcapping", None)
    stock = capped is not None or family in STOCK_ATTENTION
    assert bool(calls) == (not stock)


@pytest.mark.parametrize("masked", [False, True])
def test_texts_of_a_pruned_twin_with_adapters_are_those_of_plain_generate(masked):
    twin = masked_twin(tiny()) if masked else Twin(tiny(), Plan("depth", 6, (2, 4)))
    twin.add_lora(recipe.Lora(rank=4))
    fill_adapters(twin)
    twin.model.to(DEVICE)
    asked = prompts(5)
    for view in (twin.folded, twin.dense):
        with view():
            expected = texts(plain, twin.base, asked, limit=6, rows=5)
            assert texts(write, twin.base, asked, limit=6, rows=3) == expected
