"""The Python door: a model is loaded, pruned, probed, measured, distilled and exported in one process, read once.

Each function calls what a stage of a run calls. Names are reached as `recover.load`, `recover.prune` and so on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import LongTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recover.base import dist
from recover.base.artifacts import write_json
from recover.base.console import quiet_libraries
from recover.base.errors import ArtifactError, RecipeError, TrainingError
from recover.base.journal import Journal
from recover.config.base import Config, explain
from recover.config.defaults import Facts, settled
from recover.config.prune import Calibration, Depth, Experts, Magnitude, SparseGpt, Wanda, Width
from recover.config.recipe import Measure, Model, Probe, Sampling, load_recipe
from recover.config.train import Data, Train
from recover.export.verify import verify, write_expected
from recover.export.write import plain_card, write_merged
from recover.measure import tasks as tasks_of
from recover.measure.tasks import Task, load_task
from recover.models.arch import blocks_of
from recover.models.load import check_fit, load_any, load_tokenizer
from recover.models.plan import Plan
from recover.models.source import stored_dtype
from recover.models.twin import Held, Twin
from recover.probe import probe as probing
from recover.probe.records import Record
from recover.probe.views import Pair
from recover.prune import registry
from recover.prune.calibrate import calibration_batches
from recover.report.collect import collect
from recover.report.render import is_diagnosis, render, render_diagnosis
from recover.report.run_files import EpochProgress
from recover.run import stages
from recover.run.context import answers
from recover.run.directory import RunDirectory
from recover.text.prompts import Prompt, text_ids
from recover.train.checkpoints import read_adapter
from recover.train.train import train

Method = Depth | Magnitude | Wanda | SparseGpt | Width | Experts
Text = str | Path | Sequence[str]

# Read by the exported model and by the twin, whose logits must agree: which words they are does not matter.
SAMPLE = "A model is exported right when it says of these words, and of each that follows, what was trained before."


def load(source: str, *, dtype: str | None = None, **fields: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A dense model in evaluation mode on this process's device, and its tokenizer.

    `source`: a hub id, a folder, a GGUF file, or `embedded:NAME`. `dtype`: float32, bfloat16 or float16; default: as
    stored. `fields`: any other of a recipe's `model` (`revision`, `tokenizer`, `attention`, `trust_remote_code`).

    Raises:
        ModelError: the model is not whole, or of a kind that is not supported. RecipeError: a field is wrong.
    """
    quiet_libraries()
    cfg = _config(Model, "recover.load", source=source, **({} if dtype is None else {"dtype": dtype}), **fields)
    if dtype is None:
        cfg = cfg.model_copy(update={"dtype": stored_dtype(cfg)})
    tokenizer = load_tokenizer(cfg)
    model = load_any(cfg)
    check_fit(model, tokenizer)
    return model, tokenizer


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cfg: Method,
    *,
    text: Text | None = None,
    seed: int = 0,
) -> Twin:
    """A twin that shows the pruned model, and inside `with twin.dense():` the dense one.

    Its weights are those of `model`, which stays as it is and can be measured, or pruned in another way, afterwards.
    `text`: what scores are measured on, a list of texts or a file or data set (`calibration.data` of a recipe); it
    stands in for `cfg.calibration.data`. `seed`: of the order of texts. `twin.plan` says what went, with every score;
    `twin.replan(plan)` is a twin of the same weights with another plan.

    Raises:
        PruneError: the method cannot work on this model. DataError: the text is too short, or cannot be used.
        RecipeError: scores need text, and none is given. ModelError: the model belongs to a twin already.
    """
    held = Held(model)
    dense = held.twin(Plan.none(len(blocks_of(model))))
    cfg, batches = _calibrated(dense, tokenizer, cfg, text, seed)
    found = registry.prune(dense, cfg, batches, Journal())
    return held.twin(found.plan, found.masks, found.weights)


