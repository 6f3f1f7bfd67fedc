"""Where and when a pruned view leaves the dense one: at the last layer, block by block, step by step, and on its own.

Both views are run along the dense model's trajectory (teacher-forced: the direct error of pruning), then along the
pruned view's own (free-running: what compounds through the context). What is measured: docs/theory.md.

Shapes: B batch, S decoding steps, N scored positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from recover.base import console, dist
from recover.base.clock import part
from recover.base.errors import DataError
from recover.config import recipe
from recover.maths.collapse import first_divergence
from recover.models.twin import Twin
from recover.probe.compare import Comparison, Rows, Table
from recover.probe.findings import Finding, Free, Store, final_record, join, positions_of, prompts_of, records_of
from recover.probe.records import Record, summary
from recover.probe.sublayers import transitions
from recover.probe.trajectory import (
    Batch,
    Trajectory,
    along,
    batches_of,
    check_ids,
    encode,
    end_tokens,
    given,
    greedy,
    sampled,
    thinned,
)
from recover.probe.views import Pair, States
from recover.report.data import EpochDrift

__all__ = ["dense_trajectories", "final_drift", "findings", "positions_of", "probe", "records_of", "summary", "texts"]

Prompts = list[str] | list[list[int]]
Item = TypeVar("Item")
Result = TypeVar("Result")


@part("probing")
def probe(twin: Twin | Pair, tokenizer: Any, prompts: Prompts, cfg: recipe.Probe) -> list[Record]:
    """Every record of the probe, equal on every process and for any number of them.

    The first `cfg.samples` prompts are used, in batches that do not depend on the number of processes. T = 1 is always
    among the temperatures.

    Raises:
        DataError: no prompts, a prompt without tokens, or one too long for either model.
        ModelError: logits that are not finite, naming the prompt; two views of different vocabularies.
    """
    return records_of(Pair.of(twin), findings(twin, tokenizer, prompts, cfg))


def findings(
    twin: Twin | Pair, tokenizer: Any, prompts: Prompts, cfg: recipe.Probe, *, store: Store | None = None
) -> list[Finding]:
    """The figures of every position behind the records of `probe`, batch by batch; raises as `probe` does.

    `store`: where batches are kept as they are done, and found again.
    """
    pair = Pair.of(twin)
    comparison, ends = Comparison(pair), end_tokens(pair.dense, tokenizer)
    if not ends:
        console.warn(f"probe: neither model nor tokenizer names an end token: texts run on to {cfg.steps} tokens")

    def examine(batch: Batch) -> Finding:
        return _examine(comparison, batch, cfg, ends)

    return dist.gather(_work(_batches(pair, tokenizer, prompts, cfg), examine, "probe", store))


def texts(
    twin: Twin | Pair, ids: Sequence[list[int]], cfg: recipe.Probe, *, store: Store | None = None
) -> list[Finding]:
    """Teacher-forced figures along texts as they are given, in token ids: each token after the first is a position.

    Raises:
        DataError: no texts, one of less than two tokens, or too long for either model.
        ModelError: as `probe`.
    """
    pair = Pair.of(twin)
    comparison = Comparison(pair)
    short = [number for number, row in enumerate(ids) if len(row) < 2]
    if short or not ids:
        what = f"text {short[0]} has less than two tokens" if short else "no texts"
        raise DataError(f"probe: {what}: there is nothing to predict")
    for view in (pair.dense, pair.pruned):
        check_ids(list(ids), view, steps=0)
    device = next(pair.dense.model.parameters()).device
    starts = range(0, len(ids), cfg.batch_size)

    def examine(start: int) -> Finding:
        trajectory = given(list(ids[start : start + cfg.batch_size]), start, device)
        return _forced(comparison, trajectory, cfg)[0]

    return dist.gather(_work(list(starts), examine, "probe of texts", store))


@part("probing")
def dense_trajectories(twin: Twin | Pair, tokenizer: Any, prompts: Prompts, cfg: recipe.Probe) -> list[Trajectory]:
    """This process's share of the dense view's trajectories: for `final_drift`, as the dense model does not change."""
    pair = Pair.of(twin)
    ends = end_tokens(pair.dense, tokenizer)
    batches = _batches(pair, tokenizer, prompts, cfg)
    return _work(batches, lambda batch: greedy(pair.dense, batch, steps=cfg.steps, ends=ends), "dense trajectories")


@part("probing")
def final_drift(
    twin: Twin | Pair,
    tokenizer: Any,
    prompts: Prompts,
    cfg: recipe.Probe,
    *,
    trajectories: list[Trajectory] | None = None,
) -> EpochDrift:
    """The `Final` record at T = 1 as a dict, equal to that of `probe` at a part of its cost; raises as `probe` does.

    Beside it `each`: of each prompt the sum of KL over its positions, in nats, and how many these are.
    Give the `dense_trajectories` of the same arguments to save the decoding too.
    """
    pair = Pair.of(twin)
    comparison = Comparison(pair)
    mine = dense_trajectories(pair, tokenizer, prompts, cfg) if trajectories is None else trajectories

    def examine(trajectory: Trajectory) -> tuple[Rows, Table]:
        rows = _rows(trajectory, trajectory.scored_BS)
        dense, pruned = (along(view, trajectory) for view in (pair.dense, pair.pruned))
        return rows, comparison.final(dense.final_ND, pruned.final_ND, rows, [1.0])[1.0]

    found = dist.gather(dist.everywhere(lambda: [examine(trajectory) for trajectory in mine]))
    table = join([table for _, table in found])
    record = final_record(1.0, table, prompts_of([rows for rows, _ in found])).to_json()
    prompt_N = torch.cat([rows.prompt_N for rows, _ in found])
    each = [table["kl"][prompt_N == prompt] for prompt in prompt_N.unique()]
    sums = [[float(kl_K.double().sum()), len(kl_K)] for kl_K in each]
    return cast(EpochDrift, {**record, "each": sums})


def _batches(pair: Pair, tokenizer: Any, prompts: Prompts, cfg: recipe.Probe) -> list[Batch]:
    ids = encode(tokenizer, prompts[: cfg.samples])
    check_ids(ids, pair.pruned, steps=cfg.steps)
    return batches_of(ids, pair.dense, size=cfg.batch_size, steps=cfg.steps)


def _work(
    items: list[Item], function: Callable[[Item], Any], description: str, store: Store | None = None
) -> list[Any]:
    """This process's share of the results, kept in `store` if there is one; a failure on one is raised on all."""
    mine = dist.shard(list(enumerate(items)))

    def do(number: int, item: Item) -> Any:
        found = None if store is None else store.get(number)
        if found is None:
            found = function(item)
            if store is not None:
                store.put(number, found)
        return found

    return dist.everywhere(lambda: [do(*numbered) for numbered in console.track(mine, description, unit="batch")])


