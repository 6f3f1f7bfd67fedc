"""Write recover/forecast/runs.json, what forecasts are calibrated on, from run directories that were made to the end.

    PYTHONPATH=. python dev/calibrate_forecast.py checkpoints/methods/* other-name=checkpoints/quickstart
    PYTHONPATH=. python dev/calibrate_forecast.py --add checkpoints/more/*
    PYTHONPATH=. python dev/calibrate_forecast.py --show

A directory needs recipe.yaml, epochs.jsonl, prune/plan.json, dense/measure.json, and measure.json and probe.json in
before/ and after/; env.json or report.json tell the command. Rows are read from these files and nowhere else. What is
printed is how wrong each form was on runs left out (recover/forecast/law.py), model by model and across models.
"""

from __future__ import annotations

import argparse
import dataclasses
from itertools import pairwise
from pathlib import Path
from statistics import mean

from recover.base.errors import RecoverError
from recover.forecast import advice, law
from recover.forecast.known import PATH, known_runs, write_runs
from recover.forecast.runs import Run, read_run

PARTS = (0.1, 0.2, 1 / 3)
BINS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="[NAME=]RUN_DIR")
    parser.add_argument("--add", action="store_true", help="keep the rows that are there; one of the same name goes")
    parser.add_argument("--show", action="store_true", help="print the errors only")
    options = parser.parse_args()
    if not options.show:
        found = {run.name: run for run in (known_runs() if options.add else [])}
        for run in map(named, options.runs):
            if run is not None and not repeats(run, list(found.values())):
                found[run.name] = run
        write_runs(list(found.values()), PATH)
        print(f"{PATH}: {len(found)} runs")
    show(known_runs())


def named(given: str) -> Run | None:
    """The run of `NAME=DIR` or `DIR`; None, and said, where the directory holds no finished one."""
    name, _, folder = given.rpartition("=")
    try:
        run = read_run(Path(folder))
    except RecoverError as error:
        print(f"left out: {error}")
        return None
    return dataclasses.replace(run, name=name or Path(folder).name)


def repeats(run: Run, runs: list[Run]) -> bool:
    """Whether another run trained the same pruned model alike, which is said: it would tell how this one ends."""
    for other in runs:
        if other.name != run.name and (other.model, other.settings) == (run.model, run.settings):
            figures = [(state.kl, state.shares["perplexity"]) for state in (other.before, run.before)]
            same = max(abs(one / two - 1) for one, two in zip(*figures, strict=True))
            if same < 1e-3:
                print(f"left out: {run.name} is {other.name} over again")
                return True
    return False


def show(runs: list[Run]) -> None:
    """Mean absolute error of each form by model, trial and figure; the last group leaves out whole models."""
    models = sorted({run.model for run in runs})
    print("| runs of | trial | figure | runs | " + " | ".join(law.FORMS) + " | in use | held |")
    print("|---|---:|---|" + "---:|" * (len(law.FORMS) + 1) + "---|---:|")
    for model in [*models, None]:
        for part in PARTS:
            for figure in ("generation", "choice", "perplexity", "kl"):
                line(model, [run for run in runs if model in (None, run.model)], part, figure)
    advised(runs, 1 / 3)
    chances(runs, 1 / 3)


def advised(runs: list[Run], part: float) -> None:
    """What each run would have been advised by the others, beside what generation came to."""
    print("\n| run left out | model | trial | generation | expected | interval | chance | came | advice |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---|")
    right = {"go": [], "no-go": [], "cannot tell": []}
    for run in runs:
        state = law.trial_of(run, part)
        if state is None:
            continue
        trial = advice.Trial(run.model, run.parameters, run.tokens, advice.STEPS, run.before, state)
        found = advice.forecast(trial, [other for other in runs if other is not run])
        row = found["classes"].get("generation")
        kept = run.after.shares["generation"]
        right[found["advice"]].append((kept >= advice.GO) == (found["advice"] == "go"))
        shown = [""] * 4
        if row is not None:
            low, high = row["interval"]
            shown = [f"{row['trial']:.0%}", f"{row['expected']:.0%}", f"{low:.0%} to {high:.0%}"]
            shown.append("" if row["chance"] is None else f"{row['chance']:.0%}")
        cells = [run.name, run.model, f"{trial.part:.0%}", *shown, f"{kept:.0%}", found["advice"]]
        print("| " + " | ".join([*cells, "; ".join(found["outside"])]) + " |")
    for word in ("go", "no-go"):
        print(f"{word}: {len(right[word])}, right {sum(right[word])}")
    print(f"cannot tell: {len(right['cannot tell'])}")


def chances(runs: list[Run], part: float) -> None:
    """How often runs came to the goal, by the chance they were given when left out; Brier scores by model."""
    print(f"\n| chance of {advice.GO:.0%} | runs | mean chance | came to it |\n|---|---:|---:|---:|")
    models = sorted({run.model for run in runs})
    groups = {model: [run for run in runs if run.model == model] for model in models}
    form = law.CHOSEN["generation"][0]
    found = [
        each
        for own in groups.values()
        for each in law.chances(form, law.cases(own, "generation", part), "generation", advice.GO, by_model=False)
    ]
    for low, high in pairwise(BINS):
        inside = [(said, came) for said, _, came in found if low <= said < high]
        if inside:
            said, came = mean(said for said, _ in inside), sum(came for _, came in inside)
            print(f"| {low:.0%} to {high:.0%} | {len(inside)} | {said:.0%} | {came} |")
    for model, own in groups.items():
        print(model, advice.brier(own, part, by_model=False))


def line(model: str | None, runs: list[Run], part: float, figure: str) -> None:
    """One row of the table, if there are runs enough for an error."""
    known = law.cases(runs, figure, part)
    by_model = model is None
    found = advice.errors(runs, part, figure, by_model=by_model)
    if found["runs"] < 2:
        return
    wrong = [found["mean_absolute"].get(form) for form in law.FORMS]
    shown = " | ".join("" if value is None else f"{value:.3f}" for value in wrong)
    hits, total = law.held(found["form"], known, figure, by_model=by_model)
    whose = model or "another model (left out)"
    print(f"| {whose} | {part:.0%} | {figure} | {found['runs']} | {shown} | {found['form']} | {hits} of {total} |")


if __name__ == "__main__":
    main()
