"""The tables of a report, in words: each has a caption that says what to see, and none is there without figures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from recover.config.tasks import USES
from recover.report import made, words
from recover.report.data import MODELS, PageData, Parted, RetrievalDrift
from recover.report.drift import by_model, mean_of, spread

DRIFT_NAMES = {
    "embedding": "embedding, 1 − cos",
    "logit": "logit, 1 − cos",
    "probability": "probability, 1 − cos",
    "kl": "KL(dense ‖ model), nats",
    "reverse_kl": "KL(model ‖ dense), nats",
    "kl_predicted": "KL as predicted by Var/(2T²)",
}
SHOWN_SECONDS = 0.1  # shorter parts of a stage are not named
SHARES = (("top1", "same most likely token"), ("top5", "common tokens among the first five"))


@dataclass(frozen=True)
class Table:
    """`columns` are (name, model whose colour it has or ""); the first cell of a row names it.

    Cells from `numbers` on are figures, set to the right. `note` stands below the table.
    """

    title: str
    caption: str
    columns: tuple[tuple[str, str], ...]
    rows: list[tuple[Any, ...]]
    numbers: int = 1
    note: str = ""


def last_layer(data: PageData) -> Table | None:
    """Drift at the last layer, T = 1: mean, median and worst hundredth, of the models that were probed."""
    finals = {model: found for model, summary in data["drift"].items() if (found := (summary or {}).get("final"))}
    rows: list[tuple[Any, ...]] = []
    for key, name in DRIFT_NAMES.items():
        if any(key in final for final in finals.values()):
            quantiles = [(final.get(key) or {}).get(q) for final in finals.values() for q in ("mean", "p50", "p99")]
            rows.append((name, *map(words.number, quantiles)))
    for key, name in SHARES:
        if any(key in final for final in finals.values()):
            means = [words.percent((final.get(key) or {}).get("mean"), 1) for final in finals.values()]
            rows.append((name, *(cell for mean in means for cell in (mean, "–", "–"))))
    if not rows:
        return None
    caption = (
        "At the last layer, T = 1, on the dense model's text: mean, median and 99th percentile over tokens. A median "
        "far below the mean: few tokens carry the damage."
    )
    columns = [(name, model) for model in finals for name in (f"{model}, mean", "p50", "p99")]
    return Table("Drift at the last layer", caption, (("figure", ""), *columns), rows, note=floor(data))


def floor(data: PageData) -> str:
    """How large a drift rounding alone makes, from the probe's comparison of each view with itself."""
    floors = [words.finite(((summary or {}).get("identity") or {}).get("kl_max")) for summary in data["drift"].values()]
    known = [floor for floor in floors if floor is not None]
    if not known:
        return "What rounding alone makes was not measured."
    floor = words.number(max(known))
    what = "Each model against itself, with and without a KV cache"
    return f"{what}: KL is at most {floor}. Drift of that size is rounding."


def divergence(data: PageData) -> Table | None:
    """Per generative task: how many texts never leave dense's, and the token by which half and nine tenths have."""
    rows = []
    models = [model for model in MODELS if any(model in row for row in data["divergence"])]
    for row in data["divergence"]:
        cells: list[str] = []
        for model in models:
            parted = row.get(model)
            if parted is None:
                cells += [words.NOT_MEASURED] * 4
                continue
            cells += [words.percent(parted["never"], 1), *(_by(parted, share) for share in ("p50", "p90"))]
            cells.append(words.percent(parted["agreement"], 1))
        rows.append((row["task"], *cells))
    if not rows:
        return None
    caption = (
        "On the tasks: the share of greedy texts that are dense's to the end, and the token by which 50% and 90% of "
        "all texts have left it; “never” where fewer do."
    )
    names = ("never", "50% by", "90% by", "tokens equal")
    columns = [(f"{model}, {name}" if name == "never" else name, model) for model in models for name in names]
    return Table("Where texts leave dense", caption, (("task", ""), *columns), rows)


