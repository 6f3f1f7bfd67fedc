"""Instructions that a program checks: each type on texts that follow it and texts that do not, and what is refused."""

import importlib.util
import json
import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st
from task_folder import make_task
from tiny import tiny
from words import word_tokenizer

from recover.base.errors import DataError, RecipeError
from recover.config.recipe import Measure
from recover.measure.kinds import instructions
from recover.measure.kinds.instructions import CHECKS, Instruction, capitals, loosened, sentences
from recover.measure.tasks import load_task, measure
from recover.text.generate import Generation

LEAST, LESS = {"relation": "at least"}, {"relation": "less than"}
# type, details, texts that follow it, texts that do not
ROWS = [
    ("keywords:existence", {"keywords": ["war", "a.b"]}, ["WARS, a.b"], ["war", "peace a.b", "war axb"]),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, **LEAST}, ["cat Catalog"], ["cat", "dog"]),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, **LESS}, ["cat", "dog"], ["cat cat"]),
    ("keywords:forbidden_words", {"forbidden_words": ["war"]}, ["wars", "toward"], ["War!", "a war"]),
    (
        "keywords:letter_frequency",
        {"letter": "#", "let_frequency": 2, "let_relation": "at least"},
        ["#a #b"],
        ["#a"],
    ),
    ("keywords:letter_frequency", {"letter": "N", "let_frequency": 2, "let_relation": "less than"}, ["no"], ["nun"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, **LEAST}, ["One. Two.", "Is it? No"], ["Dr. Who"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, **LESS}, ["No end", "3.5 is"], ["A cat. A dog."]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***a***b***", "a***b"],
        ["a", "a***b***c", "a*** ***b"],
    ),
    ("length_constraints:number_words", {"num_words": 3, **LEAST}, ["It's so", "a b c"], ["a b", "..."]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        ["a\n\nthen, b", "a\n\n\"'Then' b"[:3] + '"Then b'],
        ["a\n\nso then", "then\n\na", "a\n\nthen\n\nb", "a\n\n\n\nthen"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] [b]", "[][]"], ["[a", "[a [b]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["a\np. s. b"], ["a PS b"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P. P.S so"], ["P.S. so"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n- b", " * a\n* b"], ["* a", "** a\n* b"]),
    ("detectable_format:constrained_response", {}, ["Well. My answer is no."], ["my answer is no.", "No"]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* *b*", "**a** *b*"], ["*a* * *"]),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1 a Section2 b"],
        ["Section 1 a", "SECTION 1 SECTION 2", "Section one Section two"],
    ),
    ("detectable_format:json_format", {}, ['{"a": 1}', "```json\n[1]\n```", "3"], ["a", "{'a': 1}", "[" * 90000]),
    ("detectable_format:title", {}, ["<<a>>", "x <<a\n<<b>>"], ["<< >>", "<a>", "<<a\n>>"]),
    ("combination:two_responses", {}, ["a******b", "******a******b"], ["a", "a******a ", "a************b", "a***b"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say a. "}, [" say A. yes"], ["Yes. Say a."]),
    ("startend:end_checker", {"end_phrase": "The end. "}, ['"so THE END."'], ["The end. So"]),
    ("startend:quotation", {}, [' "a" ', '""'], ['"', '"a', "'a'"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["DON'T", "A, B"],
        ["SELF-MADE"],
    ),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b", "1,000"]),
]
OF_LANGUAGE = [
    ("language:response_language", {"language": "de"}, ["Das ist ein deutscher Satz.", "..."], ["This is English."]),
    (
        "change_case:english_capital",
        {},
        ["THIS IS A PLAIN ENGLISH SENTENCE."],
        ["This is one.", "DAS IST EIN SATZ IN DEUTSCHER SPRACHE."],
    ),
    ("change_case:english_lowercase", {}, ["this is a plain english sentence."], ["This is one.", "123"]),
]


def one(name, details):
    return Instruction(name, tuple(details.items()))


@pytest.mark.parametrize(("name", "details", "followed", "broken"), ROWS)
def test_each_type_tells_texts_apart(name, details, followed, broken):
    for text in followed:
        assert one(name, details).followed(text), text
    for text in broken:
        assert not one(name, details).followed(text), text
    assert set(details) == set(CHECKS[name].details)
    assert not one(name, details).followed("") and not one(name, details).followed_loosely(" \n ")


def test_every_type_has_a_row():
    assert {row[0] for row in ROWS + OF_LANGUAGE} == set(CHECKS) and len(CHECKS) == 25
    assert {name for name, check in CHECKS.items() if check.by_language} == {row[0] for row in OF_LANGUAGE}


@pytest.mark.skipif(importlib.util.find_spec("langdetect") is None, reason="needs the extra 'ifeval'")
@pytest.mark.parametrize(("name", "details", "followed", "broken"), OF_LANGUAGE)
def test_languages_are_told_by_langdetect(name, details, followed, broken):
    test_each_type_tells_texts_apart(name, details, followed, broken)


def test_capitals_in_no_language_count_as_english(monkeypatch):
    """As in the paper's own checks: where no language can be told, the letters alone decide."""
    monkeypatch.setattr(instructions, "language", lambda text: None)
    assert one("change_case:english_capital", {}).followed("!A!")
    assert not one("change_case:english_capital", {}).followed("!a!")
    assert not one("change_case:english_lowercase", {}).followed("123")
    monkeypatch.setattr(instructions, "language", lambda text: "de")
    assert not one("change_case:english_capital", {}).followed("A")
    assert one("language:response_language", {"language": "de"}).followed("a")


def test_the_draw_of_langdetect_is_held_still(monkeypatch):
    fake = types.ModuleType("langdetect")
    fake.DetectorFactory = types.SimpleNamespace(seed=None)
    fake.LangDetectException = type("LangDetectException", (Exception,), {})

    def detect(text):
        assert fake.DetectorFactory.seed == 0
        if not text.strip("1"):
            raise fake.LangDetectException
        return "sw"

    fake.detect = detect
    monkeypatch.setitem(sys.modules, "langdetect", fake)
    assert instructions.language("habari") == "sw" and instructions.language("11") is None


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        (" \n", 0),
        ("no end", 1),
        ("One. Two! Three? Four", 4),
        ("Wow!! Great", 2),
        ('He said "Hi." Then he left.', 2),
        ("It is 3.5 or a.b c.", 1),
        ("Mr. Smith met Dr. No.", 1),
        ("In the U.S. it rains. In the U.S. The sun", 3),
        ("J. Smith", 1),
        ("wait... and see", 1),
        ("wait... But no", 2),
        ("1. Foo\n2. Bar", 3),
        ("3. foo", 1),
        ("**Note.** Then", 2),
        ('"Is it?"', 1),
        ("(It is.)", 1),
        ("Really?! Yes", 2),
    ],
)
def test_sentences_are_split_where_punkt_splits_them(text, count):
    """Counts of NLTK's English Punkt model."""
    assert sentences(text) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("I AM", 2),
        ("I'M", 2),
        ("DON'T", 2),
        ("DON’T", 2),
        ("CANNOT", 2),
        ("SELF-MADE A/B", 2),
        ("U.S.A.", 1),
        ("**BOLD** (NOW)!", 2),
        ("5:30PM 10AM A:B", 4),
        ("Mixed iPhone 42", 0),
        ("A—B--C", 3),
    ],
)
def test_words_in_capitals_are_those_of_the_penn_treebank(text, count):
    """Counts of NLTK's word_tokenize."""
    assert capitals(text) == count


