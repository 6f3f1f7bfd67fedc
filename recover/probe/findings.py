"""What the probe finds in one batch, kept on disk, and the records that all batches together make.

Findings lie on disk batch by batch (`Store`): a probe that was stopped goes on with the batches that are still to do. A
batch does not depend on how many processes there are, so another number of them may go on.

Shapes: N scored positions of the dense trajectory, M of the pruned view's own, K scored in both.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recover.base import console, dist
from recover.base.artifacts import read_json, write_bytes, write_json
from recover.base.errors import ArtifactError
from recover.maths.divergence import quantiles, ratio
from recover.models.site import Site
from recover.probe.compare import Rows, Table
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
    Sublayer,
)
from recover.probe.views import Pair

PREDICTED = ("embedding", "logit", "probability", "kl")
STEP_METRICS = ("kl", "kl_predicted", "reverse_kl", "embedding", "logit", "probability", "top1")
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
    """All figures of one batch, one value a position: what processes exchange. A given text has no `free` part."""

    rows: Rows
    final: dict[float, Table]
    blocks: dict[tuple[int, str], Table]
    sublayers: dict[tuple[Site, str, str], Table]
    free: Free | None = None
    sampled: dict[int, Free] = dataclasses.field(default_factory=dict)
    identity: dict[str, dict[str, float]] | None = None


def records_of(pair: Pair, findings: list[Finding]) -> list[Record]:
    """All batches put together, in the order final, block, sublayer, step, divergence, sampled, identity."""
    prompts = prompts_of([finding.rows for finding in findings])
    final = {t: join([finding.final[t] for finding in findings]) for t in findings[0].final}
    blocks = {key: join([finding.blocks[key] for finding in findings]) for key in findings[0].blocks}
    sublayers = {key: join([finding.sublayers[key] for finding in findings]) for key in findings[0].sublayers}
    records: list[Record] = [final_record(t, table, prompts) for t, table in final.items()]
    for (number, lens), table in blocks.items():
        records.append(Block(number, number in pair.closed, lens, **_quantiles(table, tuple(table))))
    for (site, what, lens), table in sublayers.items():
        records.append(Sublayer(site.block, site.part, what, lens, **_quantiles(table, tuple(table))))
    free = [finding.free for finding in findings if finding.free is not None]
    if free:
        records += [*_steps(final, findings, _all(free)), _divergence(_all(free).first)]
    for seed in findings[0].sampled:
        records.append(_sampled(seed, _all([finding.sampled[seed] for finding in findings])))
    identities = [finding.identity for finding in findings if finding.identity is not None]
    return [*records, _identity(identities)] if identities else records


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


def _steps(final: dict[float, Table], findings: list[Finding], free: Free) -> list[Step]:
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


def _sampled(seed: int, free: Free) -> Sampled:
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
    )
