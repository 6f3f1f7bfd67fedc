"""The whole truth of a run as one JSON-able dict, read from the files of its run directory.

A file that is not there yet is a stage not done: its place in the result is None and `missing` names it.
Nothing is invented.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from recover.base import artifacts, clock, earlier
from recover.base.errors import ArtifactError, RecipeError
from recover.base.products import taken_apart
from recover.config import yaml_values
from recover.config.tasks import KINDS, USES
from recover.maths.score import Change, of_means
from recover.report import drift, items, verdict, words
from recover.report import made as making
from recover.report.data import (
    MODELS,
    DivergenceRow,
    Drift,
    Epoch,
    Json,
    Lead,
    Parted,
    Plan,
    Rise,
    RunData,
    Sample,
    Served,
    Text,
    Tokens,
)
from recover.report.run_files import (
    FOLDERS,
    MeasureRecord,
    Model,
    Overlap,
    RateTrials,
    Records,
    SampleRecord,
    Task,
    Use,
)
from recover.report.training import FEW_ITEMS, curve, foretold

SCHEMA = 1
DRIFT_FOLDER = {"pruned": "before", "recovered": "after"}

# What a missing file leaves unknown.
CONSEQUENCES = {
    "dense/measure.json": "the dense model is not measured",
    "before/measure.json": "the pruned model is not measured",
    "after/measure.json": "the recovered model is not measured",
    "gguf/measure.json": "the deployed file is not measured",
    "gguf/dense/measure.json": "the dense model of as many bytes is not measured",
    "before/probe.json": "drift of the pruned model is not measured",
    "after/probe.json": "drift of the recovered model is not measured",
    "prune/plan.json": "nothing was pruned yet",
    "epochs.jsonl": "no epoch of recovery was finished",
    "verify.json": "the exported checkpoint is not verified",
    "speed.json": "size and speed of the exported checkpoint are not measured",
}


def collect(root: Path) -> RunData:
    """Everything that the run at `root` has measured so far; the value is JSON-able and free of NaN.

    Raises ArtifactError if `root` holds no recipe.yaml, or if a file of the run is corrupt.
    """
    with taken_apart(root):
        return _collect(root)


def _collect(root: Path) -> RunData:
    recipe = _recipe(root)
    shown = models_of(recipe)
    records: Records = {model: _json(root / FOLDERS[model] / "measure.json") for model in shown}
    unasked = {f"{FOLDERS[model]}/measure.json" for model in MODELS if model not in shown}
    plan = _json(root / "prune" / "plan.json")
    again = root / "after" / "epochs.jsonl"  # of a run whose epochs were measured again
    epochs = _epochs(again if (root / "after" / "best.json").is_file() and again.is_file() else root / "epochs.jsonl")
    more, left_out = making.added(root)
    headline = verdict.headline(_for_headline(records, more))
    records = _joined(records, more)
    made = making.made(root, recipe)
    data: RunData = {
        "schema": SCHEMA,
        "name": recipe.get("name") or root.name,
        "recipe": recipe,
        "missing": [
            {"file": file, "means": text}
            for file, text in CONSEQUENCES.items()
            if file not in unasked and not (root / file).is_file()
        ],
        "mixed": [*making.mixed(made), *left_out],
        "provenance": {"env": _json(root / "env.json"), "deployed": _json(root / "deploy" / "recover.json")},
        "plan": _plan_summary(plan),
        "estimate": _json(root / "plan" / "estimate.json"),
        "headline": headline,
        "measures": verdict.measure_rows(records),
        "drift": {model: _drift(root / folder) for model, folder in DRIFT_FOLDER.items()},
        "epochs": epochs,
        "training": _json(earlier.place(root, "train/training.json")),
        "rate_trials": _rate_trials(root, recipe),
        "curve": curve(earlier.place(root, "train/steps.jsonl"), recipe),
        "tokens": _tokens_used(epochs),
        "speed": _json(root / "speed.json"),
        "verify": _json(root / "verify.json"),
        "served": _served(root, records),
        "times": clock.spent(root),
        "made": made,
        "measured_later": [record["task"] for record in more],
        "samples": side_by_side(records),
        "mistakes": items.counted_mistakes(records),
        "exchanged": items.exchanged(root, records),
        "overlap": _overlap(root / "plan" / "overlap.json"),
        "examples": items.mistake_examples(records),
        "divergence": divergence(records),
        "verdict": verdict.verdict(headline),
        "title": "",
        "summary": "",
        "foretold": [],
        "limits": [],
    }
    data["foretold"] = _foretold(data, records)
    data["title"], data["summary"] = verdict.title(data), verdict.summary(data)
    data["limits"] = [*known_limits(data), *where_programs_ran(records)]
    return words.jsonable(data)


def models_of(recipe: Json) -> list[Model]:
    """The models that a run of this recipe measures, in the order of the page."""
    cfg = recipe.get("deploy") or {}
    asked = {"deployed": cfg.get("quantize"), "alternative": cfg.get("beside")}
    return [model for model in MODELS if asked.get(model, True)]


def _served(root: Path, records: Records) -> Served | None:
    """None where stage deploy was not asked for, or is not done."""
    files = _json(root / FOLDERS["deployed"] / "files.json")
    if "deployed" not in records or files is None:
        return None
    deployed, alternative = (((records.get(model) or {}).get("tasks") or {}) for model in ("deployed", "alternative"))
    lead: dict[Use, Lead] = {}
    for use in USES:
        names = [name for name, task in deployed.items() if task["kind"] in KINDS and KINDS[task["kind"]].use == use]
        change = _paired([(alternative.get(name), deployed[name]) for name in names])
        if change is not None:
            better: Model | None = "deployed" if change.rose else "alternative" if change.fell else None
            lead[use] = {"value": change.value, "interval": [change.low, change.high], "better": better}
    return {"files": {model: file for model, file in files.items() if model in records}, "lead": lead}


def _paired(pairs: list[tuple[Task | None, Task]]) -> Change | None:
    """None where one of the tasks was not measured of both on the same items."""
    each = [((was or {}).get("each") or [], now.get("each") or []) for was, now in pairs]
    same = bool(each) and all(len(was) == len(now) for was, now in each)
    return of_means(each) if same else None


def _joined(records: Records, more: list[Json]) -> Records:
    """The records with those tasks too that were measured later."""
    joined: Records = {}
    for model, record in records.items():
        tasks = {each["task"]: each["models"][model] for each in more if model in each["models"]}
        whole: Json = {**(record or {}), "tasks": {**((record or {}).get("tasks") or {}), **tasks}}
        joined[model] = cast(MeasureRecord, whole) if record is not None or tasks else None
    return joined


def _for_headline(records: Records, more: list[Json]) -> Records:
    """With those later tasks alone whose use the recipe's tasks do not measure: what was judged stays as it was."""
    own = {
        KINDS[task["kind"]].headline
        for record in records.values()
        for task in ((record or {}).get("tasks") or {}).values()
        if task["kind"] in KINDS
    }
    kinds = {each["task"]: next(iter(each["models"].values()))["kind"] for each in more if each["models"]}
    wanted = [
        each for each in more if kinds.get(each["task"]) in KINDS and KINDS[kinds[each["task"]]].headline not in own
    ]
    joined = _joined(records, wanted)
    alone = [each for each in wanted if KINDS[kinds[each["task"]]].use is None]
    for model, record in joined.items():
        for each in alone if len(alone) == 1 else ():
            if record is None:
                continue
            kind = KINDS[kinds[each["task"]]]
            value = (each["models"].get(model) or {}).get(kind.main.key)
            record["headline"] = {**(record.get("headline") or {}), kind.headline: value}
    return joined