def served(data: PageData) -> Table | None:
    """The files of stage deploy: type, bytes, and how well each does."""
    found = data["served"]
    if found is None:
        return None
    uses = [use for use in USES if any((data["headline"][model] or {}).get(use) for model in found["files"])]
    rows: list[tuple[Any, ...]] = [
        (
            model,
            file["path"],
            file["quantize"],
            words.size(file["bytes"]),
            *(words.percent(((data["headline"][model] or {}).get(use) or {}).get("value"), 1) for use in uses),
        )
        for model, file in found["files"].items()
    ]
    caption = (
        "Measured by recover from the weights of the file, dequantized, with the file's own tokenizer. The kernels of "
        "llama.cpp round a little differently."
    )
    if texts := dict.fromkeys(file["importance"]["data"] for file in found["files"].values() if "importance" in file):
        caption += f" Rounded by the importance of channels on {' and '.join(texts)}."
    names = ("model", "file", "type", "bytes", *uses)
    return Table("The files that are served", caption, tuple((name, "") for name in names), rows, numbers=3)


def _by(parted: Parted, share: Literal["p50", "p90"]) -> str:
    """The token, or that so many never part."""
    if parted[share] is not None:
        return words.number(parted[share])
    needed = {"p50": 0.5, "p90": 0.9}[share]
    return words.NOT_MEASURED if parted["never"] is None or 1 - parted["never"] >= needed else "never"


CHOICE_COLUMNS = (
    *("task", "model", "items", "same choice", "order changed", "right, dense", "right, model"),
    *("margin, dense", "margin, model", "mass, dense", "mass, model"),
)


def choices(data: PageData) -> Table | None:
    """Choice by full likelihood, and how much probability the option tokens have at all."""
    rows = []
    for model, listed in by_model(data, lambda probe: probe["choices"]).items():
        for row in listed:
            scored = row.get("likelihood") or {}
            shares = [scored.get("same_choice"), scored.get("rank_changed")]
            shares += [(scored.get("accuracy") or {}).get(view) for view in ("dense", "pruned")]
            margins = [_mean((scored.get("margin") or {}).get(view)) for view in ("dense", "pruned")]
            mass = [_mean((row.get("mass") or {}).get(view)) for view in ("dense", "pruned")]
            cells = (*(words.percent(x, 1) for x in shares), *map(words.number, margins + mass))
            rows.append((row["task"], model, words.count(row.get("items")), *cells))
    if not rows:
        return None
    caption = (
        "By the full likelihood of each option. Margin: how far the right option leads the best wrong one, in nats; a "
        "small margin is the next to be lost. Mass: total probability of the option tokens; where it is small, the "
        "disc above is weak evidence."
    )
    return Table("Choice, by likelihood", caption, tuple((name, "") for name in CHOICE_COLUMNS), rows, numbers=2)


def retrieval(data: PageData) -> Table | None:
    """Does the other model rank documents as the dense one, by pooled hidden states?"""
    found = by_model(data, lambda probe: probe["retrieval"])
    rows = [_retrieval_row(model, row) for model, listed in found.items() for row in listed]
    if not rows:
        return None
    of_tasks = any(row.get("task") for listed in found.values() for row in listed)
    known = any(row.get("relevance") for listed in found.values() for row in listed)
    names = [
        "task, pooling" if of_tasks else "pooling",
        "model",
        "queries",
        "embedding, 1 − cos",
        "rank correlation",
        "nDCG@10, dense's order",
        "same first",
    ]
    if known:
        names += ["nDCG@10, dense", "nDCG@10, model"]
    caption = (
        "Pooled hidden states are the embeddings; means over queries. Rank correlation (Spearman) and nDCG take the "
        "dense model's ranking as the right one: 1 is the same order. A small embedding drift can still change a "
        "ranking."
    )
    width = len(names)
    return Table(
        "Ranking, by embeddings",
        caption,
        tuple((name, "") for name in names),
        [row[:width] for row in rows],
        numbers=2,
    )


def _retrieval_row(model: str, row: RetrievalDrift) -> tuple[Any, ...]:
    figures = [_mean(row.get(name)) for name in ("embedding", "rank_correlation", "ndcg")]
    relevance = row.get("relevance") or {}
    judged = [words.number(_mean(relevance.get(view))) for view in ("dense", "pruned")]
    cells = (*map(words.number, figures), words.percent(row.get("top1"), 1))
    name = ", ".join(filter(None, (row.get("task"), row["pooling"])))
    return (name, model, words.count(row.get("queries")), *cells, *judged)


