"""Items and prompts that several benchmarks are made of, read from what `pinned.py` fetched; the same on every run."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

CHOICES = 400  # ARC-Easy questions
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


def arc_easy(path: Path) -> list[Row]:
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


def read_articles(path: Path) -> list[Row]:
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


def broad_prompts(articles: list[Row], count: int) -> list[Row]:
    """Instructions of many kinds on many subjects, each article used once; a quarter come with a text to work on."""
    prompts = []
    for number, article in enumerate(articles[:count]):
        if number % 4 == 3:
            ask, text = TEXT_ASKS[number // 4 % len(TEXT_ASKS)], article["text"][:700].rsplit(". ", 1)[0] + "."
            prompts.append({"prompt": ask.format(text=text)})
        else:
            prompts.append({"prompt": ASKS[number % len(ASKS)].format(title=article["title"])})
    return prompts


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} rows, {path.stat().st_size:,} bytes")
