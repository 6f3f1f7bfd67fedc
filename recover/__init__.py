"""Prune a language model and get its generation back: prune, diagnose, recover, re-measure, export.

The functions and configs of `docs/api.md` are here by name, and are imported when they are first used: `import recover`
costs nothing. A function that has the name of a folder is that folder, called: `recover.prune(...)`.
"""

import importlib
import inspect
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

FUNCTIONS = ("load", "prune", "probe", "measure", "distill", "export", "run", "report")  # of recover/api.py
PLACES = {
    **dict.fromkeys(
        ("Calibration", "Depth", "Experts", "Magnitude", "SparseGpt", "Wanda", "Width"), "recover.config.prune"
    ),
    **dict.fromkeys(("DenseText", "GivenText", "Lora", "PrunedText", "TeacherText"), "recover.config.train"),
    **dict.fromkeys(("Probe", "Sampling"), "recover.config.recipe"),
    "Loss": "recover.config.loss",
    "Plan": "recover.models.plan",
    "Twin": "recover.models.twin",
    "RecoverError": "recover.base.errors",
}

__all__ = [
    "Calibration",
    "DenseText",
    "Depth",
    "Experts",
    "GivenText",
    "Lora",
    "Loss",
    "Magnitude",
    "Plan",
    "Probe",
    "PrunedText",
    "RecoverError",
    "Sampling",
    "SparseGpt",
    "TeacherText",
    "Twin",
    "Wanda",
    "Width",
    "distill",
    "export",
    "load",
    "measure",
    "probe",
    "prune",
    "report",
    "run",
]

if TYPE_CHECKING:
    from recover.api import distill, export, load, measure, probe, prune, report, run
    from recover.base.errors import RecoverError
    from recover.config.loss import Loss
    from recover.config.prune import Calibration, Depth, Experts, Magnitude, SparseGpt, Wanda, Width
    from recover.config.recipe import Probe, Sampling
    from recover.config.train import DenseText, GivenText, Lora, PrunedText, TeacherText
    from recover.models.plan import Plan
    from recover.models.twin import Twin


class _Folder(ModuleType):
    """A folder whose name a function of `recover.api` has: called, it is that function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    @property
    def _function(self) -> Any:
        return getattr(importlib.import_module("recover.api"), self.__name__.rpartition(".")[2])

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)


class _Package(ModuleType):
    """This package. Python puts a folder into it when something of the folder is first imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FUNCTIONS and isinstance(value, ModuleType):
            value.__class__ = _Folder
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "load":
        value = importlib.import_module("recover.api").load
    elif name in FUNCTIONS:
        value = importlib.import_module(f"recover.{name}")
    elif name in PLACES:
        value = getattr(importlib.import_module(PLACES[name]), name)
    else:
        raise AttributeError(f"module 'recover' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
