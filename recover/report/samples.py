"""The same prompts answered by all three models side by side, and where each text leaves the dense model's."""

from __future__ import annotations

from typing import Any

from recover.report import words

TEXT_LIMIT = 1200  # characters of one text shown; the run directory holds the whole

Records = dict[str, dict[str, Any] | None]


def side_by_side(records: Records) -> list[dict[str, Any]]:
    """One entry a task and prompt: {task, kind, expected, prompt, dense, pruned, recovered: text or None}."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for model, record in records.items():
        for name, task in ((record or {}).get("tasks") or {}).items():
            for sample in task.get("samples") or ():
                prompt = words.clean(sample.get("prompt", ""))
                entry = found.setdefault((name, prompt), {"task": name, "kind": task["kind"], "prompt": prompt})
                entry["expected"] = words.clean(sample["expected"]) if sample.get("expected") is not None else None
                entry[model] = _text(sample)
    return [_with_differences(entry) for entry in found.values()]


def _text(sample: dict[str, Any]) -> dict[str, Any]:
    shown = shown_text(words.clean(sample.get("text") or ""))
    answer = sample.get("answer")
    return {"text": shown, "answer": None if answer is None else words.clean(answer), "correct": sample.get("correct")}


def shown_text(text: str) -> str:
    """The beginning of a long text."""
    return text[:TEXT_LIMIT].rstrip() + " …" if len(text) > TEXT_LIMIT else text


def _with_differences(entry: dict[str, Any]) -> dict[str, Any]:
    """Adds to each text of pruned and recovered the word at which it leaves dense, with the text before and after."""
    dense = entry.setdefault("dense", None)
    for model in ("pruned", "recovered"):
        text = entry.setdefault(model, None)
        if text is None or dense is None:
            continue
        index = words.first_difference(dense["text"], text["text"])
        before, word, after = words.split_at_word(text["text"], index)
        text |= {"differs_at_word": index, "before": before, "word": word, "after": after}
    return entry


def divergence(records: Records) -> list[dict[str, Any]]:
    """One row a generative task: the token at which greedy text first differs from dense (quantiles), and agreement."""
    names = [
        name for name, task in ((records.get("dense") or {}).get("tasks") or {}).items() if task["kind"] == "generate"
    ]
    rows = []
    for name in names:
        row: dict[str, Any] = {"task": name}
        for model in ("pruned", "recovered"):
            task = ((records.get(model) or {}).get("tasks") or {}).get(name) or {}
            row[model] = (
                {"first": task.get("first_divergence"), "agreement": words.finite(task.get("agreement"))}
                if task
                else None
            )
        rows.append(row)
    return rows
