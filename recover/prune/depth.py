"""Which blocks to drop: by closing them and measuring KL(dense || pruned), or by how little they turn their input.

Shapes: B batch, T tokens, N tokens (B * T), D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import LongTensor, Tensor

from recover import console
from recover.errors import PruneError
from recover.models.arch import blocks_of
from recover.prune.calibrate import calibration_record, check_context
from recover.prune.plan import Plan, Pruned
from recover.prune.scores import angular_distance, block_influence
from recover.prune.views import block_inputs, final_hidden, kl_sum
from recover.recipe import Depth

if TYPE_CHECKING:
    from recover.models.twin import Twin

# Every round of the KL search runs the model once per candidate. In a model with more blocks than this, only so many
# candidates, those of lowest block influence, are run (or twice the count, if that is more).
CANDIDATES = 40

Span = tuple[int, ...]
Choice = tuple[Span, list[dict[str, Any]]]

ROW_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "angular": angular_distance,
    "block_influence": block_influence,
}


def prune_depth(twin: Twin, leaf: Depth, batches: list[LongTensor]) -> Pruned:
    """The plan that drops `leaf.blocks`, or the `leaf.count` blocks that matter least by `leaf.score`; no masks.

    Every candidate of every round is in `plan.scores`: `{round, blocks, score, by, chosen}`. Raises PruneError for a
    drop of all blocks, of block 0, of a block that is not there, and for a drop that changes no logit.
    """
    blocks = len(blocks_of(twin.model))
    check_context(twin.model, batches)
    if leaf.blocks is not None:
        dropped, scores = _listed(leaf.blocks, blocks), []
    else:
        assert leaf.count is not None, "the recipe holds either blocks or a count"
        dropped, scores = _chosen(twin, leaf.score, leaf.contiguous, _checked(leaf.count, blocks), batches)
    _refuse_no_effect(twin, dropped, batches)
    return Pruned(_plan(twin, dropped, scores, calibration_record(leaf.calibration, batches)), {}, {})


def _checked(count: int, blocks: int) -> int:
    if count >= blocks:
        raise PruneError(f"prune.count: {count} blocks to drop, the model has {blocks}: drop at most {blocks - 1}")
    return count


def _listed(listed: Iterable[int], blocks: int) -> Span:
    dropped = tuple(sorted(listed))
    outside = [block for block in dropped if not 0 <= block < blocks]
    if outside:
        raise PruneError(f"prune.blocks: {outside} are not blocks of this model: it has {blocks}, numbered from 0")
    if len(dropped) >= blocks:
        raise PruneError(f"prune.blocks: {len(dropped)} blocks to drop, the model has {blocks}: at least one must stay")
    if 0 in dropped:
        raise PruneError(
            "prune.blocks: block 0 cannot be dropped: the length of the KV cache, and with it the position of every "
            "new token, is read off its attention"
        )
    return dropped


def _chosen(twin: Twin, score: str, contiguous: bool, count: int, batches: list[LongTensor]) -> Choice:
    if not batches:
        raise PruneError(f"prune.score: '{score}' is measured on text: give prune.calibration")
    blocks = len(blocks_of(twin.model))
    if score != "kl":
        return _by_similarity(twin, score, _spans(blocks, count if contiguous else 1), count, batches)
    search = _KlSearch(twin, batches)
    if contiguous:
        return search.best_span(_spans(blocks, count))
    return search.greedy(count, *_candidates(twin, blocks, count, batches))


def _spans(blocks: int, length: int) -> list[Span]:
    """All runs of `length` consecutive blocks without block 0."""
    return [tuple(range(start, start + length)) for start in range(1, blocks - length + 1)]


def _candidates(twin: Twin, blocks: int, count: int, batches: list[LongTensor]) -> Choice:
    """Blocks that the KL search tries, and the scores (round 0) that kept the others out of it."""
    if blocks <= CANDIDATES:
        return tuple(range(1, blocks)), []
    pool = min(max(CANDIDATES, 2 * count), blocks - 1)
    kept, scores = _by_similarity(twin, "block_influence", _spans(blocks, 1), pool, batches)
    return kept, [record | {"round": 0} for record in scores]


def _record(number: int, span: Span, score: float, by: str) -> dict[str, Any]:
    if not math.isfinite(score):
        where = f"prune: the {by} score of blocks {list(span)} is {score}"
        raise PruneError(f"{where}. Check the weights, or use model.dtype: float32")
    return {"round": number, "blocks": list(span), "score": score, "by": by, "chosen": False}


def _choose(records: Sequence[dict[str, Any]], spans: int) -> Span:
    """Mark the lowest `spans` records as chosen (on ties the first) and give their blocks."""
    lowest = sorted(records, key=lambda record: record["score"])[:spans]
    for record in lowest:
        record["chosen"] = True
    return tuple(sorted(block for record in lowest for block in record["blocks"]))


class _KlSearch:
    """Scores sets of closed blocks by mean KL(dense || pruned) per calibration token.

    The dense side is the final hidden states, computed once and kept on the CPU: D values a token, not V.
    """

    def __init__(self, twin: Twin, batches: list[LongTensor]) -> None:
        self.twin = twin
        self.batches = batches
        self.dense = [final_hidden(twin, ids_BT).cpu() for ids_BT in console.track(batches, "dense", unit="batch")]
        self.tokens = sum(ids_BT.numel() for ids_BT in batches)

    def greedy(self, count: int, candidates: Span, scores: list[dict[str, Any]]) -> Choice:
        """Close the block of lowest KL on top of those already closed, `count` times."""
        closed: Span = ()
        for number in range(1, count + 1):
            tried = [(block,) for block in candidates if block not in closed]
            records = self._round(number, tried, closed, f"drop {number} of {count}")
            closed += _choose(records, 1)
            scores = scores + records
        return tuple(sorted(closed)), scores

    def best_span(self, spans: list[Span]) -> Choice:
        """The span whose closing gives the lowest KL."""
        records = self._round(1, spans, (), f"drop {len(spans[0])} in a row")
        return _choose(records, 1), records

    def _round(self, number: int, spans: list[Span], closed: Span, description: str) -> list[dict[str, Any]]:
        totals = [0.0] * len(spans)
        inputs: list[Tensor] = []
        steps = product(range(len(self.batches)), range(len(spans)))
        total = len(self.batches) * len(spans)
        for batch, candidate in console.track(steps, description, total=total, unit="candidate"):
            if candidate == 0:
                inputs = block_inputs(self.twin, self.batches[batch], closed)
            totals[candidate] += self._kl_sum(batch, spans[candidate], closed, inputs)
        return [_record(number, span, total / self.tokens, "kl") for span, total in zip(spans, totals, strict=True)]

    def _kl_sum(self, batch: int, span: Span, closed: Span, inputs: list[Tensor]) -> float:
        """Sum over tokens of KL(dense || pruned) with `span` closed on top of `closed`.

        The blocks before the span do what they did with `closed` alone, so the pass need not run them: the span's first
        block, which is closed and hands its input on, is given that input by a hook, and all before it but block 0 are
        closed too. Half the work, same bits.
        """
        start = span[0]
        first = blocks_of(self.twin.model)[start]
        hook = first.register_forward_pre_hook(lambda _module, args: (inputs[start], *args[1:]))
        try:
            hidden_ND = final_hidden(self.twin, self.batches[batch], {*closed, *span, *range(1, start)})
        finally:
            hook.remove()
        return kl_sum(self.twin, self.dense[batch].to(hidden_ND.device), hidden_ND)


def _by_similarity(twin: Twin, score: str, spans: list[Span], count: int, batches: list[LongTensor]) -> Choice:
    """The spans whose output is nearest to their input, as many as make `count` blocks; one dense pass scores all."""
    totals = [0.0] * len(spans)
    for ids_BT in console.track(batches, f"{score} of {len(spans)} candidates", unit="batch"):
        stream = [hidden_BTD.flatten(0, 1) for hidden_BTD in block_inputs(twin, ids_BT)]
        for index, span in enumerate(spans):
            totals[index] += float(ROW_SCORES[score](stream[span[0]], stream[span[-1] + 1]).sum())
    tokens = sum(ids_BT.numel() for ids_BT in batches)
    records = [_record(1, span, total / tokens, score) for span, total in zip(spans, totals, strict=True)]
    return _choose(records, count // len(spans[0])), records


@torch.no_grad()
def _refuse_no_effect(twin: Twin, dropped: Span, batches: list[LongTensor]) -> None:
    """Raise PruneError if the logits are the same with the blocks closed: they do nothing, or were never closed."""
    model = twin.model
    ids_BT = batches[0][:1, :64] if batches else torch.arange(min(64, model.config.vocab_size)).unsqueeze(0)
    ids_BT = ids_BT.to(model.device)
    with twin.closed(set(dropped)):
        pruned_BTV = model(input_ids=ids_BT, use_cache=False).logits
    if torch.equal(pruned_BTV, model(input_ids=ids_BT, use_cache=False).logits):
        raise PruneError(f"prune: dropping blocks {list(dropped)} changes no logit: these blocks do nothing")


def _plan(twin: Twin, dropped: Span, scores: list[dict[str, Any]], calibration: dict[str, Any]) -> Plan:
    modules = blocks_of(twin.model)
    dense = sum(parameter.numel() for parameter in twin.model.parameters())
    pruned = dense - sum(parameter.numel() for block in dropped for parameter in modules[block].parameters())
    return Plan(
        kind="depth",
        blocks=len(modules),
        dropped=dropped,
        scores=scores,
        parameters_dense=dense,
        parameters_pruned=pruned,
        nonzero=pruned,
        calibration=calibration,
    )
