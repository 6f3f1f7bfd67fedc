"""What a person is told at the end of a run, and of a dense model on whose tasks nothing can be lost."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_run import build_run

from recover.config.tasks import KINDS
from recover.export import write
from recover.report import verdict, words
from recover.report.collect import collect


def writes(**fields: Any) -> dict[str, Any]:
    return {"tasks": {"qa": {"kind": "generate", "items": 20, "exact_match": 0.5, "truncated": 0, **fields}}}


def chooses(accuracy: float, chance: float | None) -> dict[str, Any]:
    return {"tasks": {"mc": {"kind": "choice", "items": 20, "accuracy": accuracy, "chance": chance}}}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (writes(), None),
        (writes(exact_match=0.0), "task qa: the dense model itself scores 0.0%, near nothing"),
        (writes(truncated=10), None),
        (writes(truncated=11), "11 of 20 texts of the dense model ran into the limit"),
        (chooses(0.27, 0.25), "near chance (25%)"),
        (chooses(0.27, None), None),
        (chooses(0.31, 0.25), None),
        ({"tasks": {"text": {"kind": "perplexity", "items": 3, "perplexity": 12.0}}}, None),
    ],
)
def test_a_task_that_can_show_nothing_is_told(record: dict[str, Any], said: str | None) -> None:
    lines = list(verdict.blind(record))
    assert len(lines) == (said is not None) and (said or "") in "".join(lines)


def test_figures_are_worded_as_in_the_report() -> None:
    headline = {"generation": 0.055, "choice": 0.93, "retrieval": None, "perplexity": 2.0461}
    assert verdict.headline_line(headline) == "generation 5.5%, choice 93.0%, perplexity 2.05"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1.9, "1.90"),
        (1.896, "1.90"),
        (15.4, "15.40"),
        (99.994, "99.99"),
        (99.996, "100"),
        (153.2, "153"),
        (12_400, "12,400"),
    ],
)
def test_a_perplexity_has_two_decimals_below_100_wherever_it_stands(value, said):
    """So that figures of a column can be compared."""
    assert verdict.headline_words("perplexity", value) == said
    assert words.perplexity(value) == said == words.shown(value, KINDS["perplexity"].main.form)
    assert f"| {said} |" in write._table({"dense": {"perplexity": value}})


def test_a_run_ends_with_its_figures_verdict_and_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = build_run(tmp_path)
    (run / "deploy").mkdir(exist_ok=True)
    data = collect(run)
    verdict.print_end(data, run)
    text = capsys.readouterr().out
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    for model in ("dense", "pruned", "recovered"):
        assert f"{data['headline'][model]['generation']['value']:.1%}" in rows[model]
    assert f"{data['title']}." in text and f"generation: {data['verdict']['recovered']['generation']['grade']}" in text
    assert text.splitlines()[-1].startswith(f"report: {run / 'report.html'}") and str(run / "deploy") in text


def rescore(run: Path, folder: str, task: str, **scores: Any) -> None:
    path = run / folder / "measure.json"
    record = json.loads(path.read_text())
    record["tasks"][task] |= scores
    path.write_text(json.dumps(record))


def test_a_dense_model_that_cannot_do_the_task_is_not_called_unmeasured(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    rescore(run, "dense", "sums", exact_match=0.0, interval95=[0.0, 0.1])
    data = collect(run)
    assert data["title"] == "Generation cannot be judged: dense itself scores 0%"
    assert data["summary"].endswith("generation after recovery cannot be judged.")
    assert "not been measured" not in data["summary"]


def test_what_recovery_took_from_choice_is_in_the_summary(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    whole = collect(run)["summary"]
    assert "lowered choice" not in whole
    rescore(run, "after", "facts", accuracy=0.5, interval95=[0.4, 0.6])
    found = collect(run)
    kept = found["verdict"]["recovered"]["choice"]["kept"]
    assert found["summary"] == f"{whole.removesuffix('.')} and lowered choice to {kept:.0%}."
