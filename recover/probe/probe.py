"""Where and when a pruned view leaves the dense one: at the last layer, block by block, step by step, and on its own.

Both views are run along the dense model's trajectory (teacher-forced: the direct error of pruning), then along the
pruned view's own (free-running: what compounds through the context). What is measured: docs/theory.md.

What is found in one batch lies on disk (`Store`): a probe that was stopped goes on with the batches that are still to
do. A batch does not depend on how many processes there are, so another number of them may go on. All batches together
make the records.

Shapes: B batch, S decoding steps, N scored positions of the dense trajectory, M of the pruned view's own, K scored in
both, D width.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from recover.base import console, dist
from recover.base.artifacts import read_json, write_bytes, write_json
from recover.base.clock import part
from recover.base.errors import ArtifactError, DataError
from recover.config import recipe
from recover.maths.divergence import quantiles, ratio
from recover.maths.repeats import first_divergence
from recover.models.site import Site
from recover.models.twin import Twin
from recover.probe.compare import Comparison, Rows, Table
from recover.probe.records import (
    Block,
    Divergence,
    Figures,
    Final,
    Identity,
    Quantiles,
    Record,
    Sampled,
    SampledStep,
    Step,
    Stretch,
    Sublayer,
)
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
from recover.probe.views import FINAL_NORM, Pair, States
from recover.report.run_files import EpochDrift

PREDICTED = ("embedding", "logit", "probability", "kl")
STEP_METRICS = ("kl", "kl_predicted", "reverse_kl", "embedding", "logit", "probability", "top1")
STRETCHES = 12  # of decoding steps, in which the drift of a block is told apart
STEP_METRICS_OF_T = ("kl", "kl_predicted", "probability")


@dataclasses.dataclass(frozen=True)
class Free:
    """Both views' own texts from the prompts of a batch: KL along each, and across both; `first` differing tokens."""

    step_N: Tensor
    direct_N: Tensor
    step_M: Tensor
    kl_M: Tensor
    step_K: Tensor
    total_K: Tensor
    direct_K: Tensor
    first: list[int | None]


@dataclasses.dataclass(frozen=True)
class Finding:
    """All figures of one batch, one value a position: what processes exchange. A given text has no `free` part.

    `layers`: the positions of `blocks` and `sublayers`, fewer than `rows`.
    """

    rows: Rows
    final: dict[float, Table]
    blocks: dict[tuple[int, str], Table]
    sublayers: dict[tuple[Site, str, str], Table]
    free: Free | None = None
    sampled: dict[int, Free] = dataclasses.field(default_factory=dict)
    identity: dict[str, dict[str, float]] | None = None
    layers: Rows | None = None


def records_of(pair: Pair, findings: list[Finding]) -> list[Record]:
    """All batches put together, in the order final, block, sublayer, step, divergence, sampled, identity."""
    prompts = prompts_of([finding.rows for finding in findings])
    final = {t: join([finding.final[t] for finding in findings]) for t in findings[0].final}
    blocks = {key: join([finding.blocks[key] for finding in findings]) for key in findings[0].blocks}
    sublayers = {key: join([finding.sublayers[key] for finding in findings]) for key in findings[0].sublayers}
    records: list[Record] = [final_record(t, table, prompts) for t, table in final.items()]
    layers = [finding.layers.step_N for finding in findings if finding.layers is not None]
    step_N = torch.cat(layers) if layers else torch.empty(0)
    for (number, lens), table in blocks.items():
        by_step = _stretches(table["kl"], step_N) if lens == FINAL_NORM and len(step_N) else []
        records.append(Block(number, number in pair.closed, lens, **_quantiles(table, tuple(table)), by_step=by_step))
    for (site, what, lens), table in sublayers.items():
        records.append(Sublayer(site.block, site.part, what, lens, **_quantiles(table, tuple(table))))
    free = [finding.free for finding in findings if finding.free is not None]
    if free:
        records += [*_step_records(final, findings, _all(free)), _divergence(_all(free).first)]
    for seed in findings[0].sampled:
        records.append(_sampled_records(seed, _all([finding.sampled[seed] for finding in findings])))
    identities = [finding.identity for finding in findings if finding.identity is not None]
    return [*records, _identity(identities)] if identities else records


