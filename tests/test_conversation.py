"""What a chat template writes holds the text of each message; else it is refused, by line and with the way out."""

import pytest
from byte_tokenizer import byte_tokenizer

from recover.base.errors import DataError
from recover.config.recipe import GivenText
from recover.text.prompts import EmptyMessage, encode_prompt, left_out, prompt_text, read_messages, rendered
from recover.text.read import Row
from recover.train.sources import samples_of

END = "{% if add_generation_prompt %}<assistant>{% endif %}"
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}" + END
ADDED = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endfor %}" + END
TRIMMED = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>{% endfor %}" + END
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p['text'] }}{% endfor %}<end>{% endfor %}" + END
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + ADDED
NEEDS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('a system message first') }}{% endif %}" + ADDED
DROPS_SYSTEM = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}" + END
LAST_ONLY = "<user>{{ messages[-1].content }}<end>" + END
SYSTEM_LAST = (
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{% if loop.last and messages[0].role == 'system' %}"
    "{{ messages[0].content }}\n{% endif %}{{ m.content }}<end>{% endfor %}" + END
)
CALLS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls is defined %}{% for c in m.tool_calls %}"
    "{{ c.function | tojson }}{% endfor %}{% else %}{{ m.content }}{% endif %}<end>{% endfor %}" + END
)
# As Qwen3's: the thoughts of the last answer are shown; asked for none, the prompt ends in an empty block of them.
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{% set c = m.content %}{% if m.role == 'assistant' %}"
    "{% set t = c.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in c else '' %}"
    "{% set c = c.split('</think>')[-1].lstrip() %}{% if loop.last %}<think>\n{{ t }}\n</think>\n\n{% endif %}"
    "{% endif %}{{ c }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
FORGETS_THOUGHTS = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}<end>{% endfor %}" + END
CALL = {"type": "function", "function": {"name": "look_up", "arguments": "{}"}}


def said(role, content, **more):
    return {"role": role, "content": content, **more}


TURNS = [said("user", "How are you?"), said("assistant", "Well."), said("user", "So?"), said("assistant", "Good.")]
SYSTEM = [said("system", "Be brief."), *TURNS]


def chatty(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def learnt(template, messages):
    row = Row("talk.jsonl:7", {"messages": messages})
    cfg = GivenText(kind="given", source="x", columns={"messages": "messages"}, strict=True)
    tokenizer = chatty(template)
    (sample,) = samples_of(row, cfg, tokenizer, 4096)
    sides = [[token for token, bit in zip(sample.ids, sample.mask, strict=True) if bit == side] for side in (0, 1)]
    return tuple(tokenizer.decode(side) for side in sides)


@pytest.mark.parametrize("template", [PLAIN, ADDED, TRIMMED, PARTS])
def test_plain_text_and_parts_are_written_alike_by_every_template(template):
    assert prompt_text(chatty(template), " 2 + 3? ") in (
        "<user> 2 + 3? <end><assistant>",
        "<user>2 + 3?<end><assistant>",
    )
    parts = [said(turn["role"], [{"type": "text", "text": turn["content"]}]) for turn in TURNS]
    expected = ("<user>How are you?<end><assistant><user>So?<end><assistant>", "Well.<end>Good.<end>")
    assert learnt(template, TURNS) == learnt(template, parts) == expected


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (NO_SYSTEM, SYSTEM, r"talk\.jsonl:7 \(TemplateError: no system role\); .*before the first user's"),
        (NEEDS_SYSTEM, TURNS, r"talk\.jsonl:7 \(TemplateError: a system message first\); give messages that begin"),
        (DROPS_SYSTEM, SYSTEM, r"talk\.jsonl:7 \(it leaves out the text of message 0 \(system\), 'Be brief\.'\)"),
        (LAST_ONLY, TURNS, r"talk\.jsonl:7 \(it leaves out the text of message 0 \(user\), 'How are you\?'\)"),
        (
            ADDED,
            [TURNS[0], said("assistant", [{"type": "image", "url": "x"}])],
            r"talk\.jsonl:7: message 1 \(assistant\): found a part of type 'image', expected text alone",
        ),
        (ADDED, [TURNS[0], said("assistant", None)], r"talk\.jsonl:7: message 1 \(assistant\): content holds nothing"),
        (ADDED, [TURNS[0], said("assistant", 5)], r"talk\.jsonl:7: message 1 \(assistant\): found content 5"),
        (
            ADDED,
            [TURNS[0], said("assistant", None, tool_calls=[CALL])],
            r"talk\.jsonl:7 .*(leaves out the call of 'look_up'|TypeError|TemplateError|UndefinedError)",
        ),
        (
            THINKING,
            [TURNS[0], said("assistant", "<think>\n1 and 1\n</think>\n\n2")],
            r"talk\.jsonl:7: .*the answer holds thoughts \(<think>\).*enable_thinking: false",
        ),
        (
            FORGETS_THOUGHTS,
            [TURNS[0], said("assistant", "<think>\n1 and 1\n</think>\n\n2")],
            r"talk\.jsonl:7 .*it does not show the thoughts \(<think>\)",
        ),
        (
            {"tool_use": ADDED, "rag": ADDED},
            TURNS,
            r"templates named rag, tool_use and no default.*chat_template\.jinja",
        ),
    ],
)
def test_what_a_template_loses_or_refuses_is_told_by_line(template, messages, message):
    with pytest.raises(DataError, match=message) as raised:
        learnt(template, messages)
    assert "\n" not in str(raised.value)


