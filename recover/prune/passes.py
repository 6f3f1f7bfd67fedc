"""What a pass over one calibration batch shows: the residual stream, the final hidden states, and what they make.

Shapes: B batch, T tokens, N tokens (B * T), D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import LongTensor, Tensor, nn

from recover.maths.divergence import kl, log_probabilities, var_p, widen
from recover.models.arch import arch_of, blocks_of, final_norm_of, head_of, middle_hooks
from recover.models.site import SUBLAYERS, Site

if TYPE_CHECKING:
    from recover.models.twin import Twin

TOKENS = 512  # token positions whose logits are held at once
NO_TARGET = -100  # cross_entropy's mark for positions without a next token

LogitMeasure = Callable[[Tensor, Tensor], Tensor]  # (z_dense_NV, z_pruned_NV) -> one value a row


def point_of(site: Site) -> int:
    """The point of the residual stream that a site reads; it writes the next one. Point 2 b is the input of block b."""
    return 2 * site.block + SUBLAYERS.index(site.part)


def site_at(point: int) -> Site:
    """The site that reads this point of the residual stream."""
    return Site(point // 2, SUBLAYERS[point % 2])


def final_hidden(twin: Twin, ids_BT: LongTensor, closed: Iterable[int | Site] = ()) -> Tensor:
    """Hidden states after the final norm, (N, D), with exactly `closed` closed."""
    seen: list[Tensor] = []

    def see(_module: nn.Module, _args: Any, output: Tensor) -> None:
        seen.append(output)

    with torch.no_grad():
        run(twin, ids_BT, closed, [final_norm_of(twin.model).register_forward_hook(see)])
    return seen[0].flatten(0, 1)


def block_inputs(twin: Twin, ids_BT: LongTensor, closed: Iterable[int | Site] = ()) -> list[Tensor]:
    """The residual stream (B, T, D) at the input of every block and, last, of the final norm."""
    blocks = len(blocks_of(twin.model))
    seen = residual_stream(twin, ids_BT, closed, range(0, 2 * blocks + 1, 2))
    return [seen[2 * block] for block in range(blocks + 1)]


@torch.no_grad()
def residual_stream(
    twin: Twin, ids_BT: LongTensor, closed: Iterable[int | Site] = (), points: Iterable[int] | None = None
) -> dict[int, Tensor]:
    """The residual stream (B, T, D) at these points (`point_of`), or at all: 2 blocks + 1, the last before the norm."""
    seen: dict[int, Tensor] = {}
    wanted = set(range(2 * len(blocks_of(twin.model)) + 1) if points is None else points)
    run(twin, ids_BT, closed, stream_hooks(twin, seen, wanted))
    return seen


def stream_hooks(twin: Twin, seen: dict[int, Tensor], wanted: set[int]) -> list[Any]:
    """Hooks that put the wanted points of the residual stream into `seen` as a forward passes them."""
    arch, blocks = arch_of(twin.model), blocks_of(twin.model)
    whole = set(blocks)

    def see(point: int) -> Any:
        # The first module of an MLP that runs reads the stream itself: the norm before it, or it (OLMo 2).
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            if point in wanted:
                seen.setdefault(point, args[0])
            if module in whole and module.closed and point + 1 in wanted:
                seen[point + 1] = args[0]  # a closed block runs none of its modules, and hands its input on

        return hook

    hooks = [final_norm_of(twin.model).register_forward_pre_hook(see(2 * len(blocks)))]
    for index, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(see(2 * index)))
        if arch.parallel(twin.base.config):
            hooks += middle_hooks(block, arch, lambda h_BTD, point=2 * index + 1: seen.setdefault(point, h_BTD))
            continue
        for name in (*arch.mlp_norms, arch.mlp):
            hooks.append(block.get_submodule(name).register_forward_pre_hook(see(2 * index + 1)))
    return hooks


def run(twin: Twin, ids_BT: LongTensor, closed: Iterable[int | Site], hooks: list[Any]) -> None:
    """One pass with exactly `closed` closed and the given hooks, which are removed after it."""
    try:
        with twin.closed(set(closed)):
            # One position of logits: full logits would be the largest tensor of the pass, and nobody reads them.
            twin.model(input_ids=ids_BT.to(twin.model.device), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()


def kl_rows(z_dense_NV: Tensor, z_pruned_NV: Tensor) -> Tensor:
    """KL(dense || pruned) of each row, T = 1."""
    return kl(log_probabilities(z_dense_NV), log_probabilities(z_pruned_NV))


def variance_rows(z_dense_NV: Tensor, z_pruned_NV: Tensor) -> Tensor:
    """Var_p(dz) / 2 of each row: KL(dense || pruned) to second order.

    Source: He et al., "Demystifying When Pruning Works via Representation Hierarchies", arXiv 2603.24652, theorem 3.
    """
    return var_p(log_probabilities(z_dense_NV), widen(z_pruned_NV) - widen(z_dense_NV)) / 2


@torch.no_grad()
def row_sum(twin: Twin, rows: LogitMeasure, dense_ND: Tensor, pruned_ND: Tensor) -> float:
    """Sum over tokens of a measure of both views' logits, from final hidden states; TOKENS rows of logits at once."""
    head = head_of(twin.model).ready()
    total = torch.zeros((), dtype=torch.float64, device=dense_ND.device)
    for dense, pruned in zip(dense_ND.split(TOKENS), pruned_ND.split(TOKENS), strict=True):
        total += rows(head.logits(dense), head.logits(pruned)).double().sum()
    return float(total)


def next_tokens(ids_BT: LongTensor) -> Tensor:
    """(N,) The token that each position has to say; NO_TARGET at the end of a sample."""
    return nn.functional.pad(ids_BT[:, 1:], (0, 1), value=NO_TARGET).flatten()


@torch.no_grad()
def nll_sum(twin: Twin, hidden_ND: Tensor, targets_N: Tensor) -> float:
    """Sum over targets of -log p(target), from final hidden states."""
    head = head_of(twin.model).ready()
    total = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
    for hidden, targets in zip(hidden_ND.split(TOKENS), targets_N.to(hidden_ND.device).split(TOKENS), strict=True):
        total += nn.functional.cross_entropy(
            head.logits(hidden), targets, ignore_index=NO_TARGET, reduction="sum"
        ).double()
    return float(total)
