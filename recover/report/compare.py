"""Several runs side by side, best recovered generation first, what must not be set side by side, and the page of it."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from recover.base.artifacts import write_text
from recover.base.products import taken_apart
from recover.config import tasks
from recover.maths import score
from recover.report import items, render, words
from recover.report.collect import collect, models_of
from recover.report.data import CHANGED, ComparedRun, Comparison, Curve, Json, Paired, RunData
from recover.report.exhibits import Exhibit
from recover.report.figures.compare import courses, losses, share_cell, trade, ways
from recover.report.run_files import Model

SAME = 0.02  # dense figures further apart than this were not measured alike

PICTURES = (
    Exhibit("pictures", "compare", ways),
    Exhibit("pictures", "trade", trade),
    Exhibit("pictures", "courses", courses),
    Exhibit("pictures", "losses", losses),
)


def compare(roots: Sequence[Path]) -> Comparison:
    """{"runs": one summary a run, "best": name or None, "equal", "comparable", "same_dense", "apart"}; JSON-able.

    `apart` says in words what must not be set side by side, and why. Runs that start from different dense models, or
    are measured by different rules, have no `best`; nor have runs whose first ones differ by no more than noise: those
    are the `equal` ones. A run that is not finished is compared by what it has. Raises ArtifactError as `collect` does.
    """
    runs = [_of(root) for root in roots]
    with taken_apart(roots[0].parent):
        return _compare(runs, roots)


def _of(root: Path) -> ComparedRun:
    with taken_apart(root):
        return _run(collect(root))


def _compare(runs: list[ComparedRun], roots: Sequence[Path]) -> Comparison:
    _name_apart(runs, roots)
    runs.sort(key=lambda run: _order(run["kept"]["recovered"]["generation"], run["kept"]["pruned"]["generation"]))
    same_dense = len({run["model"] for run in runs}) <= 1
    comparable = same_dense and len({run["measure"] for run in runs}) <= 1
    measured = bool(runs) and runs[0]["kept"]["recovered"]["generation"] is not None
    first = [run["name"] for run in runs if not beyond_noise(runs[0], run)] if measured and comparable else []
    return {
        "runs": runs,
        "best": first[0] if len(first) == 1 else None,
        "equal": first if len(first) > 1 else [],
        "same_dense": same_dense,
        "comparable": comparable,
        "paired": _paired(runs) if measured and comparable else [],
        "apart": [
            *filter(None, (_dense_apart(runs), _rules_apart(runs), _level_apart(runs), _timed_apart(runs))),
            *(f"{run['name']}: {line}" for run in runs for line in run["mixed"]),
        ],
    }


def beyond_noise(better: ComparedRun, other: ComparedRun) -> bool:
    """Whether generation after recovery differs by more than the intervals of both, taken as independent, explain.

    Half-widths add as squares. Both runs have the same items, whose own spread is in each interval, so this calls
    more runs equal than a test item by item would.
    """
    if other is better:
        return False
    (high, high_interval), (low, low_interval) = (
        (run["kept"]["recovered"]["generation"], run["interval"]["recovered"]["generation"]) for run in (better, other)
    )
    if high is None or low is None:
        return True
    below = high - high_interval[0] if high_interval else 0.0
    above = low_interval[1] - low if low_interval else 0.0
    return high - low > math.hypot(below, above)


def ranking(data: Comparison) -> str:
    """Which run keeps most generation, in one line, as far as that can be said; empty if nothing can."""
    if (data["best"] or data["equal"]) and not data["runs"][0]["kept"]["recovered"]["generation"]:
        return "No run keeps any generation"
    if data["best"]:
        return f"{data['best']} keeps most generation"
    if not data["equal"]:
        return ""
    *names, last = data["equal"]
    return f"{', '.join(names)} and {last} keep most generation, equal within noise"


def _paired(runs: list[ComparedRun]) -> list[Paired]:
    """Each run's recovered model against the best run's, task by task, where both were asked the same items."""
    best, found = runs[0], []
    for run in runs[1:]:
        for task, right in run["right"].items():
            if len(best["right"].get(task, ())) == len(right):
                test = score.mcnemar(best["right"][task], right)
                counts: Paired = {
                    "run": run["name"],
                    "task": task,
                    "items": len(right),
                    "lost": test.lost,
                    "won": test.won,
                    "p": test.p,
                }
                found.append(counts)
    return found


def _name_apart(runs: list[ComparedRun], roots: Sequence[Path]) -> None:
    """Runs of one name are told apart by their folders."""
    names = [run["name"] for run in runs]
    for run, root in zip(runs, roots, strict=True):
        if names.count(run["name"]) > 1:
            run["name"] = f"{run['name']} ({root.absolute().parent.name}/{root.absolute().name})"


def _groups(runs: list[ComparedRun], key: Literal["model", "measure", "timed_on"]) -> dict[str, list[str]]:
    """Value -> names of the runs that have it, where it is known."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if value := run[key]:
            found.setdefault(value, []).append(run["name"])
    return found


