"""How long a run will take on this machine, stage by stage: its texts, steps and items, at the pace that `pace` times.

How long texts get is not known before they are written: those that lie in the run's folder say it, or a few that a
small model writes now; else it is `FRACTION` of the most that they may have. A pruned model's texts end elsewhere than
the dense model's: a small model is pruned for it, as the run does it, where that takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch

from recover.base import console, dist
from recover.base.artifacts import read_json, read_jsonl
from recover.base.errors import ArtifactError, DataError, RecoverError
from recover.config.prune import Calibration, Depth
from recover.config.recipe import DenseText, GivenText, PrunedText, Sampling, TeacherText
from recover.config.tasks import GenerateFile, WritingFile
from recover.config.train import split_batch
from recover.maths.score import mean
from recover.measure.kinds.generate import longest_text
from recover.measure.tasks import Task
from recover.models.load import Description, describe
from recover.models.plan import Plan, load_plan
from recover.models.source import exported_dtype, kind_of
from recover.models.twin import Twin
from recover.prune import registry
from recover.prune.calibrate import calibration_batches, read_texts
from recover.prune.registry import Cost, pruner_of
from recover.run.context import RunContext, answers
from recover.run.directory import RunDirectory
from recover.run.estimate import ELEMENT_BYTES, Estimate
from recover.run.pace import NotTimed, Pace, spread
from recover.text.prompts import encode_prompt
from recover.train.sources import read_prompts, read_rows, samples_of
from recover.train.teacher_file import read_teacher
from recover.train.trials import SHARE
from recover.train.written_text import CHUNK_BATCHES

if TYPE_CHECKING:
    from recover.text.prompts import Prompt

FRACTION = 0.6  # of the most tokens that a text may have, where nothing tells
STAGES = ("dense", "prune", "before", "train", "after", "export", "deploy")
LOOKED_AT = 64  # prompts, or rows of given text, whose length is looked at
DISK = 1e9  # bytes a second that files are read and written with, for want of anything better
CHANGED = 48  # texts of a task, lost and won, that both views read token by token
PRUNES = 10.0  # seconds that pruning a small model may take, to see how long its texts are

DAMAGED = (ArtifactError, AttributeError, KeyError, TypeError, ValueError)  # of a record, which the run itself names

How = Literal["measured", "floor", "not counted"]


class Piece(TypedDict):
    """A part of a stage: what is done, and the seconds it takes; how these were found."""

    stage: str
    what: str
    seconds: float
    how: How


class Forecast(TypedDict):
    """What a run takes, piece by piece in its order; `notes`: on what the figures stand."""

    pieces: list[Piece]
    notes: list[str]


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts, and of what is written to them, in the mean and at most."""

    prompt: float
    answer: float
    longest: float


def forecast(
    context: RunContext, figures: Estimate, libraries: float, left: Mapping[str, float] | None = None
) -> Forecast:
    """What the run takes, timed on the main process while the others wait; the same on every process.

    `figures`: of this recipe; where something is not timed, their floor. `libraries`: seconds that they took to load.
    `left`: of stages that are not to be done whole, the share that is. Nothing is written, and random numbers go on as
    if nothing had been done.
    """
    return dist.on_main(lambda: _Forecaster(context, figures, libraries, dist.world_size(), left or {}).found())


