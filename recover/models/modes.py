"""Training flags of many modules, at every step: torch's own ways through them are slow for a small model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def modules_below(root: nn.Module) -> list[nn.Module]:
    """`root` and every module below it, each once, in no order that means anything."""
    found: dict[nn.Module, None] = {}
    waiting = [root]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = None
            waiting.extend(child for child in module._modules.values() if child is not None)
    return list(found)


def set_training(modules: Iterable[nn.Module], training: bool) -> None:
    """Set the flag of these modules alone, not of those below them."""
    for module in modules:
        vars(module)["training"] = training  # `nn.Module.__setattr__` would look for parameters and modules first


def plain_modes(root: nn.Module) -> bool:
    """Whether `root.train(mode)` sets the flags below it and does nothing else."""
    return all(type(module).train is nn.Module.train for module in modules_below(root))
