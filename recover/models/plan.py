"""What pruning decided, as data: which blocks went, which weights are zero, and the scores behind it.

`plan.json` is the plan, `masks.safetensors` the masks, 1 bit a weight, `weights.safetensors` the weights that the
pruned view has of its own (rewritten or sliced). Every mask carries a certificate (shape, number of zeros, pattern)
that is checked whenever the masks are read, and again on the exported checkpoint.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import safetensors.torch
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from recover.base import artifacts
from recover.base.artifacts import JsonObject
from recover.base.errors import ArtifactError, ModelError
from recover.models.arch import (
    arch_of,
    attending,
    base_of,
    blocks_of,
    expert_shapes,
    experts_of,
    linears_of,
    mixture_in,
)
from recover.models.site import Packed, Site, Sublayer, packed_as, sites_in, sites_of, whole_blocks, zeroed_partners
from recover.models.switched import pack, unpack

PLAN = "plan.json"
MASKS = "masks.safetensors"
WEIGHTS = "weights.safetensors"
MEND = "Put the file back, or prune again: recover run RECIPE --from prune"


@dataclasses.dataclass(frozen=True)
class MaskRecord:
    """The certificate of one masked weight: `zeros` of its entries are zero, laid out as `pattern`."""

    shape: tuple[int, int]
    zeros: int
    pattern: str

    __pydantic_config__ = ConfigDict(extra="forbid")

    @classmethod
    def of(cls, keep_OI: Tensor, pattern: str) -> MaskRecord:
        """The record that this mask fulfils."""
        out_features, in_features = keep_OI.shape
        return cls((out_features, in_features), keep_OI.numel() - int(torch.count_nonzero(keep_OI)), pattern)


class MaskEntry(TypedDict):
    """A `MaskRecord` as plan.json has it."""

    shape: Sequence[int]
    zeros: int
    pattern: str


class PlanRecord(TypedDict):
    """plan.json; `Plan` says what each field is. The file has the digests of the plan's tensors too."""

    kind: str
    blocks: int
    scores: list[JsonObject]
    masks: dict[str, MaskEntry]
    parameters_dense: int
    parameters_pruned: int
    nonzero: int
    calibration: JsonObject
    weights: dict[str, Sequence[int]]
    config: dict[str, int]
    repair: JsonObject
    parallel: NotRequired[bool]
    dropped: Sequence[int]
    dropped_attention: Sequence[int]
    dropped_mlp: Sequence[int]


@dataclasses.dataclass(frozen=True)
class _Recorded:
    """What a plan and its file have in common: see `Plan`."""

    kind: str
    blocks: int
    _: dataclasses.KW_ONLY
    scores: list[JsonObject] = dataclasses.field(default_factory=list)
    masks: dict[str, MaskRecord] = dataclasses.field(default_factory=dict)
    parameters_dense: int = 0
    parameters_pruned: int = 0
    nonzero: int = 0
    calibration: JsonObject = dataclasses.field(default_factory=dict)
    weights: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    config: dict[str, int] = dataclasses.field(default_factory=dict)
    repair: JsonObject = dataclasses.field(default_factory=dict)
    parallel: bool = False
    experts: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclasses.dataclass(frozen=True)
