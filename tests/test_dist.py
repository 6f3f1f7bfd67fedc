"""Two real processes over gloo: values, order, and failures are the same on both."""

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import faulty
import pytest

from recover.base import dist
from recover.base.errors import PruneError, StopRequested
from recover.base.process import graceful_stop

PROCESSES = 2


def work() -> dict[str, Any]:
    """What each process does; run by `processes`, its results compared by the tests."""
    dist.start()
    dist.start()  # again: nothing
    found: dict[str, Any] = {
        "rank": dist.rank(),
        "world": dist.world_size(),
        "main": dist.is_main(),
        "device": str(dist.device()),
    }

    found["on_main"] = dist.on_main(lambda: {"from": dist.rank()})
    found["on_main_nested"] = dist.on_main(lambda: [go_first(), dist.on_main(lambda: "inner")])
    found["on_main_unpicklable"] = failure(lambda: dist.on_main(lambda: threading.Lock()))
    found["on_main_failure"] = failure(lambda: dist.on_main(lambda: refuse(PruneError("prune.count: too many"))))
    found["on_main_stop"] = failure(lambda: dist.on_main(lambda: refuse(StopRequested(15))))
    found["on_main_strange"] = failure(lambda: dist.on_main(lambda: refuse(Strange("a", "b"))))

    found["everywhere"] = dist.everywhere(lambda: dist.rank() * 10)
    found["everywhere_failure"] = failure(
        lambda: dist.everywhere(lambda: dist.rank() == 1 and refuse(PruneError("only on 1")))
    )

    order = []
    with dist.main_first():
        if dist.is_main():
            time.sleep(0.2)
        order.append(time.time())
    found["first"] = dist.gather(order)
    found["main_first_failure"] = failure(enter_and_fail_on_main)

    found["broadcast"] = dist.broadcast({"rank": dist.rank()})
    found["gather"] = {
        str(count): dist.gather([f"item {item}" for item in dist.shard(range(count))]) for count in (0, 1, 2, 5)
    }
    found["over"] = dist.over(range(5), lambda mine: [[item, dist.rank()] for item in mine])
    found["over_failure"] = failure(
        lambda: dist.over(range(2), lambda mine: 1 in mine and refuse(PruneError("item 1")))
    )
    share = {"a": 0.1 + dist.rank(), "b": 1e16 if dist.is_main() else 1.0}
    found["sum"] = dist.sum_over_ranks(share if dist.is_main() else {**share, "late": 2})
    dist.barrier()
    found["after"] = dist.on_main(lambda: "still in step")
    dist.stop()
    dist.stop()
    return found


def go_first() -> str:
    with dist.main_first():
        return "first"


