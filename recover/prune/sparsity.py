"""Which weights become zero: by magnitude, by magnitude times input norm (Wanda), or as others make up (SparseGPT).

How much of each block goes: everywhere the same, or less where outliers sit (OWL, or counted in each matrix) or where
it hurts (KL).

Shapes: B batch, T tokens, O out features, I in features.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import LongTensor, Tensor, nn

from recover.base import console
from recover.base.artifacts import JsonObject
from recover.base.errors import PruneError
from recover.base.journal import Entry, Journal
from recover.config.recipe import Calibrated, Magnitude, SparseGpt, Sparsity, Wanda
from recover.models.arch import ARCHS, Arch, arch_of, block_of, blocks_of
from recover.models.plan import MaskRecord, Plan, Pruned
from recover.models.stored_weights import present
from recover.models.switched import pack, unpack
from recover.prune.calibrate import calibration_record
from recover.prune.matrices import (
    COLUMNS,
    Replays,
    choose_n_m,
    choose_share,
    damped_inverse,
    keep_n_m,
    keep_unstructured,
    magnitude_score,
    rewrite,
    wanda_score,
)
from recover.prune.registry import Cost, Pruner, register
from recover.prune.stream import (
    Stream,
    check_finite,
    final_hidden,
    gram,
    kl_rows,
    masked_layers,
    norms,
    row_sum,
    squares,
    working_device,
)

if TYPE_CHECKING:
    from recover.models.load import Description
    from recover.models.twin import Twin

SPARSITY_WALL = 0.55  # share of zeros that a LoRA budget recovers (peers' figures, docs/theory.md)
OUTLIER = 5.0  # M of OWL: a score so many times the mean is an outlier
KL_TOKENS = 8192  # text on which `allocation: kl` runs the model once a block; at least one batch

# For the linear layers of one block, what their inputs summed up to and the block's sparsity: masks and new weights.
Decide = Callable[[Mapping[str, nn.Linear], Mapping[str, Tensor], float], tuple[dict[str, Tensor], dict[str, Tensor]]]


def prune_magnitude(twin: Twin, cfg: Magnitude, batches: list[LongTensor], journal: Journal | None = None) -> Pruned:
    """Masks that keep the largest weights of each output row of each linear layer in the blocks; no text is read."""
    linears, masks, records = masked_layers(twin.model), {}, {}
    _check_patterns(linears, cfg, [cfg.fraction] * len(blocks_of(twin.model)))
    device = working_device(twin.model.device)
    for name, linear in console.track(linears.items(), "magnitude", unit="layers"):
        with present(*_parameters(linear)):
            score_OI = _finite(name, magnitude_score(linear.weight.detach().to(device)))
        keep_OI = _keep(score_OI, cfg, cfg.fraction)
        records[name] = MaskRecord.of(keep_OI, cfg.pattern)
        masks[name] = keep_OI.cpu()
    return Pruned(_plan(twin, "magnitude", records, {}), masks, {})


def prune_wanda(twin: Twin, cfg: Wanda, batches: list[LongTensor], journal: Journal | None = None) -> Pruned:
    """Masks that keep the weights of highest |W| * ||x|| of every output row, block after block.

    What a block's layers see is measured with all blocks before it already masked, as the pruned model will run.
    Source: Sun et al., arXiv 2306.11695, section 3 and algorithm 1.
    """

    def decide(
        linears: Mapping[str, nn.Linear], sums: Mapping[str, Tensor], fraction: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        masks, weights = {}, {}
        for name, norm_I in norms(sums).items():
            weight_OI = linears[name].weight.detach()
            score_OI = _expert_scores(name, weight_OI, norm_I) if norm_I.dim() == 2 else wanda_score(weight_OI, norm_I)
            masks[name] = _keep(_finite(name, score_OI), cfg, fraction)
            weights[name] = weight_OI.masked_fill(~masks[name], 0)
        return masks, weights

    found = _blockwise(twin, cfg, batches, squares, decide, journal, rewrites=False)
    return Pruned(_plan(twin, "wanda", found.records, found.calibration), found.masks, {})


def _parameters(layer: Any) -> Iterator[nn.Parameter]:
    return getattr(layer, "experts", layer).parameters()


def _expert_scores(name: str, weight_OI: Tensor, norm_EI: Tensor) -> Tensor:
    """Wanda's of every expert by what its own tokens put in; of one that saw no token, |W|."""
    idle_E = ~norm_EI.any(dim=1)
    if idle := int(idle_E.sum()):
        console.say(f"{name}: {idle} of {len(idle_E)} experts saw no token: their weights are ranked by magnitude")
    norm_EI = norm_EI.masked_fill(idle_E[:, None], 1.0)
    score_EOI = wanda_score(weight_OI.unflatten(0, (len(norm_EI), -1)), norm_EI[:, None, :])
    return score_EOI.flatten(0, 1)