def _recipe(root: Path) -> Json:
    path = root / "recipe.yaml"
    if not path.is_file():
        raise ArtifactError(
            f"{path}: not found, so {root} is not a run directory. Give the folder that `recover run` wrote"
        )
    try:
        return earlier.sections(yaml_values.read(path), str(path))
    except RecipeError as error:
        raise ArtifactError(f"{error}. It was written by stage plan: run that stage again") from error


def _json(path: Path) -> Any:
    """The record in the file, None if there is no file; raises ArtifactError if it is not a JSON object."""
    if not path.is_file():
        return None
    value = artifacts.read_json(path)
    if not isinstance(value, dict):
        raise ArtifactError(
            f"{path}: expected a JSON object, found {type(value).__name__}. Run the stage that writes it again"
        )
    return value


def _foretold(data: RunData, records: Records) -> list[str]:
    """Of the recovered model, which was trained up to the epoch that is kept."""
    summary, measured = data["drift"]["recovered"], records.get("recovered")
    if summary is None or measured is None or data["tokens"] is None:
        return []
    kl = drift.level(summary["final"].get("kl"), "mean")
    parameters = (data["plan"] or {}).get("parameters_dense")
    return foretold(kl, data["tokens"]["kept"], measured, records.get("dense"), parameters)


def _rate_trials(root: Path, recipe: Json) -> RateTrials | None:
    """Of the training that there is: a rate that was given later was not found by trials."""
    given = (recipe.get("train") or {}).get("lr")
    return _json(earlier.place(root, "train/trials.json")) if given == "auto" else None


def _drift(folder: Path) -> Drift | None:
    summary = _json(folder / "probe.json")
    return None if summary is None else drift.read(summary)


