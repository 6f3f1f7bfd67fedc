"""A task of instructions that a program can check, as IFEval has them (Zhou et al. 2023, arXiv 2311.07911).

A row names its instructions and their details: `length_constraints:number_words` with `relation: at least` and
`num_words: 300`. `CHECKS` holds the 25 types of the paper; what each wants is read off the released data and its
description, and held against lm-evaluation-harness in docs/results.md. A text that is empty follows nothing.

Strict: the text as it is. Loose: the text, or what is left without its first line, its last line, both, and each of
the four without asterisks; an instruction is followed if one of them follows it.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from recover.base.errors import DataError
from recover.config.tasks import InstructionsFile, Row
from recover.maths.score import interval95, mean
from recover.measure.kinds.generate import (
    OF_TEXT,
    against,
    mistake,
    mistakes,
    pass_at_k,
    prompt_size,
    reference_ids,
    sampling_of,
    shape,
    written,
)
from recover.measure.model import Generations, Measured, ModelUnderTest, Record, Work
from recover.text.rows import column, filled

AT_LEAST, LESS_THAN = "at least", "less than"
ENGLISH = "en"
CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
MARKS = ("```json", "```Json", "```JSON", "```")  # before a block of JSON
STOPPERS = ".,?!'\""  # end the first word of a paragraph
# What a period ends without ending a sentence.
_ABBREVIATIONS = (
    "adm ave bros co col corp dr ft gen inc jr lt ltd maj mr mrs ms ok pa prof rep reps sen sr st va vs jan feb aug "
    "sep sept oct nov dec tues wed fri a.c a.d a.m d.c n.c n.d n.h n.j n.y p.m ph.d u.k u.n u.s u.s.a"
)
# Words that begin a sentence behind an abbreviation.
_STARTERS = (
    "although but despite he however if in indeed instead it many meanwhile moreover most nevertheless since so some "
    "the there these they this though thus when while yet"
)
ABBREVIATIONS, STARTERS = frozenset(_ABBREVIATIONS.split()), frozenset(_STARTERS.split())
# A sentence may end at such a mark: what closes it may follow, and something must.
ENDING = re.compile(r"""(?P<end>[.?!]+)(?=[\s)";}\]*:@'({\[‘’“”«»])["')\]}’”»]*+\s*+(?=(?P<next>\S+))""")
LONGEST_ABBREVIATION = 16  # characters before a period that are looked at
OPENING = "\"'“‘(*[{_#-"
# Parts of a word that are counted by themselves, as the Penn Treebank has it: DON'T is DO and N'T, GONNA is GON and NA.
TREEBANK = re.compile(
    r"(?i)n't$|'(?:s|m|d|ll|re|ve)$|(?<=can)not$|(?<=gim)me$|(?<=gon)na$|(?<=got)ta$|(?<=lem)me$|(?<=wan)na$"
)
SEPARATE = re.compile(r"[\[\](){}<>;@#$%&?!\"“”„«»‘’`*\u2012-\u2015]|[,:](?!\d)|--+|\.\.+|\s+|''")


def language(text: str) -> str | None:
    """ISO 639-1 code of the language that a text is in, None where it has no letters to tell by.

    langdetect draws at random: here with a fixed seed, so that a text has one language. Upper and lower case count.
    """
    import langdetect  # pyright: ignore[reportMissingImports]  # of the extra `ifeval`

    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(text)
    except langdetect.LangDetectException:
        return None


def sentences(text: str) -> int:
    """Sentences of an English text: its ends, and what follows the last one."""
    return sum(map(_ends, ENDING.finditer(text))) + bool(text.strip())


def _ends(found: re.Match[str]) -> bool:
    """Whether a period, question or exclamation mark with something behind it ends a sentence."""
    before = found.string[max(0, found.start() - LONGEST_ABBREVIATION) : found.start()].split()
    word = before[-1].lstrip(OPENING).lower() if before and not found.string[found.start() - 1].isspace() else ""
    end, following = found["end"], found["next"].lstrip(OPENING)
    if "?" in end or "!" in end:
        return True
    if len(end) > 1:
        return following[:1].isupper()
    if word in ABBREVIATIONS:
        return following[:1].isupper() and following.strip(",").lower() in STARTERS
    if len(word) == 1 and word.isalpha():
        return False
    return not (word.isdecimal() and found["next"][:1].islower())


def capitals(text: str) -> int:
    """Words all of whose letters are capitals; parts of contractions count each by itself."""
    count = 0
    for piece in SEPARATE.split(text):
        word = piece.strip("'.")
        tail = TREEBANK.search(word)
        parts = (word[: tail.start()], tail[0]) if tail else (word,)
        count += sum(part.isupper() for part in parts)
    return count


def highlights(text: str) -> int:
    """Marked pieces that hold something, *so* or **so**."""
    single = sum(bool(each.strip("*").strip()) for each in re.findall(r"\*[^\n*]*\*", text))
    return single + sum(bool(each.strip()) for each in re.findall(r"\*\*([^\n*]*)\*\*", text))


def bullets(text: str) -> int:
    """Lines that begin with one asterisk, or with a hyphen."""
    return len(re.findall(r"(?m)^\s*\*[^*].*$", text)) + len(re.findall(r"(?m)^\s*-.*$", text))


def divided(text: str, mark: str) -> list[str] | None:
    """The parts between marks, of which the first and last may be empty and are left out; None if another one is."""
    parts = re.split(mark, text)
    empty = [index for index, part in enumerate(parts) if not part.strip()]
    return None if {*empty} - {0, len(parts) - 1} else [part for part in parts if part.strip()]


def _is_json(text: str) -> bool:
    text = text.strip()
    for mark in MARKS:
        text = text.removeprefix(mark)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """The number of paragraphs is right, and the nth begins with the word. Empty ones count as places, not as more."""
    parts = text.split("\n\n")
    if sum(bool(part.strip()) for part in parts) != num_paragraphs or not 0 < nth_paragraph <= num_paragraphs:
        return False
    words = parts[nth_paragraph - 1].split()
    begins = words[0].lstrip("'").lstrip('"').lower() if words else ""
    ends = min((begins.find(stopper) for stopper in STOPPERS if stopper in begins), default=len(begins))
    return bool(words) and begins[:ends] == first_word.lower()


def _two(text: str) -> bool:
    parts = divided(text, r"\*{6}")
    return parts is not None and len(parts) == 2 and parts[0].strip() != parts[1].strip()


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = divided(text, r"\s?\*\*\*\s?")
    return parts is not None and len(parts) == num_paragraphs


def _postscript(text: str, postscript_marker: str) -> bool:
    """The marker stands somewhere; the two usual ones with or without spaces between their letters."""
    marker = postscript_marker.strip()
    spaced = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(marker, re.escape(marker.lower()))
    return re.search(spaced, text.lower()) is not None


def _quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _titled(text: str) -> bool:
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<([^\n]+)>>", text))


def _times(word: str, text: str) -> int:
    return len(re.findall(re.escape(word.strip()), text, re.IGNORECASE))


def enough(count: int, relation: str, threshold: int) -> bool:
    """`at least` or `less than` so many."""
    return count < threshold if relation == LESS_THAN else count >= threshold


@dataclass(frozen=True)
class Check:
    """One type of instruction: its details, by which `follows` tells of a text whether it is followed."""

    details: tuple[str, ...]
    follows: Callable[..., bool]
    by_language: bool = False  # needs langdetect


def _counted(count: Callable[[str], int], relation: str, threshold: str) -> Check:
    return Check(
        (relation, threshold), lambda text, **given: enough(count(text), given[relation], int(given[threshold]))
    )


CHECKS: dict[str, Check] = {
    "keywords:existence": Check(("keywords",), lambda text, keywords: all(_times(each, text) for each in keywords)),
    "keywords:frequency": Check(
        ("keyword", "relation", "frequency"),
        lambda text, keyword, relation, frequency: enough(_times(keyword, text), relation, int(frequency)),
    ),
    "keywords:forbidden_words": Check(
        ("forbidden_words",),
        lambda text, forbidden_words: (
            not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)
        ),
    ),
    "keywords:letter_frequency": Check(
        ("letter", "let_relation", "let_frequency"),
        lambda text, letter, let_relation, let_frequency: enough(
            text.lower().count(letter.strip().lower()), let_relation, int(let_frequency)
        ),
    ),
    "language:response_language": Check(("language",), lambda text, language: _is_in(text, language), by_language=True),
    "length_constraints:number_sentences": _counted(sentences, "relation", "num_sentences"),
    "length_constraints:number_paragraphs": Check(
        ("num_paragraphs",), lambda text, num_paragraphs: _paragraphs(text, int(num_paragraphs))
    ),
    "length_constraints:number_words": _counted(lambda text: len(re.findall(r"\w+", text)), "relation", "num_words"),
    "length_constraints:nth_paragraph_first_word": Check(
        ("num_paragraphs", "nth_paragraph", "first_word"),
        lambda text, num_paragraphs, nth_paragraph, first_word: _nth_paragraph(
            text, int(num_paragraphs), int(nth_paragraph), first_word
        ),
    ),
    "detectable_content:number_placeholders": Check(
        ("num_placeholders",),
        lambda text, num_placeholders: len(re.findall(r"\[.*?\]", text)) >= int(num_placeholders),
    ),
    "detectable_content:postscript": Check(("postscript_marker",), _postscript),
    "detectable_format:number_bullet_lists": Check(
        ("num_bullets",), lambda text, num_bullets: bullets(text) == int(num_bullets)
    ),
    "detectable_format:constrained_response": Check((), lambda text: any(each in text for each in CONSTRAINED)),
    "detectable_format:number_highlighted_sections": Check(
        ("num_highlights",), lambda text, num_highlights: highlights(text) >= int(num_highlights)
    ),
    "detectable_format:multiple_sections": Check(
        ("section_spliter", "num_sections"),
        lambda text, section_spliter, num_sections: (
            len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= int(num_sections)
        ),
    ),
    "detectable_format:json_format": Check((), _is_json),
    "detectable_format:title": Check((), _titled),
    "combination:two_responses": Check((), _two),
    "combination:repeat_prompt": Check(
        ("prompt_to_repeat",),
        lambda text, prompt_to_repeat: text.strip().lower().startswith(prompt_to_repeat.strip().lower()),
    ),
    "startend:end_checker": Check(
        ("end_phrase",),
        lambda text, end_phrase: text.strip().strip('"').lower().endswith(end_phrase.strip().lower()),
    ),
    "startend:quotation": Check((), _quoted),
    "change_case:capital_word_frequency": _counted(capitals, "capital_relation", "capital_frequency"),
    "change_case:english_capital": Check((), lambda text: text.isupper() and _is_in(text, ENGLISH), by_language=True),
    "change_case:english_lowercase": Check((), lambda text: text.islower() and _is_in(text, ENGLISH), by_language=True),
    "punctuation:no_comma": Check((), lambda text: "," not in text),
}


