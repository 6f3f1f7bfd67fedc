"""The whole job in float32, tiny: what several GPUs prune, probe, write, learn and export, against one GPU."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors.torch
from job import SHARDED, Keep, Row
from launching import ENGINES, Launch

from recover.base.artifacts import read_json, read_jsonl
from recover.config.recipe import load_recipe

FLOAT32 = ("model.dtype=float32", "export.dtype=float32")
NOTHING = 1e-3  # numbers of a probe are held against at least this: some are rounding and nothing else


class Whole:
    """Straight runs of one recipe, each made once, whoever asks for it first; they run beside one another."""

    def __init__(self, recipe: Path, fields: Sequence[str], out: Path, gpus: int) -> None:
        self.recipe, self.fields, self.out, self.gpus = recipe, [*FLOAT32, *fields], out, gpus
        self.name = load_recipe(recipe, self.fields).name
        self._lock, self._pool = threading.Lock(), ThreadPoolExecutor(16)
        self._runs: dict[str, Future[Path]] = {}

    def launches(self) -> dict[str, tuple[Launch, tuple[str, ...]]]:
        """By name; the first is one GPU. ZeRO-3 shares out weights by itself."""
        found: dict[str, tuple[Launch, tuple[str, ...]]] = {"one GPU": (Launch("one", gpu=0), ())}
        for engine in ENGINES:
            sharded: tuple[str, ...] = () if engine == "zero3" else SHARDED
            found[" ".join([f"{self.gpus} x {engine}", *sharded])] = (Launch(engine, self.gpus), sharded)
        return found

    def run_directory(self, where: str) -> Path:
        return self.out / where / self.name

    def words(self, where: str, fields: Sequence[str]) -> list[str]:
        return ["run", str(self.recipe), "--runs", str(self.out / where), *self.fields, *fields]

    def straight(self, name: str) -> Future[Path]:
        """The run directory, when the run is done; raises RuntimeError where it failed."""
        launch, fields = self.launches()[name]
        where = f"straight-{list(self.launches()).index(name)}"

        def go() -> Path:
            launch.run(["-m", "recover", *self.words(where, fields)], self.out / f"{where}.log")
            return self.run_directory(where)

        with self._lock:
            if name not in self._runs:
                self._runs[name] = self._pool.submit(go)
            return self._runs[name]


def whole(runs: Whole, keep: Keep) -> None:
    """Each launch beside the others; a row as each ends."""
    first, *others = runs.launches()
    waited = {name: runs.straight(name) for name in (first, *others)}
    alone = waited[first].result()
    for name in others:
        try:
            keep({"row": name, **differences(waited[name].result(), alone)})
        except Exception as error:  # the other launches are of use all the same
            keep({"row": name, "error": f"{type(error).__name__}: {error}"})


def differences(run: Path, alone: Path) -> dict[str, Any]:
    """Of two run directories; numbers relative to the larger of each pair, those of probes to `NOTHING` at least."""
    ours, theirs = (read_json(each / "prune" / "plan.json") for each in (run, alone))
    texts = [list(written(each)) for each in (run, alone)]
    steps = [[line["loss"] for line in read_jsonl(each / "train" / "steps.jsonl")] for each in (run, alone)]
    epochs = [[line["drift"]["kl"]["mean"] for line in read_jsonl(each / "epochs.jsonl")] for each in (run, alone)]
    return {
        "same_picks": ours["dropped"] == theirs["dropped"],
        "scores": apart(ours["scores"], theirs["scores"]),
        "probe": {
            stage: apart(*(read_json(each / stage / "probe.json") for each in (run, alone)), least=NOTHING)
            for stage in ("before", "after")
        },
        "same_texts": [sum(a == b for a, b in zip(*texts, strict=True)), len(texts[1])],
        "steps": len(steps[0]),
        "first_loss": apart(*(losses[0] for losses in steps)),
        "loss": apart(*steps),
        "kl": apart(*epochs),
        "tensors": tensors_apart(run / "deploy", alone / "deploy"),
        "headline": apart(*(read_json(each / "after" / "measure.json")["headline"] for each in (run, alone))),
        "verified": read_json(run / "verify.json")["ok"],
    }


def written(run: Path) -> Iterator[Any]:
    """Every text of a run: what is learnt, and what was measured of each model."""
    for path in sorted((run / "train" / "data").glob("*.jsonl")):
        for line in read_jsonl(path):
            yield from line["rows"]
    for stage in ("dense", "before", "after"):
        yield from leaves(read_json(run / stage / "generations.json"))


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    if isinstance(value, list):
        for each in value:
            yield from leaves(each)
    else:
        yield value


def apart(ours: Any, theirs: Any, *, least: float = 0.0) -> float:
    """The largest difference of two numbers at one place over the larger of them, or over `least`.

    Infinite where anything else differs.
    """
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        return max((apart(ours[key], theirs[key], least=least) for key in ours), default=0.0)
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return max((apart(a, b, least=least) for a, b in zip(ours, theirs, strict=True)), default=0.0)
    if ours == theirs:
        return 0.0
    if isinstance(ours, int | float) and isinstance(theirs, int | float):
        return abs(ours - theirs) / max(abs(ours), abs(theirs), least)
    return math.inf


def tensors_apart(ours: Path, theirs: Path) -> float:
    """The largest difference of an exported weight, over the largest weight of its tensor."""
    a, b = tensors(ours), tensors(theirs)
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in a):
        return math.inf
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max()) for name in a)


def tensors(folder: Path) -> dict[str, Any]:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(path).items()
    }


def table(found: Sequence[Row]) -> list[str]:
    lines = [
        "| float32, whole job | same picks | their scores | probe, pruned | recovered | same texts | step 1 | loss |"
        " KL of epochs | exported weights | verified |",
        "|---|---|" + "---:|" * 8 + "---|",
    ]
    for row in found:
        if "error" in row:
            lines.append(f"| {row['row']} | {row['error'][-300:]!r} |" + " |" * 9)
            continue
        cells = [row["row"], "yes" if row["same_picks"] else "no", f"{row['scores']:.1e}"]
        cells += [f"{row['probe'][stage]:.1e}" for stage in ("before", "after")]
        cells += [f"{row['same_texts'][0]:,} of {row['same_texts'][1]:,}", f"{row['first_loss']:.1e}"]
        cells += [f"{row['loss']:.1e}", f"{row['kl']:.1e}"]
        cells += [f"{row['tensors']:.1e}", "yes" if row["verified"] else "no"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
