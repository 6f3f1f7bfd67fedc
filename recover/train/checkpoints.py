"""Files of a training run: adapters, and checkpoints to go on from, each whole or not there.

train/epoch-1/ ...       adapter_model.safetensors, adapter_config.json, MANIFEST.json
train/best.json          the epoch that generated best, and the score of each
train/steps.jsonl        a line for each optimizer step: loss and its terms, tokens, seconds
train/trials.json        of `lr: auto`: trials of learning rates, and what was chosen (`trials.py`)
train/training.json      which training this is, whether it is finished, which steps were skipped, and its parts
train/checkpoints.jsonl  a line for each checkpoint once it is whole: step, digest of its manifest, bytes
train/checkpoints/       what a resume needs; of a finished training the last, from which it can be lengthened
    checkpoint-20/         trained.safetensors, state.json, MANIFEST.json
train/data/              text that the dense model wrote
train/pruned_text/       text that the pruned model wrote while it was trained (`written_text.py`)
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from recover.base import console, dist
from recover.base.artifacts import (
    MANIFEST,
    JsonObject,
    append_jsonl,
    check_manifest,
    discard,
    explaining,
    publish,
    read_json,
    read_jsonl,
    sha256,
    write_bytes,
    write_json,
)
from recover.base.errors import ArtifactError
from recover.base.zero import gathered
from recover.maths.divergence import all_finite
from recover.report.run_files import EpochScore, Finding

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
ADAPTER = "adapter_config.json"
TRAINED, STATE = "trained.safetensors", "state.json"
STEPS = "steps.jsonl"
PRUNED_TEXT = "pruned_text"
COPIED = ".modules_to_save."  # in the names of a router that is trained: peft's file has its buffers too
EPOCH, CHECKPOINT = re.compile(r"epoch-\d+"), re.compile(r"checkpoint-\d+")
LENGTHENED = ("tokens", "epochs", "patience", "stop", "save_steps")  # what may change when a finished training goes on
KEPT = 2  # the newest, and the one before: whoever finds the newest broken goes on from it


class Draws(TypedDict):
    """The state of a process's random generators: Python's, numpy's, torch's, and that of its GPU."""

    python: list[Any]
    numpy: list[Any]
    torch: str
    cuda: NotRequired[str]


class TotalsState(TypedDict):
    """Of a training's sums, what a resume goes on from; `course.Totals` says what each is."""

    tokens: int
    seconds: float
    epoch: dict[str, float]
    lr: float | None
    focus: list[float]


class Standing(TypedDict):
    """Where a training stands at a checkpoint: `applied` steps changed parameters, the last `row` were skipped.

    `averaged`: steps whose adapters the mean holds. `draws`: of each process. `threads`: of each, which earlier
    versions did not write.
    """

    processes: int
    threads: NotRequired[int]
    engine: str
    applied: int
    row: int
    averaged: int
    totals: TotalsState
    draws: list[Draws]


class CheckpointState(Standing):
    """state.json of a checkpoint: where its training, known by `fingerprint`, stood after `step` steps."""

    step: int
    fingerprint: str


class CheckpointLine(TypedDict):
    """A line of checkpoints.jsonl; `good`: the step before was in order."""

    step: int
    manifest: str
    bytes: int
    good: bool


class Skipped(TypedDict):
    """Steps that were not finite: how many, how often that led back to a checkpoint, and what was found."""

    skipped: int
    rollbacks: int
    findings: list[Finding]


class PartEnds(TypedDict):
    """A finished part of a training: `tokens` of all parts up to it, and the steps at which its epochs ended."""

    tokens: int
    ends: list[int]


class Part(PartEnds):
    """As training.json has it, with what the training was known by."""

    fingerprint: str


class TrainingRecord(Skipped):
    """training.json: which training it is, of which `config`, its finished parts, and whether it is finished itself."""

    fingerprint: str
    lineage: str
    config: JsonObject
    parts: list[Part]
    finished: bool


def best_of(records: Sequence[EpochScore]) -> EpochScore:
    """The record of the epoch to keep: of the highest score, and where there is none of the lowest training loss.

    The first of equal ones.
    """
    return max(records, key=lambda record: -record["loss"] if record["score"] is None else record["score"])