def _is_in(text: str, wanted: str) -> bool:
    return language(text) in (None, wanted)


@dataclass(frozen=True)
class Instruction:
    """One instruction of an item: its type, a key of `CHECKS`, and its details."""

    name: str
    details: tuple[tuple[str, Any], ...]

    def followed(self, text: str) -> bool:
        """Whether a text follows it; an empty one does not."""
        return bool(text.strip()) and CHECKS[self.name].follows(text, **dict(self.details))

    def followed_loosely(self, text: str) -> bool:
        """Whether one of the forms of a text that `loosened` gives follows it."""
        return any(self.followed(each) for each in loosened(text))

    @property
    def said(self) -> str:
        """Type and details in few words, as "number words at least 300"."""
        values = [", ".join(value) if isinstance(value, tuple) else str(value) for _, value in self.details]
        return " ".join([self.name.partition(":")[2].replace("_", " "), *values])


def loosened(text: str) -> Iterator[str]:
    """The text, then without its first line, its last, both; each then without asterisks."""
    lines = text.split("\n")
    forms = [text, *("\n".join(rest).strip() for rest in (lines[1:], lines[:-1], lines[1:-1]))]
    yield from forms
    yield from (form.replace("*", "") for form in forms)


@dataclass(frozen=True)
class Instructed:
    """One item of an instructions task."""

    prompt: str
    instructions: tuple[Instruction, ...]

    @property
    def targets(self) -> tuple[str, ...]:
        """What a right text does, in words: there is no one text that is right."""
        return ("; ".join(each.said for each in self.instructions),)