class Strange(Exception):
    """Cannot be rebuilt from its message, as many exceptions of libraries cannot."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


def refuse(error: BaseException) -> None:
    raise error


def enter_and_fail_on_main() -> None:
    with dist.main_first():
        refuse(PruneError("inside"))


def failure(function: Any) -> list[str]:
    try:
        function()
    except BaseException as error:
        return [type(error).__name__, str(error), *getattr(error, "__notes__", [])]
    return ["no failure"]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")

    def told(rank: int) -> None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        (folder / f"{rank}.json").write_text(json.dumps(work()))

    faulty.together(told, folder, PROCESSES)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


def both(processes: list[dict[str, Any]], name: str) -> list[Any]:
    return [found[name] for found in processes]


def test_each_knows_who_it_is(processes: list[dict[str, Any]]) -> None:
    assert both(processes, "rank") == [0, 1] and both(processes, "main") == [True, False]
    assert both(processes, "world") == [2, 2] and both(processes, "device") == ["cpu", "cpu"]


def test_on_main_runs_there_and_answers_everywhere(processes: list[dict[str, Any]]) -> None:
    assert both(processes, "on_main") == [{"from": 0}] * 2
    assert both(processes, "after") == ["still in step"] * 2
    assert both(processes, "on_main_nested") == [["first", "inner"]] * 2  # what waits for others waits for no one there


def test_a_failure_on_main_is_raised_everywhere(processes: list[dict[str, Any]]) -> None:
    note = "raised on another process, and passed on to this one"
    for name, error in [
        ("on_main_failure", ["PruneError", "prune.count: too many"]),
        ("on_main_stop", ["StopRequested", str(StopRequested(15))]),
        ("main_first_failure", ["PruneError", "inside"]),
    ]:
        assert both(processes, name) == [error, [*error, note]]
    assert both(processes, "on_main_strange") == [["Strange", "ab"], ["RuntimeError", "Strange: ab", note]]
    unpicklable = ["TypeError", "cannot pickle '_thread.lock' object"]
    assert both(processes, "on_main_unpicklable") == [unpicklable, [*unpicklable, note]]


def test_a_failure_on_any_process_is_raised_on_all(processes: list[dict[str, Any]]) -> None:
    assert both(processes, "everywhere") == [0, 10]
    assert [error[:2] for error in both(processes, "everywhere_failure")] == [["PruneError", "only on 1"]] * 2


def test_main_goes_first(processes: list[dict[str, Any]]) -> None:
    first, second = processes[0]["first"]
    assert first < second


def test_values_travel_and_keep_their_order(processes: list[dict[str, Any]]) -> None:
    assert both(processes, "broadcast") == [{"rank": 0}] * 2
    for found in both(processes, "gather"):
        assert found == {str(count): [f"item {item}" for item in range(count)] for count in (0, 1, 2, 5)}


def test_items_are_dealt_out_and_results_come_back_in_order(processes: list[dict[str, Any]]) -> None:
    assert both(processes, "over") == [[[0, 0], [1, 1], [2, 0], [3, 1], [4, 0]]] * 2
    assert [error[:2] for error in both(processes, "over_failure")] == [["PruneError", "item 1"]] * 2


def test_sums_are_of_all_and_equal_to_the_last_bit(processes: list[dict[str, Any]]) -> None:
    assert both(processes, "sum") == [{"a": math.fsum([0.1, 1.1]), "b": 1e16, "late": 2.0}] * 2


def test_one_process_needs_no_group() -> None:
    dist.start()
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    assert dist.on_main(lambda: 1) == dist.everywhere(lambda: 1) == dist.broadcast(1) == 1
    assert dist.gather(dist.shard([1, 2, 3])) == [1, 2, 3]
    assert dist.sum_over_ranks({"a": 1}) == {"a": 1.0}
    dist.barrier()
    with dist.main_first():
        pass
    for run in (dist.on_main, dist.everywhere):
        with pytest.raises(PruneError):
            run(lambda: refuse(PruneError("no")))
    dist.stop()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("code", [0, 143])
def test_a_process_leaves_with_its_code_and_all_it_has_said(world: int, code: int) -> None:
    """With a thread that would keep the interpreter from ending, as the collectives' own may."""
    script = f"""
import atexit, sys, threading
from recover.base import dist
atexit.register(lambda: print("exit function"))
if {world} > 1:
    threading.Thread(target=threading.Event().wait).start()
print("said", end=" ")
print("error", file=sys.stderr)
dist.leave({code})
"""
    environment = {**os.environ, "WORLD_SIZE": str(world)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "said exit function\n", "error\n")


@pytest.mark.parametrize(("words", "code"), [(["--version"], 0), (["run", "nowhere.yaml"], 2), (["nothing"], 2)])
def test_the_command_of_a_launched_process_ends_with_its_code(words: list[str], code: int) -> None:
    command = [sys.executable, "-m", "recover", *words]
    found = [
        subprocess.run(command, env={**os.environ, **extra}, capture_output=True, text=True, timeout=60, check=False)
        for extra in ({}, {"WORLD_SIZE": "2", "RANK": "0"})
    ]
    assert [done.returncode for done in found] == [code, code]
    assert found[0].stdout == found[1].stdout


def test_before_the_group_is_up_the_environment_says_who(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (dist.rank(), dist.world_size(), dist.local_rank(), dist.is_main()) == (3, 4, 1, False)
    assert dist.shard(list(range(10))) == [3, 7]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_with_its_exit_code_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    cleaned = False
    with pytest.raises(StopRequested) as stopped, graceful_stop():
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            cleaned = True
            assert signal.getsignal(number) is signal.SIG_DFL  # a second one kills
    assert stopped.value.exit_code == 128 + number and cleaned
    assert signal.getsignal(number) is before
    assert pickle.loads(pickle.dumps(stopped.value)).exit_code == 128 + number


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    entered = []

    def inside() -> None:
        with graceful_stop():
            entered.append(True)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert entered == [True]
