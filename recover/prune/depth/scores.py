"""What it costs to close a set of sites: by closing it and looking at the output, or by what it adds to the stream.

Every score is made for (twin, batches) and then asked for lists of candidates on top of sites that are closed already.
Lower is cheaper.

Shapes: B batch, T tokens, N tokens (B * T), D width, V vocabulary.
"""

from __future__ import annotations

import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import LongTensor, Tensor, nn

from recover.base import console
from recover.config.prune import DEPTH_SCORES
from recover.models.arch import blocks_of, final_norm_of, head_of
from recover.models.site import Site
from recover.prune.stream import (
    NO_TARGET,
    TOKENS,
    LogitMeasure,
    block_inputs,
    final_hidden,
    kl_rows,
    next_tokens,
    nll_sum,
    point_of,
    residual_stream,
    row_sum,
    run,
    stream_hooks,
    variance_rows,
)

if TYPE_CHECKING:
    from recover.models.twin import Twin

Span = tuple[Site, ...]  # sites that go together, in the order in which the model runs them


class Score(Protocol):
    """Scores of candidates, each closed on top of `closed`; `description` is what the progress bar says."""

    def __call__(self, spans: Sequence[Span], closed: frozenset[Site], description: str) -> list[float]: ...


def score_of(twin: Twin, name: str, batches: list[LongTensor]) -> Score:
    """The score by its name in the recipe (`DEPTH_SCORES` in `recover/config/prune.py`)."""
    return pkgutil.resolve_name(DEPTH_SCORES[name].make)(twin, batches)


def kl_score(twin: Twin, batches: list[LongTensor]) -> Score:
    """Mean KL(dense || pruned)."""
    return OutputScore(twin, batches, kl_rows)


def variance_score(twin: Twin, batches: list[LongTensor]) -> Score:
    """Mean variance of the logits' change under dense's probabilities, its second-order form."""
    return OutputScore(twin, batches, variance_rows)


def angular_score(twin: Twin, batches: list[LongTensor]) -> Score:
    """Mean angular distance across a span."""
    return StreamScore(twin, batches, angular_distance)


def influence_score(twin: Twin, batches: list[LongTensor]) -> Score:
    """Mean block influence of a span."""
    return StreamScore(twin, batches, block_influence)


