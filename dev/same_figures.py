"""Proves that a change of form changed no figure: all figures of small jobs before and after it, compared bit by bit.

    python dev/same_figures.py record before.json --checkout ../before   # the commit before, in a worktree
    python dev/same_figures.py record after.json                         # this checkout
    python dev/same_figures.py compare before.json after.json            # what differs, and exit code 1

Jobs (`same_figures_jobs.py`) go through the command line alone, in float32 on a CPU with one thread each, so two
recordings on one machine are equal to the last bit. A figure that differs was changed. On record are the hash of every
tensor that a run writes, and every figure of its JSON files; times, dates, versions, paths and sentences are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import runpy
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from same_figures_jobs import ROOT, Job, jobs, write_models, write_texts

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
ENVIRONMENT = {**ONE_THREAD, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "deepspeed")
HEAVY = ("torch", "transformers", "peft", "trl", "datasets")  # loaded once, before processes are forked
POLL_SECONDS = 0.1
END_SECONDS = 30
LATE = 124  # exit code of a job that took too long, as of timeout(1)
SHOWN = 400  # characters of a value

# Files of a run with figures, and what of them is no figure: it differs from run to run, or is a sentence or a name.
FILES = re.compile(
    r"(plan|estimate|measure|generations|probe|best|training|verify|report|config|generation_config|\d+-\d+)\.json"
    r"|(positions|epochs|steps|written-[0-9a-f]+)\.jsonl|(?!expected).*\.safetensors"
)
NO_FIGURE = re.compile(
    r".*seconds|.*tokens_per_second|times|.*matrix_rate.*|peak_memory.*|speed|machine|versions?|.*_version|environment|env"
    r"|provenance|fingerprint|lineage|files|inputs|recipe|title|summary|limits|means|reason|finished"
)
DATE = re.compile(r"\d{4}-\d\d-\d\dT[\d:.+]+")
RENAMED = {"train": "recover"}  # a newer name -> one that all commits share: of a folder, a stage, a section


# Recording.


def record(checkout: Path, *, whole: bool, only: str, workers: int, keep: Path | None) -> dict[str, Any]:
    """Every figure of every job whose name holds `only`, computed by the package in `checkout`."""
    work = keep or Path(tempfile.mkdtemp(prefix="same-figures-"))
    work.mkdir(parents=True, exist_ok=True)
    work = work.resolve()
    prepare(checkout, work)
    families = write_families(work)
    chosen = [job for job in jobs(work, families, whole=whole) if only in job.name]
    found = {}
    try:
        for job, code in run_all(chosen, work, workers):
            failed = {"failed": code} if code else {}
            found[job.name] = {**failed, **without(str(work), figures(work / job.found))}
            if code:
                print(f"{job.name}: exit code {code}\n{log_of(job, work).read_text(errors='replace')[-2000:]}")
    finally:
        if keep is None:
            shutil.rmtree(work)
    made = {"checkout": commit(checkout), "only": only, **machine()}
    return {"made": made, "jobs": dict(sorted(found.items()))}


def prepare(checkout: Path, work: Path) -> None:
    """The package of `checkout` is what this process and its children import; they work in `work`."""
    if not (checkout / "recover" / "__main__.py").is_file():
        raise SystemExit(f"{checkout}: holds no package `recover`; give the folder of a checkout")
    paths = [str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ.update(ENVIRONMENT, PYTHONPATH=os.pathsep.join(paths), PYTHONSAFEPATH="1")
    sys.path.insert(0, str(checkout))
    write_texts(work)
    for name in HEAVY:
        importlib.import_module(name)


def write_families(work: Path) -> list[str]:
    """Written by a child, so that torch computes nothing in the process that is forked."""
    with FORK.Pool(1) as pool:
        return pool.apply(write_models, (work / "models",))


FORK = multiprocessing.get_context("fork")


def run_all(waiting: Sequence[Job], work: Path, workers: int) -> Iterator[tuple[Job, int]]:
    """Each job and its exit code, as they end; `workers` at a time, each in a process of its own."""
    queue, running = list(waiting), []
    began = time.monotonic()
    while queue or running:
        while queue and len(running) < workers:
            job = queue.pop(0)
            process = FORK.Process(target=call, args=(job, work))
            process.start()
            running.append((job, process, time.monotonic()))
        time.sleep(POLL_SECONDS)
        for started in list(running):
            job, process, since = started
            late = time.monotonic() - since > job.seconds
            if process.is_alive() and not complete(job, work) and not late:
                continue
            code = 0 if complete(job, work) else LATE if process.exitcode is None else process.exitcode
            end(process)
            running.remove(started)
            print(f"{time.monotonic() - began:5.0f} s  {job.name}", flush=True)
            yield job, code


def end(process: Any) -> None:
    """A launcher that is asked to end takes its processes along, one that is killed does not."""
    process.terminate()
    process.join(END_SECONDS)
    process.kill()
    process.join()


def complete(job: Job, work: Path) -> bool:
    """Whether all figures are there, before the process has ended."""
    return job.last is not None and (work / job.found / job.last).is_file()


def log_of(job: Job, work: Path) -> Path:
    """Where its output goes."""
    return work / f"{job.name}.log"


def call(job: Job, work: Path) -> None:
    """In a process of its own: be `python -m recover WORDS`, under the launcher if there is one."""
    log = os.open(log_of(job, work), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    if job.launcher:
        os.chdir(ROOT)  # launch/*.yaml name files from here
        words = [str(work / word) if word == "runs" or (work / word).is_file() else word for word in job.words]
        os.execv(sys.executable, [sys.executable, *job.launcher, *words])
    os.chdir(work)
    sys.argv = ["recover", *job.words]
    runpy.run_module("recover", run_name="__main__", alter_sys=True)


def commit(checkout: Path) -> str:
    """What git says of a checkout."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """What figures may depend on besides the code."""
    import torch

    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "processor": platform.processor() or platform.machine(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        **libraries,
    }


# Reading what a job wrote.


def figures(found: Path) -> dict[str, Any]:
    """Of a run directory or of one file: hashes of tensors, and figures of JSON, by file."""
    if found.is_file():
        return {found.name: of_file(found)}
    files = sorted(path for path in found.rglob("*") if path.is_file() and known(path.relative_to(found)))
    return {old_name(path.relative_to(found)): of_file(path) for path in files}


def known(path: Path) -> bool:
    """Whether a file of a run is on record; not what a resume starts from, nor what is there for a moment only."""
    if path.parts[0] == "batches" or "checkpoints" in path.parts:
        return False
    return FILES.fullmatch(path.name) is not None


def old_name(path: Path) -> str:
    """A file by the name that all commits share."""
    name = old_word(path.as_posix())
    return re.sub(r"written-[0-9a-f]+", "written", name)  # a digest of the recipe


def old_word(text: str) -> str:
    """A stage, a field or a file by the name that all commits share."""
    first = re.split(r"[./]", text, maxsplit=1)[0]
    return RENAMED.get(first, first) + text[len(first) :]


def of_file(path: Path) -> Any:
    """Hashes or figures of one file."""
    if path.suffix == ".safetensors":
        return tensors(path)
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensors(path: Path) -> dict[str, str]:
    """Type, shape and hash of every tensor in a safetensors file, read without the library."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in sorted(header.items()):
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = f"{entry['dtype']} {entry['shape']} {hashlib.sha256(data[begin:end]).hexdigest()}"
    return found


