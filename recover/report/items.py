"""Single items and texts of the measurements, counted and to look at.

Items that another model has right where dense is wrong, and the other way; what is wrong with what the models write,
how many texts of which kind of mistake, and one of each; measured items that stand in the text of the run itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recover.base import artifacts
from recover.maths import score
from recover.report import words
from recover.report.data import CHANGED, ChangedItem, Example, Exchanged, Mistakes, PageData, RunData, Text
from recover.report.figures.drift import LEVELS
from recover.report.run_files import FOLDERS, MeasureRecord, Model, Overlap, OverlapRecord, Records, Task
from recover.report.tables import Table

MOST = 60  # items of a task that are shown, of those lost and of those won

Rows = dict[str, list[dict[str, object]]]  # generations.json: task -> {"text", "prompt", "expected"} of each item


def exchanged(root: Path, records: Records) -> list[Exchanged]:
    """A row for each task with items that are right or wrong, and each model beside dense.

    The items themselves are with the last model that there is, of tasks that write.
    """
    last = next((model for model in reversed(CHANGED) if records.get(model)), None)
    texts = {model: _generations(root / folder) for model, folder in FOLDERS.items() if model in ("dense", last)}
    found: list[Exchanged] = []
    for name, dense in ((records.get("dense") or {}).get("tasks") or {}).items():
        for model in records:
            if model == "dense":
                continue
            other = ((records.get(model) or {}).get("tasks") or {}).get(name)
            before, now = _right(dense), _right(other)
            if before is None or now is None or len(before) != len(now):
                continue
            test = score.mcnemar(before, now)
            shown = _shown(name, before, now, texts["dense"], texts[model]) if model == last else []
            found.append(
                {
                    "task": name,
                    "kind": dense["kind"],
                    "model": model,
                    "items": len(now),
                    "lost": test.lost,
                    "won": test.won,
                    "right": sum(a > 0.5 and b > 0.5 for a, b in zip(before, now, strict=True)),
                    "p": test.p,
                    "each": [int(value) for value in now],
                    "shown": shown,
                }
            )
    return found


def _right(task: Task | None) -> list[float] | None:
    """1 or 0 for each item; None where the record has no such figure."""
    each = (task or {}).get("each")
    if not isinstance(each, list) or not each or any(value not in (0, 1) for value in each):
        return None
    return each


def _generations(folder: Path) -> Rows:
    path = folder / "generations.json"
    return artifacts.read_json(path) if path.is_file() else {}


def _shown(task: str, before: list[float], now: list[float], dense: Rows, other: Rows) -> list[ChangedItem]:
    if min(len(rows.get(task) or ()) for rows in (dense, other)) < len(now):
        return []
    left = {"lost": MOST, "won": MOST}
    found: list[ChangedItem] = []
    for item, (was, is_now) in enumerate(zip(before, now, strict=True)):
        way = "lost" if was > is_now else "won"
        if was == is_now or not left[way]:
            continue
        left[way] -= 1
        a, b = (words.beginning(words.clean(rows[task][item].get("text") or "")) for rows in (dense, other))
        asked = dense[task][item]
        at = words.first_difference(a, b)
        same, word, after = words.split_at_word(b, at)
        other_text: Text = {
            "text": b,
            "answer": None,
            "correct": bool(is_now),
            "differs_at_word": at,
            "before": same,
            "word": word,
            "after": after,
        }
        found.append(
            {
                "way": way,
                "item": item,
                "prompt": words.beginning(words.clean(asked.get("prompt") or "")),
                "expected": None if asked.get("expected") is None else words.clean(asked["expected"]),
                "dense": a,
                "other": other_text,
                "tokens": runs_of_tokens(other[task][item].get("dense_kl")),
            }
        )
    return found


END = "\N{END OF PROOF}"  # where the text ends: a token without letters


def runs_of_tokens(kls: Any) -> list[tuple[str, int, str]]:
    """(letters, level, tip) of a text's tokens, those of level 0 joined; level n: KL of LEVELS[n - 1] or more.

    None, and a file of another form, give none. Long texts end where `words.beginning` ends them.
    """
    runs: list[tuple[str, int, str]] = []
    letters = 0
    tokens: list[tuple[str, float]] = list(kls or ())
    for number, (piece, kl) in enumerate(tokens):
        level = sum(kl >= least for least in LEVELS)
        text = words.clean(piece) or (END if number == len(tokens) - 1 and level else "")
        letters += len(text)
        if letters > words.TEXT_LIMIT:
            return [*runs, (" …", 0, "")]
        if level == 0 and runs and runs[-1][1] == 0:
            runs[-1] = (runs[-1][0] + text, 0, "")
        elif text:
            runs.append((text, level, f"KL {words.number(kl)}" if level else ""))
    return runs


def exchanged_table(data: PageData) -> Table | None:
    """What was exchanged, and whether more than chance exchanges."""
    if not data["exchanged"]:
        return None
    rows = [
        (
            f"{row['task']}, {row['model']}",
            *map(words.count, (row["items"], row["right"], row["lost"], row["won"])),
            words.count(row["items"] - row["right"] - row["lost"] - row["won"]),
            chance(row["p"]),
        )
        for row in data["exchanged"]
    ]
    caption = (
        "The same items, one by one. Lost: dense has it right, this model wrong; won: the other way. p: how often an "
        "exchange so uneven comes about if both models are equally good (McNemar's exact test); below 0.05 it is more "
        "than noise."
    )
    names = ("task and model", "items", "right in both", "lost", "won", "wrong in both", "p")
    return Table("Items lost and won", caption, tuple((name, "") for name in names), rows)


def chance(p: float) -> str:
    """A p in words short enough for a cell."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


