"""Try the phenomenon on a trained folder: drop blocks, measure, recover, measure again; print a table.

Used to pick shape, number of blocks, rank, learning rate and tokens. Self-contained on purpose: agreement of these
figures with the framework's own is a check on both.
"""

import argparse
import copy
import json
import math
import random
import re
import time
from itertools import islice
from pathlib import Path

import torch
from corpus import encode, pack
from generators import Choice, documents, fact_items, held_out_stories, held_out_tales
from peft import LoraConfig, get_peft_model
from stories import Story
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

LONGEST = 96  # new tokens; solutions have about 65 and at most 83
LENGTH = 160  # tokens in a packed row
SCORED = 1 << 16  # bit that marks a token whose prediction counts, while rows are packed


def padded(
    sequences: list[list[int]], pad: int, device: torch.device, *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token rows (B, T) and their mask."""
    longest = max(map(len, sequences))
    rows = [[pad] * (longest - len(row)) + row if left else row + [pad] * (longest - len(row)) for row in sequences]
    marks = [
        [0] * (longest - len(row)) + [1] * len(row) if left else [1] * len(row) + [0] * (longest - len(row))
        for row in sequences
    ]
    return torch.tensor(rows, device=device), torch.tensor(marks, device=device)


@torch.no_grad()
def write(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    *,
    sample: bool = False,
    batch: int = 512,
) -> list[str]:
    """What the model writes after each prompt, up to `</s>`."""
    texts = []
    for start in range(0, len(prompts), batch):
        ids = tokenizer(prompts[start : start + batch])["input_ids"]
        rows_BT, mask_BT = padded(ids, tokenizer.pad_token_id, model.device, left=True)
        out = model.generate(
            input_ids=rows_BT,
            attention_mask=mask_BT,
            max_new_tokens=LONGEST,
            do_sample=sample,
            **({"top_k": 0} if sample else {}),
            pad_token_id=tokenizer.pad_token_id,
        )
        texts += tokenizer.batch_decode(out[:, rows_BT.shape[1] :], skip_special_tokens=True)
    return texts


def generation(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stories: list[Story]
) -> tuple[float, float]:
    """Share of stories whose last written number is the answer; share whose whole solution is right."""
    texts = write(model, tokenizer, [one.prompt for one in stories])
    right = sum((re.findall(r"\d+", text) or [""])[-1] == one.answer for text, one in zip(texts, stories, strict=True))
    whole = sum(text == one.solution for text, one in zip(texts, stories, strict=True))
    return right / len(stories), whole / len(stories)


@torch.no_grad()
def choice(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: list[Choice]) -> float:
    """Share of items whose right option has the highest summed log-likelihood."""
    starts = [len(tokenizer(item.prompt)["input_ids"]) for item in items]
    texts = [item.prompt + option for item in items for option in item.options]
    rows_BT, mask_BT = padded(tokenizer(texts)["input_ids"], tokenizer.pad_token_id, model.device)
    log_BTV = model(input_ids=rows_BT, attention_mask=mask_BT, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    token_BT = log_BTV.gather(-1, rows_BT[:, 1:, None])[..., 0]
    first_B1 = torch.tensor(starts, device=model.device).repeat_interleave(4)[:, None]
    place_T = torch.arange(1, rows_BT.shape[1], device=model.device)
    score_B = (token_BT * (place_T >= first_B1) * mask_BT[:, 1:]).sum(1)
    picked = score_B.view(-1, 4).argmax(1).tolist()
    return sum(pick == item.answer for pick, item in zip(picked, items, strict=True)) / len(items)


def kl_sum(dense_BTV: torch.Tensor, pruned_BTV: torch.Tensor, keep_BT: torch.Tensor) -> torch.Tensor:
    """Sum over kept tokens of KL(dense || pruned), in fp32."""
    p, q = dense_BTV.float().log_softmax(-1), pruned_BTV.float().log_softmax(-1)
    return ((p.exp() * (p - q)).sum(-1) * keep_BT).sum()


@torch.no_grad()
def greedy_drops(dense: LlamaForCausalLM, rows_BT: torch.Tensor, pad: int, most: int) -> list[tuple[int, float]]:
    """Blocks in the order in which their loss costs least, with the KL after each. Block 0 stays."""
    keep_BT = (rows_BT != pad).float()
    layers = list(dense.model.layers)
    target_BTV = dense(input_ids=rows_BT, use_cache=False).logits
    kept, dropped = list(range(len(layers))), []
    for _ in range(most):
        costs = {}
        for block in kept[1:]:
            dense.model.layers = torch.nn.ModuleList(layers[index] for index in kept if index != block)
            dense.config.num_hidden_layers = len(kept) - 1
            costs[block] = (
                kl_sum(target_BTV, dense(input_ids=rows_BT, use_cache=False).logits, keep_BT) / keep_BT.sum()
            ).item()
        block = min(costs, key=costs.__getitem__)
        kept.remove(block)
        dropped.append((block, costs[block]))
    dense.model.layers, dense.config.num_hidden_layers = torch.nn.ModuleList(layers), len(layers)
    return dropped


def without(dense: LlamaForCausalLM, blocks: list[int]) -> LlamaForCausalLM:
    """A copy of `dense` that lacks `blocks`."""
    pruned = copy.deepcopy(dense)
    pruned.model.layers = torch.nn.ModuleList(
        layer for index, layer in enumerate(pruned.model.layers) if index not in blocks
    )
    pruned.config.num_hidden_layers = len(pruned.model.layers)
    for index, layer in enumerate(pruned.model.layers):
        layer.self_attn.layer_idx = index
    return pruned


def recover(
    dense: LlamaForCausalLM,
    pruned: LlamaForCausalLM,
    marked_NT: torch.Tensor,
    *,
    tokens: int,
    lr: float,
    rank: int,
    batch: int,
) -> tuple[LlamaForCausalLM, int]:
    """LoRA on every projection, KL(dense || pruned) at the marked places, in new orders up to `tokens` of them."""
    torch.manual_seed(1)
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    student = get_peft_model(copy.deepcopy(pruned), settings)
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0, betas=(0.9, 0.95))
    filled = (marked_NT >= SCORED).float().mean().item()
    steps, warm = math.ceil(tokens / (batch * marked_NT.shape[1] * filled)), 8
    order, seen = torch.empty(0, dtype=torch.long), 0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / warm) * (1 + math.cos(math.pi * step / steps)) / 2
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(marked_NT))])
        marked_BT, order = marked_NT[order[:batch]], order[batch:]
        rows_BT, keep_BT = marked_BT % SCORED, (marked_BT >= SCORED).float()
        with torch.no_grad():
            target_BTV = dense(input_ids=rows_BT, use_cache=False).logits
        loss = kl_sum(target_BTV, student(input_ids=rows_BT, use_cache=False).logits, keep_BT) / keep_BT.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        seen += int(keep_BT.sum())
    return student.merge_and_unload(), seen


def mark(ids: list[int], first: int) -> list[int]:
    """`ids`, marked where the token after them is to be learned: from place `first` to the last but one."""
    return [one + SCORED if first <= place < len(ids) - 1 else one for place, one in enumerate(ids)]


def main() -> None:
    """Dense, then for each n: pruned, then each recovery."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--drops", type=int, nargs="*", default=[2, 3, 4, 5, 6], help="numbers of blocks to drop and measure"
    )
    parser.add_argument("--recover", type=int, nargs="*", default=[4, 5], help="numbers of blocks to recover from")
    parser.add_argument("--tokens", type=int, nargs="*", default=[100_000, 200_000, 400_000])
    parser.add_argument("--lr", type=float, nargs="*", default=[3e-3])
    parser.add_argument("--rank", type=int, nargs="*", default=[16])
    parser.add_argument("--batch", type=int, default=8, help=f"rows of {LENGTH} tokens in a step")
    parser.add_argument("--prompts", type=int, default=3600, help="train-side prompts that the dense model completes")
    parser.add_argument("--stories", type=float, default=0.33, help="share of stories among them")
    parser.add_argument("--tales", type=float, default=0.04)
    parser.add_argument("--calibration", type=int, default=256, help="texts by which blocks are dropped")
    parser.add_argument(
        "--calibration-stories",
        type=float,
        default=0.0,
        help="share of stories among those; the others are facts and tales",
    )
    parser.add_argument(
        "--whole", action="store_true", help="learn the prompts too, not only what the dense model wrote"
    )
    parser.add_argument("--items", type=int, default=200, help="held-out items of each kind")
    parser.add_argument("--json", type=Path, help="append each result to this JSON-lines file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.folder)
    dense = LlamaForCausalLM.from_pretrained(args.folder, dtype=torch.float32).to(device).eval().requires_grad_(False)
    pad, start = tokenizer.pad_token_id, time.perf_counter()
    stories, tales, facts = (
        held_out_stories(7, args.items),
        held_out_tales(7, args.items),
        fact_items(7)[: 2 * args.items],
    )

    def show(label: str, model: LlamaForCausalLM, **more: float) -> None:
        right, whole = generation(model, tokenizer, stories)
        known, held = choice(model, tokenizer, facts), choice(model, tokenizer, tales)
        row = {
            "model": args.folder.name,
            "label": label,
            "generation": right,
            "whole": whole,
            "facts": known,
            "tales": held,
            **more,
        }
        print(
            f"{args.folder.name:12} {label:34} generation {right:6.1%} whole {whole:6.1%} facts {known:6.1%} "
            f"tales {held:6.1%} {more or ''} [{time.perf_counter() - start:.0f} s]",
            flush=True,
        )
        if args.json:
            with args.json.open("a") as lines:
                lines.write(json.dumps(row) + "\n")

    show("dense", dense)
    calibration = encode(
        tokenizer,
        [
            prompt + rest
            for prompt, rest in islice(documents("calibration", stories=args.calibration_stories), args.calibration)
        ],
    )
    rows_BT, _ = padded(calibration, pad, device)
    drops = greedy_drops(dense, rows_BT, pad, max(args.drops + args.recover))
    print("drops", [(block, round(cost, 3)) for block, cost in drops], flush=True)
    cut = {count: without(dense, [block for block, _ in drops[:count]]) for count in {*args.drops, *args.recover}}
    for count in sorted(cut):
        show(f"drop {count}", cut[count], kl=round(drops[count - 1][1], 4))
    prompts = [
        prompt for prompt, _ in islice(documents("teacher", stories=args.stories, tales=args.tales), args.prompts)
    ]
    random.Random(0).shuffle(prompts)
    texts = [prompt + text for prompt, text in zip(prompts, write(dense, tokenizer, prompts, sample=True), strict=True)]
    marked = [
        mark(ids, 0 if args.whole else len(start_ids) - 1)
        for ids, start_ids in zip(encode(tokenizer, texts), tokenizer(prompts)["input_ids"], strict=True)
        if len(ids) <= LENGTH
    ]
    rows = list(pack(marked, LENGTH, pad))
    marked_NT = torch.tensor(rows, device=device)
    print(
        f"teacher wrote {len(texts)} texts, {sum(map(len, marked)):,} tokens, "
        f"{int((marked_NT >= SCORED).sum()):,} scored, {len(rows)} rows [{time.perf_counter() - start:.0f} s]",
        flush=True,
    )
    for count in args.recover:
        for tokens, lr, rank in ((tokens, lr, rank) for rank in args.rank for lr in args.lr for tokens in args.tokens):
            began = time.perf_counter()
            student, seen = recover(dense, cut[count], marked_NT, tokens=tokens, lr=lr, rank=rank, batch=args.batch)
            seconds = round(time.perf_counter() - began, 1)
            show(f"drop {count} + {seen:,} lr {lr:g} r {rank}", student.eval(), seconds=seconds)


if __name__ == "__main__":
    main()
