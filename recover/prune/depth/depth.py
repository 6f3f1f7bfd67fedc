"""Depth pruning: whole blocks or single sublayers go, listed or chosen by a score, and the cut may be repaired.

A repair is in closed form: what the site before the cut writes is transformed so that the stream behind it is right.
Without the cut, the stream behind it is the dense one; with it, h' = x + T m, where m is what the last kept site before
the cut adds to the stream x. T is fitted by least squares and folded into the last linear of that site, which costs
nothing afterwards: T (W a + b) = (T W) a + T b.

Shapes: B batch, T tokens, N tokens (B * T), D width, V vocabulary, O out features, I in features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import LongTensor, Tensor, nn

from recover.base import console
from recover.base.artifacts import JsonObject
from recover.base.errors import PruneError
from recover.base.journal import Journal
from recover.config.recipe import Depth
from recover.models.arch import (
    ARCHS,
    Arch,
    arch_of,
    blocks_of,
    linears_in,
    linears_of,
    lone_of,
    part_of,
    sublayers_in,
)
from recover.models.plan import Plan, Pruned, check_attends
from recover.models.site import SUBLAYERS, Packed, Site, Sublayer, packed_as, sites_of, whole_blocks, zeroed_partners
from recover.models.stored_weights import present
from recover.prune.calibrate import calibration_record, check_context
from recover.prune.depth.scores import runs_of
from recover.prune.depth.search import (
    NAMES,
    SearchResult,
    choose,
    most_units,
    named_sites,
    search_passes,
)
from recover.prune.registry import Cost, Pruner, register
from recover.prune.stream import final_hidden, kl_rows, point_of, residual_stream, row_sum, site_at

if TYPE_CHECKING:
    from recover.models.load import Description
    from recover.models.twin import Twin

DEPTH_WALL = 0.30  # share of the blocks' weights that a LoRA budget recovers (peers' figures, docs/theory.md)
RIDGE = 1e-2  # added to the Gram matrix, times its own diagonal: every channel of m is trusted up to 1% of its power
HELD_OUT = 4  # every so many-th sample is kept out of the fit, to measure on


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
    sites = check_sites(cfg, len(blocks_of(twin.model)), lone_of(twin.model))
    choice = choose(twin, cfg, batches, journal) if cfg.listed is None else SearchResult(sites, [])
    check_attends(twin.base, choice.sites)
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
            "prune.unit: 'pair' joins half of a block with half of the next. In this model, which runs attention and "
            "MLP on one input, has a factor behind blocks or one sublayer in each, only halves of one can be stored "
            "together: use 'block'"
        )


def check_sites(cfg: Depth, blocks: int, lone: Sequence[Sublayer] = ()) -> frozenset[Site]:
    """The sites that the recipe names, none with a count. Raises PruneError for what is not there or has to stay.

    `lone`: what each block is, where it is one sublayer.
    """
    if cfg.listed is not None:
        return _listed(cfg, blocks, lone)
    there = most_units(cfg.unit, blocks, lone)
    if cfg.units > there:
        has = f"the model has {blocks}" if cfg.unit == "block" else f"the model has {blocks} blocks"
        raise PruneError(
            f"prune.count: {cfg.units} {NAMES[cfg.unit]} to drop, {has}: drop at most {there} "
            "(the attention of block 0 stays)"
        )
    return frozenset()


def _listed(cfg: Depth, blocks: int, lone: Sequence[Sublayer]) -> frozenset[Site]:
    field = "prune.sites" if cfg.unit == "sublayer" else "prune.blocks"
    sites = named_sites(cfg, lone)
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
        parallel=arch_of(twin.model).together(twin.base.config),
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
        if part_of(twin.arch, name, blocks_of(twin.model)[block]) == part
    )


def _site_parameters(twin: Twin, site: Site, gone: Collection[Site]) -> int:
    """Parameters of a sublayer with its norms, but for one that an MLP beside it, which is not `gone`, reads too."""
    arch = arch_of(twin.model)
    block = blocks_of(twin.model)[site.block]
    shared = arch.attention_norms if not arch.mlp_norms and Site(site.block, "mlp") not in gone else ()
    return sum(
        parameter.numel()
        for name, parameter in block.named_parameters()
        if part_of(arch, name, block) == site.part and name.partition(".")[0] not in shared
    )


def depth_cost(cfg: Depth, model: Description) -> Cost:
    """What dropping takes from a model. Raises PruneError for what `prune_depth` would refuse."""
    refuse_pairs(cfg, model.parallel)
    check_sites(cfg, model.blocks, model.lone)
    if cfg.repair != "none":
        refuse_norm_behind(ARCHS[model.model_type], cfg.repair)
    share = share_gone(cfg, model)
    return Cost(
        gone=share * (model.active - model.embedding_parameters),
        unstored=_unstored(cfg, model),
        blocks=share,
        own=_repaired_weights(cfg, model),
        passes=search_passes(cfg, model.blocks, model.lone),
        flops=search_flops(cfg, model),
        warnings=tuple(depth_warnings(cfg, model)),
    )


def _unstored(cfg: Depth, model: Description) -> float:
    """Weights that the exported model is known to do without: to the number where blocks are named or all alike."""
    sizes = model.block_parameters
    if cfg.listed is not None and sizes and (cfg.unit == "block" or model.lone):
        return sum(sizes[block] for block in whole_blocks(named_sites(cfg, model.lone)))
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
    if model.lone:
        return _share_of_blocks(cfg, model)
    attention = 2 * model.width * model.head_size * (model.heads + model.kv_heads)
    mlp = model.mlp_active
    weights = {"attention": attention, "mlp": mlp, "sublayer": (attention + mlp) / 2}
    weights |= dict.fromkeys(("block", "pair"), attention + mlp)
    if cfg.unit == "sublayer" and cfg.sites:
        gone = sum(weights[site.part] for site in named_sites(cfg))
    else:
        gone = cfg.units * weights[cfg.unit]
    return gone / (model.blocks * (attention + mlp))


def _share_of_blocks(cfg: Depth, model: Description) -> float:
    """As `share_gone`, where each block is one sublayer; a count is taken for blocks of mean size."""
    sizes = model.block_parameters
    if cfg.listed is not None:
        return sum(sizes[block] for block in whole_blocks(named_sites(cfg, model.lone))) / sum(sizes)
    may_go = [
        size for size, part in zip(sizes, model.lone, strict=True) if cfg.unit not in SUBLAYERS or part == cfg.unit
    ]
    return cfg.units * sum(may_go) / len(may_go) / sum(sizes)


def share_unstored(cfg: Depth, model: Description) -> float:
    """Of all blocks, the share that the exported model is known to do without."""
    if model.lone:
        return _share_of_blocks(cfg, model)
    if cfg.unit in ("block", "pair"):
        return cfg.units / model.blocks
    if cfg.unit == "sublayer" and cfg.sites:
        return 1 - len(_packed(cfg, model)) / model.blocks
    return 0.0  # attention (MLP) alone: every MLP (attention) left needs a block; chosen sublayers: nobody knows yet


def _packed(cfg: Depth, model: Description) -> tuple[Packed, ...]:
    """The blocks that are stored without the named sites."""
    return packed_as(model.parallel)(sites_of(range(model.blocks)) - named_sites(cfg, model.lone))


def search_flops(cfg: Depth, model: Description) -> float:
    """FLOP of a search: of each candidate half the blocks, as the blocks before it need not run, and the head twice."""
    if cfg.calibration is None:
        return 0.0
    inside = model.active - model.embedding_parameters
    head = model.vocabulary * model.width
    tokens = cfg.calibration.samples * cfg.calibration.length
    return search_passes(cfg, model.blocks, model.lone) * tokens * 2 * (inside / 2 + 2 * head)


def depth_warnings(cfg: Depth, model: Description) -> list[str]:
    """What will probably disappoint, said before hours are spent."""
    found, share = [], share_gone(cfg, model)
    if share > DEPTH_WALL:
        what = "blocks" if cfg.unit == "block" else "blocks' weights"
        found.append(f"{share:.0%} of the {what} go: LoRA budgets recover about {DEPTH_WALL:.0%}")
    if model.lone:
        return found
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


def refuse_repair(twin: Twin, kind: str, batches: list[LongTensor]) -> None:
    """Raise PruneError where nothing can be folded in (a norm behind the sublayer), or there is too little text."""
    refuse_norm_behind(arch_of(twin.model), kind)
    samples = sum(len(ids_BT) for ids_BT in batches)
    if samples < 2:
        raise PruneError(
            f"prune.repair: '{kind}' needs samples to fit and others to measure on, found {samples}: raise "
            "prune.calibration.samples"
        )


def refuse_norm_behind(arch: Arch, kind: str) -> None:
    """Raise PruneError for a family of which nothing can be folded in: a norm behind each sublayer, or experts."""
    if arch.norm_behind:
        raise PruneError(
            f"prune.repair: '{kind}' cannot be folded into {arch.model_type}: behind each sublayer it has a norm, "
            "which no matrix passes through. Use prune.repair: none"
        )
    if arch.experts is not None:
        raise PruneError(
            f"prune.repair: '{kind}' cannot be folded into {arch.model_type}: what its experts write goes through "
            "no one matrix. Use prune.repair: none"
        )


def repaired(
    twin: Twin, dropped: frozenset[Site], kind: str, batches: list[LongTensor]
) -> tuple[dict[str, Tensor], JsonObject]:
    """The rewritten weights by parameter name, without those that make it worse, and what the repair brought.

    The record: `kind`, `kept` (whether any weight is rewritten), `kl_before` and `kl_after` (mean KL(dense || pruned) a
    token on held-out samples, of the model as it is used), `tokens_fitted`, `tokens_held_out`, and `cuts`: for each run
    of dropped sites (`dropped`) the `site` before it, the mean square error of the stream behind the cut before and
    after on the fitted tokens, the KL before and after, and whether this rewrite is `kept`. Cuts are repaired one after
    another, each on what those before it give; a repair that does not lower the KL is left out with a warning.

    Source: Shopkhoev et al., "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization",
    arXiv 2505.02819, section 2 (least squares, T merged into the MLP's down projection); the ridge pulls towards T = 1
    here, and `rescale` is their T restricted to a diagonal.
    """
    fit, held_out = _split(batches)
    dense = [final_hidden(twin, ids_BT).cpu() for ids_BT in held_out]
    before = kl = _mean_kl(twin, held_out, dense, dropped)
    weights: dict[str, Tensor] = {}
    cuts = []
    for start, end in console.track(runs_of(dropped), f"repair: {kind}", unit="cuts"):
        found, errors = fitted(twin, dropped, kind, fit, weights, start, end)
        with _worn(twin, weights | found):
            after = _mean_kl(twin, held_out, dense, dropped)
        cut = {"site": str(site_before(twin, start)), "dropped": [str(site_at(point)) for point in range(start, end)]}
        cuts.append(cut | errors | {"kl_before": kl, "kl_after": after, "kept": after < kl})
        if after < kl:
            weights, kl = weights | found, after
        else:
            moved = f"KL on held-out text went from {kl:.4g} to {after:.4g}"
            console.warn(f"prune.repair: {cut['site']}: {moved}: this repair is left out")
    record = {"kind": kind, "kept": bool(weights), "kl_before": before, "kl_after": kl}
    return weights, record | {"tokens_fitted": _tokens(fit), "tokens_held_out": _tokens(held_out), "cuts": cuts}


def fitted(
    twin: Twin,
    dropped: frozenset[Site],
    kind: str,
    batches: list[LongTensor],
    weights: dict[str, Tensor],
    start: int,
    end: int,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The rewritten weights before the cut from point `start` to `end`, and the error behind it before and after.

    `weights` are those of the repairs before it.
    """
    name = _last_linear(twin, site_before(twin, start))
    sums = _sums(twin, dropped, weights, batches, name, start, end, diagonal=kind == "rescale")
    return _folded(linears_of(twin.model)[name], name, sums.transform()), sums.errors()


def site_before(twin: Twin, point: int) -> Site:
    """The last site that writes to the residual stream before this point of it, of those that a block has."""
    site = site_at(point - 1)
    there = sublayers_in(twin.blocks[site.block], twin.arch)
    return site if site.part in there else Site(site.block, there[-1])


def _split(batches: list[LongTensor]) -> tuple[list[LongTensor], list[LongTensor]]:
    """Samples to fit on, and others to measure on, in batches as large as those given."""
    rows_BT, size = torch.cat(tuple(batches)), len(batches[0])
    out = torch.zeros(len(rows_BT), dtype=torch.bool)
    out[(len(rows_BT) - 1) % HELD_OUT :: HELD_OUT] = True  # the last sample is always one of them
    return list(rows_BT[~out].split(size)), list(rows_BT[out].split(size))  # type: ignore[return-value]


def _tokens(batches: list[LongTensor]) -> int:
    return sum(ids_BT.numel() for ids_BT in batches)


def _mean_kl(twin: Twin, batches: list[LongTensor], dense: list[Tensor], closed: frozenset[Site]) -> float:
    total = 0.0
    for ids_BT, dense_ND in zip(batches, dense, strict=True):
        pruned_ND = final_hidden(twin, ids_BT, closed)
        total += row_sum(twin, kl_rows, dense_ND.to(pruned_ND.device), pruned_ND)
    return total / _tokens(batches)


def _last_linear(twin: Twin, site: Site) -> str:
    arch = arch_of(twin.model)
    return f"{arch.blocks}.{site.block}.{linears_in(twin.blocks[site.block], arch, site.part)[-1]}"


@dataclasses.dataclass
class _Sums:
    """Least squares of r ~ c o A over tokens, streamed in float64, where o is what the linear puts out.

    T = 1 + A^T. c, by which the block multiplies o before adding it (Granite; else 1), is read off m ~ c o: the stream
    itself is rounded to its own size, which in half precision is much coarser than o.
    """

    diagonal: bool
    gram: Tensor | float = 0.0  # o^T o, (D, D) or its diagonal
    cross: Tensor | float = 0.0  # o^T r
    r_square: float = 0.0
    o_m: float = 0.0
    o_square: float = 0.0
    rows: int = 0

    def add(self, o_ND: Tensor, m_ND: Tensor, r_ND: Tensor) -> None:
        o_ND, m_ND, r_ND = o_ND.double(), m_ND.double(), r_ND.double()
        self.gram = self.gram + (o_ND.square().sum(0) if self.diagonal else o_ND.T @ o_ND)
        self.cross = self.cross + ((o_ND * r_ND).sum(0) if self.diagonal else o_ND.T @ r_ND)
        self.r_square += float(r_ND.square().sum())
        self.o_m += float((o_ND * m_ND).sum())
        self.o_square += float(o_ND.square().sum())
        self.rows += len(o_ND)

    def solution(self) -> Tensor:
        """c A: (D, D), or its diagonal (D,)."""
        gram, cross = torch.as_tensor(self.gram), torch.as_tensor(self.cross)
        power_D = gram if self.diagonal else gram.diagonal()
        ridge_D = RIDGE * power_D + torch.finfo(torch.float64).tiny + 1e-12 * power_D.mean()
        return cross / (gram + ridge_D) if self.diagonal else torch.linalg.solve(gram + ridge_D.diag(), cross)

    def transform(self) -> Tensor:
        """T: (D, D), or its diagonal (D,)."""
        change = self.solution() * (self.o_square / self.o_m)
        return 1 + change if self.diagonal else torch.eye(len(change), dtype=change.dtype).to(change) + change.T

    def errors(self) -> dict[str, float]:
        """Mean square error a token of the stream behind the cut, before and after, on the fitted tokens."""
        gram, cross, a = torch.as_tensor(self.gram), torch.as_tensor(self.cross), self.solution()
        explained = 2 * (a * cross).sum() - (a * (gram * a if self.diagonal else gram @ a)).sum()
        return {
            "error_before": self.r_square / self.rows,
            "error_after": (self.r_square - float(explained)) / self.rows,
        }


def _sums(
    twin: Twin,
    dropped: frozenset[Site],
    weights: dict[str, Tensor],
    batches: list[LongTensor],
    name: str,
    start: int,
    end: int,
    *,
    diagonal: bool,
) -> _Sums:
    """The sums for the linear `name`, which writes point `start`; `end` is where the stream should be the dense one."""
    sums, seen, before = _Sums(diagonal), [], point_of(site_before(twin, start))
    for ids_BT in batches:
        dense_ND = residual_stream(twin, ids_BT, (), [end])[end].flatten(0, 1)
        hook = linears_of(twin.model)[name].register_forward_hook(lambda _m, _a, output: seen.append(output))
        try:
            with _worn(twin, weights):
                pruned = residual_stream(twin, ids_BT, dropped, [before, start])
        finally:
            hook.remove()
        before_ND, after_ND = pruned[before].flatten(0, 1).double(), pruned[start].flatten(0, 1).double()
        sums.add(seen.pop().flatten(0, 1), after_ND - before_ND, dense_ND.double() - after_ND)
    return sums


def _folded(linear: nn.Linear, name: str, t: Tensor) -> dict[str, Tensor]:
    """T W, and T b if there is a bias, in the dtype of the layer; multiplied in float64 and rounded once."""
    with present(linear.weight):
        weight_OI = linear.weight.detach().to(torch.float64, copy=True)
    found = {f"{name}.weight": t[:, None] * weight_OI if t.dim() == 1 else t @ weight_OI}
    if linear.bias is not None:
        bias_O = linear.bias.detach().double()
        found[f"{name}.bias"] = t * bias_O if t.dim() == 1 else t @ bias_O
    return {key: value.to(linear.weight.dtype) for key, value in found.items()}


@contextmanager
def _worn(twin: Twin, weights: dict[str, Tensor]) -> Iterator[None]:
    """Show these weights in place of the dense ones, which come back on exceptions too."""
    parameters = {name: twin.base.get_parameter(name) for name in weights}
    dense = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = dense[name]


register(Pruner(Depth, prune_depth, depth_cost))