def experts(data: PageData) -> Table | None:
    """How evenly the tokens of the prompts are given to experts, block by block, in each model."""
    found = by_model(data, lambda summary: summary["routing"])
    if not found:
        return None
    first = next(iter(found.values()))
    kept = (data["plan"] or {}).get("experts") or {}
    rows: list[tuple[Any, ...]] = []
    for index, row in enumerate(first):
        left = kept.get(str(row["block"]), range(len(row["dense"])))
        others = [
            [each[index]["pruned"][expert] for expert in left if each[index]["pruned"]] for each in found.values()
        ]
        rows.append((f"block {row['block']}", *(cell for each in (row["dense"], *others) for cell in _load(each))))
    caption = (
        "Tokens of the prompts, by expert. Busiest: its share of all. As if: the number of experts that, with equal "
        "shares, would be as even (the exponential of the entropy). Idle: experts that are there and got none."
    )
    names = [(name, model) for model in ("dense", *found) for name in (f"{model}, busiest", "as if", "idle")]
    return Table("Who does the work", caption, (("", ""), *names), rows)


def removed(data: PageData) -> Table | None:
    """Which experts went, block by block."""
    plan = data["plan"]
    if not plan or not plan.get("experts"):
        return None
    rows: list[tuple[Any, ...]] = []
    for record in plan["scores"]:
        scores, kept = record.get("experts") or [], set(record.get("kept") or ())
        gone = [expert for expert in range(len(scores)) if expert not in kept]
        share = sum(scores[expert] for expert in gone) / (sum(scores) or 1.0)
        rows.append((f"block {record.get('block')}", ", ".join(map(str, gone)), words.percent(share, 1)))
    by = {
        "frequency": "of the fewest tokens",
        "kl": "whose closing costs the least KL, of those of the lowest REAP score",
    }
    least = by.get(str(plan["scores"][0].get("by")), "of the lowest REAP score (router weight x norm of the output)")
    caption = (
        f"From each mixture went {words.plan_experts(plan)}: those {least}. Their share of the block's sum of scores."
    )
    return Table("Which experts were removed", caption, (("", ""), ("experts", ""), ("share", "")), rows, numbers=2)


def _load(tokens: list[int]) -> tuple[str, str, str]:
    total = sum(tokens)
    if not total:
        return words.NOT_MEASURED, words.NOT_MEASURED, words.NOT_MEASURED
    shares = [count / total for count in tokens]
    even = math.exp(-sum(share * math.log(share) for share in shares if share))
    return words.percent(max(shares), 1), f"{even:.1f} of {len(tokens)}", str(sum(not count for count in tokens))


def repair(data: PageData) -> Table | None:
    """What the closed-form repair of each cut did, in the order in which they were tried."""
    found = (data["plan"] or {}).get("repair") or {}
    cuts = found.get("cuts") or []
    if not cuts:
        return None
    rows = [
        (
            _site(cut["site"], " of block "),
            ", ".join(_site(site, " ") for site in cut["dropped"]),
            *(words.number(cut.get(name)) for name in ("error_before", "error_after", "kl_before", "kl_after")),
            "kept" if cut["kept"] else "left out",
        )
        for cut in cuts
    ]
    caption = (
        f"Repair ({found['kind']}), fitted to {words.count(found.get('tokens_fitted'))} tokens and judged on "
        f"{words.count(found.get('tokens_held_out'))} others. Error of the hidden state after the cut and KL of the "
        "whole model, each before and after the repair. A repair that does not lower KL is left out."
    )
    names = ("rewritten", "for the lost", "error before", "after", "KL before", "after", "verdict")
    return Table("What the repair did", caption, tuple((name, "") for name in names), rows, numbers=2)


def _site(site: str, between: str) -> str:
    """`mlp:2` in words."""
    part, _, block = str(site).partition(":")
    return f"{'MLP' if part == 'mlp' else part}{between}{block}"


