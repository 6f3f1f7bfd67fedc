"""The files of a report (report.json has everything, report.md, one self-contained report.html), and of a diagnosis.

`collect` gives what is known of a run. A diagnosis is two checkpoints held against each other by `recover diagnose`,
without any run. A page makes no request of any kind: styles, pictures and script are inside it, and its content policy
forbids the rest. Model text is data: it is escaped, and markup that slipped through could not run, since the policy
names the one script by its hash.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from recover.base import artifacts, products
from recover.base.artifacts import write_json, write_text
from recover.base.errors import ArtifactError
from recover.base.products import taken_apart
from recover.config import tasks, yaml_values
from recover.report import drift, exhibits, items, training, verdict, words
from recover.report.data import MODELS, Cell, DiagnosisData, Drift, Json, RunData
from recover.report.drift import mean_of
from recover.report.exhibits import DIAGNOSIS, Exhibit, Section, half_parted, key_findings
from recover.report.figures.figure import Figure
from recover.report.tables import Table

TEMPLATES = Path(__file__).parent / "templates"

POLICY = b"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-"  # as page.html.j2 has it

SIGNS = {"yes": "✓", "with care": "~", "no": "✗", "cannot tell": "", "not measured": ""}


def render(root: Path, data: RunData) -> list[Path]:
    """Write report.json, report.md and report.html into `root`, each whole or not at all; gives their paths.

    Raises ArtifactError, with nothing written, where a file of the run holds what we never write.
    """
    paths = [root / "report.json", root / "report.md", root / "report.html"]
    with taken_apart(root):
        view = _view(data)
        html, markdown = environment(escape=True), environment(escape=False)
        texts = [markdown.get_template("report.md.j2").render(view), page(html, "report.html.j2", view)]
    write_json(paths[0], data)
    for path, text in zip(paths[1:], texts, strict=True):
        write_text(path, text)
    return paths


def is_page(path: Path) -> bool:
    """Whether a file is a page that we wrote: one with our content policy at its head."""
    return path.is_file() and POLICY in path.read_bytes()[:1000]


def page(templates: Environment, template: str, view: dict[str, Any]) -> str:
    """One HTML file with the shared style and script inside it."""
    script = (TEMPLATES / "script.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = templates.get_template("style.css").render()
    assets = {"style": Markup(style), "script": Markup(script), "script_sha256": digest}
    return templates.get_template(template).render(view, **assets)


@functools.cache
def environment(*, escape: bool) -> Environment:
    """Templates with the filters of the report, compiled once; an undefined name is an error, not an empty string."""
    found = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=escape, undefined=StrictUndefined)
    found.filters |= {
        "percent": words.percent,
        "share": verdict.share,
        "cell": cell,
        "cellmd": table_cell,
        "fence": fence,
        "figure": figure_cell,
    }
    return found


def cell(value: float, form: str) -> str:
    """A figure as tables show it: percentages with one digit, so that columns line up."""
    return words.percent(value, 1) if form == "percent" else words.shown(value, form)


def figure_cell(figure: Cell | None, form: str, reference: bool = False) -> str:
    """A figure with its interval in brackets; a dash where the model is the reference of the figure itself."""
    if figure is None:
        return "–" if reference else words.NOT_MEASURED
    interval = figure["interval"]
    bounds = f" [{cell(interval[0], form)}, {cell(interval[1], form)}]" if interval else ""
    return f"{cell(figure['value'], form)}{bounds}"


def table_cell(value: Any) -> str:
    """Text that cannot break out of a cell of a markdown table."""
    return " ".join(str(value).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def fence(text: str) -> str:
    """Text in a markdown code fence longer than any run of backticks inside it."""
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}text\n{text}\n{ticks}"


def _view(data: RunData) -> dict[str, Any]:
    """What the templates need beside the data, worded."""
    sections = [_of_run(section, data) for section in exhibits.RUN]
    return {
        "data": data,
        **exhibited(data, sections),
        "terms": list(dict(term for section in sections for term in section.terms).items()),
        "models": tuple(data["headline"]),
        "judged": verdict.judged(data),
        "questions": [(use.name, use.question) for use in tasks.USES.values()],
        "unmeasured": verdict.unmeasured(data["verdict"]),
        "signs": SIGNS,
        "facts": _facts(data),
        "recovery": _recovery(data),
        "points": key_findings(data),
        "levels": items.LEVELS,
        "mistake_names": {kind: heading for kind, (_, heading) in items.NAMES.items()},
        "training_notes": training.notes(data),
        "setbacks": training.setbacks_told(data["epochs"], data["recipe"], (data["rate_trials"] or {}).get("chosen")),
        "size_rows": words.speed_rows(data["speed"]),
        "speed_notes": words.speed_notes(data["speed"]),
        "measured_on": words.machine((data["speed"] or {}).get("machine")),
        "verified": _verified(data),
        "recipe": yaml_values.dump(data["recipe"]),
        "provenance": json.dumps(data["provenance"], indent=2, ensure_ascii=False),
    }


def _of_run(section: Section, data: RunData) -> Section:
    """With what only the run's own figures tell: what its measures mean, and how its recovery went."""
    if section.key == "recovery":
        return replace(section, intro=_recovery(data))
    if section.key == "measures":
        measured = {row["label"]: row["meaning"] for row in data["measures"] if row["meaning"]}
        further = [(model, what) for model, what in exhibits.FURTHER.items() if model in data["headline"]]
        return replace(section, terms=(*section.terms, *further, *measured.items()))
    return section