def without(work: str, value: Any) -> Any:
    """The same value, without what is no figure, and without the folder in which it was made."""
    if isinstance(value, dict):
        return {old_word(key): without(work, inner) for key, inner in value.items() if not NO_FIGURE.fullmatch(key)}
    if isinstance(value, list):
        return [without(work, inner) for inner in value]
    if isinstance(value, str):
        return "DATE" if DATE.fullmatch(value) else old_word(value.replace(work, "WORK"))
    return value


# Comparing.


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Name and value of all that holds nothing further; the name says the way to it. Empty lists and mappings count."""
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    below = [(f"{name} > {key}" if name else str(key), each) for key, each in inner]
    if not below and name:
        yield name, value
    for path, each in below:
        yield from flat(each, path)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each figure that is not the same to the last bit, or is in one of them only."""
    first, second = dict(flat(old)), dict(flat(new))
    lines = []
    for name in [*first, *(name for name in second if name not in first)]:
        before, after = (repr(side[name]) if name in side else "nothing" for side in (first, second))
        if before != after:
            lines.append(f"{name}: {before[:SHOWN]} -> {after[:SHOWN]}")
    return lines


def compare(old: dict[str, Any], new: dict[str, Any], most: int) -> int:
    """Say what differs; the exit code. Of recordings with `--only`, jobs that one of them left out are not compared."""
    for key in sorted({*old["made"], *new["made"]} - {"checkout", "only"}):
        if old["made"].get(key) != new["made"].get(key):
            print(f"note: {key}: {old['made'].get(key)} -> {new['made'].get(key)}, so figures may differ by that alone")
    asked = [side["made"].get("only", "") for side in (old, new)]
    first, second = ({n: job for n, job in s["jobs"].items() if all(o in n for o in asked)} for s in (old, new))
    lines = differences(first, second)
    for line in lines[:most]:
        print(line)
    if len(lines) > most:
        print(f"... and {len(lines) - most} more (--most)")
    count = sum(1 for _ in flat(first))
    names = f"{old['made']['checkout']} and {new['made']['checkout']}"
    print(f"{names}: {len(lines)} of {count} figures of {len(first)} jobs differ")
    return 1 if lines or not first else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run all jobs and write every figure to FILE")
    recording.add_argument("file", type=Path, metavar="FILE.json")
    recording.add_argument("--checkout", type=Path, default=ROOT, help="whose package is run; default: this one's")
    recording.add_argument("--whole", action="store_true", help="the quickstart uncut (minutes more)")
    recording.add_argument("--only", default="", help="jobs whose name holds this text")
    recording.add_argument("--workers", type=int, default=2, help="jobs at a time")
    recording.add_argument("--keep", type=Path, help="folder for all that the jobs write; default: none is kept")
    comparing = commands.add_parser("compare", help="say what differs; exit code 1 if anything does")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    comparing.add_argument("--most", type=int, default=100, help="lines printed")
    options = parser.parse_args(arguments)
    if options.command == "compare":
        old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (options.old, options.new))
        return compare(old, new, options.most)
    chosen = {name: getattr(options, name) for name in ("whole", "only", "workers", "keep")}
    found = record(options.checkout.resolve(), **chosen)
    options.file.write_text(json.dumps(found) + "\n", encoding="utf-8")
    failed = [name for name, job in found["jobs"].items() if "failed" in job]
    count = sum(1 for _ in flat(found["jobs"]))
    print(f"{options.file}: {len(found['jobs'])} jobs, {count} figures, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
