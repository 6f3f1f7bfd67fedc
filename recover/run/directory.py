"""Where the files of one run lie, who may write them, and which stages are done and with what they were made.

A stage is done when its stamp, written last, holds the same recipe leaves and inputs as are asked for now, and the
files that it lists are there as they were written.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from recover.base import artifacts, console, earlier, products, provenance
from recover.base.artifacts import DONE, MANIFEST, JsonObject, explained, explaining, read_json, settle, write_json
from recover.base.errors import ArtifactError
from recover.base.hub import COMMIT
from recover.base.products import hold_lock, mark, open_lock, owned, peek, refuse_foreign
from recover.config.recipe import completed
from recover.report.run_files import Best

SHOWN_CHANGES = 3  # in the reason why a stage is stale
# Fields that are a matter of memory, time or leave alone: what is made with others of them is as good.
NO_MATTER = re.compile(
    r"(measure|probe)\.batch_size|measure\.allow_code_execution|model\.offload|"
    r"train\.(cache(\..+)?|shard_weights|gradient_checkpointing|loss\.chunk|save_steps)"
)
NOT_DONE = "not done yet"
SHOWN_DIGITS = 12  # of a commit

KIND = "run"
STAMP = re.escape(DONE)
MEASURED = rf"measure\.json|generations\.json|probe\.jsonl?|{STAMP}"
# `recover`, `trial` and `forecast.json` are of earlier versions: a run that holds them is a run still.
TRAINED = rf"(?:best|training|trials?)\.json|steps\.jsonl|epoch-\d+|{STAMP}"
# What a run writes, by folder, as expressions: a crash is mended of these names in these places and of no others.
WRITTEN = {
    ".": r"(?:RUN|env|verify|speed|forecast|commits)\.json|recipe\.yaml|report\.(?:json|md|html)"
    r"|expected\.safetensors|deploy",
    "plan": rf"(?:estimate|overlap)\.json|{STAMP}",
    "dense": MEASURED,
    "prune": rf"plan\.json|(?:masks|weights)\.safetensors|written-[0-9a-f]+\.jsonl|{STAMP}",
    "prune/parts": r"parts\.jsonl|part-\d+\.safetensors",
    "before": MEASURED,
    **{
        f"{stage}{below}": names
        for stage in ("train", "recover", "trial")
        for below, names in (("", TRAINED), ("/checkpoints", r"checkpoint-\d+"), ("/pruned_text", r"\d+-\d+\.json"))
    },
    "after": rf"best\.json|{MEASURED}",
    "deploy": STAMP,
    "gguf": rf"model\.gguf|imatrix\.gguf|files\.json|{MEASURED}",
    "gguf/dense": rf"model\.gguf|imatrix\.gguf|{MEASURED}",
    "report": STAMP,
    "track": r"run\.json",
    "more": r"[A-Za-z0-9][A-Za-z0-9._-]*\.json",
}


class Stamp(TypedDict):
    """DONE.json: when a stage was finished, all that it was made from, and with what; `files`: what it wrote.

    `digest`: of all else in it. Earlier versions wrote no `made`, no `files`, or no `digest`.
    """

    stage: str
    finished: str
    fingerprint: JsonObject
    made: NotRequired[provenance.Environment | None]
    files: NotRequired[dict[str, products.FileEntry]]
    digest: NotRequired[str]


class StageState(TypedDict):
    """Whether a stage is done, when, and why it is stale, if it is."""

    stage: str
    done: bool
    finished: str | None
    stale: str | None


class Carried(TypedDict):
    """Of a run: the epoch that is kept, and the headline figures of each model; None for what is not there."""

    epoch: int | None
    dense: dict[str, float | None] | None
    pruned: dict[str, float | None] | None
    recovered: dict[str, float | None] | None


class RunDirectory:
    """Where the files of one run lie (the README of checkpoints/ shows the layout), and which stages are done."""

    def __init__(self, root: Path) -> None:
        self.root = root = Path(root)
        self.recipe, self.env = root / "recipe.yaml", root / "env.json"
        self.plan, self.dense, self.prune = root / "plan", root / "dense", root / "prune"
        self.before, self.train, self.after = root / "before", earlier.place(root, "train"), root / "after"
        self.deploy, self.report = root / "deploy", root / "report"
        # Of stage deploy: model.gguf and how it was made, and in `dense` the quantized dense model beside it.
        self.gguf = root / "gguf"
        # Of the epochs as they were measured again later, in another way than training did.
        self.epochs_again, self.best_again = root / "after" / "epochs.jsonl", root / "after" / "best.json"
        self.epochs, self.verify, self.speed = root / "epochs.jsonl", root / "verify.json", root / "speed.json"
        self.commits, self.more = root / "commits.json", root / "more"
        self.overlap = self.plan / "overlap.json"
        self.report_json, self.report_md = root / "report.json", root / "report.md"
        self.report_html = root / "report.html"

    def folder(self, stage: str) -> Path:
        """Where a stage writes, and where its stamp lies."""
        return {"export": self.deploy, "deploy": self.gguf, "train": self.train}.get(stage, self.root / stage)

    def refuse_foreign(self) -> None:
        """Raise ArtifactError, with nothing written, if the folder holds something and is no run of ours."""
        refuse_foreign(self.root, KIND, _stamped, "give another name (name=OTHER) or another --runs")

    @property
    def is_run(self) -> bool:
        """Whether this folder was made by us as a run."""
        return owned(self.root, KIND, _stamped)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold this run for writing, alone; what an earlier crash left is settled first.

        Raises:
            ArtifactError: the folder holds something and is no run of ours; another process holds it, by its id; or it
                cannot be written. Nothing in it was changed then.
        """
        self.refuse_foreign()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            file = open_lock(self.root)
        except OSError as error:
            raise explained(error, self.root) from error
        with file:
            self._hold(file)
            mark(self.root, KIND)
            self.settle()
            yield

    def settle(self) -> None:
        """Mend what a crash left, of the names that a run writes, where it writes them."""
        with explaining(self.root):
            for below, names in WRITTEN.items():
                settle(self.root / below, names, keep_edited=below == ".")
            if self.deploy.is_symlink():
                deploy = self.deploy.resolve()
                settle(deploy.parent, re.escape(deploy.name), keep_edited=True)

    def refuse_foreign_deploy(self) -> None:
        """Raise ArtifactError if `deploy` holds files and no manifest of ours: an export would replace them."""
        try:
            found = [] if not self.deploy.exists() else sorted(path.name for path in self.deploy.iterdir())
        except OSError as error:
            raise explained(error, self.deploy) from error
        if found and MANIFEST not in found and found != [DONE]:
            raise ArtifactError(
                f"{self.deploy}: holds {found[0]} and no {MANIFEST}, so it is no export of ours, and an export would "
                "take its place: move it away"
            )

    def _hold(self, file: Any) -> None:
        try:
            hold_lock(file)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ArtifactError(f"{self.root}: process {holder} works on this run; wait for it, or stop it") from None
        except OSError as error:
            console.warn(f"{self.root}: no lock can be held here ({error.strerror}); let no second run write to it")
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()

    def done(self, stage: str) -> Stamp | None:
        """The stamp of a finished stage, else None: `stage`, `finished` (a time, new at each run), `fingerprint`."""
        path = self.folder(stage) / DONE
        if not path.exists():
            return None
        found = read_json(path)
        if isinstance(found, dict) and "digest" in found and found["digest"] != _digest(found):
            raise ArtifactError(
                f"{path}: {products.CHANGED}: what its stage was made from would be taken for something else. Put it "
                "back, or delete it, and the stage is done again; if the change is meant, take `digest` out of it"
            )
        stamp = earlier.stamp(found)
        if not _is_stamp(stamp, stage) or not _is_time(stamp.get("finished")):
            raise ArtifactError(f"{path}: not a stamp; delete it, and the stage is done again")
        return stamp

    def finished(self, stage: str) -> str | None:
        """When the stage was finished; None: it is not."""
        stamp = self.done(stage)
        return None if stamp is None else stamp["finished"]

    def mark_done(self, stage: str, fingerprint: JsonObject, made: provenance.Environment | None = None) -> None:
        """Stamp a stage as done with all that it was made from and what it wrote; the last thing it writes.

        `made`: versions and machine (`provenance.environment`), for the report.
        """
        finished = datetime.now(UTC).isoformat()
        with explaining(self.root):
            stamp: Stamp = {
                "stage": stage,
                "finished": finished,
                "fingerprint": fingerprint,
                "made": made,
                "files": products.written(self.root, stage),
            }
            write_json(self.folder(stage) / DONE, {**stamp, "digest": _digest(artifacts.plain(stamp))})

    def commits_on_record(self) -> dict[str, str]:
        """Of each repository of the hub the commit that this run reads."""
        found = peek(self.commits)
        return found if isinstance(found, dict) else {}

    def threads(self) -> int | None:
        """Threads of torch with which this run was begun on a machine of as many cores as here; None: not begun so."""
        env = peek(self.env)
        if not isinstance(env, dict) or (env.get("machine") or {}).get("cores") != provenance.cores():
            return None
        found = (env.get("threads") or {}).get("number")
        return found if isinstance(found, int) and found > 0 else None

    def lost(self, stage: str, *, shown: bool = False) -> str | None:
        """The first file of a finished stage that is gone or changed, in words; None: all are as they were written.

        `shown`: those too that a report shows and no stage reads.
        """
        stamp = self.done(stage)
        with explaining(self.root):
            return None if stamp is None else products.lost(self.root, stamp.get("files"), shown=shown)

    def unmark(self, stage: str) -> None:
        """Take the stamp away before the stage is worked on again."""
        (self.folder(stage) / DONE).unlink(missing_ok=True)

    def best(self) -> Best:
        """The record of the epoch that is kept, with those of all `epochs`: as they were measured last.

        Raises ArtifactError if it is not there, or cannot be read.
        """
        return read_json(self.best_again if self.best_again.exists() else self.train / "best.json")

    @property
    def measured(self) -> dict[str, Path]:
        """Where the record of each model lies."""
        return {"dense": self.dense, "pruned": self.before, "recovered": self.after}

    def carried(self) -> Carried:
        """The headline figures of each model, and the epoch that is kept; None for what is not there."""
        found = {name: (peek(folder / "measure.json") or {}).get("headline") for name, folder in self.measured.items()}
        best = peek(self.best_again) or peek(self.train / "best.json") or {}
        return cast(Carried, {"epoch": best.get("epoch"), **found})

    def forget_training(self) -> None:
        """Have a training that is finished begin anew, and not be lengthened; one that is not finished goes on."""
        path = self.train / "training.json"
        found = peek(path)
        if isinstance(found, dict) and found.get("finished"):
            with explaining(self.root):
                write_json(path, {**found, "parts": []})

    def stale_reason(self, stage: str, fingerprint: JsonObject) -> str | None:
        """Why a stage must be done (again), as `prune.count: 4 -> 5`, or None."""
        stamp = self.done(stage)
        if stamp is None:
            return NOT_DONE
        before, now = _compared(stamp, artifacts.plain(fingerprint))
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if not changed:
            return self.lost(stage)
        shown = [_change(name, before, now) for name in changed[:SHOWN_CHANGES]]
        more = len(changed) - SHOWN_CHANGES
        return "; ".join(shown) + (f"; and {more} more" if more > 0 else "")


