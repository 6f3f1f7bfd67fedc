"""Sets of blocks that each search finds, on given text and on text that the dense model writes to prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recover.config.recipe import Calibration, Depth

if TYPE_CHECKING:
    from torch import LongTensor

    from recover.models.twin import Twin
    from recover.run.context import RunContext

ANSWER = 96  # tokens that the dense model writes to a prompt
SEARCHES: dict[str, dict[str, Any]] = {"greedy": {}, "swap": {"swap": True}, "beam": {"beam": 4}}
ALL = "kl, own text"


def given_and_own(context: RunContext, cfg: Calibration, files: Sequence[Path]) -> dict[str, list[LongTensor]]:
    """The score's name -> batches of text: `kl` on the recipe's, as many tokens of the dense model's own, its parts."""
    from recover.prune.calibrate import calibration_batches
    from recover.run.context import answered

    texts = {"kl": calibration_batches(cfg, context.tokenizer, context.recipe.seed)}
    own = {}
    for path in files:
        changed = {"column": "prompt", "answer": ANSWER, "samples": max(1, cfg.samples // len(files))}
        part = cfg.model_copy(update={"data": str(path), **changed})
        write = partial(answered, context, ANSWER)
        own[f"{ALL}, {path.stem}"] = calibration_batches(part, context.tokenizer, context.recipe.seed, write)
    if own:
        texts[ALL] = [batch for batches in own.values() for batch in batches]
    return texts | (own if len(own) > 1 else {})


def searched(twin: Twin, cfg: Depth, texts: dict[str, list[LongTensor]]) -> list[dict[str, Any]]:
    """`{text, search, blocks, score, seconds}` of all searches on given and on own text; of its parts, greedy."""
    found = []
    for name, batches in texts.items():
        for search in SEARCHES if name in ("kl", ALL) else ["greedy"]:
            found.append(_searched(twin, cfg, search, name, batches))
            one = found[-1]
            print(f"{search} by {name}: {one['blocks']} {one['score']:.4f}, {one['seconds']:.1f} s", flush=True)
    return found


def _searched(twin: Twin, cfg: Depth, search: str, name: str, batches: list[LongTensor]) -> dict[str, Any]:
    from recover.prune.depth.search import choose

    started = time.perf_counter()
    plain = {"score": "kl", "contiguous": False, "iterative": None, "beam": None, "swap": False}
    own = cfg.model_copy(update=plain | SEARCHES[search])
    choice = choose(twin, own, batches)
    blocks = sorted({site.block for site in choice.sites})
    there = [record for record in choice.candidates if record["chosen"] and record["round"] > 0]
    seconds = time.perf_counter() - started
    last = max(there, key=lambda record: record["round"])  # it came in last: its score is that of the whole set
    return {"text": name, "search": search, "blocks": blocks, "score": last["score"], "seconds": seconds}


def score_on(twin: Twin, plans: list[dict[str, Any]], name: str, batches: list[LongTensor]) -> None:
    """Put the KL on another text into every plan."""
    from recover.models.site import sites_of
    from recover.prune.depth.scores import score_of

    spans = [tuple(sorted(sites_of(plan["blocks"]))) for plan in plans]
    values = score_of(twin, "kl", batches)(spans, frozenset(), f"{name} of {len(spans)} plans")
    for plan, value in zip(plans, values, strict=True):
        plan["scores"][name] = value
