"""Several runs side by side, best recovered generation first, and what must not be set side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recover.report import cuts, speeds, words
from recover.report.collect import collect

SAME = 0.02  # dense figures further apart than this were not measured alike
USES = ("generation", "choice", "retrieval")
MODELS = ("pruned", "recovered")


def compare(roots: Sequence[Path]) -> dict[str, Any]:
    """{"runs": one summary a run, "best": name or None, "comparable", "same_dense", "apart"}; JSON-able.

    `apart` says in words what must not be set side by side, and why. Runs that start from different dense models, or
    are measured by different rules, have no `best`. A run that is not finished is compared by what it has. Raises
    ArtifactError as `collect` does.
    """
    runs = [_run(collect(root)) for root in roots]
    _name_apart(runs, roots)
    runs.sort(key=lambda run: _order(run["kept"]["recovered"]["generation"], run["kept"]["pruned"]["generation"]))
    same_dense = len({run["model"] for run in runs}) <= 1
    comparable = same_dense and len({run["measure"] for run in runs}) <= 1
    measured = bool(runs) and runs[0]["kept"]["recovered"]["generation"] is not None
    return {
        "runs": runs,
        "best": runs[0]["name"] if measured and comparable else None,
        "same_dense": same_dense,
        "comparable": comparable,
        "apart": [
            line for line in (_dense_apart(runs), _rules_apart(runs), _level_apart(runs), _timed_apart(runs)) if line
        ],
    }


def _name_apart(runs: list[dict[str, Any]], roots: Sequence[Path]) -> None:
    """Runs of one name are told apart by their folders."""
    names = [run["name"] for run in runs]
    for run, root in zip(runs, roots, strict=True):
        if names.count(run["name"]) > 1:
            run["name"] = f"{run['name']} ({root.absolute().parent.name}/{root.absolute().name})"


def _groups(runs: list[dict[str, Any]], key: str) -> dict[str, list[str]]:
    """Value -> names of the runs that have it, where it is known."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if run[key]:
            found.setdefault(run[key], []).append(run["name"])
    return found


def _dense_apart(runs: list[dict[str, Any]]) -> str:
    groups = _groups(runs, "model")
    if len(groups) < 2:
        return ""
    who = "; ".join(f"{', '.join(names)}: {model}" for model, names in groups.items())
    return f"These runs start from different dense models ({who}). Their shares have different wholes: none is best."


def _rules_apart(runs: list[dict[str, Any]]) -> str:
    """Which fields of `measure` differ, and how."""
    groups = _groups(runs, "measure")
    if len(groups) < 2:
        return ""
    rules = [json.loads(rule) for rule in groups]
    differ = [
        key
        for key in dict.fromkeys(key for rule in rules for key in rule)
        if len({_one_text(rule.get(key)) for rule in rules}) > 1
    ]
    who = "; ".join(
        f"{', '.join(names)}: " + ", ".join(f"{key} {_shown(json.loads(rule).get(key))}" for key in differ)
        for rule, names in groups.items()
    )
    why = "Their shares answer different questions: none is best."
    return f"These runs were measured by different rules ({who}). {why}"


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        return " ".join(f"{key} {_shown(part)}" for key, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _level_apart(runs: list[dict[str, Any]]) -> str:
    """The dense model should score the same wherever it is measured by the same rules."""
    known = [(value, run["name"]) for run in runs if (value := run["dense"]["generation"]) is not None]
    if not known or len(_groups(runs, "model")) > 1 or len(_groups(runs, "measure")) > 1:
        return ""
    low, high = min(known), max(known)
    if high[0] - low[0] <= SAME:
        return ""
    return (
        f"The same dense model scores {words.percent(low[0], 1)} in {low[1]} and {words.percent(high[0], 1)} in "
        f"{high[1]}: the tasks, their items or the software differ."
    )


def _timed_apart(runs: list[dict[str, Any]]) -> str:
    if len(_groups(runs, "timed_on")) < 2:
        return ""
    return (
        "These runs were timed on different machines, or with different prompts: set their ratios side by side, not "
        "their tokens/s."
    )


def _order(*kept: float | None) -> tuple[float, ...]:
    """High first, not measured last."""
    return tuple(-share if share is not None else float("inf") for share in kept)


def _run(data: dict[str, Any]) -> dict[str, Any]:
    plan, speed = data["plan"] or {}, data["speed"]
    return {
        "name": data["name"],
        "model": _model(data["recipe"].get("model") or {}),
        "summary": data["summary"],
        "missing": [gap["means"] for gap in data["missing"]],
        "pruned": cuts.short(data["plan"]),
        "parameters": _ratio(plan.get("parameters_pruned"), plan.get("parameters_dense")),
        "decoding": speeds.value(speed, "decode_tokens_per_second"),
        "speed": speed,
        "measure": _one_text(_rules(data["recipe"].get("measure") or {})),
        "timed_on": _one_text([words.machine(speed.get("machine")), speed.get("workload")]) if speed else None,
        "tokens": (data["tokens"] or {}).get("kept"),
        "epochs": [[row["tokens"], words.finite(row["headline"].get("generation"))] for row in data["epochs"]],
        "kl": _kl(data["curve"]),
        "dense": {use: ((data["headline"]["dense"] or {}).get(use) or {}).get("value") for use in USES},
        "interval": {model: {use: data["verdict"][model][use]["interval"] for use in USES} for model in MODELS},
        "kept": {model: {use: data["verdict"][model][use]["kept"] for use in USES} for model in MODELS},
        "grades": {model: {use: data["verdict"][model][use]["grade"] for use in USES} for model in MODELS},
        "perplexity": {model: (figures or {}).get("perplexity") for model, figures in data["headline"].items()},
    }


def _kl(curve: dict[str, Any] | None) -> list[list[float]]:
    """[tokens, mean KL per token] of each point of the training curve."""
    points = curve["points"] if curve else {}
    pairs = zip(points["tokens"], points["kl"]["mean"], strict=True) if "kl" in points else ()
    return [[tokens, kl] for tokens, kl in pairs if kl is not None]


def _model(cfg: dict[str, Any]) -> str:
    revision = cfg.get("revision")
    return f"{cfg.get('source')}{f' at {revision}' if revision else ''}"


def _rules(measure: dict[str, Any]) -> dict[str, Any]:
    """Without the fields that change no figure."""
    return {key: value for key, value in measure.items() if key not in ("batch_size", "samples", "epoch_limit")}


def _one_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _ratio(value: Any, of: Any) -> float | None:
    value, of = words.finite(value), words.finite(of)
    return None if value is None or not of else value / of