def write_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter's two files into `folder`. All processes must call it (ZeRO-3 gathers the adapter)."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    beside = {name: buffer for name, buffer in model.state_dict().items() if COPIED in name and name not in trained}
    with gathered(*trained.values()):
        values = {name: p.detach().cpu().clone() for name, p in (trained | beside).items()} if dist.is_main() else {}
    dist.on_main(lambda: _write_adapter(model, values, folder))


def _write_adapter(model: PeftModel, values: dict[str, Tensor], folder: Path) -> None:
    state = get_peft_model_state_dict(model, state_dict=values, save_embedding_layers=False)
    data = save({name: value.contiguous() for name, value in state.items()}, {"format": "pt"})
    with explaining(folder):
        write_bytes(folder / WEIGHTS, data)
        model.peft_config["default"].save_pretrained(str(folder))


def publish_adapter(model: PeftModel, folder: Path) -> None:
    """As `write_adapter`, with a manifest, and under its name only once it is whole."""
    beside = folder.with_name(f".{folder.name}.tmp")
    dist.on_main(lambda: shutil.rmtree(beside, ignore_errors=True))
    write_adapter(model, beside)
    dist.on_main(lambda: publish(beside, folder))


def read_adapter(model: PeftModel, folder: Path) -> None:
    """Put the adapter of `folder` into the model's.

    Raises:
        ArtifactError: the file cannot be read, a tensor is not finite, or its tensors are not those of this model's
            adapter, by name and shape.
    """
    path, mend = folder / WEIGHTS, f"Delete {folder} and run the stage again"
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}). {mend}") from error
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected, found = ({name: list(value.shape) for name, value in each.items()} for each in (own, state))
    if differing := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        name = differing[0]
        raise ArtifactError(
            f"{path}: holds {len(found)} tensors, this model's adapter has {len(expected)}; {name} is "
            f"{found.get(name, 'not there')}, expected {expected.get(name, 'no such tensor')} ({len(differing)} such "
            f"tensors). {mend}"
        )
    for name, value in state.items():
        if not value.is_floating_point() or not all_finite(value):
            raise ArtifactError(f"{path}: {name} holds no finite numbers of floating point. {mend}")
    set_peft_model_state_dict(model, state)