def _instructed(file: InstructionsFile, row: Row, where: str) -> Instructed:
    names, details = (column(row, name, where) for name in (file.instructions, file.details))
    if not isinstance(names, list) or not isinstance(details, list) or not names or len(names) != len(details):
        raise DataError(
            f"{where}: columns '{file.instructions}' and '{file.details}': found {names!r} and {details!r}, expected "
            "two lists of one length, of types and of their details"
        )
    found = [_instruction(*each, where) for each in zip(names, details, strict=True)]
    return Instructed(filled(file.prompt, row, where), tuple(found))


def _instruction(name: Any, given: Any, where: str) -> Instruction:
    """Raises DataError for a type that is not known, for details that are missing, and where langdetect is."""
    check = CHECKS.get(name) if isinstance(name, str) else None
    if check is None:
        raise DataError(f"{where}: instruction {name!r}: expected one of {', '.join(CHECKS)}")
    given = {key: value for key, value in (given or {}).items() if value is not None}
    for key in check.details:
        _check_detail(key, given.get(key), f"{where}: instruction {name!r}: {key}")
    if check.by_language and importlib.util.find_spec("langdetect") is None:
        raise DataError(
            f"{where}: instruction {name!r} asks for a language, and langdetect is not installed: "
            "pip install 'recover[ifeval]' (or: pip install langdetect)"
        )
    values = {key: tuple(given[key]) if isinstance(given[key], list) else given[key] for key in check.details}
    return Instruction(name, tuple(values.items()))


