"""A word tokenizer for tests: ids 3..255 are the words w3..w255, split at spaces; other words are unknown."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<user> {{ m.content }} <end>{% endfor %}{% if add_generation_prompt %} <bot> {% endif %}"
)


def word_tokenizer(*, bos: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """Vocabulary of 256, pad 0, BOS 1, EOS 2; `bos`: texts begin with BOS; `chat`: with a chat template."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, 250)}}
    vocabulary |= {"<user>": 250, "<end>": 251, "<bot>": 252, "<unk>": 253}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = CHATML if chat else None
    return fast
