"""A stage is done when its stamp fits; a run directory has one writer."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recover.base.errors import ArtifactError
from recover.run.directory import RunDirectory


def test_stale_reason_names_the_field(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    marks: dict[str, Any] = {
        "prune": {"kind": "depth", "count": 4, "blocks": None},
        "train": {"data": [{"share": 1.0}]},
    }
    assert run.done("prune") is None and run.stale_reason("prune", marks) == "not done yet"
    run.mark_done("prune", marks)
    assert run.stale_reason("prune", marks) is None
    assert run.stale_reason("prune", {**marks, "prune": {**marks["prune"], "count": 5}}) == "prune.count: 4 -> 5"
    assert run.stale_reason("prune", {**marks, "train": {"data": [{"share": 2.0}]}}) == "train.data.0.share: 1.0 -> 2.0"
    assert run.stale_reason("prune", {**marks, "seed": "a"}) == "seed: absent -> a"
    listed = {**marks, "prune": {"kind": "depth", "count": None, "blocks": (2, 3)}}
    assert run.stale_reason("prune", listed) == "prune.count: 4 -> null; prune.blocks: null -> [2, 3]"
    assert run.stale_reason("prune", {}).endswith("; and 2 more")  # type: ignore[union-attr]
    run.unmark("prune")
    run.unmark("prune")
    assert run.stale_reason("prune", marks) == "not done yet"


def test_two_runs_of_a_stage_have_different_stamps(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    stamps = []
    for _ in range(2):
        run.mark_done("export", {})
        stamps.append(run.done("export")["finished"])  # type: ignore[index]
    assert stamps[0] != stamps[1] and (tmp_path / "deploy" / "DONE.json").exists()


def test_a_broken_stamp_is_named(tmp_path: Path) -> None:
    (tmp_path / "prune").mkdir()
    (tmp_path / "prune" / "DONE.json").write_text(json.dumps({"fingerprint": "?"}))
    with pytest.raises(ArtifactError, match=r"DONE\.json: not a stamp"):
        RunDirectory(tmp_path).done("prune")


HOLDER = """
import sys
from pathlib import Path
from recover.run.directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_writer_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdin is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ArtifactError, match=f"process {holder.pid} works on this run"):
        with RunDirectory(tmp_path).lock():
            pass
    holder.kill()
    holder.communicate()
    (tmp_path / ".deploy.replaced").mkdir()
    (tmp_path / ".deploy.replaced" / "a.txt").write_text("old")
    with RunDirectory(tmp_path).lock():
        assert (tmp_path / "deploy" / "a.txt").read_text() == "old"
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
