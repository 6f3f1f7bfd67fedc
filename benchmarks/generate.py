"""Tokens written per second: recover's slots beside transformers' own ways, same prompts, same model, one run.

    python benchmarks/generate.py                                             # embedded:fable-2m, on a CPU: 30 s
    python benchmarks/generate.py FOLDER_OR_GGUF --dtype bfloat16 --batch 256 # on a GPU: within 90 s

Greedy; every variant is warmed up, then timed once; only tokens up to the end token count. `equal` is the share of
texts whose ids are those of plain `generate`: 100% in float32 on a CPU; in low precision, ties fall either way. A
variant that fails or runs out of time says so in its row.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from recover import console, provenance, recipe
from recover.measure import decode
from recover.measure.decode import Writing, write
from recover.measure.generate import plain, writing
from recover.measure.prompts import batches_by_length, encode_prompt, left_pad
from recover.measure.task_file import load_task
from recover.models.load import load_model, load_tokenizer, ready
from recover.quiet import quiet_libraries
from recover.report import words

Texts = dict[int, list[int]]
Variant = Callable[[Any, Sequence[list[int]], Writing], Texts]

SUBJECTS = ("rivers", "the moon", "bread", "trains", "music", "snow", "trees", "the sea", "clocks", "bees")
ASKS = (
    "Tell me about {}.",
    "Write a short story about {}.",
    "Why are {} important? Give reasons.",
    "List five facts about {}, one a line, and say for each why it matters.",
    "Explain {} to a child.",
)


def main() -> None:
    arguments = _arguments()
    quiet_libraries()
    leaf = recipe.Model(source=arguments.model, dtype=arguments.dtype)
    model, tokenizer = ready(load_model(leaf)), load_tokenizer(leaf)
    is_gpu = model.device.type == "cuda"
    batch = arguments.batch or (256 if is_gpu else 16)
    count = arguments.prompts or (3 * batch if is_gpu else 5 * batch // 2)
    prompts_ids = [encode_prompt(tokenizer, prompt) for prompt in _prompts(arguments.model, count)]
    how = writing(model, tokenizer, max_new_tokens=arguments.tokens, batch_size=batch)
    console.say(
        f"{words.machine(provenance.machine())}; torch {torch.__version__}; {arguments.model}, {arguments.dtype}; "
        f"{count} prompts of {min(map(len, prompts_ids))} to {max(map(len, prompts_ids))} tokens, batch {batch}, "
        f"up to {arguments.tokens} new tokens"
    )
    rows = compare(model, prompts_ids, how, VARIANTS, time.monotonic() + arguments.seconds)
    console.table("ratio to plain generate", ["ratio", "variant", "tokens/s", "seconds", "tokens", "equal"], rows)
    sys.stdout.flush()
    os._exit(0)  # a variant that ran out of time may have left a thread at work, which would be waited for


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="embedded:fable-2m", help="folder, GGUF file, or embedded:NAME")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, help="rows written at a time (default: 256 on a GPU, else 16)")
    parser.add_argument("--prompts", type=int, help="default: 3 batches on a GPU, else 2.5")
    parser.add_argument("--tokens", type=int, default=128, help="most new tokens a text (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=80, help="for all variants together (default: %(default)s)")
    return parser.parse_args()


def _prompts(source: str, count: int) -> list[str]:
    """Held-out stories for the embedded model, which knows nothing else; instructions for others."""
    if source == "embedded:fable-2m":
        some = [item.prompt for item in load_task("embedded:stories").items]
    else:
        some = [ask.format(subject) for subject in SUBJECTS for ask in ASKS]
    return [some[number % len(some)] for number in range(count)]


def compare(
    model: Any, prompts_ids: Sequence[list[int]], how: Writing, variants: dict[str, Variant], deadline: float
) -> list[list[Any]]:
    """One row a variant; the first one is the reference."""
    rows: list[list[Any]] = []
    reference: tuple[float, Texts] | None = None
    for name, variant in variants.items():
        try:
            seconds, texts = _timed(variant, model, prompts_ids, how, deadline)
        except Exception as error:  # shown in the row: the other variants still count
            reason = " ".join(str(error).split())[:60]
            rows.append([None, f"{name}: {type(error).__name__}: {reason}", None, None, None, None])
            continue
        tokens = sum(map(len, texts.values()))
        reference = reference or (tokens / seconds, texts)
        equal = sum(texts[item] == ids for item, ids in reference[1].items()) / len(texts)
        rate = tokens / seconds
        rows.append([round(rate / reference[0], 2), name, round(rate), round(seconds, 2), tokens, f"{equal:.1%}"])
    return rows


def _timed(
    variant: Variant, model: Any, prompts_ids: Sequence[list[int]], how: Writing, deadline: float
) -> tuple[float, Texts]:
    def out_of_time(*_: Any) -> None:
        raise TimeoutError("out of time (--seconds)")

    left = deadline - time.monotonic()
    if left < 1:
        raise TimeoutError("no time left (--seconds)")
    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, left)
    try:
        with torch.no_grad():
            variant(model, prompts_ids[: how.rows], how)
            start = _now()
            texts = variant(model, prompts_ids, how)
            return _now() - start, texts
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def plain_generate(model: Any, prompts_ids: Sequence[list[int]], how: Writing) -> Texts:
    """Padded batches, each until its last row ends."""
    return dict(plain(model, prompts_ids, how))


def slots(model: Any, prompts_ids: Sequence[list[int]], how: Writing) -> Texts:
    """What recover uses."""
    return dict(write(model, prompts_ids, how))


def slots_unrecorded(model: Any, prompts_ids: Sequence[list[int]], how: Writing) -> Texts:
    """The same, every step run from Python."""
    may_record = decode.may_record
    decode.may_record = lambda model: False
    try:
        return slots(model, prompts_ids, how)
    finally:
        decode.may_record = may_record


def static_cache(model: Any, prompts_ids: Sequence[list[int]], how: Writing) -> Texts:
    """transformers' static cache, whose step it compiles by itself on a GPU."""
    texts: Texts = {}
    for batch in batches_by_length([len(ids) for ids in prompts_ids], how.rows):
        ids_BT, mask_BT = left_pad([prompts_ids[item] for item in batch], how.pad, model.device)
        output_BT = model.generate(
            input_ids=ids_BT, attention_mask=mask_BT, cache_implementation="static", **_greedy(how)
        )
        rows = output_BT[:, ids_BT.shape[1] :].tolist()
        texts |= {item: _cut(row, how.ends) for item, row in zip(batch, rows, strict=True)}
    return texts