# kind of mistake in a record -> (column, heading of its example)
NAMES = {
    "loop": ("loop", "ends in a loop"),
    "endless": ("no end", "does not end"),
    "no_answer": ("no answer", "holds no answer"),
    "unparsed": ("does not parse", "does not parse"),
    "content": ("well formed, wrong", "is well formed and wrong"),
}
FORM = ("loop", "endless", "no_answer", "unparsed")


def counted_mistakes(records: Records) -> list[Mistakes]:
    """One row a task that writes and model: {task, model, items, right, mistakes: {kind: n}, loop_rate, loop_start}."""
    rows = []
    for name, model, task in _writing(records):
        counts = {kind: n for kind in NAMES if isinstance(n := (task.get("mistakes") or {}).get(kind), int)}
        if not counts:
            continue
        rows.append(
            {
                "task": name,
                "model": model,
                "items": task["items"],
                "right": task["items"] - sum(counts.values()),
                "mistakes": counts,
                "loop_rate": words.finite(task.get("loop_rate")),
                "loop_start": task.get("loop_start"),
            }
        )
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    return sorted(rows, key=lambda row: tasks.index(row["task"]))  # models stay in order


def mistake_examples(records: Records) -> list[Example]:
    """One text of each kind of mistake of each model: {task, model, mistake, prompt, expected, text}."""
    found = []
    for name, model, task in _writing(records):
        for kind in NAMES:
            sample = (task.get("examples") or {}).get(kind)
            if sample is None:
                continue
            expected, answer = sample.get("expected"), sample.get("answer")
            found.append(
                {
                    "task": name,
                    "model": model,
                    "mistake": kind,
                    "prompt": words.clean(sample.get("prompt", "")),
                    "text": words.beginning(words.clean(sample.get("text") or "")),
                    "expected": None if expected is None else words.clean(expected),
                    "answer": None if answer is None else words.clean(answer),
                }
            )
    return found


def _writing(records: Records) -> list[tuple[str, Model, Task]]:
    """(name, model, record) of each task whose texts are told apart by their mistakes, whatever its kind."""
    return [
        (name, model, task)
        for model, record in records.items()
        for name, task in ((record or {}).get("tasks") or {}).items()
        if task.get("mistakes") is not None
    ]


def loop_rate(measured: MeasureRecord) -> float | None:
    """Mean over the tasks that write, each weighing the same; None where no record has it."""
    tasks = (measured.get("tasks") or {}).values()
    rates = [rate for task in tasks if (rate := words.finite(task.get("loop_rate"))) is not None]
    return sum(rates) / len(rates) if rates else None