class _Stored(_Recorded):
    """A plan as `plan.json` has it: whole blocks, and blocks of which one sublayer goes."""

    dropped: tuple[int, ...] = ()
    dropped_attention: tuple[int, ...] = ()
    dropped_mlp: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan(_Recorded):
    """A pruned view of a dense model with `blocks` blocks: all sublayers but `sites`, the weights in `masks` zeroed.

    `sites` go; they are given in any order, a number is a whole block, and are held sorted. `masks` is keyed by the
    full module name of a linear layer. `weights` names the parameters that the pruned view has of its own, with their
    shapes; `config` the fields of the model's config that those shapes change. `kind` is a label, that of the recipe: a
    plan is read by what it changes, whoever made it. `scores` holds what was measured, such as every candidate of every
    round, in the order they were tried. `nonzero` counts the weights that can be non-zero, `parameters_pruned` those
    that have to be stored. `repair` says what a closed-form repair did and brought. `parallel`: a block runs attention
    and MLP on one input. `experts`: by block, the experts that stay, ascending; without it all do.

    Raises ValueError for a site that is named twice, or of a block that is not there.
    """

    sites: tuple[Site, ...] = ()

    def __post_init__(self) -> None:
        given = [site for item in self.sites for site in ([item] if isinstance(item, Site) else sites_in(item))]
        wrong = sorted({site.block for site in given if given.count(site) > 1 or not 0 <= site.block < self.blocks})
        if wrong:
            raise ValueError(f"dropped blocks {wrong} are not distinct blocks of a model with {self.blocks}")
        object.__setattr__(self, "sites", tuple(sorted(given)))

    @classmethod
    def none(cls, blocks: int) -> Plan:
        """Nothing pruned: dense and pruned view are the same."""
        return cls("none", blocks)

    @property
    def dropped(self) -> tuple[int, ...]:
        """Whole blocks that go, ascending."""
        return whole_blocks(self.sites)

    @property
    def dropped_attention(self) -> tuple[int, ...]:
        """Blocks of which the attention goes and the MLP stays, ascending."""
        return self._alone("attention")

    @property
    def dropped_mlp(self) -> tuple[int, ...]:
        """Blocks of which the MLP goes and the attention stays, ascending."""
        return self._alone("mlp")

    def _alone(self, part: Sublayer) -> tuple[int, ...]:
        whole = self.dropped
        return tuple(site.block for site in self.sites if site.part == part and site.block not in whole)

    @property
    def kept(self) -> tuple[int, ...]:
        """Blocks that survive, in dense numbering."""
        whole = self.dropped
        return tuple(block for block in range(self.blocks) if block not in whole)

    @property
    def packed(self) -> tuple[Packed, ...]:
        """The blocks of the exported model, each made of kept sites."""
        return packed_as(self.parallel)(sites_of(range(self.blocks)) - set(self.sites))

    @property
    def sparsity(self) -> float:
        """Share of zeros among the masked weights (0 without masks)."""
        total = sum(record.shape[0] * record.shape[1] for record in self.masks.values())
        return sum(record.zeros for record in self.masks.values()) / total if total else 0.0

    def summary(self) -> str:
        """One line for the console: what goes and what stays."""
        changes = self._changes()
        if not changes:
            return f"nothing pruned: {self.blocks} blocks"
        share = self.nonzero / self.parameters_dense if self.parameters_dense else 0.0
        left = f"{self.nonzero:,} of {self.parameters_dense:,} weights left ({share:.1%})"
        zeroed = zeroed_partners(self.packed)
        stored = f"; {zeroed} zeroed partners stored beside lone sublayers" if zeroed else ""
        return f"{self.kind}: {'; '.join(changes)}; {left}{stored}"

    def _changes(self) -> list[str]:
        """What the pruned view has not, or has otherwise, in words."""
        gone = {"blocks": self.dropped, "attention of": self.dropped_attention, "MLP of": self.dropped_mlp}
        said = "; ".join(f"{what} {', '.join(map(str, blocks))}" for what, blocks in gone.items() if blocks)
        changes = [f"{said} dropped, of {self.blocks} blocks"] if said else []
        if self.config:
            changes.append(", ".join(f"{name} {value:,}" for name, value in self.config.items()))
        if self.masks:
            patterns = ", ".join(sorted({record.pattern for record in self.masks.values()}))
            changes.append(f"{self.sparsity:.1%} of {len(self.masks)} weight matrices zero ({patterns})")
        if self.weights and not changes:
            changes.append(f"{len(self.weights)} weights rewritten")
        return changes

    def to_json(self) -> PlanRecord:
        """A value that `from_json` turns back into an equal plan."""
        value = dataclasses.asdict(self)
        del value["sites"]
        for field in ("parallel", "experts"):
            if not value[field]:
                del value[field]  # earlier versions know no such field
        lists = ("dropped", "dropped_attention", "dropped_mlp")
        return cast(PlanRecord, value | {name: getattr(self, name) for name in lists})

    @classmethod
    def from_json(cls, value: Any, where: str = PLAN) -> Plan:
        """The plan that `to_json` gave; raises ArtifactError naming each field that is missing, unknown or mistyped."""
        try:
            stored = TypeAdapter(_Stored).validate_python(value)
            common = {field.name: getattr(stored, field.name) for field in dataclasses.fields(_Recorded)}
            return cls(**common, sites=_sites(stored))
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'plan'}: {e['msg']}" for e in error.errors())
        except ValueError as error:
            problems = str(error)
        raise ArtifactError(f"{where}: not a plan ({problems}). {MEND}")


