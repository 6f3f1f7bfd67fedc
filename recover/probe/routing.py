"""Who does the work in a mixture of experts: how many tokens each expert is given in both views, on the same text.

Shapes: B batch, T tokens, N tokens (B * T), P experts of a token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recover.models.arch import arch_of, base_of, blocks_of, experts_of, mixture_in
from recover.models.twin import Twin
from recover.probe.records import Routing
from recover.probe.views import Pair, View


@torch.no_grad()
def routing(twin: Twin | Pair, rows: Sequence[list[int]]) -> list[Routing]:
    """One record a block with a mixture (dense numbering), for these texts in token ids; none for a model without."""
    pair = Pair.of(twin)
    dense, pruned = (_tokens(view, rows) for view in (pair.dense, pair.pruned))
    return [Routing(block, dense[block], pruned.get(block, [])) for block in dense]


def _tokens(view: View, rows: Sequence[list[int]]) -> dict[int, list[int]]:
    """How many tokens each expert of a block was given; a closed block runs none, and is left out."""
    arch, model = arch_of(view.model), base_of(view.model)
    experts = experts_of(model.config)[0]
    counts: dict[int, Tensor] = {}

    def see(block: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            given_E = torch.bincount(output[2].flatten(), minlength=experts)
            counts[block] = counts[block] + given_E if block in counts else given_E

        return hook

    names = arch.experts
    mixed = [] if names is None else [block for block in enumerate(blocks_of(model)) if mixture_in(arch, block[1])]
    handles = [
        block.get_submodule(f"{arch.mlp}.{names.router}").register_forward_hook(see(view.numbers[index]))
        for index, block in mixed
        if names is not None
    ]
    try:
        with view.enter():
            for row in rows if mixed else ():
                model(input_ids=torch.tensor([row], device=model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return {block: given_E.tolist() for block, given_E in counts.items()}
