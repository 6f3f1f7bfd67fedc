"""`recover families`: what can be pruned, and how. `cli.py` gives it its place and its errors."""

from __future__ import annotations

from collections.abc import Iterator

from recover.base import console
from recover.export.gguf.family import FAMILIES
from recover.models.arch import ARCHS, Arch
from recover.models.refusal import KINDS

EXAMPLES = ("recover families",)
NOT_ONE = "prune.repair: the norm behind each sublayer lets nothing be folded in"

MIXED = "prune.repair and width: mlp: what mixtures of experts write goes through no one matrix: prune.kind experts"


def families() -> None:
    """Say which model families are supported, by which methods, and for the others why they are not."""
    columns = ["model_type", "depth, masks", "repair", "width: mlp", "kv_groups", "experts", "gguf"]
    console.table("supported, by config.json's model_type", columns, map(_row, ARCHS.values()))
    for line in _reasons():
        console.say(line)
    console.say("")
    console.say("not supported:")
    for kind in KINDS:
        console.say(f"- {kind.called} ({kind.such_as}): {kind.why}")


def _row(arch: Arch) -> list[str]:
    dense = arch.experts is None
    can = (True, dense and not arch.norm_behind, dense, not arch.kv_groups_stay, not dense, arch.model_type in FAMILIES)
    return [arch.model_type, *("yes" if yes else "no" for yes in can)]


def _reasons() -> Iterator[str]:
    """Why a method is not there, once for all families that share the reason."""
    behind = [arch.model_type for arch in ARCHS.values() if arch.norm_behind]
    yield f"{NOT_ONE} ({', '.join(behind)})"
    yield f"{MIXED} ({', '.join(arch.model_type for arch in ARCHS.values() if arch.experts)})"
    for reason in dict.fromkeys(arch.kv_groups_stay for arch in ARCHS.values() if arch.kv_groups_stay):
        those = [arch.model_type for arch in ARCHS.values() if arch.kv_groups_stay == reason]
        yield f"prune.kv_groups: {reason} ({', '.join(those)})"


COMMANDS = {families: EXAMPLES}
