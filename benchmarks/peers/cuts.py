"""What goes, by each tool's own way to choose it; of about as many parameters, but for zeros, which are stored.

A peer's cut takes a stock model and gives a stock model. Ours give a plan (`workbench.py`). Peers choose on sequences
of the recovery's own text, so that what differs is how they choose.

`influence`: blocks of the lowest block influence, 1 - cos(in, out), all scored at once (ShortGPT, arXiv 2403.03853;
LLM-Drop's block drop is the same score). `hand`: the blocks before the last one. `maw`, `maw-text`: neurons by
optipfair, from weights alone, and with activations. `wanda`: half of the weights of each output row zero, block after
block (arXiv 2306.11695), written from the paper: the authors' own file calls blocks in a way that transformers has
given up. `tests/test_peers.py` holds it against their file, where a clone of it is at hand.

Legend: T tokens, D width, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from recover.models.arch import blocks_of

SPARSITY = 0.5


@dataclass(frozen=True)
class Size:
    """How much goes: whole blocks; or of each MLP all neurons but so many; or zeros."""

    blocks: int
    neurons: int
    sparsity: float = SPARSITY

    @classmethod
    def of(cls, config: Any, blocks: int) -> Size:
        """As many neurons as hold the parameters of so many blocks, in steps that kernels like."""
        width, neurons, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        head = getattr(config, "head_dim", None) or width // config.num_attention_heads
        attention = 2 * width * head * (config.num_attention_heads + config.num_key_value_heads)
        gone = blocks * (attention + 3 * width * neurons) / (3 * width * depth)
        step = 64 if neurons >= 1024 else 8
        return cls(blocks, round((neurons - gone) / step) * step)


Cut = Callable[[Any, Sequence[Tensor], Size], tuple[Any, dict[str, Any]]]


def influence(model: Any, ids_1T: Sequence[Tensor], size: Size) -> tuple[Any, dict[str, Any]]:
    """Without the `size.blocks` blocks of the lowest influence."""
    scores = influences(model, ids_1T)
    order = sorted(range(len(scores)), key=scores.__getitem__)
    return dropped(model, order[: size.blocks])


def influences(model: Any, ids_1T: Sequence[Tensor]) -> list[float]:
    """Of each block 1 - cos(in, out), mean over all tokens."""
    sums, tokens = [0.0] * len(blocks_of(model)), 0

    def seen(number: int) -> Callable[..., None]:
        def look(_block: nn.Module, given: tuple[Tensor, ...], out: Any) -> None:
            out_1TD = out[0] if isinstance(out, tuple) else out
            sums[number] += float((1 - cosine_similarity(given[0].float(), out_1TD.float(), dim=-1)).sum())

        return look

    hooks = [block.register_forward_hook(seen(number)) for number, block in enumerate(blocks_of(model))]
    with torch.no_grad():
        for ids in ids_1T:
            model(input_ids=ids.to(model.device), use_cache=False)
            tokens += ids.numel()
    for hook in hooks:
        hook.remove()
    return [total / tokens for total in sums]


def hand(model: Any, _ids: Sequence[Tensor], size: Size) -> tuple[Any, dict[str, Any]]:
    """Without the blocks just before the last one."""
    last = len(blocks_of(model)) - 1
    return dropped(model, range(last - size.blocks, last))


def dropped(model: Any, gone: Sequence[int]) -> tuple[Any, dict[str, Any]]:
    """The model without these blocks, in place, numbered anew; and their numbers."""
    blocks: list[Any] = list(blocks_of(model))
    kept = [number for number in range(len(blocks)) if number not in set(gone)]
    for number, source in enumerate(kept):
        blocks[source].self_attn.layer_idx = number
    model.model.layers = nn.ModuleList(blocks[source] for source in kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[source] for source in kept]
    return model, {"dropped": sorted(gone)}


def maw(model: Any, _ids: Sequence[Tensor], size: Size) -> tuple[Any, dict[str, Any]]:
    """optipfair: neurons whose gate and up weights span the least (its method MAW)."""
    return _optipfair(model, size, None)


def maw_text(model: Any, ids_1T: Sequence[Tensor], size: Size) -> tuple[Any, dict[str, Any]]:
    """optipfair's MAW with its norms of activations on text."""
    return _optipfair(model, size, [{"input_ids": ids} for ids in ids_1T])


def _optipfair(model: Any, size: Size, text: Any) -> tuple[Any, dict[str, Any]]:
    import optipfair  # pyright: ignore[reportMissingImports]  # a peer: only who compares with it has it

    neurons = model.config.intermediate_size
    share = 100 * (neurons - size.neurons + 0.5) / neurons  # it cuts the number of neurons down to a whole one
    cut = optipfair.prune_model(
        model, neuron_selection_method="MAW", pruning_percentage=share, dataloader=text, show_progress=False
    )
    return cut, {"neurons": cut.config.intermediate_size}


def wanda(model: Any, ids_1T: Sequence[Tensor], size: Size) -> tuple[Any, dict[str, Any]]:
    """In each output row the weights of lowest |W| * ||x|| are zero; a block sees what the zeros before it left."""
    for block in blocks_of(model):
        layers = [layer for layer in block.modules() if isinstance(layer, nn.Linear)]
        for layer, norms_I in zip(layers, input_norms(model, block, layers, ids_1T), strict=True):
            score_OI = layer.weight.detach().abs().float() * norms_I
            lowest = score_OI.argsort(dim=1, stable=True)[:, : int(layer.in_features * size.sparsity)]
            layer.weight.data.scatter_(1, lowest, 0)
    return model, {"sparsity": size.sparsity}


class _Enough(Exception):
    """What lies behind a block need not be run."""


@torch.no_grad()
def input_norms(model: Any, block: nn.Module, layers: Sequence[nn.Module], ids_1T: Sequence[Tensor]) -> list[Tensor]:
    """Of each linear layer of a block the norm of each input feature over all tokens (I)."""
    squares: dict[nn.Module, Tensor] = {}

    def see(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        found_I = given[0].float().square().flatten(0, -2).sum(0)
        squares[layer] = squares[layer] + found_I if layer in squares else found_I

    def stop(*_: Any) -> None:
        raise _Enough

    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    hooks.append(block.register_forward_hook(stop))
    for ids in ids_1T:
        try:
            model(input_ids=ids.to(model.device), use_cache=False)
        except _Enough:
            continue
    for hook in hooks:
        hook.remove()
    return [squares[layer].sqrt() for layer in layers]


PEERS: dict[str, Cut] = {"influence": influence, "hand": hand, "maw": maw, "maw-text": maw_text, "wanda": wanda}
