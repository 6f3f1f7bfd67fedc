"""Findings of a probe on disk, batch by batch: one that was stopped goes on with the batches that are still to do.

A batch does not depend on how many processes there are, so another number of them may go on.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from recover.base import console, dist
from recover.base.artifacts import read_json, write_bytes, write_json
from recover.base.errors import ArtifactError
from recover.models.site import Site
from recover.probe.compare import Rows
from recover.probe.findings import Finding, Free

KEY = "key.json"


class Store:
    """Findings by the number of their batch, in a folder that belongs to one probe: `key` says which.

    What another key wrote is deleted, with a word about it; a file that cannot be read is a batch still to do. All
    processes make the store together.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder = folder
        dist.on_main(lambda: _claim(folder, key))

    def get(self, number: int) -> Finding | None:
        """The finding of this batch, equal to the last bit to what was put, or None."""
        path = self._path(number)
        if not path.is_file():
            return None
        try:
            return _finding(torch.load(io.BytesIO(path.read_bytes()), weights_only=True))
        except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError) as error:
            console.warn(f"{path}: cannot be read ({type(error).__name__}); this batch is done again")
            return None

    def put(self, number: int, finding: Finding) -> None:
        """Keep it, whole or not at all."""
        buffer = io.BytesIO()
        torch.save(_plain(finding), buffer)
        write_bytes(self._path(number), buffer.getvalue())

    def _path(self, number: int) -> Path:
        return self.folder / f"batch-{number:05d}.pt"


def _claim(folder: Path, key: dict[str, Any]) -> None:
    path = folder / KEY
    try:
        found = read_json(path) if path.is_file() else None
    except ArtifactError:
        found = None
    if found == key:
        return
    old = sorted(path for path in folder.glob("batch-*.pt") if re.fullmatch(r"batch-\d+", path.stem))
    for batch in old:
        batch.unlink()
    if old:
        changed = sorted(name for name in key if not isinstance(found, dict) or found.get(name) != key[name])
        console.warn(f"{folder}: {len(old)} batches are of another probe ({', '.join(changed)} changed); done again")
    write_json(path, key)


def _plain(finding: Finding) -> dict[str, Any]:
    """Only what `torch.load` reads without running code."""
    return {
        "rows": vars(finding.rows),
        "final": finding.final,
        "blocks": finding.blocks,
        "sublayers": {(*site, what, lens): table for (site, what, lens), table in finding.sublayers.items()},
        "free": None if finding.free is None else vars(finding.free),
        "sampled": {seed: vars(free) for seed, free in finding.sampled.items()},
        "identity": finding.identity,
    }


def _finding(value: dict[str, Any]) -> Finding:
    return Finding(
        Rows(**value["rows"]),
        value["final"],
        value["blocks"],
        {(Site(block, part), what, lens): table for (block, part, what, lens), table in value["sublayers"].items()},
        None if value["free"] is None else Free(**value["free"]),
        {seed: Free(**free) for seed, free in value["sampled"].items()},
        value["identity"],
    )
