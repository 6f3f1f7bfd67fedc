"""A tokenizer is written in llama.cpp's terms when llama.cpp splits texts as it does, and refused by name otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
from gemma_gguf import BYTES, SPECIAL, sentencepiece
from gguf_checkpoint import ROWS, checkpoint, llama_cpp, tokenized, words
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from recover.base.errors import ExportError
from recover.export.gguf.vocabulary import LLAMA3, QWEN2, vocabulary
from recover.export.gguf.write import write_gguf


def bpe(pre, *, ignore_merges: bool = False, byte_fallback: bool = False, normalizer=None) -> PreTrainedTokenizerFast:
    vocab = {token: index for index, token in enumerate(["</s>", "a", "b", "ab"])}
    core = Tokenizer(models.BPE(vocab, [("a", "b")], ignore_merges=ignore_merges, byte_fallback=byte_fallback))
    core.pre_tokenizer = pre
    if normalizer is not None:
        core.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def split(pattern: str, behavior: str = "isolated") -> pre_tokenizers.Sequence:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior), plain])


def byte_level(**options) -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})


DIGITS = pre_tokenizers.Digits(individual_digits=True)
# name in llama.cpp -> (a pre-tokenizer that is it, ignore_merges, normalizer)
PRE = {
    "gpt-2": (byte_level(), False, None),
    "smollm": (pre_tokenizers.Sequence([DIGITS, byte_level()]), False, None),
    "llama-bpe": (split(LLAMA3), True, None),
    "dbrx": (split(LLAMA3), False, None),
    "qwen2": (split(QWEN2), False, normalizers.NFC()),
}


@pytest.mark.parametrize("name", PRE)
def test_a_pre_tokenizer_has_its_name_from_what_it_does(name):
    pre, ignore_merges, normalizer = PRE[name]
    found = vocabulary(bpe(pre, ignore_merges=ignore_merges, normalizer=normalizer), 5, [0])
    assert found.pre == name and found.merges == ["a b"] and not found.add_bos and found.chat_template is None


def test_the_rules_of_qwen_are_those_of_transformers():
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert QWEN2 == PRETOKENIZE_REGEX


def word_level() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def pieces(normalizer=None, pre=None, merges=()) -> PreTrainedTokenizerFast:
    """Gemma's kind of vocabulary, with a part of it otherwise."""
    made = ["".join(pair) for pair in merges]
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*SPECIAL, *BYTES, "a", "b", "c", *made]))}
    core = Tokenizer(models.BPE(vocab, [*merges], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence(normalizer) if normalizer else normalizers.Replace(" ", "▁")
    if pre is not None:
        core.pre_tokenizer = pre
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")


def test_a_vocabulary_of_sentencepiece_has_scores_in_the_place_of_merges():
    tokenizer = pieces(merges=[("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")])
    found = vocabulary(tokenizer, 300, [1])
    assert found.pre == "default" and found.merges == []
    ids = tokenizer.get_vocab()
    assert [found.scores[ids[token]] for token in ("ab", "bc", "abc")] == [0.0, -1.0, -2.0]
    assert found.types[ids["<unk>"]] == 2 and found.types[ids["<0x41>"]] == 6 and found.types[ids["ab"]] == 1
    assert found.types[299] == 5, "a row without a token"


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (word_level(), "its vocabulary is a WordLevel; GGUF is written for BPE only"),
        (pieces(normalizer=[normalizers.Lowercase()], merges=[("a", "b")]), "SentencePiece BPE .*Lowercase"),
        (
            pieces(normalizer=[normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")], merges=[("a", "b")]),
            "SentencePiece BPE .*Prepend",
        ),
        (pieces(pre=pre_tokenizers.Metaspace(), merges=[("a", "b")]), "SentencePiece BPE .* splits texts by Metaspace"),
        (sentencepiece(), "are not joined by its merges, and llama.cpp joins any two whose text is a token"),
        (pieces(merges=[("a", "b"), ("b", "c"), ("ab", "c"), ("b", "b"), ("a", "bc")]), "makes 'abc' at two places"),
        (bpe(byte_level(), normalizer=normalizers.Lowercase()), r"it normalizes texts \(Lowercase\)"),
        (bpe(pre_tokenizers.Whitespace()), r"it splits texts by .*Whitespace"),
        (bpe(byte_level(add_prefix_space=True)), r"it splits texts by .*add_prefix_space"),
        (bpe(split(QWEN2, "removed")), "it splits texts by .*Removed"),
        (
            bpe(split(QWEN2), ignore_merges=True),
            "its 'ignore_merges' is True, and llama.cpp's pre-tokenizer 'qwen2' has False",
        ),
    ],
)
def test_vocabularies_that_llama_cpp_would_read_otherwise_are_refused(tokenizer, message):
    with pytest.raises(ExportError, match=message):
        vocabulary(tokenizer, max(5, len(tokenizer)), [0])


def test_byte_fallback_without_tokens_of_bytes_and_an_empty_normalizer_say_nothing():
    """As transformers 5.17 reads SmolLM2's tokenizer from a GGUF file."""
    dressed = bpe(byte_level(), byte_fallback=True, normalizer=normalizers.Sequence([]))
    assert vocabulary(dressed, 4, [0]) == vocabulary(bpe(byte_level()), 4, [0])


def test_a_token_without_a_row_that_no_text_gives_is_left_out(capsys):
    tokenizer = bpe(byte_level())
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    found = vocabulary(tokenizer, 4, [0])
    assert found.tokens == ["</s>", "a", "b", "ab"] and len(found.types) == 4
    assert "'<image>' has id 4, the embedding has 4 rows: it is left out" in capsys.readouterr().err


def test_ids_without_a_row_texts_without_an_end_and_odd_surroundings_are_refused():
    with pytest.raises(ExportError, match=r"token 'ab' has id 3, the embedding has 3 rows"):
        vocabulary(bpe(byte_level()), 3, [0])
    endless = PreTrainedTokenizerFast(tokenizer_object=bpe(byte_level()).backend_tokenizer)
    with pytest.raises(ExportError, match="neither the model nor its tokenizer has an end-of-text token"):
        vocabulary(endless, 5, [])
    twice = words()
    twice.bos_token = "<pad>"
    with pytest.raises(ExportError, match=r"llama\.cpp can put one BOS before and one EOS after"):
        vocabulary(twice, ROWS, [2])


def trained_words(name: str) -> PreTrainedTokenizerFast:
    """A BPE that learned runs of blanks and of digits, as far as its pre-tokenizer lets them be words."""
    core = bpe(PRE[name][0], ignore_merges=PRE[name][1]).backend_tokenizer
    core.model = models.BPE(ignore_merges=PRE[name][1])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([f"{Path(__file__).read_text()}\n\n{'2024 12  1234567 ' * 9}"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


TEXTS = (
    "The fox  ran 1234 miles.\n\n 7 it's IT'S",
    "def f():\n    1 + 22 == 333\n\n\n1. x\r\n  2. y\t3",
    "Ünïcödé 你好 🪐\t!  Ⅻ ½ ٣٤",
    "assert x</s> y",
    "  12  ",
    "",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PRE, "embedded"])
def test_llama_cpp_tokenizes_as_the_checkpoint_does(name, tmp_path):
    folder = checkpoint(tmp_path / "deploy")
    tokenizer = words() if name == "embedded" else trained_words(name)
    tokenizer.save_pretrained(folder)
    server = llama_cpp(write_gguf(folder, tmp_path / "out.gguf"))
    for text in TEXTS:
        assert tokenized(server, text) == tokenizer(text).input_ids, text


@pytest.mark.slow
def test_llama_cpp_tokenizes_as_gemma_does(tmp_path):
    tokenizer = sentencepiece(whole=True)
    folder = checkpoint(tmp_path / "deploy", "gemma3_text", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    server = llama_cpp(write_gguf(folder, tmp_path / "out.gguf"))
    for text in (*TEXTS[:3], *TEXTS[4:], "the  vocabulary   of tokens\n\n\nand <bos> too"):
        assert tokenized(server, text) == tokenizer(text).input_ids, text