class Checkpoints:
    """The checkpoints of one training, known by `fingerprint`. Only the main process may call it.

    `before`: fingerprints of what it lengthens, whose checkpoints it goes on from.
    """

    def __init__(self, folder: Path, fingerprint: str, before: Sequence[str] = ()) -> None:
        self.folder, self.lines, self.fingerprint = folder / "checkpoints", folder / "checkpoints.jsonl", fingerprint
        self.known = {fingerprint, *before}
        self.broken: set[Path] = set()

    def save(self, step: int, values: dict[str, Tensor], state: Standing) -> None:
        """Publish a checkpoint: written beside, synced, with a manifest, renamed, listed; then old ones go.

        Raises:
            ArtifactError: it could not be written; what was there before is as it was.
        """
        checkpoint = self.folder / f"checkpoint-{step}"
        beside = checkpoint.with_name(f".{checkpoint.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        try:
            write_bytes(beside / TRAINED, save(values))
            write_json(beside / STATE, {**state, "step": step, "fingerprint": self.fingerprint})
            publish(beside, checkpoint)
        except ArtifactError:
            shutil.rmtree(beside, ignore_errors=True)  # a full disk needs the room
            raise
        self.broken.discard(checkpoint)
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        line: CheckpointLine = {
            "step": step,
            "manifest": sha256(checkpoint / MANIFEST),
            "bytes": size,
            "good": state["row"] == 0,
        }
        append_jsonl(self.lines, line)
        self._retain()

    def newest(self, *, good: bool = False) -> tuple[Path, CheckpointState] | None:
        """The newest checkpoint that is as it was written, and its state; what is passed over is named, and why.

        `good`: only of a moment when the step before was in order.
        """
        listed = self._listed()
        for checkpoint in self._present():
            try:
                state = self._checked(checkpoint, listed)
            except ArtifactError as error:
                if not checkpoint.exists():  # an old one that a training has just put away: there are newer ones
                    return self.newest(good=good)
                if checkpoint not in self.broken:
                    console.warn(f"not resuming from {checkpoint.name}: {error}")
                self.broken.add(checkpoint)
                continue
            if not good or state["row"] == 0:
                return checkpoint, state
        return None

    def _checked(self, checkpoint: Path, listed: dict[int, CheckpointLine]) -> CheckpointState:
        check_manifest(checkpoint)
        line = listed.get(_step(checkpoint))  # none: a crash came after the rename, and it is whole all the same
        if line is not None and line.get("manifest") != sha256(checkpoint / MANIFEST):
            raise ArtifactError(f"{checkpoint}: its manifest is not the one that {self.lines.name} lists")
        state: CheckpointState = read_json(checkpoint / STATE)
        if state["fingerprint"] not in self.known or state["step"] != _step(checkpoint):
            raise ArtifactError(f"{checkpoint}: of another training or step; expected this one's")
        return state

    def _listed(self) -> dict[int, CheckpointLine]:
        """Step -> its last line; nothing where the list cannot be read: then the manifests vouch alone."""
        if not self.lines.exists():
            return {}
        try:
            return {line["step"]: line for line in read_jsonl(self.lines)}
        except (ArtifactError, TypeError, KeyError) as error:
            console.warn(f"{self.lines}: cannot be read ({error}); checkpoints are held against their manifests alone")
            self.lines.unlink(missing_ok=True)
            return {}

    def _present(self) -> list[Path]:
        """Newest first."""
        found = (path for path in self.folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name))
        return sorted(found, key=_step, reverse=True)

    def _retain(self) -> None:
        """Keep the newest ones, and the newest from a moment when all was in order; broken ones do not count."""
        listed = self._listed()
        whole = [checkpoint for checkpoint in self._present() if checkpoint not in self.broken]
        known = [checkpoint for checkpoint in whole if _step(checkpoint) in listed]
        good = [checkpoint for checkpoint in known if listed[_step(checkpoint)].get("good")]
        for checkpoint in {*self._present()} - {*whole[:KEPT], *good[:KEPT]}:
            discard(checkpoint, also=(TRAINED, STATE))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


@dataclass(frozen=True)
class Asked:
    """The training that is asked for: `config`, fields of `train` that decide its course, and `others` that do.

    `lengthens`: whether a finished one may be lengthened. `complete` gives a `config` of an earlier version with
    the fields that came later, each with its default; None for what is no config of now.
    """

    config: JsonObject
    others: JsonObject
    complete: Callable[[JsonObject], JsonObject | None]
    lengthens: bool = True

    @property
    def fingerprint(self) -> str:
        """Of all that decides the training's course."""
        return self._digest(self.config)

    @property
    def lineage(self) -> str:
        """Of the same but tokens and epochs, by which a finished training is known that this one lengthens."""
        return self._digest({name: value for name, value in self.config.items() if name not in LENGTHENED})

    def _digest(self, config: JsonObject) -> str:
        return hashlib.sha256(json.dumps({**self.others, "config": config}, sort_keys=True).encode()).hexdigest()

    def after(self, parts: Sequence[Part]) -> str:
        """The fingerprint of what goes on behind these parts."""
        ends = [(part["fingerprint"], part["ends"]) for part in parts]
        return hashlib.sha256(f"{self.fingerprint} {ends}".encode()).hexdigest() if parts else self.fingerprint

    def as_known_to(self, config: JsonObject) -> Asked:
        """The same training in the fields of an earlier version's `config`, if those that came later say nothing new.

        A field that came later and has its default changes no training, so it changes no fingerprint either.
        """
        then = {**config, **{name: self.config[name] for name in LENGTHENED if name in config and name in self.config}}
        return replace(self, config=then) if self.complete(then) == self.config else self


def begin(folder: Path, asked: Asked) -> TrainingRecord:
    """What training.json says of this training's past; what an earlier, another one left is cleared away.

    `fingerprint`: what it is known by. `parts`: of a training that is lengthened, each that is finished, with its
    `fingerprint`, `tokens` over all parts so far and the steps at which its epochs ended.
    """
    return dist.on_main(lambda: _begin(folder, asked))


