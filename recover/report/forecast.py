"""What recovery was expected to bring before it was paid for: go or no-go, in words; nothing without a forecast."""

from __future__ import annotations

from typing import Any

from recover.report import words

USES = ("generation", "choice", "retrieval")
ADVICE = {"go": "Go", "no-go": "No-go", "cannot tell": "Cannot tell"}


def forecast(data: dict[str, Any]) -> dict[str, Any] | None:
    """{"word", "reason", "basis", "rows"} for the template, from `data["forecast"]`; None where there is none.

    A row is (use, expected, interval, measured afterwards, reason), shares of dense, in words.
    """
    found = data.get("forecast")
    if not found:
        return None
    classes = found.get("classes") or {}
    rows = [
        (
            use.capitalize(),
            words.percent(classes[use].get("expected")),
            _interval(classes[use].get("interval")),
            words.percent(data["verdict"]["recovered"].get(use, {}).get("kept")),
            classes[use].get("reason") or "–",
        )
        for use in (*(use for use in USES if use in classes), *(use for use in classes if use not in USES))
    ]
    return {
        "word": ADVICE.get(str(found.get("advice")), str(found.get("advice"))),
        "reason": found.get("reason") or "",
        "basis": _basis(found),
        "rows": rows,
    }


def _interval(bounds: Any) -> str:
    if not bounds or len(bounds) != 2:
        return words.NOT_MEASURED
    return " to ".join(words.percent(bound) for bound in bounds)


def _basis(found: dict[str, Any]) -> str:
    """What the forecast rests on."""
    parts = []
    if words.finite(found.get("runs")):
        parts.append(f"{words.count(found['runs'])} earlier run{'' if found['runs'] == 1 else 's'}")
    if words.finite(found.get("trial_tokens")):
        parts.append(f"a trial of {words.count(found['trial_tokens'])} tokens")
    return f"It rests on {' and '.join(parts)}." if parts else ""
