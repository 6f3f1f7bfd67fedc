"""Which score of depth pruning foretells the generation that is left? One process, on a GPU or the CPU.

    python benchmarks/smollm2/fetch.py && python benchmarks/smollm2/make_tasks.py
    python benchmarks/scores.py recipes/smollm2-135m-drop3.yaml --out checkpoints/scores --seconds 150 \\
        --set prune.calibration.batch_size=16
    python benchmarks/scores.py recipes/quickstart.yaml --out checkpoints/scores-tiny --items 50     # CPU, offline

Plans: every block alone, the `prune.count` blocks that each score chooses, and random sets of as many blocks, by turns
neighbours and apart. Each plan is scored by all six scores on the recipe's calibration text before anything is
measured: kl, variance and perplexity with the whole set closed, angular over its runs of neighbours, taylor and
block_influence as sums over its blocks, which is how each of them chooses. Then the recipe's tasks of generation and
choice are measured with the plan's blocks closed, without training.

With `--prompts FILE ...` the dense model writes a second calibration text, as much of it to each file; `--searches`
adds the sets that greedy, swap and beam find by KL on either text, and `--sets 4,5,6` those that are named. Each text's
KL is then a score of every plan. What is searched or named is measured first:

    python benchmarks/scores.py recipes/smollm2-135m-drop3.yaml --out checkpoints/searches --seconds 130 --sets-only \\
        --searches --scores kl --sets 4,5,6 --prompts benchmarks/smollm2/data/{broad,sums}_prompts.jsonl

`scores.json` holds the plans and their scores, `measured.jsonl` a line a plan (the same command goes on where it
stopped), `correlation.json` and `correlation.md` the result: Spearman's rank correlation of each score with what was
lost (1: the score orders plans as they hurt), its 95% interval by bootstrap over plans, and the paired interval of its
difference from kl. Sets and single blocks are shown apart: together, that three blocks hurt more than one is most of
what a score would be praised for.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from score_searches import given_and_own, score_on, searched
from score_table import SCORES, USES, correlations, markdown

from recover.base.artifacts import append_jsonl, read_json, read_jsonl, write_json, write_text
from recover.config.recipe import Depth, Recipe, load_recipe

if TYPE_CHECKING:
    from torch import LongTensor

    from recover.models.twin import Twin
    from recover.run.context import RunContext

SUMMED = ("taylor", "block_influence")  # each block is scored alone, and the lowest go

Plan = dict[str, Any]  # {"blocks": [...], "group": single | set, "why": [...], "scores": {...}}


def main() -> None:
    options = arguments()
    deadline = time.monotonic() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(options.recipe, options.set)
    if not isinstance(recipe.prune, Depth) or recipe.prune.count is None or recipe.prune.unit != "block":
        sys.exit(f"{options.recipe}: prune is not {{kind: depth, count: ...}} of blocks: there is nothing to choose")
    settings = settings_of(recipe, options)
    context = prepared(recipe, options)
    plans = scored_plans(context, settings, options)
    measure_all(context, plans, settings, options, deadline)
    rows = joined(plans, measured_so_far(options.out, settings))
    measured = sum(row["group"] != "dense" for row in rows)
    result = {"settings": settings, "plans": len(plans), "measured": measured, "groups": correlations(rows)}
    write_json(options.out / "correlation.json", result | {"rows": rows})
    table = markdown(result, rows)
    write_text(options.out / "correlation.md", table)
    print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="gives model, calibration, count, tasks and seed")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--items", type=int, default=None, help="of each task, the first ones (default: the recipe's)")
    parser.add_argument("--random", type=int, default=12, help="random sets, half of them neighbours (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=512, help="rows at once when measuring (%(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="measure no further plan after this")
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=SCORES, help="beside kl (default: all)")
    parser.add_argument("--searches", action="store_true", help="greedy, swap and beam by KL on every text")
    parser.add_argument("--prompts", nargs="+", type=Path, default=[], help="the dense model writes a text to each")
    parser.add_argument("--sets", nargs="+", type=numbers, default=[], metavar="B,B,B", help="sets to measure too")
    parser.add_argument("--sets-only", action="store_true", help="no single blocks")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="recipe fields")
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    """Blocks from `4,5,6`."""
    return sorted(map(int, text.split(",")))


def settings_of(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    """What figures depend on: those of other settings are not mixed with ours."""
    leaves = recipe.model_dump(mode="json", include={"seed", "model", "prune", "measure"})
    asked = {name: getattr(options, name) for name in ("items", "random", "scores", "searches", "sets", "sets_only")}
    return json.loads(json.dumps(leaves | asked | {"prompts": [str(path) for path in options.prompts]}))


def prepared(recipe: Recipe, options: argparse.Namespace) -> RunContext:
    """Model, tokenizer and tasks of the recipe, loaded once; texts are greedy alone."""
    from recover.base.console import quiet_libraries
    from recover.run.context import RunContext
    from recover.run.directory import RunDirectory

    quiet_libraries()
    changed = {"sampling": None, "samples": 0, "batch_size": max(options.batch_size, recipe.measure.batch_size)}
    measure = recipe.measure.model_copy(update=changed)
    return RunContext(recipe.model_copy(update={"measure": measure}), RunDirectory(options.out))


# --- plans and their scores


def scored_plans(context: RunContext, settings: dict[str, Any], options: argparse.Namespace) -> list[Plan]:
    """Every plan with its six scores, in the order in which they are measured; read back where they are there."""
    path = options.out / "scores.json"
    if path.exists():
        found = read_json(path)
        _check_same(path, found["settings"], settings)
        return found["plans"]
    from recover.models.arch import blocks_of

    recipe, started = context.recipe, time.perf_counter()
    cfg: Any = recipe.prune
    texts = given_and_own(context, cfg.calibration, options.prompts)
    batches, twin = texts["kl"], context.dense()
    print(f"loaded in {time.perf_counter() - started:.1f} s", flush=True)
    searches = searched(twin, cfg, texts) if options.searches else []
    names = [name for name in SCORES if name in ("kl", *options.scores)]
    chosen, known = choices(twin, cfg, batches, names)
    found = [(one["blocks"], f"{one['search']} by {one['text']} ({one['score']:.3f})") for one in searches]
    first = [*found, *((blocks, "named") for blocks in options.sets), *((what, name) for name, what in chosen.items())]
    sets = drawn(len(blocks_of(twin.model)), cfg.count, options.random, recipe.seed)
    plans = in_turns(0 if options.sets_only else len(blocks_of(twin.model)), first, sets)
    score_all(twin, plans, known, batches, names)
    for name in [name for name in texts if name != "kl"]:
        score_on(twin, plans, name, texts[name])
    seconds = time.perf_counter() - started
    write_json(path, {"settings": settings, "seconds": seconds, "searches": searches, "plans": plans})
    print(f"{len(plans)} plans scored, {seconds:.1f} s", flush=True)
    return plans


def choices(
    twin: Twin, cfg: Depth, batches: list[LongTensor], names: list[str]
) -> tuple[dict[str, list[int]], dict[str, dict[tuple[int, ...], float]]]:
    """What each score chooses, and the scores of single blocks and of whole sets that were found on the way."""
    from recover.prune.depth.search import choose

    chosen, known = {}, {}
    for name in names:
        # The angular distance is that of a run of neighbours (arXiv 2403.17887): it chooses one.
        own = cfg.model_copy(update={"score": name, "contiguous": name == "angular", "iterative": None})
        choice = choose(twin, own, batches)
        chosen[name] = sorted({site.block for site in choice.sites})
        first = [record for record in choice.candidates if record["round"] == 1 and record["by"] == name]
        known[name] = {tuple(record["blocks"]): record["score"] for record in first}
    return chosen, known


def drawn(blocks: int, count: int, number: int, seed: int) -> list[list[int]]:
    """`number` different random sets of `count` blocks, block 0 left out; every second one is a run of neighbours."""
    source, found = random.Random(seed), []
    for attempt in range(100 * number):
        start = source.randrange(1, blocks - count + 1)
        apart = sorted(source.sample(range(1, blocks), count))
        blocks_found = list(range(start, start + count)) if attempt % 2 == 0 else apart
        if blocks_found not in found:
            found.append(blocks_found)
        if len(found) == number:
            break
    return found


def in_turns(blocks: int, first: list[tuple[list[int], str]], sets: list[list[int]]) -> list[Plan]:
    """Sets and single blocks by turns, singles spread over the depth: whatever a deadline leaves is a fair sample.

    `first` are sets and why, `sets` the random ones. With 0 blocks there are no single ones.
    """
    reasons: dict[tuple[int, ...], list[str]] = {}
    for what, why in [*first, *((what, "random") for what in sets)]:
        reasons.setdefault(tuple(what), []).append(why)
    several = [{"blocks": list(what), "group": "set", "why": why} for what, why in reasons.items() if len(what) > 1]
    order = [block for start in range(3) for block in range(1 + start, blocks, 3)]
    single = [{"blocks": [block], "group": "single", "why": ["single"]} for block in order]
    return [plan for pair in zip_longest(single, several) for plan in pair if plan is not None]


def score_all(
    twin: Twin,
    plans: list[Plan],
    known: dict[str, dict[tuple[int, ...], float]],
    batches: list[LongTensor],
    names: list[str],
) -> None:
    """Put the scores of these names into every plan."""
    from recover.models.site import sites_of
    from recover.prune.depth.scores import score_of

    for name in names:
        wanted = [tuple(plan["blocks"]) for plan in plans if name not in SUMMED]
        wanted += [(block,) for block in sorted({b for plan in plans for b in plan["blocks"]}) if name in SUMMED]
        missing = [blocks for blocks in wanted if blocks not in known[name]]
        if missing:
            spans = [tuple(sorted(sites_of(blocks))) for blocks in missing]
            values = score_of(twin, name, batches)(spans, frozenset(), f"{name} of {len(spans)} plans")
            known[name] |= dict(zip(missing, values, strict=True))
    for plan in plans:
        blocks = tuple(plan["blocks"])
        plan["scores"] = {
            name: sum(known[name][block,] for block in blocks) if name in SUMMED else known[name][blocks]
            for name in names
        }


# --- what is left of the model


def measure_all(
    context: RunContext, plans: list[Plan], settings: dict[str, Any], options: argparse.Namespace, deadline: float
) -> None:
    """Append a line for the dense model and for each plan that has none, until the deadline."""
    from recover.measure.tasks import measure

    path, done = options.out / "measured.jsonl", measured_so_far(options.out, settings)
    if not path.exists() or not read_jsonl(path):
        append_jsonl(path, {"settings": settings})
    waiting = [blocks for blocks in [[], *(plan["blocks"] for plan in plans)] if tuple(blocks) not in done]
    tasks = [task for task in context.tasks if task.kind in ("generate", "code", "choice")]
    for number, blocks in enumerate(waiting, 1):
        if time.monotonic() > deadline:
            print(f"the time is over: {len(waiting) - number + 1} plans left, the same command goes on", flush=True)
            return
        started, twin = time.perf_counter(), context.dense()
        with twin.closed(blocks):
            record, _ = measure(
                twin.model,
                context.tokenizer,
                tasks,
                context.recipe.measure,
                limit=options.items,
                seed=context.recipe.seed,
            )
        found = {use: record["headline"][use] for use in USES}
        seconds = time.perf_counter() - started
        append_jsonl(path, {"blocks": blocks, **found, "tasks": record["tasks"], "seconds": seconds})
        shown = ", ".join(f"{use} {'-' if value is None else format(value, '.1%')}" for use, value in found.items())
        print(f"{number}/{len(waiting)} {blocks or 'dense'}: {shown} ({seconds:.1f} s)", flush=True)


def measured_so_far(out: Path, settings: dict[str, Any]) -> dict[tuple[int, ...], dict[str, Any]]:
    """The lines that earlier calls wrote, by blocks; nothing closed is the dense model."""
    path = out / "measured.jsonl"
    lines = read_jsonl(path) if path.exists() else []
    if lines:
        _check_same(path, lines[0]["settings"], settings)
    return {tuple(line["blocks"]): line for line in lines[1:]}


def _check_same(path: Path, found: dict[str, Any], settings: dict[str, Any]) -> None:
    other = sorted(key for key in settings if found.get(key) != settings[key])
    if other:
        sys.exit(f"{path}: made with other {', '.join(other)}: give another --out, or delete the folder")


# --- together


def joined(plans: list[Plan], done: dict[tuple[int, ...], dict[str, Any]]) -> list[dict[str, Any]]:
    """Plans that were measured, with scores and figures; the dense model first."""
    dense = {"blocks": [], "group": "dense", "why": [], "scores": {}}
    rows = [dense, *plans]
    there = [row for row in rows if tuple(row["blocks"]) in done]
    return [row | {use: done[tuple(row["blocks"])][use] for use in USES} for row in there]


if __name__ == "__main__":
    main()
