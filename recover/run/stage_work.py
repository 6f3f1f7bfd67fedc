"""The work of each stage: what it reads, what it calls, what it writes. Stages and their order are in `stages.py`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

import torch
import transformers
from torch import LongTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recover import __version__
from recover.base import artifacts, console, dist, process, provenance
from recover.base.artifacts import (
    JsonObject,
    append_jsonl,
    check_manifest,
    read_json,
    read_jsonl,
    write_json,
    write_text,
)
from recover.base.clock import part
from recover.base.errors import ArtifactError
from recover.base.journal import Journal
from recover.base.products import NAMES
from recover.config import recipe as recipes
from recover.config.base import Dtype
from recover.config.recipe import Model, Recipe, dump_recipe, without_folders
from recover.config.tasks import WritingFile
from recover.export.gguf.importance import Importance, importance_of, write_importance
from recover.export.gguf.write import beside, nearest, quantized_bytes, weighs, write_gguf
from recover.export.verify import fresh_process, verify, write_expected
from recover.export.write import card, write_merged
from recover.measure.model import Generations
from recover.measure.speed import compare_speed
from recover.measure.tasks import measure
from recover.models.arch import arch_of
from recover.models.load import Description, describe, load_model, ready
from recover.models.plan import save_plan
from recover.models.source import code_of, exported_dtype, locate, stored_dtype
from recover.models.stored_weights import stored_in
from recover.models.twin import Twin
from recover.probe.probe import dense_trajectories, final_drift, probe
from recover.probe.records import summary
from recover.probe.sublayers import routing
from recover.probe.tasks import task_drift, tokens_of_changed
from recover.prune import registry
from recover.prune.calibrate import calibration_record
from recover.prune.registry import pruner_of
from recover.report import items, verdict
from recover.report.collect import collect
from recover.report.render import render
from recover.report.run_files import (
    Best,
    DeployedFile,
    EpochDrift,
    EpochLine,
    EpochMeasured,
    EpochProgress,
    EpochScore,
    MeasureRecord,
    OverlapRecord,
)
from recover.report.training import Compared, advice, foretold, setback_sentence, setbacks
from recover.report.words import shown_source
from recover.run.affordable import Work, smaller_than_asked
from recover.run.context import RunContext, calibration, overlap_record
from recover.run.directory import RunDirectory
from recover.run.estimate import Estimate, PlannedFile, estimate, matrix_rate, planned_file, rate_plan, refuse, warnings
from recover.run.forecast import forecast
from recover.run.forecast import lines as forecast_lines
from recover.run.input_digests import digests
from recover.run.tracking import refuse as refuse_trackers
from recover.train import train as training
from recover.train import trials
from recover.train.callbacks import AfterEpoch
from recover.train.checkpoints import best_of, read_adapter
from recover.train.written_text import weights_fingerprint


def plan(context: RunContext) -> None:
    """As `checked`; recipe, environment and estimates are put on record."""
    recipe, directory = context.recipe, context.directory
    found = checked(context)
    if dist.is_main():
        write_text(directory.recipe, dump_recipe(recipe))
        said = {"remote_code": found["code"], "commits": directory.commits_on_record() or None}
        known = {name: value for name, value in said.items() if value is not None}
        write_json(directory.env, provenance.environment() | known)
        write_json(directory.plan / "estimate.json", found["estimate"])
        write_json(directory.overlap, found["overlap"])


class Checked(TypedDict):
    """What `checked` finds; `code`: files of others' code that will run, None: none is let run."""

    estimate: Estimate
    code: list[str] | None
    overlap: OverlapRecord | None