def _stretches(kl_N: Tensor, step_N: Tensor) -> list[Stretch]:
    """At most STRETCHES stretches of equally many steps, those that hold any position."""
    size = max(1, math.ceil((int(step_N.max()) + 1) / STRETCHES))
    places = [(first, (step_N >= first) & (step_N < first + size)) for first in range(0, int(step_N.max()) + 1, size)]
    return [Stretch(step=first, kl=float(kl_N[here].mean()), n=int(here.sum())) for first, here in places if here.any()]


def final_record(temperature: float, table: Table, prompts: int) -> Final:
    """Quantiles of every metric, and of each prediction's error and ratio."""
    metrics = _quantiles(table, tuple(table))
    for name in PREDICTED:
        if name in table:
            predicted_N, exact_N = table[f"{name}_predicted"], table[name]
            metrics[f"{name}_error"] = quantiles(predicted_N - exact_N)
            metrics[f"{name}_ratio"] = quantiles(ratio(predicted_N, exact_N))
    return Final(temperature, prompts, len(table["kl"]), metrics)


def join(tables: list[Table]) -> Table:
    """The rows of all tables, in order."""
    return {name: torch.cat([table[name] for table in tables]) for name in tables[0]}


def prompts_of(rows: Iterable[Rows]) -> int:
    """How many different prompts there are."""
    return len(torch.cat([part.prompt_N for part in rows]).unique())


def positions_of(findings: list[Finding]) -> dict[str, list[float]]:
    """Columns with one value a scored position: prompt, step, every metric at T = 1, and `NAME@T` at others."""
    rows = [finding.rows for finding in findings]
    columns = {"prompt": torch.cat([r.prompt_N for r in rows]).tolist()}
    columns["step"] = torch.cat([r.step_N for r in rows]).tolist()
    tables = {t: join([finding.final[t] for finding in findings]) for t in findings[0].final}
    columns |= {name: value.tolist() for name, value in tables[1.0].items()}
    for t, table in tables.items():
        for name, value in table.items():
            if t != 1.0 and value is not tables[1.0][name] and not torch.equal(value, tables[1.0][name]):
                columns[f"{name}@{t}"] = value.tolist()
    return columns


def _quantiles(table: Table, names: Iterable[str], keep_N: Tensor | slice = slice(None)) -> dict[str, Quantiles]:
    return {name: quantiles(table[name][keep_N]) for name in names if name in table}


def _all(parts: list[Free]) -> Free:
    names = [field.name for field in dataclasses.fields(Free) if field.name != "first"]
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return Free(**joined, first=[place for part in parts for place in part.first])


def _step_records(final: dict[float, Table], findings: list[Finding], free: Free) -> list[Step]:
    step_N = torch.cat([finding.rows.step_N for finding in findings])
    steps = []
    for step in range(_length(free)):
        here_N = step_N == step
        forced: Figures = {**_quantiles(final[1.0], STEP_METRICS, here_N), "n": int(here_N.sum())}
        others = {str(t): _quantiles(table, STEP_METRICS_OF_T, here_N) for t, table in final.items() if t != 1.0}
        steps.append(Step(step, forced, _running(free, step), others))
    return steps


def _length(free: Free) -> int:
    return int(max(free.step_N.max(), free.step_M.max())) + 1


def _running(free: Free, step: int) -> Figures:
    here_M, here_K = free.step_M == step, free.step_K == step
    return {
        "kl": quantiles(free.kl_M[here_M]),
        "total": quantiles(free.total_K[here_K]),
        "gap": quantiles((free.total_K - free.direct_K)[here_K]),
        "diverged": sum(place is not None and place <= step for place in free.first) / len(free.first),
        "n": int(here_M.sum()),
    }


