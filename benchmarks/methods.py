"""Ways to prune one model side by side, pruned and after the same short recovery.

    python benchmarks/smollm2/fetch.py && python benchmarks/smollm2/make_tasks.py
    python benchmarks/methods.py recipes/smollm2-135m-drop3.yaml --out checkpoints/methods --jobs 5

Every row is a whole run of `recover` with the recipe's model, data, tasks and seed, and the same tokens and steps. The
counts are for SmolLM2-135M: the rows of the first group take about as many parameters away as three of its 30 blocks
hold (7.9%), by depth, sublayers or width; those of the second set half of the block weights to zero. The first run
measures the dense model and lets it write the text; the others take both from it, which their fingerprints allow:
neither depends on how the model is pruned. Speed is measured at the end, when nothing else runs, each export by turns
with the dense model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from recover.config.recipe import load_recipe

METHODS = {
    "blocks-kl": "kind: depth, count: 3, score: kl",
    "blocks-kl-contiguous": "kind: depth, count: 3, score: kl, contiguous: true",
    "blocks-variance": "kind: depth, count: 3, score: variance",
    "blocks-perplexity": "kind: depth, count: 3, score: perplexity",
    "blocks-taylor": "kind: depth, count: 3, score: taylor",
    "blocks-angular": "kind: depth, count: 3, score: angular, contiguous: true",
    "blocks-influence": "kind: depth, count: 3, score: block_influence",
    "blocks-kl-repair": "kind: depth, count: 3, score: kl, repair: linear",
    "pairs-kl": "kind: depth, unit: pair, count: 3, score: kl",
    "attention-kl": "kind: depth, unit: attention, count: 12, score: kl",
    "mlp-kl": "kind: depth, unit: mlp, count: 4, score: kl",
    "width-mlp": "kind: width, mlp: 0.125, multiple: 64",
    "width-mlp-fluctuation": "kind: width, mlp: 0.125, multiple: 64, score: fluctuation",
    "magnitude-50": "kind: magnitude, sparsity: 0.5",
    "wanda-50": "kind: wanda, sparsity: 0.5",
    "wanda-50-outliers": "kind: wanda, sparsity: 0.5, allocation: outliers",
    "wanda-50-owl": "kind: wanda, sparsity: 0.5, allocation: owl",
    "wanda-2of4": "kind: wanda, pattern: '2:4'",
    "sparsegpt-50": "kind: sparsegpt, sparsity: 0.5",
    "sparsegpt-2of4": "kind: sparsegpt, pattern: '2:4'",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run directories and of the table")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--tokens", type=int, default=300_000, help="scored tokens of every recovery (%(default)s)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, on one GPU (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run and leave none after this")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="recipe fields of every run")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.seconds
    run_all(options, deadline)
    rows = {name: row for name in options.only if (row := read_row(options.out, name))}
    time_all(options.recipe, options.out, rows)
    (options.out / "methods.json").write_text(json.dumps(rows, indent=1))
    table = markdown(rows)
    (options.out / "methods.md").write_text(table)
    print(table)


def run_all(options: argparse.Namespace, deadline: float) -> None:
    first, *others = options.only
    running = {first: start(first, options)}
    while running[first].poll() is None and not text_is_written(options.out / first):
        time.sleep(1)
    if not text_is_written(options.out / first):
        sys.exit(f"{first} wrote no text, see {options.out / first}.log")
    while (others or running) and time.monotonic() < deadline:
        while others and len(running) < options.jobs:
            name = others.pop(0)
            lend(options.out / first, options.out / name)
            running[name] = start(name, options)
        for name, process in list(running.items()):
            if process.poll() is not None:
                print(f"{name}: exit code {process.returncode}", flush=True)
                del running[name]
        time.sleep(0.5)
    for name, process in running.items():
        process.terminate()
        print(f"{name}: stopped, the time was over", flush=True)
    for process in running.values():
        process.wait(30)


def start(name: str, options: argparse.Namespace) -> subprocess.Popen:
    calibration = _calibration(options.recipe)
    pruning = METHODS[name] if name.startswith("magnitude") else f"{METHODS[name]}, calibration: {calibration}"
    overrides = [
        f"name={name}",
        f"prune={{{pruning}}}",
        f"train.tokens={options.tokens}",
        f"train.epochs={options.epochs}",
        *options.set,
    ]
    log = (options.out / f"{name}.log").open("w")
    command = [sys.executable, "-m", "recover", "run", str(options.recipe), "--runs", str(options.out), *overrides]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def _calibration(recipe: Path) -> str:
    cfg = getattr(load_recipe(recipe).prune, "calibration", None)
    if cfg is None:
        sys.exit(f"{recipe}: its prune.calibration is what every method is scored on, and it has none")
    return cfg.model_dump_json()


def text_is_written(run: Path) -> bool:
    """The first step of training has been prepared: all text is there."""
    return (run / "train" / "checkpoints.jsonl").exists() or (run / "report.json").exists()


def lend(first: Path, other: Path) -> None:
    """The dense model's figures and texts, as the other run would make them itself."""
    for part in ("dense", "train/data"):
        if not (other / part).exists():
            shutil.copytree(first / part, other / part)


