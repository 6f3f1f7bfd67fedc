"""What dropping blocks and sublayers takes from a model, and what of it cannot work, from the configuration alone."""

from __future__ import annotations

from recover.base.errors import PruneError, RecipeError
from recover.config.prune import CLOSING
from recover.config.recipe import Depth
from recover.models.arch import arch_of_type
from recover.models.load import Description
from recover.models.site import SUBLAYERS, pack_sites, sites_of, zeroed_partners
from recover.prune.depth.depth import check_sites
from recover.prune.depth.repair import refuse_norm_behind
from recover.prune.depth.search import CANDIDATES, named_sites, units_of

DEPTH_WALL = 0.30  # share of the blocks' weights that a LoRA budget recovers (peers' figures, docs/theory.md)


def refuse_depth(cfg: Depth, model: Description) -> None:
    """Raise RecipeError for what pruning itself would refuse, after the dense model was measured for nothing."""
    try:
        check_sites(cfg, model.blocks)
        if cfg.repair != "none":
            refuse_norm_behind(arch_of_type(model.model_type), cfg.repair)
    except PruneError as error:
        raise RecipeError(str(error)) from None


def share_gone(cfg: Depth, model: Description) -> float:
    """Of the weights in all blocks, the share no longer run; a count of sublayers is taken for an even mixture."""
    attention = 2 * model.width * model.head_size * (model.heads + model.kv_heads)
    mlp = 3 * model.width * model.intermediate
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
        return 1 - len(pack_sites(sites_of(range(model.blocks)) - named_sites(cfg))) / model.blocks
    return 0.0  # attention (MLP) alone: every MLP (attention) left needs a block; chosen sublayers: nobody knows yet


def search_passes(cfg: Depth, model: Description) -> int:
    """How many candidates a search closes, each for one pass of the calibration text; 0 without a search.

    Exact for greedy (of pairs about), the most that a beam needs, and of exchanges the fewest: one turn of the members
    that betters nothing.
    """
    if cfg.count is None or cfg.score not in CLOSING:
        return 0
    there = len(units_of(cfg.unit, model.blocks))
    if cfg.contiguous:
        return there - cfg.count + 1
    if there >= CANDIDATES:
        there = min(max(CANDIDATES, 2 * cfg.count), there)
    if not cfg.rounds:
        return there
    drops = [there - gone for gone in range(cfg.count)]
    exchanges = (cfg.count - 1) * (there - cfg.count) if cfg.swap else 0
    return drops[0] + (cfg.beam or 1) * sum(drops[1:]) + exchanges


def search_flops(cfg: Depth, model: Description) -> float:
    """FLOP of a search: of each candidate half the blocks, as the blocks before it need not run, and the head twice."""
    if cfg.calibration is None:
        return 0.0
    inside = model.parameters - model.embedding_parameters
    head = model.vocabulary * model.width
    tokens = cfg.calibration.samples * cfg.calibration.length
    return search_passes(cfg, model) * tokens * 2 * (inside / 2 + 2 * head)


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
    packed = pack_sites(sites_of(range(model.blocks)) - named_sites(cfg))
    return f"{len(packed)} of {model.blocks} blocks are stored, with {zeroed_partners(packed)} zeroed partners"