def _sites(stored: _Stored) -> tuple[Site, ...]:
    """The sites of the three lists, as often as they are named."""
    whole = [site for block in stored.dropped for site in sites_in(block)]
    alone = [Site(block, "attention") for block in stored.dropped_attention]
    return (*whole, *alone, *(Site(block, "mlp") for block in stored.dropped_mlp))


class Pruned(NamedTuple):
    """What a method gives: the plan, its masks (bool, true = survives), the weights of the pruned view's own."""

    plan: Plan
    masks: dict[str, Tensor]
    weights: dict[str, Tensor]


def save_plan(plan: Plan, masks: dict[str, Tensor], folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write the plan and its tensors so that they are read back equal; the plan is last and holds the files' hashes.

    Raises ArtifactError (disk full, no permission); asserts that masks and weights are as the plan says.
    """
    path = folder / MASKS
    if masks.keys() != plan.masks.keys():
        raise AssertionError("masks and certificates are not of the same weights")
    for name, keep_OI in masks.items():
        if MaskRecord.of(keep_OI, plan.masks[name].pattern) != plan.masks[name]:
            raise AssertionError(f"{name}: not as certified")
    weights = weights or {}
    if {name: tuple(weight.shape) for name, weight in weights.items()} != plan.weights:
        raise AssertionError("weights not as planned")
    packed = {name: pack(keep_OI).cpu().contiguous() for name, keep_OI in masks.items()}
    plain = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    hashes = {"masks_sha256": _save(packed, path), "weights_sha256": _save(plain, folder / WEIGHTS)}
    artifacts.write_json(folder / PLAN, {**plan.to_json(), **hashes})


def _save(tensors: dict[str, Tensor], path: Path) -> str | None:
    """Write the tensors and give the file's sha256; without any, remove what an earlier plan left in this folder."""
    if not tensors:
        path.unlink(missing_ok=True)
        return None
    size = sum(tensor.nbytes for tensor in tensors.values())
    with artifacts.placing(path, size) as beside, artifacts.explaining_libraries(path, size):
        safetensors.torch.save_file(tensors, beside)
    return artifacts.sha256(path)


def load_plan(folder: Path) -> Pruned:
    """The plan, its certified masks and its weights; raises ArtifactError naming the file and its fault."""
    value = artifacts.read_json(folder / PLAN)
    hashes = {}
    for name in ("masks_sha256", "weights_sha256"):
        hashes[name] = value.pop(name, None) if isinstance(value, dict) else None
    plan = Plan.from_json(value, str(folder / PLAN))
    masks = _load(plan.masks, "masked weights", folder / MASKS, hashes["masks_sha256"])
    weights = _load(plan.weights, "weights of its own", folder / WEIGHTS, hashes["weights_sha256"])
    for name, shape in plan.weights.items():
        if tuple(weights[name].shape) != shape:
            found = tuple(weights[name].shape)
            raise ArtifactError(f"{folder / WEIGHTS}: {name} has shape {found}, the plan says {shape}. {MEND}")
    certified = {n: _certified(masks[n], record, f"{folder / MASKS}: {n}") for n, record in plan.masks.items()}
    return Pruned(plan, certified, weights)


def _load(names: Collection[str], what: str, path: Path, digest: str | None) -> dict[str, Tensor]:
    """The tensors that the plan names, from a file that is the one it was saved with."""
    if not names:
        return {}
    if not path.is_file():
        raise ArtifactError(f"{path}: missing, and the plan beside it names {len(names)} {what}. {MEND}")
    found = artifacts.sha256(path)
    if found != digest:
        raise ArtifactError(f"{path}: damaged: its sha256 is {found}, the plan beside it expects {digest}. {MEND}")
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: cannot be read as safetensors ({error}). {MEND}") from error
    if tensors.keys() != set(names):
        differing = sorted(tensors.keys() ^ set(names))[:4]
        raise ArtifactError(f"{path}: file and plan name different weights: {differing}. {MEND}")
    return tensors


def _certified(packed: Tensor, record: MaskRecord, where: str) -> Tensor:
    """The mask behind `packed`, known to have the recorded shape and number of zeros."""
    entries = record.shape[0] * record.shape[1]
    if packed.dtype != torch.uint8 or packed.numel() != -(-entries // 8):
        found = f"{packed.numel()} values of {packed.dtype}"
        raise ArtifactError(f"{where}: {found} cannot hold a mask of shape {record.shape}. {MEND}")
    keep_OI = unpack(packed, record.shape)
    zeros = MaskRecord.of(keep_OI, record.pattern).zeros
    if zeros != record.zeros:
        raise ArtifactError(f"{where}: {zeros} zeros, the certificate says {record.zeros}. {MEND}")
    return keep_OI


def check_attends(model: PreTrainedModel, sites: Collection[Site]) -> None:
    """Raise ModelError where no attention is left without these sites, of a model whose other blocks keep a state."""
    if set(attending(model)) <= set(sites):
        raise ModelError(
            f"no attention is left of {', '.join(map(str, attending(model)))}, and the length of a cache, with it the "
            "position of every new token, is read off one: leave one of them"
        )
    last = Site(len(blocks_of(model)) - 1, "attention")
    if arch_of(model).last_stays and last in sites:
        raise ModelError(
            f"{last} cannot go: {arch_of(model).model_type} takes its last block for one that attends to all"
        )


def check_fit(model: PreTrainedModel, plan: Plan, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raise ModelError unless plan, masks and weights belong to this model and to each other."""
    linears, blocks = linears_of(model), blocks_of(model)
    if plan.blocks != len(blocks):
        raise ModelError(f"the plan is for {plan.blocks} blocks, this model has {len(blocks)}: prune this model anew")
    check_attends(model, plan.sites)
    _check_experts(model, plan.experts)
    for what, planned, given in (("masks", plan.masks, masks), ("weights", plan.weights, weights)):
        differing = sorted(set(planned) ^ set(given))
        if differing:
            raise ModelError(
                f"the plan names {len(planned)} {what}, {len(given)} are given; differing: {differing[:4]}"
            )
    experts = expert_shapes(model) if masks else {}
    for name, keep_OI in masks.items():
        if name not in linears and name not in experts:
            raise ModelError(f"mask '{name}' belongs to no linear layer of this {model.config.model_type} model")
        linear = linears.get(name)
        shape = experts[name] if linear is None else (linear.out_features, linear.in_features)
        if tuple(keep_OI.shape) != shape:
            raise ModelError(f"mask '{name}' has shape {tuple(keep_OI.shape)}, its layer {shape}")
    for parameter, weight in weights.items():
        name = parameter.rpartition(".")[0]
        if name not in linears or f"{name}.weight" not in weights:
            raise ModelError(f"weight '{parameter}' belongs to no linear layer of this {model.config.model_type} model")
        _check_shape(parameter, weight, linears[name], masked=name in masks)


def _check_experts(model: nn.Module, kept: Mapping[int, tuple[int, ...]]) -> None:
    """Raise ModelError unless these experts can stay: there, ascending, equally many, as many as a token goes to."""
    arch, config = arch_of(model), base_of(model).config
    mixed = [index for index, block in enumerate(blocks_of(model)) if mixture_in(arch, block)]
    if not kept:
        return
    if sorted(kept) != mixed:
        raise ModelError(f"the plan keeps experts of blocks {sorted(kept)}, this model has some in {mixed}")
    experts, used = experts_of(config)
    counts = {len(each) for each in kept.values()}
    if len(counts) > 1 or min(counts) < used:
        raise ModelError(f"the plan keeps {sorted(counts)} experts: expected the same of each block, {used} at least")
    for index, each in kept.items():
        if list(each) != sorted(set(each)) or not 0 <= each[0] <= each[-1] < experts:
            raise ModelError(
                f"block {index}: experts {list(each)}: expected numbers from 0 to {experts - 1}, ascending"
            )


def _check_shape(parameter: str, weight: Tensor, linear: object, *, masked: bool) -> None:
    """A rewritten weight has the dense shape, a sliced one is smaller; under a mask it is rewritten."""
    dense = tuple(getattr(linear, parameter.rpartition(".")[2]).shape)
    found = tuple(weight.shape)
    larger = len(found) != len(dense) or any(new > old for new, old in zip(found, dense, strict=False))
    if larger or (masked and found != dense):
        raise ModelError(f"weight '{parameter}' has shape {found}, its layer {dense}")