def checked(context: RunContext, *, timed: bool = False) -> Checked:
    """Refuse what cannot work and say what the rest will cost, before any weight is loaded; nothing is written.

    `timed`: its time is said later, by `say_time`.

    Gives the `estimate`, the `code` of others that will run (None: none is let run), and on the main process the
    `overlap` of measured items with the text.
    """
    recipe = context.recipe
    code = _say_code(recipe.model)
    model = describe(recipe.model)
    refuse(recipe, model)
    refuse_trackers(recipe.track)
    process.choose_threads(model.width, model.intermediate, context.directory.threads())
    context.check_inputs()
    figures = estimate(recipe, model, matrix_rate())
    if (file := planned_file(recipe, context.tokenizer, figures)) is not None:
        figures["gguf"] = file
    auto = [*map(asdict, context.chosen)]
    if "lr" in recipe.train.auto:
        auto.append({"field": "lr", "value": "auto", "why": rate_plan(recipe.train, model.width)})
    record: Checked = {"estimate": {**figures, "auto": auto}, "code": code, "overlap": None}
    if not dist.is_main():
        return record
    record["overlap"] = overlaps = overlap_record(context)
    console.table("plan (estimates)", ["what", "dense", "pruned"], _plan_rows(figures, timed=timed))
    for each in auto:
        console.say(f"train.{each['field']}: {each['value']}: {each['why']}")
    for line in warnings(recipe, model):
        console.warn(line)
    if less := _smaller(context, model):
        console.say(f"smaller than `recover init` writes for a GPU (in brackets): {', '.join(less)}")
    for line in items.overlap_lines(overlaps):
        console.warn(line) if overlaps["found"] else console.say(f"[dim]{line}[/dim]")
    return record


def _smaller(context: RunContext, model: Description) -> list[str]:
    """What a machine without a GPU takes less of, where it would take hours with all of it."""
    cores = provenance.machine()["cores"]
    if dist.device().type != "cpu" or cores is None:
        return []
    recipe, tasks = context.recipe, context.tasks
    writing = sum(isinstance(task.file, WritingFile) for task in tasks)
    cost = pruner_of(recipe.prune).cost(recipe.prune, model)
    return smaller_than_asked(recipe, Work(model, recipe.prune, cost, len(tasks), writing), cores)


def _say_code(cfg: Model) -> list[str] | None:
    """Say which code of others will run, before any of it does; its files, None where none is let run."""
    code = code_of(cfg)
    if code is not None:
        there = ", ".join(code) or "no file of code is there now"
        console.warn(
            f"model.trust_remote_code: Python code that comes with {cfg.source} runs with all your rights: {there}"
        )
    return code


def say_time(context: RunContext, figures: Estimate, libraries: float, left: Mapping[str, float]) -> None:
    """Time the run's steps and texts on this machine, and say what its stages will take (`forecast.forecast`).

    `left`: the share of a stage that is still to be done, where it is not all.
    """
    console.say("[dim]timing a step, a text and a probe on this machine[/dim]")
    began = time.perf_counter()
    found = forecast(context, figures, libraries, left)
    said = f"time on this machine, found in {console.duration(time.perf_counter() - began)}"
    console.table(said, ["stage", "what", "time", "how"], forecast_lines(found))
    done = [stage for stage, share in left.items() if not share]
    kept = [f"done, and not counted: {', '.join(done)}"] if done else []
    for note in [*kept, *found["notes"]]:
        console.say(f"[dim]{note}[/dim]")


def _plan_rows(figures: Estimate, *, timed: bool = False) -> list[list[str]]:
    cached = [["dense states on disk", f"at least {console.size(figures['cache_bytes'])}", ""]]
    passes, seconds = figures["search_passes"], figures["search_seconds"]
    held = [["weights in main memory", "", f"about {console.size(figures['host_memory_bytes'])}"]]
    least = console.duration(seconds)
    search = [
        ["search for what goes", "", f"{passes:,} passes of calibration text{'' if timed else f', at least {least}'}"]
    ]
    files = [
        f"{console.size(figures['file_bytes_dense'])}, {figures['file_dtype_dense']}",
        f"{console.size(figures['file_bytes_pruned'])}, {figures['file_dtype_pruned']}",
    ]
    active = ["of them used for a token", f"{figures['active_dense']:,}", f"{figures['active_pruned']:,}"]
    return [
        ["parameters", f"{figures['parameters_dense']:,}", f"{figures['parameters_pruned']:,}"],
        *([active] if figures["active_dense"] != figures["parameters_dense"] else []),
        ["file", *files],
        *(_file_rows(figures.get("gguf"))),
        *(search if passes else []),
        ["teacher-scored tokens", "", f"{figures['teacher_tokens']:,}"],
        *([] if timed else [["training time", "", f"at least {console.duration(figures['training_seconds'])}"]]),
        ["memory per process", "", f"about {console.size(figures['memory_bytes_per_process'])}"],
        *(held if figures["host_memory_bytes"] else []),
        *(cached if figures["cache_bytes"] else []),
    ]


