"""What training changes, by parameter name: weights and Adam's moments, whole, whatever engine holds them; and means.

So a checkpoint fits any number of processes and any engine: one process, DDP, DeepSpeed ZeRO-2 or ZeRO-3. Every
number is float32, and comes back to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from recover.base import console, dist, zero
from recover.base.errors import ArtifactError


@dataclass(frozen=True)
class Trained:
    """A model's trained parameters, their optimizer and mean, under DeepSpeed's `engine` or None."""

    model: nn.Module
    optimizer: Any
    average: Average
    engine: Any = None
    engine_name: str = "plain"
    device: torch.device = field(default_factory=dist.device)

    def values(self, applied: int) -> dict[str, Tensor]:
        """`weight/NAME`, once a step was applied `exp_avg/NAME` and `exp_avg_sq/NAME`, and the mean.

        On the main process; others get nothing, but all must call it: ZeRO gathers.
        """
        values: dict[str, Tensor] = {}
        kinds = ("weight", *(zero.MOMENTS if applied else ()))
        for name, parameter in _trained(self.model):
            for kind in kinds:
                held = self.engine is None
                value = _held(self.optimizer, parameter, kind) if held else zero.read_trained(parameter, kind)
                if dist.is_main():
                    values[f"{kind}/{name}"] = value.detach().float().cpu().clone(memory_format=torch.contiguous_format)
        return values | (self.average.values() if dist.is_main() else {})

    def put_back(self, values: dict[str, Tensor], applied: int, *, averaged: int) -> None:
        """The inverse of `values`; `applied` is how many steps Adam has made, `averaged` how many are in the mean.

        Raises:
            ArtifactError: the values are not those of this model's adapter.
        """
        self.average.take(values, averaged)
        trained = _trained(self.model)
        _check(trained, values, applied)
        if self.engine is None:
            _put_into_optimizer(trained, self.optimizer, values, applied)
        else:
            _put_into_engine(trained, self.engine, values, applied)


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _held(optimizer: Any, parameter: nn.Parameter, kind: str) -> Tensor:
    if kind == "weight":
        return parameter.data
    moments = optimizer.state.get(parameter) or {}  # none: it has had no gradient yet
    return moments[kind] if kind in moments else torch.zeros_like(parameter)


def _check(trained: list[tuple[str, nn.Parameter]], values: dict[str, Tensor], applied: int) -> None:
    kinds = ("weight", *(zero.MOMENTS if applied else ()))
    expected = {f"{kind}/{name}": zero.whole_shape(parameter) for name, parameter in trained for kind in kinds}
    found = {name: tuple(value.shape) for name, value in values.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ArtifactError(
            f"{len(wrong)} tensors are not this adapter's, such as {name}: found {found.get(name, 'none')}, "
            f"expected {expected.get(name, 'none')}"
        )


def _put_into_optimizer(
    trained: list[tuple[str, nn.Parameter]], optimizer: Any, values: dict[str, Tensor], applied: int
) -> None:
    names = {parameter: name for name, parameter in trained}
    described = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with torch.no_grad():
        for name, parameter in trained:
            parameter.copy_(values[f"weight/{name}"])
    moments = {
        index: {"step": torch.tensor(float(applied)), **{kind: values[f"{kind}/{names[p]}"] for kind in zero.MOMENTS}}
        for index, p in enumerate(order)
        if applied
    }
    # torch puts each where it belongs, also `step`, which some kinds of Adam want on the device.
    optimizer.load_state_dict({**described, "state": moments})


def _put_into_engine(
    trained: list[tuple[str, nn.Parameter]], engine: Any, values: dict[str, Tensor], applied: int
) -> None:
    device = dist.device()
    with zero.gathered(*(parameter for _, parameter in trained), changed=True), torch.no_grad():
        for name, parameter in trained:
            if not zero.dealt_out(parameter) or dist.is_main():
                parameter.data.copy_(values[f"weight/{name}"])
    for name, parameter in trained:
        zero.write_trained(parameter, "weight", values[f"weight/{name}"].to(device))
    if zero.make_moments(engine, applied):
        for kind in zero.MOMENTS:
            for name, parameter in trained:
                zero.write_trained(parameter, kind, values[f"{kind}/{name}"].to(device))
    elif applied:
        console.warn(
            "this version of DeepSpeed does not let Adam's moments be set: the adapters are as they were saved, "
            "the optimizer begins anew. The course will differ from that of a run that was never stopped"
        )


AVERAGE = "average/"  # in front of the names in a checkpoint


def averaged_steps(share: float | None, steps: int, ends: list[int]) -> list[range]:
    """Of each epoch, the steps (from 1) whose weights are averaged: as many as are `share` of all, an epoch's at most.

    `ends`: the last step of each. None: no steps.
    """
    if share is None:
        return []
    count = max(1, round(share * steps))
    begins = [0, *ends[:-1]]
    return [range(max(begin, end - count) + 1, end + 1) for begin, end in zip(begins, ends, strict=True)]


class Average:
    """A running mean of `parameters`, which every process holds whole; no call waits for the device.

    The adapters that an epoch ends with are the mean of those after each of its last steps. Weights of late steps lie
    around a point that is better than each of them; their mean is nearer to it, and costs no training (stochastic
    weight averaging: Izmailov et al., arXiv 1803.05407; the latest weights: Kaddour, arXiv 2209.14981; in place of a
    falling learning rate: Hägele et al., arXiv 2405.18392). An exponential mean has about the same effect; a plain one
    has a beginning, so that nothing of the first steps is left in it, and its length is a share of the training,
    however many steps that has. The training itself goes on from the weights as they are.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], windows: list[range]) -> None:
        self.names, self.parameters, self.windows = list(parameters), list(parameters.values()), windows
        self.count = 0  # steps whose weights are in the mean
        self.means: list[Tensor] = []

    @torch.no_grad()
    def add(self, step: int, *, skipped: bool) -> None:
        """Step `step` (from 1) is over; one that was `skipped` adds nothing. Between windows the mean is let go."""
        window = next((window for window in self.windows if step in window), None)
        if window is None or step == window.start:
            self.count, self.means = 0, []
        if window is None or skipped:
            return
        self.count += 1
        if self.count == 1:
            self.means = [parameter.detach().clone() for parameter in self.parameters]
        else:
            now = [parameter.detach() for parameter in self.parameters]
            torch._foreach_lerp_(self.means, now, 1 / self.count)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the parameters are the mean, where there is one; afterwards they are to the bit what they were."""
        if self.count == 0:
            yield
            return
        raw = [parameter.detach().clone() for parameter in self.parameters]
        self._set(self.means)
        try:
            yield
        finally:
            self._set(raw)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        now = [parameter.detach() for parameter in self.parameters]
        torch._foreach_copy_(now, values)  # pyright: ignore[reportPrivateImportUsage]

    def values(self) -> dict[str, Tensor]:
        """`average/NAME`, for a checkpoint; nothing where there is no mean."""
        return {AVERAGE + name: mean.cpu().clone() for name, mean in zip(self.names, self.means, strict=False)}

    def take(self, values: dict[str, Tensor], count: int) -> None:
        """Go on from a checkpoint's; its `average/NAME` are taken out of `values`.

        Raises:
            ArtifactError: they are not of these parameters.
        """
        found = {name: values.pop(name) for name in list(values) if name.startswith(AVERAGE)}
        expected = {AVERAGE + name: parameter for name, parameter in zip(self.names, self.parameters, strict=True)}
        wanted = {name: tuple(parameter.shape) for name, parameter in expected.items()} if count else {}
        if {name: tuple(value.shape) for name, value in found.items()} != wanted:
            raise ArtifactError(f"{len(found)} averaged tensors are not those of this adapter's {len(wanted)}")
        self.count = count
        self.means = [found[name].to(parameter.device) for name, parameter in expected.items()] if count else []
