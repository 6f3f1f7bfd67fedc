"""Other tools and ours on the same work: same dense model, text, tokens, tasks and items; one table, whoever wins.

    pip install trl optipfair                                   # the peers; a variant whose tool is missing fails alone
    python benchmarks/peers/peers.py recipes/quickstart.yaml --out checkpoints/peers --tokens 60_000     # CPU
    python benchmarks/peers/peers.py recipes/qwen2.5-coder-0.5b-drop2.yaml --out OUT --tokens 1_000_000 --jobs 3 \\
        --truth benchmarks/coder/data/truth --seconds 560
    python benchmarks/peers/peers.py recipes/qwen2.5-coder-0.5b-drop2.yaml --out OUT --tokens 1_000_000 --table

A variant is CUT[+RECOVERY[+truth][+xRATE]][+ROUNDING], as influence+sft, width+kd+q4_0, maw+optipfair+x0.5.
Cuts: cuts.py has the peers'; ours are kl (blocks), width (neurons by obs, rewritten by least squares), masks (Wanda,
its zeros kept). Recoveries: recoveries.py has the peers'; kd is ours. truth: learnt from right answers (truth.py) and
not from what the dense model writes. xRATE: so many times the rate. Rounding: q8_0, q5_1, q5_0, q4_1, q4_0 by our GGUF
writer, nf4 as bitsandbytes does; of the dense model it is what users compare a pruned one with.

The recipe, of kind depth, says model, how many blocks go, calibration, text and tasks. Cuts of neurons take about as
many parameters as those blocks hold; zeros are half of the blocks' weights, and are stored. All figures are those of
`recover measure` on what each tool saved. Rows go to results.jsonl as they end, and what has a row is not done again.
Seconds are those of one of `--jobs` workers that share the machine: compare them, do not quote them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "coder")]

from crew import Crew, Row
from decisive import share_kept
from rows import view_of
from workbench import DENSE, Workbench, parts_of, tasks_for

from recover.base.artifacts import append_jsonl, read_json, read_jsonl
from recover.config.recipe import load_recipe
from recover.config.tasks import KINDS
from recover.models.source import locate

VARIANTS = (
    DENSE,
    "dense+q8_0",
    "dense+q4_0",
    "dense+nf4",
    "influence",
    "influence+sft",
    "influence+sft+truth",
    "influence+gkd",
    "influence+kd",
    "hand",
    "hand+gkd",
    "kl",
    "kl+kd",
    "maw",
    "maw+full",
    "maw+optipfair",
    "maw-text",
    "maw-text+full",
    "maw-text+optipfair",
    "width",
    "width+kd",
    "width+kd+q8_0",
    "width+kd+q4_0",
    "wanda",
    "wanda+sft",
    "masks+kd",
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    results, failed = options.out / "results.jsonl", []
    if not options.table:
        failed = run_all(options, results)
    rows = rows_of(results, options)
    table = markdown(rows, options.out)
    (options.out / "peers.md").write_text(table)
    print(table)
    return 1 if failed else 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl, text, models and logs")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), metavar="VARIANT", help="in this order")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="scored tokens of a recovery (%(default)s)")
    parser.add_argument("--truth", type=Path, help="folder of right answers, which truth.py wrote")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--micro", type=int, help="sequences that peers hold at once, half as many beside dense (default: a step)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="workers that share the machine (%(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="leave nothing running after this")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="recipe fields of every variant")
    parser.add_argument("--table", action="store_true", help="only print the table of the rows that there are")
    options = parser.parse_args(arguments)
    for name in options.only:
        parts_of(name)
    return options


def run_all(options: argparse.Namespace, results: Path) -> list[str]:
    """What of the variants has no row yet, or what of it is done in time; what failed."""
    tasks = tasks_for(options.only, {row["variant"] for row in rows_of(results, options)})
    if not tasks:
        return []
    started = time.monotonic()
    locate(load_recipe(options.recipe, options.set).model)  # a GGUF file is converted by one process, not by all

    def keep(row: Row) -> None:
        append_jsonl(results, row)
        print(f"{time.monotonic() - started:5.0f} s: {row['variant']}", flush=True)

    crew = Crew(Workbench, options, tasks)
    crew.run(options.seconds, keep)
    there = {row["variant"] for row in rows_of(results, options)}
    print(f"not done: {' '.join(name for name in options.only if name not in there) or 'none'}", flush=True)
    return crew.failed


def rows_of(results: Path, options: argparse.Namespace) -> list[Row]:
    """The rows of this budget and seed."""
    rows = read_jsonl(results) if results.exists() else []
    return [row for row in rows if (row["tokens_asked"], row["seed"]) == (options.tokens, options.seed)]


def markdown(rows: Sequence[Row], out: Path) -> str:
    """One row a variant, in the order in which they are listed; each beside the dense model."""
    by_name = {row["variant"]: row for row in rows}
    dense = by_name.get(DENSE)
    if dense is None:
        return f"{DENSE} has no row yet\n"
    order = [name for name in VARIANTS if name in by_name] + [name for name in by_name if name not in VARIANTS]
    views = {name: view_of(out / "measured" / name) or {} for name in order}
    tasks = list(views[DENSE]["tasks"])
    heads = ["variant", "parameters", "not zero", "file", "tokens", "cut s", "train s", "peak GB", *tasks]
    lines = [f"| {' | '.join([*heads, 'generation kept [95%]'])} |", "|---|" + "---:|" * len(heads)]
    for name in order:
        row, kept = by_name[name], kept_of(out, name)
        shares = [f"{row[key] / dense[key]:.1%}" for key in ("parameters", "nonzero", "bytes")]
        cost = [_number(row.get(key), form) for key, form in (("tokens", ",.0f"), ("cut_seconds", ".0f"))]
        cost += [_number(row.get("train_seconds"), ".0f"), _number((row.get("peak_bytes") or 0) / 1e9 or None, ".1f")]
        values = [views[name]["tasks"][task]["value"] for task in tasks]
        figures = [f"{value:.2f}" if value > 1 else f"{value:.1%}" for value in values]
        shown = "" if kept is None or name == DENSE else "{:.1%} [{:.1%}, {:.1%}]".format(*kept)
        lines.append(f"| {' | '.join([name, *shares, *cost, *figures, shown])} |")
    return "\n".join(lines) + "\n"


def kept_of(out: Path, name: str) -> tuple[float, float, float] | None:
    """(share, low, high) of what dense generates right, over the same items."""
    mine, dense = (read_json(out / "measured" / each / "measure.json")["tasks"] for each in (name, DENSE))
    writing = [task for task, record in dense.items() if KINDS[record["kind"]].use == "generation"]
    return share_kept([(_verdicts(dense[task]), _verdicts(mine[task])) for task in writing])


def _verdicts(task: dict[str, Any]) -> list[bool]:
    return [bool(sample["correct"]) for sample in task["samples"]]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
