"""What one run says, as one row: figures of dense, pruned and recovered, and of each epoch; and tables of such rows."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recover.base.artifacts import loads
from recover.config.tasks import KINDS
from recover.maths.repeats import loop_start
from recover.run.directory import RunDirectory

Row = dict[str, Any]
VIEWS = {"dense": "dense", "pruned": "before", "recovered": "after"}
SHAPE = ("ended", "length", "repetition", "truncated", "accuracy_normalised")


def read_row(run: Path) -> Row:
    """The figures of a run folder, as far as it got."""
    row: Row = {view: found for view, part in VIEWS.items() if (found := view_of(run / part))}
    plan = _json(run / "prune" / "plan.json")
    if plan:
        row["plan"] = _plan(plan)
    row["epochs"] = [_epoch(record) for record in _lines(run / "epochs.jsonl")]
    best = _json(RunDirectory(run).train / "best.json")
    if best:
        row["kept_epoch"] = best.get("epoch")
    if row["epochs"]:
        row["tokens"] = row["epochs"][-1]["tokens"]
        row["training_seconds"] = row["epochs"][-1]["seconds"]
    return row


def _plan(plan: Row) -> Row:
    """What went, and the shares of the dense model's parameters that are left and that are not zero."""
    gone = {name: plan[name] for name in ("dropped", "dropped_attention", "dropped_mlp") if plan.get(name)}
    repair = {name: plan["repair"][name] for name in ("kind", "kept", "kl_before", "kl_after") if plan.get("repair")}
    return {
        "kind": plan["kind"],
        **gone,
        **({"repair": repair} if repair else {}),
        "parameters": plan["parameters_pruned"] / plan["parameters_dense"],
        "nonzero": plan["nonzero"] / plan["parameters_dense"],
    }


def view_of(folder: Path) -> Row | None:
    """Tasks, headline, loops and drift of one view; None if it was not measured."""
    measured = _json(folder / "measure.json")
    if not measured:
        return None
    texts = _json(folder / "generations.json") or {}
    view: Row = {**measured["headline"], "tasks": {name: _task(task) for name, task in measured["tasks"].items()}}
    for name, written in texts.items():
        view["tasks"][name]["loops"] = statistics.mean(loop_start(text["ids"]) is not None for text in written)
    looping = [task["loops"] for task in view["tasks"].values() if "loops" in task]
    view["loops"] = statistics.mean(looping) if looping else None
    probe = _json(folder / "probe.json")
    return view | (_drift(probe.get("final")) if probe else {})


def _task(task: Row) -> Row:
    found = {"value": task[KINDS[task["kind"]].main.key], "items": task["items"]}
    if "interval95" in task:
        found["interval95"] = task["interval95"]
    return found | {name: task[name] for name in SHAPE if name in task}


def _epoch(record: Row) -> Row:
    measured = record["measure"]
    return {
        **{name: record[name] for name in ("epoch", "step", "tokens", "seconds", "score")},
        "train": record.get("train"),
        **measured["headline"],
        "tasks": {name: _task(task) for name, task in measured["tasks"].items()},
        **_drift(record.get("drift")),
    }


def _drift(final: Row | None) -> Row:
    """KL(dense || pruned) and the share of equal top tokens along the dense model's own texts."""
    if not final:
        return {}
    return {"kl": {name: final["kl"][name] for name in ("mean", "p50", "p90", "p99")}, "top1": final["top1"]["mean"]}


def _json(path: Path) -> Any:
    return loads(path.read_bytes()) if path.exists() else None


def _lines(path: Path) -> list[Row]:
    """The whole lines; a last one may be torn while the run goes on."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def markdown(rows: Sequence[Row]) -> str:
    """Dense once, then pruned and recovered of each variant; mean over seeds, and how far seeds are apart."""
    names = _task_names(rows)
    heads = ["", "seeds", "tokens", "seconds", *names, "kept", "loops", "KL", "KL p99", "top-1"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        for view in VIEWS:
            if view in row:
                groups.setdefault((_title(row, view), view), []).append(row)
    order = sorted(groups, key=lambda key: list(VIEWS).index(key[1]) if key[1] != "recovered" else 1)
    for title, view in order:
        lines.append(f"| {' | '.join(_cells(title, view, groups[title, view], names))} |")
    return "\n".join(lines) + "\n"


def _title(row: Row, view: str) -> str:
    if view == "dense":
        return "dense"
    return row["variant"] if view == "recovered" else f"{row['pruning'] or 'base'}, pruned"


def _task_names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.get("dense", {}).get("tasks", {})))


def _cells(title: str, view: str, rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    trained = view == "recovered"
    cells = [title, str(len({row["seed"] for row in rows}))]
    cells += [_mean([row.get(name) for row in rows], ",.0f") if trained else "" for name in ("tokens", "seconds")]
    for name in names:
        values = [row[view]["tasks"].get(name, {}).get("value") for row in rows]
        cells.append(_mean(values, ".2f" if max(filter(None, values), default=0) > 1 else ".1%"))
    cells.append("" if view == "dense" else _mean([kept(row, view) for row in rows], ".1%"))
    cells.append(_mean([row[view].get("loops") for row in rows], ".1%"))
    drifts = [row[view].get("kl") or {} for row in rows]
    cells += [_mean([drift.get(name) for drift in drifts], ".3f") for name in ("mean", "p99")]
    return [*cells, _mean([row[view].get("top1") for row in rows], ".1%")]


def kept(row: Row, view: str) -> float | None:
    """Generation over dense generation of the same run."""
    dense, found = row.get("dense", {}).get("generation"), row[view].get("generation")
    return found / dense if dense and found is not None else None


def _mean(values: Sequence[float | None], form: str) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return ""
    middle = format(statistics.mean(found), form)
    return middle if len(set(found)) < 2 else f"{middle} ± {format(statistics.stdev(found), form)}"
