"""Faults are dealt out so that every trial is tried once, and is the same one, however many processes there are."""

import math
import os
import time
from collections import Counter
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


class Bench:
    def __init__(self, number):
        self.measured, self.done = {}, 0


def drawn(bench, number, draw):
    """As a trial that fails, with what it drew; the random numbers of one trial are not those of the next."""
    bench.done += 1
    bench.measured["number"] = float(number)
    return f"{draw.random()}"


def dies(_bench, number, _draw):
    return os._exit(7) if number == 3 else None


def hangs(_bench, number, _draw):
    return time.sleep(60) if number == 3 else None


def breaks(_bench, number, _draw):
    return str(1 // (number - 3)) and None


def deal(rows, jobs, until=math.inf, share=1.0):
    from fault_dealing import Dealer, hands

    found = []
    Dealer(Bench, rows, jobs, until).deal(hands(rows, share), found.append)
    return found


def row(trial, times, **more):
    from fault_dealing import Row, each

    return Row("a fault", each(trial), times, **{"seconds": 1.0, **more})


def test_each_trial_is_tried_once_and_is_the_same_on_any_number_of_processes():
    rows = {"A": row(drawn, 20), "B": row(drawn, 7, hand=3), "C": row(drawn, 4, seconds=20.0, processes=2)}
    alone, shared = ({(o.row, o.number): (o.problem, o.measured) for o in deal(rows, jobs)} for jobs in (1, 3))
    assert alone == shared
    assert Counter(name for name, _ in alone) == {"A": 20, "B": 7, "C": 4}
    assert len({problem for problem, _ in alone.values()}) == 31
    assert alone["B", 5][1] == {"number": 5.0}


def test_what_takes_long_is_dealt_first_and_the_rest_in_step():
    from fault_dealing import hands

    rows = {"A": row(drawn, 40), "B": row(drawn, 10), "C": row(drawn, 4, seconds=20.0)}
    names = [hand.row for hand in hands(rows)]
    assert names[:4] == ["C"] * 4
    assert Counter(names[4:29]) == {"A": 20, "B": 5}
    assert hands(rows) == hands(rows) != sorted(hands(rows), key=lambda hand: hand.numbers)


def test_a_share_is_a_part_of_the_whole():
    from fault_dealing import hands

    rows = {"A": row(drawn, 100)}
    part = {number for hand in hands(rows, 0.1) for number in hand.numbers}
    assert len(part) == 10 and part < set(range(100)) and max(part) > 10


@pytest.mark.parametrize(
    ("trial", "said"),
    [(dies, "worker ended with 7"), (breaks, "ZeroDivisionError"), (hangs, "did not end within")],
)
def test_what_goes_wrong_in_a_trial_is_its_failure_and_no_other_s(trial, said):
    found = {o.number: o.problem for o in deal({"A": row(trial, 8, limit=0.5)}, 2)}
    assert sorted(found) == list(range(8))
    assert [number for number, problem in found.items() if problem is not None] == [3] and said in found[3]


@pytest.mark.parametrize("trial", [breaks, dies])
def test_a_hand_goes_on_behind_the_trial_that_broke(trial):
    found = {o.number: o.problem for o in deal({"A": row(trial, 8, hand=8)}, 1)}
    assert sorted(found) == list(range(8)) and [n for n, problem in found.items() if problem] == [3]


def test_nothing_is_begun_after_the_time():
    def slow(_bench, _number, _draw):
        time.sleep(0.2)

    assert deal({"A": row(slow, 100)}, 2, until=0.0) == []
    found = deal({"A": row(slow, 100, hand=100)}, 2, until=time.time() + 0.5)
    assert 0 < len(found) < 10


def test_a_row_of_several_processes_leaves_room_for_them():
    from fault_dealing import Dealer, Hand

    rows = {"A": row(drawn, 4, processes=2), "B": row(drawn, 4)}
    dealer = Dealer(Bench, rows, 3, math.inf)
    waiting = [Hand("A", (0,)), Hand("A", (1,)), Hand("B", (0,))]
    for pipe in ("one", "two", "three"):
        dealer.busy[pipe] = dealer.pick(waiting)
    assert dealer.busy == {"one": Hand("A", (0,)), "two": Hand("B", (0,)), "three": None}
    assert waiting == [Hand("A", (1,))]


def test_the_report_counts_and_keeps_what_failed(tmp_path, capsys):
    from fault_dealing import Outcome
    from fault_report import FAILURES, Report

    from recover.base.artifacts import read_json

    report = Report({"A": row(drawn, 100)}, tmp_path / "faults.json", {"jobs": 2}, time.time())
    for number in range(50):
        report.keep(Outcome("A", number, "lost" * 1000 if number % 2 else None, 0.5, {"seconds": float(number)}))
    report.write()
    found = read_json(tmp_path / "faults.json")["rows"]["A"]
    assert (found["survived"], found["tried"], found["intended"]) == (25, 50, 100)
    assert len(found["failures"]) == FAILURES and found["failures"][0] == "trial 1: " + "lost" * 1000
    assert "| A | a fault; seconds: at most 49.0 | 25 of 50 (of 100) | 25 |" in report.table()
    assert not report.fine()
