"""Where and when a pruned view leaves the dense one: at the last layer, block by block, step by step, and on its own.

Both views are run along the dense model's greedy trajectory (teacher-forced: the direct error of pruning), then along
the pruned view's own (free-running: what compounds through the context). What is measured: docs/theory.md.

Shapes: B batch, S decoding steps, N scored positions, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from recover import console, dist, recipe
from recover.measure.collapse import first_divergence
from recover.models.twin import Twin
from recover.probe.compare import Comparison, Rows, Table
from recover.probe.records import Block, Divergence, Final, Identity, Record, Step, summary
from recover.probe.spaces import quantiles, ratio
from recover.probe.trajectory import Batch, Trajectory, along, batches_of, encode, end_tokens, greedy
from recover.probe.views import Pair

__all__ = ["dense_trajectories", "final_drift", "probe", "summary"]

RATIOS = ("embedding", "logit", "probability", "kl")
STEP_METRICS = ("kl", "kl_predicted", "reverse_kl", "embedding", "logit", "probability", "top1")
STEP_METRICS_OF_T = ("kl", "kl_predicted", "probability")

Prompts = list[str] | list[list[int]]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Free:
    """One batch on the pruned view's own trajectory, whose scored positions are M; K are those scored in both."""

    step_M: Tensor
    kl_M: Tensor
    step_K: Tensor
    total_K: Tensor
    direct_K: Tensor
    first: list[int | None]


@dataclasses.dataclass(frozen=True)
class Finding:
    """All figures of one batch, one value a scored position: what processes exchange."""

    rows: Rows
    final: dict[float, Table]
    blocks: dict[tuple[int, str], Table]
    free: Free
    identity: dict[str, dict[str, float]]


def probe(twin: Twin | Pair, tokenizer: Any, prompts: Prompts, leaf: recipe.Probe) -> list[Record]:
    """Every record of the probe, equal on every process and for any number of them.

    The first `leaf.samples` prompts are used, in batches that do not depend on the number of processes. T = 1 is always
    among the temperatures.

    Raises:
        DataError: no prompts, a prompt without tokens, or one too long for the model.
        ModelError: logits that are not finite, naming the prompt; two views of different vocabularies.
    """
    pair = Pair.of(twin)
    comparison, temperatures = Comparison(pair), sorted({*leaf.temperatures, 1.0})
    ends = end_tokens(pair.dense, tokenizer)

    def examine(batch: Batch) -> Finding:
        dense = greedy(pair.dense, batch, steps=leaf.steps, ends=ends)
        own = greedy(pair.pruned, batch, steps=leaf.steps, ends=ends)
        return _examine(comparison, dense, own, temperatures)

    batches = _batches(pair, tokenizer, prompts, leaf)
    return _records(pair, dist.gather(_work(batches, examine, "probe")))


def dense_trajectories(twin: Twin | Pair, tokenizer: Any, prompts: Prompts, leaf: recipe.Probe) -> list[Trajectory]:
    """This process's share of the dense view's trajectories: for `final_drift`, as the dense model does not change."""
    pair = Pair.of(twin)
    ends = end_tokens(pair.dense, tokenizer)
    batches = _batches(pair, tokenizer, prompts, leaf)
    return _work(batches, lambda batch: greedy(pair.dense, batch, steps=leaf.steps, ends=ends), "dense trajectories")


def final_drift(
    twin: Twin | Pair,
    tokenizer: Any,
    prompts: Prompts,
    leaf: recipe.Probe,
    *,
    trajectories: list[Trajectory] | None = None,
) -> dict[str, Any]:
    """The `Final` record at T = 1 as a dict, equal to that of `probe` at a part of its cost; raises as `probe` does.

    Give the `dense_trajectories` of the same arguments to save the decoding too.
    """
    pair = Pair.of(twin)
    comparison = Comparison(pair)
    mine = dense_trajectories(pair, tokenizer, prompts, leaf) if trajectories is None else trajectories

    def examine(trajectory: Trajectory) -> tuple[Rows, Table]:
        rows = _rows(trajectory)
        dense, pruned = (along(view, trajectory, with_blocks=False) for view in (pair.dense, pair.pruned))
        return rows, comparison.final(dense.final_ND, pruned.final_ND, rows, [1.0])[1.0]

    findings = dist.gather(dist.everywhere(lambda: [examine(trajectory) for trajectory in mine]))
    table = _join([table for _, table in findings])
    return _final(1.0, table, _prompts([rows for rows, _ in findings])).to_json()


def _batches(pair: Pair, tokenizer: Any, prompts: Prompts, leaf: recipe.Probe) -> list[Batch]:
    ids = encode(tokenizer, prompts[: leaf.samples])
    return batches_of(ids, pair.dense, size=leaf.batch_size, steps=leaf.steps)


def _work(items: list[Item], function: Callable[[Item], Result], description: str) -> list[Result]:
    """This process's share of the results; a failure on one process is raised on all."""
    mine = dist.shard(items)
    return dist.everywhere(lambda: [function(item) for item in console.track(mine, description, unit="batch")])


def _rows(trajectory: Trajectory) -> Rows:
    at = trajectory.scored_BS.cpu().nonzero()
    return Rows(torch.tensor(trajectory.batch.prompts)[at[:, 0]], at[:, 1])


