"""A chat template of others ends: in time, in memory, in size; and what is wrong with it is one line."""

import resource
import signal
import time

import pytest
from gguf_checkpoint import words

from recover.base.errors import DataError, ModelError
from recover.models import tokenizers
from recover.models.tokenizers import TooSlow, check_template, within
from recover.text.prompts import prompt_text

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
MORE = "{% macro a(x) %}{% set n.a = MADE %}{% endmacro %}{% macro b(x) %}{% set n.b = MADE %}{% endmacro %}"


def doubling(made: str, arguments: str = "n.X") -> str:
    """A template that compares two structures, each of which holds itself twice, sixty deep."""
    one, other = (made.replace("X", name) for name in "ab")
    calls = "".join(f"{{{{ {name}({arguments.replace('X', name)}) }}}}" for name in "ab")
    macros = MORE.replace("MADE", one, 1).replace("MADE", other, 1)
    start = "{% set n = namespace(a=[1], b=[1]) %}"
    return f"{start}{macros}{{% for i in range(60) %}}{calls}{{% endfor %}}{{{{ n.a == n.b }}}}"


NESTED = "lists of more than 1,000,000 items"
REFUSED = {
    "lists within lists": (doubling("[n.X, n.X]"), NESTED),
    "tuples": (doubling("(n.X, n.X)"), NESTED),
    "mappings": (doubling("{1: n.X, 2: n.X}"), NESTED),
    "mappings by a call": (doubling("dict(a=n.X, b=n.X)"), NESTED),
    "mappings from keys": (doubling("dict.fromkeys([1, 2], n.X)"), NESTED),
    "lists by a product": (doubling("[n.X] * 2"), NESTED),
    "arguments of a macro": (doubling("varargs", "1, n.X, n.X"), NESTED),
    "named ones": (doubling("kwargs", "1, u=n.X, v=n.X"), NESTED),
    "endless loops": (ENDLESS, r"takes more than 0\.5 seconds"),
    "a huge text": ("{{ 'a' * 10000000000 }}", "takes more than .* bytes"),
    "a text that doubles": (
        "{% set n = namespace(s='aaaaaaaaaaaaaaaa') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "takes more than",
    ),
    "a huge range": ("{% for a in range(10**12) %}{% endfor %}", "takes more than .*Range too big"),
    "a power of constants": ("{{ (7 ** (10 ** 8)) % 3 }}", "a number of more than 65,536 bits"),
    "a power of powers": ("{{ ('9' * 4000) | int ** 100000 % 2 }}", "a number of more than 65,536 bits"),
    "long numbers": ("{{ ('f' * 10 ** 7) | int(0, 16) // 7 }}", "a number of more than 65,536 bits"),
    "a test of long numbers": ("{{ ('f' * 10 ** 7) | int(0, 16) is divisibleby(7) }}", "more than 65,536 bits"),
    "much text": ("{% for a in range(50000) %}one thousand roses and more {% endfor %}", "writes 1,400,000 characters"),
    "no end of a loop": ("line\n{% for m in messages %}", r"line 2: .*end of template"),
    "no such filter": ("{{ messages | nothing }}", "line 1: No filter named 'nothing'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_template_without_bounds_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "SECONDS", 0.5)
    tokenizer = words()
    tokenizer.chat_template, reason = REFUSED[what]
    limits = resource.getrlimit(resource.RLIMIT_AS)
    alarm = signal.getitimer(signal.ITIMER_REAL)[0]
    began = time.monotonic()
    with pytest.raises(ModelError, match=f"^folder: [^\n]*{reason}[^\n]*chat_template") as raised:
        check_template(tokenizer, "folder")
    assert "\n" not in str(raised.value) and time.monotonic() - began < 20
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
    assert alarm - 20 < signal.getitimer(signal.ITIMER_REAL)[0] <= alarm


def test_sound_templates_and_those_that_refuse_some_conversations_pass() -> None:
    tokenizer = words()
    check_template(tokenizer, "folder")
    for template in (None, "{{ raise_exception('a system prompt first') }}", "{{ messages[0]['content'][0]['text'] }}"):
        tokenizer.chat_template = template
        check_template(tokenizer, "folder")


LATER = {
    "endless loops": (ENDLESS, r"TooSlow: takes more than 0\.5 seconds"),
    "a huge text": ("{{ ('a' * 20000000000) | length }}", "MemoryError"),
    "a huge list": ("{{ (['ab'] * 900000000) | length }}", "MemoryError"),
    "a power": ("{% set n = 10 ** 8 %}{{ 7 ** n % 3 }}", "OverflowError: a number of more than 65,536 bits"),
    "much text": ("{{ 'ab ' * 300000 }}", "it writes 900,005 characters; expected at most 66,..."),
}


@pytest.mark.parametrize("what", LATER)
def test_a_template_that_waits_for_another_message_is_bounded_there_too(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizers, "SECONDS", 0.5)
    tokenizer = words()
    then, reason = LATER[what]
    tokenizer.chat_template = (
        f"{{% if 'Olga' not in messages[0].content %}}{then}{{% endif %}}{{{{ messages[0].content }}}}"
    )
    check_template(tokenizer, "folder")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(DataError, match=f"cannot write the prompt 'Hello' [^\n]*{reason}") as raised:
        prompt_text(tokenizer, "Hello")
    assert "\n" not in str(raised.value) and resource.getrlimit(resource.RLIMIT_AS) == limits


def test_templates_compute_as_transformers_has_it() -> None:
    tokenizer = words()
    tokenizer.chat_template = (
        "{{ messages[0].content }} {{ 2 ** 10 // 3 % 7 - 1.5 * 2 + 1 / 4 }} {{ 9 is divisibleby 3 }}"
        "{% for a, b in [(1, 2), (3, 4)] %} {{ a }}{{ b }}{% endfor %} {{ {'a': [1, {'b': (2,)}]} | tojson }}"
        "{% macro m(a) %} {{ a }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, 2, c=dict(d=3)) }} {{ 1 in [1] + [2] }}"
    )
    expected = """Hello 2.25 True 12 34 {"a": [1, {"b": [2]}]} 1(2,){'c': {'d': 3}} True"""
    assert prompt_text(tokenizer, "Hello") == expected


def test_what_a_template_raises_for_a_prompt_is_one_line() -> None:
    tokenizer = words()
    tokenizer.chat_template = "{{ raise_exception('a system\nprompt first') }}"
    with pytest.raises(DataError, match=r"cannot write the prompt 'Hello' \(TemplateError: a system prompt first\)"):
        prompt_text(tokenizer, "Hello")


def test_the_bound_of_time_gives_an_earlier_alarm_back() -> None:
    heard = []
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 5.0)
        with pytest.raises(TooSlow, match=r"more than 0\.05 seconds"), within(0.05):
            while True:
                pass
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 5.0 and heard == []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
