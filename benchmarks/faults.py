"""Inject each fault many times into a tiny real training, and say how often nothing was lost.

    PYTHONPATH=.:tests OMP_NUM_THREADS=1 python benchmarks/faults.py            # all rows, as often as in the table
    PYTHONPATH=.:tests OMP_NUM_THREADS=1 python benchmarks/faults.py R1 R7 --share 0.1

A trial survives if the same command, given again, ends with the bits of a training that nothing happened to, and
leaves nothing behind; or if what is wrong is refused by name. Every training is a process (a fork of this one).
"""

from __future__ import annotations

import argparse
import errno
import math
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fault_inputs
import faulty
import faulty_launch
import torch

from recover import console
from recover.artifacts import read_json, read_jsonl, settle
from recover.run_directory import RunDirectory
from recover.train.checkpoints import Checkpoints

Trial = str | None  # what was wrong, or None
RANDOM = random.Random(1)
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


class Bench:
    """A folder for trials, and what the training gives when nothing happens."""

    def __init__(self, root: Path) -> None:
        self.root = root
        started = time.perf_counter()
        self.expected = self.straight()
        self.seconds = time.perf_counter() - started
        self.calls, self.written = faulty.disk_calls(root / "calls")

    def straight(self, **changes: Any) -> dict[str, torch.Tensor]:
        folder = self.folder("straight")
        code, output = faulty.run(folder, **changes)
        assert code == 0, output
        return faulty.adapter(folder)

    def folder(self, name: str) -> Path:
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def goes_on(self, folder: Path) -> Trial:
        return newest_is_listed(folder) or faulty.goes_on(folder, self.expected)


def newest_is_listed(folder: Path) -> Trial:
    """Nothing that was published is lost: the newest that verifies is the newest of the list, or newer."""
    recover = folder / "recover"
    if not (recover / "checkpoints.jsonl").exists() or not (recover / "checkpoints").exists():
        return None
    settle(folder)
    if read_json(recover / "training.json")["finished"]:
        return None
    last = [line["step"] for line in read_jsonl(recover / "checkpoints.jsonl")][-1:]
    found = Checkpoints(recover, read_json(recover / "training.json")["fingerprint"]).newest()
    return None if not last or (found is not None and found[1]["step"] >= last[0]) else f"step {last[0]} was lost"


def killed_at_any_time(bench: Bench, trials: int) -> Iterator[Trial]:
    for _ in range(trials):
        folder = bench.folder("killed")
        code = faulty.interrupted(folder, [signal.SIGKILL], RANDOM.uniform(0, 1.1 * bench.seconds))
        yield bench.goes_on(folder) if code in (0, -signal.SIGKILL) else f"exit code {code}"


