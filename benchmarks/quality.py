"""What recovers best at equal tokens: losses, learning rates, where LoRA goes, which text; several seeds, one table.

    python benchmarks/smollm2/fetch.py && python benchmarks/smollm2/make_tasks.py
    python benchmarks/quality.py recipes/smollm2-135m-drop3.yaml --out checkpoints/quality --jobs 6 --seconds 380
    python benchmarks/quality.py recipes/smollm2-135m-drop3.yaml --out checkpoints/quality --table

A star and no full cross: each variant differs from the first, `kl`, in one thing, a few in two. All train for one
epoch, on the same text per seed, from the same plan. A seed decides the text that the dense model writes, its order and
the adapters' beginnings; the pairs of a table row share all three. Adam does not see a loss's scale but for clipping,
so `jsd` is taken four times over: near the dense model it is a quarter of KL. Given text is that of the calibration,
all of it scored; where it holds fewer tokens than asked for it is read again, which the worker's log says.

A larger budget is `--tokens` and nothing else: an epoch of a recovery is a part of its tokens, all of them fresh, and
the rate falls over all steps. So with the recipe's own tokens a row is the recipe's own training, but for what is kept
of it: the end, not the best of its epochs.

`after_cut` trains on as many tokens in less time, so it stands twice: at equal tokens, and with the tokens that took
about equal time. Seconds are those of one of `--jobs` workers that share the GPU: compare them, do not quote them.

Rows go to rows.jsonl as they come; what stands there is not done again. Seed by seed, so that a cut leaves whole seeds.
To go on elsewhere, take the folder `text` along too: the same text is not drawn twice. Rows say which they learnt from
(`text`), and the table compares those of one text only.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from crew import Crew, Row
from quality_table import markdown, read_rows
from quality_work import VARIANTS, Task, Workbench, tasks_for

from recover.config.recipe import load_recipe
from recover.models.source import locate


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    rows_file = options.out / "rows.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.table:
        run_all(tasks_for(options, read_rows(rows_file)), options, rows_file)
    rows = [row for row in read_rows(rows_file) if row["tokens_asked"] in (None, options.tokens)]
    table = markdown(rows, list(VARIANTS))
    (options.out / "quality.md").write_text(table)
    print(table)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of rows.jsonl, the plan, texts and logs")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=150_000, help="scored tokens of a training (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="workers that share the GPU (%(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="leave nothing running after this")
    parser.add_argument("--texts-at-once", type=int, default=1024, help="that the dense model writes (%(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="recipe fields of every training")
    parser.add_argument("--table", action="store_true", help="only print the table of the rows that there are")
    return parser.parse_args(arguments)


def run_all(tasks: list[Task], options: argparse.Namespace, rows_file: Path) -> None:
    if not tasks:
        return
    started = time.monotonic()
    locate(load_recipe(options.recipe, options.set).model)  # a GGUF file is converted by one process, not by all

    def keep(row: Row) -> None:
        with rows_file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{time.monotonic() - started:5.0f} s: {row['variant']}, seed {row['seed']}", flush=True)

    Crew(Workbench, options, tasks).run(options.seconds, keep)


if __name__ == "__main__":
    main()