def _dense_apart(runs: list[ComparedRun]) -> str:
    groups = _groups(runs, "model")
    if len(groups) < 2:
        return ""
    who = "; ".join(f"{', '.join(names)}: {model}" for model, names in groups.items())
    return f"These runs start from different dense models ({who}). Their shares have different wholes: none is best."


def _rules_apart(runs: list[ComparedRun]) -> str:
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


def _level_apart(runs: list[ComparedRun]) -> str:
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


def _timed_apart(runs: list[ComparedRun]) -> str:
    if len(_groups(runs, "timed_on")) < 2:
        return ""
    return (
        "These runs were timed on different machines, or with different prompts: set their ratios side by side, not "
        "their tokens/s."
    )


def _order(*kept: float | None) -> tuple[float, ...]:
    """High first, not measured last."""
    return tuple(-share if share is not None else float("inf") for share in kept)


def _run(data: RunData) -> ComparedRun:
    plan, speed = data["plan"] or {}, data["speed"]
    return {
        "name": data["name"],
        "model": _model(data["recipe"].get("model") or {}),
        "summary": data["summary"],
        "missing": [gap["means"] for gap in data["missing"]],
        "mixed": data["mixed"],
        "pruned": words.plan_short(data["plan"]),
        "parameters": _ratio(plan.get("parameters_pruned"), plan.get("parameters_dense")),
        "decoding": words.speed_value(speed, "decode_tokens_per_second"),
        "speed": speed,
        "measure": _one_text(_rules(data["recipe"].get("measure") or {})),
        "timed_on": _one_text([words.machine(speed.get("machine")), speed.get("workload")]) if speed else None,
        "tokens": (data["tokens"] or {}).get("kept"),
        "epochs": [(row["tokens"], words.finite(row["headline"].get("generation"))) for row in data["epochs"]],
        "kl": _kl(data["curve"]),
        "pruned_generation": data["verdict"]["pruned"]["generation"]["value"],
        "dense": {use: ((data["headline"]["dense"] or {}).get(use) or {}).get("value") for use in tasks.USES},
        "interval": {model: {use: data["verdict"][model][use]["interval"] for use in tasks.USES} for model in CHANGED},
        "right": {row["task"]: row["each"] for row in data["exchanged"] if row["model"] == "recovered"},
        "kept": {model: {use: data["verdict"][model][use]["kept"] for use in tasks.USES} for model in CHANGED},
        "grades": {model: {use: data["verdict"][model][use]["grade"] for use in tasks.USES} for model in CHANGED},
        "perplexity": {model: (figures or {}).get("perplexity") for model, figures in data["headline"].items()},
    }


def _kl(curve: Curve | None) -> list[tuple[float, float]]:
    """[tokens, mean KL per token] of each point of the training curve."""
    points = curve["points"] if curve else {}
    pairs = zip(points["tokens"], points["kl"]["mean"], strict=True) if "kl" in points else ()
    return [(tokens, kl) for tokens, kl in pairs if kl is not None]


def _model(cfg: Json) -> str:
    revision = cfg.get("revision")
    return f"{cfg.get('source')}{f' at {revision}' if revision else ''}"


def _rules(measure: Json) -> Json:
    """Without the fields that change no figure."""
    return {key: value for key, value in measure.items() if key not in ("batch_size", "samples", "epoch_limit")}


def _one_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _ratio(value: Any, of: Any) -> float | None:
    value, of = words.finite(value), words.finite(of)
    return None if value is None or not of else value / of


def render_compare(data: Comparison, path: Path) -> Path:
    """Write the comparison as one self-contained HTML page; gives its path."""
    html = render.environment(escape=True)
    with taken_apart(path.parent):
        drawn = [render.worded(each, found) for each in PICTURES if (found := each.make(data)) is not None]
        view = {
            "data": data,
            "ranking": ranking(data),
            "first": data["equal"] or [data["best"]],
            "drawn": drawn,
            "columns": COLUMNS,
            "rows": [row(run) for run in data["runs"]],
            "paired": [(each, items.chance(each["p"])) for each in data["paired"]],
            "speed_columns": SPEED_COLUMNS,
            "speed_rows": [speed_row(run) for run in data["runs"]],
        }
        page = render.page(html, "compare.html.j2", view)
    write_text(path, page)
    return path


COLUMNS = (
    *("run", "pruned", "weights", "tokens", "generation, pruned", "generation, recovered"),
    *("choice, pruned", "choice, recovered", "perplexity", "file", "decoding"),
)


def row(run: ComparedRun) -> list[tuple[str, float | None, str]]:
    """Cells as (wording, value to sort by, what to make of it)."""
    file = words.speed_value(run["speed"], "file_bytes")
    return [
        (run["name"], None, ""),
        (run["pruned"], None, ""),
        (words.percent(run["parameters"]), run["parameters"], ""),
        (words.count(run["tokens"]), run["tokens"], ""),
        *(share_cell(run, model, use) for use in ("generation", "choice") for model in CHANGED),
        _perplexity(run["perplexity"]),
        (f"×{file:.2f}" if file is not None else words.NOT_MEASURED, file, ""),
        _decoding(run),
    ]