def _file_rows(file: PlannedFile | None) -> list[list[str]]:
    if file is None:
        return []
    beside = "" if "beside_bytes" not in file else f"{console.size(file['beside_bytes'])}, {file.get('beside')}"
    return [["GGUF file", beside, f"{console.size(file['bytes'])}, {file['quantize']}"]]


def dense(context: RunContext) -> None:
    """Measure the dense model; its texts are the reference of every later stage."""
    _measure(context, context.dense().model, context.directory.dense, reference=None)
    if dist.is_main():
        for line in verdict.blind(read_json(context.directory.dense / "measure.json")):
            console.warn(line)


def prune(context: RunContext) -> None:
    """Choose what goes, and write the plan and its masks."""
    context.read_together()
    dist.on_main(lambda: _prune(context))
    context.release()


def _prune(context: RunContext) -> None:
    cfg, batches, twin = context.recipe.prune, calibration(context), context.dense()
    journal = Journal(context.directory.prune / "parts", _pruned_from(context, twin, batches))
    with part("pruning"):
        plan, masks, weights = registry.prune(twin, cfg, batches, journal)
    save_plan(plan, masks, context.directory.prune, weights)
    journal.remove()
    console.say(plan.summary())


def _pruned_from(context: RunContext, twin: Twin, batches: list[LongTensor]) -> JsonObject:
    """All that the bits of a pruning depend on: a journal that was made from anything else is of no use."""
    text = hashlib.sha256()
    for ids_BT in batches:
        text.update(f"{tuple(ids_BT.shape)}".encode() + ids_BT.numpy().tobytes())
    device = twin.model.device
    return {
        "prune": context.recipe.prune.model_dump(mode="json"),
        "calibration": text.hexdigest(),
        "weights": weights_fingerprint(twin),
        "dtype": context.recipe.model.dtype,
        "attention": twin.base.config._attn_implementation,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {"recover": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def before(context: RunContext) -> None:
    """Probe and measure the pruned model as it is, untrained."""
    _probe_and_measure(context, context.pruned(), context.directory.before)


def train(context: RunContext) -> None:
    """Distil; after each epoch measure generation again, and keep the epoch that generates best."""
    recipe, directory = context.recipe, context.directory
    dist.on_main(lambda: _forget_epochs_again(directory))
    twin = context.lend()
    untrained: MeasureRecord = read_json(directory.before / "measure.json")
    after_epoch = _after_epoch(context, twin, untrained)
    with part("training"):
        training.train(
            twin,
            context.tokenizer,
            recipe.train,
            directory.train,
            after_epoch,
            recipe.seed,
            baseline_score=untrained["headline"]["generation"],
            log_step=context.tracking.step,
        )


def _after_epoch(context: RunContext, twin: Twin, untrained: MeasureRecord) -> AfterEpoch:
    """Measure what was trained so far, note it in epochs.jsonl, say what became worse, and give the score that decides.

    `untrained`: the pruned model's measurement. `twin` has no adapters yet.
    """
    directory, drift = context.directory, _drift_of_epochs(context, twin)
    pruned: Compared = {"measure": untrained, "drift": drift()}
    dumped = context.recipe.model_dump(mode="json")
    reference: MeasureRecord = read_json(directory.dense / "measure.json")
    parameters = read_json(directory.prune / "plan.json")["parameters_dense"]

    def score(epoch: int, progress: EpochProgress) -> float | None:
        found = _measured_epoch(context, twin, drift)
        if dist.is_main():
            if epoch == 1:
                directory.epochs.unlink(missing_ok=True)  # of a training that was begun anew
            now: EpochLine = {"epoch": epoch, **progress, **found}
            past: list[EpochLine] = read_jsonl(directory.epochs) if directory.epochs.exists() else []
            worse = setbacks(now, pruned, [each for each in past if each["epoch"] < epoch])
            append_jsonl(directory.epochs, {**now, "setbacks": worse})
            kl, loss = found["drift"].get("kl", {}).get("mean"), progress["train"]["loss"]
            context.tracking.epoch(progress["step"], found["measure"]["headline"], kl, loss)
            for line in [
                *(f"epoch {epoch}: {setback_sentence(each)}" for each in worse),
                *advice(worse, dumped, _rate(context)),
            ]:
                console.warn(line)
            for line in foretold(kl, progress["tokens"], found["measure"], reference, parameters):
                console.say(f"epoch {epoch}: {line}")
        return found["score"]

    return score


def _epoch_limit(cfg: recipes.Measure) -> int | None:
    """Items of each task after an epoch; None: all."""
    return min((value for value in (cfg.epoch_limit, cfg.limit) if value is not None), default=None)


def _measured_with(recipe: Recipe) -> JsonObject:
    """All that the figures of an epoch depend on, beside the weights."""
    measured = recipe.measure.model_dump(mode="json", include={"tasks", "max_new_tokens", "sampling"})
    probed = recipe.probe.model_dump(mode="json", include={"prompts", "samples", "steps"})
    fields = {"measure": {**measured, "limit": _epoch_limit(recipe.measure)}, "probe": probed}
    return {**fields, "inputs": digests(fields)}


def _drift_of_epochs(context: RunContext, twin: Twin) -> Callable[[], EpochDrift]:
    """What measures the drift of the twin as it is then, along trajectories that dense takes once."""
    prompts, cfg = context.probe_prompts(), context.recipe.probe
    trajectories = dense_trajectories(twin, context.tokenizer, prompts, cfg)
    return lambda: final_drift(twin, context.tokenizer, prompts, cfg, trajectories=trajectories)


def _measured_epoch(context: RunContext, twin: Twin, drift: Callable[[], EpochDrift]) -> EpochMeasured:
    """The part of a record of epochs.jsonl that measures the adapter which the twin has; `score` decides."""
    recipe = context.recipe
    reference = read_json(context.directory.dense / "generations.json")
    with twin.folded():
        record, _ = measure(
            twin.model,
            context.tokenizer,
            context.tasks,
            recipe.measure,
            reference=reference,
            limit=_epoch_limit(recipe.measure),
            seed=recipe.seed,
        )
        drifted = drift()
    score = record["headline"]["generation"]
    return {"measure": record, "drift": drifted, "score": score, "measured_with": _measured_with(recipe)}


def _rate(context: RunContext) -> float:
    """The highest learning rate of the training."""
    cfg = context.recipe.train
    return read_json(context.directory.train / trials.FILE)["chosen"] if "lr" in cfg.auto else cfg.lr


def after(context: RunContext) -> None:
    """Probe and measure the recovered model, from the adapter on disk: that of the epoch that generates best.

    Epochs that were measured in another way than is asked for now are measured again before, from their adapters.
    """
    if dist.is_main() and context.exports():
        begin_verifier(context)
    _epochs_again(context)
    _probe_and_measure(context, context.recovered(), context.directory.after)


def _epochs_again(context: RunContext) -> None:
    directory, wanted = context.directory, artifacts.plain(_measured_with(context.recipe))
    best: Best = read_json(directory.train / "best.json")
    trained: dict[int, EpochLine] = {record["epoch"]: record for record in read_jsonl(directory.epochs)}
    fits = all(trained[each["epoch"]].get("measured_with") == wanted for each in best["epochs"])
    if fits or not trained:
        dist.on_main(lambda: _forget_epochs_again(directory))
        return
    known = _known_again(directory, wanted)
    twin = context.recovered()
    drift = _drift_of_epochs(context, twin)
    rows: list[EpochScore] = []
    for each in best["epochs"]:
        epoch, folder = each["epoch"], directory.train / each["folder"]
        if epoch not in known:
            try:
                dist.on_main(lambda folder=folder: check_manifest(folder))
            except ArtifactError as error:
                console.warn(f"epoch {epoch} cannot be measured again and is not chosen from: {error}")
                continue
            read_adapter(twin.model, folder)
            known[epoch] = {**trained[epoch], **_measured_epoch(context, twin, drift)}
            known[epoch].pop("setbacks", None)
            if dist.is_main():
                append_jsonl(directory.epochs_again, known[epoch])
        rows.append({**each, "score": known[epoch]["score"]})
        score = known[epoch]["score"]
        shown = "generation not measured" if score is None else f"generation {score:.1%}"
        console.say(f"epoch {epoch}, measured again from its adapter: {shown}")
    context.release()  # the twin has the adapter of the last epoch
    if not rows:
        raise ArtifactError(
            f"{directory.train}: no adapter of an epoch is as it was written, so none can be measured again: put one "
            "back, or train again: recover run RECIPE --from train"
        )
    dist.on_main(lambda: write_json(directory.best_again, {**best_of(rows), "epochs": rows}))


def _known_again(directory: RunDirectory, wanted: JsonObject) -> dict[int, EpochLine]:
    """Epochs that an earlier call, which was stopped, measured again as is `wanted`; other records go."""

    def read() -> dict[int, EpochLine]:
        there: list[EpochLine] = read_jsonl(directory.epochs_again) if directory.epochs_again.exists() else []
        known = {record["epoch"]: record for record in there if record.get("measured_with") == wanted}
        directory.best_again.unlink(missing_ok=True)
        if len(known) < len(there):
            write_text(directory.epochs_again, "".join(f"{artifacts.dumps(each)}\n" for each in known.values()))
        return known

    return dist.on_main(read)


def _forget_epochs_again(directory: RunDirectory) -> None:
    for path in (directory.best_again, directory.epochs_again):
        path.unlink(missing_ok=True)


def begin_verifier(context: RunContext) -> None:
    """Start the process that is to verify the export: it loads its libraries while stages before go on.

    Another one where that has ended meanwhile: it waits longest of all, and may be killed where memory is short.
    """
    if context.verifier is None or context.verifier.poll() is not None:
        context.verifier = context.aside.enter_context(fresh_process())


def export(context: RunContext) -> None:
    """Write the checkpoint to ship, and verify it in a fresh process."""
    context.read_together()
    dist.on_main(lambda: _export(context))
    context.release()
    dist.on_main(lambda: _speed(context))


def _export(context: RunContext) -> None:
    recipe, directory = context.recipe, context.directory
    dtype = getattr(torch, _exported_dtype(context))
    begin_verifier(context)
    twin = context.recovered()
    console.say("[dim]merging and writing[/dim]")
    with part("merging and writing"):
        text, record = _card_and_record(context)
        size = recipe.export.max_shard_size
        merged = write_merged(
            twin, dtype, context.tokenizer, directory.deploy, card=text, record=record, max_shard_size=size
        )
    expected = directory.root / "expected.safetensors"
    begin_verifier(context)
    console.say("[dim]verifying in a fresh process[/dim]")
    write_expected(expected, twin, merged, context.sample_ids())
    process, context.verifier = context.verifier, None
    verify(directory.deploy, expected, directory.prune / "plan.json", directory.verify, process=process)
    expected.unlink()


def _exported_dtype(context: RunContext) -> Dtype:
    cfg = context.recipe.model
    return exported_dtype(cfg.dtype, stored_dtype(cfg), context.recipe.export.dtype)


def _speed(context: RunContext) -> None:
    """Dense and the export as stock models, by turns: the twin would make dense pay for adapters that it has not."""
    console.say("[dim]timing dense and the export by turns[/dim]")
    cfg = context.recipe.model
    # The same config for both, so that they differ in nothing but what was pruned: attention kernel, loader, checks.
    dtype = _exported_dtype(context)
    there = {"source": str(context.directory.deploy), "revision": None, "dtype": dtype}
    with part("reading weights"):
        dense = context.stock() if dtype == cfg.dtype else ready(load_model(cfg.model_copy(update={"dtype": dtype})))
        if cfg.load_in is None and stored_in(dense) is not None:  # not a second model in memory
            there["offload"] = "cpu" if arch_of(dense).experts else "disk"
        deployed = load_model(cfg.model_copy(update=there))
    with part("timing dense and the export"):
        # Weights that come and go set the pace, the same for any step: a few tell as much as many.
        steps = 32 if stored_in(dense) is None else 4
        figures = compare_speed(dense, deployed, dist.device(), steps=steps)
    write_json(context.directory.speed, {**figures, "machine": provenance.machine()})


def deploy(context: RunContext) -> None:
    """Write the export as a quantized GGUF file, beside it the dense model if that is asked for, and measure each.

    What is measured is the file's own weights and tokenizer, dequantized, in the dtype of the other measurements.
    """
    recipe, directory = context.recipe, context.directory
    if recipe.importance_text is not None and recipe.importance_text.answer is not None:
        context.read_together()  # the dense model writes the text
    files = dist.on_main(lambda: _quantized_files(context))
    context.forget()
    for model, file in files.items():
        path = directory.root / file["path"]
        console.say(f"[dim]{model}: {file['path']}, {file['quantize']}, {console.size(file['bytes'])}[/dim]")
        loaded, tokenizer = context.served(file)
        reference = read_json(directory.dense / "generations.json")
        _measure(context, loaded, path.parent, reference=reference, tokenizer=tokenizer)
        del loaded
    if dist.is_main():
        write_json(directory.gguf / "files.json", files)


def _quantized_files(context: RunContext) -> dict[str, DeployedFile]:
    """The export's file and, where it is asked for, that of the dense model, both rounded by one text's importance."""
    directory, cfg, source = context.directory, context.recipe.deploy, context.recipe.model
    assert cfg.quantize is not None
    text = context.recipe.importance_text
    batches = [] if text is None else calibration(context, text)
    context.forget()

    def written(folder: Path, model: Model, into: Path, kind: str) -> DeployedFile:
        path, weights = into / "model.gguf", into / "imatrix.gguf"
        importance, record = None, {}
        weights.unlink(missing_ok=True)
        if text is not None and weighs(kind):
            with part("measuring importance"):
                importance = _importance(model, batches, shown_source(text.data))
            write_importance(importance, weights)
            record = {"importance": calibration_record(text, batches) | {"data": shown_source(text.data)}}
        with part("writing GGUF"):
            write_gguf(folder, path, kind, importance)
        name = path.relative_to(directory.root).as_posix()
        return {"path": name, "quantize": kind, "bytes": path.stat().st_size, **record}  # type: ignore[typeddict-item]

    exported = source.model_copy(update={"source": str(directory.deploy), "revision": None, "tokenizer": None})
    files = {"deployed": written(directory.deploy, exported, directory.gguf, cfg.quantize)}
    if cfg.beside is not None:
        folder = locate(source)
        sizes = {kind: size for kind, size in quantized_bytes(folder).items() if kind in beside(cfg.quantize)}
        kind = nearest(sizes, quantized_bytes(directory.deploy)[cfg.quantize])
        files["alternative"] = written(folder, source, directory.gguf / "dense", kind)
        return files
    for name in NAMES["deploy"]:  # of when it was asked for
        if name.startswith("gguf/dense/"):
            (directory.root / name).unlink(missing_ok=True)
    return files


def _importance(cfg: Model, batches: list[LongTensor], text: str) -> Importance:
    """Of a model as it lies in its files: not quantized by `load_in`, and then in main memory."""
    there = {"load_in": None, "offload": "cpu" if cfg.load_in else cfg.offload}
    return importance_of(ready(load_model(cfg.model_copy(update=there))), batches, text)


class Deployed(TypedDict):
    """recover.json of an export: how the model in the folder was made."""

    recipe: JsonObject
    headlines: dict[str, dict[str, float | None]]
    kept: EpochLine
    environment: provenance.Environment
    commits: dict[str, str]


def _card_and_record(context: RunContext) -> tuple[str, Deployed]:
    """The model card's text, and recover.json: where every figure of it comes from."""
    recipe, directory = context.recipe, context.directory
    headlines = _headlines(directory)
    best = directory.best()["epoch"]
    epochs = directory.epochs_again if directory.best_again.exists() else directory.epochs
    kept = [record for record in read_jsonl(epochs) if record["epoch"] == best][-1]
    environment = provenance.environment()
    facts = {
        "teacher-scored tokens": f"{kept['tokens']:,} (epoch {kept['epoch']}, the one that generates best)",
        "seed": recipe.seed,
        "versions": ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version),
    }
    if overlaps := read_json(directory.overlap)["found"]:
        facts["measured items in its text"] = "; ".join(map(items.overlap_sentence, overlaps))
    record: Deployed = {
        "recipe": without_folders(recipe.model_dump(mode="json")),
        "headlines": headlines,
        "kept": kept,
        "environment": environment,
        "commits": directory.commits_on_record(),
    }
    return card(recipe, read_json(directory.prune / "plan.json"), headlines, facts), record


def _headlines(directory: RunDirectory) -> dict[str, dict[str, float | None]]:
    """What was measured of each model."""
    folders = {"dense": directory.dense, "pruned": directory.before, "recovered": directory.after}
    return {name: read_json(folder / "measure.json")["headline"] for name, folder in folders.items()}


def report(context: RunContext) -> None:
    """Collect the files of the run into report.json, report.md and report.html."""
    if not dist.is_main():
        return
    root = context.directory.root
    data = collect(root)
    render(root, data)
    verdict.print_end(data, root)
    _track_outcome(context)


def _track_outcome(context: RunContext) -> None:
    directory = context.directory
    exported = str((directory.done("export") or {}).get("finished"))
    context.tracking.outcome(directory.best()["step"], _headlines(directory), directory.report_html, exported)


def _probe_and_measure(context: RunContext, twin: Twin, folder: Path) -> None:
    cfg, tokenizer = context.recipe.probe, context.tokenizer
    # No items that nobody measures: a limit there is a limit here.
    items = min(cfg.items, context.recipe.measure.limit or cfg.items)
    with twin.folded():
        found = probe(twin, tokenizer, context.probe_prompts(), cfg)
        found += routing(twin, context.probe_prompts()[: cfg.samples])
        found += task_drift(twin, tokenizer, context.tasks, items=items, batch_size=cfg.batch_size)
        records = [record.to_json() for record in found]
        if dist.is_main():
            artifacts.write_jsonl(folder / "probe.jsonl", records)
            write_json(folder / "probe.json", summary(found))
        reference = read_json(context.directory.dense / "generations.json")
        _measure(context, twin.model, folder, reference=reference, twin=twin)


def _measure(
    context: RunContext,
    model: PreTrainedModel,
    folder: Path,
    *,
    reference: Generations | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    twin: Twin | None = None,
) -> None:
    """measure.json and generations.json of a model; of a `twin`, with the KL of each token of texts that changed."""
    record, generations = measure(
        model,
        tokenizer or context.tokenizer,
        context.tasks,
        context.recipe.measure,
        reference=reference,
        seed=context.recipe.seed,
    )
    if twin is not None and reference is not None:
        dense = read_json(context.directory.dense / "measure.json")["tasks"]
        for task in context.tasks:
            right = dense[task.name].get("each") or [], record["tasks"][task.name].get("each") or []
            if task.name in generations and len(right[0]) == len(right[1]):
                ids = [row["ids"] for row in reference[task.name]]
                for item, tokens in tokens_of_changed(twin, context.tokenizer, task, right, ids).items():
                    generations[task.name][item]["dense_kl"] = [(piece, float(f"{kl:.3g}")) for piece, kl in tokens]
    if dist.is_main():
        write_json(folder / "generations.json", generations)
        write_json(folder / "measure.json", record)
        console.say(verdict.headline_line(record["headline"]))


# Each stage's work, by its name; order, and what each is made from, are in `stages.py`.
WORK: dict[str, Callable[[RunContext], None]] = {
    "plan": plan,
    "dense": dense,
    "prune": prune,
    "before": before,
    "train": train,
    "after": after,
    "export": export,
    "deploy": deploy,
    "report": report,
}