def exhibited(data: Any, sections: Sequence[Section], *, measured: bool = False) -> dict[str, Any]:
    """For templates: the `sections` to show with the `exhibits` of each, and the exhibits of the page's `top`.

    `measured`: figures that were not measured are left out.
    """
    made = exhibits.made(data, ["top", *(section.key for section in sections)])
    shown: dict[str, list[dict[str, Any]]] = {}
    for each, found in made.items():
        if isinstance(found, Table) or found.measured or not measured:
            shown.setdefault(each.section, []).append(worded(each, found))
    listed = [{**asdict(section), "exhibits": shown.get(section.key, [])} for section in sections]
    return {
        "sections": [section for section in listed if section["exhibits"] or section["always"]],
        "top": shown.get("top", []),
    }


def worded(exhibit: Exhibit, found: Figure | Table) -> dict[str, Any]:
    """A figure or table for a template; SVG is drawn and marked as markup (Canvas escapes all text in it)."""
    fields = {each.name: getattr(found, each.name) for each in dataclasses.fields(found) if each.name != "draw"}
    about = {**fields, "key": exhibit.key, "numbered": exhibit.numbers, "is_figure": isinstance(found, Figure)}
    if isinstance(found, Figure):
        about |= {"measured": found.measured, "wide": Markup(found.wide), "narrow": Markup(found.narrow)}
    return about


def _facts(data: RunData) -> list[tuple[str, str]]:
    recipe, plan, env, tokens = data["recipe"], data["plan"], data["provenance"]["env"] or {}, data["tokens"]
    facts = [("dense model", words.shown_source(str((recipe.get("model") or {}).get("source", words.NOT_MEASURED))))]
    if plan:
        what = words.plan_sites(plan) or words.plan_sizes(plan)
        facts.append(("pruned by", f"{plan['kind']}{f', {what}' if what else ''}"))
        if repair := words.plan_repair(plan):
            facts.append(("repaired at the cut", repair))
    if plan and plan.get("parameters_dense"):
        dense, pruned = words.count(plan["parameters_dense"]), words.count(plan["parameters_pruned"])
        facts.append(("parameters", f"{dense} → {pruned}"))
    if tokens:
        kept = f"{words.count(tokens['kept'])} tokens, epoch {tokens['epoch']} of {tokens['epochs']} kept"
        facts.append(("recovered with", kept))
    if env.get("machine"):
        facts.append(("on", words.machine(env["machine"])))
    return facts


def _recovery(data: RunData) -> str:
    rows = data["epochs"]
    if not rows:
        return "Not measured: no epoch of recovery was finished."
    tokens, seconds = data["tokens"], rows[-1]["seconds"]
    assert tokens is not None, "counted wherever there are epochs"
    time = f" in {words.duration(seconds)}" if words.finite(seconds) else ""
    return (
        f"LoRA distillation from the dense model, {len(rows)} epoch{'s' if len(rows) > 1 else ''}, "
        f"{words.count(tokens['all'])} tokens{time}. "
        f"Epoch {tokens['epoch']} generated best and is the one that is exported."
    )


