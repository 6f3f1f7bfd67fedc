"""Rows of faults.py that need no training: wrong recipes, rows that are not scored, stale caches, shared prefixes."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Iterator
from typing import Any

import torch

from recover.errors import RecipeError

Trial = str | None  # what was wrong, or None
RANDOM = random.Random(2)


def recipes(_bench: Any, trials: int) -> Iterator[Trial]:
    """Drawn as in tests/test_recipe.py: any field replaced, removed or joined by any value."""
    import test_recipe
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    from recover.recipe import parse_recipe

    outcomes: list[Trial] = []
    change = st.tuples(st.sampled_from(test_recipe.places(test_recipe.FULL)), test_recipe.junk)

    @settings(max_examples=trials, deadline=None, database=None, suppress_health_check=list(HealthCheck))
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


def masked_rows(_bench: Any, trials: int) -> Iterator[Trial]:
    """What is not scored holds NaN; loss and gradients are those without it."""
    import test_distiller

    from recover.distill.distiller import scored_rows

    twin = test_distiller.depth_twin()
    data = test_distiller.batch()
    generator = torch.Generator().manual_seed(1)
    for _ in range(trials):
        keep = torch.rand(data["labels"].shape, generator=generator) > RANDOM.random()
        labels = data["labels"].masked_fill(~keep, -100)
        clean = test_distiller.forward(twin, labels=labels)
        expected = test_distiller.gradients(clean.loss, twin)
        rows, _ = scored_rows(labels)
        dead = torch.ones(labels.numel(), dtype=torch.bool).index_fill_(0, rows, False).view(labels.shape)

        def poison(_module: Any, _args: Any, h: torch.Tensor, dead: torch.Tensor = dead) -> torch.Tensor:
            return h.masked_fill(dead[..., None], math.nan)

        handle = twin.base.model.norm.register_forward_hook(poison)
        found = test_distiller.forward(twin, labels=labels)
        gradients = test_distiller.gradients(found.loss, twin)
        handle.remove()
        same = torch.equal(found.loss, clean.loss) and all(map(torch.equal, gradients, expected))
        yield None if same else "the loss or a gradient depends on rows that are not scored"


def stale_caches(bench: Any, trials: int) -> Iterator[Trial]:
    """Text that the dense model wrote is taken again only where all it was made from is the same."""
    import test_data
    from tiny import tiny

    from recover.models.twin import Twin
    from recover.prune.plan import Plan

    folder = bench.folder("cache")
    folder.mkdir()
    options: list[dict[str, Any]] = [{}, {"temperature": 0.5}, {"top_p": 0.7}, {"max_new_tokens": 5}, {"count": 4}]
    for trial in range(trials):
        twin = Twin(tiny(seed=trial % 2), Plan("depth", 6, (2, 4)))
        chosen, seed = options[trial // 2 % len(options)], trial % 3
        leaf = test_data.leaf(test_data.prompts(folder, **chosen))
        cached = test_data.build(leaf, twin, folder, seed=seed).to_dict()
        shutil.rmtree(bench.root / "fresh", ignore_errors=True)
        fresh = test_data.build(leaf, twin, bench.root / "fresh", seed=seed).to_dict()
        yield None if cached == fresh else f"{chosen}, seed {seed}: text of something else was taken"


def shared_prefixes(_bench: Any, trials: int) -> Iterator[Trial]:
    import test_distiller

    from recover.distill.distiller import Distiller

    for trial in range(trials):
        dropped = tuple(sorted(RANDOM.sample(range(1, 5), RANDOM.randint(1, 3))))
        family = RANDOM.choice(["llama", "qwen3", "gemma2", "granite", "mistral_sliding"])
        twin = test_distiller.depth_twin("after_cut", dropped, family, seed=trial)
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
        yield None if same else f"{family}, {dropped}: not the bits of the unshared run"