def _check_detail(key: str, value: Any, what: str) -> None:
    """A list of texts, a relation, a number or a text, as the detail's name says."""
    if key in ("keywords", "forbidden_words"):
        right, form = isinstance(value, list) and value and all(map(_is_text, value)), "a list of texts"
    elif key.endswith("relation"):
        right, form = value in (AT_LEAST, LESS_THAN), f"'{AT_LEAST}' or '{LESS_THAN}'"
    elif key.startswith("num_") or key.endswith("frequency") or key == "nth_paragraph":
        right = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value == int(value)
        form = "a count"
    else:
        right, form = _is_text(value), "a text"
    if not right:
        raise DataError(f"{what}: found {value!r}, expected {form}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def measure_instructions(
    model: ModelUnderTest, file: InstructionsFile, items: Sequence[Instructed], reference: Generations | None
) -> Measured:
    """The greedy texts, checked; `prompt_strict` is the share of prompts all of whose instructions are followed.

    `pass_at_k`: of the task's `samples`, drawn, by the same strict check. `by_instruction`: of each type, how many
    there are, and the shares that are followed strictly and loosely.

    Raises:
        DataError: a prompt does not fit the model's context, or `reference` lacks items of this task.
    """
    dense_ids = reference_ids(reference, file.name, len(items))
    prompts = [item.prompt for item in items]
    greedy = written(model, file, prompts, None)
    strict, loose = (
        [_followed(item, each.text, way) for item, each in zip(items, greedy, strict=True)] for way in WAYS
    )
    right = [float(all(each)) for each in strict]
    samples = _samples(items, greedy, strict)
    found = [mistake(each, bool(ok), answered=bool(each.text.strip())) for each, ok in zip(greedy, right, strict=True)]
    times = file.samples or 0
    drawn = written(model, file, prompts * times, sampling_of(model, file)) if times else []
    drawn_right = [
        float(all(_followed(item, each.text, Instruction.followed)))
        for item, each in zip([*items] * times, drawn, strict=True)
    ]
    record = {
        "kind": "instructions",
        "items": len(items),
        "prompt_strict": mean(right),
        "interval95": interval95(right),
        "prompt_loose": mean([all(each) for each in loose]),
        "instruction_strict": mean([ok for each in strict for ok in each]),
        "instruction_loose": mean([ok for each in loose for ok in each]),
        "by_instruction": _by_type(items, strict, loose),
        "pass_at_k": pass_at_k(drawn_right, times) if times else None,
        **shape(greedy, right),
        **against(dense_ids, [each.ids for each in greedy]),
        **mistakes(found, samples, OF_TEXT),
        "each": right,
        "samples": samples[: model.cfg.samples],
    }
    return Measured(record, greedy, sum(len(each.ids) for each in [*greedy, *drawn]))


WAYS = (Instruction.followed, Instruction.followed_loosely)


def _followed(item: Instructed, text: str, way: Callable[[Instruction, str], bool]) -> list[bool]:
    return [way(each, text) for each in item.instructions]


def _by_type(items: Sequence[Instructed], strict: Sequence[list[bool]], loose: Sequence[list[bool]]) -> Record:
    by_type: dict[str, list[tuple[bool, bool]]] = {}
    for item, *ways in zip(items, strict, loose, strict=True):
        for each, *followed in zip(item.instructions, *ways, strict=True):
            by_type.setdefault(each.name, []).append((followed[0], followed[1]))
    return {
        name: {"count": len(found), "strict": mean([a for a, _ in found]), "loose": mean([b for _, b in found])}
        for name, found in sorted(by_type.items())
    }


def _samples(items: Sequence[Instructed], texts: Sequence[Any], strict: Sequence[list[bool]]) -> list[Record]:
    """`answer`: the instructions that the text does not follow."""
    return [
        {
            "prompt": item.prompt,
            "text": each.text,
            "answer": "; ".join(
                f"not followed: {one.said}" for one, ok in zip(item.instructions, followed, strict=True) if not ok
            )
            or None,
            "expected": item.targets[0],
            "correct": all(followed),
        }
        for item, each, followed in zip(items, texts, strict, strict=True)
    ]


WORK = Work(_instructed, measure_instructions, size=prompt_size)