def _verified(data: RunData) -> str:
    check = data["verify"]
    if check is None:
        return "The exported checkpoint is not verified."
    if not check.get("ok"):
        problems = "; ".join(map(str, check.get("problems") or ["no reason recorded"]))
        return f"The exported checkpoint FAILED its verification: {problems}."
    difference = words.number(check.get("logits_max_difference"))
    cached = words.number((check.get("cache") or {}).get("logits_max_difference"))
    loaded = "The exported checkpoint was loaded in a fresh process by stock transformers: its logits differ from the"
    if held := check.get("quantized"):
        merged = words.number(check.get("logits_max_difference_reload"))
        return (
            f"{loaded} merged model's by at most {merged}, and with a KV cache from without by at most {cached}. "
            f"Training held the dense weights in {held}, and what is measured is so; the export, which is "
            f"merged into the weights of the files, differs from that model's logits by up to {difference}."
        )
    return f"{loaded} trained model's by at most {difference}, and with a KV cache from without by at most {cached}."


SUMMARY = "probe.json"


def is_diagnosis(folder: Path) -> bool:
    """Whether the folder holds a probe's summary that `recover diagnose` wrote, and is no run directory."""
    return (folder / SUMMARY).is_file() and not (folder / "recipe.yaml").is_file() and products.is_diagnosis(folder)


def render_diagnosis(folder: Path) -> Path:
    """Write report.html into the folder of a diagnosis, one self-contained page; gives its path.

    Raises ArtifactError if its summary is corrupt or of another kind.
    """
    with taken_apart(folder):
        data = collect_diagnosis(folder)
        view = {"data": data, "points": key_findings(data), **exhibited(data, DIAGNOSIS, measured=True)}
        text = page(environment(escape=True), "diagnosis.html.j2", view)
    write_text(folder / "report.html", text)
    return folder / "report.html"


def collect_diagnosis(folder: Path) -> DiagnosisData:
    """What the templates and figures need, in the shape that `collect` gives of a run; the other model is `other`."""
    path = folder / SUMMARY
    summary = artifacts.read_json(path)
    if not isinstance(summary, dict) or not isinstance(summary.get("final") or {}, dict):
        raise ArtifactError(f"{path}: expected the summary of a probe. Run `recover diagnose` with another --out")
    found = drift.read(summary)
    data: DiagnosisData = {
        "name": folder.absolute().name,
        "dense": words.shown_source(str(summary.get("dense") or "dense")),
        "other": words.shown_source(str(summary.get("other") or folder.absolute().name)),
        "drift": {"other": found},
        "facts": _facts_of_pair(summary),
        "title": _diagnosis_title(found),
        "recipe": {},
        "plan": None,
        "training": None,
        "rate_trials": None,
        "curve": None,
        "speed": None,
        "divergence": [],
        "epochs": [],
        "exchanged": [],
        "mistakes": [],
        "times": [],
        "made": [],
        "headline": dict.fromkeys(MODELS),
        "served": None,
    }
    return words.jsonable(data)


def _facts_of_pair(summary: Json) -> list[tuple[str, str]]:
    final = summary.get("final") or {}
    facts = [("prompts or texts", words.count(summary.get("prompts")))] if summary.get("prompts") else []
    if words.finite(final.get("positions")):
        facts.append(("tokens scored", words.count(final["positions"])))
    facts += [("choice", f"{row['task']}, {row['items']:,} items") for row in summary.get("choices") or ()]
    facts += [("ranking", f"{row['queries']:,} queries") for row in (summary.get("retrieval") or ())[:1]]
    return facts


def _diagnosis_title(found: Drift) -> str:
    """The finding in one line, from what was probed."""
    parted = found["divergence"] or {}
    never = words.finite(parted.get("never"))
    if never is not None:
        if never == 1.0:
            return "Every greedy text is the dense model's, token for token"
        if never >= 0.5:
            return f"{words.percent(never)} of greedy texts stay the dense model's to the end"
        return f"Half of the greedy texts leave the dense model's by token {words.number(half_parted(parted))}"
    kl = mean_of(found["final"].get("kl"))
    if kl is not None:
        return f"Mean KL to dense is {words.number(kl)} nats a token"
    same = [(row.get("likelihood") or {}).get("same_choice") for row in found["choices"]]
    if same and words.finite(same[0]) is not None:
        return f"{words.percent(same[0], 1)} of choices are the dense model's"
    return "Two models, held against each other"