def continuous_batching(model: Any, prompts_ids: Sequence[list[int]], how: Writing) -> Texts:
    """transformers' paged cache, rows filled again."""
    from transformers import GenerationConfig

    if model.device.type != "cuda":
        raise ValueError("needs a GPU")
    attention = model.config._attn_implementation
    try:
        settings = GenerationConfig(**_greedy(how))
        found = model.generate_batch(inputs=[list(ids) for ids in prompts_ids], generation_config=settings)
    finally:
        model.set_attn_implementation(attention)
    outputs = sorted(found.values(), key=lambda each: int(str(each.request_id).rsplit("_", 1)[-1]))
    if len(outputs) != len(prompts_ids):
        raise RuntimeError(f"{len(outputs)} of {len(prompts_ids)} texts came back")
    return {item: _cut(list(each.generated_tokens), how.ends) for item, each in enumerate(outputs)}


def _greedy(how: Writing) -> dict[str, Any]:
    return {
        "max_new_tokens": how.limit,
        "do_sample": False,
        "eos_token_id": list(how.ends),
        "pad_token_id": how.pad,
        "use_cache": True,
    }


def _cut(row: list[int], ends: Sequence[int]) -> list[int]:
    end = next((position for position, token in enumerate(row) if token in ends), len(row))
    return row[: end + 1]


VARIANTS: dict[str, Variant] = {
    "transformers generate": plain_generate,
    "recover": slots,
    "recover, no CUDA graph": slots_unrecorded,
    "transformers continuous batching": continuous_batching,
    "transformers static cache": static_cache,
}

if __name__ == "__main__":
    main()
