"""Starting recover on several processes, as its users do: `accelerate launch` with the files of launch/, unedited."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
ON_GPUS = torch.cuda.is_available()
FILES = {"gpu": "gpu", "zero2": "zero2", "zero3": "zero3"} if ON_GPUS else {"zero2": "cpu_zero2", "zero3": "cpu_zero3"}
ENGINES = tuple(FILES)
POLL_SECONDS = 0.05
OVER = threading.Event()  # nothing is started any more
STARTING = threading.RLock()  # a signal may come while its own thread holds it
STARTED: list[subprocess.Popen[bytes]] = []  # by `Launch.start`, whether they have ended or not
OF_A_TRAINING = ("after", "deploy", "report", "report.html", "report.md", "report.json", "epochs.jsonl", "verify.json")


@dataclass(frozen=True)
class Launch:
    """`engine`: "one" for one process without a launcher, else a file of launch/; `gpu`: the one that is seen.

    Numbers of GPUs begin anew behind the last one of the machine.
    """

    engine: str
    processes: int = 1
    gpu: int | None = None

    def command(self, words: Sequence[str]) -> list[str]:
        """`words`: a script, or `-m` and a module, and its arguments."""
        if self.engine == "one":
            return [sys.executable, *words]
        file = f"launch/{FILES[self.engine]}.yaml"
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file]
        return [*launcher, "--num_processes", str(self.processes), *words]

    def start(self, words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """In a process group of its own; output to `log`, behind what is there."""
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment.setdefault("OMP_NUM_THREADS", "1")
        if self.gpu is not None and ON_GPUS:
            environment["CUDA_VISIBLE_DEVICES"] = str(self.gpu % torch.cuda.device_count())
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file, STARTING:
            if OVER.is_set():
                raise RuntimeError("the time is over")
            process = subprocess.Popen(
                self.command(words), cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )
            STARTED.append(process)
        return process

    def run(self, words: Sequence[str], log: Path) -> float:
        """To its end; the seconds it took. Raises RuntimeError with the log's end where it failed."""
        started = time.monotonic()
        code = self.start(words, log).wait()
        if code != 0:
            raise RuntimeError(f"{self}: exit code {code}: {log.read_text(errors='replace')[-1500:]}")
        return time.monotonic() - started


def tree(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The process and all below it that are there now."""
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(process.pid)
        return [first, *first.children(recursive=True)]
    return []


def kill(process: subprocess.Popen[bytes]) -> None:
    """With all below it: a launcher's processes have sessions of their own, and outlive it."""
    for each in tree(process):
        with suppress(psutil.NoSuchProcess):
            each.kill()


def end_all() -> None:
    """Start nothing more, and kill every launch that runs, with all below it: the next one has the machine alone."""
    with STARTING:
        OVER.set()
    for process in STARTED:
        if process.poll() is None:
            kill(process)


def workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The launcher's training processes, in the order of their ranks (of their start)."""
    return sorted(psutil.Process(process.pid).children(), key=lambda child: (child.create_time(), child.pid))


def until(there: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 300) -> bool:
    """Wait for it; False if the process ended before, or too much time went by."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit and process.poll() is None:
        if there():
            return True
        time.sleep(POLL_SECONDS)
    return False


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def untrained_copy(run: Path, other: Path) -> Path:
    """A run directory as it is before its recovery, but for the text, which is there: trainings learn the same."""
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(run, other)
    for name in OF_A_TRAINING:
        path = other / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in (other / "train").iterdir():
        if path.name != "data":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return other