def _overlap(path: Path) -> list[Overlap] | None:
    """None where it was not looked for, as in runs of an earlier version."""
    found = _json(path)
    if found is None:
        return None
    return [cast(Overlap, {**each, "field": earlier.current(each["field"])}) for each in found["found"]]


def _epochs(path: Path) -> list[Epoch]:
    """One record an epoch with its headline figures; the last written wins, since a resumed run may repeat an epoch."""
    if not path.is_file():
        return []
    latest = {record["epoch"]: record for record in artifacts.read_jsonl(path)}
    rows = []
    before: Json | None = None
    for epoch, record in sorted(latest.items()):
        measured = cast(MeasureRecord, record.get("measure") or {})
        train = record.get("train") or {}
        form, content = items.mistake_shares(measured) or (None, None)
        rows.append(
            {
                **{key: record.get(key) for key in ("step", "tokens", "seconds", "score")},
                "epoch": epoch,
                "train": train,
                "headline": measured.get("headline") or {},
                "loop_rate": items.loop_rate(measured),
                "loops_begin": items.loops_begin(measured),
                "form": form,
                "content": content,
                "items": {name: task.get("items") for name, task in (measured.get("tasks") or {}).items()},
                "drift": drift.final_figures(record.get("drift") or {}),
                "setbacks": record.get("setbacks") or [],
                "rise": None if before is None else _rise(before, record),
            }
        )
        before = record
    return _one_best(rows)


def _rise(before: Json, now: Json) -> Rise | None:
    """None where the two epochs were not measured on the same items, or their records do not hold them."""
    tasks = [(record.get("measure") or {}).get("tasks") or {} for record in (before, now)]
    names = [name for name, task in tasks[1].items() if task["kind"] in KINDS and _generates(task["kind"])]
    change = _paired([(tasks[0].get(name), tasks[1][name]) for name in names])
    if change is None:
        return None
    tokens = [words.finite(record.get("tokens")) for record in (before, now)]
    return {
        "value": change.value,
        "interval": [change.low, change.high],
        "tokens": None if None in tokens else int((tokens[1] or 0) - (tokens[0] or 0)),
        "real": change.rose or change.fell,
    }


def _generates(kind: str) -> bool:
    return KINDS[kind].headline == "generation"


def _one_best(rows: list[Epoch]) -> list[Epoch]:
    """Marks the first epoch of the highest score, the one that is kept (a record written earlier cannot know it)."""
    scores = {row["epoch"]: score for row in rows if (score := words.finite(row["score"])) is not None}
    best = max(scores, key=lambda epoch: (scores[epoch], -epoch), default=None)
    return [{**row, "best": row["epoch"] == best} for row in rows]


def _tokens_used(epochs: list[Epoch]) -> Tokens | None:
    """Tokens behind the checkpoint that is kept, and over the whole training (both counted from its start)."""
    if not epochs:
        return None
    best = next((row for row in epochs if row["best"]), epochs[-1])
    return {"kept": best["tokens"], "all": epochs[-1]["tokens"], "epoch": best["epoch"], "epochs": len(epochs)}


def _plan_summary(plan: Json | None) -> Plan | None:
    """The plan, its masks summed up per module instead of listed."""
    if plan is None:
        return None
    masks = plan.get("masks") or {}
    weights = sum(mask["shape"][0] * mask["shape"][1] for mask in masks.values())
    zeros = sum(mask["zeros"] for mask in masks.values())
    modules = [
        {"module": name, "sparsity": mask["zeros"] / (mask["shape"][0] * mask["shape"][1])}
        for name, mask in masks.items()
    ]
    summed = {
        "modules": modules,
        "sparsity": zeros / weights if weights else None,
        "patterns": sorted({mask["pattern"] for mask in masks.values()}),
    }
    return cast(Plan, {**{key: value for key, value in plan.items() if key != "masks"}, **summed})


def others(records: Records) -> list[Model]:
    """The models that are held against dense."""
    return [model for model in records if model != "dense"]


def side_by_side(records: Records) -> list[Sample]:
    """One entry a task and prompt: {task, kind, expected, prompt, dense, pruned, recovered: text or None}."""
    found: dict[tuple[str, str], Sample] = {}
    for model, record in records.items():
        for name, task in ((record or {}).get("tasks") or {}).items():
            for sample in task.get("samples") or ():
                prompt = words.clean(sample.get("prompt", ""))
                entry = found.setdefault((name, prompt), {"task": name, "kind": task["kind"], "prompt": prompt})
                expected = sample.get("expected")
                entry["expected"] = None if expected is None else words.clean(expected)
                entry[model] = _text(sample)
    return [_with_differences(entry, records) for entry in found.values()]


