"""Write the SmolLM2 benchmark's tasks, prompts and texts from what fetch.py fetched; the same files on every run.

    python benchmarks/smollm2/make_tasks.py

Held out for measurement: sums.jsonl, facts.jsonl, arc_easy.jsonl, text.jsonl, passages.jsonl. For pruning and recovery:
calibration.jsonl, sums_prompts.jsonl, broad_prompts.jsonl, and both as prompts.jsonl. No article, question or pair of
numbers is on both sides.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from facts import make_facts
from sums import make_sums

HERE = Path(__file__).resolve().parent
Row = dict[str, Any]

HELD_OUT_SUMS, TRAINING_SUMS, CHOICES, HELD_OUT_TEXTS, CALIBRATION_TEXTS, BROAD_PROMPTS = 200, 3000, 400, 100, 700, 2600
ASKS = (
    "Tell me about {title}.",
    "What is {title}?",
    "Explain {title} in simple words.",
    "Write a short paragraph about {title}.",
    "Why is {title} important?",
    "List three facts about {title}.",
    "Describe {title} to a child.",
    "Write a short story in which {title} plays a part.",
    "Give me two questions about {title}, with answers.",
    "Summarize what you know about {title} in one sentence.",
    "Write a letter to a friend about {title}.",
    "What should a beginner know about {title}?",
    "Write a short poem about {title}.",
)
TEXT_ASKS = (
    "Summarize this text in one sentence:\n\n{text}",
    "What is the main point of this text?\n\n{text}",
    "Rewrite this text in simpler words:\n\n{text}",
    "Ask a question that this text answers, and answer it:\n\n{text}",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "data", help="where fetch.py wrote (default: %(default)s)")
    out = parser.parse_args().out
    _write(out / "sums.jsonl", make_sums(HELD_OUT_SUMS, held_out=True, seed=0))
    prompts = make_sums(TRAINING_SUMS, held_out=False, seed=1)
    asked = [{"prompt": row["question"]} for row in prompts]
    _write(out / "sums_prompts.jsonl", asked)
    _write(out / "facts.jsonl", make_facts())
    _write(out / "arc_easy.jsonl", _arc_easy(out / "raw" / "arc_easy_requests.jsonl.gz"))
    articles = _articles(out / "raw" / "summaries_en-us.json.gz")
    held_out = [article for article in articles if 700 <= len(article["text"]) <= 1300][:HELD_OUT_TEXTS]
    taken = {article["title"] for article in held_out}
    rest = [article for article in articles if article["title"] not in taken]
    _write(out / "text.jsonl", held_out)
    _write(out / "passages.jsonl", _passages(held_out))
    _write(out / "calibration.jsonl", rest[:CALIBRATION_TEXTS])
    broad = _broad_prompts(rest[CALIBRATION_TEXTS:])
    _write(out / "broad_prompts.jsonl", broad)
    _write(out / "prompts.jsonl", [*broad, *asked])


def _arc_easy(path: Path) -> list[Row]:
    """ARC-Easy test questions with the texts of their options; the file lists a question once per option."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        documents = {document["id"]: document for document in (json.loads(line)["doc"] for line in lines)}
    chosen = random.Random(0).sample(sorted(documents), CHOICES)
    rows = []
    for name in chosen:
        document = documents[name]
        question = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        rows.append({"id": name, "question": question, "options": document["choices"], "label": document["gold"]})
    return rows


def _articles(path: Path) -> list[Row]:
    """Titles and summaries in a shuffled order, without stubs and without text broken by markup."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        summaries = json.load(file)
    articles = [
        {"title": title, "text": " ".join(summary["extract"].split())}
        for title, summary in sorted(summaries.items())
        if len(summary["extract"]) > 300 and "{" not in summary["extract"]
    ]
    random.Random(0).shuffle(articles)
    return articles


def _passages(articles: list[Row]) -> list[Row]:
    """The last sentence of each article, and what stands before it."""
    cut = [article["text"].removesuffix(".").rpartition(". ") for article in articles]
    return [{"query": f"{last}.", "document": f"{before}."} for before, _, last in cut if before]


def _broad_prompts(articles: list[Row]) -> list[Row]:
    """Instructions of many kinds on many subjects, each article used once; a quarter come with a text to work on."""
    prompts = []
    for number, article in enumerate(articles[:BROAD_PROMPTS]):
        if number % 4 == 3:
            ask, text = TEXT_ASKS[number // 4 % len(TEXT_ASKS)], article["text"][:700].rsplit(". ", 1)[0] + "."
            prompts.append({"prompt": ask.format(text=text)})
        else:
            prompts.append({"prompt": ASKS[number % len(ASKS)].format(title=article["title"])})
    return prompts


def _write(path: Path, rows: Iterable[Row]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} rows, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
