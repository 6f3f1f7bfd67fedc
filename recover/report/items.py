"""Items that another model has right where dense is wrong, and the other way: how many, and each of them to look at."""

from __future__ import annotations

from pathlib import Path

from recover.base import artifacts
from recover.maths import score
from recover.report import words
from recover.report.data import CHANGED, ChangedItem, Exchanged, Model, PageData, Records, Task, Text
from recover.report.tables import Table

MOST = 60  # items of a task that are shown, of those lost and of those won
FOLDERS: dict[Model, str] = {"dense": "dense", "pruned": "before", "recovered": "after"}

Rows = dict[str, list[dict[str, object]]]  # generations.json: task -> {"text", "prompt", "expected"} of each item


def exchanged(root: Path, records: Records) -> list[Exchanged]:
    """A row for each task with items that are right or wrong, and each model beside dense.

    The items themselves are with the last model that there is, of tasks that write.
    """
    last = next((model for model in reversed(CHANGED) if records.get(model)), None)
    texts = {model: _generations(root / folder) for model, folder in FOLDERS.items() if model in ("dense", last)}
    found: list[Exchanged] = []
    for name, dense in ((records.get("dense") or {}).get("tasks") or {}).items():
        for model in CHANGED:
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
            }
        )
    return found


def table(data: PageData) -> Table | None:
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
