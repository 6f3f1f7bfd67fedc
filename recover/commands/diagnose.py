"""`recover diagnose`: any two checkpoints of one tokenizer, every probe that the files given allow, into one folder.

probe.jsonl     one record a line          positions.jsonl or .parquet   every figure of every scored position
probe.json      their summary              batches/                      what is done; the same command goes on
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recover.base import artifacts, console, dist, hub
from recover.base.artifacts import write_json
from recover.base.console import quiet_libraries
from recover.base.errors import DataError
from recover.base.products import begin_diagnosis
from recover.config import recipe
from recover.measure.tasks import load_task
from recover.models.plan import load_plan
from recover.models.source import kind_of
from recover.probe.probe import Finding, Store, findings, positions_of, records_of, texts
from recover.probe.records import Record, summary
from recover.probe.tasks import KINDS, read_queries, retrieval_drift, task_drift
from recover.probe.views import Pair, load_pair
from recover.run import input_digests as inputs
from recover.text.prompts import text_ids
from recover.text.read import rows_at


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to probe with: JSONL with a `prompt` or a `text` column, choice and retrieval tasks (YAML), retrieval pairs
    (JSONL).

    `length`: tokens read of each text.
    """

    prompts: Path | None = None
    texts: Path | None = None
    tasks: Sequence[str] = ()
    retrieval: Path | None = None
    length: int = 512


def diagnosis(
    dense: recipe.Model,
    other: recipe.Model,
    wanted: Wanted,
    cfg: recipe.Probe,
    out: Path,
    *,
    numbers: Sequence[int] | None = None,
    parquet: bool = False,
) -> dict[str, Any]:
    """The summary of all records, which are written to `out`; a diagnosis that was stopped goes on.

    `numbers`: which dense block each of the other's blocks is, where depths differ and the other is no export of a run
    of ours (there the run's plan says it).

    Raises:
        ArtifactError: `out` holds something and is no diagnosis of ours; nothing in it was changed.
        DataError: nothing to probe with, or a file that cannot be used, by line. All are read before a model is loaded.
        ModelError: the two checkpoints are no pair (`load_pair`), or a model gives what is not finite.
    """
    quiet_libraries()
    rows = _read(wanted)
    dist.on_main(lambda: begin_diagnosis(out))
    pair, tokenizer = load_pair(dense, other, numbers or planned_blocks(other.source))
    key = _key(dense, other, wanted, cfg, pair)
    records, positions = _probe(pair, tokenizer, rows, wanted, cfg, out, key)
    plain = [record.to_json() for record in records]
    found = summary(records)
    if dist.is_main():
        artifacts.write_jsonl(out / "probe.jsonl", plain)
        write_json(out / "probe.json", {"dense": dense.source, "other": other.source, **found})
        for name, columns in positions.items():
            _write_columns(out / name, columns, parquet=parquet)
    return found


def planned_blocks(source: str) -> list[int] | None:
    """The dense numbers of the blocks of an export of ours (`RUN/deploy`), from the run's plan; None for all else."""
    folder = Path(source).expanduser()
    if not (folder.is_dir() and (folder.parent / "prune" / "plan.json").is_file() and folder.name == "deploy"):
        return None
    plan = load_plan(folder.parent / "prune").plan
    alone = plan.dropped_attention or plan.dropped_mlp  # exported blocks then mix sublayers of several dense ones
    return None if alone else list(plan.kept)


def _read(wanted: Wanted) -> dict[str, Any]:
    """Everything that the files hold, checked."""
    tasks = [load_task(source) for source in wanted.tasks]
    wrong = [task.name for task in tasks if task.kind not in KINDS]
    if wrong:
        raise DataError(f"task {wrong[0]}: expected choice or retrieval tasks; prompts are given as JSONL")
    found = {
        "prompts": _column(wanted.prompts, "prompt"),
        "texts": _column(wanted.texts, "text"),
        "tasks": tasks,
        "queries": [] if wanted.retrieval is None else read_queries(wanted.retrieval),
    }
    if not any(found.values()):
        raise DataError("nothing to probe with: give --prompts, --texts, --task (choice or retrieval) or --retrieval")
    return found


def _column(path: Path | None, name: str) -> list[str]:
    if path is None:
        return []
    values = []
    for row in rows_at(str(path)):
        value = row.value.get(name)
        if not isinstance(value, str) or not value:
            raise DataError(f"{row.where}: '{name}': found {value!r}, expected a text")
        values.append(value)
    if not values:
        raise DataError(f"{path}: holds no rows, expected lines with a '{name}'")
    return values


