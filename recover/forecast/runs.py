"""What is known of one run on its way: where it stood before, after each part of its recovery, and at the end.

A *share* is the part of what the dense model does that is kept, above chance where a task states its chance level, as
in the verdict of the report; of perplexity it is dense over measured. KL is KL(dense || pruned) at the last layer, mean
over positions, in nats.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from recover.base.artifacts import read_json, read_jsonl
from recover.base.errors import ArtifactError
from recover.config import yaml_values as strict_yaml
from recover.report import measures
from recover.report.verdict import DENSE_FLOOR

USES = (*measures.USES, "perplexity")
# What of a recipe tells one recovery from another.
SETTINGS = ("tokens", "epochs", "batch_size", "length", "lr", "scheduler")


@dataclasses.dataclass(frozen=True)
class State:
    """A model on its way: scored tokens it was trained on, its KL, and the share of dense that it keeps by use."""

    tokens: int
    kl: float
    shares: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run that was made to the end: `on_the_way` after each epoch but the last, `after` as it is shipped.

    Shares on the way are as if all items had been measured then, not the first `measure.epoch_limit` (`on_all_items`).
    `tokens`: those of the whole recovery, also where an earlier epoch was kept. `items`: of the tasks of a use, at the
    end; `command` is how it was made.
    """

    name: str
    model: str
    parameters: int
    prune: dict[str, Any]
    settings: dict[str, Any]
    tokens: int
    before: State
    on_the_way: tuple[State, ...]
    after: State
    items: dict[str, int]
    command: str
    revision: str | None

    def made(self) -> dict[str, Any]:
        """As `making` gives it for a recipe."""
        return {"model": self.model, "prune": self.prune, "settings": self.settings}

    def to_json(self) -> dict[str, Any]:
        """As plain values; `from_json` reads it back as an equal one."""
        return dataclasses.asdict(self) | {"on_the_way": [dataclasses.asdict(state) for state in self.on_the_way]}


def from_json(row: dict[str, Any]) -> Run:
    """The run of one row. Raises TypeError or KeyError where a field is unknown or missing."""
    states = {name: State(**row[name]) for name in ("before", "after")}
    return Run(**{**row, **states, "on_the_way": tuple(State(**state) for state in row["on_the_way"])})


def shares(record: dict[str, Any], dense: dict[str, Any]) -> dict[str, float]:
    """Use -> share of dense, from two records of `measure`; uses that were not measured, or where dense itself is
    within 5 points of nothing, are left out."""
    found = measures.headline({"dense": dense, "this": record})
    this, whole = found["this"] or {}, found["dense"] or {}
    kept = {}
    for use in measures.USES:
        figure, full = this.get(use), whole.get(use)
        if figure and full:
            chance = full["chance"] or 0.0
            if full["value"] - chance >= DENSE_FLOOR:
                kept[use] = (figure["value"] - chance) / (full["value"] - chance)
    if this.get("perplexity") and whole.get("perplexity"):
        kept["perplexity"] = whole["perplexity"] / this["perplexity"]
    return kept


def model_name(source: str) -> str:
    """The model's own name, wherever it comes from: no organisation, folder, `embedded:`, or GGUF quantization."""
    name = Path(source.removeprefix("embedded:")).name
    return re.sub(r"(\.I?Q\d\w*|\.[BF]F?(16|32))?\.gguf$", "", name, flags=re.IGNORECASE)


def making(recipe: dict[str, Any]) -> dict[str, Any]:
    """Model, pruning and training of a recipe as a `Run` states them: what makes two runs one and the same."""
    leaf = recipe["recover"]
    return {
        "model": model_name(recipe["model"]["source"]),
        "prune": {name: value for name, value in recipe["prune"].items() if name != "calibration" and value},
        "settings": {name: leaf[name] for name in SETTINGS} | {"rank": leaf["lora"]["rank"]},
    }


def read_run(root: Path) -> Run:
    """The run in a directory that `recover run` has brought through stage `after`.

    Raises:
        ArtifactError: a file that is needed is not there or is corrupt, by its path, or recovery had one epoch only.
    """
    recipe = strict_yaml.read(root / "recipe.yaml")
    plan, dense = read_json(root / "prune" / "plan.json"), read_json(root / "dense" / "measure.json")
    epochs = sorted({record["epoch"]: record for record in read_jsonl(root / "epochs.jsonl")}.items())
    if len(epochs) < 2:
        raise ArtifactError(f"{root / 'epochs.jsonl'}: {len(epochs)} epochs; what was half-way needs at least 2")
    after = read_json(root / "after" / "measure.json")
    total = epochs[-1][1]["tokens"]
    passed = [
        State(record["tokens"], record["drift"]["kl"]["mean"], shares(record["measure"], dense)) for _, record in epochs
    ]
    shipped, kept = read_state(root / "after", dense, total), max((record for _, record in epochs), key=_merit)
    on_first = shares(kept["measure"], dense)
    environment = _environment(root)
    ended = measures.headline({"after": after})["after"] or {}
    return Run(
        name=recipe["name"],
        **making(recipe),
        parameters=plan["parameters_dense"],
        tokens=total,
        before=read_state(root / "before", dense, 0),
        on_the_way=tuple(on_all_items(state, on_first, shipped.shares) for state in passed[:-1]),
        after=shipped,
        items={use: ended[use]["items"] for use in measures.USES if ended.get(use)},
        command=_portable(environment.get("argv") or ["not kept;", "recipe as in this row"]),
        revision=(environment.get("git") or {}).get("commit"),
    )


def on_all_items(state: State, on_first: dict[str, float], on_all: dict[str, float]) -> State:
    """The state with shares as all items would give them, where an epoch was measured on the first ones only.

    The model that was kept was measured on both; by what that made of its share, items that are easier or harder than
    the rest are taken out of other epochs' shares. The first 50 of 400 questions can be easier by a quarter.
    """
    factors = {use: on_all[use] / share for use, share in on_first.items() if share > 0 and on_all.get(use, 0) > 0}
    return dataclasses.replace(
        state, shares={use: share * factors.get(use, 1.0) for use, share in state.shares.items()}
    )


def _merit(record: dict[str, Any]) -> float:
    """By what recovery chooses the epoch that it keeps: the first one of the largest."""
    score = record.get("score")
    return -record["train"]["loss"] if score is None else score


def _portable(argv: list[str]) -> str:
    """The command without what belongs to one machine: where runs were put, and folders above the repository's."""
    kept = [word for before, word in zip(["", *argv], argv, strict=False) if "--runs" not in (before, word)]
    text = re.sub(r"(?<![\w.:/])[\w./-]*/(?=(?:benchmarks|recipes)/)", "", " ".join(kept))
    return re.sub(r"(?<![\w.:])/(?:[^/\s\"',]+/)*(?=[^/\s\"',]+)", "", text)


def _environment(root: Path) -> dict[str, Any]:
    """Command and revision, from env.json, or from the report where only that was kept."""
    if (root / "env.json").exists():
        return read_json(root / "env.json")
    report = read_json(root / "report.json") if (root / "report.json").exists() else {}
    return (report.get("provenance") or {}).get("env") or {}


def read_state(folder: Path, dense: dict[str, Any], tokens: int) -> State:
    """Where the model stood that a stage measured into `folder`."""
    probe, measured = read_json(folder / "probe.json"), read_json(folder / "measure.json")
    return State(tokens, probe["final"]["kl"]["mean"], shares(measured, dense))
