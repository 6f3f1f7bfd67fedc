"""The adapters that an epoch ends with, as the mean of those after each of its last steps.

Weights of late steps lie around a point that is better than each of them; their mean is nearer to it, and costs no
training (stochastic weight averaging: Izmailov et al., arXiv 1803.05407; the latest weights: Kaddour, arXiv 2209.14981;
in place of a falling learning rate: Hägele et al., arXiv 2405.18392). An exponential mean has about the same effect; a
plain one has a beginning, so that nothing of the first steps is left in it, and its length is a share of the training,
however many steps that has.

The training itself goes on from the weights as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from recover.base.errors import ArtifactError

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
    """A running mean of `parameters`, which every process holds whole; no call waits for the device."""

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
