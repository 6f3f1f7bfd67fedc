"""One process of a training is killed in the middle of a step: how long until all are gone, and whether it goes on."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
from job import SHARDED, Job, Keep, Row, furthest
from launching import Launch, lines, until, untrained_copy, workers

from recover.base.artifacts import check_manifest, read_json, read_jsonl
from recover.base.errors import ArtifactError
from recover.train.checkpoints import Checkpoints

EXIT_SECONDS = 60  # all processes must be gone by then
RANDOM = random.Random(1)


def kills(job: Job, trials: int, engines: Sequence[str], keep: Keep) -> None:
    """Each engine's trials one after the other, the engines beside one another; ZeRO-2 with shared weights too."""
    base = job.run_directory("kill")
    Launch("one", gpu=0).run(job.words("kill", ()), job.out / "kill.log")

    def engine(name: str, fields: Sequence[str], where: str) -> None:
        launch = Launch(name, job.gpus)
        straight = untrained_copy(base, job.run_directory(where))
        launch.run(job.words(where, fields), job.out / f"{where}.log")
        steps = read_jsonl(straight / "train" / "steps.jsonl")
        for number in range(trials):
            found = trial(job, launch, base, f"{where}-{number}", steps, fields)
            keep({"row": " ".join([f"{job.gpus} x {name}", *fields]), "steps": len(steps), **found})

    work = [(name, (), f"kill-{name}") for name in engines]
    if "zero2" in engines:
        work.append(("zero2", SHARDED, "kill-sharded"))
    with ThreadPoolExecutor(len(work)) as pool:
        list(pool.map(lambda each: engine(*each), work))


def trial(job: Job, launch: Launch, base: Path, where: str, straight: Sequence[Row], fields: Sequence[str]) -> Row:
    run, log = untrained_copy(base, job.run_directory(where)), job.out / f"{where}.log"
    steps = run / "train" / "steps.jsonl"
    process = launch.start(job.words(where, fields), log)
    after = RANDOM.randint(1, max(1, len(straight) - 3))
    if not until(lambda: lines(steps) >= after, process):
        return {"problem": f"ended before step {after}: exit code {process.poll()}"}
    time.sleep(RANDOM.uniform(0, straight[-1]["seconds"] / len(straight)))
    launched = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    victim = RANDOM.choice(workers(process))
    victim.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    with suppress(Exception):
        process.wait(EXIT_SECONDS)
    _, alive = psutil.wait_procs(launched, max(0.0, EXIT_SECONDS - (time.monotonic() - killed)))
    found: Row = {"after_step": after, "seconds_to_exit": time.monotonic() - killed, "alive": len(alive)}
    for each in alive:
        each.kill()
    found["half_published"] = half_published(run / "train")
    try:
        launch.run(job.words(where, fields), log)
    except RuntimeError as error:
        return {**found, "problem": str(error)}
    went_on = [line for line in log.read_text(errors="replace").splitlines() if "going on from" in line]
    again = read_jsonl(steps)
    found |= {"went_on": went_on, "loss": furthest(again, straight, "loss")}
    found["finished"] = read_json(run / "train" / "training.json")["finished"]
    return found


def half_published(recover: Path) -> list[str]:
    """Checkpoints and adapters under their names that are not whole."""
    wrong = []
    for folder in [*(recover / "checkpoints").glob("checkpoint-*"), *recover.glob("epoch-*")]:
        try:
            check_manifest(folder)
        except ArtifactError as error:
            wrong.append(str(error))
    newest = Checkpoints(recover, read_json(recover / "training.json")["fingerprint"]).newest()
    return wrong if newest is not None else [*wrong, "no checkpoint verifies"]


def table(found: Sequence[Row]) -> list[str]:
    lines = ["| killed | trials | all gone within | whole | went on to the end | largest difference of a loss |"]
    lines.append("|---|---:|---:|---:|---:|---|")
    for name in dict.fromkeys(row["row"] for row in found):
        trials = [row for row in found if row["row"] == name]
        reached = [each for each in trials if "seconds_to_exit" in each]
        slowest = max((each["seconds_to_exit"] for each in reached), default=float("nan"))
        gone = sum(each["alive"] == 0 for each in reached)
        whole = sum(not each["half_published"] for each in reached)
        ended = [each for each in reached if each.get("finished")]
        differences = ", ".join(sorted({each["loss"] for each in ended}))
        times = f"{slowest:.0f} s ({gone} of {len(trials)})"
        lines.append(f"| {name} | {len(trials)} | {times} | {whole} | {len(ended)} | {differences} |")
        lines += [f"\n{each['problem']}" for each in trials if "problem" in each]
    return lines
