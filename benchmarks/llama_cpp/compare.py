"""Does llama.cpp compute what transformers does, of a model pruned and exported here? Greedy text, logit by logit.

    pip install . llama-cpp-python
    python benchmarks/smollm2/fetch.py
    python benchmarks/llama_cpp/compare.py --out /tmp/llama_cpp

For each case (dense, blocks dropped, half of the weights zero) and each type of GGUF file (q8_0: quantized by llama.cpp
from the float32 file): the chat prompt is rendered and tokenized by llama.cpp from the file alone, then both programs
continue it greedily, each from its own tokens; transformers computes in float32 throughout. "logits differ by" is the
largest difference of any logit while the texts agree. Where they part, the gap between the two best logits is set
against it: in a file of ours, a gap of at most twice that is a tie which rounding decides, and any other a fault. q8_0
has other weights, so its gaps come without a verdict. Last, transformers reads the float32 file back.

Shapes: S decoding steps, V vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recover.base import artifacts, console
from recover.config.recipe import load_recipe
from recover.export.gguf.write import DTYPES, write_gguf
from recover.export.merge import merge
from recover.export.write import write_checkpoint
from recover.models.load import load_model, load_tokenizer
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.prune import registry
from recover.prune.calibrate import calibration_batches

ROOT = Path(__file__).parents[2]
CALIBRATION = ["prune.calibration.samples=8", "prune.calibration.length=256"]
CASES = {
    "dense": ("smollm2-135m-drop3.yaml", []),
    "drop3": ("smollm2-135m-drop3.yaml", ["prune.blocks=[16, 17, 18]", "prune.count=null", *CALIBRATION]),
    "wanda50": ("smollm2-135m-wanda50.yaml", CALIBRATION),
}
PROMPTS = (
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper and a lost ship.",
    "List five fruits, numbered from 1 to 5.",
    "What is 17 + 25? Show the steps.",
    "Write a Python function that adds the even numbers of a list.",
    "Explain in simple words why the sky is blue.",
    "Übersetze ins Englische: Der Hund schläft   unter dem Tisch.\n\n1. Satz",
    "Name three planets 🪐 and one fact about each.",
)


@dataclasses.dataclass(frozen=True)
class Text:
    """A greedy continuation: its tokens, and the logits that each was the best of."""

    tokens: list[int]
    logits_SV: np.ndarray


def main() -> None:
    """Run the cases, print the table, write compare.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, GGUF files and compare.json")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--files", nargs="+", default=["float32", "float16", "q8_0"], choices=[*DTYPES, "q8_0"])
    parser.add_argument("--tokens", type=int, default=64, help="longest continuation")
    parser.add_argument("--threads", type=int, default=1, help="of llama.cpp")
    options = parser.parse_args()
    rows = [row for case in options.cases for row in run_case(case, options)]
    artifacts.write_json(options.out / "compare.json", rows)
    lines = [shown(row) for row in rows]
    console.table("llama.cpp against transformers in float32", list(lines[0]), [list(line.values()) for line in lines])


def run_case(case: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Export, continue all prompts in transformers, then in llama.cpp from each type of file."""
    folder = export(case, options.out / case)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    encoded = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = [by_transformers(model, ids, options.tokens) for ids in encoded]
    rows = []
    for kind in options.files:
        path = write(folder, options.out / f"{case}-{kind}.gguf", kind)
        client = llama(path, options.threads)
        texts = [
            compared(text, by_llama(client, ids, options.tokens)) for text, ids in zip(expected, encoded, strict=True)
        ]
        rows.append(
            {
                "case": case,
                "file": kind,
                "mebibytes": path.stat().st_size / 2**20,
                "prompts_equal": sum(same_prompt(client, *pair) for pair in zip(chats, encoded, strict=True)),
                "largest_difference": max(text["largest_difference"] for text in texts),
                "texts": texts,
                "read_back": read_back(path, model) if kind == "float32" else None,
            }
        )
        console.say(str(shown(rows[-1])))
    return rows


def write(folder: Path, path: Path, kind: str) -> Path:
    """The GGUF file of this kind; q8_0 is made by llama.cpp's own quantizer from one of ours."""
    if kind in DTYPES:
        return write_gguf(folder, path, kind)
    import llama_cpp

    source = write_gguf(folder, path.with_name(f"{path.stem}-source.gguf"), "float32")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), parameters)
    assert not failed, f"llama.cpp does not quantize {source}"
    source.unlink()
    return path