def _begin(folder: Path, asked: Asked) -> TrainingRecord:
    new: TrainingRecord = {
        "fingerprint": asked.fingerprint,
        "lineage": asked.lineage,
        "config": asked.config,
        "parts": [],
        "finished": False,
        "skipped": 0,
        "rollbacks": 0,
        "findings": [],
    }
    stamp = folder / "training.json"
    if stamp.exists():
        try:
            found = cast(TrainingRecord, {**new, **read_json(stamp)})
        except (ArtifactError, TypeError) as error:
            console.warn(f"{error}; the checkpoints will say which training it was")
            if Checkpoints(folder, asked.fingerprint).newest() is not None:
                write_json(stamp, new)
                return new
        else:
            asked = asked.as_known_to(found["config"])
            if found["fingerprint"] == asked.after(found["parts"]) and found["finished"] is False:
                return found
            if _can_be_lengthened(folder, found, asked):
                found["fingerprint"], found["finished"] = asked.after(found["parts"]), False
                write_json(stamp, found)
                return found
    with explaining(folder):
        _discard_checkpoints(folder)
        discard_texts(folder / PRUNED_TEXT)
        for old in folder.glob("epoch-*"):
            if EPOCH.fullmatch(old.name):
                discard(old, also=(WEIGHTS, ADAPTER))
        for name in ("best.json", "checkpoints.jsonl", STEPS):
            (folder / name).unlink(missing_ok=True)
    write_json(stamp, new)
    return new


def _can_be_lengthened(folder: Path, found: TrainingRecord, asked: Asked) -> bool:
    """Whether a finished training is this one with fewer tokens, and its last checkpoint is there."""
    parts = found["parts"]
    if not (asked.lengthens and found["finished"] and parts and found["lineage"] == asked.lineage):
        return False
    if parts[-1]["tokens"] >= asked.config["tokens"]:
        return False
    newest = Checkpoints(folder, parts[-1]["fingerprint"]).newest(good=True)
    step = parts[-1]["ends"][-1]
    if newest is None or newest[1]["step"] != step:
        console.warn(
            f"{folder / 'checkpoints'}: the last checkpoint of the finished training, checkpoint-{step}, is not there: "
            "it cannot be gone on with, and training begins anew"
        )
        return False
    console.say(f"the finished training of {parts[-1]['tokens']:,} tokens goes on to {asked.config['tokens']:,}")
    return True


def note(
    folder: Path,
    fingerprint: str,
    counts: Skipped,
    *,
    finished: bool = False,
    part: PartEnds | None = None,
) -> None:
    """Put the counts of skipped steps into training.json; once `finished`, the `part` that is, and what goes then.

    The newest checkpoint stays, since the training may be lengthened.
    """

    def write() -> None:
        past = read_json(folder / "training.json") if (folder / "training.json").exists() else {}
        kept = {name: past[name] for name in ("lineage", "config", "parts") if name in past}
        if part is not None:
            kept["parts"] = [*kept.get("parts", []), {"fingerprint": fingerprint, **part}]
        write_json(folder / "training.json", {"fingerprint": fingerprint, "finished": finished, **kept, **counts})
        if finished:
            _discard_checkpoints(folder, but=1)

    dist.on_main(write)


def _discard_checkpoints(folder: Path, but: int = 0) -> None:
    """All but so many, the newest that are whole."""
    found = [path for path in (folder / "checkpoints").glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    for checkpoint in sorted(found, key=lambda path: ((path / MANIFEST).exists(), _step(path)), reverse=True)[but:]:
        discard(checkpoint, also=(TRAINED, STATE))
    with suppress(OSError):  # files of others are in it, or it is not there
        (folder / "checkpoints").rmdir()


def discard_texts(folder: Path, number: str = r"\d+", after: str = "") -> None:
    """Delete the texts that the pruned model wrote: those of one source, or all; those behind the file `after`."""
    for path in folder.glob("*-*.json"):
        if re.fullmatch(rf"{number}-\d+\.json", path.name) and path.name > after:
            path.unlink()
    with suppress(OSError):
        folder.rmdir()
