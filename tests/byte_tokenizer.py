"""A tokenizer of bytes for tiny models: 256 ids, with BOS and EOS as the tiny configs have them."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """Ids 0, 1, 2 are pad, BOS and EOS, the rest are bytes (three rare ones left out). `bos`: texts start with BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:253]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