def _text(sample: SampleRecord) -> Text:
    shown = words.beginning(words.clean(sample.get("text") or ""))
    answer = sample.get("answer")
    return {"text": shown, "answer": None if answer is None else words.clean(answer), "correct": sample.get("correct")}


def _with_differences(entry: Sample, records: Records) -> Sample:
    """Adds to each text of the other models the word at which it leaves dense, with the text before and after."""
    dense = entry.setdefault("dense", None)
    for model in others(records):
        text = entry.setdefault(model, None)
        if text is None or dense is None:
            continue
        index = words.first_difference(dense["text"], text["text"])
        before, word, after = words.split_at_word(text["text"], index)
        text |= {"differs_at_word": index, "before": before, "word": word, "after": after}
    return entry


def divergence(records: Records) -> list[DivergenceRow]:
    """One row a generative task: when greedy texts leave dense's, how many never do, and agreement token by token."""
    names = [
        name for name, task in ((records.get("dense") or {}).get("tasks") or {}).items() if task["kind"] == "generate"
    ]
    rows = []
    for name in names:
        tasks = {model: ((records.get(model) or {}).get("tasks") or {}).get(name) for model in others(records)}
        parted = {model: _parted(task) if task else None for model, task in tasks.items()}
        rows.append(cast(DivergenceRow, {"task": name, "pruned": None, "recovered": None, **parted}))
    return rows


def _parted(task: Task) -> Parted:
    """A record of an earlier version has no `parting`: it counted texts that never leave dense as leaving at their end.

    Its median holds where most texts do leave.
    """
    never = words.finite(task.get("exact_text"))
    found: Json | None = task.get("parting")
    if found is None:
        first = task.get("first_divergence") or {}
        found = {name: first.get(name) for name, left in (("p50", 0.5), ("p90", 0.1)) if never is None or never < left}
    return {
        "never": never,
        "p50": words.finite(found.get("p50")),
        "p90": words.finite(found.get("p90")),
        "curve": [(token, share) for token, share in found.get("curve") or ()],
        "agreement": words.finite(task.get("agreement")),
    }


def where_programs_ran(records: Records) -> list[str]:
    """A line for each way in which programs that the models wrote were kept apart from the machine, with its tasks."""
    tasks: dict[str, set[str]] = {}
    for record in records.values():
        for name, task in (record or {"tasks": {}})["tasks"].items():
            if kept := task.get("isolation"):
                tasks.setdefault(kept, set()).add(name)
    danger = " They could change any file of whoever ran them, those of this report too."
    return [
        f"Programs that the models wrote ({', '.join(sorted(names))}) were run {kept}."
        + danger * kept.startswith("unconfined")
        for kept, names in sorted(tasks.items())
    ]


def known_limits(data: RunData) -> list[str]:
    """What a reader must not conclude from this report, each line true of this very run."""
    limits = [f"{text[0].upper()}{text[1:]}." for text in map(items.overlap_sentence, data["overlap"] or ())]
    small = sorted(
        {
            row["task"]
            for row in data["measures"]
            if row["main"] and row["better"] == "higher" and 0 < (row["items"] or 0) < FEW_ITEMS
        }
    )
    if small:
        limits.append(f"Fewer than {FEW_ITEMS} items: {', '.join(small)}. Read the intervals, not the points.")
    limits.append(
        "Intervals are 95% intervals over items: Wilson's where an item is right or wrong, else by bootstrap. They do "
        "not hold the spread over training seeds: this is one run with one seed."
    )
    if data["verdict"]["recovered"]["retrieval"]["grade"] == "not measured":
        limits.append("Retrieval was not measured. A small embedding drift is no proof that a ranking stays as it was.")
    if data["headline"]["dense"] and data["headline"]["dense"]["choice"]:
        limits.append(
            "Choice ranks given options by likelihood. It is no evidence that the model can write the same answer, and "
            "a model at chance level keeps a share of dense that looks better than it is."
        )
    if data["measured_later"]:
        limits.append(
            f"Measured later, and not among the tasks of the recipe: {', '.join(data['measured_later'])}. Where the "
            "recipe's own tasks measure a use, they alone decide its verdict and chose the epoch."
        )
    epoch_items = (data["epochs"][-1]["items"] if data["epochs"] else {}) or {}
    full = {row["task"]: row["items"] for row in data["measures"] if row["main"]}
    if any(items and items < (full.get(task) or 0) for task, items in epoch_items.items()):
        limits.append("Epochs were measured on fewer items than the final figures, so their points scatter more.")
    if data["plan"] and data["plan"]["modules"]:
        limits.append(
            "Masked weights are stored as zeros: on stock kernels the file is as large and the speed the same as dense."
        )
    limits.append(
        "Only the listed tasks were measured. Text in other domains, other languages and longer answers may have "
        "suffered unseen."
    )
    return limits
