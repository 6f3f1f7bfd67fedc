"""The command line of recover, watched: what each stage takes on each process; or one process dies inside a function.

    accelerate launch --config_file launch/gpu.yaml benchmarks/several_gpus/watched.py --stages ROWS run RECIPE ...
    ... benchmarks/several_gpus/watched.py --kill export --victim 0 --note NOTE run RECIPE ...

ROWS.0, ROWS.1, ...: a line for each stage of that process, as it ends. NOTE: where the process was when it killed
itself. `--after FILE`: libraries are loaded at once, and all the rest waits for this file.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import psutil
import torch

from recover import cli
from recover.base import dist
from recover.base.artifacts import append_jsonl, write_json
from recover.run import stage_work, stages

# What a process is killed in: module, function, how often it is called before, and seconds that it then goes on.
PLACES = {
    "weights": ("recover.models.load", "_from_folder", 1, 0.03),  # stage plan looks at names and sizes first
    "prune": ("recover.prune.registry", "prune", 0, 0.1),
    "text": ("recover.train.written_text", "generate", 0, 0.05),
    "step": ("recover.train.trainer", "RecoverTrainer.compute_loss", 6, 0.003),
    "export": ("recover.run.stage_work", "write_checkpoint", 0, 0.01),
}
SAMPLE_SECONDS = 0.2
POLL_SECONDS = 0.02


def wait_for(file: Path) -> None:
    """Load what a run loads, then wait until the file is there."""
    _ = stage_work.WORK
    while not file.exists():
        time.sleep(POLL_SECONDS)


def kill_inside(place: str, note: Path) -> None:
    """From here on this process dies (SIGKILL) at that place, once what it is at is in `note`."""
    module, name, before, seconds = PLACES[place]
    holder: Any = importlib.import_module(module)
    *classes, name = name.split(".")
    for each in classes:
        holder = getattr(holder, each)
    work, calls = getattr(holder, name), [0]

    def watched(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        inside = threading.Event()
        if calls[0] == before + 1:
            inside.set()
            thread = threading.get_ident()
            threading.Thread(target=die, args=(seconds, thread, inside, note), daemon=True).start()
        try:
            return work(*arguments, **named)
        finally:
            inside.clear()

    setattr(holder, name, watched)


def die(seconds: float, thread: int, inside: threading.Event, note: Path) -> None:
    time.sleep(seconds)
    frames = traceback.extract_stack(sys._current_frames()[thread])
    at = [f"{Path(each.filename).name}:{each.name}" for each in frames if "/recover/" in each.filename]
    write_json(
        note, {"inside": inside.is_set(), "at": at[-6:], "innermost": frames[-1].name, "killed": time.monotonic()}
    )
    os.kill(os.getpid(), signal.SIGKILL)


class Sampler(threading.Thread):
    """The most memory in use since `reset`, sampled: all of this GPU, and of this process on the host."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.process, self.gpu, self.host = psutil.Process(), 0, 0

    def reset(self) -> None:
        self.gpu = self.host = 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def look(self) -> None:
        self.host = max(self.host, self.process.memory_info().rss)
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            self.gpu = max(self.gpu, total - free)

    def run(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_device(dist.device())
        while True:
            self.look()
            time.sleep(SAMPLE_SECONDS)


def note_stages(rows: Path) -> None:
    """From here on each stage leaves a line of what it took on this process; a stage that fails leaves one too."""
    sampler: list[Sampler] = []
    work = stages.Stage.run

    def watched(self: stages.Stage, context: Any) -> None:
        if not sampler:
            sampler.append(Sampler())
            sampler[0].start()
        sampler[0].reset()
        began, done = time.monotonic(), False
        try:
            work(self, context)
            done = True
        finally:
            sampler[0].look()
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
            line = {"stage": self.name, "done": done, "seconds": time.monotonic() - began, "tensors": peak}
            line |= {"gpu_bytes": sampler[0].gpu, "host_bytes": sampler[0].host}
            append_jsonl(rows.with_name(f"{rows.name}.{dist.rank()}"), line)

    stages.Stage.run = watched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--after", type=Path)
    parser.add_argument("--stages", type=Path)
    parser.add_argument("--kill", choices=PLACES)
    parser.add_argument("--victim", type=int, default=0, help="rank of the process that dies")
    parser.add_argument("--note", type=Path)
    parser.add_argument("words", nargs=argparse.REMAINDER, help="of recover")
    given = parser.parse_args()
    if given.stages is not None:
        note_stages(given.stages)
    if given.kill is not None and int(os.environ.get("RANK", "0")) == given.victim:
        kill_inside(given.kill, given.note)
    if given.after is not None:
        wait_for(given.after)
    sys.argv = ["recover", *given.words]
    cli.main()


if __name__ == "__main__":
    main()
