"""Drift of one view from the dense one: along the dense model's texts, along its own, block by block, and in choices.

Shapes: B batch, S decoding steps, N scored positions, K positions scored in both texts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from recover.maths.divergence import quantiles
from recover.maths.repeats import first_divergence
from recover.models.twin import Twin
from recover.probe.compare import Comparison, Rows, Table
from recover.probe.tasks import Asked, choice_drift
from recover.probe.trajectory import Trajectory, along, batches_of, check_ids, encode, end_tokens, greedy, thinned
from recover.probe.views import FINAL_NORM, Pair
from recover.text.likelihood import option_rows

STEPPED = ("kl", "kl_predicted", "probability", "probability_predicted", "embedding", "logit", "top1")
POSITIONS = 2048  # of each batch, that enter the figures of blocks
BIG = 2**20  # more decoding steps than any text has


class Texts:
    """The dense model's greedy texts, written once and followed by every row."""

    def __init__(self, twin: Twin, tokenizer: Any, prompts: list[str], *, steps: int, batch_size: int) -> None:
        dense = Pair.of(twin).dense
        self.steps, self.ends = steps, end_tokens(dense, tokenizer)
        ids = encode(tokenizer, prompts)
        check_ids(ids, dense, steps=steps)
        batches = batches_of(ids, dense, size=batch_size, steps=steps)
        self.dense = [greedy(dense, batch, steps=steps, ends=self.ends) for batch in batches]


def follow(twin: Twin, texts: Texts, *, whole: bool) -> dict[str, Any]:
    """Teacher-forced figures of the last layer; with `whole` also by block, by step, and along the view's own texts.

    `steps.forced`: both views read the dense text (the direct error). `steps.own`: both read the pruned view's own.
    `steps.total`: each has read its own (direct and compounding error together), where both texts still run.
    """
    pair = Pair.of(twin)
    comparison = Comparison(pair)
    found = [_follow(comparison, trajectory, texts, whole=whole) for trajectory in texts.dense]
    forced = _joined(each["forced"] for each in found)
    record: dict[str, Any] = {
        "positions": len(forced["kl"]),
        "final": {name: quantiles(value) for name, value in forced.items() if name not in ("step", "prompt")},
    }
    if whole:
        names = [name for name in ("forced", "own", "total") if all(each[name] is not None for each in found)]
        record["steps"] = {name: _by_step(_joined(each[name] for each in found)) for name in names}
        record["blocks"] = _blocks([each["blocks"] for each in found])
        first = [place for each in found for place in each["first"]]
        parted = torch.tensor([place for place in first if place is not None], dtype=torch.float64)
        record["divergence"] = {"never": first.count(None) / len(first), "first": quantiles(parted)}
    return record


def _follow(comparison: Comparison, dense: Trajectory, texts: Texts, *, whole: bool) -> dict[str, Any]:
    pair, rows = comparison.pair, _rows(dense, dense.scored_BS)
    layers_BS = thinned(dense.scored_BS, POSITIONS) if whole else None
    states, others = (along(view, dense, blocks_BS=layers_BS) for view in (pair.dense, pair.pruned))
    found: dict[str, Any] = {"forced": _table(comparison, states.final_ND, others.final_ND, rows)}
    if layers_BS is None:
        return found
    found["blocks"] = comparison.blocks(states, others, _rows(dense, layers_BS))
    own = greedy(pair.pruned, dense.batch, steps=texts.steps, ends=texts.ends)
    own_rows = _rows(own, own.scored_BS)
    read_dense, read_own = (along(view, own).final_ND for view in (pair.dense, pair.pruned))
    found["own"] = _table(comparison, read_dense, read_own, own_rows)
    key_N, key_M = (each.prompt_N * BIG + each.step_N for each in (rows, own_rows))
    in_dense, in_own = torch.isin(key_N, key_M), torch.isin(key_M, key_N)
    device = read_own.device
    total = states.final_ND[in_dense.to(device)], read_own[in_own.to(device)]
    found["total"] = _table(comparison, *total, rows[in_dense])
    found["first"] = [first_divergence(a, b) for a, b in zip(dense.tokens(), own.tokens(), strict=True)]
    return found


def _rows(trajectory: Trajectory, mark_BS: Tensor) -> Rows:
    at = mark_BS.cpu().nonzero()
    return Rows(torch.tensor(trajectory.batch.prompts)[at[:, 0]], at[:, 1])


def _table(comparison: Comparison, h_dense_ND: Tensor, h_pruned_ND: Tensor, rows: Rows) -> Table:
    return comparison.final(h_dense_ND, h_pruned_ND, rows, [1.0])[1.0] | {"step": rows.step_N, "prompt": rows.prompt_N}


def _joined(tables: Iterable[Table]) -> Table:
    every = list(tables)
    return {name: torch.cat([table[name] for table in every]) for name in every[0]}


def _by_step(table: Table) -> dict[str, Any]:
    """Of each step: how many texts still run, and mean and median of each metric over them."""
    steps = [table["step"] == step for step in range(int(table["step"].max()) + 1)]
    steps = [here_N for here_N in steps if here_N.any()]
    found: dict[str, Any] = {"n": [int(here_N.sum()) for here_N in steps]}
    for name in STEPPED:
        values = [table[name][here_N] for here_N in steps]
        found[name] = {"mean": [x.mean().item() for x in values], "p50": [x.quantile(0.5).item() for x in values]}
    return found


def _blocks(found: list[dict[tuple[int, str], Table]]) -> list[dict[str, Any]]:
    """The lens with the final norm alone: it is the one that the model itself ends with."""
    numbers = [number for number, lens in found[0] if lens == FINAL_NORM]
    records = []
    for number in numbers:
        table = _joined(each[number, FINAL_NORM] for each in found)
        records.append({"block": number} | {name: quantiles(value) for name, value in table.items()})
    return records


def asked_of(tokenizer: Any, task: Any, limit: int | None) -> list[Asked]:
    """The items of a choice task, as `choice_drift` takes them."""
    found = []
    for item in task.items[:limit]:
        rows = option_rows(tokenizer, item.prompt, item.options, separator=task.file.separator, chat=task.file.wraps)
        found.append(Asked(tuple(tuple(row.ids) for row in rows), rows[0].start, item.label))
    return found


def choices(twin: Twin, asked: list[Asked], *, batch_size: int) -> dict[str, Any]:
    """Drift among the option tokens alone against drift over the vocabulary, at the same positions."""
    return choice_drift(twin, asked, batch_size=batch_size).to_json()
