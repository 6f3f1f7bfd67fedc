"""The page of a diagnosis: two checkpoints held against each other by `recover diagnose`, without any run."""

from __future__ import annotations

from pathlib import Path

from recover.base import artifacts, ownership
from recover.base.artifacts import write_text
from recover.base.errors import ArtifactError
from recover.base.products import taken_apart
from recover.report import drift, render, words
from recover.report.data import MODELS, DiagnosisData, Drift, Json
from recover.report.drift import mean_of
from recover.report.exhibits import DIAGNOSIS
from recover.report.key_findings import half_parted, key_findings

SUMMARY = "probe.json"


def is_diagnosis(folder: Path) -> bool:
    """Whether the folder holds a probe's summary that `recover diagnose` wrote, and is no run directory."""
    return (folder / SUMMARY).is_file() and not (folder / "recipe.yaml").is_file() and ownership.is_diagnosis(folder)


def render_diagnosis(folder: Path) -> Path:
    """Write report.html into the folder of a diagnosis, one self-contained page; gives its path.

    Raises ArtifactError if its summary is corrupt or of another kind.
    """
    with taken_apart(folder):
        data = collect_diagnosis(folder)
        view = {"data": data, "points": key_findings(data), **render.exhibited(data, DIAGNOSIS, measured=True)}
        page = render.page(render.environment(escape=True), "diagnosis.html.j2", view)
    write_text(folder / "report.html", page)
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
        "facts": _facts(summary),
        "title": _title(found),
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
    }
    return words.jsonable(data)


def _facts(summary: Json) -> list[tuple[str, str]]:
    final = summary.get("final") or {}
    facts = [("prompts or texts", words.count(summary.get("prompts")))] if summary.get("prompts") else []
    if words.finite(final.get("positions")):
        facts.append(("tokens scored", words.count(final["positions"])))
    facts += [("choice", f"{row['task']}, {row['items']:,} items") for row in summary.get("choices") or ()]
    facts += [("ranking", f"{row['queries']:,} queries") for row in (summary.get("retrieval") or ())[:1]]
    return facts


def _title(found: Drift) -> str:
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
