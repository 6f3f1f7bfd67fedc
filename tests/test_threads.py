"""Threads wait asleep before torch is loaded, and what the user has set stays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recover.base import threads

SAID = """
import json, os, sys
from recover import cli
cli.app = lambda **_: None
try:
    cli.main()
except SystemExit:
    pass
assert "torch" not in sys.modules
print(json.dumps({name: os.environ.get(name) for name in %r}))
"""


def environment_of_run(**given: str) -> dict[str, str | None]:
    """What the OpenMP library of a run of ours will read."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", SAID % (threads.WAITING,)],
        env={**kept, **given},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_threads_wait_asleep() -> None:
    assert environment_of_run()["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize("name", threads.WAITING)
def test_what_the_user_says_of_waiting_stays(name: str) -> None:
    found = environment_of_run(**{name: "10"})
    assert found == {other: "10" if other == name else None for other in threads.WAITING}


def test_threads_are_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    for name in threads.WAITING:
        monkeypatch.delenv(name, raising=False)
    assert threads.described() == {"number": torch.get_num_threads(), "OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize(("before", "kind", "said"), [(3, "cpu", True), (None, "cpu", False), (3, "cuda", False)])
def test_going_on_with_other_threads_is_said(
    before: int | None, kind: str, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    from recover.train.course import say_other_threads

    say_other_threads(Path("checkpoint-2"), before, torch.device(kind))
    assert ("OMP_NUM_THREADS=3" in " ".join(capsys.readouterr().out.split())) == said
