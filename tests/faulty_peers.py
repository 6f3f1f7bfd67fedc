"""One of two processes of a training is lost: killed at some time, or killed or raising in the middle of a step.

torchrun --standalone --nproc_per_node 2 tests/faulty_peers.py FOLDER plain|zero2|zero3 [RANK MICRO_STEP raise|kill]
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import faulty
import faulty_launch
import two_processes

from recover.base import artifacts
from recover.train.checkpoints import STEPS
from recover.train.trainer import RecoverTrainer

PROCESSES = 2
MICRO_STEPS = 6  # of each process: three steps of two
SAVED = {"save_steps": 1}
EXIT_SECONDS = 60  # within which all must be gone
START_SECONDS = 200

Fault = Callable[[Path], float]  # waits for its moment, hurts the training in this folder; when that was, time.time()


def main(folder: Path, engine: str, *fault: str) -> None:
    """The training in each process of a launch; with a fault, one of them raises or is killed in that micro-step."""
    rank = int(os.environ["RANK"])
    artifacts.write_text(folder / f"process-{rank}", f"{os.getpid()}")

    def fail(_trainer: RecoverTrainer, number: int) -> None:
        if number == int(fault[1]):
            artifacts.write_text(folder / "hurt", f"{time.time()}")
            if fault[2] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("raised in the middle of a step")

    if fault and rank == int(fault[0]):
        faulty.count_micro_steps(fail)
    faulty_launch.main(folder, engine, **SAVED)


def wait_for(path: Path, seconds: float = START_SECONDS) -> str:
    """What is written there, once it is."""
    until = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > until:
            raise TimeoutError(f"{path} was not written within {seconds} s")
        time.sleep(0.01)
    return path.read_text()


def processes(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("process-*")]


def alive(process: int) -> bool:
    """A zombie is not: it waits for a parent that may not care."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@contextmanager
def launched(folder: Path, engine: str, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A launch that goes on meanwhile; at the end of the body all of it is killed."""
    words, environment = faulty_launch.command(__file__, folder, engine, PROCESSES, *more)
    for path in folder.glob("process-*"):
        path.unlink()
    with open(folder / "launch.log", "wb") as log:
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            for number in (process.pid, *filter(alive, processes(folder))):
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            process.wait()


def seconds_of(folder: Path, engine: str) -> float:
    """How long a launch to the end takes once both processes have imported everything."""
    folder.mkdir(parents=True)
    two_processes.write_text(folder)
    with launched(folder, engine) as process:
        for rank in range(PROCESSES):
            wait_for(folder / f"process-{rank}")
        started = time.monotonic()
        assert process.wait(START_SECONDS) == 0, (folder / "launch.log").read_text()
        return time.monotonic() - started


def killed(rank: int, after: float) -> Fault:
    """SIGKILL to one process, so many seconds after both have started."""

    def hurt(folder: Path) -> float:
        numbers = [int(wait_for(folder / f"process-{each}")) for each in range(PROCESSES)]
        time.sleep(after)
        with suppress(ProcessLookupError):
            os.kill(numbers[rank], signal.SIGKILL)
        return time.time()

    return hurt


def in_step(folder: Path) -> float:
    """For a launch that was told in which micro-step to raise or to be killed."""
    return float(wait_for(folder / "hurt"))


def lost(folder: Path, engine: str, fault: Fault, *more: str) -> tuple[str | None, float]:
    """What was wrong, or None; and how many seconds after the fault the last process was gone.

    All must be gone in time, nothing half-published; the same command given again ends as if nothing had happened.
    """
    folder.mkdir(parents=True)
    two_processes.write_text(folder)
    with launched(folder, engine, *more) as process:
        hurt = fault(folder)
        with suppress(subprocess.TimeoutExpired):
            process.wait(EXIT_SECONDS)
        while any(map(alive, processes(folder))) and time.time() < hurt + EXIT_SECONDS:
            time.sleep(0.01)
        seconds = time.time() - hurt
        left = [number for number in processes(folder) if alive(number)]
        ended = process.poll()
    output = (folder / "launch.log").read_text()
    if left or ended is None:
        return f"after {seconds:.0f} s {len(left)} processes were left, the launcher {ended}: {output}", seconds
    problem = faulty.newest_is_listed(folder / "run") or again(folder, engine)
    return problem and f"{problem}; before, with exit code {ended}: {output}", seconds


def again(folder: Path, engine: str) -> str | None:
    """The same command: goes on from what there is, and ends as one process does that nothing happened to."""
    begun = any((folder / "run" / "checkpoints").glob("checkpoint-*"))
    code, output = faulty_launch.launch(folder, engine, PROCESSES, script=__file__)
    if code != 0 or (begun and "going on from checkpoint-" not in output and "finished" not in output):
        return f"exit code {code}: {output}"
    faulty_launch.straight(folder, **SAVED)
    losses, weights = [], []
    for stage in ("run", "straight"):
        lines = artifacts.read_jsonl(folder / stage / STEPS)
        losses.append({line["step"]: line["loss"] for line in lines})
        weights.append(faulty.adapter(folder, stage))
    if [line.keys() for line in losses] != [losses[1].keys()] * 2 or weights[0].keys() != weights[1].keys():
        return f"steps {list(losses[0])}, {len(weights[0])} tensors; {list(losses[1])}, {len(weights[1])} were expected"
    pairs = [[(found[name], expected[name]) for name in expected] for found, expected in (losses, weights)]
    problem = faulty_launch.apart(*pairs)
    left = [path.name for path in (folder / "run").rglob(".*") if path.name != ".lock"]
    return problem or (f"left over: {left}" if left else None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
