"""Train a small mixture of experts as the embedded dense model was trained; `--help` lists the settings.

Writes a folder that `AutoModelForCausalLM.from_pretrained` loads as a stock `Qwen3MoeForCausalLM`: bf16 weights,
tokenizer and `training.json`. Texts, packing and first weights follow from `--seed`; GPU arithmetic is not repeatable
bit for bit, so another run gives a sister, not a copy.

At this size it is fastest to let every expert compute every token, in two matrix products a block, and to give those
that the router did not choose a weight of 0: no sorting, and shapes that do not depend on the text. The first thing a
run does is to hold this forward pass against the stock one.

Shapes: B batch, T tokens, N = B T, D width, E experts, P of them chosen, I inner width of an expert, J = 2 I, O = D,
H heads, K width of a head, V vocabulary.
"""

import argparse
import functools
import math
import time
from collections.abc import Callable

import torch
from generators import fact_items, held_out_stories, held_out_tales
from torch import Tensor
from torch.nn import functional
from train import arguments, describe, marks_of, new_tokenizer, next_token_loss, save_model, train
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trial import choice, generation

Weights = tuple[Tensor, ...]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--experts", type=int, default=8, help="experts of a block, each of inner width --hidden")
    parser.add_argument("--chosen", type=int, default=2, help="experts that a token goes through")
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the loss that spreads tokens evenly")
    parser.add_argument("--items", type=int, default=200, help="held-out items of each kind to measure at the end")
    parser.set_defaults(blocks=12, width=112, heads=7, hidden=96, batch=256, steps=2200)
    return parser.parse_args()


def new_model(args: argparse.Namespace, vocabulary: int, marks: dict[str, int]) -> Qwen3MoeForCausalLM:
    """A stock Qwen3-MoE; projections that write to the residual stream start smaller, by the root of their number.

    Weights of the chosen experts sum to 1. Where only one is chosen they do not, for 1 would teach the router nothing.
    """
    torch.manual_seed(args.seed)
    spread = 0.05
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=args.width,
        intermediate_size=args.hidden * args.chosen,
        moe_intermediate_size=args.hidden,
        num_experts=args.experts,
        num_experts_per_tok=args.chosen,
        norm_topk_prob=args.chosen > 1,
        decoder_sparse_step=1,
        router_aux_loss_coef=args.balance,
        num_hidden_layers=args.blocks,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        head_dim=args.width // args.heads,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        initializer_range=spread,
        tie_word_embeddings=True,
        **marks,
    )
    model = Qwen3MoeForCausalLM(config)
    for block in model.model.layers:
        for writer in (block.self_attn.o_proj.weight, block.mlp.experts.down_proj):
            torch.nn.init.normal_(writer, std=spread / math.sqrt(2 * args.blocks))
    return model


