"""What a worker of `peers.py` does: text, a cut, a recovery, a rounding, and the measuring of what came of it.

OUT/text/dense, truth   rows that all learn from; OUT/text/written what the dense model wrote, as recover keeps it
OUT/models/NAME         a variant: its checkpoint or GGUF file, and made.json, which is written last
OUT/measured/NAME       measure.json: what `recover measure` writes of it
"""

from __future__ import annotations

import argparse
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from crew import Row
from cuts import PEERS, SPARSITY, Size
from datasets import Dataset, load_from_disk
from recoveries import RATES, Lesson, learnt, loaded
from safetensors import safe_open

import recover
from recover.base.artifacts import read_json, write_json
from recover.base.console import quiet_libraries
from recover.base.journal import Journal
from recover.commands.measure import Wanted, measure_checkpoint, write
from recover.config.prune import Depth, Wanda, Width
from recover.config.recipe import DenseText, GivenText, Recipe, load_recipe
from recover.config.train import Data, Train
from recover.export.gguf.write import QUANTIZED, write_gguf
from recover.models.load import load_model, load_tokenizer, ready
from recover.models.plan import Plan, load_plan, save_plan
from recover.models.twin import Twin
from recover.prune import registry
from recover.prune.calibrate import calibration_batches
from recover.run.context import answers
from recover.train.data import build_dataset

DENSE, TEXT, TRUTH = "dense", "text", "truth"
OURS = (
    "kl",
    "width",
    "masks",
)  # blocks by KL, neurons by obs rewritten by least squares, Wanda with masks that are kept
KD = "kd"  # our recovery
ROUNDED = (*QUANTIZED, "nf4")
BLOCKS = ("kl", "influence", "hand")  # cuts that take whole blocks: each can be recovered in each way
CALIBRATION = 128  # sequences of the text that peers choose on
BLOCK = 64  # weights
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
MORE = 4  # times the recipe's calibration, for what is rewritten by it


class Parts(NamedTuple):
    """What goes, how it learns, from which text, at how many times the rate, and how it is stored."""

    cut: str
    recovery: str | None = None
    text: str = TEXT
    rate: float = 1.0
    rounding: str | None = None


def parts_of(name: str) -> Parts:
    """The parts of `CUT[+RECOVERY[+truth][+xRATE]][+ROUNDING]`. Raises SystemExit naming what is wrong."""
    cut, *others = name.split("+")
    if cut not in (DENSE, *PEERS, *OURS):
        raise SystemExit(f"{name}: found {cut!r}, expected a cut: {', '.join((DENSE, *PEERS, *OURS))}")
    found: dict[str, Any] = {}
    for part in others:
        rate = re.fullmatch(r"x(\d+(?:\.\d+)?)", part)
        if part in (*RATES, KD) and cut != DENSE and not found:
            found["recovery"] = part
        elif part == TRUTH and [*found] == ["recovery"]:
            found["text"] = TRUTH
        elif rate and "recovery" in found and not {"rate", "rounding"} & {*found}:
            found["rate"] = float(rate[1])
        elif part in ROUNDED and "rounding" not in found:
            found["rounding"] = part
        else:
            raise SystemExit(
                f"{name}: {part!r} does not stand there; expected CUT[+RECOVERY[+truth][+xRATE]][+ROUNDING] with a "
                f"recovery of {', '.join((*RATES, KD))} and a rounding of {', '.join(ROUNDED)}"
            )
    if found.get("recovery") == KD and cut not in (*BLOCKS, *OURS):
        raise SystemExit(
            f"{name}: {KD} keeps the dense weights beside a plan: it is for {', '.join((*BLOCKS, *OURS[1:]))}"
        )
    return Parts(cut, **found)


def parent_of(name: str) -> str | None:
    """The variant that this one is made from; None of dense."""
    parts = parts_of(name)
    if parts.rounding:
        return name.removesuffix(f"+{parts.rounding}")
    return None if name == DENSE else parts.cut if parts.recovery else DENSE


Key = tuple[str, bool]


