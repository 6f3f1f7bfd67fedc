"""Several runs side by side: one table, one picture, best recovered generation first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recover.artifacts import write_text
from recover.report import render, speeds, verdict, words
from recover.report.collect import collect
from recover.report.figure import Figure, is_narrow, panels
from recover.report.svg import Canvas, Linear

ROW = 46
USES = ("generation", "choice", "retrieval")
MODELS = ("pruned", "recovered")

# What differs between runs -> what a reader must then not do.
APART = {
    "measure": "These runs were measured by different rules (recipe field measure): their shares answer different "
    "questions.",
    "timed_on": "These runs were timed on different machines, or with different prompts: set their ratios side by "
    "side, not their tokens/s.",
}


def compare(roots: Sequence[Path]) -> dict[str, Any]:
    """{"runs": one summary a run, "best": name or None, "apart": what must not be set side by side}; JSON-able.

    `same_dense` says whether all start from the same dense model. A run that is not finished is compared by what it
    has. Raises ArtifactError as `collect` does.
    """
    runs = [_run(collect(root)) for root in roots]
    runs.sort(key=lambda run: _order(run["kept"]["recovered"]["generation"], run["kept"]["pruned"]["generation"]))
    best = runs[0]["name"] if runs and runs[0]["kept"]["recovered"]["generation"] is not None else None
    return {
        "runs": runs,
        "best": best,
        "same_dense": len({run["model"] for run in runs}) <= 1,
        "apart": [words_ for key, words_ in APART.items() if len({run[key] for run in runs if run[key]}) > 1],
    }


def _order(*kept: float | None) -> tuple[float, ...]:
    """High first, not measured last."""
    return tuple(-share if share is not None else float("inf") for share in kept)


def _run(data: dict[str, Any]) -> dict[str, Any]:
    plan, speed = data["plan"] or {}, data["speed"]
    return {
        "name": data["name"],
        "model": str((data["recipe"].get("model") or {}).get("source")),
        "summary": data["summary"],
        "missing": [gap["means"] for gap in data["missing"]],
        "pruned_by": plan.get("kind"),
        "dropped": plan.get("dropped"),
        "sparsity": plan.get("sparsity"),
        "parameters": _ratio(plan.get("parameters_pruned"), plan.get("parameters_dense")),
        "decoding": speeds.value(speed, "decode_tokens_per_second"),
        "speed": speed,
        "measure": _one_text(_rules(data["recipe"].get("measure") or {})),
        "timed_on": _one_text([words.machine(speed.get("machine")), speed.get("workload")]) if speed else None,
        "tokens": (data["tokens"] or {}).get("kept"),
        "kept": {model: {use: data["verdict"][model][use]["kept"] for use in USES} for model in MODELS},
        "grades": {model: {use: data["verdict"][model][use]["grade"] for use in USES} for model in MODELS},
        "perplexity": {model: (figures or {}).get("perplexity") for model, figures in data["headline"].items()},
    }


def _rules(measure: dict[str, Any]) -> dict[str, Any]:
    """Without the fields that change no figure."""
    return {key: value for key, value in measure.items() if key not in ("batch_size", "samples", "epoch_limit")}


def _one_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _ratio(value: Any, of: Any) -> float | None:
    value, of = words.finite(value), words.finite(of)
    return None if value is None or not of else value / of


def render_compare(data: dict[str, Any], path: Path) -> Path:
    """Write the comparison as one self-contained HTML page; gives its path."""
    html = render.environment(escape=True)
    view = {
        "data": data,
        "drawn": render.drawn(_figure(data)),
        "columns": COLUMNS,
        "rows": [_row(run) for run in data["runs"]],
        "speed_columns": SPEED_COLUMNS,
        "speed_rows": [speed_row(run) for run in data["runs"]],
    }
    write_text(path, render.page(html, "compare.html.j2", view))
    return path


COLUMNS = (
    *("run", "pruned", "weights", "tokens", "generation, pruned", "generation, recovered"),
    *("choice, pruned", "choice, recovered", "perplexity", "decoding"),
)


def _row(run: dict[str, Any]) -> list[tuple[str, float | None]]:
    """Cells as (wording, value to sort by)."""
    kept = [run["kept"][model][use] for use in ("generation", "choice") for model in MODELS]
    return [
        (run["name"], None),
        (_pruned_by(run), None),
        (words.percent(run["parameters"]), run["parameters"]),
        (words.count(run["tokens"]), run["tokens"]),
        *((verdict.share(share) if share is not None else words.NOT_MEASURED, share) for share in kept),
        (words.number(run["perplexity"]["recovered"]), run["perplexity"]["recovered"]),
        (speeds.gain(run["speed"], "decode_tokens_per_second"), run["decoding"]),
    ]


SPEED_COLUMNS = (
    "run",
    "parameters",
    "file",
    "KV per token",
    "prefill, tokens/s",
    "ratio",
    "decoding, tokens/s",
    "ratio",
)


def speed_row(run: dict[str, Any]) -> list[str]:
    """One run of the table of sizes and speeds, dense → deployed, both timed in one run; in words."""
    cells = [run["name"]]
    for key in ("parameters", "file_bytes", "kv_bytes_per_token", *speeds.RATES):
        cells.append(speeds.change(run["speed"], key))
        if key in speeds.RATES:
            cells.append(speeds.ratio(run["speed"], key))
    return cells


def _pruned_by(run: dict[str, Any]) -> str:
    if run["dropped"]:
        return f"{len(run['dropped'])} blocks"
    return (
        f"{run['pruned_by']} {words.percent(run['sparsity'])}"
        if run["sparsity"]
        else str(run["pruned_by"] or words.NOT_MEASURED)
    )


def _figure(data: dict[str, Any]) -> Figure:
    """For each run, the way from pruned to recovered, as a share of dense."""
    runs = data["runs"]
    uses = [use for use in USES if any(run["kept"][model][use] is not None for run in runs for model in MODELS)]
    title = "From pruned to recovered, as a share of dense"
    if not uses:
        return Figure("compare", title, "Not measured: no run has both a dense and a pruned measure.")
    top = max(run["kept"][model][use] or 0.0 for run in runs for model in MODELS for use in uses)

    def draw(width: float) -> str:
        stacked = is_narrow(width)
        height = 44 + ROW * len(runs) + 36
        canvas = Canvas(
            width, height * (len(uses) if stacked else 1), "Dot plot. " + " ".join(run["summary"] for run in runs)
        )
        places = [(0.0, width)] * len(uses) if stacked else panels(width, len(uses), gap=40)
        for index, (use, (left, right)) in enumerate(zip(uses, places, strict=True)):
            x = Linear(0.0, max(1.05, top * 1.05), left, right - 12)
            _panel(canvas, runs, use, x, index * height if stacked else 0.0)
        return canvas.render()

    see = (
        "Each line is one run, from the pruned model to the recovered one at the larger dot. The dashed line is dense."
    )
    table = [tuple(text for text, _ in _row(run)) for run in runs]
    return Figure("compare", title, see, draw, COLUMNS, table, MODELS)


def _panel(canvas: Canvas, runs: list[dict[str, Any]], use: str, x: Linear, top: float) -> None:
    base = top + 40 + ROW * len(runs)
    canvas.text(x.start, top + 16, use.capitalize(), "panel")
    for tick in x.ticks(5):
        canvas.line(x(tick), top + 34, x(tick), base, "grid")
        canvas.text(x(tick), base + 18, words.percent(tick, 0), "tick", anchor="middle" if tick else "start")
    canvas.line(x(1.0), top + 30, x(1.0), base, "reference")
    for index, run in enumerate(runs):
        y = top + 40 + ROW * index + 28
        before, after = (run["kept"][model][use] for model in MODELS)
        canvas.text(x.start, y - 12, run["name"], "note")
        if before is not None and after is not None:
            canvas.line(x(before), y, x(after), y, "stroke-recovered line")
        for model, share, radius in (("pruned", before, 5), ("recovered", after, 7)):
            if share is not None:
                canvas.dot(
                    x(max(share, 0.0)),
                    y,
                    radius,
                    f"fill-{model} rim",
                    tip=f"{run['name']}, {model}: {use} {verdict.share(share)} of dense",
                )
        if before is None and after is None:
            canvas.text(x.start, y + 4, words.NOT_MEASURED, "note")
