"""What pruning decided, as data: which blocks went, which weights are zero, and the scores behind it.

`plan.json` is the plan, `masks.safetensors` the masks, 1 bit a weight. Every mask carries a certificate (shape, number
of zeros, pattern) that is checked whenever the masks are read, and again on the exported checkpoint.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from recover import artifacts
from recover.errors import ArtifactError
from recover.models.masked_linear import pack, unpack

PLAN = "plan.json"
MASKS = "masks.safetensors"
MEND = "Delete the folder and run the stage prune again"

Kind = Literal["none", "depth", "magnitude", "wanda"]


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
        return cls((out_features, in_features), keep_OI.numel() - int(keep_OI.sum()), pattern)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A pruned view of a dense model with `blocks` blocks: all but `dropped`, with the weights in `masks` zeroed.

    `masks` is keyed by the full module name of a linear layer. `scores` holds every candidate of every round, in the
    order they were tried. `nonzero` counts the weights that can be non-zero, `parameters_pruned` those that have to be
    stored.
    """

    kind: Kind
    blocks: int
    dropped: tuple[int, ...] = ()
    scores: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    masks: dict[str, MaskRecord] = dataclasses.field(default_factory=dict)
    parameters_dense: int = 0
    parameters_pruned: int = 0
    nonzero: int = 0
    calibration: dict[str, Any] = dataclasses.field(default_factory=dict)

    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        dropped = tuple(sorted(self.dropped))
        if len(set(dropped)) != len(dropped) or any(not 0 <= block < self.blocks for block in dropped):
            raise ValueError(f"dropped blocks {list(dropped)} are not distinct blocks of a model with {self.blocks}")
        object.__setattr__(self, "dropped", dropped)

    @classmethod
    def none(cls, blocks: int) -> Plan:
        """Nothing pruned: dense and pruned view are the same."""
        return cls("none", blocks)

    @property
    def kept(self) -> tuple[int, ...]:
        """Blocks that survive, in dense numbering."""
        return tuple(block for block in range(self.blocks) if block not in self.dropped)

    @property
    def sparsity(self) -> float:
        """Share of zeros among the masked weights (0 without masks)."""
        total = sum(record.shape[0] * record.shape[1] for record in self.masks.values())
        return sum(record.zeros for record in self.masks.values()) / total if total else 0.0

    def summary(self) -> str:
        """One line for the console: what goes and what stays."""
        if self.kind == "none":
            return f"nothing pruned: {self.blocks} blocks"
        share = self.nonzero / self.parameters_dense if self.parameters_dense else 0.0
        left = f"{self.nonzero:,} of {self.parameters_dense:,} weights left ({share:.1%})"
        if self.kind == "depth":
            return f"depth: blocks {', '.join(map(str, self.dropped))} of {self.blocks} dropped; {left}"
        patterns = ", ".join(sorted({record.pattern for record in self.masks.values()}))
        return f"{self.kind}: {self.sparsity:.1%} of {len(self.masks)} weight matrices zero ({patterns}); {left}"

    def to_json(self) -> dict[str, Any]:
        """A value that `from_json` turns back into an equal plan."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Any, where: str = PLAN) -> Plan:
        """The plan that `to_json` gave; raises ArtifactError naming each field that is missing, unknown or mistyped."""
        try:
            return TypeAdapter(cls).validate_python(value)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'plan'}: {e['msg']}" for e in error.errors())
            raise ArtifactError(f"{where}: not a plan ({problems}). {MEND}") from error


def save_plan(plan: Plan, masks: dict[str, Tensor], folder: Path) -> None:
    """Write the plan and its masks so that `load_plan` returns equal ones; the plan is last and holds the masks' hash.

    Raises ArtifactError (disk full, no permission); asserts that the masks fulfil the plan's certificates.
    """
    path = folder / MASKS
    assert masks.keys() == plan.masks.keys(), "masks and certificates are not of the same weights"
    for name, keep_OI in masks.items():
        assert MaskRecord.of(keep_OI, plan.masks[name].pattern) == plan.masks[name], f"{name}: not as certified"
    digest = None
    if masks:
        packed = {name: pack(keep_OI).cpu().contiguous() for name, keep_OI in masks.items()}
        artifacts.write_bytes(path, safetensors.torch.save(packed))
        digest = artifacts.sha256(path)
    artifacts.write_json(folder / PLAN, plan.to_json() | {"masks_sha256": digest})
    if not masks:
        path.unlink(missing_ok=True)  # of an earlier plan in this folder


def load_plan(folder: Path) -> tuple[Plan, dict[str, Tensor]]:
    """The plan and its certified masks (bool, true = survives); raises ArtifactError naming the file and its fault."""
    value = artifacts.read_json(folder / PLAN)
    digest = value.pop("masks_sha256", None) if isinstance(value, dict) else None
    plan = Plan.from_json(value, str(folder / PLAN))
    return plan, _load_masks(plan, folder / MASKS, digest) if plan.masks else {}


def _load_masks(plan: Plan, path: Path, digest: str | None) -> dict[str, Tensor]:
    if not path.is_file():
        raise ArtifactError(f"{path}: missing, and the plan beside it names {len(plan.masks)} masked weights. {MEND}")
    found = artifacts.sha256(path)
    if found != digest:
        raise ArtifactError(f"{path}: damaged: its sha256 is {found}, the plan beside it expects {digest}. {MEND}")
    try:
        packed = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: cannot be read as safetensors ({error}). {MEND}") from error
    if packed.keys() != plan.masks.keys():
        differing = sorted(packed.keys() ^ plan.masks.keys())[:4]
        raise ArtifactError(f"{path}: masks and plan name different weights: {differing}. {MEND}")
    return {name: _certified(packed[name], record, f"{path}: {name}") for name, record in plan.masks.items()}


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
