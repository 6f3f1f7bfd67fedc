"""What was pruned, in words: the plan as a headline, a card line and a list of sublayers."""

from __future__ import annotations

from recover.report import words
from recover.report.data import Plan

GONE = {"dropped": "blocks", "dropped_attention": "attention of", "dropped_mlp": "MLP of"}  # field of a plan -> words


def subject(plan: Plan | None) -> str:
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
        return f"Removing {experts(plan)} of every mixture"
    if plan.get("config"):
        return f"Narrowing every block ({sizes(plan)})"
    if plan["sparsity"]:
        pattern = [pattern for pattern in plan["patterns"] if pattern != "unstructured"]
        by = ", ".join([plan["kind"], *pattern])
        return f"Setting {words.percent(plan['sparsity'])} of the block weights to zero ({by})"
    return "Pruning nothing" if plan["kind"] == "none" else f"Pruning ({plan['kind']})"


def short(plan: Plan | None) -> str:
    """In as few words as a narrow column holds: "2 of 12 blocks", "wanda 50%"."""
    if not plan:
        return words.NOT_MEASURED
    counts = [
        (len(plan.get(field) or ()), what)
        for field, what in (("dropped", "blocks"), ("dropped_attention", "attentions"), ("dropped_mlp", "MLPs"))
    ]
    parts = [f"{number} {what}" for number, what in counts if number]
    if parts:
        return f"{' and '.join(parts)} of {plan['blocks']}"
    if plan.get("experts"):
        return experts(plan)
    if plan.get("sparsity"):
        pattern = [pattern for pattern in plan["patterns"] if pattern != "unstructured"]
        return " ".join([plan["kind"], *(pattern or [words.percent(plan["sparsity"])])])
    return str(plan["kind"])


def experts(plan: Plan) -> str:
    """How many experts go: "32 of 128 experts"."""
    left = len(next(iter((plan.get("experts") or {}).values()), []))
    every = len(plan["scores"][0].get("experts") or [])
    return f"{every - left} of {every} experts"


def sites(plan: Plan) -> str:
    """Which sublayers go: "blocks 3, 4; MLP of 7"; empty if the plan drops none."""
    return "; ".join(f"{what} {', '.join(map(str, plan[field]))}" for field, what in GONE.items() if plan.get(field))


def sizes(plan: Plan) -> str:
    """The config fields that a width plan changes, with their new values."""
    return ", ".join(f"{name} {value:,}" for name, value in (plan.get("config") or {}).items())


def repair(plan: Plan) -> str:
    """What a closed-form repair brought, or that it was left out; empty if none was asked for."""
    found = plan.get("repair")
    if not found:
        return ""
    before, after = (words.number(kl) for kl in (found["kl_before"], found["kl_after"]))
    brought = f"KL {before} → {after} on held-out text, before training"
    return f"{found['kind']}, {brought}" if found["kept"] else f"{found['kind']} was tried and left out"


def gone(plan: Plan | None, part: str) -> set[int]:
    """Blocks whose `part` (attention or mlp) goes, with the block or alone."""
    return {*(plan.get("dropped") or ()), *(plan.get(f"dropped_{part}") or ())} if plan else set()
