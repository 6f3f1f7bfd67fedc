"""Rows of faults.py that need no training: wrong recipes, rows that are not scored, stale caches, shared prefixes."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from random import Random
from typing import Any

import torch
from fault_dealing import Hand, Trial

from recover.base.errors import RecipeError

FAMILIES = ("llama", "qwen3", "gemma2", "granite", "mistral_sliding")


def recipes(_bench: Any, hand: Hand) -> Iterator[Trial]:
    """Drawn as in tests/test_recipe.py: any field replaced, removed or joined by any value."""
    import test_recipe
    from hypothesis import HealthCheck, given, seed, settings
    from hypothesis import strategies as st

    from recover.config.recipe import parse_recipe

    outcomes: list[Trial] = []
    change = st.tuples(st.sampled_from(test_recipe.places(test_recipe.FULL)), test_recipe.junk)

    @seed(hand.numbers[0])
    @settings(max_examples=len(hand.numbers), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(change)
    def fuzz(changed: tuple[Any, Any]) -> None:
        try:
            parse_recipe(test_recipe.put(test_recipe.FULL, *changed), "fuzzed")
            outcomes.append(None)
        except RecipeError as error:
            outcomes.append(None if error.exit_code == 2 else f"exit code {error.exit_code}")
        except Exception as error:
            outcomes.append(f"{changed}: {type(error).__name__}: {error}")

    fuzz()
    yield from outcomes


def masked_rows(bench: Any, number: int, draw: Random) -> Trial:
    """What is not scored holds NaN; loss and gradients are those without it."""
    import test_distiller

    from recover.distill.distiller import scored_rows

    twin = bench.once("twin", test_distiller.depth_twin)
    data = test_distiller.batch()
    keep = torch.rand(data["labels"].shape, generator=torch.Generator().manual_seed(number)) > draw.random()
    labels = data["labels"].masked_fill(~keep, -100)
    clean = test_distiller.forward(twin, labels=labels)
    expected = test_distiller.gradients(clean.loss, twin)
    rows, _ = scored_rows(labels)
    dead = torch.ones(labels.numel(), dtype=torch.bool).index_fill_(0, rows, False).view(labels.shape)

    def poison(_module: Any, _args: Any, h: torch.Tensor) -> torch.Tensor:
        return h.masked_fill(dead[..., None], math.nan)

    handle = twin.base.model.norm.register_forward_hook(poison)
    try:
        found = test_distiller.forward(twin, labels=labels)
        gradients = test_distiller.gradients(found.loss, twin)
    finally:
        handle.remove()
    same = torch.equal(found.loss, clean.loss) and all(map(torch.equal, gradients, expected))
    return None if same else "the loss or a gradient depends on rows that are not scored"


def stale_caches(bench: Any, hand: Hand) -> Iterator[Trial]:
    """Text that the dense model wrote is taken again only where all it was made from is the same.

    The trials of a hand share a folder, so that each finds the text of those before.
    """
    import test_data
    from tiny import tiny

    from recover.models.plan import Plan
    from recover.models.twin import Twin

    folder = bench.folder("cache")
    folder.mkdir()
    options: list[dict[str, Any]] = [{}, {"temperature": 0.5}, {"top_p": 0.7}, {"max_new_tokens": 5}, {"count": 4}]
    for trial in hand.numbers:
        twin = Twin(tiny(seed=trial % 2), Plan("depth", 6, (2, 4)))
        chosen, seed = options[trial // 2 % len(options)], trial % 3
        cfg = test_data.cfg(test_data.prompts(folder, **chosen))
        cached = test_data.build(cfg, twin, folder, seed=seed).to_dict()
        shutil.rmtree(bench.root / "fresh", ignore_errors=True)
        fresh = test_data.build(cfg, twin, bench.root / "fresh", seed=seed).to_dict()
        yield None if cached == fresh else f"{chosen}, seed {seed}: text of something else was taken"


def shared_prefixes(_bench: Any, number: int, draw: Random) -> Trial:
    import test_distiller

    from recover.distill.distiller import Distiller

    dropped = tuple(sorted(draw.sample(range(1, 5), draw.randint(1, 3))))
    family = draw.choice(FAMILIES)
    twin = test_distiller.depth_twin("after_cut", dropped, family, seed=number)
    twin.model.train()
    distiller = Distiller(twin, test_distiller.WEIGHTS)
    assert distiller.shared_blocks == dropped[0]
    once = twin.model(**test_distiller.batch(), distill=distiller)
    gradients = test_distiller.gradients(once.loss, twin)
    distiller.shared_blocks = 0
    twice = twin.model(**test_distiller.batch(), distill=distiller)
    same = torch.equal(once.loss, twice.loss) and all(
        map(torch.equal, gradients, test_distiller.gradients(twice.loss, twin))
    )
    return None if same else f"{family}, {dropped}: not the bits of the unshared run"