def _perplexity(found: dict[str, float | None]) -> tuple[str, float | None, str]:
    """Recovered, with the way there under it."""
    way = " → ".join(words.perplexity(found[model]) for model in ("dense", "pruned") if found[model] is not None)
    return words.perplexity(found["recovered"]), found["recovered"], f"{way} →" if way else ""


def _decoding(run: ComparedRun) -> tuple[str, float | None, str]:
    """The ratio, and under it what it means where it is no gain."""
    said = words.speed_gain(run["speed"], "decode_tokens_per_second")
    if run["decoding"] is None or said.startswith("×"):
        return said.partition(" [")[0], run["decoding"], ""
    return f"×{run['decoding']:.2f}", run["decoding"], said


SPEED_COLUMNS = (
    *("run", "parameters", "file", "KV per token"),
    *("prefill, tokens/s", "prefill, ratio", "decoding, tokens/s", "decoding, ratio"),
)


def speed_row(run: ComparedRun) -> list[str]:
    """One run of the table of sizes and speeds, dense → deployed, both timed in one run; in words."""
    cells = [run["name"]]
    for key in ("parameters", "file_bytes", "kv_bytes_per_token", *words.RATES):
        cells.append(words.speed_change(run["speed"], key))
        if key in words.RATES:
            cells.append(words.speed_ratio(run["speed"], key))
    return cells


# A table that fits a paper.


def paper_table(roots: Sequence[Path]) -> tuple[list[str], list[list[str | float | None]]]:
    """(columns, rows): of each run its dense, pruned and recovered model, with the main figure of each task.

    A figure takes three columns: value, and the ends of its 95% interval, where it has one. Shares are from 0 to 1. One
    dense row serves all runs that have the same dense model and rules. Raises ArtifactError as `collect` does.
    """
    found = []
    for root in roots:
        with taken_apart(root):
            found.append(collect(root))
    mains = list(
        dict.fromkeys((row["task"], row["label"]) for data in found for row in data["measures"] if row["main"])
    )
    columns = ["run", "model", "parameters", "tokens"]
    columns += [f"{task} {label}{end}" for task, label in mains for end in ("", " low", " high")]
    rows, seen = [], set()
    for data in found:
        wholes = _one_text([data["recipe"].get("model"), _rules(data["recipe"].get("measure") or {})])
        for model in models_of(data["recipe"]):
            if model == "dense" and wholes in seen:
                continue
            rows.append([*_model_cells(data, model), *_figure_cells(data, model, mains)])
        seen.add(wholes)
    return columns, rows


def _model_cells(data: RunData, model: Model) -> list[str | float | None]:
    plan: Json = cast(Json, data["plan"] or {})
    tokens = (data["tokens"] or {}).get("kept") if model in ("recovered", "deployed") else None
    return [
        data["name"],
        model,
        plan.get("parameters_dense" if model in ("dense", "alternative") else "parameters_pruned"),
        tokens,
    ]


def _figure_cells(data: RunData, model: Model, mains: list[tuple[str, str]]) -> list[str | float | None]:
    rows = {(row["task"], row["label"]): row for row in data["measures"] if row["main"]}
    found: list[str | float | None] = []
    for main in mains:
        cell = rows[main].get(model) if main in rows else None
        found += [cell["value"], *(cell["interval"] or (None, None))] if cell else [None, None, None]
    return found


def as_csv(columns: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> str:
    """The table with all digits; what was not measured is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def as_latex(columns: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> str:
    """The table for LaTeX with the package booktabs: shares in percent, intervals in brackets, a rule between runs."""
    names = [_tex(name) for name in (*columns[:4], *columns[4::3])]
    lines = [
        "% needs \\usepackage{booktabs}; brackets are 95% intervals",
        f"\\begin{{tabular}}{{ll{'r' * (len(names) - 2)}}}",
        "\\toprule",
        " & ".join(names) + " \\\\",
        "\\midrule",
    ]
    for number, row in enumerate(rows):
        if number and row[0] != rows[number - 1][0]:
            lines.append("\\midrule")
        name = _tex(str(row[0])) if not number or row[0] != rows[number - 1][0] else ""
        cells = [name, str(row[1]), *(words.count(each) if each is not None else "--" for each in row[2:4])]
        for at, column in zip(range(4, len(row), 3), columns[4::3], strict=True):
            cells.append(_tex_figure(column, *row[at : at + 3]))
        lines.append(" & ".join(cells) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _tex_figure(column: str, value: Any, low: Any, high: Any) -> str:
    if value is None:
        return "--"
    share = not column.endswith("perplexity")
    shown = [f"{100 * each:.1f}" if share else f"{each:.2f}" for each in (value, low, high) if each is not None]
    return shown[0] if len(shown) == 1 else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)
