"""Does it matter how the pruned model learns: LoRA or all weights, AdamW or Muon, blocks that go at once or by and by.

    python benchmarks/coder/ways_to_learn.py MODEL --text 'RUN/train/data/dense-*.jsonl' --out ways.jsonl \\
        --drop 9 10 11 18 --tokens 1e6 --ways lora+2e-4 all+3e-5 muon+3e-5 lora+2e-4+fade lora+2e-4+steps

MODEL is a folder that transformers loads; the text is what a run of `recover` had the dense model write. Every way
starts from the same model, learns from the same rows in the same order, every token scored, by KL to the dense model,
AdamW or Muon, cosine to zero; it is judged by KL on rows that no way learns from. Nothing of `recover` is used.

A way is WHAT+RATE[+HOW]. `lora`: adapters of rank 64 on all linears, alpha 128. `all`: all weights of the blocks, held
in float32. `muon`: the same by Muon (momentum made orthogonal, scaled as AdamW's steps are: arXiv 2502.16982), norms
and biases by AdamW. `fade`: what a dropped block adds is scaled from 1 to 0 over the first half of the steps. `steps`:
the blocks go one after the other within the first half.

Shapes: B rows, T tokens, N scored tokens, D width, V vocabulary.
"""

from __future__ import annotations

import argparse
import glob
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

LONGEST, HELD, CHUNK, RANK, ALPHA, WARMUP, FIRST = 768, 96, 1024, 64, 128, 0.05, 48
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Row = tuple[list[int], int]  # tokens, and how many of them are the prompt
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="pattern of files")
    parser.add_argument("--out", type=Path, required=True, help="a line of JSON for each way, appended")
    parser.add_argument("--ways", nargs="+", required=True)
    parser.add_argument("--drop", nargs="+", type=int, required=True, help="numbers of blocks")
    parser.add_argument("--tokens", type=float, default=1e6)
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step (%(default)s)")
    options = parser.parse_args()
    # cuDNN's backward under a mask of padding gave NaN on an H200 (torch 2.11).
    torch.backends.cuda.enable_cudnn_sdp(False)
    rows = rows_of(options.text, AutoTokenizer.from_pretrained(options.model))
    held, rows = rows[:HELD], rows[HELD:]
    dense: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=HALF).to(DEVICE).eval().requires_grad_(False)
    for way in options.ways:
        found = learn(way, options, dense, rows, held)
        print(json.dumps(found), flush=True)
        with options.out.open("a") as file:
            file.write(json.dumps(found) + "\n")


def rows_of(pattern: str, tokenizer: Any) -> list[Row]:
    """What the dense model wrote, each row behind its prompt, in an order that is the same each time."""
    rows = []
    for path in sorted(glob.glob(pattern, recursive=True)):
        for line in Path(path).read_text().splitlines():
            for prompt, answer in json.loads(line)["rows"]:
                ids = asked(tokenizer, prompt)
                if len(ids) + len(answer) <= LONGEST:
                    rows.append(([*ids, *answer], len(ids)))
    random.Random(0).shuffle(rows)
    return rows


def asked(tokenizer: Any, prompt: str) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer(prompt)["input_ids"]
    said = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)


def padded(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """ids_BT, mask_BT, and which positions predict a token of the answer."""
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    mask_BT, answer_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT, dtype=torch.bool)
    for number, (ids, prompt) in enumerate(rows):
        ids_BT[number, : len(ids)] = torch.tensor(ids)
        mask_BT[number, : len(ids)] = 1
        answer_BT[number, prompt - 1 : len(ids) - 1] = True
    return ids_BT.to(DEVICE), mask_BT.to(DEVICE), answer_BT.to(DEVICE)


class Student:
    """The model that learns, its blocks that go, and what of it learns."""

    def __init__(self, source: str, what: str, how: str, drop: Sequence[int]) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=HALF if what == "lora" else torch.float32)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # also where it is the embedding's
        model = model.to(DEVICE).requires_grad_(what != "lora")
        model.lm_head.to(HALF).requires_grad_(False)
        model.model.embed_tokens.requires_grad_(False)
        self.gates = [1.0 if how else 0.0] * len(drop)
        for place, block in enumerate(drop):
            self._gate(model.model.layers[block], place)
        if what == "lora":
            settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, task_type="CAUSAL_LM")
            model = get_peft_model(model, settings).get_base_model()
        self.body, self.head = model.model, model.lm_head
        self.learns = [each for each in model.parameters() if each.requires_grad]
        for each in self.learns:
            each.data = each.data.float()

    def _gate(self, block: Any, place: int) -> None:
        """What the block adds to the residual stream is scaled."""
        stock = block.forward

        def forward(hidden_states: Tensor, *args: Any, **others: Any) -> Any:
            gate = self.gates[place]
            if gate == 0:
                return hidden_states
            return hidden_states + gate * (stock(hidden_states, *args, **others) - hidden_states)

        block.forward = forward

    def stand_at(self, how: str, share: float) -> None:
        """After this share of the steps."""
        count = len(self.gates)
        if how == "fade":
            self.gates = [max(0.0, 1 - 2 * share)] * count
        elif how == "steps":
            self.gates = [0.0 if share >= 0.5 * place / count else 1.0 for place in range(count)]