def cosine(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """cos(a, b) of each row within [-1, 1], in fp64 (in bf16 every 1 - cos near 0 is 0); a zero row gives 0."""
    a_ND, b_ND = a_ND.double(), b_ND.double()
    norms_N = a_ND.norm(dim=-1) * b_ND.norm(dim=-1)
    return ((a_ND * b_ND).sum(-1) / norms_N.clamp_min(torch.finfo(torch.float64).tiny)).clamp(-1, 1)


def angular_distance(h_in_ND: Tensor, h_out_ND: Tensor) -> Tensor:
    """arccos(cos(h_in, h_out)) / pi of each row, in [0, 1]; a span of blocks is scored by the mean over tokens.

    Source: Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv 2403.17887, section 3.2. They
    look at the last token of each sample only; the mean over all tokens is steadier on the few samples used here.
    """
    return cosine(h_in_ND, h_out_ND).acos() / math.pi


def block_influence(h_in_ND: Tensor, h_out_ND: Tensor) -> Tensor:
    """1 - cos(h_in, h_out) of each row, in [0, 2]; a block is scored by the mean over tokens.

    Source: Men et al., "ShortGPT", arXiv 2403.03853, equation 1.
    """
    return 1 - cosine(h_in_ND, h_out_ND)


def runs_of(span: Iterable[Site]) -> list[tuple[int, int]]:
    """Points of the residual stream between which neighbouring sites of the span lie: (first read, last written)."""
    found: list[tuple[int, int]] = []
    for point in sorted(map(point_of, span)):
        if found and found[-1][1] == point:
            found[-1] = (found[-1][0], point + 1)
        else:
            found.append((point, point + 1))
    return found


class _Closing(ABC):
    """Scores candidates by really closing them."""

    def __init__(self, twin: Twin, batches: list[LongTensor]) -> None:
        self.twin, self.batches = twin, batches
        self.tokens = sum(ids_BT.numel() for ids_BT in batches)

    def __call__(self, spans: Sequence[Span], closed: frozenset[Site], description: str) -> list[float]:
        totals = [0.0] * len(spans)
        inputs: list[Tensor] = []
        steps = product(range(len(self.batches)), range(len(spans)))
        total = len(self.batches) * len(spans)
        for batch, candidate in console.track(steps, description, total=total, unit="candidates"):
            if candidate == 0:
                inputs = block_inputs(self.twin, self.batches[batch], closed)
            totals[candidate] += self.total(batch, self._hidden(batch, spans[candidate], closed, inputs))
        return [self.mean(total) for total in totals]

    @abstractmethod
    def total(self, batch: int, hidden_ND: Tensor) -> float:
        """Sum over the tokens of one batch, from the final hidden states with a candidate closed."""

    def mean(self, total: float) -> float:
        """The score, from the sum over all batches."""
        return total / self.tokens

    def _hidden(self, batch: int, span: Span, closed: frozenset[Site], inputs: list[Tensor]) -> Tensor:
        """Final hidden states with `span` closed on top of `closed`.

        The blocks before the span do what they did with `closed` alone, so the pass need not run them: the span's first
        block is given its input by a hook, and all blocks before it but block 0 are closed too. Half the work, same
        bits.
        """
        start = span[0].block
        return self.behind(batch, start, {*closed, *span}, inputs[start])

    def behind(self, batch: int, start: int, closed: Iterable[int | Site], input_BTD: Tensor) -> Tensor:
        """Final hidden states from what block `start` is given on; the blocks before it are not run, but block 0."""
        what: set[int | Site] = {*closed, *range(1, start)}
        if start == 0:
            return final_hidden(self.twin, self.batches[batch], what)
        first = blocks_of(self.twin.model)[start]
        hook = first.register_forward_pre_hook(lambda _module, args: (input_BTD, *args[1:]))
        try:
            return final_hidden(self.twin, self.batches[batch], what)
        finally:
            hook.remove()


class OutputScore(_Closing):
    """Mean per token of a measure of dense and pruned logits, such as KL(dense || pruned).

    The dense side is the final hidden states, computed once and kept on the CPU: D values a token, not V.
    """

    def __init__(self, twin: Twin, batches: list[LongTensor], rows: LogitMeasure) -> None:
        super().__init__(twin, batches)
        self.rows = rows
        self.dense = [final_hidden(twin, ids_BT).cpu() for ids_BT in console.track(batches, "dense", unit="batches")]

    def total(self, batch: int, hidden_ND: Tensor) -> float:
        return row_sum(self.twin, self.rows, self.dense[batch].to(hidden_ND.device), hidden_ND)


class Perplexity(_Closing):
    """exp of the mean -log p(next token) of the calibration text with a candidate closed.

    Source: Kim et al., "Shortened LLaMA", arXiv 2402.02834, section 2.3 (their PPL criterion).
    """

    def total(self, batch: int, hidden_ND: Tensor) -> float:
        return nll_sum(self.twin, hidden_ND, next_tokens(self.batches[batch]))

    def mean(self, total: float) -> float:
        mean = total / (self.tokens - sum(len(ids_BT) for ids_BT in self.batches))
        return math.exp(mean) if mean < 700 else math.inf


class StreamScore:
    """Mean per token of how far a span turns its input; one pass scores all. Runs that are apart add up."""

    def __init__(self, twin: Twin, batches: list[LongTensor], rows: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.twin, self.batches, self.rows = twin, batches, rows
        self.tokens = sum(ids_BT.numel() for ids_BT in batches)

    def __call__(self, spans: Sequence[Span], closed: frozenset[Site], description: str) -> list[float]:
        runs = [runs_of(span) for span in spans]
        points = {point for pieces in runs for piece in pieces for point in piece}
        totals = [0.0] * len(spans)
        for ids_BT in console.track(self.batches, description, unit="batches"):
            h_ND = {point: h.flatten(0, 1) for point, h in residual_stream(self.twin, ids_BT, closed, points).items()}
            for index, pieces in enumerate(runs):
                totals[index] += sum(float(self.rows(h_ND[start], h_ND[end]).sum()) for start, end in pieces)
        return [total / self.tokens for total in totals]


class TaylorScore:
    """|change of the loss to first order| if a span is closed, mean over samples; one backward a batch scores all.

    Closing takes delta = h_out - h_in from the stream, so the loss of a sample (mean -log p(next token)) changes by
    -sum <dL/dh_out, delta> over its tokens. This is the gate sensitivity of Michel et al., "Are Sixteen Heads Really
    Better than One?", arXiv 1905.10650, equation 2, for sublayers and blocks in place of heads. It keeps the
    activations of a whole forward pass: a smaller calibration.batch_size needs less memory.
    """

    def __init__(self, twin: Twin, batches: list[LongTensor]) -> None:
        self.twin, self.batches = twin, batches
        self.samples = sum(len(ids_BT) for ids_BT in batches)

    def __call__(self, spans: Sequence[Span], closed: frozenset[Site], description: str) -> list[float]:
        runs = [runs_of(span) for span in spans]
        totals = [0.0] * len(spans)
        for ids_BT in console.track(self.batches, description, unit="batches"):
            h_BTD, gradient_BTD = stream_gradients(self.twin, ids_BT, closed)
            for index, pieces in enumerate(runs):
                change_B = sum(
                    (gradient_BTD[end].double() * (h_BTD[end].double() - h_BTD[start].double())).sum((1, 2))
                    for start, end in pieces
                )
                totals[index] += float(torch.as_tensor(change_B).abs().sum())
        return [total / self.samples for total in totals]


def stream_gradients(
    twin: Twin, ids_BT: LongTensor, closed: Iterable[int | Site]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The residual stream at every point, and the gradient there of each sample's mean -log p(next token)."""
    model: Any = twin.model
    seen: dict[int, Tensor] = {}
    final: list[Tensor] = []

    def start(_module: nn.Module, args: tuple[Tensor, ...]) -> Any:
        return (args[0].detach().requires_grad_(), *args[1:])  # the weights are frozen: a graph starts here

    def see(_module: nn.Module, _args: Any, output: Tensor) -> None:
        final.append(output)

    # Before the hooks that look, so that they see the tensor with a gradient.
    hooks = [blocks_of(model)[0].register_forward_pre_hook(start)]
    hooks += stream_hooks(twin, seen, set(range(2 * len(blocks_of(model)) + 1)))
    hooks.append(final_norm_of(model).register_forward_hook(see))
    with torch.enable_grad():
        run(twin, ids_BT, closed, hooks)
        points = sorted(seen)
        upstream_BTD = _loss_gradient(twin, final[0].detach(), ids_BT)
        gradients = torch.autograd.grad(final[0], [seen[point] for point in points], upstream_BTD)
    return {point: seen[point].detach() for point in points}, dict(zip(points, gradients, strict=True))


def _loss_gradient(twin: Twin, hidden_BTD: Tensor, ids_BT: LongTensor) -> Tensor:
    """d(mean -log p(next token) of a sample) / d(final hidden states), TOKENS rows of logits at once."""
    head, targets_N = head_of(twin.model).frozen(), next_tokens(ids_BT).to(hidden_BTD.device)
    rows = []
    for hidden, targets in zip(hidden_BTD.flatten(0, 1).split(TOKENS), targets_N.split(TOKENS), strict=True):
        z_NV, slope_NV = head.logits_and_slope(hidden)
        z_NV.requires_grad_()
        loss = nn.functional.cross_entropy(z_NV, targets, ignore_index=NO_TARGET, reduction="sum")
        rows.append(head.pull_back(torch.autograd.grad(loss, z_NV)[0], slope_NV))
    return (torch.cat(rows).view_as(hidden_BTD) / (ids_BT.shape[1] - 1)).to(hidden_BTD.dtype)