def _calibrated(
    twin: Twin, tokenizer: PreTrainedTokenizerBase, cfg: Method, text: Text | None, seed: int
) -> tuple[Method, list[LongTensor]]:
    """The config with the calibration that is used, and its batches (B, T)."""
    wanted: Calibration | None = getattr(cfg, "calibration", None)
    if text is not None and "calibration" in type(cfg).model_fields:
        texts = None if isinstance(text, str | Path) else list(text)
        data = str(text) if texts is None else "texts given in Python"
        wanted = Calibration(data=data) if wanted is None else wanted.model_copy(update={"data": data})
        cfg = cfg.model_copy(update={"calibration": wanted})
    else:
        texts = None
    if wanted is None:
        if getattr(cfg, "count", None) is not None:
            raise RecipeError(
                "recover.prune: 'count' needs text, on which scores are measured: give text=, or calibration="
            )
        return cfg, []
    write = None if wanted.answer is None else partial(_written, twin, tokenizer, wanted)
    return cfg, calibration_batches(wanted, tokenizer, seed, write, texts=texts)


def _written(
    twin: Twin, tokenizer: PreTrainedTokenizerBase, cfg: Calibration, prompts: list[Prompt]
) -> list[list[int]]:
    assert cfg.answer is not None, "only where answers are asked for"
    return answers(twin, tokenizer, cfg.answer, prompts, batch_size=64)


def probe(
    twin: Twin | Pair, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], cfg: Probe | None = None
) -> list[Record]:
    """How far the pruned view is from the dense one: typed records, a `Final` for each temperature and more.

    `prompts`: both views go on from them; the first `cfg.samples`. Figures of drift have no unit but KL (nats) and are
    {mean, p50, p90, p99, max} over positions. `record.to_json()` gives plain values.

    Raises:
        DataError: no prompts, or one that does not fit the model. ModelError: logits that are not finite.
    """
    return probing.probe(twin, tokenizer, list(prompts), cfg or Probe())