@given(st.text(alphabet="ab *\n\"'.,<>[]", max_size=60))
def test_the_loose_forms_are_lines_taken_away(text):
    forms = list(loosened(text))
    lines = text.split("\n")
    assert forms[0] == text and len(forms) == 8
    assert forms[1].split() == "\n".join(lines[1:]).split() and forms[2].split() == "\n".join(lines[:-1]).split()
    assert forms[3].split() == "\n".join(lines[1:-1]).split()
    assert [form.replace("*", "") for form in forms[:4]] == forms[4:]
    for name, details, *_ in ROWS:
        assert one(name, details).followed_loosely(text) >= one(name, details).followed(text)


ROW = {"prompt": "w1 w2", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
FIELDS = {"kind": "instructions", "prompt": "{prompt}"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction_id_list": ["punctuation:no_coma"]}, r"jsonl:1: instruction 'punctuation:no_coma': expected one"),
        ({"instruction_id_list": []}, r"expected two lists of one length"),
        ({"kwargs": [{}, {}]}, r"expected two lists of one length"),
        (
            {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"num_words": 3}]},
            r"'length_constraints:number_words': relation: found None, expected 'at least' or 'less than'",
        ),
        (
            {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"num_words": "3", **LEAST}]},
            r"num_words: found '3', expected a count",
        ),
        (
            {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": "a"}]},
            r"keywords: found 'a', expected a list of texts",
        ),
        (
            {"instruction_id_list": ["startend:end_checker"], "kwargs": [{"end_phrase": None}]},
            r"end_phrase: found None, expected a text",
        ),
    ],
)
def test_a_row_that_says_no_instruction_is_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        load_task(make_task(tmp_path, [{**ROW, **row}], **FIELDS))


