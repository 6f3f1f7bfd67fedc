"""Sequences packed into one row are trained on as the same sequences padded: losses, gradients, states."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from tiny import FAMILIES, HYBRIDS, ids, tiny
from twins import fill_adapters, masked_twin

from recover.config.recipe import Lora, Loss
from recover.distill.distiller import Distiller, scored_rows, scored_tokens
from recover.models.attention import Packing, packing_configs
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.train.data import MULTIPLE, RECORDING, collator, filled, packer, row_sizes, with_scored

# A softcap; blocks that do not hand on where sequences begin; sinks; blocks with a state, which would go from one to
# the next.
NOT_PACKED = {"gemma2", "nemotron", "gpt_oss", *HYBRIDS}
PACKED = [family for family in FAMILIES if family not in NOT_PACKED]
WEIGHTS = Loss(variance=0.5, ce=0.1, temperature=2.0, chunk=16)


def rows(lengths: tuple[int, ...] = (23, 9, 1, 30, 14)) -> list[dict[str, Any]]:
    """Of each row all tokens but the first few are scored; of the second all."""
    return [
        {
            "input_ids": ids(1, length, seed=number)[0].numpy(),
            "completion_mask": (np.arange(length) >= (0 if number == 1 else length // 3)).astype(np.int8),
        }
        for number, length in enumerate(lengths)
    ]


def twin_of(family: str, *, masked: bool = False, blocks: Any = "all", dtype: Any = torch.float32) -> Twin:
    model = tiny(family).to(dtype)
    twin = masked_twin(model) if masked else Twin(model, Plan("depth", 6, (2, 4)))
    twin.add_lora(Lora(rank=4, blocks=blocks))
    fill_adapters(twin)
    twin.model.train()
    return twin


def step(twin: Twin, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of the loss, and the gradient of every adapter as one row."""
    twin.model.zero_grad()
    sums = twin.model(**{**batch, "attention_mask": None}, distill=Distiller(twin, WEIGHTS))
    sums["loss"].backward()
    gradient = torch.cat([each.grad.flatten() for each in twin.model.parameters() if each.grad is not None])
    return torch.stack([sums[name].detach() for name in ("loss", "kl", "variance", "reverse_kl", "ce")]), gradient


PACKED_AS = [*((family, {}) for family in PACKED), ("llama", {"masked": True}), ("llama", {"blocks": "after_cut"})]


@pytest.mark.parametrize(
    ("family", "options", "sizes"),
    [
        *((family, options, (128,)) for family, options in PACKED_AS),
        *(pytest.param(*each, (), marks=() if each[0] == "llama" else pytest.mark.slow) for each in PACKED_AS),
    ],
)
def test_a_packed_batch_has_the_losses_and_gradients_of_a_padded_one(family, options, sizes):
    """Sliding windows among the families are shorter than the rows."""
    twin = twin_of(family, **options)
    padded, expected = step(twin, collator(0, "completion")(rows()))
    packed, gradient = step(twin, packer(0, "completion", 30, sizes)(rows()))
    torch.testing.assert_close(packed, padded, rtol=1e-6, atol=0)
    assert (gradient - expected).norm() < 1e-5 * expected.norm() and expected.norm() > 0


def test_what_is_packed_is_what_is_known_of_it():
    packed = with_scored(packer(7, "completion", 30, (128,)))(rows())
    padded = collator(7, "completion")(rows())
    packing = Packing(*packed["packing"])
    assert packed["input_ids"].shape == packed["labels"].shape == packing.position_ids.shape == (1, 128)
    assert packing.starts_S.tolist() == [0, 23, 32, 33, 63, 77, 107, 128, 128, 128, 128]
    for start, end in itertools.pairwise(packing.starts_S.tolist()):
        expected = list(range(end - start)) if end <= 77 else [0] * (end - start)  # padding moves no largest position
        assert packing.position_ids[0, start:end].tolist() == expected
    assert (packed["input_ids"][0, 77:] == 7).all() and (packed["labels"][0, 77:] == -100).all()
    assert scored_tokens(packed["labels"]) == scored_tokens(padded["labels"]) == len(packed["scored"][0])
    assert packed["scored"][1].tolist() == scored_rows(padded["labels"])[1].tolist()


def test_rows_of_a_size_have_one_shape_however_long_their_sequences_are():
    collate = packer(0, "all", 30, (64, 128))
    shapes = {
        tuple(len(each) for each in (batch["input_ids"][0], batch["packing"][1]))
        for batch in (collate(rows(lengths)) for lengths in ((30, 30, 30), (30, 29, 6), (22, 22, 22)))
    }
    assert len(shapes) == 1


@pytest.mark.parametrize(("family", "more"), [("gemma2", {}), ("granite", {"attention_dropout": 0.1})])
def test_a_softcap_or_dropout_of_attention_is_not_packed(family, more):
    assert packing_configs(tiny(family, **more)) == []
    assert packing_configs(tiny("gemma3_text")) and packing_configs(tiny("granite"))


def test_a_row_alone_is_stock():
    """Half precision too, where the packed row on a CPU takes the same kernels."""
    model = tiny("qwen3").to(torch.bfloat16)
    packed = packer(0, "all", 30)(rows((30,)))
    from recover.models.attention import PACKED_NAME, attending

    with torch.no_grad():
        expected = model(input_ids=packed["input_ids"]).logits
        with attending(packing_configs(model), PACKED_NAME):
            found = model(input_ids=packed["input_ids"], **Packing(*packed["packing"]).keywords()).logits
    assert torch.equal(found, expected)


def cost(totals: list[int], sizes: tuple[int, ...]) -> int:
    return sum(filled(total, sizes)[0] for total in totals) + RECORDING * sum(sizes)


@pytest.mark.parametrize("seed", range(4))
def test_sizes_cost_least(seed):
    generator = np.random.default_rng(seed)
    totals = generator.integers(1, 9 * MULTIPLE, 40 * (seed + 1)).tolist()
    multiples = sorted({-(-total // MULTIPLE) * MULTIPLE for total in totals})
    found = row_sizes(totals)
    every = (
        sizes
        for count in range(1, len(multiples) + 1)
        for sizes in itertools.combinations(multiples, count)
        if sizes[-1] == multiples[-1]
    )
    assert cost(totals, found) == min(cost(totals, sizes) for sizes in every)


def test_what_is_filled_up_depends_on_the_size_alone():
    sizes = (128, 320)
    assert [filled(total, sizes) for total in (1, 128, 129, 320)] == [(128, 128), (128, 128), (320, 192), (320, 192)]
    assert filled(321, sizes) == (384, 64)
