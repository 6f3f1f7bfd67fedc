"""One prompt, one list of token ids: in a measurement, in a probe, and in the text of a training."""

import json
from pathlib import Path

import pytest
from byte_tokenizer import byte_tokenizer
from task_folder import CHOICE, GENERATE, make_task
from tiny import tiny
from tokenizers import processors

from recover.base.errors import DataError
from recover.config.recipe import GivenText, Measure, PrunedText, load_recipe
from recover.measure.tasks import load_task, measure
from recover.models import tokenizers
from recover.probe import tasks as probe_retrieval
from recover.probe.trajectory import encode
from recover.probe.views import Pair
from recover.run.context import RunContext
from recover.run.directory import RunDirectory
from recover.text import generate as generation
from recover.text import likelihood
from recover.text.prompts import encode_prompt
from recover.text.read import Row
from recover.train.sources import samples_of
from recover.train.written_text import write_together

# As Qwen3's and SmolLM3's: an answer of no thought begins behind a closed train of thought, an open one without.
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BOS_WRITTEN = "{{ bos_token }}" + PLAIN
# It goes on for ever, but not for what `check_template` tries.
LOOPS = (
    PLAIN + "{% if 'forever' in messages[0].content %}{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}{% endif %}"
)
TEMPLATES = {"none": None, "plain": PLAIN, "thinking turn": THINKING, "writes its own BOS": BOS_WRITTEN}
PROMPTS = ["Who is Olga?", "  two\nlines {of} text \n", "Größe: 7 €", "<s> is no token here"]
QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"


@pytest.fixture
def written(monkeypatch):
    """Ids of the prompts that were handed to the model that writes."""
    seen = []
    write = generation.write
    monkeypatch.setattr(
        generation, "write", lambda model, ids, how: (seen.extend(map(list, ids)), write(model, ids, how))[1]
    )
    return seen


def measured(tmp_path, tokenizer, rows, **fields):
    task = load_task(make_task(tmp_path, rows, **fields))
    cfg = Measure(tasks=("x",), max_new_tokens=2, batch_size=4, sampling=None)
    measure(tiny(), tokenizer, [task], cfg)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("chat", ["auto", "never"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_has_the_same_ids_wherever_it_is_read(tmp_path, monkeypatch, written, template, chat, bos):
    tokenizer = byte_tokenizer(bos=bos)
    tokenizer.chat_template = TEMPLATES[template]
    expected = [encode_prompt(tokenizer, prompt, chat=None if chat == "auto" else False) for prompt in PROMPTS]
    wrapped = template != "none" and chat == "auto"
    shown = [tokenizer.decode(ids) for ids in expected]
    assert all(("<user>" in text) == wrapped for text in shown)
    assert all(text.endswith("<think></think>") == (wrapped and template == "thinking turn") for text in shown)

    rows = [{"q": prompt, "answer": "1"} for prompt in PROMPTS]
    measured(tmp_path, tokenizer, rows, chat=chat, **GENERATE)
    assert written == expected

    task = make_task(tmp_path, rows, chat=chat, **GENERATE)
    context = RunContext(load_recipe(QUICKSTART, [f"measure.tasks=[{task}]"]), RunDirectory(tmp_path))
    monkeypatch.setattr(RunContext, "tokenizer", tokenizer)
    assert context.probe_prompts() == expected
    assert context.sample_ids().tolist() == [ids[: min(map(len, expected))] for ids in expected]

    written.clear()
    source = PrunedText(kind="pruned", prompts="x", chat=None if chat == "auto" else False, max_new_tokens=2)
    write_together(tiny(), tokenizer, PROMPTS, source, (0,), "x")
    assert written == expected


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_of_a_file_have_the_same_ids_in_a_probe_and_in_given_text(template, bos):
    tokenizer = byte_tokenizer(bos=bos)
    tokenizer.chat_template = TEMPLATES[template]
    expected = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    assert encode(tokenizer, PROMPTS) == expected
    cfg = GivenText(kind="given", source="x", columns={"prompt": "prompt", "completion": "completion"})
    for prompt, ids in zip(PROMPTS, expected, strict=True):
        row = Row("x:1", {"prompt": prompt, "completion": "yes"})
        (sample,) = samples_of(row, cfg, tokenizer, 512)
        assert [each for each, learnt in zip(sample.ids, sample.mask, strict=True) if not learnt] == ids
        answer = [each for each, learnt in zip(sample.ids, sample.mask, strict=True) if learnt]
        assert tokenizer.decode(answer).startswith("yes")


@pytest.mark.parametrize("template", TEMPLATES)
def test_options_of_a_choice_stand_behind_the_prompts_own_ids(tmp_path, monkeypatch, template):
    tokenizer, seen = byte_tokenizer(bos=True), []
    tokenizer.chat_template = TEMPLATES[template]
    score = likelihood.option_log_likelihoods
    monkeypatch.setattr(
        "recover.measure.model.option_log_likelihoods",
        lambda model, groups, **how: (seen.extend(groups), score(model, groups, **how))[1],
    )
    rows = [{"q": prompt.strip(), "options": ["no", "yes"], "label": 0} for prompt in PROMPTS]
    measured(tmp_path, tokenizer, rows, **CHOICE)
    for row, group in zip(rows, seen, strict=True):
        ids = encode_prompt(tokenizer, row["q"])
        assert all(option.ids[: len(ids)] == ids for option in group)


def test_a_template_that_loops_for_some_prompts_ends_everywhere(monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = LOOPS
    tokenizers.check_template(tokenizer, "folder")
    monkeypatch.setattr(tokenizers, "SECONDS", 0.2)
    with pytest.raises(DataError, match=r"cannot write the prompt 'forever'.*more than 0\.2 seconds"):
        encode_prompt(tokenizer, "forever")
    with pytest.raises(DataError, match=r"cannot write the prompt 'forever'.*more than 0\.2 seconds"):
        encode(tokenizer, ["short", "forever"])
    row = Row(
        "given.jsonl:3",
        {"messages": json.loads('[{"role": "user", "content": "forever"}, {"role": "assistant", "content": "yes"}]')},
    )
    cfg = GivenText(kind="given", source="x", columns={"messages": "messages"})
    with pytest.raises(DataError, match=r"the conversation of given\.jsonl:3 .*more than 0\.2 seconds"):
        samples_of(row, cfg, tokenizer, 512)


def test_texts_to_embed_have_the_same_ids_in_a_measurement_and_in_a_probe(monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    texts, measured, probed, model = ["what is a cat", "an animal", "a stone"], [], [], tiny()
    pooled, checked = likelihood._pooled, probe_retrieval.check_ids
    monkeypatch.setattr(likelihood, "_pooled", lambda model, rows: (measured.extend(rows), pooled(model, rows))[1])
    monkeypatch.setattr(
        probe_retrieval, "check_ids", lambda ids, *a, **k: (probed.extend(ids), checked(ids, *a, **k))[1]
    )
    likelihood.embeddings(model, tokenizer, texts, length=12, batch_size=3)
    queries = [probe_retrieval.Query(texts[0], tuple(texts[1:]))]
    probe_retrieval.retrieval_drift(Pair.of_models(model, tiny()), tokenizer, queries, length=12)
    assert sorted(measured) == sorted(probed) and all(ids[0] == 1 and ids[-1] != 2 for ids in probed)
