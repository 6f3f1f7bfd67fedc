"""What rounding by importance brings a checkpoint, and whether it is llama.cpp's: KL to the float32 weights, bytes.

    python benchmarks/llama_cpp/importance.py DEPLOY text.jsonl other_text.jsonl --out OUT [--llama build/bin]

Importance is measured on the first tokens of TEXT, in samples of 256, as `llama-imatrix -c 256` cuts it. Files with and
without are dequantized and run in float32 on tokens of the other text. With `--llama`, a folder of llama.cpp's
programs, `llama-imatrix` measures the same tokens, and `llama-quantize` is given our matrix.

Shapes: N samples, T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from recover.config.recipe import Model
from recover.export.gguf.importance import Importance, importance_of, read_importance, write_importance
from recover.export.gguf.write import write_gguf
from recover.models.load import load_model, load_tokenizer

T = 256


def ids_of(tokenizer: Any, text: str, samples: int) -> torch.Tensor:
    """(N, T) The first tokens of a text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    count = min(samples, len(ids) // T)
    return torch.tensor(ids[: count * T]).view(count, T)


@torch.no_grad()
def log_probabilities(source: Path, ids_NT: torch.Tensor) -> list[torch.Tensor]:
    """(2, T, V) each."""
    model: Any = load_model(Model(source=str(source)))
    return [model(ids, use_cache=False).logits.log_softmax(-1) for ids in ids_NT.split(2)]


def perplexity(found: list[torch.Tensor], ids_NT: torch.Tensor) -> float:
    """Of each token after those before it in its sample."""
    parts = zip(found, ids_NT.split(2), strict=True)
    nll = [-logp[:, :-1].gather(-1, ids[:, 1:, None]).flatten() for logp, ids in parts]
    return float(torch.cat(nll).mean().exp())


def held_against_llama_cpp(folder: Path, ours: Importance, kind: str, llama: Path, out: Path) -> None:
    """Print how far apart the sums of both are, and how many tensors of both files differ."""
    exact = write_gguf(folder, out / "float32.gguf", "float32")
    asked = [llama / "llama-imatrix", "-m", exact, "-f", out / "text.txt", "-o", out / "llama.gguf", "-c", str(T)]
    subprocess.run([*asked, "-b", str(T), "-t", "1", "--no-ppl"], check=True, capture_output=True)
    theirs = read_importance(out / "llama.gguf")
    same = theirs.sums.keys() == ours.sums.keys()
    apart = max(float(np.abs(theirs.sums[name] - sums).max() / sums.max()) for name, sums in ours.sums.items())
    print(f"llama-imatrix: same {len(ours.sums)} matrices: {same}; apart by {apart:.2%} of a matrix's largest channel")
    asked = [llama / "llama-quantize", "--imatrix", out / "imatrix.gguf", exact, out / "quantized.gguf", kind.upper()]
    subprocess.run([*asked, "1"], check=True, capture_output=True)
    files = [gguf.GGUFReader(path).tensors for path in (out / f"{kind}-importance.gguf", out / "quantized.gguf")]
    mine, other = ({tensor.name: tensor for tensor in tensors} for tensors in files)
    equal = [
        tensor.tensor_type == other[name].tensor_type and np.array_equal(tensor.data, other[name].data)
        for name, tensor in mine.items()
    ]
    print(f"llama-quantize: {sum(equal)} of {len(equal)} tensors of {kind} are the same bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path, help="rows with a text")
    parser.add_argument("other", type=Path, help="rows with a text, on which the files are held against float32")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=["q4_k_m"])
    parser.add_argument("--letters", type=int, default=12_000, help="of the text")
    parser.add_argument("--samples", type=int, default=12, help="of the other text")
    parser.add_argument("--llama", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    text, other = (
        " ".join(json.loads(line)["text"] for line in path.read_text().splitlines()) for path in (args.text, args.other)
    )
    (args.out / "text.txt").write_text(text[: args.letters])
    cfg = Model(source=str(args.folder))
    tokenizer, model = load_tokenizer(cfg), load_model(cfg)
    seen = ids_of(tokenizer, text[: args.letters], args.letters)
    importance = importance_of(model, list(seen.split(4)), args.text.name)  # type: ignore[arg-type]
    write_importance(importance, args.out / "imatrix.gguf")
    ids_NT = ids_of(tokenizer, other, args.samples)
    exact = log_probabilities(args.folder, ids_NT)
    print(f"measured on {seen.numel():,} tokens; held against float32 on {ids_NT.numel():,} others")
    print(f"float32: perplexity {perplexity(exact, ids_NT):.2f}")
    for kind in args.kinds:
        for name, by in (("plain", None), ("importance", importance)):
            path = write_gguf(args.folder, args.out / f"{kind}-{name}.gguf", kind, by)
            found = log_probabilities(path, ids_NT)
            kl = torch.cat([(p.exp() * (p - q)).sum(-1).flatten() for p, q in zip(exact, found, strict=True)])
            size = path.stat().st_size
            print(f"{kind} {name}: {size:,} bytes, KL {kl.mean():.4f}, perplexity {perplexity(found, ids_NT):.2f}")
        if args.llama:
            held_against_llama_cpp(args.folder, importance, kind, args.llama, args.out)


if __name__ == "__main__":
    main()
