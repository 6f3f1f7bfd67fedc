"""Rows of faults.py that hurt a training, or what it wrote: each function is one trial, and says what was wrong."""

from __future__ import annotations

import errno
import math
import shutil
import signal
import time
from pathlib import Path
from random import Random
from typing import Any

import faulty
import faulty_launch
import faulty_peers
import torch
from fault_dealing import Trial

from recover.base.artifacts import read_json
from recover.run.directory import RunDirectory
from recover.train.checkpoints import Checkpoints

STEPS = 3  # of the training; each of two micro-steps
ERRORS = (errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.ENOENT)
ONE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
SIGNALS: tuple[list[int], ...] = (*([number] for number in ONE), [signal.SIGTERM, signal.SIGTERM])
SETTINGS: tuple[dict[str, Any], ...] = (
    *({"micro_batch_size": size} for size in (4, 8, 2)),
    {"lora": {"rank": 4}},
    {"gradient_checkpointing": True},
    {"lora": {"rank": 4, "dropout": 0.2, "blocks": "after_cut"}},
    *({"dtype": torch.bfloat16, **more} for more in ({}, {"micro_batch_size": 2}, {"lora": {"rank": 4}})),
    {"scheduler": "linear", "weight_decay": 0.1},
    {"scheduler": "constant", "max_grad_norm": 0.1},
    {"save_steps": None, "epochs": 3},
)
STOPS = [
    (changes, micro_step)
    for changes in SETTINGS
    for micro_step in range(1, STEPS * 8 // changes.get("micro_batch_size", 4) + 1)
]
WORLDS = [("plain", 1), ("plain", 2), ("zero2", 2), ("zero3", 2), ("plain", 4)]
MOVES = [(before, after) for before in WORLDS for after in WORLDS if before != after]
FULL = 50  # moments at which the disk is full
FILES = ("trained.safetensors", "state.json", "MANIFEST.json")  # of a checkpoint
SAVES = 5  # of a writer that is watched


class Bench:
    """A folder for trials, and what the training gives when nothing happens, made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.measured: dict[str, float] = {}
        self.made: dict[str, Any] = {}
        started = time.perf_counter()
        self.expected = self.straight()
        self.seconds = time.perf_counter() - started
        self.calls, self.written = faulty.disk_calls(root / "calls")

    def once(self, name: str, make: Any) -> Any:
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def straight(self, **changes: Any) -> dict[str, torch.Tensor]:
        def make() -> dict[str, torch.Tensor]:
            folder = self.folder("straight")
            code, output = faulty.run(folder, **changes)
            assert code == 0, output
            return faulty.adapter(folder)

        return self.once(f"straight {changes}", make)

    def launch_seconds(self, engine: str) -> float:
        return self.once(f"launch {engine}", lambda: faulty_peers.seconds_of(self.folder(f"launch-{engine}"), engine))

    def checkpoints(self) -> tuple[Path, str]:
        """A folder with two checkpoints of a real training, whole again each time, and its fingerprint."""

        def make() -> Path:
            folder = self.folder("whole")
            code, output = faulty.stopped_at(folder, 2 * STEPS)
            assert code == 128 + signal.SIGTERM, output
            return folder / "train"

        folder = self.folder("damaged")
        shutil.copytree(self.once("checkpoints", make), folder)
        return folder, read_json(folder / "training.json")["fingerprint"]

    def folder(self, name: str) -> Path:
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def goes_on(self, folder: Path) -> Trial:
        return faulty.newest_is_listed(folder / "train") or faulty.goes_on(folder, self.expected)


def killed_at_any_time(bench: Bench, _number: int, draw: Random) -> Trial:
    folder = bench.folder("killed")
    code = faulty.interrupted(folder, [signal.SIGKILL], draw.uniform(0, 1.1 * bench.seconds))
    return bench.goes_on(folder) if code in (0, -signal.SIGKILL) else f"exit code {code}"


def killed_at_every_call(bench: Bench, number: int, _draw: Random) -> Trial:
    folder = bench.folder("call")
    code, output = faulty.on_disk(folder, faulty.Disk(at=number + 1))
    problem = bench.goes_on(folder) if code == -signal.SIGKILL else f"exit code {code}: {output}"
    return problem and f"call {number + 1}: {problem}"


def disk_full(bench: Bench, number: int, _draw: Random) -> Trial:
    folder = bench.folder("full")
    code, output = faulty.on_disk(folder, faulty.Disk(room=number * bench.written // FULL))
    named = code == 1 and "disk full" in output and "bytes to write" in output
    return bench.goes_on(folder) if named else f"exit code {code}: {output}"


def disk_error(bench: Bench, number: int, draw: Random) -> Trial:
    folder, error = bench.folder("error"), ERRORS[number % len(ERRORS)]
    at = draw.randint(1, bench.calls)
    code, output = faulty.on_disk(folder, faulty.Disk(at=at, error=error))
    ours = code == 0 or (code == 1 and "ArtifactError" in output)
    problem = bench.goes_on(folder) if ours else f"exit code {code}: {output}"
    return problem and f"{errno.errorcode[error]} at call {at}: {problem}"


def signalled(bench: Bench, number: int, draw: Random) -> Trial:
    folder, signals = bench.folder("signal"), SIGNALS[number % len(SIGNALS)]
    after, between = draw.uniform(0.02, bench.seconds), draw.uniform(0, 0.05)
    code = faulty.interrupted(folder, signals, after, between)
    # A second signal kills, and so does the first one before the command has taken its handlers.
    kills = len(signals) > 1 or not (folder / "train").exists()
    allowed = (0, 128 + signals[0], *((-signals[0],) if kills else ()))
    return bench.goes_on(folder) if code in allowed else f"signals {signals} after {after:.3f} s: exit code {code}"


def flipped(bench: Bench, number: int, draw: Random) -> Trial:
    recover, fingerprint = bench.checkpoints()
    newest = Checkpoints(recover, fingerprint).newest()
    assert newest is not None
    assert sorted(path.name for path in newest[0].iterdir()) == sorted(FILES)
    path = newest[0] / FILES[number % len(FILES)]
    data = bytearray(path.read_bytes())
    bit = draw.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    found = Checkpoints(recover, fingerprint).newest()
    taken = None if found is None else found[0].name
    return None if taken not in (newest[0].name, None) else f"{path.name} bit {bit}: {taken} was taken"


def damaged(bench: Bench, number: int, draw: Random) -> Trial:
    recover, fingerprint = bench.checkpoints()
    newest, older = sorted((recover / "checkpoints").iterdir(), reverse=True)[:2]
    path, same, kind = newest / draw.choice(FILES), b"", number % 6
    data = path.read_bytes()
    if kind == 0:
        path.write_bytes(data[: draw.randrange(len(data))])
    elif kind == 1:
        path.write_bytes(data + draw.randbytes(draw.randint(1, 64)))
    elif kind == 2:
        path.unlink()
    elif kind == 3:
        same = (older / path.name).read_bytes()
        path.write_bytes(same)
    elif kind == 4:
        (newest / f"{draw.random()}.bin").write_bytes(data)
    else:
        path.write_bytes(data[: len(data) // 2] + draw.randbytes(16) + data[len(data) // 2 + 16 :])
    found = Checkpoints(recover, fingerprint).newest()
    taken = None if found is None else found[0].name
    return None if taken == older.name or same == data else f"damage {kind} to {path.name}: {taken} was taken"


def stopped_anywhere(bench: Bench, number: int, _draw: Random) -> Trial:
    changes, micro_step = STOPS[number]
    expected, folder = bench.straight(**changes), bench.folder("stopped")
    code, output = faulty.stopped_at(folder, micro_step, **changes)
    stopped = code == 128 + signal.SIGTERM
    problem = faulty.goes_on(folder, expected, **changes) if stopped else f"exit code {code}: {output}"
    return problem and f"{changes}, micro-step {micro_step}: {problem}"


def other_world(bench: Bench, number: int, _draw: Random) -> Trial:
    before, after = MOVES[number]
    folder = bench.folder("world")
    folder.mkdir()
    problem = faulty_launch.moved(folder, before, after)
    return problem and f"{before} -> {after}: {problem}"


def lost_process(bench: Bench, number: int, draw: Random) -> Trial:
    """Half of the trials kill one of two at a random time, half raise in a random micro-step."""
    engine, folder = ("plain", "zero2", "zero3")[number % 3], bench.folder("lost")
    rank = draw.randrange(faulty_peers.PROCESSES)
    if number // 3 % 2:
        micro_step = draw.randint(1, faulty_peers.MICRO_STEPS)
        what = f"{engine}, process {rank} raised in micro-step {micro_step}"
        problem, seconds = faulty_peers.lost(folder, engine, faulty_peers.in_step, f"{rank}", f"{micro_step}", "raise")
    else:
        after = draw.uniform(0, bench.launch_seconds(engine))
        what = f"{engine}, process {rank} killed after {after:.3f} s"
        problem, seconds = faulty_peers.lost(folder, engine, faulty_peers.killed(rank, after))
    bench.measured["seconds until all processes were gone"] = seconds
    return problem and f"{what}: {problem}"


def not_finite(bench: Bench, number: int, draw: Random) -> Trial:
    values, places = (math.nan, math.inf, -math.inf, 1e38), list(faulty.POISONS)
    where, value = places[number % len(places)], values[number // len(places) % len(values)]
    folder, micro_step = bench.folder("nan"), draw.randint(1, 2 * STEPS)
    code, output = faulty.poisoned_at(folder, where, value, range(micro_step, micro_step + 1))
    if code != 0:
        return f"{value} in {where}, micro-step {micro_step}: exit code {code}: {output}"
    training, weights = read_json(folder / "train/training.json"), faulty.adapter(folder)
    right = training["skipped"] == 1 or (value == 1e38 and training["skipped"] == 0)
    finite = all(bool(weight.isfinite().all()) for weight in weights.values())
    return None if right and finite else f"{value} in {where}: {training['skipped']} steps were skipped"


def one_writer(bench: Bench, number: int, draw: Random) -> Trial:
    """A second writer is refused while the first saves; a reader sees whole checkpoints, and never an older one."""
    folder = bench.folder("shared")
    if number % 2:
        with RunDirectory(folder).lock():
            code, output = faulty.run(bench.folder("second"), lambda: RunDirectory(folder).lock().__enter__())
        return None if code == 1 else f"the second writer ended with {code}: {output}"
    size = draw.randint(1, 400_000)

    def write() -> None:
        for step in range(1, SAVES + 1):
            Checkpoints(folder, "run").save(step, {"weight/a": torch.full((size,), float(step))}, {"row": 0})

    Checkpoints(folder, "run").save(0, {"weight/a": torch.zeros(size)}, {"row": 0})
    process, problem, seen = faulty.start(write, bench.root / "writer.log"), None, 0
    try:
        while seen < SAVES and problem is None:
            found = Checkpoints(folder, "run").newest()
            if found is None or found[1]["step"] < seen:
                problem = f"after step {seen} a reader found {found and found[0].name}"
            else:
                seen = found[1]["step"]
    finally:
        code = faulty.end(process)
    return problem or (f"the writer ended with {code}" if code else None)