def read_row(out: Path, name: str) -> dict[str, Any] | None:
    """What the run wrote; None if it did not get as far as the figures after recovery."""
    run = out / name
    needed = [run / "prune" / "plan.json", run / "before" / "measure.json", run / "after" / "measure.json"]
    if not all(path.exists() for path in needed):
        return None
    plan = json.loads(needed[0].read_text())
    row: dict[str, Any] = {
        "parameters": plan["parameters_pruned"] / plan["parameters_dense"],
        "nonzero": plan["nonzero"] / plan["parameters_dense"],
        "repair": plan["repair"],
        "dense": json.loads((run / "dense" / "measure.json").read_text())["headline"],
    }
    for view in ("before", "after"):
        probe = json.loads((run / view / "probe.json").read_text())
        row[view] = {
            **json.loads((run / view / "measure.json").read_text())["headline"],
            "kl": probe["final"]["kl"]["mean"],
        }
    return row


def time_all(recipe: Path, out: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Decode and prefill of each export against the dense model, in this process alone, by turns.

    Masks are left out: their exports run the dense model's kernels on the dense model's shapes.
    """
    from recover.base import dist
    from recover.measure.speed import compare_speed
    from recover.models.load import load_model

    cfg = load_recipe(recipe).model
    dense = load_model(cfg)
    for name, row in rows.items():
        deploy = out / name / "deploy"
        if row["parameters"] == 1 or not deploy.exists():
            continue
        pruned = load_model(cfg.model_copy(update={"source": str(deploy), "revision": None}))
        row["speed"] = compare_speed(dense, pruned, dist.device())


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| method | parameters | non-zero | KL, pruned | generation | choice | perplexity | KL, recovered | generation "
        "| choice | perplexity | decode |",
        "|---|" + "---:|" * 11,
    ]
    for name, row in rows.items():
        cells = [name, f"{row['parameters']:.1%}", f"{row['nonzero']:.1%}"]
        for view in ("before", "after"):
            found = row[view]
            cells += [
                f"{found['kl']:.3f}",
                f"{found['generation']:.1%}",
                f"{found['choice']:.1%}",
                f"{found['perplexity']:.1f}",
            ]
        cells.append(_ratio(row.get("speed")))
        lines.append("| " + " | ".join(cells) + " |")
    if rows:
        dense = next(iter(rows.values()))["dense"]
        lines.append(
            f"| dense | 100% | 100% | 0 | {dense['generation']:.1%} | {dense['choice']:.1%} "
            f"| {dense['perplexity']:.1f} | | | | | |"
        )
    return "\n".join(lines) + "\n"


def _ratio(speed: dict[str, Any] | None) -> str:
    if speed is None:
        return "–"
    decode = speed["ratio"]["decode_tokens_per_second"]
    return f"x{decode['value']:.2f} [{decode['interval'][0]:.2f}, {decode['interval'][1]:.2f}]"


if __name__ == "__main__":
    main()