class _Forecaster:
    def __init__(
        self,
        context: RunContext,
        figures: Estimate,
        libraries: float,
        processes: int,
        left: Mapping[str, float],
    ) -> None:
        self.context, self.recipe, self.figures = context, context.recipe, figures
        self.libraries, self.processes, self.left = libraries, processes, left
        self.model: Description = describe(self.recipe.model)
        self.cost: Cost = pruner_of(self.recipe.prune).cost(self.recipe.prune, self.model)
        inside = self.model.active - self.model.embedding_parameters
        self.kept = 1.0 if self.cost.masked else max(0.0, 1 - self.cost.gone / max(1, inside))
        self.notes: list[str] = []
        self.pace: Pace | None = None
        self.known: dict[str, Lengths] = {}  # by what is written
        self.recorded: Recorded = recorded(context.directory)
        self.prunes = 0.0 if self.left.get("prune") == 0 else math.inf  # seconds, once they are known

    def found(self) -> Forecast:
        devices = [dist.device()] if dist.device().type == "cuda" else []
        with dist.as_one(), console.muted(), torch.random.fork_rng(devices=devices):
            pieces = [*self._pieces()]
        return {"pieces": pieces, "notes": list(dict.fromkeys(self.notes))}

    def _pieces(self) -> Iterator[Piece]:
        local = kind_of(self.recipe.model.source) != "hub"
        rate = self.figures["matrix_rate_flops"]
        try:
            masked, count = self.cost.masked, self.processes
            self.pace = Pace(self.recipe, self.model, rate, masked=masked, local=local, processes=count)
        except NotTimed as reason:
            self._not_timed(str(reason))
        except (RuntimeError, ValueError, AttributeError, TypeError, KeyError, RecoverError) as error:
            self._not_timed(f"a model of a few blocks cannot be made: {_line(error)}")
        if self.processes > 1:
            self.notes.append(f"timed on one of {self.processes} processes, while the others wait")
        # What counts most is timed first: timing has an end.
        work: dict[str, Callable[[], Iterator[Piece]]] = {
            "train": self._train,
            "dense": self._dense,
            "prune": self._prune,
            "before": lambda: self._probed("before"),
            "after": lambda: self._probed("after"),
            "export": self._export,
            "deploy": self._deploy,
        }
        found: dict[str, list[Piece]] = {}
        for stage, pieces in work.items():
            found[stage] = [*pieces()] if self.left.get(stage, 1.0) > 0 else []
            if stage == "prune" and all(piece["how"] == "measured" for piece in found[stage]):
                self.prunes = sum(piece["seconds"] for piece in found[stage])
        for stage in STAGES:
            for piece in found.get(stage, ()):
                yield {**piece, "seconds": piece["seconds"] * self.left.get(stage, 1.0)}

    def _not_timed(self, reason: str) -> None:
        self.notes.append(f"not timed: {reason}. What stands there is a floor, or is not counted")

    def _piece(self, stage: str, what: str, seconds: Callable[[Pace], float], floor: float | None = None) -> Piece:
        """What is timed; where it cannot be, the floor, if there is one."""
        try:
            if self.pace is not None:
                return {"stage": stage, "what": what, "seconds": seconds(self.pace), "how": "measured"}
        except NotTimed as reason:
            self._not_timed(f"{what}: {reason}")
        except (RuntimeError, ValueError, AttributeError, TypeError, KeyError, RecoverError) as error:
            self._not_timed(f"{what}: {_line(error)}")
        return {
            "stage": stage,
            "what": what,
            "seconds": floor or 0.0,
            "how": "not counted" if floor is None else "floor",
        }

    # What the stages do.

    def _dense(self) -> Iterator[Piece]:
        seconds = self.model.parameters * ELEMENT_BYTES[self.model.stored] / DISK
        if seconds >= 1:
            yield {"stage": "dense", "what": "weights read", "seconds": seconds, "how": "floor"}
        yield from self._measured("dense", self.recipe.measure.limit, 1.0)

    def _prune(self) -> Iterator[Piece]:
        cfg, cost = self.recipe.prune, self.cost
        calibration: Calibration | None = getattr(cfg, "calibration", None)
        if calibration is not None and calibration.answer is not None:
            most = calibration.answer

            def writes(pace: Pace) -> float:
                samples = [text for text in spread(read_texts(calibration), LOOKED_AT) if text]
                prompt = self._prompt_length(samples, None)
                rows = min(calibration.samples, self.recipe.measure.batch_size)
                found = self._lengths(pace, samples, prompt, most, "calibration text", rows=rows, chat=None)
                return self._writing(pace, calibration.samples, found, rows, 1.0, None)

            yield self._piece("prune", f"{calibration.samples:,} answers to calibrate on", writes)
        if cost.flops and calibration is not None:
            what = f"{cost.passes:,} passes of calibration text" if cost.passes else "calibration text"

            def searches(pace: Pace) -> float:
                read = pace.forward(calibration.batch_size, calibration.length)
                tokens = calibration.samples * calibration.length
                if cost.passes <= 1:
                    return tokens * read.at()
                # Of a candidate half the blocks are run: those before it give the same for all, once a round.
                rounds = (cfg.count or 1) if isinstance(cfg, Depth) and cfg.rounds else 1
                judged = pace.judging(str(getattr(cfg, "score", "kl")))
                return tokens * ((1 + rounds) * read.at() + cost.passes * (read.at(0.5) + judged))

            yield self._piece("prune", what, searches, floor=self.figures["search_seconds"])
        elif calibration is not None or cost.masked:
            yield self._piece("prune", "what goes, block by block", lambda pace: pace.pruning(cfg).at())

    def _probed(self, stage: str) -> Iterator[Piece]:
        kept = self.kept
        cfg, tokenizer = self.recipe.probe, self.context.tokenizer
        prompts = self.context.probe_prompts()

        def probes(pace: Pace) -> float:
            return pace.probing(tokenizer, prompts, cfg).at((1 + kept) / 2) / min(
                self.processes, _batches(cfg, prompts)
            )

        yield self._piece(stage, f"a probe of {len(prompts):,} prompts", probes)
        yield from self._measured(stage, self.recipe.measure.limit, kept, probed=True)

    def _measured(self, stage: str, limit: int | None, kept: float, *, probed: bool = False) -> Iterator[Piece]:
        """The tasks: what is written, and what is only read; `probed`: by both views too, as stages that probe do."""
        tasks = self.context.tasks
        pruned = stage == "before"  # a recovered model writes as the dense one does
        writing = [task for task in tasks if isinstance(task.file, WritingFile)]
        reading = [task for task in tasks if task not in writing]
        if writing:
            texts = sum(_items(task, limit) * (1 + self._times(task)) for task in writing)
            yield self._piece(
                stage,
                f"{texts:,} answers, of {', '.join(task.name for task in writing)}",
                lambda pace: sum(
                    self._answers(pace, task, limit, kept, probed=probed, pruned=pruned) for task in writing
                ),
            )
        if reading:
            items = sum(_items(task, limit) for task in reading)
            yield self._piece(
                stage,
                f"{items:,} items read, of {', '.join(task.name for task in reading)}",
                lambda pace: sum(self._scored(pace, task, limit, kept, probed=probed) for task in reading),
            )

    def _scored(self, pace: Pace, task: Task, limit: int | None, kept: float, *, probed: bool) -> float:
        items, tokenizer = _items(task, limit), self.context.tokenizer
        seconds = pace.scoring(task, tokenizer, items).at(kept)
        if probed and task.kind in ("choice", "retrieval"):  # each view again, option by option
            held = min(self.recipe.probe.items, items)
            seconds += pace.drifting(task, tokenizer, held).at((1 + kept) / 2)
        return seconds / self.processes

    def _times(self, task: Task) -> int:
        """Texts that are drawn for each item beside the greedy one."""
        file = task.file
        assert isinstance(file, WritingFile), "a task that writes"
        return (file.samples or 1) if self._sampling(task) else 0

    def _sampling(self, task: Task) -> Sampling | None:
        file, cfg = task.file, self.recipe.measure
        assert isinstance(file, WritingFile), "a task that writes"
        own = (file.sampling or cfg.sampling or Sampling()) if file.samples else None
        return own or (cfg.sampling if isinstance(file, GenerateFile) else None)

    def _answers(self, pace: Pace, task: Task, limit: int | None, kept: float, *, probed: bool, pruned: bool) -> float:
        file, cfg = task.file, self.recipe.measure
        assert isinstance(file, WritingFile), "a task that writes"
        items = _items(task, limit)
        prompts = [item.prompt for item in spread(task.items[:items], LOOKED_AT)]
        prompt, most = self._prompt_length(prompts, file.wraps), longest_text(file, cfg)
        rows = min(cfg.batch_size, items)
        lengths = partial(self._lengths, pace, prompts, prompt, most, f"task {task.name}", rows=rows, chat=file.wraps)
        dense = lengths(task=task)
        found = lengths(task=task, pruned=True) if pruned else dense
        seconds = self._writing(pace, items, found, cfg.batch_size, kept, None)
        if times := self._times(task):
            seconds += self._writing(pace, items * times, found, cfg.batch_size, kept, self._sampling(task))
        if probed:
            texts = min(CHANGED, items)  # of the dense model
            read = pace.forward(8, round(prompt + dense.answer))
            seconds += texts * (prompt + dense.answer) * (read.at() + read.at(kept)) / self.processes
        return seconds

    def _train(self) -> Iterator[Piece]:
        cfg = self.recipe.train
        rows = 0.0
        lengths: list[tuple[float, float, float]] = []  # tokens of prompt and answer, rows
        for source, budget in zip(cfg.data, cfg.budgets, strict=True):
            if isinstance(source, DenseText | PrunedText):
                found, prompts, there = self._source_lengths(source)
                scored = found.answer if cfg.loss.scored != "all" else found.prompt + found.answer - 1
                texts = budget / max(1.0, scored)
                writes = texts if isinstance(source, PrunedText) or source.temperature else min(texts, prompts)
                new = round(writes) if self.left.get("train", 1.0) < 1 else max(0, round(writes) - there)
                if new:
                    yield self._text(source, found, new, min(budget, round(new * found.answer)))
                lengths.append((found.prompt, found.answer, texts))
            elif (held := self._held(source)) is not None:
                prompt, answer = held
                scored = answer if cfg.loss.scored != "all" else prompt + answer - 1
                lengths.append((prompt, answer, budget / max(1.0, scored)))
        rows = sum(count for _, _, count in lengths)
        steps = max(1, int(rows // cfg.batch_size))
        prompt = sum(prompt * count for prompt, _, count in lengths) / max(1e-9, rows)
        answer = sum(answer * count for _, answer, count in lengths) / max(1e-9, rows)
        epochs = f" in {cfg.epochs} epochs" if cfg.epochs > 1 else ""
        tried = SHARE if "lr" in cfg.auto else 0.0
        if cfg.patience is not None or cfg.stop is not None:
            self.notes.append("training may end early (train.patience, train.stop): all epochs are counted")

        def trains(pace: Pace) -> float:
            span, share = pace.step(round(prompt), max(1, round(answer)))
            one = span.base + span.blocks * (share + (1 - share) * self.kept)
            return (1 + tried) * steps * one * split_batch(cfg, self.processes).accumulation

        what = f"{steps:,} steps of {cfg.batch_size} sequences{epochs}{', trials of rates' if tried else ''}"
        yield self._piece("train", what, trains, floor=self.figures["training_seconds"])
        yield from self._epochs(cfg.epochs)

    def _epochs(self, epochs: int) -> Iterator[Piece]:
        limits = [each for each in (self.recipe.measure.epoch_limit, self.recipe.measure.limit) if each is not None]
        cfg, prompts = self.recipe.probe, self.context.probe_prompts()
        found = [*self._measured("train", min(limits, default=None), self.kept)]

        def drifts(pace: Pace) -> float:
            tokens = sum(len(row) + cfg.steps for row in prompts)
            read = pace.forward(cfg.batch_size, max(1, tokens // len(prompts)))
            rows = min(cfg.batch_size, len(prompts))
            write = pace.decoding(rows, cfg.steps + 64).seconds(len(prompts), cfg.steps, cfg.steps, rows)
            return (write + (epochs + 1) * tokens * (read.at() + read.at(self.kept))) / self.processes

        drift = self._piece("train", "drift", drifts)
        timed = [each for each in found if each["how"] == "measured"]
        seconds = epochs * sum(each["seconds"] for each in timed) + drift["seconds"]
        how: How = "measured" if len(timed) == len(found) else "floor"
        which = f"each of {epochs} epochs" if epochs > 1 else "the epoch"
        yield {"stage": "train", "what": f"measuring after {which}", "seconds": seconds, "how": how}

    def _text(self, source: DenseText | PrunedText, found: Lengths, texts: int, tokens: int) -> Piece:
        sampling = Sampling(temperature=source.temperature, top_p=source.top_p) if source.temperature else None
        pruned = isinstance(source, PrunedText)
        kept = self.kept if pruned else 1.0

        def writes(pace: Pace) -> float:
            rows, at_once = source.batch_size, CHUNK_BATCHES * source.batch_size
            if isinstance(source, PrunedText):
                at_once = source.every * self.recipe.train.batch_size
                rows = min(rows, at_once)
            calls = max(1, math.ceil(texts / at_once))
            return calls * self._writing(pace, math.ceil(texts / calls), found, rows, kept, sampling)

        who = "pruned" if pruned else "dense"
        return self._piece("train", f"{tokens:,} tokens that the {who} model writes", writes)

    def _export(self) -> Iterator[Piece]:
        exported = exported_dtype(self.recipe.model.dtype, self.model.stored, self.recipe.export.dtype)
        size = (self.model.parameters - self.cost.unstored) * ELEMENT_BYTES[exported]
        seconds = self.libraries + 3 * size / DISK  # written, read by a fresh process, read to be timed
        yield {"stage": "export", "what": "merged, written, verified", "seconds": seconds, "how": "floor"}

    def _deploy(self) -> Iterator[Piece]:
        deploy = self.recipe.deploy
        if deploy.quantize is not None:
            files = 1 if deploy.beside is None else 2
            for piece in self._measured("deploy", self.recipe.measure.limit, self.kept):
                yield {**piece, "seconds": files * piece["seconds"]}

    # What is known of lengths.

    def _prompt_length(self, prompts: Sequence[Prompt], chat: bool | None) -> float:
        tokenizer = self.context.tokenizer
        return (
            mean([len(encode_prompt(tokenizer, prompt, chat=chat)) for prompt in spread(prompts, LOOKED_AT)])
            if prompts
            else 1.0
        )

    def _source_lengths(self, source: DenseText | PrunedText) -> tuple[Lengths, int, int]:
        """Of what is written for training, cut to `train.length`; how many prompts there are, and texts already."""
        cfg = self.recipe.train
        read = read_prompts(source.prompts, source.split, source.subset, column=source.column)
        all_prompts: list[Any] = [row.value["prompt"] for row in read]
        prompts = spread(all_prompts, LOOKED_AT)
        lengths = [len(encode_prompt(self.context.tokenizer, prompt, chat=source.chat)) for prompt in prompts]
        fitting = [(prompt, size) for prompt, size in zip(prompts, lengths, strict=True) if size < cfg.length]
        prompts, size = [prompt for prompt, _ in fitting], mean([size for _, size in fitting]) if fitting else 1.0
        most = source.max_new_tokens
        before = self.recorded.of_prompts(all_prompts)
        if before is None:
            rows = min(source.batch_size, len(all_prompts))
            what = f"text of {source.prompts}"
            found = self._lengths(self.pace, prompts, size, most, what, rows=rows, chat=source.chat)
        else:
            found = before[0]
            self.notes.append(f"text of {source.prompts}: as long as what lies in the run's folder")
        answer = min(found.answer, max(1.0, cfg.length - size))
        there = before[1] if before is not None and isinstance(source, DenseText) else 0
        return Lengths(size, answer, found.longest), len(all_prompts), there

    def _lengths(
        self,
        pace: Pace | None,
        prompts: Sequence[Prompt],
        prompt: float,
        most: int,
        what: str,
        *,
        rows: int,
        chat: bool | None,
        task: Task | None = None,
        pruned: bool = False,
    ) -> Lengths:
        """Looked for once for each `what`, and once more for what the pruned model writes."""
        key = f"{what}, pruned" if pruned else what
        if key in self.known:
            return self.known[key]
        file, twin = (None if task is None else task.file), self.pruned if pruned else None
        there = None if task is None else self.recorded.answers.get(("before" if pruned else "dense", task.name))
        found = there if not pruned or self.left.get("prune") == 0 else None  # what is pruned anew may write otherwise
        if found is not None:
            said = "answers as long as those that lie in the run's folder"
        else:
            if pace is not None and (twin is not None or not pruned):
                writes = file if isinstance(file, WritingFile) else None
                limits = {"limit": most, "rows": rows, "chat": chat}
                with suppress(NotTimed, DataError):
                    found = pace.length(self.context.tokenizer, prompts, **limits, file=writes, twin=twin)
            if found is not None:
                said = f"texts of {found[0]:.0f} tokens, as the {'pruned ' if pruned else ''}model just wrote a few"
            elif pruned:
                found = self.known[what].answer, self.known[what].longest
                said = "as long as the dense model's, a guess"
            else:
                said = f"texts of {FRACTION:.0%} of the {most:,} tokens that they may have, a guess"
                found = FRACTION * most, most
        self.notes.append(f"{key}: {said}")
        self.known[key] = Lengths(prompt, *found)
        return self.known[key]

    @cached_property
    def pruned(self) -> Twin | None:
        """The pruned model, where it takes seconds: as the run's folder has it, or pruned now as the run does it."""
        pace, cfg = self.pace, self.recipe.prune
        if pace is None or pace.whole is None or self.prunes > PRUNES:
            return None
        with suppress(NotTimed, RecoverError, *DAMAGED):
            if self.left.get("prune") == 0:
                return pace.pruned(*load_plan(self.context.directory.prune))
            dense = pace.pruned(Plan.none(self.model.blocks))
            return None if dense is None else pace.pruned(*registry.prune(dense, cfg, self._calibration(dense)))
        return None

    def _calibration(self, dense: Twin) -> list[Any]:
        """As a run reads or writes it, and nothing is kept."""
        calibration: Calibration | None = getattr(self.recipe.prune, "calibration", None)
        if calibration is None or calibration.answer is None:
            return [] if calibration is None else self.context.calibration
        tokenizer, size = self.context.tokenizer, self.recipe.measure.batch_size
        write = partial(answers, dense, tokenizer, calibration.answer, batch_size=size)
        return calibration_batches(calibration, tokenizer, self.recipe.seed, write, context=self.model.context)

    def _held(self, source: GivenText | TeacherText) -> tuple[float, float] | None:
        """Mean tokens of prompt and of what is learnt, of the first rows."""
        if isinstance(source, TeacherText):
            samples = [row.sample for row in islice(read_teacher(source, self.model.vocabulary), LOOKED_AT)]
        else:
            rows = spread(read_rows(source.source, source.split, source.subset), LOOKED_AT)
            length = self.recipe.train.length
            samples = [found for row in rows for found in samples_of(row, source, self.context.tokenizer, length)]
        if not samples:
            return None
        answer = mean([sum(sample.mask) for sample in samples])
        return mean([len(sample.ids) for sample in samples]) - answer, answer

    def _writing(
        self, pace: Pace, texts: int, found: Lengths, rows: int, kept: float, sampling: Sampling | None
    ) -> float:
        """Seconds of so many texts with their prompts, dealt out over the processes."""
        mine = math.ceil(texts / self.processes)
        at_once = min(rows, mine)
        if not at_once:
            return 0.0
        decoding = pace.decoding(at_once, round(found.prompt + found.longest / 2 + 1))
        read = pace.forward(at_once, max(1, round(found.prompt))).at(kept)
        drawn = pace.draw(at_once, sampling) * mine * found.answer
        return decoding.seconds(mine, found.answer, found.longest, at_once, kept) + mine * found.prompt * read + drawn


def _items(task: Task, limit: int | None) -> int:
    return min(len(task.items), limit or len(task.items))


def _batches(cfg: Any, prompts: Sequence[Any]) -> int:
    return max(1, math.ceil(len(prompts) / cfg.batch_size))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


@dataclass(frozen=True)
class Recorded:
    """Of texts that lie in a run's folder: (mean, longest) of a stage's answers to a task, by both names.

    `written`: of each file of text for training its first prompt, its lengths, and how many texts it is.
    """

    answers: dict[tuple[str, str], tuple[float, float]]
    written: list[tuple[Any, Lengths, int]]

    def of_prompts(self, prompts: Sequence[Any]) -> tuple[Lengths, int] | None:
        """Lengths of the first text that was written to some of these, and how many there are."""
        return next(((lengths, count) for first, lengths, count in self.written if first in prompts), None)


def recorded(directory: RunDirectory) -> Recorded:
    """What the folder has, read once; a file that is damaged says nothing here: the run itself names it."""
    answers: dict[tuple[str, str], tuple[float, float]] = {}
    for stage, folder in (("dense", directory.dense), ("before", directory.before)):
        path = folder / "generations.json"
        with suppress(*DAMAGED):
            for task, rows in read_json(path).items() if path.is_file() else ():
                with suppress(*DAMAGED):
                    if lengths := [len(row["ids"]) for row in rows]:
                        answers[stage, task] = mean(lengths), max(lengths)
    written: list[tuple[Any, Lengths, int]] = []
    for path in sorted((directory.train / "data").glob("dense-*.jsonl")):
        with suppress(*DAMAGED):
            rows = [row for chunk in read_jsonl(path) for row in chunk["rows"]]
            if lengths := [len(ids) for _, ids in rows]:
                written.append((rows[0][0], Lengths(0.0, mean(lengths), max(lengths)), len(lengths)))
    return Recorded(answers, written)


def lines(found: Forecast) -> list[list[str]]:
    """Rows of a table: stage, what it does, its time, and how that was found; below them the sum."""
    rows, before = [], ""
    for piece in found["pieces"]:
        stage = piece["stage"]
        rows.append(["" if stage == before else stage, piece["what"], _time(piece), piece["how"]])
        before = stage
    total = sum(piece["seconds"] for piece in found["pieces"])
    hows = {piece["how"] for piece in found["pieces"]}
    short = sum(piece["seconds"] for piece in found["pieces"] if piece["how"] != "measured")
    known = f"{1 - short / total if total else 0.0:.0%} of it measured" if hows != {"measured"} else ""
    least = "at least " if "not counted" in hows else ""
    return [*rows, ["all", "", f"{least}{console.duration(total)}", known]]


def _time(piece: Piece) -> str:
    said = console.duration(piece["seconds"])
    return {"measured": said, "floor": f"at least {said}", "not counted": "–"}[piece["how"]]
