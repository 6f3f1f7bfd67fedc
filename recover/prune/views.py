"""What a pass over one calibration batch shows: the residual stream, the final hidden states, and the KL they make.

Shapes: B batch, T tokens, N tokens (B * T), D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import LongTensor, Tensor, nn

from recover.models.arch import blocks_of, final_norm_of, head_of
from recover.probe.spaces import kl, log_probabilities

if TYPE_CHECKING:
    from recover.models.twin import Twin

TOKENS = 512  # token positions whose logits are held at once


def final_hidden(twin: Twin, ids_BT: LongTensor, closed: Iterable[int] = ()) -> Tensor:
    """Hidden states after the final norm, (N, D), with exactly the blocks `closed` closed."""
    seen: list[Tensor] = []

    def see(_module: nn.Module, _args: Any, output: Tensor) -> None:
        seen.append(output)

    _run(twin, ids_BT, closed, [final_norm_of(twin.model).register_forward_hook(see)])
    return seen[0].flatten(0, 1)


def block_inputs(twin: Twin, ids_BT: LongTensor, closed: Iterable[int] = ()) -> list[Tensor]:
    """The residual stream (B, T, D) at the input of every block and, last, of the final norm."""
    seen: list[Tensor] = []

    def see(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    modules = [*blocks_of(twin.model), final_norm_of(twin.model)]
    _run(twin, ids_BT, closed, [module.register_forward_pre_hook(see) for module in modules])
    return seen


@torch.no_grad()
def _run(twin: Twin, ids_BT: LongTensor, closed: Iterable[int], hooks: list[Any]) -> None:
    """One pass with the given hooks, which are removed after it."""
    try:
        with twin.closed(set(closed)):
            # One position of logits: full logits would be the largest tensor of the pass, and nobody reads them.
            twin.model(input_ids=ids_BT.to(twin.model.device), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def kl_sum(twin: Twin, dense_ND: Tensor, pruned_ND: Tensor) -> float:
    """Sum over tokens of KL(dense || pruned), T = 1, from final hidden states; logits exist for TOKENS rows at once."""
    logits = _head(twin)
    total = torch.zeros((), dtype=torch.float64, device=dense_ND.device)
    for dense, pruned in zip(dense_ND.split(TOKENS), pruned_ND.split(TOKENS), strict=True):
        total += kl(log_probabilities(logits(dense)), log_probabilities(logits(pruned))).double().sum()
    return float(total)


def _head(twin: Twin) -> Callable[[Tensor], Tensor]:
    """What turns final hidden states into the model's logits, in fp32 after the matrix product."""
    weight_VD, bias_V, scale, softcap = head_of(twin.model)

    def logits(hidden_ND: Tensor) -> Tensor:
        logits_NV = nn.functional.linear(hidden_ND, weight_VD, bias_V).float() * scale
        return logits_NV if softcap is None else torch.tanh(logits_NV / softcap) * softcap

    return logits
