"""Train the embedded model from nothing, in about a minute on one data-centre GPU; `--help` lists the settings.

Writes a folder that `AutoModelForCausalLM.from_pretrained` loads: bf16 weights, tokenizer and `training.json`. Texts,
packing and first weights follow from `--seed`; GPU arithmetic is not repeatable bit for bit, so another run gives a
sister, not a copy.
"""

import argparse
import copy
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from corpus import build_tokenizer, save_tokenizer, training_rows
from generators import documents
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

IGNORED = -100


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The command line of every trained model: shape, texts, schedule."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256, help="inner width of the MLP")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=320, help="rows of --length tokens in a step")
    parser.add_argument("--length", type=int, default=160)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay of matrices")
    parser.add_argument("--stories", type=float, default=0.25, help="share of stories among the documents")
    parser.add_argument("--tales", type=float, default=0.1, help="share of tales; facts are the others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="processes that write text"
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="squeeze the schedule to end by then, on a slow machine"
    )
    parser.add_argument("--save-every", type=float, default=math.inf, help="seconds between two saves of the folder")
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    return parser


def parse() -> argparse.Namespace:
    """The command line of the dense model."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--skip", type=float, default=0.2, help="chance that a block is skipped, in every second row (stochastic depth)"
    )
    parser.add_argument("--start", type=Path, help="folder of a model to go on from, in place of a new one")
    return parser.parse_args()


def new_model(args: argparse.Namespace, vocabulary: int, marks: dict[str, int]) -> LlamaForCausalLM:
    """A stock Llama; projections that write to the residual stream start smaller, by the root of their number."""
    torch.manual_seed(args.seed)
    spread = 0.05
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=args.width,
        intermediate_size=args.hidden,
        num_hidden_layers=args.blocks,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        initializer_range=spread,
        tie_word_embeddings=True,
        **marks,
    )
    model = LlamaForCausalLM(config)
    for block in model.model.layers:
        for writer in (block.self_attn.o_proj, block.mlp.down_proj):
            torch.nn.init.normal_(writer.weight, std=spread / math.sqrt(2 * args.blocks))
    return model


def batches(args: argparse.Namespace, device: torch.device) -> Iterator[torch.Tensor]:
    """`args.steps` batches of token rows (B, T), written while the caller trains."""
    shares = {"stories": args.stories, "tales": args.tales}
    rest = torch.empty(0, args.length, dtype=torch.long)
    chunks = training_rows(
        args.steps * args.batch,
        seed=args.seed,
        length=args.length,
        folder=str(args.out),
        shares=shares,
        workers=args.workers,
    )
    for chunk in chunks:
        rest = torch.cat([rest, torch.from_numpy(chunk.astype("int64"))])
        while len(rest) >= args.batch:
            yield rest[: args.batch].to(device)
            rest = rest[args.batch :]


class StochasticDepth:
    """Skips blocks at random, row by row, while training; what is saved is a stock model.

    A small model trained at full depth has no block to spare. Large ones have; this gives a small one some of that
    redundancy (Huang et al. 2016; Fan et al. 2019). The first block always runs, and every second row runs all blocks.
    """

    def __init__(self, model: LlamaForCausalLM, chance: float, *, compiled: bool) -> None:
        self.chance = chance
        self.blocks = len(model.model.layers)
        self.keep_LB11: torch.Tensor | None = None
        for index, block in enumerate(model.model.layers):
            block.forward = self._skipping(torch.compile(block.forward) if compiled else block.forward, index)

    def draw(self, rows: int, device: torch.device) -> None:
        """Choose the blocks that each row of the next forward pass runs."""
        keep_LB = torch.rand(self.blocks, rows, device=device) >= self.chance
        keep_LB[0] = True
        keep_LB[:, ::2] = True
        self.keep_LB11 = keep_LB[:, :, None, None]

    def _skipping(self, forward: Callable[..., torch.Tensor], index: int) -> Callable[..., torch.Tensor]:
        def skipping(h_BTD: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
            out_BTD = forward(h_BTD, *rest, **named)
            return out_BTD if self.chance == 0 else torch.where(self.keep_LB11[index], out_BTD, h_BTD)

        return skipping


def rate(step: int, done: float, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine over the share `done` of the training, down to a hundredth."""
    return min(1.0, (step + 1) / args.warmup) * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def next_token_loss(logits_BTV: torch.Tensor, rows_BT: torch.Tensor, pad: int) -> torch.Tensor:
    """Mean cross entropy of every token of every document but its first, in float32."""
    targets_BT = rows_BT[:, 1:].masked_fill(rows_BT[:, 1:] == pad, IGNORED)
    return torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].float().flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED
    )


