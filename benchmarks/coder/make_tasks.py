"""Write the coder benchmark's tasks, prompts and texts from what fetch.py fetched; the same files on every run.

    python benchmarks/coder/make_tasks.py

Held out for measurement: gsm8k.jsonl (test, 1319), humaneval.jsonl (164), mbpp.jsonl (test, 500), arc_easy.jsonl (400),
text.jsonl (100 texts). Worked examples for few-shot: gsm8k_shots.jsonl, the first 8 of GSM8K train. For pruning and
recovery: math_prompts.jsonl (GSM8K train), code_prompts.jsonl (MBPP's other splits), function_prompts.jsonl (functions
of four libraries, asked for as HumanEval does), broad_prompts.jsonl, and calibration.jsonl, 40% of it math, 35% code,
25% broad. Prompts that ask what a measured item asks, in the same words or nearly so, are left out, and that none is
left is checked; both are printed.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import random
import sys
import textwrap
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from overlap import NEAR, Measured

sys.path.append(str(Path(__file__).resolve().parents[1]))

from items import Row, arc_easy, broad_prompts, read_articles, write_rows

HERE = Path(__file__).resolve().parent
HELD_OUT_TEXTS, BROAD_PROMPTS, CALIBRATION, SHOTS = 100, 3000, 1000, 8
SHARES = {"math": 0.40, "code": 0.35, "broad": 0.25}  # of calibration.jsonl
MBPP_TEST = range(11, 511)  # task ids, as the authors split them
DOCSTRING = range(60, 1201)  # characters of those that say enough and are no manual
CODE_ASK = "{text} Your code should pass this test:\n{test}\n"
FUNCTION_ASK = "Complete this Python function. Write the whole function in a code block.\n\n```python\n{stub}```"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "data", help="where fetch.py wrote (default: %(default)s)")
    make_all(parser.parse_args().out)


def make_all(out: Path) -> None:
    raw = out / "raw"
    articles = read_articles(raw / "summaries_en-us.json.gz")
    held_out = [article for article in articles if 700 <= len(article["text"]) <= 1300][:HELD_OUT_TEXTS]
    measured = {
        "gsm8k": _documents(raw / "gsm8k_requests.jsonl.gz", "question", "short_answer"),
        "humaneval": _documents(raw / "humaneval_requests.jsonl.gz", "task_id", "prompt", "test", "entry_point"),
        "mbpp": _documents(raw / "mbpp_requests.jsonl.gz", "task_id", "text", "test_setup_code", "test_list"),
        "arc_easy": arc_easy(raw / "arc_easy_requests.jsonl.gz"),
        "text": held_out,
    }
    for name, rows in measured.items():
        write_rows(out / f"{name}.jsonl", rows)
    write_rows(out / "gsm8k_shots.jsonl", shots(raw / "gsm8k_train.jsonl"))
    write_prompts(out, measured, prompts_of(raw, articles, held_out))


def shots(path: Path) -> list[Row]:
    """The first problems of GSM8K's train split, each with its worked answer and the number that ends it."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:SHOTS]]
    return [{**row, "short_answer": row["answer"].split("#### ")[-1]} for row in rows]


def write_prompts(out: Path, measured: dict[str, list[Row]], prompts: dict[str, list[Row]]) -> None:
    """A file for each kind of prompts without those that come near a measured item, and one of calibration.

    A row of `prompts` holds the `prompt`, and what is `asked` in it without words that every prompt of its kind has.
    """
    items = Measured(asked for rows in measured.values() for row in rows for asked in _asked(row))
    print(f"{len(items.items):,} measured texts; a prompt is near one with {NEAR:.0%} of their runs of words in common")
    kept = {}
    for name, rows in prompts.items():
        apart, equal, near = items.apart([row["asked"] for row in rows])
        far = set(apart)
        kept[name] = [{"prompt": row["prompt"]} for row in rows if row["asked"] in far]
        left = sum(items.nearest(asked) >= NEAR for asked in apart)
        print(f"{name}: {len(rows):,} prompts, {equal} equal to a measured item, {near} near one, {left} after that")
        if left:
            sys.exit(f"{name}: {left} prompts ask what a measured item asks")
        write_rows(out / f"{name}_prompts.jsonl", kept[name])
    write_rows(out / "calibration.jsonl", _mixed(kept))


def _asked(row: Row) -> Iterator[str]:
    """The texts of a measured row that a prompt must not come near."""
    for name in ("question", "prompt", "text"):
        if name in row:
            yield row[name]


def _mixed(prompts: dict[str, list[Row]]) -> list[Row]:
    """Prompts of each kind in its share, shuffled."""
    draw, mixed = random.Random(0), []
    for name, share in SHARES.items():
        mixed += draw.sample(prompts[name], min(len(prompts[name]), round(CALIBRATION * share)))
    draw.shuffle(mixed)
    return mixed


def _documents(path: Path, *columns: str) -> list[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        documents = [json.loads(line)["doc"] for line in lines]
    return [{name: document[name] for name in columns} for document in documents]


def prompts_of(raw: Path, articles: Sequence[Row], held_out: Sequence[Row]) -> dict[str, list[Row]]:
    """All prompts for recovery, by kind, from other splits and sources than what is measured."""
    taken = {article["title"] for article in held_out}
    rest = [article for article in articles if article["title"] not in taken]
    math = [json.loads(line)["question"] for line in (raw / "gsm8k_train.jsonl").read_text().splitlines()]
    stubs = [stub for wheel in sorted((raw / "libraries").glob("*.whl")) for stub in stubs_of(wheel)]
    return {
        "math": [{"prompt": question, "asked": question} for question in math],
        "code": list(_mbpp(raw / "mbpp.jsonl")),
        "function": [{"prompt": FUNCTION_ASK.format(stub=stub), "asked": stub} for stub in stubs],
        "broad": [{**row, "asked": row["prompt"]} for row in broad_prompts(rest, BROAD_PROMPTS)],
    }


def _mbpp(path: Path) -> Iterator[Row]:
    """MBPP's problems outside of its test split: 10 for prompting, 90 for validation, 374 for training."""
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["task_id"] not in MBPP_TEST:
            yield {"prompt": CODE_ASK.format(text=row["text"], test=row["test_list"][0]), "asked": row["text"]}


def stubs_of(wheel: Path) -> list[str]:
    """Signature and docstring of each documented public function of a wheel, read and never run."""
    stubs = []
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith(".py") or "/tests/" in name:
                continue
            for node in ast.parse(archive.read(name)).body:
                if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                    stubs += stub_of(node)
    return list(dict.fromkeys(stubs))


def stub_of(node: ast.FunctionDef) -> list[str]:
    """Signature and docstring, where it says enough and is no manual."""
    text = ast.get_docstring(node)
    if text is None or len(text) not in DOCSTRING or '"""' in text:
        return []
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    head = f"def {node.name}({ast.unparse(node.args)}){returns}:"
    return [f"{head}\n" + textwrap.indent(f'"""{text}\n"""', "    ") + "\n"]


if __name__ == "__main__":
    main()