def measure(
    model: PreTrainedModel | Twin,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Iterable[str | Task],
    *,
    limit: int | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    samples: int = 3,
    allow_code_execution: bool | Literal["unconfined"] = False,
    reference: dict[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The record of all tasks: `headline` (one share or perplexity a use, None where not measured), `tasks`, `texts`.

    A twin is measured pruned, as it is at rest. `tasks`: YAML files, or `embedded:NAME`. `limit`: items of each task.
    `sampling`: measured beside greedy texts. `samples`: texts kept of each task in its record. `reference`: the `texts`
    of the dense model's record, to count agreement with. `allow_code_execution`: let code tasks run what the model
    writes, behind a wall of Linux namespaces; "unconfined": without one, with all that you can read and write.

    Raises:
        RecipeError: a task or an option cannot be used, such as code where there is no wall.
        DataError: its data cannot, or an item does not fit the model.
    """
    read = [load_task(task) if isinstance(task, str) else task for task in tasks]
    cfg = _config(
        Measure,
        "recover.measure",
        tasks=tuple(task.name for task in read),
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        samples=samples,
        allow_code_execution=allow_code_execution,
    )
    if isinstance(model, Twin):
        with model.folded():
            record, texts = tasks_of.measure(model.model, tokenizer, read, cfg, reference=reference, seed=seed)
    else:
        record, texts = tasks_of.measure(model, tokenizer, read, cfg, reference=reference, seed=seed)
    return {**record, "texts": texts}


def distill(
    twin: Twin,
    tokenizer: PreTrainedTokenizerBase,
    data: Data | Sequence[Data],
    *,
    tokens: int,
    out: str | Path,
    score: Callable[[Twin], float | None] | None = None,
    seed: int = 0,
    **fields: Any,
) -> Path:
    """Train LoRA on the twin against its own dense view; the folder of the adapter that is kept, which it then carries.

    `data`: one or more of `DenseText`, `GivenText`, `PrunedText`, `TeacherText`. `tokens`: scored by the dense view,
    over all epochs. `out`: a folder for text, checkpoints and adapters; the same call goes on where it was stopped.
    `score`: called after each epoch, higher is better; without one the training loss decides. `fields`: any other of a
    recipe's `train` (`epochs`, `lr`, `batch_size`, `length`, `lora`, `loss`, ...).

    Raises:
        TrainingError: not finite again and again, or launched so that the weights would stay dealt out.
        RecipeError: a field is wrong. DataError: nothing to learn from. ModelError: the twin has adapters already.
        StopRequested: stopped by a signal; a checkpoint is written.
    """
    if dist.zero_stage() == 3:
        raise TrainingError("recover.distill: under DeepSpeed's ZeRO-3 the twin's weights stay dealt out: use a recipe")
    several = tuple(data) if isinstance(data, Sequence) else (data,)
    cfg = _config(Train, "recover.distill", tokens=tokens, data=several, **fields)

    cfg, _ = settled(cfg, _facts(twin))

    def after_epoch(epoch: int, progress: EpochProgress) -> float | None:
        return None if score is None else score(twin)

    folder = train(twin, tokenizer, cfg, Path(out), after_epoch, seed)
    read_adapter(twin.model, folder)
    twin.model.eval()
    return folder


def _facts(twin: Twin) -> Facts:
    """What `auto` values depend on, of a twin without adapters."""
    plan, parameters = twin.plan, sum(parameter.numel() for parameter in twin.base.parameters())
    left = min(plan.nonzero, plan.parameters_pruned) if plan.parameters_dense else parameters
    return Facts(twin.base.config.hidden_size, parameters, max(0.0, 1 - left / parameters))


def export(
    twin: Twin,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Write the pruned view as a checkpoint that stock tools load, adapters merged, and verify it in a fresh process.

    `dtype`: float32, bfloat16 or float16; default: the twin's. What we wrote to `folder` before is replaced; files of
    others in it are kept.

    Raises:
        ExportError: what was written is not what the twin computes. ArtifactError: it could not be written.
    """
    folder = Path(folder)
    record = {"plan": twin.plan.to_json()}
    merged = write_merged(
        twin,
        twin.base.dtype if dtype is None else getattr(torch, dtype),
        tokenizer,
        folder,
        card=plain_card(folder.resolve().name, record["plan"], twin.base.name_or_path or ""),
        record=record,
        max_shard_size=max_shard_size,
    )
    ids_BT = torch.tensor([text_ids(tokenizer, SAMPLE, special=True)])
    with tempfile.TemporaryDirectory() as beside:
        plan, expected = Path(beside) / "plan.json", Path(beside) / "expected.safetensors"
        write_json(plan, record["plan"])
        write_expected(expected, twin, merged, ids_BT)
        verify(folder, expected, plan, Path(beside) / "verify.json")
    return folder


def run(recipe: str | Path, *overrides: str, runs: str | Path = "checkpoints", until: str = "report") -> RunDirectory:
    """Bring the run of a recipe up to date through stage `until`, as `recover run` does; where its files lie.

    `overrides`: fields over the recipe, as `prune.count=6`. `runs`: folder of run directories. What is done and still
    fits the recipe is skipped.

    Raises:
        RecoverError: one of its kinds, by what went wrong; stages that were done stay done.
    """
    return stages.run(load_recipe(recipe, overrides), Path(runs), until=until)


def report(folder: str | Path) -> Path:
    """Write the report of a run, finished or not, or of a diagnosis, from its files; the HTML page.

    Raises:
        ArtifactError: the folder is neither, or a file of it cannot be read.
    """
    root = Path(folder)
    if is_diagnosis(root):
        return Path(render_diagnosis(root))
    directory = RunDirectory(root)
    if not (directory.recipe.is_file() and directory.is_run):
        raise ArtifactError(f"{root}: expected the folder of a run or of a diagnosis, made by recover")
    render(root, collect(root))
    return directory.report_html


def _config(kind: Any, where: str, **fields: Any) -> Any:
    """The config of these fields. Raises RecipeError with a line for each that is wrong."""
    plain = {name: _given(value) for name, value in fields.items()}
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        raise RecipeError("\n".join(explain(error, kind, where, {}))) from None


def _given(value: Any) -> Any:
    """A path as text; configs stay what they are."""
    return str(value) if isinstance(value, Path) and not isinstance(value, Config) else value
