"""Write the SmolLM2 benchmark's tasks, prompts and texts from what fetch.py fetched; the same files on every run.

    python benchmarks/smollm2/make_tasks.py

Held out for measurement: sums.jsonl, facts.jsonl, arc_easy.jsonl, text.jsonl, passages.jsonl. For pruning and recovery:
calibration.jsonl, sums_prompts.jsonl, broad_prompts.jsonl, and both as prompts.jsonl. No article, question or pair of
numbers is on both sides.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from facts import make_facts
from sums import make_sums

sys.path.append(str(Path(__file__).resolve().parents[1]))

from items import Row, arc_easy, broad_prompts, read_articles, write_rows

HERE = Path(__file__).resolve().parent

HELD_OUT_SUMS, TRAINING_SUMS, HELD_OUT_TEXTS, CALIBRATION_TEXTS, BROAD_PROMPTS = 200, 3000, 100, 700, 2600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "data", help="where fetch.py wrote (default: %(default)s)")
    out = parser.parse_args().out
    write_rows(out / "sums.jsonl", make_sums(HELD_OUT_SUMS, held_out=True, seed=0))
    prompts = make_sums(TRAINING_SUMS, held_out=False, seed=1)
    asked = [{"prompt": row["question"]} for row in prompts]
    write_rows(out / "sums_prompts.jsonl", asked)
    write_rows(out / "facts.jsonl", make_facts())
    write_rows(out / "arc_easy.jsonl", arc_easy(out / "raw" / "arc_easy_requests.jsonl.gz"))
    articles = read_articles(out / "raw" / "summaries_en-us.json.gz")
    held_out = [article for article in articles if 700 <= len(article["text"]) <= 1300][:HELD_OUT_TEXTS]
    taken = {article["title"] for article in held_out}
    rest = [article for article in articles if article["title"] not in taken]
    write_rows(out / "text.jsonl", held_out)
    write_rows(out / "passages.jsonl", _passages(held_out))
    write_rows(out / "calibration.jsonl", rest[:CALIBRATION_TEXTS])
    broad = broad_prompts(rest[CALIBRATION_TEXTS:], BROAD_PROMPTS)
    write_rows(out / "broad_prompts.jsonl", broad)
    write_rows(out / "prompts.jsonl", [*broad, *asked])


def _passages(articles: list[Row]) -> list[Row]:
    """The last sentence of each article, and what stands before it."""
    cut = [article["text"].removesuffix(".").rpartition(". ") for article in articles]
    return [{"query": f"{last}.", "document": f"{before}."} for before, _, last in cut if before]


if __name__ == "__main__":
    main()