def test_without_langdetect_a_language_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    row = {
        **ROW,
        "instruction_id_list": ["language:response_language"],
        "kwargs": [{"language": "de", "keyword": None}],
    }
    path = make_task(tmp_path, [ROW, row], **FIELDS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(DataError, match=r"jsonl:2: .*langdetect is not installed: pip install 'recover\[ifeval\]'"):
        load_task(path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    assert load_task(path).items[1].instructions[0].details == (("language", "de"),)


def test_examples_need_a_completion(tmp_path):
    with pytest.raises(RecipeError, match=r"fewshot.completion is missing"):
        load_task(make_task(tmp_path, [ROW] * 3, fewshot={"count": 1}, **FIELDS))


def test_figures_are_of_prompts_and_of_instructions(tmp_path, monkeypatch):
    two = {
        "prompt": "w3",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{}, {"num_words": 2, **LEAST}],
    }
    task = load_task(make_task(tmp_path, [ROW, two, {**ROW, "prompt": "w5"}], **FIELDS))
    texts = ["Sure, here:\na b", "a b, c", "a"]
    monkeypatch.setattr(
        instructions, "written", lambda *_: [Generation([5, 2], text, text != "a b, c") for text in texts]
    )
    cfg = Measure(tasks=("x",), sampling=None, samples=3)
    dense = {"task": [{"ids": [5, 2], "text": text} for text in texts]}
    record, written = measure(tiny(), word_tokenizer(), [task], cfg, reference=dense)
    found = record["tasks"]["task"]
    assert (found["prompt_strict"], found["prompt_loose"]) == (1 / 3, 2 / 3)
    assert (found["instruction_strict"], found["instruction_loose"]) == (2 / 4, 3 / 4)
    assert found["each"] == [0.0, 0.0, 1.0] and record["headline"]["generation"] == 1 / 3
    assert found["exact_text"] == 1.0 and found["mistakes"]["endless"] == 1 and found["mistakes"]["content"] == 1
    assert found["by_instruction"]["punctuation:no_comma"] == {"count": 3, "strict": 1 / 3, "loose": 2 / 3}
    assert found["samples"][1]["answer"] == "not followed: no comma"
    assert written["task"][1]["expected"] == "no comma; number words at least 2"
    json.dumps(record)


def test_texts_are_drawn_for_pass_at_k(tmp_path):
    task = load_task(make_task(tmp_path, [ROW], samples=2, max_new_tokens=3, **FIELDS))
    found = measure(tiny(), word_tokenizer(), [task], Measure(tasks=("x",), max_new_tokens=3))[0]["tasks"]["task"]
    assert set(found["pass_at_k"]) == {"1", "2"} and found["length"] <= 3
