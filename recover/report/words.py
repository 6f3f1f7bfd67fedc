"""How reports word numbers, model text, plans and speeds: one place, so that page, markdown and pictures say the same.

Nothing here invents a value: None, NaN and infinity all become "not measured". A plan is worded as a headline, a card
line and a list of sublayers; size and speed as what is deployed against dense, and when a ratio of speeds says nothing.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from recover.base import console
from recover.report.data import Plan
from recover.report.run_files import Speed

NOT_MEASURED = "not measured"
TEXT_LIMIT = 1200  # characters of one text shown; the run directory holds the whole

# Control characters, and the marks that reorder text: a right-to-left override from a model would turn the page around.
_INVISIBLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


def finite(value: Any) -> float | None:
    """The value as a float, or None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def jsonable(value: Any) -> Any:
    """The same value with NaN and infinity as None, and all text in it `clean`."""
    if isinstance(value, dict):
        return {clean(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return clean(value)
    return value


def percent(value: Any, digits: int | None = None) -> str:
    """A share as a percentage: whole numbers from 10% to 99%, one digit near the ends, or `digits` digits."""
    share = finite(value)
    if share is None:
        return NOT_MEASURED
    if digits is None:
        digits = 1 if (0 < abs(share) < 0.0995 or 0.99 < share < 0.9995) else 0
    return f"{100 * share + math.copysign(1e-9, share):.{digits}f}%"  # 66.5 is 67, as readers round


def number(value: Any) -> str:
    """Three significant digits, with thousands separated and small numbers as powers of ten."""
    x = finite(value)
    if x is None:
        return NOT_MEASURED
    if x == 0 or 0.001 <= abs(x) < 1000:
        return f"{x:.3g}"
    if abs(x) >= 1e7 or abs(x) < 0.001:
        mantissa, exponent = f"{x:.1e}".split("e")
        return f"{mantissa}×10{_superscript(int(exponent))}"
    return f"{x:,.0f}"


def _superscript(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def points(share: float) -> str:
    """A difference of shares in points, with a true minus."""
    return f"{100 * share:.1f}".replace("-", "−")


def count(value: Any) -> str:
    """A count in short form: 950, 200k, 1.6M, 7B."""
    x = finite(value)
    if x is None:
        return NOT_MEASURED
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(x) >= size * 0.9995:
            return f"{x / size:.3g}{unit}"
    return f"{x:.0f}"


def size(value: Any) -> str:
    """Bytes as the plan and the console say them."""
    x = finite(value)
    return NOT_MEASURED if x is None else console.size(x)


def duration(value: Any) -> str:
    """Seconds as the plan and the console say them."""
    x = finite(value)
    return NOT_MEASURED if x is None else console.duration(x)


def machine(record: Any) -> str:
    """A machine in a few words: its GPUs if it has some, else processor and cores."""
    if not isinstance(record, dict):
        return NOT_MEASURED if record is None else str(record)
    names = [str(gpu.get("name")) for gpu in record.get("gpus") or ()]
    if names:
        return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    return f"{record.get('processor') or 'CPU'}, {record.get('cores')} cores"


def perplexity(value: Any) -> str:
    """A perplexity as the console says it."""
    x = finite(value)
    return NOT_MEASURED if x is None else console.perplexity(x)


FORMATS = {
    **{"percent": percent, "number": number, "count": count, "bytes": size, "seconds": duration},
    "perplexity": perplexity,
}


def shown(value: Any, form: str) -> str:
    """The value worded by one of FORMATS."""
    return FORMATS[form](value)


def clean(text: Any) -> str:
    """Model text safe to lay out: invisible and reordering characters become a visible mark. Templates escape it."""
    return _INVISIBLE.sub("\N{REPLACEMENT CHARACTER}", str(text).encode("utf-8", "replace").decode("utf-8"))


def shown_source(source: str) -> str:
    """A hub id as it is; of a local path only the last part, since folders of one machine tell others nothing.

    Of an export of ours the run's name, too: `deploy` alone is what all of them are called.
    """
    path = Path(source)
    if path.name == "deploy" and path.parent.name:
        return f"{path.parent.name}/deploy"
    return path.name if path.is_absolute() else source


def beginning(text: str) -> str:
    """A long text up to TEXT_LIMIT characters."""
    return text[:TEXT_LIMIT].rstrip() + " …" if len(text) > TEXT_LIMIT else text


def first_difference(dense: str, other: str) -> int | None:
    """Index of the first word of `other` that dense does not have at that place; None if word for word equal.

    If `other` is a beginning of `dense`, that is its number of words: it stopped there.
    """
    a, b = dense.split(), other.split()
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))


def split_at_word(text: str, index: int | None) -> tuple[str, str, str]:
    """(text before the word, the word, text after), white space kept; the word is empty if the text ends before it."""
    if index is None:
        return text, "", ""
    for position, match in enumerate(re.finditer(r"\S+", text)):
        if position == index:
            return text[: match.start()], match.group(), text[match.end() :]
    return text, "", ""


GONE = {"dropped": "blocks", "dropped_attention": "attention of", "dropped_mlp": "MLP of"}  # field of a plan -> words


def plan_subject(plan: Plan | None) -> str:
    """What was done, as the subject of a sentence: "Dropping 3 of 30 blocks"."""
    if not plan:
        return "Pruning"
    parts = []
    for field, what in (("dropped", "blocks"), ("dropped_attention", "attentions"), ("dropped_mlp", "MLPs")):
        if blocks := plan.get(field):
            parts.append(f"{len(blocks)} of {plan['blocks']} {what}")
    if parts:
        return f"Dropping {' and '.join(parts)}"
    if plan.get("experts"):
        return f"Removing {plan_experts(plan)} of every mixture"
    if plan.get("config"):
        return f"Narrowing every block ({plan_sizes(plan)})"
    if plan["sparsity"]:
        pattern = [pattern for pattern in plan["patterns"] if pattern != "unstructured"]
        by = ", ".join([plan["kind"], *pattern])
        return f"Setting {percent(plan['sparsity'])} of the block weights to zero ({by})"
    return "Pruning nothing" if plan["kind"] == "none" else f"Pruning ({plan['kind']})"


def plan_short(plan: Plan | None) -> str:
    """In as few words as a narrow column holds: "2 of 12 blocks", "wanda 50%"."""
    if not plan:
        return NOT_MEASURED
    counts = [
        (len(plan.get(field) or ()), what)
        for field, what in (("dropped", "blocks"), ("dropped_attention", "attentions"), ("dropped_mlp", "MLPs"))
    ]
    parts = [f"{number} {what[:-1] if number == 1 else what}" for number, what in counts if number]
    if parts:
        return f"{' and '.join(parts)} of {plan['blocks']}"
    if plan.get("experts"):
        return plan_experts(plan)
    if plan.get("sparsity"):
        pattern = [pattern for pattern in plan["patterns"] if pattern != "unstructured"]
        return " ".join([plan["kind"], *(pattern or [percent(plan["sparsity"])])])
    return str(plan["kind"])


def plan_experts(plan: Plan) -> str:
    """How many experts go: "32 of 128 experts"."""
    left = len(next(iter((plan.get("experts") or {}).values()), []))
    every = len(plan["scores"][0].get("experts") or [])
    return f"{every - left} of {every} experts"


def plan_sites(plan: Plan) -> str:
    """Which sublayers go: "blocks 3, 4; MLP of 7"; empty if the plan drops none."""
    return "; ".join(f"{what} {', '.join(map(str, plan[field]))}" for field, what in GONE.items() if plan.get(field))


def plan_sizes(plan: Plan) -> str:
    """The config fields that a width plan changes, with their new values."""
    return ", ".join(f"{name} {value:,}" for name, value in (plan.get("config") or {}).items())


def plan_repair(plan: Plan) -> str:
    """What a closed-form repair brought, or that it was left out; empty if none was asked for."""
    found = plan.get("repair")
    if not found:
        return ""
    before, after = (number(kl) for kl in (found["kl_before"], found["kl_after"]))
    brought = f"KL {before} → {after} on held-out text, before training"
    return f"{found['kind']}, {brought}" if found["kept"] else f"{found['kind']} was tried and left out"


def plan_gone(plan: Plan | None, part: str) -> set[int]:
    """Blocks whose `part` (attention or mlp) goes, with the block or alone."""
    return {*(plan.get("dropped") or ()), *(plan.get(f"dropped_{part}") or ())} if plan else set()


SIDES = ("dense", "deployed")
SIZES = (
    ("parameters", "parameters", "count"),
    ("file_bytes", "file", "bytes"),
    ("kv_bytes_per_token", "KV cache per token", "bytes"),
    ("prefill_tokens_per_second", "prefill, tokens/s", "number"),
    ("decode_tokens_per_second", "decoding, tokens/s", "number"),
    ("peak_memory_bytes", "peak memory", "bytes"),
)
RATES = ("prefill_tokens_per_second", "decode_tokens_per_second")
NO_DIFFERENCE, STOCK = "no difference measured", "no faster in stock kernels"


def speed_rows(speed: Speed | None) -> list[tuple[str, str, str, str]]:
    """(name, dense, deployed, ratio) in words, for each figure that either side has."""
    found = [(name, *(_speed_figure(speed, side, key, form) for side in SIDES), key) for key, name, form in SIZES]
    return [
        (name, dense, deployed, speed_ratio(speed, key))
        for name, dense, deployed, key in found
        if (dense, deployed) != (NOT_MEASURED, NOT_MEASURED)
    ]


def _speed_figure(speed: Speed | None, side: str, key: str, form: str) -> str:
    """The figure with its p10 and p90 in brackets, if it has them."""
    record = (speed or {}).get(side) or {}
    value = shown(record.get(key), form)
    bounds = (record.get("interval") or {}).get(key)
    return f"{value} [{shown(bounds[0], form)}, {shown(bounds[1], form)}]" if bounds else value


def speed_value(speed: Speed | None, key: str) -> float | None:
    """Deployed / dense: of sizes as it is, of speeds only what was measured by turns."""
    if key in RATES:
        return finite(((speed or {}).get("ratio") or {}).get(key, {}).get("value"))
    dense, deployed = (finite(((speed or {}).get(side) or {}).get(key)) for side in SIDES)
    return deployed / dense if dense and deployed is not None else None


def speed_ratio(speed: Speed | None, key: str) -> str:
    """The ratio in words: a speed with its interval, and what it means where it is no gain."""
    found = speed_value(speed, key)
    if speed is None or found is None:
        return "–"
    if key not in RATES:
        return f"×{found:.2f}"
    low, high = speed["ratio"][key]["interval"]
    shown = f"×{found:.2f} [{low:.2f}, {high:.2f}]"
    if speed.get("same_shapes"):
        return f"{shown}, {STOCK}"
    return f"{shown}, {NO_DIFFERENCE}" if low <= 1.0 <= high else shown


def speed_gain(speed: Speed | None, key: str) -> str:
    """The ratio of a speed in as few words as a narrow column holds: a number only where it is a gain or a loss."""
    found = speed_value(speed, key)
    if speed is None or found is None:
        return NOT_MEASURED
    if speed.get("same_shapes"):
        return STOCK
    low, high = speed["ratio"][key]["interval"]
    return NO_DIFFERENCE if low <= 1.0 <= high else f"×{found:.2f} [{low:.2f}, {high:.2f}]"


def speed_change(speed: Speed | None, key: str) -> str:
    """Dense → exported; one figure where both are the same."""
    form = next(form for name, _, form in SIZES if name == key)
    before, after = (shown(((speed or {}).get(side) or {}).get(key), form) for side in SIDES)
    return before if before == after else f"{before} → {after}"


def speed_notes(speed: Speed | None) -> list[str]:
    """How the speeds were measured, and what must not be read out of them."""
    if not speed or not speed.get("ratio"):
        return []
    work = speed["workload"]
    found = [
        f"{speed['repeats']} repeats, dense and the export by turns: medians with p10 and p90, ratios taken within "
        f"each repeat. {work['batch_size']} sequences at once, prompts of {work['prompt_length']} tokens, "
        f"{work['steps']} tokens decoded."
    ]
    if speed.get("same_shapes"):
        found.append(
            "Masked weights are stored as zeros, and stock kernels multiply by them: a ratio other than 1 here is the "
            "machine's doing, not the mask's."
        )
    dtypes = [speed[side].get("dtype") for side in SIDES]
    if dtypes[0] != dtypes[1]:
        found.append(f"Dense is {dtypes[0]}, the export {dtypes[1]}: the ratios hold the change of type as well.")
    return found
