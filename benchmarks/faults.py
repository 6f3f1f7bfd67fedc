"""Inject each fault many times into a tiny real training, and say how often nothing was lost.

    PYTHONPATH=.:tests OMP_NUM_THREADS=1 python benchmarks/faults.py            # all rows, as often as in the table
    PYTHONPATH=.:tests OMP_NUM_THREADS=1 python benchmarks/faults.py R1 R7 --share 0.1
    PYTHONPATH=.:tests OMP_NUM_THREADS=1 python benchmarks/faults.py --jobs 28 --seconds 480 --out faults.json

A trial survives if the same command, given again, ends with the bits of a training that nothing happened to, and
leaves nothing behind; or if what is wrong is refused by name. Every training is a process (a fork of this one).
Trials are the same however many processes work on them (`--jobs`); folders are made where TMPDIR says.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import fault_inputs
import fault_rows
import faulty
import torch
from fault_dealing import Dealer, Row, each, hands
from fault_report import Report

# Row -> what is injected, how, how often, seconds a trial.
ROWS: dict[str, Row] = {
    "R1": Row("SIGKILL at a random time", each(fault_rows.killed_at_any_time), 300, 1.4),
    "R2": Row(
        "SIGKILL at every call that changes a file, writes torn", each(fault_rows.killed_at_every_call), 10_000, 1.3
    ),
    "R4": Row("disk full after n bytes", each(fault_rows.disk_full), fault_rows.FULL, 1.3),
    "R5": Row("EIO, EROFS, EDQUOT, EACCES, ENOENT at a random call", each(fault_rows.disk_error), 100, 1.3),
    "R6": Row("SIGTERM, SIGINT, SIGHUP, SIGUSR1, two SIGTERM at a random time", each(fault_rows.signalled), 500, 1.4),
    "R7": Row("bit flips in each file of the newest checkpoint", each(fault_rows.flipped), 6000, 0.02, hand=200),
    "R8": Row(
        "checkpoint cut, lengthened, incomplete, mixed up, overwritten", each(fault_rows.damaged), 500, 0.03, hand=100
    ),
    "R9": Row(
        "SIGTERM at every micro-step, 12 settings", each(fault_rows.stopped_anywhere), len(fault_rows.STOPS), 2, hand=3
    ),
    "R10": Row(
        "other number of processes, other engine",
        each(fault_rows.other_world),
        len(fault_rows.MOVES),
        40,
        processes=3,
        limit=700,
    ),
    "R11": Row(
        "one of two processes killed, or raises in the middle of a step",
        each(fault_rows.lost_process),
        60,
        40,
        processes=2,
        limit=700,
    ),
    "R12": Row(
        "NaN, infinity, 1e38 in loss, gradient, teacher, states, embeddings", each(fault_rows.not_finite), 200, 0.8
    ),
    "R16": Row("recipes with wrong fields", fault_inputs.recipes, 10_000, 0.01, hand=1000),
    "R18": Row("NaN wherever no token is scored", each(fault_inputs.masked_rows), 500, 0.1, hand=50),
    "R22": Row("two writers; a reader during saves", each(fault_rows.one_writer), 50, 0.2),
    "R24": Row("cached text of another model, seed or option", fault_inputs.stale_caches, 30, 0.3, hand=30),
    "R25": Row("prefix shared against run twice", each(fault_inputs.shared_prefixes), 20, 0.2),
}


def build(root: Path, number: int) -> fault_rows.Bench:
    """A worker's own bench; what is printed there goes to its log."""
    folder = root / f"worker-{number}"
    folder.mkdir()
    log = os.open(folder / "worker.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    return fault_rows.Bench(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=list(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--share", type=float, default=1.0, help="of the trials of each row")
    parser.add_argument("--jobs", type=int, default=1, help="processes that do trials")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no trial after this")
    parser.add_argument("--out", type=Path, help="where results go, as they come (JSON)")
    options = parser.parse_args()
    started = time.time()
    torch.set_num_threads(1)
    rows = {name: ROWS[name] for name in options.rows}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        root = Path(name)
        os.environ["TMPDIR"] = name  # launchers leave folders there
        if "R2" in rows:
            rows["R2"] = replace(rows["R2"], times=faulty.disk_calls(root / "calls")[0])
        report = Report(rows, options.out, {"jobs": options.jobs, "share": options.share}, started)
        dealer = Dealer(lambda number: build(root, number), rows, options.jobs, started + options.seconds)
        dealer.deal(hands(rows, options.share), report.keep)
    report.write()
    print(report.table())
    sys.exit(0 if report.fine() else 1)


if __name__ == "__main__":
    main()