def _stamped(root: Path) -> bool:
    """Whether a stage of ours was finished here: every run of earlier versions holds such a stamp."""
    folders = ["plan", "dense", "prune", "before", "train", "recover", "trial", "after", "deploy", "report"]
    stages = {"deploy": "export", "recover": "train"}
    return any(_is_stamp(earlier.stamp(peek(root / name / DONE)), stages.get(name, name)) for name in folders)


def _digest(stamp: JsonObject) -> str:
    """sha256 of a stamp as JSON, its own `digest` apart."""
    return hashlib.sha256(artifacts.dumps({**stamp, "digest": None}).encode(errors=artifacts.ESCAPES)).hexdigest()


def _is_time(value: Any) -> bool:
    try:
        return datetime.fromisoformat(value) is not None
    except (TypeError, ValueError):
        return False


def _is_stamp(value: Any, stage: str) -> bool:
    return isinstance(value, dict) and value.get("stage") == stage and isinstance(value.get("fingerprint"), dict)


def _compared(stamp: Stamp, fingerprint: JsonObject) -> tuple[dict[str, str], dict[str, str]]:
    """The leaves of a stamp's fingerprint and of the one that is asked for now, without those of no matter.

    A field that came later has its default in a stamp that knows none. A stamp of an earlier version yet knows other
    sections, inputs and stages: what only one side knows says nothing then.
    """
    before, now = (dict(artifacts.leaves(side)) for side in (completed(stamp["fingerprint"]), fingerprint))
    if "made" not in stamp:
        known, both = fingerprint.keys() & stamp["fingerprint"].keys(), before.keys() & now.keys()

        def counts(name: str) -> bool:
            section = next((each for each in known if name == each or name.startswith(f"{each}.")), None)
            return section is not None and (section not in ("inputs", "stages") or name in both)

        before, now = ({name: text for name, text in side.items() if counts(name)} for side in (before, now))
    before, now = (
        {name: text for name, text in side.items() if not NO_MATTER.fullmatch(name)} for side in (before, now)
    )
    return before, now


def _input_change(name: str, before: str | None, now: str | None) -> str:
    if before is None or now is None:
        return f"{name} is new" if before is None else f"{name} is not read any more"
    commits = [value.strip('"') for value in (before, now)]
    if all(COMMIT.fullmatch(value) for value in commits):
        return f"{name}: commit {' -> '.join(value[:SHOWN_DIGITS] for value in commits)}"
    return f"{name} was changed"


def _change(name: str, before: dict[str, str], now: dict[str, str]) -> str:
    """One difference of two fingerprints in words; times of stages and digests of files say nothing to a reader."""
    part, _, rest = name.partition(".")
    if part == "stages":
        return f"{rest} was done again"
    if part == "inputs":
        return _input_change(rest, before.get(name), now.get(name))
    return f"{name}: {before.get(name, 'absent')} -> {now.get(name, 'absent')}".replace('"', "")
