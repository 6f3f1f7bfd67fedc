"""Write the tables of launch/README.md, which file for which model on which GPU, from recover/base/memory.py."""

from __future__ import annotations

import re
from pathlib import Path

from recover.base.memory import GIB, PUBLISHED, Training, launch_for, measuring_bytes, training_parts

PAGE = Path(__file__).parent.parent / "launch" / "README.md"

GPUS = (24, 48, 80, 141)
TOKENS = 2048
# (blocks with adapters, tokens, checkpointing, measured GiB): Qwen2.5-7B's shape on one H200.
MEASURED = ((21, 8192, False, 50), (21, 8192, True, 18), (4, 8192, False, 22), (4, 8192, True, 17))


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size < 100 * GIB else f"{size / GIB:.0f}"


def parts_table() -> str:
    """GiB on one GPU for each part, at 2,048 tokens."""
    rows = []
    for name, shape in PUBLISHED.items():
        plain, less = (training_parts(shape, Training(TOKENS, checkpointing=on)) for on in (False, True))
        sums = [sum(parts.values()) for parts in (plain, less)]
        cells = [plain["weights"], plain["adapters"], plain["activations"], less["activations"], plain["loss"], *sums]
        rows.append([name, *map(_gib, cells), _gib(measuring_bytes(shape, Training(TOKENS)))])
    head = [
        "model",
        "weights",
        "adapters",
        "activations",
        "with checkpointing",
        "loss",
        "training",
        "with checkpointing",
    ]
    return _table([*head, "measuring"], rows)


def choice_table() -> str:
    """The launch file for each model and GPU."""
    head = ["model", *(f"{size} GB" for size in GPUS)]
    return _table(
        head, [[name, *(launch_for(shape, size * GIB, TOKENS) for size in GPUS)] for name, shape in PUBLISHED.items()]
    )


def measured_table() -> str:
    """The arithmetic beside what a GPU showed."""
    rows = []
    for kept, tokens, checkpointing, measured in MEASURED:
        parts = training_parts(
            PUBLISHED["7B (Qwen2.5-7B)"], Training(tokens, kept_blocks=kept, checkpointing=checkpointing)
        )
        total = (sum(parts.values()) - parts["runtime"]) / GIB
        name = f"{kept} blocks, {'with' if checkpointing else 'without'} checkpointing"
        rows.append([name, f"{total:.1f}", f"{measured}", f"{total / measured - 1:+.0%}"])
    return _table([f"{MEASURED[0][1]:,} tokens at once", "arithmetic, GiB", "measured, GiB", "off by"], rows)


def filled(text: str) -> str:
    """The page with each table between its marks written anew."""
    for name, table in (("parts", parts_table), ("choice", choice_table), ("measured", measured_table)):
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert len(marks.findall(text)) == 1, name
        text = marks.sub(lambda found, table=table: f"{found[1]}{table()}\n{found[2]}", text)
    return text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