def mistake_shares(measured: MeasureRecord) -> tuple[float, float] | None:
    """Of all texts of a record, the share that is a mistake of form, and the share well formed and wrong.

    The mean over tasks, each weighing the same; None where no record tells them apart.
    """
    tasks = (measured.get("tasks") or {}).values()
    counts = [(found, task["items"]) for task in tasks if (found := task.get("mistakes")) and task["items"]]
    if not counts:
        return None
    form = [sum(found.get(kind, 0) for kind in FORM) / items for found, items in counts]
    content = [found.get("content", 0) / items for found, items in counts]
    return sum(form) / len(counts), sum(content) / len(counts)


def loops_begin(measured: MeasureRecord) -> float | None:
    """The token before which half of the loops begin, the mean over tasks with loops; None without any."""
    starts = [(task.get("loop_start") or {}).get("p50") for task in (measured.get("tasks") or {}).values()]
    known = [start for start in starts if start is not None]
    return sum(known) / len(known) if known else None


def mistakes_table(data: PageData) -> Table | None:
    """Mistakes of form beside mistakes of content, each text counted once."""
    rows = data["mistakes"]
    if not rows:
        return None
    kinds = [kind for kind in NAMES if any(kind in row["mistakes"] for row in rows)]
    cells = [
        (
            row["task"],
            row["model"],
            words.count(row["items"]),
            words.count(row["right"]),
            *("–" if kind not in row["mistakes"] else words.count(row["mistakes"][kind]) for kind in kinds),
            words.percent(row["loop_rate"], 1),
            words.number((row["loop_start"] or {}).get("p50")) if row["loop_start"] else "–",
        )
        for row in rows
    ]
    caption = (
        "Each greedy text is counted once: as right, by its first mistake of form, or as well formed and wrong. If "
        "form came back and content did not, look at the text that training used. Loop rate: share of all texts that "
        "end in a run of tokens repeated at least three times over at least 24 tokens. Half of these loops begin "
        "before the token in the last column."
    )
    columns = ("task", "model", "items", "right", *(NAMES[kind][0] for kind in kinds), "loop rate", "loops begin at")
    return Table("Mistakes of form and of content", caption, tuple((each, "") for each in columns), cells, numbers=2)


USED_FOR = {"prune": "what pruning is chosen by", "train": "what recovery learns from"}
EXAMPLE = 120  # characters of a text in the table


def overlap_sentence(found: Overlap) -> str:
    """How many items of a task stand in which text, and what that means; for the terminal, the limits and the card."""
    counts = [(found["same"], "word for word"), (found["near"], "nearly so")]
    (first, how), *others = [(count, how) for count, how in counts if count]
    more = "".join(f", {count:,} more {how}" for count, how in others)
    return (
        f"task {found['task']}: {first:,} of {found['items']:,} measured items stand in {found['field']} "
        f"({found['source']}) {how}{more}; that text is {USED_FOR[found['field'].split('.')[0]]}, so the task says "
        "little of items that are new to the model"
    )


def overlap_lines(record: OverlapRecord) -> list[str]:
    """What `plan/overlap.json` says, for the terminal."""
    if record["found"]:
        return [overlap_sentence(found) for found in record["found"]]
    texts = sum(record["looked_at"].values())
    return [f"measured items were looked for in {texts:,} texts that the run is made with: none stands there"]


def overlap_table(data: RunData) -> Table | None:
    """Items of tasks that stand in the text of the run, with an example of each task and text."""
    rows = [
        (
            found["task"],
            f"{found['field']}, {found['source']}",
            *_example(found),
            words.count(found["items"]),
            words.count(found["same"]),
            words.count(found["near"]),
        )
        for found in data["overlap"] or ()
    ]
    if not rows:
        return None
    names = ("task", "stands in", "an item", "what stands there", "items", "word for word", "nearly so")
    caption = (
        "Measured items that stand in the text that this run was made with, found by their words alone: word for word, "
        "or with 60% of their runs of five words in common, numbers set aside. What is measured on them may be "
        "remembered and not known. The same question in other words is not found."
    )
    title = "Measured items in the text of this run"
    return Table(title, caption, tuple((name, "") for name in names), rows, numbers=4)


def _example(found: Overlap) -> tuple[str, str]:
    first = (found["examples"] or [{"item": "–", "text": "–"}])[0]
    return _short(first["item"]), _short(first["text"])


def _short(text: str) -> str:
    text = " ".join(words.clean(text).split())
    return text[:EXAMPLE].rstrip() + " …" if len(text) > EXAMPLE else text