@dataclass(frozen=True)
class Task:
    """Text or a variant that is to be made; or a variant that is there, and is to be measured."""

    name: str
    measured: bool = False

    @property
    def key(self) -> Key:
        return self.name, self.measured

    @property
    def needs(self) -> set[Key]:
        if self.measured:
            return {(self.name, False)}
        if self.name in (TEXT, TRUTH):
            return {(DENSE, False)}
        parts, parent = parts_of(self.name), parent_of(self.name)
        text = {parts.text} if parts.recovery and not parts.rounding else {TEXT} if self.name in PEERS else set()
        return {(name, False) for name in (parent, *sorted(text)) if name}


def tasks_for(names: Sequence[str], done: set[str]) -> list[Task]:
    """All work behind these variants but the `done`, each behind what it needs."""
    found: dict[Key, Task] = {}

    def add(task: Task) -> None:
        for need in sorted(task.needs):
            if need not in found:
                add(Task(*need))
        found[task.key] = task

    for name in names:
        if name not in done:
            add(Task(name, measured=True))
    return list(found.values())


def recipe_for(options: argparse.Namespace, rate: float = 1.0) -> Recipe:
    """The base recipe with the budget of all variants: one epoch, every token scored, tasks measured greedily."""
    base = load_recipe(options.recipe, options.set)
    fields = [
        *options.set,
        "train.epochs=1",
        "train.loss.scored=all",
        f"train.tokens={options.tokens}",
        f"train.lr={base.train.lr * rate}",
        f"seed={options.seed}",
        "measure.sampling=null",
        "measure.samples=1_000_000",  # a verdict of every item
    ]
    return load_recipe(options.recipe, fields)


