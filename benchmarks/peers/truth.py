"""Right answers to the prompts that recoveries learn from: for tools that learn from given text, not from a model's.

    python benchmarks/peers/truth.py coder          # after benchmarks/coder/make_tasks.py; data/truth/ there
    python benchmarks/peers/truth.py smollm2        # after benchmarks/smollm2/make_tasks.py
    python benchmarks/peers/truth.py embedded --out checkpoints/truth

For each file of prompts one of its name with `prompt` and `completion`, for those prompts whose answer is known:
GSM8K's worked solutions, MBPP's programs, the functions themselves, the summary of an article that a prompt asks about,
sums, and what the embedded model was trained on. Prompts that were left out because they come near a measured item stay
out.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from recover.base.artifacts import read_jsonl, write_jsonl

HERE = Path(__file__).resolve().parent
BENCHMARKS = HERE.parent
ABOUT = ("Tell me about {title}.", "What is {title}?", "Write a short paragraph about {title}.")
WORKED_OUT = re.compile(r"<<.*?>>")  # GSM8K's marks for a calculator
BLOCK = "```python\n{code}\n```"

Answers = dict[str, str]  # prompt -> right answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=WRITERS)
    parser.add_argument("--data", type=Path, help="where its make_tasks.py wrote (default: its own data/)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: DATA/truth)")
    options = parser.parse_args()
    data = options.data or BENCHMARKS / options.benchmark / "data"
    WRITERS[options.benchmark](data, options.out or data / "truth")


def coder(data: Path, out: Path) -> None:
    sys.path += [str(BENCHMARKS), str(BENCHMARKS / "coder")]
    from items import read_articles
    from make_tasks import CODE_ASK, FUNCTION_ASK

    raw = data / "raw"
    worked = read_jsonl(raw / "gsm8k_train.jsonl")
    math = {row["question"]: WORKED_OUT.sub("", row["answer"]) for row in worked}
    code = {
        CODE_ASK.format(text=row["text"], test=row["test_list"][0]): BLOCK.format(
            code=row["code"].replace("\r\n", "\n").strip()
        )
        for row in read_jsonl(raw / "mbpp.jsonl")
    }
    function = {
        FUNCTION_ASK.format(stub=stub): BLOCK.format(code=source)
        for wheel in sorted((raw / "libraries").glob("*.whl"))
        for stub, source in functions_of(wheel)
    }
    broad = about(read_articles(raw / "summaries_en-us.json.gz"))
    for name, answers in {"math": math, "code": code, "function": function, "broad": broad}.items():
        answered(data / f"{name}_prompts.jsonl", answers, out)


def functions_of(wheel: Path) -> Iterator[tuple[str, str]]:
    """(stub, whole source) of each function that `make_tasks.py` makes a prompt of."""
    from make_tasks import stub_of

    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            for node in ast.parse(archive.read(name)).body if name.endswith(".py") else ():
                if isinstance(node, ast.FunctionDef):
                    yield from ((stub, ast.unparse(node)) for stub in stub_of(node))


def about(articles: list[dict[str, str]]) -> Answers:
    """Articles as answers to the prompts that ask for what they say."""
    return {ask.format(title=article["title"]): article["text"] for article in articles for ask in ABOUT}


def smollm2(data: Path, out: Path) -> None:
    sys.path += [str(BENCHMARKS), str(BENCHMARKS / "smollm2")]
    from items import read_articles
    from make_tasks import TRAINING_SUMS
    from sums import make_sums

    sums = {row["question"]: row["answer"] for row in make_sums(TRAINING_SUMS, held_out=False, seed=1)}
    answered(data / "sums_prompts.jsonl", sums, out)
    answered(data / "broad_prompts.jsonl", about(read_articles(data / "raw" / "summaries_en-us.json.gz")), out)


def embedded(_data: Path, out: Path) -> None:
    sys.path.append(str(BENCHMARKS / "embedded"))
    from generators import documents

    import recover

    told = islice(documents("prompts", stories=0.45, tales=0.05), 12_000)  # those of publish.py
    answered(Path(recover.__file__).parent / "embedded" / "tasks" / "prompts.jsonl", dict(told), out)


def answered(prompts: Path, answers: Answers, out: Path) -> None:
    """Write the prompts of a file whose answer is known, in its order, under its name."""
    asked = [row["prompt"] for row in read_jsonl(prompts)]
    rows = [{"prompt": prompt, "completion": answers[prompt]} for prompt in asked if prompt in answers]
    if not rows:
        raise SystemExit(
            f"{prompts}: no prompt of it has a known answer: was it made by this version of make_tasks.py?"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / prompts.name, rows)
    print(f"{out / prompts.name}: {len(rows):,} of {len(asked):,} prompts")


WRITERS: dict[str, Callable[[Path, Path], None]] = {"coder": coder, "smollm2": smollm2, "embedded": embedded}

if __name__ == "__main__":
    main()
