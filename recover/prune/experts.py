"""Whole experts go: those that matter least to each mixture, by what they give, how often, or what closing them costs.

Every block loses equally many, as stock classes have one number of experts; where a router chooses from groups, every
group does. Experts that stay are numbered anew in their order, and routers keep their rows.

Shapes: B batch, T tokens, S pairs of a token and an expert, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import LongTensor, Tensor

from recover.base import console
from recover.base.errors import PruneError
from recover.base.journal import Entry, Journal
from recover.config.recipe import Experts
from recover.models.arch import base_of, experts_of, groups_of
from recover.models.experts import keeping, mixtures_of, watching
from recover.models.plan import Plan, Pruned
from recover.prune.calibrate import calibration_record, check_context
from recover.prune.depth.scores import OutputScore
from recover.prune.registry import Cost, Pruner, register
from recover.prune.stream import kl_rows, residual_stream

if TYPE_CHECKING:
    from recover.base.memory import Mixture
    from recover.models.load import Description
    from recover.models.twin import Twin

EXPERTS_WALL = 0.50  # share of the experts up to which large mixtures keep what they can (REAP, arXiv 2510.13999)
NONE = "it has no mixture of experts: use another prune.kind"


def prune_experts(twin: Twin, cfg: Experts, batches: list[LongTensor], journal: Journal | None = None) -> Pruned:
    """A plan with fewer experts in every mixture, those of the lowest score in it; no masks.

    `plan.scores` has a record for each block: the score of every expert, and how many tokens it was given. With `kl`,
    blocks are gone through in their order, with what those before have lost closed already. Raises PruneError for a
    model without experts, for numbers that its router cannot do with, and without calibration text.
    """
    journal, model = journal or Journal(), twin.model
    if not batches:
        raise PruneError(f"prune.score: '{cfg.score}' is measured on text: give prune.calibration")
    if not mixtures_of(model):
        raise PruneError(f"prune.kind: experts: this {model.config.model_type} model cannot be pruned so: {NONE}")
    check_context(model, batches)
    experts, used = experts_of(model.config)
    groups, used_groups = groups_of(model.config)
    gone = _checked(cfg, experts, used, groups, used_groups)
    seen = journal.once("what experts give", lambda: Entry(_seen(twin, batches))).value
    reap, tokens = _by_block(seen["reap"]), _by_block(seen["tokens"])
    _say_idle(tokens)
    scores = tokens if cfg.score == "frequency" else reap
    closed: dict[int, dict[int, float]] = {}
    if cfg.score == "kl":
        closed = _closed(twin, batches, reap, gone, cfg.candidates or 2 * gone, journal)
        kept = {block: _without(experts, _lowest(list(found), found, gone)) for block, found in closed.items()}
    else:
        kept = {block: _kept(scores[block], gone, groups) for block in scores}
    records = [
        _record(block, cfg.score, scores[block], tokens[block], closed.get(block), kept[block]) for block in kept
    ]
    return Pruned(_plan(twin, kept, records, calibration_record(cfg.calibration, batches)), {}, {})


def _checked(cfg: Experts, experts: int, used: int, groups: int, used_groups: int) -> int:
    """How many experts of a block go. PruneError, naming the field, for what the router could not do with."""
    gone, field = cfg.removed(experts), "count" if cfg.count is not None else "share"
    left = experts - gone
    found = f"prune.{field}: {gone} of {experts} experts go"
    if gone < 1:
        raise PruneError(f"{found}: {cfg.share:g} of them is less than one: give a larger share, or a count")
    if groups > 1 and gone % groups:
        raise PruneError(
            f"{found}, and the router chooses from {groups} groups of equal size (n_group): give a multiple of {groups}"
        )
    each = left // groups
    if left < used or (groups > 1 and (each < 2 or used_groups * each < used)):
        least = used if groups == 1 else groups * max(2, -(-used // used_groups))
        raise PruneError(
            f"{found}, which leaves {max(left, 0)}, and a token goes through {used} (num_experts_per_tok): at most "
            f"{experts - least} can go"
        )
    if groups > 1 and cfg.score == "kl":
        raise PruneError(
            f"prune.score: 'kl' closes one expert, and the router chooses from {groups} groups of equal size "
            "(n_group): use reap"
        )
    if cfg.candidates is not None and not gone <= cfg.candidates <= experts:
        raise PruneError(f"prune.candidates: {cfg.candidates}: expected {gone} (those that go) to {experts} (all)")
    return gone


@torch.no_grad()
def _seen(twin: Twin, batches: Sequence[LongTensor]) -> dict[str, dict[int, list[float]]]:
    """Of every expert, by block: REAP's score, 0 of one that saw no token; and how many tokens it was given.

    Source: Lasby et al., REAP, arXiv 2510.13999, section 4: the mean over an expert's tokens of router weight x L2 norm
    of its output, with router weights as the model applies them.
    """
    sums: dict[int, Tensor] = {}
    tokens: dict[int, Tensor] = {}
    experts = experts_of(twin.model.config)[0]

    def see(block: int) -> Any:
        def take(_token_S: Tensor, expert_S: Tensor, y_SD: Tensor, weight_S: Tensor) -> None:
            norm_S = y_SD.float().norm(dim=-1) * weight_S.float()
            zero_E = torch.zeros(experts, dtype=torch.float64, device=y_SD.device)
            sums[block] = sums.get(block, zero_E).index_add(0, expert_S, norm_S.double())
            tokens[block] = tokens.get(block, zero_E) + torch.bincount(expert_S, minlength=experts)

        return take

    with watching(twin.model, see):
        for ids_BT in console.track(batches, "what experts give", unit="batches"):
            twin.model(input_ids=ids_BT.to(twin.model.device), use_cache=False, logits_to_keep=1)
    reap = {block: total_E / tokens[block].clamp_min(1) for block, total_E in sums.items()}
    for block, score_E in reap.items():
        if not score_E.isfinite().all():
            raise PruneError(
                f"block {block}: experts give what is not finite. Check the weights, or use model.dtype: float32"
            )
    return {"reap": _listed(reap), "tokens": _listed(tokens)}


def _listed(of_block: dict[int, Tensor]) -> dict[int, list[float]]:
    return {block: value_E.tolist() for block, value_E in of_block.items()}


def _by_block(of_block: dict[Any, list[float]]) -> dict[int, list[float]]:
    """As it was before a journal wrote it: JSON has words for keys."""
    return {int(block): values for block, values in of_block.items()}


def _say_idle(tokens: dict[int, list[float]]) -> None:
    idle = sum(count == 0 for counts in tokens.values() for count in counts)
    if idle:
        seen = f"{idle} of {sum(map(len, tokens.values()))} experts"
        console.warn(
            f"prune.calibration: {seen} saw no token, and count as 0: they go first. More samples, or "
            "texts of more kinds, would tell them apart"
        )


def _closed(
    twin: Twin, batches: list[LongTensor], reap: dict[int, list[float]], gone: int, candidates: int, journal: Journal
) -> dict[int, dict[int, float]]:
    """KL(dense || pruned) a token with each candidate of a block closed, on top of what blocks before it lost."""
    score = OutputScore(twin, batches, kl_rows)
    found: dict[int, dict[int, float]] = {}
    kept: dict[int, tuple[int, ...]] = {}
    for block in console.track(list(reap), "KL with experts closed", unit="blocks"):
        experts = len(reap[block])
        asked = _lowest(list(range(experts)), dict(enumerate(reap[block])), min(candidates, experts))
        with keeping(twin.model, kept):
            entry = journal.once(
                f"KL of experts of block {block}", lambda block=block, asked=asked: Entry(_alone(score, block, asked))
            )
        found[block] = dict(zip(sorted(asked), entry.value, strict=True))
        kept[block] = _without(experts, _lowest(list(found[block]), found[block], gone))
    return found


@torch.no_grad()
def _alone(score: OutputScore, block: int, asked: set[int]) -> list[float]:
    """The score with each of these experts of the block closed, in their order."""
    twin, candidates = score.twin, sorted(asked)
    experts, totals = experts_of(twin.model.config)[0], [0.0] * len(candidates)
    for batch, ids_BT in enumerate(score.batches):
        inputs = residual_stream(twin, ids_BT, (), [2 * block])
        for index, expert in enumerate(candidates):
            with keeping(twin.model, {block: _without(experts, {expert})}):
                hidden_ND = score.behind(batch, block, set(), inputs[2 * block])
            totals[index] += score.total(batch, hidden_ND)
    return [score.mean(total) for total in totals]


def _lowest(units: list[int], scores: dict[int, float], count: int) -> set[int]:
    """`count` of these of the lowest score, of equal ones the first."""
    return set(sorted(units, key=lambda unit: (scores[unit], unit))[:count])


def _without(experts: int, gone: set[int]) -> tuple[int, ...]:
    return tuple(expert for expert in range(experts) if expert not in gone)


def _kept(score_E: list[float], gone: int, groups: int) -> tuple[int, ...]:
    """All but those of the lowest score, equally many of each group of neighbours."""
    size, lost = len(score_E) // groups, set()
    for group in range(groups):
        members = list(range(group * size, (group + 1) * size))
        lost |= _lowest(members, dict(enumerate(score_E)), gone // groups)
    return _without(len(score_E), lost)


def _record(
    block: int, by: str, scores: list[float], tokens: list[float], closed: dict[int, float] | None, kept: Sequence[int]
) -> dict[str, Any]:
    record: dict[str, Any] = {"block": block, "by": by, "experts": scores, "tokens": [int(each) for each in tokens]}
    record["kept"] = list(kept)
    return record if closed is None else record | {"closed": [[expert, kl] for expert, kl in closed.items()]}


def _plan(
    twin: Twin, kept: dict[int, tuple[int, ...]], records: list[dict[str, Any]], calibration: dict[str, Any]
) -> Plan:
    dense = sum(parameter.numel() for parameter in twin.model.parameters())
    gone = 0
    for block, parts in mixtures_of(twin.model).items():
        for parameter in (each for part in parts for each in part.parameters()):
            gone += (len(parameter) - len(kept[block])) * parameter[0].numel()
    config, names = base_of(twin.model).config, twin.arch.experts
    assert names is not None
    left = len(next(iter(kept.values())))
    return Plan(
        kind="experts",
        blocks=len(twin.blocks),
        scores=records,
        parameters_dense=dense,
        parameters_pruned=dense - gone,
        nonzero=dense - gone,
        calibration=calibration,
        config={type(config).attribute_map.get(names.count, names.count): left},
        experts=kept,
    )


def experts_cost(cfg: Experts, model: Description) -> Cost:
    """What fewer experts take from a model: nothing that a token goes through. PruneError as `prune_experts`."""
    one = model.mixture
    if one is None:
        raise PruneError(f"prune.kind: experts: {model.model_type} models cannot be pruned so: {NONE}")
    gone = _checked(cfg, one.experts, one.used, one.groups, one.used_groups)
    mixed = model.blocks - one.plain
    tokens = cfg.calibration.samples * cfg.calibration.length
    passes = 1 if cfg.score != "kl" else 2 + mixed * min(cfg.candidates or 2 * gone, one.experts)
    inside = model.active - model.embedding_parameters
    flops = 2 * tokens * inside + (passes - 1) * tokens * 2 * (inside / 2 + 2 * model.vocabulary * model.width)
    return Cost(
        unstored=gone * mixed * (one.expert + one.row),
        passes=passes,
        flops=flops,
        warnings=tuple(_warnings(gone, one)),
    )


def _warnings(gone: int, one: Mixture) -> list[str]:
    found = ["a token goes through as many experts as before: less memory, and no less work"]
    if gone / one.experts > EXPERTS_WALL:
        found.insert(0, f"{gone / one.experts:.0%} of the experts go: up to {EXPERTS_WALL:.0%} is what others report")
    return found


register(Pruner(Experts, prune_experts, experts_cost))