def _rows(trajectory: Trajectory, mark_BS: Tensor) -> Rows:
    at = mark_BS.cpu().nonzero()
    return Rows(torch.tensor(trajectory.batch.prompts)[at[:, 0]], at[:, 1])


def _examine(comparison: Comparison, batch: Batch, cfg: recipe.Probe, ends: list[int]) -> Finding:
    pair = comparison.pair
    dense, own = (greedy(view, batch, steps=cfg.steps, ends=ends) for view in (pair.dense, pair.pruned))
    forced, dense_states, _ = _forced(comparison, dense, cfg)
    free, own_states = _free(comparison, dense, own, dense_states, forced.final[1.0]["kl"])
    identity = {
        "dense": comparison.self_drift("dense", dense_states.final_ND, dense.cached_ND, forced.rows),
        "pruned": comparison.self_drift("pruned", own_states.final_ND, own.cached_ND, _rows(own, own.scored_BS)),
    }
    drawn = {seed: _drawn(comparison, batch, cfg, ends, seed) for seed in cfg.seeds}
    return Finding(forced.rows, forced.final, forced.blocks, forced.sublayers, free, drawn, identity)


def _forced(comparison: Comparison, trajectory: Trajectory, cfg: recipe.Probe) -> tuple[Finding, States, States]:
    """Both views along one trajectory: the figures, and each view's states."""
    pair, rows = comparison.pair, _rows(trajectory, trajectory.scored_BS)
    layers_BS = thinned(trajectory.scored_BS, cfg.layer_positions)
    layer_rows = _rows(trajectory, layers_BS)
    dense, pruned = (along(view, trajectory, blocks_BS=layers_BS) for view in (pair.dense, pair.pruned))
    final = comparison.final(dense.final_ND, pruned.final_ND, rows, sorted({*cfg.temperatures, 1.0}))
    blocks = comparison.blocks(dense, pruned, layer_rows)
    dense.blocks.clear()
    pruned.blocks.clear()
    sublayers = {}
    if cfg.sublayers and pair.one_width:
        sublayers = comparison.sublayers(transitions(pair, trajectory, layers_BS), layer_rows)
    return Finding(rows, final, blocks, sublayers), dense, pruned


def _free(
    comparison: Comparison, dense: Trajectory, own: Trajectory, dense_states: States, direct_N: Tensor
) -> tuple[Free, States]:
    """The pruned view on its own trajectory `own`, and its states there; `direct_N`: KL along the dense one."""
    pair, rows, own_rows = comparison.pair, _rows(dense, dense.scored_BS), _rows(own, own.scored_BS)
    own_states = along(pair.pruned, own)
    kl_M = comparison.kl(along(pair.dense, own).final_ND, own_states.final_ND, own_rows)
    in_both, in_own = _common(dense.scored_BS, own.scored_BS)
    common = rows[in_both.cpu()]
    total_K = comparison.kl(dense_states.final_ND[in_both], own_states.final_ND[in_own], common)
    first = [first_divergence(a, b) for a, b in zip(dense.tokens(), own.tokens(), strict=True)]
    direct_K = direct_N[in_both.cpu()]
    return Free(rows.step_N, direct_N, own_rows.step_N, kl_M, common.step_N, total_K, direct_K, first), own_states


def _drawn(comparison: Comparison, batch: Batch, cfg: recipe.Probe, ends: list[int], seed: int) -> Free:
    pair = comparison.pair
    dense, own = (sampled(view, batch, steps=cfg.steps, ends=ends, seed=seed) for view in (pair.dense, pair.pruned))
    states = along(pair.dense, dense)
    rows = _rows(dense, dense.scored_BS)
    direct_N = comparison.kl(states.final_ND, along(pair.pruned, dense).final_ND, rows)
    return _free(comparison, dense, own, states, direct_N)[0]


def _common(first_BS: Tensor, second_BS: Tensor) -> tuple[Tensor, Tensor]:
    """For each trajectory, which of its scored positions are scored in both (trajectories may differ in length)."""
    steps = min(first_BS.shape[1], second_BS.shape[1])
    both_BS = torch.zeros_like(first_BS), torch.zeros_like(second_BS)
    for mark_BS in both_BS:
        mark_BS[:, :steps] = first_BS[:, :steps] & second_BS[:, :steps]
    return both_BS[0][first_BS], both_BS[1][second_BS]
