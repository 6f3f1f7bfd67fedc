"""A tiny Gemma 3 as a GGUF file, as llama.cpp's converter writes one: a vocabulary of SentencePiece with scores."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
from tiny import FULL, SLIDING, tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # token types of the GGUF specification
WINDOW = 8


def every_way(core: Tokenizer) -> Tokenizer:
    """The same tokens, each made of any two others that it is made of, as conversions from SentencePiece list them."""
    values = json.loads(core.to_str())
    known = {token: index for token, index in values["model"]["vocab"].items() if token not in {*SPECIAL, *BYTES}}
    cuts = [(known[token], token[:at], token[at:]) for token in known for at in range(1, len(token))]
    merges = [(index, first, second) for index, first, second in cuts if first in known and second in known]
    values["model"]["merges"] = [[first, second] for _, first, second in sorted(merges, key=lambda each: each[0])]
    return Tokenizer.from_str(json.dumps(values))


def sentencepiece(words: int = 900, *, whole: bool = False) -> PreTrainedTokenizerFast:
    """A BPE with blanks as letters and bytes for what it does not know, as Gemma's; `whole`: merged in every way."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=words, special_tokens=SPECIAL + BYTES, show_progress=False)
    core.train_from_iterator([line for line in Path(__file__).read_text().splitlines() if line], trainer)
    if whole:
        core = every_way(core)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def gemma_file(path: Path, tokenizer: PreTrainedTokenizerFast):
    """Write the file; the model that it holds."""
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    model = tiny(
        "gemma3_text",
        vocab_size=len(vocabulary),
        tie_word_embeddings=True,
        sliding_window=WINDOW,
        layer_types=[SLIDING] * 5 + [FULL],
        rms_norm_eps=1e-6,
    )
    config = model.config
    writer = gguf.GGUFWriter(str(path), "gemma3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters[FULL]["rope_theta"])
    writer.add_sliding_window(WINDOW)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    writer.add_token_scores([0.0] * len(SPECIAL + BYTES) + [-float(i) for i in range(len(vocabulary) - 260)])
    kinds = {"<unk>": UNKNOWN} | dict.fromkeys(SPECIAL[:3], CONTROL) | dict.fromkeys(BYTES, BYTE)
    writer.add_token_types([kinds.get(token, NORMAL) for token in vocabulary])
    for name, token in (("bos", 2), ("eos", 1), ("unk", 3), ("pad", 0)):
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        stored = tensor + 1 if "norm" in name else tensor  # llama.cpp's norms multiply by what they hold
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), stored.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
