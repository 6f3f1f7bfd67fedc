"""Narrower blocks: neurons of the MLP and whole KV groups (a KV head with all its query heads) are cut out.

Every block loses equally many, chosen within the block, so that stock classes load the result. The weights that are
left are the pruned view's own (`models/switched.py`), held beside the dense ones, which stay for the teacher. They
are buffers that no state dict holds: under ZeRO-3 each process has all of them, unlike the dense weights.

A unit is a run of inputs of the linear that writes to the residual stream: a neuron is one input of the MLP's last
linear, a KV group as many inputs of the attention's last linear as its query heads have together. All scores come from
one pass of the dense model with hooks: units are ranked within a block, and Minitron found that measuring again after
each removal brings nothing.

Shapes: B batch, T tokens, N tokens (B * T), O out features, I in features, H heads (or neurons), U units (neurons or KV
groups), K kept units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import LongTensor, Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig

from recover.base import console
from recover.base.artifacts import JsonObject
from recover.base.errors import PruneError
from recover.base.journal import Journal
from recover.config.recipe import Width
from recover.models.arch import (
    ARCHS,
    Arch,
    arch_of,
    blocks_of,
    head_size_of,
    kv_heads_of,
    linears_in,
    linears_of,
    neurons_of,
)
from recover.models.plan import Plan, Pruned
from recover.models.site import Site, Sublayer
from recover.models.stored_weights import present
from recover.prune.calibrate import calibration_record, check_context
from recover.prune.matrices import Compensated, compensate
from recover.prune.registry import Cost, Pruner, register
from recover.prune.stream import Stream, check_finite, gram

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from recover.models.load import Description
    from recover.models.twin import Twin

WIDTH_WALL = 0.30  # share of the blocks' weights that a LoRA budget recovers (peers' figures, docs/theory.md)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What of a config says how wide a block is."""

    neurons: int
    heads: int
    groups: int
    head_size: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> Sizes:
        """The sizes of every block of a model with this config."""
        return cls(
            neurons=neurons_of(config),
            heads=config.num_attention_heads,
            groups=kv_heads_of(config),
            head_size=head_size_of(config),
        )

    def without(self, groups: int) -> Sizes:
        """As many KV groups fewer, each with its query heads: how many of those share a KV head stays the same."""
        left = self.groups - groups
        return dataclasses.replace(self, groups=left, heads=self.heads // self.groups * left)


def narrowed(arch: Arch, dense: Sizes, cfg: Width, stock: Callable[[], PretrainedConfig]) -> dict[str, int]:
    """The fields of the model's config that the recipe changes. PruneError, naming the field, for what cannot work.

    With fewer heads `head_dim` has to be said: most configs take hidden size / heads where it is missing. `stock`
    gives a config whose class is asked whether it takes so many heads.
    """
    if cfg.mlp is not None and arch.experts is not None:
        raise PruneError(
            f"prune.mlp: the MLPs of {arch.model_type} are mixtures of experts, and neurons of experts are not cut: "
            "remove whole experts with prune.kind: experts, or KV groups alone"
        )
    fields = {} if cfg.mlp is None else {arch.neurons: _neurons_left(dense.neurons, cfg)}
    if cfg.kv_groups is not None:
        fields |= _heads_left(arch, dense, cfg.kv_groups, stock)
    return fields


def _neurons_left(neurons: int, cfg: Width) -> int:
    left = cfg.neurons(neurons)
    if not 0 < left < neurons:
        found = f"prune.mlp: {cfg.mlp} of {neurons:,} neurons, in multiples of {cfg.step(neurons)}, leaves {left:,}"
        raise PruneError(f"{found}: expected at least one removed and one left; give a smaller prune.multiple")
    return left


def _heads_left(arch: Arch, dense: Sizes, groups: int, stock: Callable[[], PretrainedConfig]) -> dict[str, int]:
    if arch.kv_groups_stay:
        instead = "prune.mlp alone" if arch.experts is None else "another way to prune"
        raise PruneError(
            f"prune.kv_groups: {arch.model_type} keeps its KV groups: {arch.kv_groups_stay}. Use {instead}"
        )
    if not 0 < groups < dense.groups:
        raise PruneError(f"prune.kv_groups: {groups} of {dense.groups} KV groups to remove: keep at least one")
    fields, config = _head_fields(dense.without(groups)), stock()
    refusal = _refusal(config, fields)
    if refusal:
        works = [n for n in range(1, dense.groups) if not _refusal(config, _head_fields(dense.without(n)))]
        found = f"prune.kv_groups: {groups} of {dense.groups} leaves {fields['num_attention_heads']} heads"
        raise PruneError(
            f"{found}, and no stock {arch.model_type} model can have so many ({refusal}). "
            f"Works here: {', '.join(map(str, works)) or 'none'}"
        )
    return fields


def _head_fields(sizes: Sizes) -> dict[str, int]:
    return {
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.groups,
        "head_dim": sizes.head_size,
    }


def _refusal(config: PretrainedConfig, fields: dict[str, int]) -> str:
    """Why the stock config class does not take these sizes, empty if it does (Llama, Gemma: heads divide the width)."""
    try:
        type(config).from_dict({**config.to_dict(), **fields})
    except Exception as error:  # a foreign class: each version of transformers raises its own type
        return str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ").rstrip(".")
    return ""


class _Removal(NamedTuple):
    """In one kind of sublayer, `left` of `units` stay; `head` is the run of channels that one activation has."""

    part: Sublayer
    units: int
    left: int
    head: int


def prune_width(twin: Twin, cfg: Width, batches: list[LongTensor], journal: Journal | None = None) -> Pruned:
    """A plan with fewer neurons and KV groups in every block, those of the lowest score in it, and the weights left.

    `plan.scores` has one record a block and sublayer: how many units went, and their share of the block's score. Raises
    PruneError for sizes that no stock model can have, for families whose KV groups cannot go, without calibration text.
    """
    model = twin.model
    if not batches:
        raise PruneError(f"prune.score: '{cfg.score}' is measured on text: give prune.calibration")
    check_context(model, batches)
    config = narrowed(arch_of(model), Sizes.of(model.config), cfg, lambda: model.config)
    _say_rounded(cfg, model.config, config)
    _warn_of_head_size(model.config, config)
    removals = list(_removals(model.config, config))
    scores: dict[str, Tensor] = {}
    if cfg.score != "obs":
        places = {site: last for removal in removals for site, last in _last_linears(twin, removal)}
        scores = unit_scores(model, {str(site): place for site, place in places.items()}, batches, cfg.score)
    stream = Stream(twin, batches) if cfg.score == "obs" or cfg.repair == "linear" else None
    weights: dict[str, Tensor] = {}
    records = []
    for block in console.track(range(len(blocks_of(model))), "width", unit="blocks"):
        chosen: dict[Sublayer, Tensor] = {}
        there = [removal for removal in removals if _names(twin, block, removal.part)]
        for removal in there if scores else ():
            chosen[removal.part] = highest(scores[str(Site(block, removal.part))], removal.left)
        found = _compensated(twin, stream, block, there, chosen, cfg) if stream else {}
        for removal in there:
            made = found.get(removal.part)
            kept_K = made.kept_K if made else chosen[removal.part]
            rewritten_OI = made.weight_OI if made and cfg.repair == "linear" else None
            weights |= _sliced(twin, block, removal, kept_K, rewritten_OI)
            record = _record(block, removal, scores.get(str(Site(block, removal.part))), kept_K, cfg.score)
            errors = {"error": made.error, "error_plain": made.error_plain} if made else {}
            records.append(record | errors)
    return Pruned(_plan(twin, config, records, weights, calibration_record(cfg.calibration, batches)), {}, weights)


def _compensated(
    twin: Twin,
    stream: Stream,
    block: int,
    removals: Sequence[_Removal],
    chosen: Mapping[Sublayer, Tensor],
    cfg: Width,
) -> dict[Sublayer, Compensated]:
    """For each sublayer that loses units: what stays, and its last linear rewritten; the stream goes on through both.

    What the linear sees is measured with all blocks before it already pruned.
    """
    found: dict[Sublayer, Compensated] = {}
    with stream.resident(block) as linears:
        sums = stream.measure(block, gram)
        check_finite(sums)
        pruned = {}
        for removal in removals:
            name = _names(twin, block, removal.part)[-1]
            weight_OI = linears[name].weight
            made = compensate(weight_OI, sums[name], removal.units, removal.left, chosen.get(removal.part), name)
            runs = weight_OI.shape[1] // removal.units
            stays_I = torch.zeros(removal.units).index_fill(0, made.kept_K, 1.0).repeat_interleave(runs).to(weight_OI)
            pruned[name] = made.weight_OI.to(weight_OI.dtype) if cfg.repair == "linear" else weight_OI * stays_I
            found[removal.part] = made._replace(weight_OI=made.weight_OI.to(weight_OI.dtype).cpu())
        stream.advance(block, pruned)
    return found


def _say_rounded(cfg: Width, dense: PretrainedConfig, config: dict[str, int]) -> None:
    left, neurons = config.get(arch_of(dense).neurons), Sizes.of(dense).neurons
    if left is not None and cfg.mlp is not None:
        step = f"the nearest multiple of {cfg.step(neurons)}"
        console.say(f"prune.mlp {cfg.mlp}: {left:,} of {neurons:,} neurons stay ({1 - left / neurons:.1%} go), {step}")


def _warn_of_head_size(dense: PretrainedConfig, config: dict[str, int]) -> None:
    """transformers reads a `head_dim` that the class has no field for; other readers need not."""
    size = config.get("head_dim")
    if size is not None and getattr(dense, "head_dim", None) is None:
        left = f"{config['num_attention_heads']} heads of {size}"
        text = f"prune.kv_groups: {left} left, and {dense.model_type} configs rarely say 'head_dim'"
        console.warn(f"{text}: readers that take hidden size / heads instead (older vLLM) will refuse the export")


def _removals(stock: PretrainedConfig, config: dict[str, int]) -> Iterator[_Removal]:
    dense, neurons = Sizes.of(stock), arch_of(stock).neurons
    if "num_key_value_heads" in config:
        yield _Removal("attention", dense.groups, config["num_key_value_heads"], dense.head_size)
    if neurons in config:
        yield _Removal("mlp", dense.neurons, config[neurons], 1)


def _names(twin: Twin, block: int, part: Sublayer) -> list[str]:
    """The linears of a sublayer, the one that writes to the residual stream last; none where it is not there."""
    inside = linears_in(twin.blocks[block], twin.arch, part)
    return [f"{twin.arch.blocks}.{block}.{name}" for name in inside]


def _last_linears(twin: Twin, removal: _Removal) -> Iterator[tuple[Site, Outgoing]]:
    linears = linears_of(twin.model)
    for block in range(len(blocks_of(twin.model))):
        for last in _names(twin, block, removal.part)[-1:]:
            yield Site(block, removal.part), Outgoing(linears[last], removal.units, removal.head)


class Outgoing(NamedTuple):
    """The last linear of a sublayer; its inputs are `units` equal runs, each of heads of `head` channels."""

    linear: nn.Linear
    units: int
    head: int = 1


class Activation:
    """Mean over a sample's tokens of ||a_h||, then the L2 norm over samples; a unit's is the sum over its heads.

    Of a neuron, ||a_h|| is |a|. Source: Muralidharan et al., "Compact Language Models via Pruning and Knowledge
    Distillation" (Minitron), arXiv 2407.14679, importance analysis, with the aggregations that they settled on.
    """

    def __init__(self, outgoing: Outgoing) -> None:
        self.outgoing = outgoing
        self.squares_H: Tensor | None = None

    def add(self, x_BTI: Tensor) -> None:
        """Take the inputs of some samples into account."""
        mean_BH = x_BTI.float().unflatten(-1, (-1, self.outgoing.head)).norm(dim=-1).mean(1)
        squares_H = mean_BH.double().square().sum(0)
        self.squares_H = squares_H if self.squares_H is None else self.squares_H + squares_H

    def scores(self) -> Tensor | None:
        """(U,), None if nothing was seen."""
        return None if self.squares_H is None else self.squares_H.sqrt().view(self.outgoing.units, -1).sum(1)


class Fluctuation:
    """Variance of each input over all tokens x squared norm of its outgoing weights; summed over a unit's inputs.

    What does not vary is a constant that the rest can learn to add. Source: An et al., FLAP, arXiv 2312.11983, the
    weighted fluctuation metric. Their bias compensation is left out: stock classes have no bias there.
    """

    def __init__(self, outgoing: Outgoing) -> None:
        self.outgoing = outgoing
        self.count = 0
        self.mean_I = self.deviations_I = torch.zeros(())

    def add(self, x_BTI: Tensor) -> None:
        """Take the inputs of some samples into account (Chan's update: no difference of two large sums)."""
        x_NI = x_BTI.flatten(0, 1).float()
        variance_I, mean_I = torch.var_mean(x_NI, dim=0, correction=0)
        new, total = len(x_NI), self.count + len(x_NI)
        old_mean_I, old_I = self.mean_I.to(mean_I.device), self.deviations_I.to(mean_I.device)
        step_I = mean_I.double() - old_mean_I
        self.mean_I = old_mean_I + step_I * (new / total)
        self.deviations_I = old_I + variance_I.double() * new + step_I.square() * (self.count * new / total)
        self.count = total

    def scores(self) -> Tensor | None:
        """(U,), None if nothing was seen."""
        if not self.count:
            return None
        weight_OI = self.outgoing.linear.weight
        with present(weight_OI):
            squares_I = weight_OI.detach().double().square().sum(0)
        fluctuation_I = self.deviations_I / max(self.count - 1, 1) * squares_I
        return fluctuation_I.view(self.outgoing.units, -1).sum(1)


SCORES: dict[str, type[Activation] | type[Fluctuation]] = {"activation": Activation, "fluctuation": Fluctuation}


@torch.no_grad()
def unit_scores(
    model: PreTrainedModel, outgoing: dict[str, Outgoing], batches: Sequence[LongTensor], score: str
) -> dict[str, Tensor]:
    """The score of every unit of each named linear, (U,) in fp64 on the CPU, seen in full forward passes of the model.

    Raises PruneError when a linear is never run or a score is not finite.
    """
    seen = {name: SCORES[score](place) for name, place in outgoing.items()}

    def see(name: str) -> Any:
        return lambda _module, args: seen[name].add(args[0].detach())

    handles = [place.linear.register_forward_pre_hook(see(name)) for name, place in outgoing.items()]
    try:
        for ids_BT in console.track(batches, score, unit="batches"):
            # One position of logits: nobody reads them, and all would be the largest tensor of the pass.
            model(input_ids=ids_BT.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _checked(name, one.scores()) for name, one in seen.items()}


def _checked(name: str, score_U: Tensor | None) -> Tensor:
    if score_U is None:
        raise PruneError(f"{name}: never run in a forward pass, so there are no activations to score it by")
    if not score_U.isfinite().all():
        raise PruneError(f"{name}: sees inputs that are not finite. Check the weights, or use model.dtype: float32")
    return score_U.cpu()


def highest(score_U: Tensor, count: int) -> Tensor:
    """The indices, ascending, of exactly `count` units of the highest scores; on ties the lowest index goes."""
    return torch.argsort(score_U, stable=True)[len(score_U) - count :].sort().values


def _sliced(
    twin: Twin, block: int, removal: _Removal, kept_K: Tensor, rewritten_OI: Tensor | None = None
) -> dict[str, Tensor]:
    """The parameters of a sublayer that change: rows of all its linears but the last, columns of that.

    `rewritten_OI`: stands in the place of the last one's weight.
    """
    linears, weights = linears_of(twin.model), {}
    *into, last = _names(twin, block, removal.part)
    for name in into:
        rows_K = _features(linears[name].out_features, removal, kept_K)
        with present(*linears[name].parameters()):
            weights |= {f"{name}.{cfg}": tensor[rows_K] for cfg, tensor in _tensors(linears[name])}
    columns_K = _features(linears[last].in_features, removal, kept_K)
    with present(linears[last].weight):
        whole_OI = linears[last].weight.detach().cpu() if rewritten_OI is None else rewritten_OI
        weights[f"{last}.weight"] = whole_OI[:, columns_K].contiguous()
    return weights


def _tensors(linear: nn.Linear) -> list[tuple[str, Tensor]]:
    return [(cfg, parameter.detach().cpu()) for cfg, parameter in linear.named_parameters(recurse=False)]


def _features(features: int, removal: _Removal, kept_K: Tensor) -> Tensor:
    """Which of a linear's features belong to the kept units.

    In attention a unit is a run of neighbours, as `repeat_kv` has it: KV head g serves the query heads from g * n on.
    In an MLP it is one feature of each of the fused parts (Phi-3: gate and up in one matrix, one after the other).
    """
    each, rest = divmod(features, removal.units)
    if rest:
        raise AssertionError(f"{features} features are not {removal.units} equal units")
    if removal.part == "mlp":
        return torch.cat([kept_K + part * removal.units for part in range(each)])
    return (kept_K.unsqueeze(1) * each + torch.arange(each)).flatten()


def _record(block: int, removal: _Removal, score_U: Tensor | None, kept_K: Tensor, by: str) -> JsonObject:
    """Neurons are too many to list one by one; of a few KV groups all scores are kept, where each has one."""
    record: JsonObject = {"block": block, "part": removal.part, "by": by, "units": removal.units}
    record["removed"] = removal.units - removal.left
    if score_U is not None:
        total = float(score_U.sum())
        record["share_of_score"] = 1 - float(score_U[kept_K].sum()) / total if total else 0.0
    if removal.part == "attention":
        record |= {"groups": score_U.tolist()} if score_U is not None else {}
        record["kept"] = kept_K.tolist()
    return record


def _plan(
    twin: Twin,
    config: dict[str, int],
    records: list[JsonObject],
    weights: dict[str, Tensor],
    calibration: JsonObject,
) -> Plan:
    parameters = dict(twin.model.named_parameters())
    dense = sum(parameter.numel() for parameter in parameters.values())
    pruned = dense - sum(parameters[name].numel() - weight.numel() for name, weight in weights.items())
    return Plan(
        kind="width",
        blocks=len(blocks_of(twin.model)),
        scores=records,
        parameters_dense=dense,
        parameters_pruned=pruned,
        nonzero=pruned,
        calibration=calibration,
        weights={name: tuple(weight.shape) for name, weight in weights.items()},
        config=config,
    )


def width_cost(cfg: Width, model: Description) -> Cost:
    """What narrowing takes from a model. Raises PruneError for what `prune_width` would refuse."""
    arch = ARCHS[model.model_type]
    dense = Sizes(model.intermediate, model.heads, model.kv_heads, model.head_size)
    sizes: Any = {"hidden_size": model.width, arch.neurons: model.intermediate, **_head_fields(dense)}
    narrowed(arch, dense, cfg, lambda: CONFIG_MAPPING[model.model_type](**sizes))
    gone, stay = width_weights(cfg, model)
    share = gone / (model.parameters - model.embedding_parameters)
    said = f"{share:.0%} of the blocks' weights go: LoRA budgets recover about {WIDTH_WALL:.0%}"
    return Cost(gone=gone, unstored=gone, own=stay, warnings=(said,) if share > WIDTH_WALL else ())


def width_weights(cfg: Width, model: Description) -> tuple[int, int]:
    """Of the weights in all blocks, those that go, and those that stay in the linears that are cut."""
    neuron = model.mlp_matrices * model.width
    group = 2 * model.head_size * model.width * (model.heads // model.kv_heads + 1)
    neurons, groups = cfg.neurons(model.intermediate), cfg.kv_groups or 0
    gone = (model.intermediate - neurons) * neuron + groups * group
    stay = (neurons * neuron if cfg.mlp else 0) + ((model.kv_heads - groups) * group if groups else 0)
    blocks = model.lone.count("mlp") or model.blocks
    return gone * blocks, stay * blocks


register(Pruner(Width, prune_width, width_cost))
