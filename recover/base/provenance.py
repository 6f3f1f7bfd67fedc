"""What a run was made with: versions, machine, revision and command, kept beside every result."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TypedDict

from recover import __version__
from recover.base import dist, main_memory, process

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "deepspeed",
    "datasets",
    "tokenizers",
    "safetensors",
    "pydantic",
    "numpy",
    "gguf",
)
GIT_SECONDS = 10


class Gpu(TypedDict):
    """A GPU of this machine."""

    name: str
    memory_bytes: int


class Machine(TypedDict):
    """What a run was made on; `cores`: those that it may use."""

    system: str
    processor: str
    cores: int | None
    memory_bytes: int
    gpus: list[Gpu]


class Revision(TypedDict):
    """A git commit, and whether files differ from it."""

    commit: str
    changed: bool


class Environment(TypedDict):
    """What a run was made with, as env.json and the stamps of stages have it."""

    recover: str
    python: str
    versions: dict[str, str | None]
    machine: Machine
    git: Revision | None
    processes: int
    threads: dict[str, str | int | None]
    argv: list[str]


def environment() -> Environment:
    """Versions (None: not installed), machine, git revision of this package if it is run from a checkout, command.

    `threads`: of each process on the CPU.
    """
    return {
        "recover": __version__,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "machine": machine(),
        "git": git_revision(Path(__file__).parent),
        "processes": dist.world_size(),
        "threads": process.described_threads(),
        "argv": ["recover", *sys.argv[1:]],
    }


@functools.cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> Machine:
    """System, processor, usable cores, main memory to be had, and each GPU's name and memory; imports torch."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": cores(),
        "memory_bytes": main_memory.total(),
        "gpus": _gpus(),
    }


def cores() -> int | None:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    names = listing.read_text().splitlines() if listing.exists() else []
    named = (line.partition(":")[2].strip() for line in names if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _gpus() -> list[Gpu]:
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in found]


def git_revision(package: Path) -> Revision | None:
    """`commit` and `changed` (files differ from it) of the checkout that `package` lies directly in, else None.

    A package installed somewhere below another project's checkout has no revision: that commit would be the other's.
    """
    top = _git(package, "rev-parse", "--show-toplevel")
    commit = _git(package, "rev-parse", "HEAD")
    if top is None or commit is None or Path(top).resolve() != package.resolve().parent:
        return None
    return {"commit": commit, "changed": bool(_git(package, "status", "--porcelain"))}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None  # no git here, or no checkout
    return done.stdout.strip()