def attend(h_BTD: Tensor, weights: Weights, cos_TK: Tensor, sin_TK: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """What attention adds to the residual stream."""
    norm_D, q_OD, k_OD, v_OD, o_DO, q_norm_K, k_norm_K = weights
    width = cos_TK.shape[-1]
    x_BTD = functional.rms_norm(h_BTD, norm_D.shape, norm_D, eps).to(dtype)

    def heads(weight_OD: Tensor) -> Tensor:
        return functional.linear(x_BTD, weight_OD.to(dtype)).unflatten(-1, (-1, width)).transpose(1, 2)

    def turned(x_BHTK: Tensor, norm_K: Tensor) -> Tensor:
        x_BHTK = functional.rms_norm(x_BHTK.float(), norm_K.shape, norm_K, eps)
        first, second = x_BHTK.chunk(2, -1)
        return (x_BHTK * cos_TK + torch.cat([-second, first], -1) * sin_TK).to(dtype)

    y_BHTK = functional.scaled_dot_product_attention(
        turned(heads(q_OD), q_norm_K), turned(heads(k_OD), k_norm_K), heads(v_OD), is_causal=True
    )
    return functional.linear(y_BHTK.transpose(1, 2).flatten(2), o_DO.to(dtype))


def mix(
    h_ND: Tensor, weights: Weights, keep_N: Tensor, eps: float, dtype: torch.dtype, chosen: int
) -> tuple[Tensor, Tensor]:
    """What the mixture adds to the residual stream, and how unevenly it is used: 1 where all experts are used alike.

    Source of the second: Fedus et al., Switch Transformers, arXiv 2101.03961, section 2.2; padding does not count.
    """
    norm_D, router_ED, in_EJD, out_EDI = weights
    experts, inner = out_EDI.shape[0], out_EDI.shape[2]
    x_ND = functional.rms_norm(h_ND, norm_D.shape, norm_D, eps)
    probability_NE = functional.linear(x_ND, router_ED).softmax(-1)
    value_NP, index_NP = probability_NE.topk(chosen, -1)
    if chosen > 1:
        value_NP = value_NP / value_NP.sum(-1, keepdim=True)
    weight_NE = torch.zeros_like(probability_NE).scatter(-1, index_NP, value_NP)
    both_NE2I = functional.linear(x_ND.to(dtype), in_EJD.flatten(0, 1).to(dtype)).unflatten(-1, (experts, 2, inner))
    y_NEI = functional.silu(both_NE2I[:, :, 0]) * both_NE2I[:, :, 1] * weight_NE[..., None].to(dtype)
    y_ND = functional.linear(y_NEI.flatten(1), out_EDI.transpose(0, 1).flatten(1).to(dtype))
    tokens = keep_N.sum()
    used_E = ((weight_NE > 0) * keep_N[:, None]).sum(0) / tokens
    mean_E = (probability_NE * keep_N[:, None]).sum(0) / tokens
    return y_ND, experts * (used_E * mean_E).sum() / chosen


def block(
    h_BTD: Tensor,
    attention: Weights,
    mixture: Weights,
    cos_TK: Tensor,
    sin_TK: Tensor,
    keep_N: Tensor,
    eps: float,
    dtype: torch.dtype,
    chosen: int,
) -> tuple[Tensor, Tensor]:
    """The residual stream behind a block, and the unevenness of its mixture."""
    h_BTD = h_BTD + attend(h_BTD, attention, cos_TK, sin_TK, eps, dtype)
    y_ND, uneven = mix(h_BTD.flatten(0, 1), mixture, keep_N, eps, dtype, chosen)
    return h_BTD + y_ND.view_as(h_BTD), uneven


def head_loss(h_BTD: Tensor, norm_D: Tensor, head_VD: Tensor, rows_BT: Tensor, eps: float, pad: int) -> Tensor:
    """Mean cross entropy from the residual stream behind the last block."""
    x_BTD = functional.rms_norm(h_BTD, norm_D.shape, norm_D, eps).to(head_VD.dtype)
    return next_token_loss(functional.linear(x_BTD, head_VD), rows_BT, pad)


class Fast:
    """The model's forward pass, written for speed: every expert computes every token."""

    def __init__(self, model: Qwen3MoeForCausalLM, *, dtype: torch.dtype, pad: int, compiled: bool) -> None:
        self.model, self.dtype, self.pad = model, dtype, pad
        self.block = torch.compile(block) if compiled else block
        self.head_loss = torch.compile(head_loss) if compiled else head_loss

    def stream(self, rows_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream behind the last block (B, T, D), and the mean unevenness of the blocks."""
        model, config = self.model.model, self.model.config
        h_BTD = model.embed_tokens(rows_BT)
        places_1T = torch.arange(rows_BT.shape[1], device=rows_BT.device)[None]
        cos_1TK, sin_1TK = model.rotary_emb(h_BTD, places_1T)
        keep_N = (rows_BT != self.pad).flatten().float()
        total = h_BTD.new_zeros(())
        for layer in model.layers:
            own, mlp = layer.self_attn, layer.mlp
            linears = (own.q_proj.weight, own.k_proj.weight, own.v_proj.weight, own.o_proj.weight)
            attention = (layer.input_layernorm.weight, *linears, own.q_norm.weight, own.k_norm.weight)
            experts = (mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj)
            mixture = (layer.post_attention_layernorm.weight, *experts)
            h_BTD, uneven = self.block(
                h_BTD,
                attention,
                mixture,
                cos_1TK[0],
                sin_1TK[0],
                keep_N,
                config.rms_norm_eps,
                self.dtype,
                config.num_experts_per_tok,
            )
            total = total + uneven
        return h_BTD, total / len(model.layers)

    def loss(self, rows_BT: Tensor) -> Tensor:
        """Cross entropy plus what uneven use of the experts costs."""
        h_BTD, uneven = self.stream(rows_BT)
        model, config = self.model.model, self.model.config
        head_VD = self.model.lm_head.weight.to(self.dtype)
        loss = self.head_loss(h_BTD, model.norm.weight, head_VD, rows_BT, config.rms_norm_eps, self.pad)
        return loss + config.router_aux_loss_coef * uneven


@torch.no_grad()
def check(model: Qwen3MoeForCausalLM, pad: int) -> None:
    """Raise ArithmeticError unless the fast forward pass gives what the stock one gives, in float32 on the CPU."""
    rows_BT = torch.randint(3, model.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    h_BTD, uneven = Fast(model, dtype=torch.float32, pad=pad, compiled=False).stream(rows_BT)
    ours_BTV = model.lm_head(model.model.norm(h_BTD))
    stock = model(input_ids=rows_BT, use_cache=False, output_router_logits=True)
    apart = (ours_BTV - stock.logits).abs().max().item()
    if not apart < 1e-3 or not math.isfinite(uneven.item()):
        raise ArithmeticError(f"the fast forward pass is {apart:.2g} from the stock logits, expected less than 0.001")
    print(f"fast and stock logits agree: {apart:.2g} apart, unevenness {uneven.item():.3f}", flush=True)


def measure(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, items: int) -> None:
    """Print held-out generation and choice."""
    start = time.perf_counter()
    model.eval().set_experts_implementation("eager")
    right, whole = generation(model, tokenizer, held_out_stories(7, items))
    facts, tales = (choice(model, tokenizer, asked) for asked in (fact_items(7)[:items], held_out_tales(7, items)))
    print(
        f"generation {right:.1%} whole {whole:.1%} facts {facts:.1%} tales {tales:.1%} "
        f"[{time.perf_counter() - start:.0f} s]",
        flush=True,
    )


def main() -> None:
    """Tokenizer, check, training, folder, figures."""
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    tokenizer = new_tokenizer(args)
    marks, pad = marks_of(tokenizer), tokenizer.pad_token_id
    model = new_model(args, len(tokenizer), marks).train()
    check(model, pad)
    model.to(device)
    describe(model, args)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    save: Callable[..., None] = functools.partial(save_model, model, marks, args)
    fast = Fast(model, dtype=dtype, pad=pad, compiled=not args.eager)
    save(train(model, fast.loss, args, device, save))
    if args.items:
        measure(model, tokenizer, args.items)


if __name__ == "__main__":
    main()
