"""Threads wait asleep before torch is loaded, and what the user has set stays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import faulty
import pytest
import torch

from recover.base import process

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
        [sys.executable, "-c", SAID % (process.WAITING,)],
        env={**kept, **given},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_threads_wait_asleep() -> None:
    assert environment_of_run()["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize("name", process.WAITING)
def test_what_the_user_says_of_waiting_stays(name: str) -> None:
    found = environment_of_run(**{name: "10"})
    assert found == {other: "10" if other == name else None for other in process.WAITING}


def test_threads_are_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    for name in process.WAITING:
        monkeypatch.delenv(name, raising=False)
    assert process.described_threads() == {"number": torch.get_num_threads(), "OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize(("before", "kind", "said"), [(3, "cpu", True), (None, "cpu", False), (3, "cuda", False)])
def test_going_on_with_other_threads_is_said(
    before: int | None, kind: str, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    from recover.train.course import say_other_threads

    say_other_threads(Path("checkpoint-2"), before, torch.device(kind))
    assert ("OMP_NUM_THREADS=3" in " ".join(capsys.readouterr().out.split())) == said


def test_the_fastest_number_is_taken_where_it_is_clearly_faster() -> None:
    assert process.fastest({1: 10.0, 2: 1.0}, own=2) == 1
    assert process.fastest({1: 10.0, 2: 9.0}, own=2) == 2  # torch's own, as long as it is about as good
    assert process.fastest({1: 1.0, 2: 1.9, 4: 3.6, 8: 3.7}, own=8) == 8
    assert process.fastest({1: 1.0, 2: 1.9, 4: 3.6, 8: 0.4}, own=8) == 4


def test_the_user_the_run_and_the_launcher_decide_before_a_timing(tmp_path: Path) -> None:
    shown = "1 of 4 threads of torch (speed by threads, 1: 100%, 2: 40%, 4: 10%; OMP_NUM_THREADS sets it)"
    cases: list[tuple[list[int], dict[str, str], str]] = [
        ([], {}, f"{shown} 1 [([1, 2, 4], 64, 128)]"),
        ([2], {}, "2 []"),  # as the run was begun
        ([9], {}, "4 []"),
        ([], {"OMP_NUM_THREADS": "4"}, "4 []"),
        ([1], {"OMP_NUM_THREADS": "4"}, "4 []"),
        ([], {"MKL_NUM_THREADS": "4"}, "4 []"),
        ([], {"WORLD_SIZE": "2"}, "4 []"),
    ]

    def choose() -> None:  # in a fork: the number is the whole process's
        for name in [name for name in os.environ if name.startswith(("OMP_", "MKL_"))]:
            del os.environ[name]
        rates = {1: 10.0, 2: 4.0, 4: 1.0}
        timed: list[tuple[list[int], int, int]] = []
        process.rates_of = lambda numbers, width, inner: timed.append((numbers, width, inner)) or rates
        for before, given, _ in cases:
            os.environ.update(given)
            torch.set_num_threads(4)
            process.choose_threads(64, 128, *before)
            print(torch.get_num_threads(), timed)
            timed.clear()
            for name in given:
                del os.environ[name]

    code, said = faulty.run(tmp_path / "chosen", choose)
    assert code == 0 and " ".join(said.split()) == " ".join(case[2] for case in cases), said


def test_every_number_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "SECONDS", 0.06)
    before = torch.get_num_threads()
    try:
        rates = process.rates_of([1, 2], 112, 300)
        assert list(rates) == [1, 2] and min(rates.values()) > 0
    finally:
        torch.set_num_threads(before)


def test_a_run_keeps_the_number_that_it_began_with(tmp_path: Path) -> None:
    from recover.base import provenance
    from recover.run.directory import RunDirectory

    run = RunDirectory(tmp_path)
    assert run.threads() is None
    environment = {"machine": {"cores": provenance.cores()}, "threads": {"number": 3}}
    run.env.write_text(json.dumps(environment))
    assert run.threads() == 3
    run.env.write_text(json.dumps({**environment, "machine": {"cores": 1000}}))
    assert run.threads() is None  # of another machine
