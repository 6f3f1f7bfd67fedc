"""A short recovery beside the real one, measured as that one will be, and the forecast made from it.

It is trained on the first of the text that the recovery will be trained on, at the learning rates that the recovery
begins with: warm-up as long in steps, and no decay (a cosine has lost 10% of its rate at a fifth of the way). The text
lies where the recovery looks for it, so nothing is written twice, and the recovery is as if no trial had been.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recover.base import console, dist
from recover.base.artifacts import read_json, write_json
from recover.base.signals import graceful_stop
from recover.config.recipe import Data, Loss, PrunedText, Recipe, Recover
from recover.forecast import advice, runs
from recover.forecast.known import known_runs
from recover.run.context import Bench
from recover.run.directory import NOT_DONE, RunDirectory
from recover.run.stages import fingerprint, run

if TYPE_CHECKING:
    from recover.models.twin import Twin


def forecast(
    recipe: Recipe, root: Path, *, part: float = advice.PART, calibration: Sequence[Path] = ()
) -> dict[str, Any]:
    """Bring the run through stage `before`, make its trial if that is not done, and write and give its forecast.

    `calibration`: directories of finished runs that count beside those of the package.

    Raises:
        RecoverError: one of its kinds, as `stages.run`; ArtifactError: a calibration run is not finished.
    """
    asked = runs.making(recipe.model_dump(mode="json"))
    # A run that was made already, the same as this one, would tell its own end.
    known = [row for row in (*known_runs(), *map(runs.read_run, calibration)) if row.made() != asked]
    directory = run(recipe, root, until="before")
    with graceful_stop():
        trial(Bench(recipe, directory), part)
    found = advice.forecast(_standing(recipe, directory), known)
    found |= {"recipe": {leaf: recipe.model_dump(mode="json")[leaf] for leaf in ("model", "prune", "recover")}}
    if dist.is_main():
        write_json(directory.root / "forecast.json", found)
    return found


def trial(bench: Bench, part: float) -> None:
    """Train on `part` of the tokens and write `trial/trial.json`: tokens, steps, seconds, measure and drift."""
    from recover.train.trainer import recover as train

    recipe, directory = bench.recipe, bench.directory
    leaf = trial_leaf(recipe.recover, part)
    marks, reason = dist.on_main(lambda: _marks_and_reason(bench, leaf))
    if reason is None:
        console.say("[dim]trial   [/dim] done")
        return
    console.heading("trial" if reason == NOT_DONE else f"trial, again: {reason}")
    with directory.lock() if dist.is_main() else nullcontext():
        twin = bench.lend()
        train(
            twin,
            bench.tokenizer,
            leaf,
            directory.folder("trial"),
            _measured(bench, twin),
            recipe.seed,
            trial_of=(recipe.recover, directory.recover / "data"),
        )
        dist.on_main(lambda: directory.mark_done("trial", marks))


def trial_leaf(leaf: Recover, part: float) -> Recover:
    """The first `part` of this recovery, as a recovery of its own: one epoch, the same rates as far as it goes.

    Text of the pruned model begins at the same step, so a trial may end before. Its adapter is that of its last step.
    """
    return leaf.model_copy(
        update={
            "tokens": round(leaf.tokens * part),
            "data": _first_text(leaf, part) if leaf.pruned else leaf.data,
            "epochs": 1,
            "scheduler": "constant",
            "warmup": min(leaf.warmup / part, 1.0),
            "loss": _loss_of_beginning(leaf.loss, part),
            "patience": None,
            "average": None,
        }
    )


def _loss_of_beginning(loss: Loss, part: float) -> Loss:
    """The loss with a fading weight as far on, step by step, as in the whole; so it may end after the trial does."""
    if loss.variance_until is None:
        return loss
    return loss.model_copy(update={"variance_until": loss.variance_until / part})


def _first_text(leaf: Recover, part: float) -> tuple[Data, ...]:
    """The sources with the shares and starts that they have in the first `part` of the steps."""
    from recover.train.order import taken

    begun = taken(leaf.shares, leaf.starts, part)
    return tuple(
        source.model_copy(update={"share": share, **_begun(source, start, part)})
        for source, share, start in zip(leaf.data, begun, leaf.starts, strict=True)
    )


def _begun(source: Data, start: float, part: float) -> dict[str, Any]:
    """What differs in the first `part`: when the pruned model's text begins, and how long it has grown by the end."""
    if not isinstance(source, PrunedText):
        return {}
    return {"start": start / part, "max_new_tokens": source.longest_at(part)}


def _marks_and_reason(bench: Bench, leaf: Recover) -> tuple[dict[str, Any], str | None]:
    marks = {**fingerprint("recover", bench.recipe, bench.directory), "trial": leaf.model_dump(mode="json")}
    return marks, bench.directory.stale_reason("trial", marks)


def _measured(bench: Bench, twin: Twin) -> Callable[[int, dict[str, Any]], float | None]:
    """All items, as before and after recovery; drawn texts and agreement are of no use here."""
    from recover.measure.tasks import measure
    from recover.probe.probe import final_drift

    recipe = bench.recipe
    leaf = recipe.measure.model_copy(update={"sampling": None})
    tasks = [task.without_samples() for task in bench.tasks]

    def score(epoch: int, context: dict[str, Any]) -> float | None:
        with twin.folded():
            record, _ = measure(twin.model, bench.tokenizer, tasks, leaf, seed=recipe.seed)
            drift = final_drift(twin, bench.tokenizer, bench.probe_prompts(), recipe.probe)
        if dist.is_main():
            found = {"epoch": epoch, **context, "measure": record, "drift": drift}
            write_json(bench.directory.folder("trial") / "trial.json", found)
        return record["headline"]["generation"]

    return score


def _standing(recipe: Recipe, directory: RunDirectory) -> advice.Trial:
    dense, record = (read_json(directory.root / name) for name in ("dense/measure.json", "trial/trial.json"))
    after = runs.State(record["tokens"], record["drift"]["kl"]["mean"], runs.shares(record["measure"], dense))
    return advice.Trial(
        model=runs.model_name(recipe.model.source),
        parameters=read_json(directory.prune / "plan.json")["parameters_dense"],
        tokens=recipe.recover.tokens,
        steps=record["step"],
        before=runs.read_state(directory.before, dense, 0),
        after=after,
        own_text=bool(recipe.recover.pruned),
    )
