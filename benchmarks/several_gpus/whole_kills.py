"""One process dies in each stage of the whole job: how long until all are gone, what lies there, whether it goes on."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from job import Keep, Row
from kills import EXIT_SECONDS
from launching import ENGINES, POLL_SECONDS, Launch, tree
from safetensors import safe_open
from whole import Whole, apart, tensors_apart

from recover.base.artifacts import check_manifest, read_json, read_jsonl
from recover.run.stages import status

SCRIPT = "benchmarks/several_gpus/watched.py"
REACHED_SECONDS = 240  # the place where the process dies


@dataclass(frozen=True)
class Death:
    """`place`: of watched.py. Rank 0 reads, decides and writes for all; the other reads, writes text and trains."""

    place: str
    engine: str
    victim: int


DEATHS = (
    Death("export", "gpu", 0),
    Death("text", "zero3", 1),
    Death("step", "zero2", 0),
    Death("prune", "gpu", 0),
    Death("weights", "zero2", 1),
)


def whole_kills(runs: Whole, named: str, keep: Keep) -> None:
    """Those whose place `named` is found in, beside one another. ZeRO-2 where a launch file is not for this machine."""

    def one(number: int, death: Death) -> None:
        engine = death.engine if death.engine in ENGINES else "zero2"
        name = next(each for each, (launch, _) in runs.launches().items() if launch.engine == engine)
        row = {"row": death.place, "launch": name, "victim": death.victim}
        try:
            keep(row | trial(runs, death, name, f"death-{number}"))
        except Exception as error:  # the other deaths are of use all the same
            keep(row | {"problem": f"{type(error).__name__}: {error}"})

    chosen = [(number, death) for number, death in enumerate(DEATHS) if re.search(named, death.place)]
    with ThreadPoolExecutor(len(chosen)) as pool:
        list(pool.map(lambda each: one(*each), chosen))


def trial(runs: Whole, death: Death, name: str, where: str) -> Row:
    launch, fields = runs.launches()[name]
    run, log, note = runs.run_directory(where), runs.out / f"{where}.log", runs.out / f"{where}.json"
    shutil.rmtree(run, ignore_errors=True)
    note.unlink(missing_ok=True)
    words = runs.words(where, fields)
    found = killed(launch, [SCRIPT, "--kill", death.place, "--victim", str(death.victim), "--note", str(note), *words],
                   log, note)  # fmt: skip
    if "problem" in found:
        return found
    found["half_published"] = half_published(run)
    try:
        found["seconds_again"] = launch.run(["-m", "recover", *words], log)
    except RuntimeError as error:
        return {**found, "problem": str(error)}
    said = log.read_text(errors="replace").splitlines()
    found["went_on"] = [line.strip() for line in said if "going on from" in line or line.endswith(" done")]
    straight = runs.straight(name).result()
    losses = [[line["loss"] for line in read_jsonl(each / "train" / "steps.jsonl")] for each in (run, straight)]
    found["loss"] = apart(*losses)
    found["tensors"] = tensors_apart(run / "deploy", straight / "deploy")
    found["verified"] = read_json(run / "verify.json")["ok"]
    found["left"] = [path.name for path in run.rglob(".*") if path.name != ".lock"]
    return found


def killed(launch: Launch, words: Sequence[str], log: Path, note: Path) -> Row:
    """Start it, and see the end of all that it had started when one of it killed itself."""
    process = launch.start(words, log)
    launched: dict[int, psutil.Process] = {}
    limit = time.monotonic() + REACHED_SECONDS
    while not note.exists():
        launched |= {each.pid: each for each in tree(process)}
        if process.poll() is not None or time.monotonic() > limit:
            for each in launched.values():
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            return {"problem": f"not reached; exit code {process.poll()}: {log.read_text(errors='replace')[-800:]}"}
        time.sleep(POLL_SECONDS)
    launched |= {each.pid: each for each in tree(process)}
    died = read_json(note)
    with suppress(Exception):
        process.wait(EXIT_SECONDS)
    _, alive = psutil.wait_procs(list(launched.values()), max(0.0, EXIT_SECONDS - (time.monotonic() - died["killed"])))
    seconds = time.monotonic() - died["killed"]
    for each in alive:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    code = process.poll()
    return {**died, "seconds_to_exit": seconds, "alive": len(alive), "processes": len(launched), "exit_code": code}


def half_published(run: Path) -> list[str]:
    """What lies under its own name in a run directory and is not whole, and stages that say done and are not."""
    wrong = []
    for path in sorted(run.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(run).parts):
            continue  # being written, under another name
        try:
            if path.is_dir() and (path.name.startswith(("epoch-", "checkpoint-")) or path == run / "deploy"):
                check_manifest(path)
            elif path.suffix == ".json":
                read_json(path)
            elif path.suffix == ".jsonl":
                read_jsonl(path)
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118
                        file.get_tensor(name)
        except Exception as error:
            wrong.append(f"{path.relative_to(run)}: {type(error).__name__}: {error}")
    rows = status(run) if (run / "recipe.yaml").exists() else []
    return wrong + [f"{row['stage']}: {row['stale']}" for row in rows if row["done"] and row["stale"]]


def table(found: Sequence[Row]) -> list[str]:
    lines = [
        "| a process dies in | launch | rank | inside | all gone within | nothing half there | goes on to the end |"
        " loss against the straight run | exported weights |",
        "|---|---|---:|---|---:|---|---:|---:|---:|",
    ]
    for row in found:
        cells = [row["row"], row["launch"], str(row["victim"])]
        if "seconds_to_exit" in row:
            cells += [f"{'yes' if row['inside'] else 'no'}: {row['innermost']}", f"{row['seconds_to_exit']:.1f} s"]
            cells[-1] += f", {row['alive']} of {row['processes']} alive" if row["alive"] else ""
        if "half_published" in row:
            cells.append("yes" if not row["half_published"] else f"no: {row['half_published']!r}")
        if "tensors" in row:
            cells += [f"{'yes' if row['verified'] else 'no'}, {row['seconds_again']:.0f} s"]
            cells += [f"{row['loss']:.1e}", f"{row['tensors']:.1e}"]
        lines.append(f"| {' | '.join([*cells, *[''] * (9 - len(cells))])} |")
    lines += [f"\n{row['row']}: {row['problem'][-500:]}" for row in found if "problem" in row]
    return lines