class Workbench:
    """What the tasks of one process do; nothing is held in memory from one to the next but the tokenizer."""

    def __init__(self, options: argparse.Namespace) -> None:
        quiet_libraries()
        self.options, self.out = options, options.out
        self.recipe = recipe_for(options)
        self.tokenizer = load_tokenizer(self.recipe.model)

    def do(self, task: Task) -> list[Row]:
        if task.name in (TEXT, TRUTH):
            self.written(task.name)
            return []
        made = self.made(task.name)
        return [{"variant": task.name, **made, **self.measured(task.name)}] if task.measured else []

    # Text.

    def written(self, which: str) -> None:
        """Rows of about `--tokens` scored tokens, of the dense model's own text or of the right answers."""
        folder = self.out / "text" / which
        if not folder.exists():
            cfg = self.recipe.train.model_copy(update={"data": self.sources(which)})
            rows = build_dataset(
                cfg, self.dense_twin(), self.tokenizer, self.recipe.seed, self.out / "text" / "written"
            )
            beside = folder.with_name(f".{which}.tmp")
            rows.save_to_disk(str(beside))
            beside.rename(folder)

    def sources(self, which: str) -> tuple[Data, ...]:
        if which == TEXT:
            return self.recipe.train.data
        if self.options.truth is None:
            raise ValueError("--truth: give the folder of right answers that benchmarks/peers/truth.py wrote")
        columns: Any = {"prompt": "prompt", "completion": "completion"}
        folder, sources = self.options.truth.absolute(), self.recipe.train.data
        prompts = [(source.prompts, source.share) for source in sources if isinstance(source, DenseText)]
        return tuple(
            GivenText(source=str(folder / Path(path).name), columns=columns, share=share) for path, share in prompts
        )

    def rows(self, which: str) -> Dataset:
        found = load_from_disk(str(self.out / "text" / which))
        assert isinstance(found, Dataset), "it was saved as one"
        return found

    # Models.

    def folder(self, name: str) -> Path:
        return self.out / "models" / name

    def made(self, name: str) -> Row:
        """What is known of a variant; it is made where it is not there."""
        folder = self.folder(name)
        if not (folder / "made.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            write_json(folder / "made.json", {**self._make(name, folder), "peak_bytes": _peak()})
        return read_json(folder / "made.json")

    def _make(self, name: str, folder: Path) -> Row:
        parts, parent = parts_of(name), parent_of(name)
        if parent is None:
            self.saved(ready(load_model(self.recipe.model)), folder)
            return {}
        before = read_json(self.folder(parent) / "made.json")
        if parts.rounding:
            return before | self.rounded(parent, parts.rounding, folder)
        if parts.recovery == KD:
            return before | self.distilled(parts, folder)
        if parts.recovery:
            return before | self.taught(parts, folder)
        return self.planned(name, folder) if name in OURS else self.cut(name, folder)

    def cut(self, name: str, folder: Path) -> Row:
        """By a peer, a stock model."""
        model, size = loaded(self.folder(DENSE)), self.size()
        rows: Any = self.rows(TEXT).shuffle(seed=self.recipe.seed)
        ids = [torch.tensor([each]) for each in rows["input_ids"][:CALIBRATION]]
        started = time.monotonic()
        found, facts = PEERS[name](model, ids, size)
        facts["cut_seconds"] = time.monotonic() - started
        self.saved(found, folder)
        return facts

    def size(self) -> Size:
        count = getattr(self.recipe.prune, "count", None)
        if not isinstance(self.recipe.prune, Depth) or count is None:
            raise ValueError(
                f"{self.options.recipe}: its prune is to be of kind depth, with the count of blocks that go"
            )
        return Size.of(load_model_config(self.folder(DENSE)), count)

    def planned(self, name: str, folder: Path) -> Row:
        """By ours: a plan beside the dense weights."""
        cfg, twin = self.pruning(name), self.dense_twin()
        calibration: Any = cfg.calibration
        started = time.monotonic()
        write = partial(self._answers, twin, calibration.answer) if calibration.answer else None
        batches = calibration_batches(calibration, self.tokenizer, self.recipe.seed, write)
        plan, masks, weights = registry.prune(twin, cfg, batches, Journal())
        seconds = time.monotonic() - started
        save_plan(plan, masks, folder / "plan", weights)
        facts = {"dropped": sorted({site.block for site in plan.sites})} if name == "kl" else {}
        return {**facts, "cut_seconds": seconds}

    def pruning(self, name: str) -> Depth | Width | Wanda:
        """The recipe's own, and what the recipes of docs/recipes.md say for the others."""
        depth: Any = self.recipe.prune
        calibration = depth.calibration
        if name == "kl":
            return depth
        if name == "masks":
            return Wanda(sparsity=SPARSITY, calibration=calibration)
        neurons, size = load_model_config(self.folder(DENSE)).intermediate_size, self.size()
        more = calibration.model_copy(update={"samples": MORE * calibration.samples})
        return Width(mlp=1 - size.neurons / neurons, multiple=8, score="obs", repair="linear", calibration=more)

    def _answers(self, twin: Twin, tokens: int, prompts: list[Any]) -> list[list[int]]:
        return answers(twin, self.tokenizer, tokens, prompts, batch_size=64)

    def dense_twin(self) -> Twin:
        model = ready(load_model(self.recipe.model))
        return Twin(model, Plan.none(model.config.num_hidden_layers))

    def twin(self, cut: str) -> Twin:
        """The pruned view of a cut, ours or one of blocks."""
        model = ready(load_model(self.recipe.model))
        if cut in OURS:
            return Twin(model, *load_plan(self.folder(cut) / "plan"))
        gone = read_json(self.folder(cut) / "made.json")["dropped"]
        return recover.prune(model, self.tokenizer, Depth(blocks=tuple(gone)))

    def lesson(self, parts: Parts, folder: Path) -> tuple[Lesson, Row]:
        """What a trainer is given, and what is told of it."""
        rate = parts.rate * RATES.get(parts.recovery or "", 1.0)
        cfg, rows = recipe_for(self.options, rate).train, self.rows(parts.text)
        student, dense = self.folder(parts.cut), self.folder(DENSE)
        scratch, micro = folder / "scratch", self.options.micro
        lesson = Lesson(student, dense, self.tokenizer, rows, cfg, self.recipe.seed, scratch, micro)
        tokens = sum(len(ids) - 1 for ids in rows["input_ids"][:])
        return lesson, {"tokens": tokens, "steps": lesson.steps, "lr": cfg.lr}

    def taught(self, parts: Parts, folder: Path) -> Row:
        """By a peer's trainer."""
        lesson, facts = self.lesson(parts, folder)
        started = time.monotonic()
        model = learnt(str(parts.recovery), lesson)
        facts["train_seconds"] = time.monotonic() - started
        self.saved(model, folder)
        shutil.rmtree(lesson.scratch, ignore_errors=True)
        return facts

    def distilled(self, parts: Parts, folder: Path) -> Row:
        """By ours."""
        lesson, facts = self.lesson(parts, folder)
        twin, scratch = self.twin(parts.cut), lesson.scratch
        if parts.text == TEXT:
            shutil.copytree(self.out / "text" / "written", scratch / "data")
        started = time.monotonic()
        recover.distill(
            twin,
            self.tokenizer,
            self.sources(parts.text),
            tokens=lesson.cfg.tokens,
            out=scratch,
            seed=lesson.seed,
            **_fields(lesson.cfg),
        )
        facts["train_seconds"] = time.monotonic() - started
        recover.export(twin, self.tokenizer, folder / "deploy")
        shutil.rmtree(scratch, ignore_errors=True)
        return facts

    def rounded(self, parent: str, rounding: str, folder: Path) -> Row:
        """To a GGUF file of ours, or to NF4."""
        source, started = self.checkpoint(parent), time.monotonic()
        if rounding in QUANTIZED:
            write_gguf(source, folder / "model.gguf", rounding)
            stored = stored_bytes(folder / "model.gguf")
        else:
            model = loaded(source)
            stored = four_bits(model)
            self.saved(model, folder)
        return {"bytes": stored, "round_seconds": time.monotonic() - started}

    def saved(self, model: Any, folder: Path) -> None:
        """A checkpoint that stock tools load, in the dense model's dtype."""
        model.to(getattr(torch, self.recipe.model.dtype)).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def checkpoint(self, name: str) -> Path:
        """Where a variant's model lies; a plan of ours is exported."""
        folder = self.folder(name)
        if name in OURS and not (folder / "deploy").exists():
            recover.export(self.twin(name), self.tokenizer, folder / "deploy")
        places = folder / "model.gguf", folder / "deploy"
        return next((place for place in places if place.exists()), folder)

    # Figures.

    def measured(self, name: str) -> Row:
        """What `recover measure` says of it, and what is stored."""
        path, started = self.checkpoint(name), time.monotonic()
        record = measure_checkpoint(
            str(path), Wanted(self.recipe.measure.tasks), self.recipe.measure, dtype=self.recipe.model.dtype
        )
        write(record, self.out / "measured" / name / "measure.json")
        rounding = parts_of(name).rounding
        whole = self.checkpoint(name.removesuffix(f"+{rounding}")) if rounding else path
        return {
            **counted(sorted(whole.glob("*.safetensors"))),
            **({} if rounding else {"bytes": stored_bytes(path)}),
            "measure_seconds": time.monotonic() - started,
            "tokens_asked": self.options.tokens,
            "seed": self.options.seed,
            "jobs": self.options.jobs,
        }


def load_model_config(folder: Path) -> Any:
    """A stock config."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


@torch.no_grad()
def four_bits(model: Any) -> int:
    """Round linear layers but the head to NF4, in place, and say what is stored then (bytes).

    As bitsandbytes does by default (arXiv 2305.14314, appendix E): of each 64 neighbouring weights the largest |w|, in
    float32, and for each weight the nearest of 16 values between -1 and 1. A test holds it against that package, whose
    own kernels for CPUs are wrong where a row is not made of whole blocks.
    """
    stored = sum(parameter.nbytes for parameter in model.parameters())
    head = model.get_output_embeddings()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer is not head:
            weight = layer.weight
            stored -= weight.nbytes - weight.numel() // 2 - 4 * (weight.numel() // BLOCK)
            weight.copy_(rounded_to_nf4(weight))
    return stored


def rounded_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """The weights that are multiplied by; their number is a multiple of BLOCK."""
    blocks = weight.float().reshape(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    values = torch.tensor(NF4, device=weight.device)
    nearest = torch.bucketize((blocks / largest).contiguous(), (values[1:] + values[:-1]) / 2)
    return (values[nearest] * largest).reshape(weight.shape).to(weight.dtype)


def stored_bytes(path: Path) -> int:
    """Of a file, or of the weights in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))


def counted(files: Sequence[Path]) -> Row:
    """Weights in files, and those that are not zero."""
    numbers = nonzero = 0
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no dict
                tensor = file.get_tensor(name)
                numbers += tensor.numel()
                nonzero += int(torch.count_nonzero(tensor))
    return {"parameters": numbers, "nonzero": nonzero}


def _fields(cfg: Train) -> dict[str, Any]:
    """All of a recipe's `train` but what `recover.distill` takes by name."""
    return {name: getattr(cfg, name) for name in type(cfg).model_fields if name not in ("data", "tokens")}


def _peak() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