def prune_sparsegpt(twin: Twin, cfg: SparseGpt, batches: list[LongTensor], journal: Journal | None = None) -> Pruned:
    """Masks, and weights of which those that are left make up for those that go, block after block.

    A layer's output error on the calibration text is made small, with all blocks before it already pruned. `weights`
    are of the model's dtype, zero where masked. Source: Frantar and Alistarh, arXiv 2301.00774. Raises PruneError where
    a layer's Hessian cannot be inverted.
    """
    replays = Replays() if working_device(twin.model.device).type == "cuda" else None

    def decide(
        linears: Mapping[str, nn.Linear], sums: Mapping[str, Tensor], fraction: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        check_finite(sums)
        masks, weights = {}, {}
        for names in _sharing(sums):
            group = {name: linears[name].weight.detach() for name in names}
            found = _sparsegpt(group, sums[names[0]], cfg, fraction, replays)
            for name, (keep_OI, weight_OI) in found.items():
                masks[name], weights[name] = keep_OI, weight_OI
        return {name: masks[name] for name in linears}, {name: weights[name] for name in linears}

    found = _blockwise(twin, cfg, batches, gram, decide, journal, rewrites=True)
    own = {f"{name}.weight": weight_OI for name, weight_OI in found.weights.items()}
    return Pruned(_plan(twin, "sparsegpt", found.records, found.calibration, own), found.masks, own)


class _Found(NamedTuple):
    """Of all layers, in main memory: masks, their certificates, new weights; and what they were measured on."""

    masks: dict[str, Tensor]
    records: dict[str, MaskRecord]
    weights: dict[str, Tensor]
    calibration: JsonObject


def _blockwise(
    twin: Twin,
    cfg: Calibrated,
    batches: list[LongTensor],
    measure: Callable[[Tensor], Tensor],
    decide: Decide,
    journal: Journal | None,
    *,
    rewrites: bool,
) -> _Found:
    """Masks, decided block by block, and with `rewrites` new weights, which are more than masked and so are kept.

    Blocks that the journal holds are not decided again: the text goes through them as it would have.
    """
    _refuse_experts(arch_of(twin.model), cfg)
    journal = journal or Journal()
    fractions, allocation = block_fractions(twin, cfg, batches, journal)
    _check_patterns(masked_layers(twin.model), cfg, fractions)
    stream = Stream(twin, batches)
    found = _Found({}, {}, {}, calibration_record(cfg.calibration, batches) | allocation)
    last = len(fractions) - 1
    with torch.no_grad():
        for index in console.track(range(len(fractions)), cfg.kind, unit="blocks"):
            with stream.resident(index) as linears:
                block = journal.find(f"block {index}")
                if block is not None:
                    kept, made = _unpacked(block, linears)
                else:
                    kept, made = decide(linears, stream.measure(index, measure), fractions[index])
                    journal.keep(f"block {index}", _packed(kept, made if rewrites else {}))
                if index != last:
                    stream.advance(index, made)
            for name, keep_OI in kept.items():
                found.records[name] = MaskRecord.of(keep_OI, cfg.pattern)  # counted where it is fast
                found.masks[name] = keep_OI.cpu()
                if rewrites:
                    found.weights[name] = made[name].cpu()
    return found


def block_fractions(
    twin: Twin, cfg: Calibrated, batches: Sequence[LongTensor], journal: Journal
) -> tuple[list[float], JsonObject]:
    """The sparsity of every block, their mean over weights being the recipe's; and what to record of them."""
    if cfg.allocation == "uniform":
        return [cfg.fraction] * twin.plan.blocks, {}
    record = journal.once("allocation", lambda: Entry(_allocated(twin, cfg, batches, journal))).value
    return record["sparsity"], record


def _allocated(twin: Twin, cfg: Calibrated, batches: Sequence[LongTensor], journal: Journal) -> JsonObject:
    """The record of an allocation: what it goes by, and the sparsity of every block."""
    count = twin.plan.blocks
    stream = Stream(twin, batches)
    importance, sizes, norms_of = [], [], {}
    for index in console.track(range(count), f"dense pass for allocation '{cfg.allocation}'", unit="blocks"):
        with stream.resident(index) as linears, torch.no_grad():
            found = norms(stream.measure(index, squares, advance=True))
            scores = {name: wanda_score(linears[name].weight.detach(), norm_I) for name, norm_I in found.items()}
            importance.append(_outliers(scores, of_block=cfg.allocation == "owl"))
        sizes.append(sum(linear.weight.numel() for linear in stream.linears[index].values()))
        norms_of |= {name: norm_I.cpu() for name, norm_I in found.items()}
    if cfg.allocation == "kl":
        importance = _kl_alone(twin, cfg.fraction, stream, norms_of, batches, journal)
    by = owl_fractions if cfg.allocation == "owl" else fractions_by
    fractions = by(importance, sizes, cfg.fraction, cfg.spread)
    return {"allocation": cfg.allocation, "importance": importance, "sparsity": fractions}


def fractions_by(importance: Sequence[float], sizes: Sequence[int], mean: float, most: float) -> list[float]:
    """Sparsities that fall linearly with importance, within `mean` +- `most`; their mean weighted by size is `mean`."""
    value, size = torch.tensor(importance, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)
    away = value - (value * size).sum() / size.sum()
    largest = away.abs().max()
    return (mean - most * away / largest).tolist() if largest > 0 else [mean] * len(sizes)


def owl_fractions(importance: Sequence[float], sizes: Sequence[int], mean: float, most: float) -> list[float]:
    """As `fractions_by`, but from the sparsest to the least sparse block it is 2 `most`, wherever `mean` lies between.

    So OWL's authors compute it (github.com/luuyin/OWL); where one block stands out it may be off by more than `most`,
    which the bounds of the paper (arXiv 2310.05175, section 4) do not say.
    """
    value, size = torch.tensor(importance, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)
    away = value - (value * size).sum() / size.sum()
    width = value.max() - value.min()
    return (mean - 2 * most * away / width).tolist() if width > 0 else [mean] * len(sizes)


def _outliers(scores: dict[str, Tensor], *, of_block: bool) -> float:
    """Share of the block's weights whose score is above OUTLIER times the mean: of the block, or of their own layer."""
    count = sum(score_OI.numel() for score_OI in scores.values())
    mean = torch.stack([score_OI.sum(dtype=torch.float64) for score_OI in scores.values()]).sum() / count
    above = [(score_OI > OUTLIER * (mean if of_block else score_OI.mean())).sum() for score_OI in scores.values()]
    return float(torch.stack(above).sum()) / count


@torch.no_grad()
def _kl_alone(
    twin: Twin,
    fraction: float,
    stream: Stream,
    norms_of: dict[str, Tensor],
    batches: Sequence[LongTensor],
    journal: Journal,
) -> list[float]:
    """KL(dense || pruned) a token with Wanda on each block alone, on the first KL_TOKENS tokens."""
    some = list(batches[: max(1, KL_TOKENS // batches[0].numel())])
    dense = [final_hidden(twin, ids_BT) for ids_BT in some]
    tokens = sum(ids_BT.numel() for ids_BT in some)

    def alone(linears: dict[str, nn.Linear]) -> Entry:
        with _masked(linears, fraction, norms_of):
            pairs = zip(some, dense, strict=True)
            total = sum(row_sum(twin, kl_rows, seen_ND, final_hidden(twin, ids)) for ids, seen_ND in pairs)
        if not math.isfinite(total):
            raise PruneError(
                f"prune.allocation: KL of {next(iter(linears))}'s block alone is {total}. Check the weights"
            )
        return Entry(total / tokens)

    blocks = console.track(
        enumerate(stream.linears), "KL of each block alone", total=len(stream.linears), unit="blocks"
    )
    return [journal.once(f"KL of block {index} alone", lambda each=each: alone(each)).value for index, each in blocks]


@contextmanager
def _masked(linears: dict[str, nn.Linear], fraction: float, norms_of: dict[str, Tensor]) -> Iterator[None]:
    """Inside, these layers have their weights of lowest Wanda score zeroed."""
    before = {name: linear.weight.data for name, linear in linears.items()}
    try:
        with present(*(parameter for linear in linears.values() for parameter in _parameters(linear))):
            for name, linear in linears.items():
                score_OI = wanda_score(linear.weight, norms_of[name].to(linear.weight.device))
                linear.weight.data = linear.weight.masked_fill(~keep_unstructured(score_OI, fraction), 0)
        yield
    finally:
        for name, weight_OI in before.items():
            linears[name].weight.data = weight_OI


def _packed(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Entry:
    """What has to be kept of a block: masks, a bit a weight, and weights that are more than masked."""
    return Entry(
        tensors={
            **{f"{name}.mask": pack(keep_OI) for name, keep_OI in masks.items()},
            **{f"{name}.weight": weight_OI for name, weight_OI in weights.items()},
        }
    )


def _unpacked(part: Entry, linears: Mapping[str, nn.Linear]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masks and weights of a block as they were decided, on the device of its layers."""
    masks, weights = {}, {}
    for name, linear in linears.items():
        own = linear.weight.detach()
        masks[name] = unpack(part.tensors[f"{name}.mask"].to(own.device), own.shape)
        rewritten = part.tensors.get(f"{name}.weight")
        weights[name] = own.masked_fill(~masks[name], 0) if rewritten is None else rewritten.to(own.device)
    return masks, weights


def _sparsegpt(
    weights: Mapping[str, Tensor], hessian_II: Tensor, cfg: Sparsity, fraction: float, replays: Replays | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """(mask, new weight) of each of these layers, which share the input behind `hessian_II`."""
    names, sizes = list(weights), [len(weight_OI) for weight_OI in weights.values()]
    where = names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
    weight_IO = torch.cat([weight_OI.float() for weight_OI in weights.values()]).T.contiguous()
    inputs = len(weight_IO)
    factor_II = damped_inverse(hessian_II, where, factor=True)
    if cfg.n_m is None:
        choose, group, step = choose_share(fraction, inputs, sizes), COLUMNS, COLUMNS
    else:
        group = cfg.n_m[1]
        choose, step = choose_n_m(*cfg.n_m), group * max(1, COLUMNS // group)
    keep_IO = rewrite(weight_IO, factor_II, choose, group=group, step=step, replays=replays)
    if not bool(weight_IO.sum().isfinite()):
        raise PruneError(f"{where}: weights are not finite. Check the model, or use model.dtype: float32")
    kept = zip(keep_IO.split(sizes, dim=1), weight_IO.split(sizes, dim=1), strict=True)
    dtype = weights[names[0]].dtype
    made = [(keep.T.contiguous(), weight.T.to(dtype).contiguous()) for keep, weight in kept]
    return dict(zip(names, made, strict=True))


def _sharing(sums: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of layers in groups of one and the same sum."""
    groups: dict[int, list[str]] = {}
    for name, total in sums.items():
        groups.setdefault(id(total), []).append(name)
    return list(groups.values())


def _refuse_experts(arch: Arch, cfg: Sparsity) -> None:
    """Raise PruneError for what is not done to experts."""
    if arch.experts is None:
        return
    if isinstance(cfg, SparseGpt):
        raise PruneError(
            f"prune.kind: sparsegpt rewrites no experts, which {arch.model_type} has: use wanda or magnitude"
        )
    if isinstance(cfg, Calibrated) and cfg.allocation != "uniform":
        raise PruneError(
            f"prune.allocation: '{cfg.allocation}' is not measured on experts, which {arch.model_type} has: use uniform"
        )


def _check_patterns(linears: Mapping[str, Any], cfg: Sparsity, fractions: list[float]) -> None:
    """Raise PruneError naming the first layer that the pattern or sparsity does not fit, before any pass."""
    for name, linear in linears.items():
        inputs = linear.in_features
        if cfg.n_m is not None:
            if inputs % cfg.n_m[1]:
                found = f"{name}: pattern {cfg.pattern} needs whole groups of {cfg.n_m[1]} inputs, found {inputs}"
                raise PruneError(f"{found}: use 'unstructured'")
            continue
        fraction = fractions[block_of(name)]
        gone = round(fraction * inputs)
        if not 0 < gone < inputs:
            found = f"{name}: prune.sparsity {fraction:.4g} rounds to {gone} of its {inputs} inputs"
            raise PruneError(f"{found}: expected at least one pruned and one left")


def _finite(name: str, score_OI: Tensor) -> Tensor:
    if not bool(score_OI.sum(dtype=torch.float64).isfinite()):
        raise PruneError(f"{name}: scores are not finite. Check the weights, or use model.dtype: float32")
    return score_OI


def _keep(score_OI: Tensor, cfg: Sparsity, fraction: float) -> Tensor:
    """The mask for these scores, on their device."""
    return keep_unstructured(score_OI, fraction) if cfg.n_m is None else keep_n_m(score_OI, *cfg.n_m)


def _plan(
    twin: Twin,
    kind: str,
    records: dict[str, MaskRecord],
    calibration: JsonObject,
    weights: Mapping[str, Tensor] | None = None,
) -> Plan:
    parameters = sum(parameter.numel() for parameter in twin.model.parameters())
    return Plan(
        kind=kind,
        blocks=len(blocks_of(twin.model)),
        masks=records,
        parameters_dense=parameters,
        parameters_pruned=parameters,
        nonzero=parameters - sum(record.zeros for record in records.values()),
        calibration=calibration,
        weights={name: tuple(weight_OI.shape) for name, weight_OI in (weights or {}).items()},
    )


def sparsity_cost(cfg: Sparsity, model: Description) -> Cost:
    """What zeros take from a model: nothing that is stored or run."""
    _refuse_experts(ARCHS[model.model_type], cfg)
    said = ["masked weights are stored as zeros: the file is as large and stock kernels are as fast as dense"]
    if cfg.fraction > SPARSITY_WALL:
        said.insert(0, f"{cfg.fraction:.0%} of the weights go: LoRA budgets recover about {SPARSITY_WALL:.0%}")
    zeros = cfg.fraction * (model.parameters - model.embedding_parameters)
    return Cost(masked=True, zeros=zeros, warnings=tuple(said))


def sparsegpt_cost(cfg: SparseGpt, model: Description) -> Cost:
    """As `sparsity_cost`; and every weight of the blocks is rewritten."""
    attention = 2 * model.heads * model.head_size + 2 * model.kv_heads * model.head_size
    own = model.blocks * model.width * (attention + model.mlp_matrices * model.intermediate)
    return dataclasses.replace(sparsity_cost(cfg, model), own=own)


register(Pruner(Magnitude, prune_magnitude, sparsity_cost))
register(Pruner(Wanda, prune_wanda, sparsity_cost))
register(Pruner(SparseGpt, prune_sparsegpt, sparsegpt_cost))
