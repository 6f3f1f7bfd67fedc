"""Whole runs on the embedded model, cut small, and finished ones that tests share.

`run` does what `recover run` does, in this process. Two things are brief in it, whose laws are held elsewhere: speed is
timed in two short turns (`test_speed.py`), and the export is verified here and not in a fresh process
(`test_export.py`). A run of which nothing is cut is that of `test_hostile_folder.py`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from recover.config.recipe import load_recipe
from recover.export import verify
from recover.measure import speed
from recover.run import stage_work, stages
from recover.run.directory import RunDirectory

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
PROMPTS = Path(__file__).parent / "prompts.jsonl"  # the first 400 of the embedded ones
TEXT = (f"train.data.0.prompts={PROMPTS}", "train.data.0.max_new_tokens=32", "train.data.0.batch_size=32")
SMALL = (
    *TEXT,
    "measure.limit=6",
    "measure.max_new_tokens=8",
    "measure.sampling=null",
    "probe.samples=2",
    "probe.steps=4",
    "train.tokens=600",
    "train.epochs=2",
    "train.batch_size=4",
)
# The runs that most tests look at.
DEPTH = ("prune={kind: depth, blocks: [3, 11]}",)
MASKED = (
    "prune={kind: magnitude, sparsity: 0.4}",
    "train.lr=1e-2",
    "probe.sublayers=false",
    "measure.limit=2",
)


def run(root: Path, *overrides: str, **options: Any) -> RunDirectory:
    """A run of the quickstart, cut small, in `root`."""
    with brief():
        return stages.run(load_recipe(QUICKSTART, [*SMALL, *overrides]), root, **options)


class Here:
    """In the place of the fresh process that verifies."""

    returncode = 0

    def poll(self) -> int | None:
        return None  # it waits

    def communicate(self, arguments: str) -> tuple[str, str]:
        self.returncode = verify.main(json.loads(arguments))
        return "", ""


@contextmanager
def brief() -> Iterator[None]:
    """Inside, speed is timed in two short turns, and exports are verified in this process."""

    def short(*models: Any, **_: Any) -> dict[str, Any]:
        return speed.compare_speed(*models, batch_size=2, prompt_length=16, steps=2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed.take_turns, "__kwdefaults__", {"least": 2, "most": 2, "seconds": 0.0})
        patch.setattr(speed, "WARM_SECONDS", 0.0)
        patch.setattr(stage_work, "compare_speed", short)
        patch.setattr(stage_work, "fresh_process", lambda: nullcontext(Here()))
        yield


def finished(tmp_path_factory: pytest.TempPathFactory, *overrides: str, until: str = "report") -> Path:
    """The folder of a finished run by these overrides: made once for all workers, to be copied and not changed."""
    base = tmp_path_factory.getbasetemp()
    if base.name.startswith("popen-"):  # a worker of pytest-xdist has a folder of its own below the session's
        base = base.parent
    place = base / "finished" / hashlib.sha256(json.dumps([*overrides, until]).encode()).hexdigest()[:12]
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / "lock"):
        if not (place / "made").exists():
            run(place, *overrides, until=until)
            (place / "made").touch()
    return place / "quickstart"


def begun(tmp_path_factory: pytest.TempPathFactory, runs: Path, *overrides: str) -> RunDirectory:
    """In `runs`, a run by these overrides that stands before its training: a copy of the finished one.

    The text that it is trained on is written.
    """
    directory = RunDirectory(shutil.copytree(finished(tmp_path_factory, *overrides), runs / "quickstart"))
    for each in directory.train.iterdir():
        if each.name != "data":
            shutil.rmtree(each) if each.is_dir() else each.unlink()
    for folder in (directory.after, directory.deploy, directory.report):
        shutil.rmtree(folder)
    directory.epochs.unlink()
    return directory