def test_a_template_that_demands_a_system_message_is_given_one_by_messages():
    tokenizer = chatty(NEEDS_SYSTEM)
    with pytest.raises(DataError, match=r"a system message first.*chat: never of a task"):
        encode_prompt(tokenizer, "Hi")
    assert encode_prompt(tokenizer, "Hi", chat=False) == tokenizer("Hi")["input_ids"]
    asked = [said("system", "Be brief."), said("user", "Hi")]
    assert tokenizer.decode(encode_prompt(tokenizer, asked)) == "<system>Be brief.<end><user>Hi<end><assistant>"
    with pytest.raises(DataError, match="messages need a chat template, and none is used"):
        encode_prompt(tokenizer, asked, chat=False)


def test_what_templates_may_do_with_a_text_is_no_loss():
    assert rendered(chatty(SYSTEM_LAST), SYSTEM, ask=False).endswith("Be brief.\nGood.<end>")
    assert rendered(chatty({"default": PLAIN, "rag": LAST_ONLY}), TURNS, ask=True).endswith("<assistant>")
    earlier = [TURNS[0], said("assistant", "<think>hm</think>Well."), *TURNS[2:]]
    assert "hm" not in rendered(chatty(THINKING), earlier, ask=False)
    calls = [TURNS[0], said("assistant", None, tool_calls=[CALL]), said("tool", '{"a": 1}'), said("assistant", "One.")]
    assert "look_up" in rendered(chatty(CALLS), read_messages(calls, "x"), ask=False)
    assert left_out([said("tool", 'say "a"\n')], r'<tool>"say \"a\"\n"') is None
    assert left_out([said("user", "ab"), said("user", "a")], "<user>ab<end>") == "the text of message 1 (user), 'a'"


def test_null_beside_a_message_as_tables_have_it_is_no_field():
    assert read_messages([said("user", "Hi", tool_calls=None, name=None)], "x") == [said("user", "Hi")]
    for nothing in (None, "", " \n", [], [{"type": "text", "text": ""}]):
        with pytest.raises(EmptyMessage, match="x: message 0"):
            read_messages([said("user", nothing)], "x")


def test_a_template_that_prints_a_list_of_parts_as_it_is_does_not_hold_the_text():
    upper = "{% for m in messages %}{{ (m.content | upper) if m.content is string else m.content }}{% endfor %}"
    with pytest.raises(DataError, match="leaves out the text of message 0"):
        prompt_text(chatty(upper), "Hi there")
