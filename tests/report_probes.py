"""Records of every probe, with figures that a test can find again, for the runs and diagnoses of the report's tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recover.probe.records import Choice, Record, Retrieval, Sampled, Sublayer, summary

BLOCKS = 4


def spread(mean: float) -> dict[str, float | None]:
    return {"mean": mean, "p50": mean / 2, "p90": mean * 2, "p99": mean * 3, "max": mean * 4}


def kl_of(block: int, part: str, counterfactual: str) -> float:
    """Block 2 lost its attention; the MLP of block 1 is weaker than dense; all others are the dense ones."""
    closed = 0.1 * (block + 1) * (2 if part == "mlp" else 1)
    if counterfactual == "closed" or (block, part) == (2, "attention"):
        return closed
    return closed / 10 if (block, part) == (1, "mlp") else 0.0


def records() -> list[Record]:
    """One of each of the newer probes, two of those that come in several."""
    found: list[Record] = []
    for block in range(BLOCKS):
        for part in ("attention", "mlp"):
            for what in ("closed", "pruned"):
                kl = spread(kl_of(block, part, what))
                figures = dict.fromkeys(("embedding", "logit", "probability", "kl"), kl)
                across = {"parallel": spread(-0.01 * (block + 1)), "orthogonal": spread(0.1 * (block + 1))}
                found += [Sublayer(block, part, what, lens, **figures, **across) for lens in ("final_norm", "raw")]
    return [*found, *(drawn(seed) for seed in (0, 7)), choice(), retrieval()]


def drawn(seed: int) -> Sampled:
    steps = [{"step": k, "teacher_forced": {"kl": spread(0.3)}, "free_running": {"diverged": k / 8}} for k in range(8)]
    running = {name: spread(1.5 + seed) for name in ("kl", "total", "gap")}
    return Sampled(seed, 8, {"kl": spread(0.375)}, running, spread(6.0), 0.125, steps)


def choice() -> Choice:
    pair = {"dense": spread(5.25), "pruned": spread(2.125)}
    likelihood = {"margin": pair, "accuracy": {"dense": 0.9, "pruned": 0.7}, "same_choice": 0.775, "rank_changed": 0.4}
    mass = {"dense": spread(0.98), "pruned": spread(0.81)}
    inside, outside = {"kl": spread(0.0625)}, {"kl": spread(2.5)}
    return Choice("facts", 300, 280, inside, outside, mass, pair, likelihood["accuracy"], 0.8, 0.3, likelihood)


def retrieval() -> Retrieval:
    return Retrieval("mean", 16, 128, spread(0.12), spread(0.546), spread(0.898), 0.4375, None)


def probed(whole: dict[str, Any]) -> None:
    """Put the records into a summary as `probe.json` holds it."""
    found = summary(records())
    whole.update({name: found[name] for name in ("sublayers", "sampled", "choices", "retrieval")})


def write_diagnosis(folder: Path, whole: dict[str, Any]) -> Path:
    """What `recover diagnose` leaves in a folder, with the summary given."""
    folder.mkdir()
    found = {"dense": "embedded:fable-2m", "other": "/somewhere/else/quantized", **whole}
    probed(found)
    (folder / "probe.json").write_text(json.dumps(found))
    return folder
