"""Figures of a run on their way to the trackers that its recipe names (`track`), through accelerate's own trackers.

Off unless asked for. The main process alone sends: each optimizer step (`train/loss`, its terms, `train/lr`,
`train/grad_norm`, `train/tokens`), each epoch (`epoch/generation`, `epoch/kl`), at the end the figures of dense,
pruned and recovered, and the report. A run that goes on after a stop is the same run there too; one that is trained
from its first step again is a new one. A tracker that fails is said once and left out: no training ends for it.

track/run.json   who this run is to the trackers, and which report they have
"""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType

from recover.base import artifacts, console, dist
from recover.base.errors import ArtifactError, RecipeError
from recover.config.recipe import Recipe, without_folders

PROJECT = "recover"
# Where a tracker's own variable names the project, that one is meant.
PROJECTS = {"wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME", "comet_ml": "COMET_PROJECT_NAME"}
PACKAGES = {"comet_ml": "comet-ml"}  # of pip, where it is not the name
Headline = Mapping[str, float | None]
LONGEST = 250  # characters of a setting that a tracker is told


@dataclass
class _Known:
    """What `track/run.json` holds: our name for the run, that of each tracker, the export that was reported."""

    id: str
    ids: dict[str, str]
    report: str | None = None


def refuse(names: Sequence[str]) -> None:
    """Raise RecipeError: a name that accelerate has no tracker of, or whose package is not installed."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise RecipeError(
                f"track: {name!r}: expected some of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}, or a tracker that was "
                "registered in accelerate.tracking"
            )
        if name in {str(each) for each in LoggerType} and not _installed(name):
            raise RecipeError(
                f"track: {name}: its package is not installed: pip install {PACKAGES.get(name, name)}, or leave it out"
            )


def _installed(name: str) -> bool:
    found = importlib.util.find_spec(name) is not None
    return found or (name == "tensorboard" and importlib.util.find_spec("tensorboardX") is not None)


class Tracking:
    """The trackers of a run. They are opened at the first figure, so that what is not trained opens none."""

    def __init__(self, recipe: Recipe, root: Path) -> None:
        self.names = recipe.track if dist.is_main() else ()
        self.name, self.folder = recipe.name, root / "track"
        self.settings = dict(_flat(without_folders(recipe.model_dump(mode="json"))))
        self.trackers: dict[str, GeneralTracker] | None = None
        self.known = _Known("", {})

    def step(self, step: int, line: Mapping[str, Any]) -> None:
        """A line of `steps.jsonl`."""
        figures = {f"train/{name}": value for name, value in line.items() if name != "step"}
        self._send(figures, step, first=step)

    def epoch(self, step: int, headline: Headline, kl: float | None, loss: float | None) -> None:
        """What was measured after an epoch, whose last step is `step`."""
        self._send(_prefixed("epoch", {**headline, "kl": kl, "loss": loss}), step, first=step + 1)

    def outcome(self, step: int, headlines: Mapping[str, Headline], report: Path, of: str) -> None:
        """At the end: the figures of each model, and the report, once for each export (`of`: when it was made)."""
        if not self.names or (self.trackers is None and self._read().report == of):
            return
        figures = {key: value for model, line in headlines.items() for key, value in _prefixed(model, line).items()}
        self._send(figures, step, first=None)
        self._each(lambda name, tracker: REPORTS.get(name, _no_report)(tracker, report, step))
        if {*self.names} <= {*(self.trackers or {})}:
            self.known.report = of
            self._write()

    def finish(self) -> None:
        """Let the trackers end."""
        self._each(lambda _, tracker: tracker.finish())
        self.trackers = None

    def _send(self, figures: dict[str, float], step: int, first: int | None) -> None:
        if not self.names or not figures:
            return
        if self.trackers is None:
            self._open(first)
        self._each(lambda _, tracker: tracker.log(figures, step=step))

    def _open(self, first: int | None) -> None:
        """`first`: the step that comes; what trackers have of it and of later ones is made again."""
        self.known = self._read()
        if not self.known.id or first == 1:
            self.known = _Known(uuid.uuid4().hex, {})
        self.folder.mkdir(parents=True, exist_ok=True)
        PartialState()  # which their log lines ask for
        self.trackers = {}
        for name in self.names:
            self._try(name, partial(self._start, name, first))
        self._write()

    def _start(self, name: str, first: int | None) -> None:
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        place = [str(self.folder)] if kind.requires_logging_directory else []
        id = self.known.ids.get(name)
        options = SAME[name](self, id, first) if name in SAME else {}
        tracker = kind(os.environ.get(PROJECTS.get(name, ""), PROJECT), *place, **options)
        tracker.start()
        if id is None:
            tracker.store_init_configuration(self.settings)
        self.known.ids[name] = tracker.tracker.info.run_id if name == "mlflow" else self.known.id
        assert self.trackers is not None
        self.trackers[name] = tracker

    def _each(self, do: Callable[[str, GeneralTracker], None]) -> None:
        for name, tracker in list((self.trackers or {}).items()):
            self._try(name, partial(do, name, tracker))

    def _try(self, name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:  # of a library and of a service that are not ours
            (self.trackers or {}).pop(name, None)
            console.warn(f"track: {name}: {type(error).__name__}: {error}; the run goes on without it")

    def _read(self) -> _Known:
        path = self.folder / "run.json"
        try:
            return _Known(**artifacts.read_json(path)) if path.exists() else _Known("", {})
        except (ArtifactError, TypeError) as error:
            console.warn(f"{path}: {error}; trackers get a new run")
            return _Known("", {})

    def _write(self) -> None:
        artifacts.write_json(self.folder / "run.json", vars(self.known))


def _prefixed(model: str, figures: Headline) -> dict[str, float]:
    return {f"{model}/{name}": value for name, value in figures.items() if value is not None}


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """The leaves of a recipe by dotted path, as trackers take settings: numbers, true and false, short texts."""
    if isinstance(value, Mapping):
        return [leaf for name, each in value.items() for leaf in _flat(each, f"{path}.{name}" if path else name)]
    return [(path, value if isinstance(value, bool | int | float) else str(value)[:LONGEST])]


# How a tracker is told that this run is one that it has: (tracking, the run's id there or None, the step that comes).
SAME: dict[str, Callable[[Tracking, str | None, int | None], dict[str, Any]]] = {
    "tensorboard": lambda run, id, first: {} if first is None else {"purge_step": first},
    "wandb": lambda run, id, first: {"name": run.name, "id": run.known.id, "resume": "allow", "dir": str(run.folder)},
    "mlflow": lambda run, id, first: {"run_name": run.name} if id is None else {"run_id": id},
    "trackio": lambda run, id, first: {"name": f"{run.name}-{run.known.id[:8]}", "resume": "allow"},
    "comet_ml": lambda run, id, first: {"experiment_key": run.known.id},
    "swanlab": lambda run, id, first: {"experiment_name": run.name, "id": run.known.id[:21], "resume": "allow"},
    "dvclive": lambda run, id, first: {"dir": str(run.folder / "dvclive"), "resume": id is not None},
}


def _no_report(tracker: GeneralTracker, report: Path, step: int) -> None:
    """A tracker without files."""


def _text(tracker: GeneralTracker, report: Path, step: int) -> None:
    tracker.log({"report": report.with_suffix(".md").read_text()}, step=step)  # type: ignore[arg-type]


def _file(tracker: GeneralTracker, report: Path, step: int) -> None:
    tracker.log_artifact(str(report))  # type: ignore[attr-defined]


def _wandb(tracker: GeneralTracker, report: Path, step: int) -> None:
    import wandb  # type: ignore[import-not-found]  # an optional package

    run: Any = tracker.tracker  # type: ignore[attr-defined]
    artifact = wandb.Artifact("report", type="report")
    artifact.add_file(str(report))
    run.log_artifact(artifact)


def _comet(tracker: GeneralTracker, report: Path, step: int) -> None:
    run: Any = tracker.tracker  # type: ignore[attr-defined]
    run.log_asset(str(report))


REPORTS = {"tensorboard": _text, "mlflow": _file, "wandb": _wandb, "comet_ml": _comet}
