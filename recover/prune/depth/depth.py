"""Depth pruning: whole blocks or single sublayers go, listed or chosen by a score, and the cut may be repaired.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import LongTensor

from recover.base.artifacts import JsonObject
from recover.base.errors import PruneError
from recover.base.journal import Journal
from recover.config.recipe import Depth
from recover.models.arch import ARCHS, arch_of, blocks_of, part_of
from recover.models.plan import Plan, Pruned
from recover.models.site import SUBLAYERS, Packed, Site, packed_as, sites_of, whole_blocks, zeroed_partners
from recover.prune.calibrate import calibration_record, check_context
from recover.prune.depth.repair import refuse_norm_behind, refuse_repair, repaired
from recover.prune.depth.search import (
    NAMES,
    SearchResult,
    choose,
    most_units,
    named_sites,
    search_passes,
)
from recover.prune.registry import Cost, Pruner, register

if TYPE_CHECKING:
    from recover.models.load import Description
    from recover.models.twin import Twin


DEPTH_WALL = 0.30  # share of the blocks' weights that a LoRA budget recovers (peers' figures, docs/theory.md)


def prune_depth(twin: Twin, cfg: Depth, batches: list[LongTensor], journal: Journal | None = None) -> Pruned:
    """The plan that drops what `cfg` lists, or the `cfg.count` units that matter least by `cfg.score`; no masks.

    Every `Candidate` of every round is in `plan.scores`. With `cfg.repair`, the weights before each cut are rewritten
    if that brings the logits nearer to the dense ones (`plan.repair`).

    Raises PruneError for a drop of everything, of the attention of block 0, of a block that is not there, for a drop
    that changes no logit, and for a repair that this model or so little text does not allow.
    """
    check_context(twin.model, batches)
    if cfg.repair != "none":
        refuse_repair(twin, cfg.repair, batches)
    refuse_pairs(cfg, twin.plan.parallel)
    sites = check_sites(cfg, len(blocks_of(twin.model)))
    choice = choose(twin, cfg, batches, journal) if cfg.listed is None else SearchResult(sites, [])
    _refuse_no_effect(twin, choice.sites, batches)
    weights, repair = {}, {}
    if cfg.repair != "none":
        weights, repair = repaired(twin, choice.sites, cfg.repair, batches)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    plan = _plan(twin, choice, calibration_record(cfg.calibration, batches), weights=shapes, repair=repair)
    return Pruned(plan, {}, weights)


def refuse_pairs(cfg: Depth, parallel: bool) -> None:
    """Raise PruneError for pairs where a pair saves nothing: of neighbours in two blocks that run side by side."""
    if parallel and cfg.unit == "pair":
        raise PruneError(
            "prune.unit: 'pair' joins half of a block with half of the next, and the blocks of this model run "
            "attention and MLP on one input, so that only halves of one block can be stored together: use 'block'"
        )


def check_sites(cfg: Depth, blocks: int) -> frozenset[Site]:
    """The sites that the recipe names, none with a count. Raises PruneError for what is not there or has to stay."""
    if cfg.listed is not None:
        return _listed(cfg, blocks)
    there = most_units(cfg.unit, blocks)
    if cfg.units > there:
        has = f"the model has {blocks}" if cfg.unit == "block" else f"the model has {blocks} blocks"
        raise PruneError(
            f"prune.count: {cfg.units} {NAMES[cfg.unit]} to drop, {has}: drop at most {there} "
            "(the attention of block 0 stays)"
        )
    return frozenset()


def _listed(cfg: Depth, blocks: int) -> frozenset[Site]:
    field = "prune.sites" if cfg.unit == "sublayer" else "prune.blocks"
    sites = named_sites(cfg)
    outside = sorted({site.block for site in sites if not 0 <= site.block < blocks})
    if outside:
        raise PruneError(f"{field}: {outside} are not blocks of this model: it has {blocks}, numbered from 0")
    if cfg.unit == "block" and cfg.units >= blocks:
        raise PruneError(f"{field}: {cfg.units} blocks to drop, the model has {blocks}: at least one must stay")
    if Site(0, "attention") in sites:
        what = "block 0" if cfg.unit == "block" else "the attention of block 0"
        raise PruneError(
            f"{field}: {what} cannot be dropped: the length of the KV cache, and with it the position of every "
            "new token, is read off its attention"
        )
    return sites


@torch.no_grad()
def _refuse_no_effect(twin: Twin, sites: frozenset[Site], batches: list[LongTensor]) -> None:
    """Raise PruneError if the logits are the same with the sites closed: they do nothing, or were never closed."""
    model = twin.model
    ids_BT = batches[0][:1, :64] if batches else torch.arange(min(64, model.config.vocab_size)).unsqueeze(0)
    ids_BT = ids_BT.to(model.device)
    with twin.closed(sites):
        pruned_BTV = model(input_ids=ids_BT, use_cache=False).logits
    if torch.equal(pruned_BTV, model(input_ids=ids_BT, use_cache=False).logits):
        whole = whole_blocks(sites)
        named = f"blocks {list(whole)}" if len(sites) == 2 * len(whole) else ", ".join(map(str, sorted(sites)))
        raise PruneError(f"prune: dropping {named} changes no logit: these {'blocks' if whole else 'sites'} do nothing")


def _plan(twin: Twin, choice: SearchResult, calibration: JsonObject, **repair: Any) -> Plan:
    """The plan of these sites, its parameters counted: stored ones (whole blocks after repacking), and those in use."""
    modules = blocks_of(twin.model)
    dense = sum(parameter.numel() for parameter in twin.model.parameters())
    plan = Plan(
        kind="depth",
        blocks=len(modules),
        sites=tuple(choice.sites),
        scores=[{**candidate} for candidate in choice.candidates],
        parameters_dense=dense,
        parameters_pruned=dense,
        parallel=arch_of(twin.model).parallel(twin.base.config),
        nonzero=dense - sum(_site_parameters(twin, site, choice.sites) for site in choice.sites),
        calibration=calibration,
        **repair,
    )
    inside = sum(parameter.numel() for module in modules for parameter in module.parameters())
    stored = sum(_stored(twin, packed) for packed in plan.packed)
    return dataclasses.replace(plan, parameters_pruned=dense - inside + stored)


def _stored(twin: Twin, packed: Packed) -> int:
    """Parameters of a stored block; a zeroed partner has as many as that of the block whose settings it has."""
    made_of = {part: packed.source if block is None else block for part, block in zip(SUBLAYERS, packed, strict=True)}
    return sum(
        parameter.numel()
        for part, block in made_of.items()
        for name, parameter in blocks_of(twin.model)[block].named_parameters()
        if part_of(twin.arch, name) == part
    )


def _site_parameters(twin: Twin, site: Site, gone: Collection[Site]) -> int:
    """Parameters of a sublayer with its norms, but for one that an MLP beside it, which is not `gone`, reads too."""
    arch = arch_of(twin.model)
    shared = arch.attention_norms if not arch.mlp_norms and Site(site.block, "mlp") not in gone else ()
    return sum(
        parameter.numel()
        for name, parameter in blocks_of(twin.model)[site.block].named_parameters()
        if part_of(arch, name) == site.part and name.partition(".")[0] not in shared
    )


def depth_cost(cfg: Depth, model: Description) -> Cost:
    """What dropping takes from a model. Raises PruneError for what `prune_depth` would refuse."""
    refuse_pairs(cfg, model.parallel)
    check_sites(cfg, model.blocks)
    if cfg.repair != "none":
        refuse_norm_behind(ARCHS[model.model_type], cfg.repair)
    share = share_gone(cfg, model)
    return Cost(
        gone=share * (model.active - model.embedding_parameters),
        unstored=_unstored(cfg, model),
        blocks=share,
        own=_repaired_weights(cfg, model),
        passes=search_passes(cfg, model.blocks),
        flops=search_flops(cfg, model),
        warnings=tuple(depth_warnings(cfg, model)),
    )


def _unstored(cfg: Depth, model: Description) -> float:
    """Weights that the exported model is known to do without: to the number where blocks are named or all alike."""
    sizes = model.block_parameters
    if cfg.unit == "block" and cfg.listed is not None and sizes:
        return sum(sizes[int(block)] for block in cfg.listed)
    inside = sum(sizes) or model.parameters - model.embedding_parameters
    return share_unstored(cfg, model) * inside


def _repaired_weights(cfg: Depth, model: Description) -> int:
    """At most so many, as the cuts are not known."""
    cuts = 1 if cfg.contiguous else cfg.units
    return 0 if cfg.repair == "none" else cuts * model.width * max(model.heads * model.head_size, model.intermediate)


def share_gone(cfg: Depth, model: Description) -> float:
    """Of the weights in all blocks, the share no longer run; a count of sublayers is taken for an even mixture.

    Of experts, those are counted that a token goes through.
    """
    attention = 2 * model.width * model.head_size * (model.heads + model.kv_heads)
    mlp = model.mlp_active
    weights = {"attention": attention, "mlp": mlp, "sublayer": (attention + mlp) / 2}
    weights |= dict.fromkeys(("block", "pair"), attention + mlp)
    if cfg.unit == "sublayer" and cfg.sites:
        gone = sum(weights[site.part] for site in named_sites(cfg))
    else:
        gone = cfg.units * weights[cfg.unit]
    return gone / (model.blocks * (attention + mlp))


def share_unstored(cfg: Depth, model: Description) -> float:
    """Of all blocks, the share that the exported model is known to do without."""
    if cfg.unit in ("block", "pair"):
        return cfg.units / model.blocks
    if cfg.unit == "sublayer" and cfg.sites:
        return 1 - len(_packed(cfg, model)) / model.blocks
    return 0.0  # attention (MLP) alone: every MLP (attention) left needs a block; chosen sublayers: nobody knows yet


def _packed(cfg: Depth, model: Description) -> tuple[Packed, ...]:
    """The blocks that are stored without the named sites."""
    return packed_as(model.parallel)(sites_of(range(model.blocks)) - named_sites(cfg))


def search_flops(cfg: Depth, model: Description) -> float:
    """FLOP of a search: of each candidate half the blocks, as the blocks before it need not run, and the head twice."""
    if cfg.calibration is None:
        return 0.0
    inside = model.active - model.embedding_parameters
    head = model.vocabulary * model.width
    tokens = cfg.calibration.samples * cfg.calibration.length
    return search_passes(cfg, model.blocks) * tokens * 2 * (inside / 2 + 2 * head)


def depth_warnings(cfg: Depth, model: Description) -> list[str]:
    """What will probably disappoint, said before hours are spent."""
    found, share = [], share_gone(cfg, model)
    if share > DEPTH_WALL:
        what = "blocks" if cfg.unit == "block" else "blocks' weights"
        found.append(f"{share:.0%} of the {what} go: LoRA budgets recover about {DEPTH_WALL:.0%}")
    if cfg.unit in SUBLAYERS:
        found.append(
            f"{cfg.units} sublayers of one kind go: a zeroed partner is stored in place of each, and the file is "
            "as large as dense (prune.unit: pair or block saves space)"
        )
    elif cfg.unit == "sublayer":
        found.append(_partners(cfg, model))
    return found


def _partners(cfg: Depth, model: Description) -> str:
    if not cfg.sites:
        most = min(cfg.units // 2, model.blocks - 1)
        shrinks = f"the file shrinks by {most} blocks at most, by none at worst"
        return f"sublayers that go pair up as it happens: {shrinks} (prune.unit: pair is sure to shrink it)"
    packed = _packed(cfg, model)
    return f"{len(packed)} of {model.blocks} blocks are stored, with {zeroed_partners(packed)} zeroed partners"


register(Pruner(Depth, prune_depth, depth_cost))