def _sampled_records(seed: int, free: Free) -> Sampled:
    place = _divergence(free.first)
    whole = {"kl": free.kl_M, "total": free.total_K, "gap": free.total_K - free.direct_K}
    steps: list[SampledStep] = [
        {
            "step": step,
            "teacher_forced": {"kl": quantiles(free.direct_N[free.step_N == step])},
            "free_running": _running(free, step),
        }
        for step in range(_length(free))
    ]
    running: Figures = {name: quantiles(value) for name, value in whole.items()}
    direct: Figures = {"kl": quantiles(free.direct_N)}
    return Sampled(seed, len(free.first), direct, running, place.first, place.never, steps)


def _divergence(first: list[int | None]) -> Divergence:
    places = [place for place in first if place is not None]
    never = first.count(None) / len(first)
    return Divergence(len(first), quantiles(places), never, first)


def _identity(batches: list[dict[str, dict[str, float]]]) -> Identity:
    dense, pruned = (
        {name: max(batch[view][name] for batch in batches) for name in ("kl", "embedding")}
        for view in ("dense", "pruned")
    )
    return Identity(max(dense["kl"], pruned["kl"]), max(dense["embedding"], pruned["embedding"]), dense, pruned)


KEY = "key.json"


class Store:
    """Findings by the number of their batch, in a folder that belongs to one probe: `key` says which.

    What another key wrote is deleted, with a word about it; a file that cannot be read is a batch still to do. All
    processes make the store together.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder = folder
        dist.on_main(lambda: _claim(folder, key))

    def get(self, number: int) -> Finding | None:
        """The finding of this batch, equal to the last bit to what was put, or None."""
        path = self._path(number)
        if not path.is_file():
            return None
        try:
            return _finding(torch.load(io.BytesIO(path.read_bytes()), weights_only=True))
        except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError) as error:
            console.warn(f"{path}: cannot be read ({type(error).__name__}); this batch is done again")
            return None

    def put(self, number: int, finding: Finding) -> None:
        """Keep it, whole or not at all."""
        buffer = io.BytesIO()
        torch.save(_plain(finding), buffer)
        write_bytes(self._path(number), buffer.getvalue())

    def _path(self, number: int) -> Path:
        return self.folder / f"batch-{number:05d}.pt"


def _claim(folder: Path, key: dict[str, Any]) -> None:
    path = folder / KEY
    try:
        found = read_json(path) if path.is_file() else None
    except ArtifactError:
        found = None
    if found == key:
        return
    old = sorted(path for path in folder.glob("batch-*.pt") if re.fullmatch(r"batch-\d+", path.stem))
    for batch in old:
        batch.unlink()
    if old:
        changed = sorted(name for name in key if not isinstance(found, dict) or found.get(name) != key[name])
        console.warn(f"{folder}: {len(old)} batches are of another probe ({', '.join(changed)} changed); done again")
    write_json(path, key)


def _plain(finding: Finding) -> dict[str, Any]:
    """Only what `torch.load` reads without running code."""
    return {
        "rows": vars(finding.rows),
        "final": finding.final,
        "blocks": finding.blocks,
        "sublayers": {(*site, what, lens): table for (site, what, lens), table in finding.sublayers.items()},
        "free": None if finding.free is None else vars(finding.free),
        "sampled": {seed: vars(free) for seed, free in finding.sampled.items()},
        "identity": finding.identity,
        "layers": None if finding.layers is None else vars(finding.layers),
    }


def _finding(value: dict[str, Any]) -> Finding:
    return Finding(
        Rows(**value["rows"]),
        value["final"],
        value["blocks"],
        {(Site(block, part), what, lens): table for (block, part, what, lens), table in value["sublayers"].items()},
        None if value["free"] is None else Free(**value["free"]),
        {seed: Free(**free) for seed, free in value["sampled"].items()},
        value["identity"],
        None if value["layers"] is None else Rows(**value["layers"]),
    )


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

    return dist.everywhere(lambda: [do(*numbered) for numbered in console.track(mine, description, unit="batches")])


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
    return Finding(forced.rows, forced.final, forced.blocks, forced.sublayers, free, drawn, identity, forced.layers)


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
    return Finding(rows, final, blocks, sublayers, layers=layer_rows), dense, pruned


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
