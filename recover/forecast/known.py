"""The calibration runs of the package: `runs.json` beside this file, written by `dev/calibrate_forecast.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recover.base.artifacts import read_json, write_text
from recover.base.errors import ArtifactError
from recover.base.strict_json import dumps
from recover.forecast.runs import Run, from_json

PATH = Path(__file__).parent / "runs.json"


def known_runs(path: Path = PATH) -> list[Run]:
    """Every run of the file.

    Raises:
        ArtifactError: it cannot be read, or a row is not a run.
    """
    try:
        return [from_json(row) for row in read_json(path)["runs"]]
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not calibration runs ({error}); dev/calibrate_forecast.py writes it") from None


def write_runs(runs: Sequence[Run], path: Path = PATH) -> None:
    """Write the file anew, one line a run, figures rounded to what was measured."""
    rows = ",\n".join(dumps(_rounded(run.to_json())) for run in runs)
    write_text(path, f'{{"runs": [\n{rows}\n]}}\n')


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