def export(case: str, folder: Path) -> Path:
    """The deploy folder of a case, without recovery: two programs are compared, not two models."""
    recipe, overrides = CASES[case]
    loaded = load_recipe(ROOT / "recipes" / recipe, ["model.dtype=float32", *overrides])
    tokenizer, model = load_tokenizer(loaded.model), load_model(loaded.model)
    blocks = model.config.num_hidden_layers
    pruned: Any = (Plan.none(blocks),)
    if overrides:
        batches = calibration_batches(loaded.prune.calibration, tokenizer, loaded.seed)
        pruned = registry.prune(Twin(model, Plan.none(blocks)), loaded.prune, batches)
        model = load_model(loaded.model)  # a twin has changed the other's classes
    merged = merge(Twin(model, *pruned), torch.float32)
    record = {"recipe": {"name": f"smollm2-135m-{case}"}}
    return write_checkpoint(merged, tokenizer, folder, card=f"# {case}", record=record)


@torch.no_grad()
def by_transformers(model: Any, ids: list[int], tokens: int) -> Text:
    """Greedy, with a cache, until end of text."""
    prompt = torch.tensor([ids])
    options = {"do_sample": False, "max_new_tokens": tokens, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return Text(out.sequences[0, len(ids) :].tolist(), torch.cat(out.logits).float().numpy())


def llama(path: Path, threads: int) -> Any:
    """llama.cpp on this file, with keys and values in float32 (float16 is its default), so that only kernels differ."""
    import llama_cpp

    cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
    options = {"n_threads": threads, "n_threads_batch": threads, "logits_all": True, "verbose": False}
    return llama_cpp.Llama(str(path), n_ctx=512, **options, **cache)


def by_llama(client: Any, ids: list[int], tokens: int) -> Text:
    """Greedy, with a cache, until end of text."""
    client.reset()
    client.eval(ids)
    made, logits = [], []
    while len(made) < tokens and (not made or made[-1] != client.token_eos()):
        if made:
            client.eval(made[-1:])
        logits.append(client.scores[client.n_tokens - 1].copy())
        made.append(int(logits[-1].argmax()))
    return Text(made, np.stack(logits))


def same_prompt(client: Any, chat: list[dict[str, str]], expected: list[int]) -> bool:
    """Whether the file's own chat template and tokenizer, run by llama.cpp and its client, give the same ids."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    words = {f"{name}_token": client.metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    words = {name: client._model.token_get_text(int(token)) for name, token in words.items()}
    prompt = Jinja2ChatFormatter(client.metadata["tokenizer.chat_template"], **words)(messages=chat).prompt
    return client.tokenize(prompt.encode(), add_bos=False, special=True) == expected


def compared(expected: Text, found: Text) -> dict[str, Any]:
    """Where two continuations part (None: nowhere), how far logits are apart before, the gap of the two best there."""
    pairs = zip(expected.tokens, found.tokens, strict=False)
    parted = next((step for step, (one, other) in enumerate(pairs) if one != other), None)
    assert parted is not None or len(expected.tokens) == len(found.tokens), "one stops where the other goes on"
    agreed = slice(parted)
    largest = np.abs(expected.logits_SV[agreed] - found.logits_SV[agreed]).max(initial=0.0)
    record = {"tokens": len(expected.tokens), "parted_at": parted, "largest_difference": float(largest), "gap": None}
    if parted is not None:
        second, first = np.sort(expected.logits_SV[parted])[-2:]
        record["gap"] = float(first - second)
    return record


def read_back(path: Path, model: Any) -> bool:
    """Whether transformers' own GGUF reader gives every weight of the model, bit for bit."""
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    weights, expected = read.state_dict(), model.state_dict()
    return weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    texts = row["texts"]
    gaps = [text["gap"] for text in texts if text["parted_at"] is not None]
    verdict = {True: " (tie)", False: " (FAULT)"} if row["file"] in DTYPES else {True: "", False: ""}
    return {
        "model": row["case"],
        "file": row["file"],
        "MiB": row["mebibytes"],
        "same prompt": f"{row['prompts_equal']} of {len(texts)}",
        "same text": f"{len(texts) - len(gaps)} of {len(texts)}",
        "tokens": sum(text["tokens"] for text in texts),
        "logits differ by": row["largest_difference"],
        "parted at a gap of": ", ".join(f"{gap:.2g}{verdict[gap <= 2 * row['largest_difference']]}" for gap in gaps),
        "read back": {True: "equal", False: "DIFFERENT", None: None}[row["read_back"]],
    }


if __name__ == "__main__":
    main()