def killed_at_every_call(bench: Bench, trials: int) -> Iterator[Trial]:
    for at in range(1, bench.calls + 1, max(1, bench.calls // trials)):
        folder = bench.folder("call")
        code, output = faulty.on_disk(folder, faulty.Disk(at=at))
        problem = bench.goes_on(folder) if code == -signal.SIGKILL else f"exit code {code}: {output}"
        yield problem and f"call {at}: {problem}"


def disk_full(bench: Bench, trials: int) -> Iterator[Trial]:
    for trial in range(trials):
        folder = bench.folder("full")
        code, output = faulty.on_disk(folder, faulty.Disk(room=trial * bench.written // trials))
        named = code == 1 and "disk full" in output and "bytes to write" in output
        yield bench.goes_on(folder) if named else f"exit code {code}: {output}"


def disk_error(bench: Bench, trials: int) -> Iterator[Trial]:
    for trial in range(trials):
        folder, number = bench.folder("error"), ERRORS[trial % len(ERRORS)]
        at = RANDOM.randint(1, bench.calls)
        code, output = faulty.on_disk(folder, faulty.Disk(at=at, error=number))
        ours = code == 0 or (code == 1 and "ArtifactError" in output)
        problem = bench.goes_on(folder) if ours else f"exit code {code}: {output}"
        yield problem and f"{errno.errorcode[number]} at call {at}: {problem}"


def signalled(bench: Bench, trials: int) -> Iterator[Trial]:
    for trial in range(trials):
        folder, numbers = bench.folder("signal"), SIGNALS[trial % len(SIGNALS)]
        after, between = RANDOM.uniform(0.02, bench.seconds), RANDOM.uniform(0, 0.05)
        code = faulty.interrupted(folder, numbers, after, between)
        # A second signal kills, and so does the first one before the command has taken its handlers.
        kills = len(numbers) > 1 or not (folder / "recover").exists()
        allowed = (0, 128 + numbers[0], *((-numbers[0],) if kills else ()))
        yield bench.goes_on(folder) if code in allowed else f"signals {numbers}: exit code {code}"


def checkpoints_of_a_run(bench: Bench) -> tuple[Path, str]:
    """A folder with two checkpoints of a real training, and its fingerprint."""
    folder = bench.folder("damaged")
    code, output = faulty.stopped_at(folder, 2 * STEPS)
    assert code == 128 + signal.SIGTERM, output
    return folder / "recover", read_json(folder / "recover/training.json")["fingerprint"]


def flipped(bench: Bench, trials: int) -> Iterator[Trial]:
    recover, fingerprint = checkpoints_of_a_run(bench)
    newest = Checkpoints(recover, fingerprint).newest()
    assert newest is not None
    for path in sorted(newest[0].iterdir()):
        whole = path.read_bytes()
        for _ in range(trials):
            bit = RANDOM.randrange(8 * len(whole))
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            found = Checkpoints(recover, fingerprint).newest()
            taken = None if found is None else found[0].name
            yield None if taken != newest[0].name and taken is not None else f"{path.name} bit {bit}: {taken} was taken"
        path.write_bytes(whole)
    assert Checkpoints(recover, fingerprint).newest() == newest


def damaged(bench: Bench, trials: int) -> Iterator[Trial]:
    recover, fingerprint = checkpoints_of_a_run(bench)
    newest, older = sorted((recover / "checkpoints").iterdir(), reverse=True)[:2]
    kept = bench.folder("kept")
    shutil.copytree(recover, kept)
    for trial in range(trials):
        path, same = newest / RANDOM.choice(["trained.safetensors", "state.json", "MANIFEST.json"]), b""
        data = path.read_bytes()
        kind = trial % 6
        if kind == 0:
            path.write_bytes(data[: RANDOM.randrange(len(data))])
        elif kind == 1:
            path.write_bytes(data + RANDOM.randbytes(RANDOM.randint(1, 64)))
        elif kind == 2:
            path.unlink()
        elif kind == 3:
            same = (older / path.name).read_bytes()
            path.write_bytes(same)
        elif kind == 4:
            (newest / f"{RANDOM.random()}.bin").write_bytes(data)
        else:
            path.write_bytes(data[: len(data) // 2] + RANDOM.randbytes(16) + data[len(data) // 2 + 16 :])
        found = Checkpoints(recover, fingerprint).newest()
        taken = None if found is None else found[0].name
        yield None if taken == older.name or same == data else f"damage {kind} to {path.name}: {taken} was taken"
        shutil.rmtree(recover)
        shutil.copytree(kept, recover)


def stopped_anywhere(bench: Bench, trials: int) -> Iterator[Trial]:
    for changes in SETTINGS[: max(1, trials)]:
        expected = bench.straight(**changes)
        micro_steps = STEPS * 8 // changes.get("micro_batch_size", 4)
        for micro_step in range(1, micro_steps + 1):
            folder = bench.folder("stopped")
            code, output = faulty.stopped_at(folder, micro_step, **changes)
            stopped = code == 128 + signal.SIGTERM
            problem = faulty.goes_on(folder, expected, **changes) if stopped else f"exit code {code}: {output}"
            yield problem and f"{changes}, micro-step {micro_step}: {problem}"


def other_world(bench: Bench, trials: int) -> Iterator[Trial]:
    worlds = [("plain", 1), ("plain", 2), ("zero2", 2), ("zero3", 2), ("plain", 4)]
    pairs = [(before, after) for before in worlds for after in worlds if before != after]
    for before, after in pairs[:trials]:
        folder = bench.folder("world")
        folder.mkdir()
        problem = faulty_launch.moved(folder, before, after)
        yield problem and f"{before} -> {after}: {problem}"


def not_finite(bench: Bench, trials: int) -> Iterator[Trial]:
    values, places = (math.nan, math.inf, -math.inf, 1e38), list(faulty.POISONS)
    for trial in range(trials):
        where, value = places[trial % len(places)], values[trial // len(places) % len(values)]
        folder, micro_step = bench.folder("nan"), RANDOM.randint(1, 2 * STEPS)
        code, output = faulty.poisoned_at(folder, where, value, range(micro_step, micro_step + 1))
        if code != 0:
            yield f"{value} in {where}, micro-step {micro_step}: exit code {code}: {output}"
            continue
        training, weights = read_json(folder / "recover/training.json"), faulty.adapter(folder)
        right = training["skipped"] == 1 or (value == 1e38 and training["skipped"] == 0)
        finite = all(bool(weight.isfinite().all()) for weight in weights.values())
        yield None if right and finite else f"{value} in {where}: {training['skipped']} steps were skipped"


def one_writer(bench: Bench, trials: int) -> Iterator[Trial]:
    """A second writer is refused while the first saves; a reader sees whole checkpoints, and never an older one."""
    folder = bench.folder("shared")
    with RunDirectory(folder).lock():
        for _ in range(trials // 2):
            process = faulty.start(lambda: RunDirectory(folder).lock().__enter__(), bench.root / "second.log")
            code = faulty.end(process)
            yield None if code == 1 else f"the second writer ended with {code}"
    Checkpoints(folder, "run").save(0, {"weight/a": torch.zeros(200_000)}, {"row": 0})
    saves = trials - trials // 2

    def write() -> None:
        for step in range(1, saves + 1):
            Checkpoints(folder, "run").save(step, {"weight/a": torch.full((200_000,), float(step))}, {"row": 0})

    process, seen = faulty.start(write, bench.root / "writer.log"), 0
    while seen < saves:
        found = Checkpoints(folder, "run").newest()
        if found is None or found[1]["step"] < seen:
            yield f"after step {seen} a reader found {found and found[0].name}"
            break
        yield from (None for _ in range(found[1]["step"] - seen))
        seen = found[1]["step"]
    faulty.end(process)


# Row -> what is injected, how, how often.
ROWS: dict[str, tuple[str, Callable[[Bench, int], Iterator[Trial]], int]] = {
    "R1": ("SIGKILL at a random time", killed_at_any_time, 300),
    "R2": ("SIGKILL at every call that changes a file, writes torn", killed_at_every_call, 10_000),
    "R4": ("disk full after n bytes", disk_full, 50),
    "R5": ("EIO, EROFS, EDQUOT, EACCES, ENOENT at a random call", disk_error, 100),
    "R6": ("SIGTERM, SIGINT, SIGHUP, SIGUSR1, two SIGTERM at a random time", signalled, 500),
    "R7": ("bit flips in each file of the newest checkpoint", flipped, 2000),
    "R8": ("checkpoint cut, lengthened, incomplete, mixed up, overwritten", damaged, 500),
    "R9": ("SIGTERM at every micro-step, 12 settings", stopped_anywhere, 12),
    "R10": ("other number of processes, other engine", other_world, 20),
    "R12": ("NaN, infinity, 1e38 in loss, gradient, teacher, states, embeddings", not_finite, 200),
    "R16": ("recipes with wrong fields", fault_inputs.recipes, 10_000),
    "R18": ("NaN wherever no token is scored", fault_inputs.masked_rows, 500),
    "R22": ("two writers; a reader during saves", one_writer, 50),
    "R24": ("cached text of another model, seed or option", fault_inputs.stale_caches, 30),
    "R25": ("prefix shared against run twice", fault_inputs.shared_prefixes, 20),
}


def measure(bench: Bench, row: str, share: float) -> tuple[list[str], bool]:
    """The row of the table, and whether every trial survived."""
    what, inject, times = ROWS[row]
    started, survived, count = time.perf_counter(), 0, 0
    for problem in inject(bench, max(1, round(times * share))):
        count += 1
        survived += problem is None
        if problem is not None:
            print(f"{row}: {problem}", file=sys.stderr)
    seconds = time.perf_counter() - started
    print(f"{row}: {survived} of {count}, {seconds:.0f} s", file=sys.stderr)
    return [row, what, f"{survived} of {count}", f"{seconds:.0f}"], survived == count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=list(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--share", type=float, default=1.0, help="of the trials of each row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        outcomes = [measure(bench, row, options.share) for row in options.rows]
    console.table("faults", ["row", "what is injected", "survived", "seconds"], [row for row, _ in outcomes])
    raise SystemExit(0 if all(fine for _, fine in outcomes) else 1)


if __name__ == "__main__":
    main()