def dense_loss(
    model: LlamaForCausalLM, args: argparse.Namespace, device: torch.device, pad: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Loss of a batch (B, T), with blocks skipped at random."""
    depth = StochasticDepth(model, args.skip, compiled=not args.eager)

    def loss_of(rows_BT: torch.Tensor) -> torch.Tensor:
        depth.draw(len(rows_BT), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits_BTV = model(input_ids=rows_BT, use_cache=False).logits
        return next_token_loss(logits_BTV, rows_BT, pad)

    return loss_of


def train(
    model: PreTrainedModel,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    args: argparse.Namespace,
    device: torch.device,
    save: Callable[[list[dict[str, float]]], None],
) -> list[dict[str, float]]:
    """Next-token training on all tokens of all documents; returns the log. Saves every `args.save_every` seconds."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    torch._dynamo.config.suppress_errors = True  # a block that does not compile runs eagerly
    torch._dynamo.config.recompile_limit = 4 * args.blocks
    log: list[dict[str, float]] = []
    start = saved = time.perf_counter()
    for step, rows_BT in enumerate(islice(batches(args, device), args.steps)):
        seconds = time.perf_counter() - start
        done = max(step / args.steps, seconds / args.seconds)
        if done >= 1:
            print(f"{args.out.name}: {args.seconds:.0f} s are over at step {step}", flush=True)
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate(step, done, args)
        loss = loss_of(rows_BT)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == args.steps - 1:
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"train: loss {loss.item()} at step {step}; lower --lr")
            log.append({"step": step, "loss": round(loss.item(), 4), "seconds": round(seconds, 1)})
            left = seconds / max(done, 1e-9) * (1 - done)
            print(
                f"{args.out.name} step {step}/{args.steps} loss {loss.item():.4f} {seconds:.0f} s, {left:.0f} s left",
                flush=True,
            )
        if time.perf_counter() - saved >= args.save_every:
            save(log)
            saved = time.perf_counter()
    return log


def new_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerFast:
    """The tokenizer of all trained models, written to `args.out` too, where the writers of text read it."""
    args.out.mkdir(parents=True, exist_ok=True)
    texts = (prompt + rest for prompt, rest in islice(documents("tokenizer", stories=0.25, tales=0.1), 20_000))
    tokenizer = build_tokenizer(texts, args.vocabulary, 512)
    save_tokenizer(tokenizer, args.out)
    return tokenizer


def marks_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Ids of the tokens that frame a text, as configs name them."""
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def save_model(
    model: PreTrainedModel, marks: dict[str, int], args: argparse.Namespace, log: list[dict[str, float]]
) -> None:
    """Weights in bf16, configs and `training.json`; each file of an earlier save stays until the new one is whole."""
    whole = args.out / "partial"
    copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(whole)
    GenerationConfig(do_sample=False, max_new_tokens=112, **marks).save_pretrained(whole)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "start")}
    record = {
        "settings": settings,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "log": log,
    }
    (whole / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    for path in whole.iterdir():
        path.replace(args.out / path.name)
    whole.rmdir()


def describe(model: PreTrainedModel, args: argparse.Namespace) -> None:
    """A line on what is about to be trained."""
    size = sum(weight.numel() for weight in model.parameters())
    tokens = args.steps * args.batch * args.length
    print(f"{args.out.name}: {size:,} parameters, {tokens:,} tokens, on {model.device}", flush=True)


def main() -> None:
    """Tokenizer, training, folder."""
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    tokenizer = new_tokenizer(args)
    marks = marks_of(tokenizer)
    model = (
        LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32)
        if args.start
        else new_model(args, len(tokenizer), marks)
    )
    model.to(device).train()
    describe(model, args)
    save = functools.partial(save_model, model, marks, args)
    save(train(model, dense_loss(model, args, device, tokenizer.pad_token_id), args, device, save))


if __name__ == "__main__":
    main()