def _key(dense: recipe.Model, other: recipe.Model, wanted: Wanted, cfg: recipe.Probe, pair: Pair) -> dict[str, Any]:
    """What the figures of a batch depend on; files by their content, batches by the size that numbers them."""
    files = [str(path.absolute()) for path in (wanted.prompts, wanted.texts) if path is not None]
    given = [cfg.source for cfg in (dense, other) if kind_of(cfg.source) != "hub"]
    sources = [source if source.startswith("embedded:") else str(Path(source).absolute()) for source in given]
    return {
        "dense": dense.model_dump(mode="json"),
        "other": other.model_dump(mode="json"),
        "files": inputs.digests([*files, *sources]),
        "probe": cfg.model_dump(mode="json"),
        "length": wanted.length,
        "blocks": list(pair.pruned.numbers),
        **({"commits": hub.pinned()} if hub.pinned() else {}),
    }


def _probe(
    pair: Pair, tokenizer: Any, rows: dict[str, Any], wanted: Wanted, cfg: recipe.Probe, out: Path, key: dict[str, Any]
) -> tuple[list[Record], dict[str, dict[str, list[float]]]]:
    """(records, columns of positions by file name). Figures of prompts are the summary's where there are prompts."""
    records: list[Record] = []
    found: dict[str, list[Finding]] = {}
    if rows["texts"]:
        ids = [text_ids(tokenizer, text, special=True)[: wanted.length] for text in rows["texts"][: cfg.samples]]
        found["positions_texts"] = texts(pair, ids, cfg, store=Store(out / "batches" / "texts", key))
    if rows["prompts"]:
        store = Store(out / "batches" / "prompts", key)
        found["positions"] = findings(pair, tokenizer, rows["prompts"], cfg, store=store)
    if found:
        records += records_of(pair, found.get("positions", found.get("positions_texts", [])))
    records += task_drift(pair, tokenizer, rows["tasks"], batch_size=cfg.batch_size)
    if rows["queries"]:
        records += retrieval_drift(pair, tokenizer, rows["queries"], batch_size=cfg.batch_size)
    return records, {name: positions_of(each) for name, each in found.items()}


def _write_columns(path: Path, columns: dict[str, list[float]], *, parquet: bool) -> None:
    if parquet:
        from datasets import Dataset

        Dataset.from_dict(columns).to_parquet(str(path.with_suffix(".parquet")))
        return
    lines = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    artifacts.write_jsonl(path.with_suffix(".jsonl"), lines)


def say(found: dict[str, Any]) -> None:
    """The summary as tables: drift by temperature, where texts part, choices, retrieval."""
    columns = ["T", "KL mean", "KL p99", "reverse KL", "1-cos h", "1-cos z", "1-cos p", "Var/2T²KL p50", "top-1"]
    console.table("teacher-forced drift, last layer", columns, map(_final_row, found["temperatures"]))
    divergence = found["divergence"]
    if divergence:
        first = divergence["first"]["p50"]
        others = "" if first is None else f", the others part at token {_shown(first)} (median)"
        console.say(
            f"greedy texts of {divergence['prompts']} prompts: {divergence['never']:.0%} equal to the end{others}"
        )
    for row in found["choices"]:
        console.say(
            f"choice {row['task']}: KL in the options {_shown(row['drift'].get('kl', {}).get('mean'))}, in the "
            f"vocabulary {_shown(row['vocabulary'].get('kl', {}).get('mean'))}; mass on the options "
            f"{_shown(row['mass']['dense']['mean'])} (dense); same choice by likelihood "
            f"{row['likelihood']['same_choice']:.1%}"
        )
    for row in found["retrieval"]:
        of_task = f" {row['task']}" if row["task"] else ""
        console.say(
            f"retrieval{of_task}, {row['pooling']}: rank correlation {_shown(row['rank_correlation']['mean'])}, "
            f"nDCG@10 against dense {_shown(row['ndcg']['mean'])}"
        )


def _final_row(row: dict[str, Any]) -> list[Any]:
    pairs = [("kl", "mean"), ("kl", "p99"), ("reverse_kl", "mean"), ("embedding", "mean"), ("logit", "mean")]
    pairs += [("probability", "mean"), ("kl_ratio", "p50"), ("top1", "mean")]
    return [row["temperature"], *((row.get(name) or {}).get(quantile) for name, quantile in pairs)]


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