def kl_of(student: Student, dense: Any, ids_BT: Tensor, mask_BT: Tensor, at_BT: Tensor) -> Tensor:
    """KL(dense || student) at the positions of `at_BT`, (N,); logits come in chunks, and again in backward."""

    def part(dense_ND: Tensor, own_ND: Tensor) -> Tensor:
        logp_NV = F.log_softmax(dense.lm_head(dense_ND).float(), -1)
        logq_NV = F.log_softmax(student.head(own_ND).float(), -1)
        return (logp_NV.exp() * (logp_NV - logq_NV)).sum(-1)

    with torch.autocast(DEVICE, HALF, enabled=DEVICE == "cuda"):
        with torch.no_grad():
            dense_ND = dense.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state[at_BT]
        own_ND = student.body(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state[at_BT]
        pairs = zip(dense_ND.split(CHUNK), own_ND.split(CHUNK), strict=True)
        return torch.cat([checkpoint(part, *pair, use_reentrant=False) for pair in pairs])  # type: ignore[arg-type]


class Muon(torch.optim.Optimizer):
    """Momentum of 0.95 (Nesterov's), made orthogonal; the root mean square of a step is 0.2 of the rate."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for each in group["params"]:
                if each.grad is None:  # of a block that is gone
                    continue
                momentum = self.state[each].setdefault("momentum", torch.zeros_like(each))
                momentum.lerp_(each.grad, 0.05)
                alike.setdefault(each.shape, []).append((each, each.grad.lerp(momentum, 0.95)))
            for shape, found in alike.items():
                moves = orthogonal(torch.stack([move for _, move in found])) * 0.2 * math.sqrt(max(shape))
                for (each, _), move in zip(found, moves, strict=True):
                    each.sub_(move * group["lr"])


def orthogonal(x: Tensor) -> Tensor:
    """Nearly U V^T of x = U S V^T, by five Newton-Schulz steps with the coefficients of Keller Jordan's Muon."""
    wide = x.to(HALF) if x.shape[-2] <= x.shape[-1] else x.to(HALF).mT
    wide = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return (wide if x.shape[-2] <= x.shape[-1] else wide.mT).float()


def optimizers(what: str, learns: Sequence[nn.Parameter], lr: float) -> list[torch.optim.Optimizer]:
    matrices = [each for each in learns if each.ndim == 2] if what == "muon" else []
    others = [each for each in learns if what != "muon" or each.ndim != 2]
    adam = torch.optim.AdamW(others, lr=lr, weight_decay=0.0, fused=DEVICE == "cuda")
    return [adam, Muon(matrices, lr)] if matrices else [adam]


def batches(rows: Sequence[Row], size: int, tokens: float) -> Iterator[Sequence[Row]]:
    order = list(rows)
    random.Random(1).shuffle(order)
    seen = 0
    for start in range(0, len(order) - size + 1, size):
        if seen >= tokens:
            return
        yield order[start : start + size]
        seen += sum(len(ids) for ids, _ in order[start : start + size])


def learn(
    way: str, options: argparse.Namespace, dense: Any, rows: Sequence[Row], held: Sequence[Row]
) -> dict[str, Any]:
    """The row of one way."""
    what, rate, *rest = way.split("+")
    how, lr = "".join(rest), float(rate)
    torch.manual_seed(0)
    student = Student(options.model, what, how, options.drop)
    steps = list(batches(rows, options.batch, options.tokens))
    both, began = optimizers(what, student.learns, lr), time.perf_counter()
    for number, picked in enumerate(steps):
        student.stand_at(how, number / len(steps))
        rise, fall = (number + 1) / max(1.0, WARMUP * len(steps)), 0.5 * (1 + math.cos(math.pi * number / len(steps)))
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, rise) * fall
        ids_BT, mask_BT, _ = padded(picked)
        kl_of(student, dense, ids_BT, mask_BT, mask_BT.bool()).mean().backward()
        nn.utils.clip_grad_norm_(student.learns, 1.0)
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    seconds = round(time.perf_counter() - began, 1)
    student.gates = [0.0] * len(student.gates)
    tokens = sum(len(ids) for picked in steps for ids, _ in picked)
    told = {"way": way, "drop": options.drop, "steps": len(steps), "tokens": tokens, "seconds": seconds}
    return {**told, **judged(student, dense, held)}


@torch.no_grad()
def judged(student: Student, dense: Any, held: Sequence[Row]) -> dict[str, float]:
    """Mean and tail of KL over the answers, and the mean over their first tokens."""
    every, first = [], []
    for start in range(0, len(held), 16):
        ids_BT, mask_BT, at_BT = padded(held[start : start + 16])
        counts = at_BT.sum(1).tolist()
        for kl_N in kl_of(student, dense, ids_BT, mask_BT, at_BT).split(counts):
            every.append(kl_N)
            first.append(kl_N[:FIRST])
    tail = round(float(torch.cat(every).quantile(0.99)), 4)
    return {"kl": mean(every), "kl_first": mean(first), "kl_p99": tail}


def mean(parts: Sequence[Tensor]) -> float:
    return round(float(torch.cat(list(parts)).mean()), 5)


if __name__ == "__main__":
    main()