def _examine(comparison: Comparison, dense: Trajectory, own: Trajectory, temperatures: list[float]) -> Finding:
    """Four full forwards: each view along each trajectory, `dense` and the pruned view's `own`."""
    pair, rows, own_rows = comparison.pair, _rows(dense), _rows(own)
    dense_states, pruned_states = along(pair.dense, dense), along(pair.pruned, dense)
    final = comparison.final(dense_states.final_ND, pruned_states.final_ND, rows, temperatures)
    blocks = comparison.blocks(dense_states, pruned_states, rows)
    own_dense_ND = along(pair.dense, own, with_blocks=False).final_ND
    own_ND = along(pair.pruned, own, with_blocks=False).final_ND
    kl_M = comparison.kl(own_dense_ND, own_ND, own_rows)
    in_both, in_own = _common(dense.scored_BS, own.scored_BS)
    common = rows[in_both.cpu()]
    total_K = comparison.kl(dense_states.final_ND[in_both], own_ND[in_own], common)
    first = [first_divergence(a, b) for a, b in zip(dense.tokens(), own.tokens(), strict=True)]
    free = Free(own_rows.step_N, kl_M, common.step_N, total_K, final[1.0]["kl"][in_both.cpu()], first)
    identity = {
        "dense": comparison.self_drift("dense", dense_states.final_ND, dense.cached_ND, rows),
        "pruned": comparison.self_drift("pruned", own_ND, own.cached_ND, own_rows),
    }
    return Finding(rows, final, blocks, free, identity)


def _common(first_BS: Tensor, second_BS: Tensor) -> tuple[Tensor, Tensor]:
    """For each trajectory, which of its scored positions are scored in both (trajectories may differ in length)."""
    steps = min(first_BS.shape[1], second_BS.shape[1])
    both_BS = torch.zeros_like(first_BS), torch.zeros_like(second_BS)
    for mark_BS in both_BS:
        mark_BS[:, :steps] = first_BS[:, :steps] & second_BS[:, :steps]
    return both_BS[0][first_BS], both_BS[1][second_BS]


def _records(pair: Pair, findings: list[Finding]) -> list[Record]:
    """All batches put together, in the order final, block, step, divergence, identity."""
    prompts = _prompts([finding.rows for finding in findings])
    final = {t: _join([finding.final[t] for finding in findings]) for t in findings[0].final}
    blocks = {key: _join([finding.blocks[key] for finding in findings]) for key in findings[0].blocks}
    return [
        *(_final(t, table, prompts) for t, table in final.items()),
        *(
            Block(number, number in pair.closed, lens, **_quantiles(table, tuple(table)))
            for (number, lens), table in blocks.items()
        ),
        *_steps(final, findings),
        _divergence([first for finding in findings for first in finding.free.first]),
        _identity([finding.identity for finding in findings]),
    ]


def _join(tables: list[Table]) -> Table:
    return {name: torch.cat([table[name] for table in tables]) for name in tables[0]}


def _prompts(rows: list[Rows]) -> int:
    return len(torch.cat([part.prompt_N for part in rows]).unique())


def _quantiles(table: Table, names: tuple[str, ...], keep_N: Tensor | None = None) -> dict[str, Any]:
    return {name: quantiles(table[name] if keep_N is None else table[name][keep_N]) for name in names}


def _final(temperature: float, table: Table, prompts: int) -> Final:
    metrics = _quantiles(table, tuple(table))
    metrics |= {f"{name}_ratio": quantiles(ratio(table[f"{name}_predicted"], table[name])) for name in RATIOS}
    return Final(temperature, prompts, len(table["kl"]), metrics)


def _steps(final: dict[float, Table], findings: list[Finding]) -> list[Step]:
    step_N = torch.cat([finding.rows.step_N for finding in findings])
    free = [finding.free for finding in findings]
    step_M, kl_M = torch.cat([part.step_M for part in free]), torch.cat([part.kl_M for part in free])
    step_K, total_K = torch.cat([part.step_K for part in free]), torch.cat([part.total_K for part in free])
    gap_K = total_K - torch.cat([part.direct_K for part in free])
    first = [place for part in free for place in part.first]
    steps = []
    for step in range(int(max(step_N.max(), step_M.max())) + 1):
        here_N, here_M, here_K = step_N == step, step_M == step, step_K == step
        forced = _quantiles(final[1.0], STEP_METRICS, here_N) | {"n": int(here_N.sum())}
        running = {
            "kl": quantiles(kl_M[here_M]),
            "total": quantiles(total_K[here_K]),
            "gap": quantiles(gap_K[here_K]),
            "diverged": sum(place is not None and place <= step for place in first) / len(first),
            "n": int(here_M.sum()),
        }
        others = {str(t): _quantiles(table, STEP_METRICS_OF_T, here_N) for t, table in final.items() if t != 1.0}
        steps.append(Step(step, forced, running, others))
    return steps


def _divergence(first: list[int | None]) -> Divergence:
    places = [place for place in first if place is not None]
    never = first.count(None) / len(first)
    return Divergence(len(first), quantiles(torch.tensor(places, dtype=torch.float64)), never, first)


def _identity(batches: list[dict[str, dict[str, float]]]) -> Identity:
    dense, pruned = (
        {name: max(batch[view][name] for batch in batches) for name in ("kl", "embedding")}
        for view in ("dense", "pruned")
    )
    return Identity(max(dense["kl"], pruned["kl"]), max(dense["embedding"], pruned["embedding"]), dense, pruned)
