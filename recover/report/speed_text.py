"""Size and speed in words: what is deployed against dense, and when a ratio of speeds says nothing."""

from __future__ import annotations

from recover.report import words
from recover.report.data import Speed

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


def rows(speed: Speed | None) -> list[tuple[str, str, str, str]]:
    """(name, dense, deployed, ratio) in words, for each figure that either side has."""
    found = [(name, *(_figure(speed, side, key, form) for side in SIDES), key) for key, name, form in SIZES]
    return [
        (name, dense, deployed, ratio(speed, key))
        for name, dense, deployed, key in found
        if (dense, deployed) != (words.NOT_MEASURED, words.NOT_MEASURED)
    ]


def _figure(speed: Speed | None, side: str, key: str, form: str) -> str:
    """The figure with its p10 and p90 in brackets, if it has them."""
    record = (speed or {}).get(side) or {}
    shown = words.shown(record.get(key), form)
    bounds = (record.get("interval") or {}).get(key)
    return f"{shown} [{words.shown(bounds[0], form)}, {words.shown(bounds[1], form)}]" if bounds else shown


def value(speed: Speed | None, key: str) -> float | None:
    """Deployed / dense: of sizes as it is, of speeds only what was measured by turns."""
    if key in RATES:
        return words.finite(((speed or {}).get("ratio") or {}).get(key, {}).get("value"))
    dense, deployed = (words.finite(((speed or {}).get(side) or {}).get(key)) for side in SIDES)
    return deployed / dense if dense and deployed is not None else None


def ratio(speed: Speed | None, key: str) -> str:
    """The ratio in words: a speed with its interval, and what it means where it is no gain."""
    found = value(speed, key)
    if speed is None or found is None:
        return "–"
    if key not in RATES:
        return f"×{found:.2f}"
    low, high = speed["ratio"][key]["interval"]
    shown = f"×{found:.2f} [{low:.2f}, {high:.2f}]"
    if speed.get("same_shapes"):
        return f"{shown}, {STOCK}"
    return f"{shown}, {NO_DIFFERENCE}" if low <= 1.0 <= high else shown


def gain(speed: Speed | None, key: str) -> str:
    """The ratio of a speed in as few words as a narrow column holds: a number only where it is a gain or a loss."""
    found = value(speed, key)
    if speed is None or found is None:
        return words.NOT_MEASURED
    if speed.get("same_shapes"):
        return STOCK
    low, high = speed["ratio"][key]["interval"]
    return NO_DIFFERENCE if low <= 1.0 <= high else f"×{found:.2f} [{low:.2f}, {high:.2f}]"


def change(speed: Speed | None, key: str) -> str:
    """Dense → deployed; one figure where both are the same."""
    form = next(form for name, _, form in SIZES if name == key)
    before, after = (words.shown(((speed or {}).get(side) or {}).get(key), form) for side in SIDES)
    return before if before == after else f"{before} → {after}"


def notes(speed: Speed | None) -> list[str]:
    """How the speeds were measured, and what must not be read out of them."""
    if not speed or not speed.get("ratio"):
        return []
    work = speed["workload"]
    found = [
        f"{speed['repeats']} repeats, dense and deployed by turns: medians with p10 and p90, ratios taken within each "
        f"repeat. {work['batch_size']} sequences at once, prompts of {work['prompt_length']} tokens, "
        f"{work['steps']} tokens decoded."
    ]
    if speed.get("same_shapes"):
        found.append(
            "Masked weights are stored as zeros, and stock kernels multiply by them: a ratio other than 1 here is the "
            "machine's doing, not the mask's."
        )
    dtypes = [speed[side].get("dtype") for side in SIDES]
    if dtypes[0] != dtypes[1]:
        found.append(f"Dense is {dtypes[0]}, deployed {dtypes[1]}: the ratios hold the change of type as well.")
    return found
