"""What the stages of one run share in memory: the tokenizer, the tasks, the dense weights, and one twin of them.

Stages hand results to each other through files only. The twin is built anew from what the stage before wrote,
so what is measured, trained and exported is what lies on disk. The dense weights alone are read once: they are frozen,
and before each twin it is made sure that they are what was read.

prune/written-<fingerprint>.jsonl   calibration text that the dense model wrote: the ids of a prompt with its answer
"""

from __future__ import annotations

import gc
import hashlib
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cached_property, partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, cast

import torch
from torch import LongTensor, Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recover.base import console, dist
from recover.base.artifacts import check_manifest, read_jsonl, write_text
from recover.base.clock import part
from recover.base.errors import DataError, RecipeError
from recover.config.recipe import Calibration, Data, DenseText, GivenText, PrunedText, Recipe, TeacherText
from recover.config.tasks import GenerateFile
from recover.maths.repeats import overlaps
from recover.measure.tasks import Task, check_allowed, check_names, check_room, load_task
from recover.models import tokenizers
from recover.models.load import (
    check_account,
    check_fit,
    describe,
    load_model,
    load_tokenizer,
    not_in_files,
    ready,
)
from recover.models.plan import Plan, load_plan
from recover.models.source import check_rows, check_tied, check_weights, kind_of, locate, read_config
from recover.models.stored_weights import stored_in
from recover.models.twin import Held, Twin
from recover.models.wrapper import text_values
from recover.probe.trajectory import check_steps
from recover.prune.calibrate import calibration_batches, check_asked, read_texts
from recover.report.run_files import DeployedFile, Overlap, OverlapRecord
from recover.report.words import shown_source
from recover.run.directory import RunDirectory
from recover.run.estimate import settle
from recover.run.tracking import Tracking
from recover.text.generate import generate
from recover.text.prompts import Prompt, encode_prompt
from recover.train.checkpoints import read_adapter
from recover.train.sources import check_given, read_prompts, read_rows
from recover.train.teacher_file import check_teacher, read_teacher
from recover.train.written_text import fitting_prompts, weights_fingerprint

SAMPLE_ROWS = 4  # of sample_ids
LOOKED_AT = 100_000  # texts of a source in which measured items are looked for