def skipped(data: PageData) -> Table | None:
    """Steps of the training that were not finite, as far as they are on record."""
    findings = (data["training"] or {}).get("findings") or []
    if not findings:
        return None
    rows = [
        (
            f"{finding['step']:,}",
            finding["found"],
            "–".join(f"{number:,}" for number in finding["sequences"]),
            ", ".join(finding["tensors"]) or "–",
        )
        for finding in findings
    ]
    caption = "Steps that changed nothing, the newest of them: what was not finite, and in which training sequences."
    names = ("step", "found", "sequences", "not finite")
    return Table("Steps left out", caption, tuple((name, "") for name in names), rows, numbers=len(names))


def stages(data: PageData) -> Table | None:
    """What each stage was made with."""
    rows = made.stage_rows(data)
    if not rows:
        return None
    caption = (
        "A stage is done again when what it is made from changes, and kept else. “As shown”: with the recipe below. "
        "Times are UTC; all versions are in report.json."
    )
    columns = ("stage", "done", "recover", "with", "recipe")
    return Table("What each stage was made with", caption, tuple((name, "") for name in columns), rows, len(columns))


def inputs(data: PageData) -> Table | None:
    """Files, data sets and models that the stages read."""
    rows = made.input_rows(data)
    if not rows:
        return None
    caption = (
        "Files by the first digits of their SHA-256, files of many megabytes by size and time of change, and what "
        "comes from a hub by its commit."
    )
    columns = (("read", ""), ("as", ""), ("by", ""))
    return Table("What was read", caption, columns, rows, len(columns))


def rates(data: PageData) -> Table | None:
    """The trials of `lr: auto`, and the rate that was taken."""
    found = data["rate_trials"]
    if found is None or found["chosen"] is None:
        return None
    if not found["trials"]:
        rows = [(f"{found['chosen']:.3g}, taken", "–", "–", "–")]
    else:
        rows = [
            (
                f"{trial['lr']:.3g}{', taken' if trial['lr'] == found['chosen'] else ''}",
                words.number(trial["kl"]) if trial["kl"] is not None else "not finite",
                words.perplexity(trial.get("perplexity")) if trial.get("perplexity") else "–",
                words.duration(trial.get("seconds")),
            )
            for trial in found["trials"]
        ]
    caption = f"Short trainings before the training, judged on rows that they did not learn. {found.get('why') or ''}."
    names = ("learning rate", "KL(dense ‖ model), nats", "perplexity", "time")
    note = f"Taken: {found.get('reason')}." if found["trials"] else ""
    return Table("Trials of learning rates", caption, tuple((name, "") for name in names), rows, note=note)


def times(data: PageData) -> Table | None:
    """Where the time and the memory of the job went, stage by stage."""
    stages = [row for row in data["times"] if row["stage"] != "report"]  # of an earlier report
    if not stages:
        return None
    rows: list[tuple[Any, ...]] = []
    for row in stages:
        parts = sorted(row["parts"].items(), key=lambda item: (item[0] == "other", -item[1]))
        shown = [f"{name} {_seconds(seconds)}" for name, seconds in parts if seconds >= SHOWN_SECONDS]
        calls = f" ({row['calls']} calls)" if row["calls"] > 1 else ""
        rows.append((f"{row['stage']}{calls}", _seconds(row["seconds"]), ", ".join(shown) or "–"))
    rows.append(("all", _seconds(sum(row["seconds"] for row in stages)), "–"))
    caption = "Wall-clock time of each stage when it was last done, and of its parts; the report itself is not in it."
    columns = [("stage", ""), ("time", ""), ("of it", "")]
    title = "Where the time went"
    for place, name in MEMORY.items():
        most = [row.get("memory", {}).get(place) for row in stages]
        known = [each for each in most if each is not None]
        if known:
            columns.append((name, ""))
            shown = [words.size(each) if each is not None else "–" for each in (*most, max(known))]
            rows = [(*row, cell) for row, cell in zip(rows, shown, strict=True)]
            title = "Where the time and the memory went"
    if len(columns) > 3:
        caption += " Memory: the most that the main process held at once in the stage, with what it read of files."
    return Table(title, caption, tuple(columns), rows, numbers=3)


MEMORY = {"process": "memory at most", "gpu": "GPU memory at most"}


def _seconds(value: float) -> str:
    """Seconds, however many: parts are compared with one another."""
    return f"{value:,.0f} s" if value >= 10 else f"{value:.1f} s"


def _mean(value: Any) -> float | None:
    return mean_of(spread(value))