class RunContext:
    """The recipe, its run directory, and the loaded things that stages ask for.

    What is `auto` in the recipe is settled here (`chosen` says how), but for the learning rate. Raises RecipeError and
    ModelError where it cannot be. `exports`: whether the model is still to be exported, as far as that is known.
    """

    def __init__(self, recipe: Recipe, directory: RunDirectory) -> None:
        self.recipe, self.chosen = settle(recipe)
        self.directory = directory
        self.exports: Callable[[], bool] = lambda: False
        self.tracking = Tracking(self.recipe, directory.root)
        self._twin: tuple[str, Twin] | None = None
        self._held: Held | None = None
        self.aside = ExitStack()  # what goes on beside the stages, and ends with the run
        self.verifier: subprocess.Popen[str] | None = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer, rows = (
            load_tokenizer(self.recipe.model),
            text_values(read_config(self.recipe.model)).get("vocab_size"),
        )
        if rows is not None:
            tokenizers.fit(tokenizer, rows)
        return tokenizer

    @cached_property
    def tasks(self) -> list[Task]:
        tasks = [load_task(source) for source in self.recipe.measure.tasks]
        check_allowed(tasks, self.recipe.measure)
        return tasks

    @cached_property
    def calibration(self) -> list[LongTensor]:
        """Samples of `prune.calibration` in batches (B, T); none where there is none, or only prompts to it."""
        cfg = getattr(self.recipe.prune, "calibration", None)
        return [] if cfg is None else self.samples(cfg)

    def samples(self, cfg: Calibration, section: str = "prune") -> list[LongTensor]:
        """Samples of a calibration text in batches (B, T); none of prompts, whose answers are still to be written."""
        if cfg.answer is not None:  # the dense model's: it takes the weights
            check_asked(cfg, self.tokenizer, describe(self.recipe.model).context, section)
            return []
        return calibration_batches(cfg, self.tokenizer, self.recipe.seed)

    def dense(self) -> Twin:
        """The dense model alone: a twin whose two views are equal."""
        return self._build("dense")

    def pruned(self) -> Twin:
        """The twin of the plan that stage `prune` wrote, without adapters."""
        return self._build("pruned")

    def recovered(self) -> Twin:
        """The pruned twin with the adapter of the epoch that generated best."""
        return self._build("recovered")

    def read_together(self) -> None:
        """Before the main process goes on alone: weights that all processes of a machine hold together are read."""
        if dist.world_size() > 1 and (self.recipe.model.offload == "cpu" or self.recipe.train.shard_weights):
            self._weights()

    def stock(self) -> PreTrainedModel:
        """The dense model as it was read, on this process's device: to be run, and not to be changed."""
        return self._weights().model

    def release(self) -> None:
        """Forget the twin; its memory is free when the caller holds no reference either. The dense weights stay."""
        self._twin = None
        gc.collect()

    def forget(self) -> None:
        """Forget the dense weights too: another model will be read."""
        self._held = None
        self.release()

    def served(self, file: DeployedFile) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A quantized file of stage deploy: its weights, dequantized, and its tokenizer. The dense weights go.

        As the file has them: not quantized once more, and in main memory where the dense weights were quantized to fit.
        """
        self.forget()
        source = self.recipe.model
        there = source.model_copy(
            update={
                "source": str(self.directory.root / file["path"]),
                "revision": None,
                "tokenizer": None,
                "load_in": None,
                "offload": "cpu" if source.load_in else source.offload,
            }
        )
        with part("reading weights"):
            return ready(load_model(there)), load_tokenizer(there)

    def lend(self) -> Twin:
        """The pruned twin, to be trained: it will carry adapters that no later stage asked for, and is forgotten here.

        Of several processes, which may deal the dense weights out among them, these are forgotten too.
        """
        twin = self.pruned()
        if (dist.world_size() > 1 or dist.zero_stage() > 0) and stored_in(twin.base) is None:
            self._held = None
        self.release()
        return twin

    def _weights(self) -> Held:
        # Of several processes all would have to read them anew; there they are not held past a training.
        changed = self._held.changed() if self._held is not None and dist.world_size() == 1 else []
        if changed:
            console.warn(f"{len(changed)} dense weights in memory have changed, such as {changed[0]}: read anew")
            self._held = None
        if self._held is None:
            with part("reading weights"):
                model = load_model(self.recipe.model, shared=self.recipe.train.shard_weights)
                check_fit(model, self.tokenizer)
                self._held = Held(ready(model))
        return self._held

    def _build(self, view: str) -> Twin:
        if self._twin is not None and self._twin[0] == view:
            return self._twin[1]
        self.release()
        model = self._weights().again()
        if view == "dense":
            twin = Twin(model, Plan.none(model.config.num_hidden_layers))
        else:
            twin = Twin(model, *load_plan(self.directory.prune))
        if view == "recovered":
            read_adapter(twin.add_lora(self.recipe.train.lora), self.best_adapter())
            twin.model.eval()
        self._twin = (view, twin)
        return twin

    def probe_prompts(self) -> list[list[int]]:
        """Token ids of the recipe's prompts, else of those of the generate tasks in turn, as these ask them.

        The first `probe.samples` of them.
        """
        cfg = self.recipe.probe
        if cfg.prompts is not None:
            prompts = [(row.value["prompt"], None) for row in read_prompts(cfg.prompts, cfg.split, cfg.subset)]
        else:
            lists = [
                [(item.prompt, file.wraps) for item in task.items]
                for task in self.tasks
                if isinstance(file := task.file, GenerateFile)
            ]
            prompts = [prompt for row in zip_longest(*lists) for prompt in row if prompt is not None]
        if not prompts:
            raise RecipeError(
                "probe.prompts: no prompts to probe with: name a JSONL file, or add a generate task to measure.tasks"
            )
        return [encode_prompt(self.tokenizer, prompt, chat=chat) for prompt, chat in prompts[: cfg.samples]]

    def best_adapter(self) -> Path:
        """Folder of the adapter of the epoch that is kept (`RunDirectory.best`).

        Raises:
            ArtifactError: the folder is gone, or a file of it is not what was written.
        """
        folder = self.directory.train / self.directory.best()["folder"]
        check_manifest(folder)
        return folder

    def sample_ids(self) -> Tensor:
        """A few token ids (B, T) on which an export must give the logits of the model that was measured."""
        rows = self.probe_prompts()[:SAMPLE_ROWS]
        length = min(map(len, rows))
        return torch.tensor([row[:length] for row in rows])

    @part("checking inputs")
    def check_inputs(self) -> None:
        """Read every file that the run will need, so that a bad one is refused before hours are spent.

        Raises:
            DataError: a task, a prompt, calibration or given text cannot be used, by file and line; or one does not fit
                the model's context, with what is to be written after it.
            RecipeError: two tasks have one name.
            ModelError: the weights of a local model are not there, cut short, or have another vocabulary than the
                config; or the tokenizer gives ids that the model has no row for.
        """
        model = describe(self.recipe.model)
        if kind_of(self.recipe.model.source) != "hub":
            folder = locate(self.recipe.model)
            check_weights(folder)
            check_tied(folder, model.tied)
            check_rows(folder, model.vocabulary)
            tokenizers.check_ends(folder, self.tokenizer, model.vocabulary)
            check_account(self.recipe.model)
            if self.recipe.model.offload == "disk" and not model.in_files:
                raise not_in_files(self.recipe.model.source)
        check_names(self.tasks, "measure.tasks")
        check_steps(self.probe_prompts(), self.recipe.probe.steps, model.context)
        check_room(self.tasks, self.tokenizer, self.recipe.measure, model.context)
        _ = self.calibration
        if (text := self.recipe.deploy.calibration) is not None:
            try:
                self.samples(text, "deploy")
            except DataError as error:
                raise DataError(f"deploy: {error}") from error
        for number, source in enumerate(self.recipe.train.data):
            if isinstance(source, GivenText):
                check_given(source, self.tokenizer, self.recipe.train.length)
            if isinstance(source, DenseText | PrunedText):
                try:
                    fitting_prompts(source, self.recipe.train.length, self.tokenizer, model.context)
                except DataError as error:
                    raise DataError(f"train.data.{number}: {error}") from error
            if isinstance(source, TeacherText):
                check_teacher(source, model.vocabulary, self.tokenizer)


@part("looking for measured items in the text")
def overlap_record(context: RunContext) -> OverlapRecord:
    """The items of each task that stand in a text which the run is made with: {looked_at: {field: texts}, found}.

    Of each source the first `LOOKED_AT` texts are looked at. All of them were read before, by `check_inputs`.
    """
    recipe, limit = context.recipe, context.recipe.measure.limit
    tasks = {task.name: task.asked[:limit] for task in context.tasks}
    sources: dict[str, Data | Calibration] = {f"train.data.{n}": source for n, source in enumerate(recipe.train.data)}
    if (cfg := getattr(recipe.prune, "calibration", None)) is not None:
        sources["prune.calibration"] = cfg
    if recipe.deploy.calibration is not None:
        sources["deploy.calibration"] = recipe.deploy.calibration
    looked_at: dict[str, int] = {}
    found: list[Overlap] = []
    for field, source in sources.items():
        name, texts = _texts_of(context, source)
        some = list(islice(texts, LOOKED_AT))
        looked_at[field] = len(some)
        found += [
            cast(Overlap, {"field": field, "source": shown_source(name), **each}) for each in overlaps(tasks, some)
        ]
    return {"looked_at": looked_at, "found": found}


def _texts_of(context: RunContext, source: Data | Calibration) -> tuple[str, Iterator[str]]:
    """Where the texts of a source come from, and each of them."""
    if isinstance(source, GivenText):
        rows = read_rows(source.source, source.split, source.subset)
        return source.source, (
            "\n".join(_plain(row.value.get(name)) for name in source.columns.values()) for row in rows
        )
    if isinstance(source, TeacherText):
        rows = read_teacher(source, describe(context.recipe.model).vocabulary)
        return source.source, (str(context.tokenizer.decode(row.sample.ids)) for row in rows)
    if isinstance(source, Calibration):
        return source.data, map(_plain, read_texts(source))
    model = describe(context.recipe.model)
    prompts = fitting_prompts(source, context.recipe.train.length, context.tokenizer, model.context)
    return source.prompts, (_plain(row.value["prompt"]) for row in prompts)


def _plain(value: Any) -> str:
    """A text, or the texts of messages, without roles and template."""
    if not isinstance(value, list):
        return value if isinstance(value, str) else ""
    contents = [message.get("content") for message in value if isinstance(message, dict)]
    return "\n".join(content for content in contents if isinstance(content, str))


def calibration(context: RunContext, text: Calibration | None = None) -> list[LongTensor]:
    """The batches of `text`, else of `prune.calibration`, none without. What dense wrote before is read, not written.

    Prompts that leave no room for an answer are left out. Raises DataError for text that cannot be used.
    """
    own = getattr(context.recipe.prune, "calibration", None)
    cfg = text or own
    if cfg is None or cfg.answer is None:
        return context.calibration if cfg is own or cfg is None else context.samples(cfg)
    return calibration_batches(
        cfg,
        context.tokenizer,
        context.recipe.seed,
        partial(answered, context, cfg.answer),
        context=describe(context.recipe.model).context,
    )


def answered(context: RunContext, tokens: int, prompts: list[Prompt]) -> list[list[int]]:
    """As `answers`, of the dense model; read where they were written before."""
    twin, tokenizer = context.dense(), context.tokenizer
    asked = [list(encode_prompt(tokenizer, prompt)) for prompt in prompts]
    made = json.dumps([weights_fingerprint(twin), context.recipe.model.dtype, tokens, asked])
    path = context.directory.prune / f"written-{hashlib.sha256(made.encode()).hexdigest()[:16]}.jsonl"
    if path.exists():
        return read_jsonl(path)
    rows = answers(twin, tokenizer, tokens, prompts, batch_size=context.recipe.measure.batch_size)
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))
    return rows


def answers(
    twin: Twin, tokenizer: PreTrainedTokenizerBase, tokens: int, prompts: list[Prompt], *, batch_size: int
) -> list[list[int]]:
    """The ids of each prompt and of up to `tokens` that the dense view writes after it, greedily."""
    size, title = min(len(prompts), batch_size), "dense model writes calibration text"
    with twin.dense() as dense:
        texts = generate(dense, tokenizer, prompts, max_new_tokens=tokens, batch_size=size, title=title)
    asked = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    return [[*prompt, *text.ids] for prompt, text in zip(asked, texts, strict=True)]
