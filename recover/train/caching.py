"""Training from states of the dense view that lie on disk: filled before the first step, read while steps are made.

Legend: B batch, T tokens, N scored positions, D width.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from recover.base import console, dist, units
from recover.base.errors import ArtifactError
from recover.distill.cache import SHARD_BYTES, Key, StateCache, about, row_key
from recover.distill.distiller import IGNORED, Batch, DenseStates, Distiller, packing_of, without_mask
from recover.train.sources import Collate, SampleRow

if TYPE_CHECKING:
    from datasets import Dataset

    from recover.config.recipe import Cache


@dataclass(frozen=True)
class TextRow:
    """A row of a batch: its place, its tokens, and by what its states are known."""

    tokens: int
    scored: int
    dense: Key
    prefix: Key


def text_rows(batch: Batch) -> list[TextRow]:
    """The rows of a right-padded or packed batch."""
    rows = []
    for ids_T, labels_T in _texts(batch):
        positions = (labels_T[1:] != IGNORED).nonzero().squeeze(1)
        rows.append(TextRow(len(ids_T), len(positions), row_key(ids_T, positions), row_key(ids_T, [])))
    return rows


def _texts(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels of each row, without padding."""
    both = batch["input_ids"], batch["labels"]
    if "packing" in batch:
        lengths = packing_of(batch).starts_S.diff().tolist()
        return list(zip(*(each[0].split(lengths) for each in both), strict=True))
    mask_BT = batch.get("attention_mask")
    lengths = (torch.ones_like(both[0]) if mask_BT is None else mask_BT).sum(1).tolist()
    return [(ids_T[:length], labels_T[:length]) for ids_T, labels_T, length in zip(*both, lengths, strict=True)]


class TrainingStates:
    """The states that one training reads: of the final norm at scored positions and, if asked for, of the prefix.

    Raises:
        ArtifactError: a folder of the cache is of something else, or cannot be read.
    """

    def __init__(self, cfg: Cache, distiller: Distiller) -> None:
        self.distiller = distiller
        folder, shared = Path(cfg.folder), distiller.shared_blocks
        described = dist.on_main(lambda: about(distiller.twin))
        self.dense = StateCache(folder, {"states": "final norm, scored positions", **described})
        self.prefix: StateCache | None = None
        if cfg.prefix:
            self.prefix = StateCache(folder, {"states": f"output of block {shared - 1}, all positions", **described})

    def fill(self, rows: Dataset, collate: Collate, micro: int, *, shard_bytes: int = SHARD_BYTES) -> None:
        """Compute what is missing of these rows, in the batches they are trained in, shared out over the processes.

        What is there is not computed again, and what was written stays when this is interrupted.

        Raises:
            ArtifactError: the disk has no room for what is missing (bytes needed and free), or a shard is not written.
        """
        batches = [range(start, min(start + micro, len(rows))) for start in range(0, len(rows), micro)]
        batch_of = lambda numbers: collate([rows[number] for number in numbers])  # noqa: E731
        todo, coming = dist.on_main(lambda: self._todo(batches, batch_of))
        if todo:
            dist.everywhere(lambda: self._fill(dist.shard(todo), batch_of, shard_bytes))
        for place, cache in enumerate(self._caches):
            cache.refresh()
            cache.expect(keys[place] for keys in coming)

    @property
    def _caches(self) -> list[StateCache]:
        return [self.dense] if self.prefix is None else [self.dense, self.prefix]

    def _todo(
        self, batches: list[range], batch_of: Callable[[range], Any]
    ) -> tuple[list[range], list[tuple[Key, Key]]]:
        """Batches of which a state is missing, and the two keys of each row in order; a full disk is refused."""
        todo, coming, positions, seen = [], [], 0, set()
        for numbers in console.track(batches, "looking up dense states", unit="batch"):
            rows = text_rows(batch_of(numbers))
            missing = self._missing(rows, seen)
            positions += sum(missing)
            coming += [(row.dense, row.prefix) for row in rows]
            todo += [numbers] if missing else []
        config = self.distiller.twin.base.config
        needed = positions * config.hidden_size * self.distiller.twin.base.dtype.itemsize
        console.say(
            f"dense states: {units.size(sum(cache.bytes for cache in self._caches))} in {self.dense.folder.parent}, "
            f"{units.size(needed)} to compute in {len(todo):,} of {len(batches):,} batches"
        )
        _refuse_full(self.dense.folder, needed)
        return todo, coming

    def _missing(self, rows: list[TextRow], seen: set[Key]) -> list[int]:
        """Positions of each state that is missing, 0 of a row that scores nothing; `seen` are rows counted before."""
        missing = []
        for row in rows:
            if row.dense in self.dense.missing({row.dense} - seen):
                missing.append(row.scored)
            if self.prefix is not None and row.prefix in self.prefix.missing({row.prefix} - seen):
                missing.append(row.tokens)
            seen |= {row.dense, row.prefix}
        return missing

    def _fill(self, todo: list[range], batch_of: Callable[[range], Any], shard_bytes: int) -> None:
        for cache in self._caches:
            cache.tidy()
        fresh: list[dict[Key, Tensor]] = [{} for _ in self._caches]
        for numbers in console.track(todo, "dense model runs over the text", unit="batch"):
            self._run(batch_of(numbers), fresh)
            for cache, waiting in zip(self._caches, fresh, strict=True):
                if sum(states_ND.nbytes for states_ND in waiting.values()) >= shard_bytes:
                    cache.write(waiting)
                    waiting.clear()
        for cache, waiting in zip(self._caches, fresh, strict=True):
            if waiting:
                cache.write(waiting)

    def _run(self, batch: Batch, fresh: list[dict[Key, Tensor]]) -> None:
        """The dense pass of one batch; its rows that are missing go to `fresh`, one dictionary a cache."""
        model = self.distiller.twin.base
        device = next(model.parameters()).device
        on_device: Any = send_to_device(batch, device)
        states = self.distiller.dense_states(model, **without_mask(on_device, needed=self.distiller.needs_mask))
        rows = text_rows(batch)
        for row, h_ND in zip(rows, states.h_ND.cpu().split([row.scored for row in rows]), strict=True):
            if row.dense not in self.dense.where:
                fresh[0][row.dense] = h_ND.clone()
        if self.prefix is None or states.prefix_BTD is None:
            return
        prefix_BTD: Any = states.prefix_BTD.cpu()
        if "packing" in batch:
            prefix_BTD = prefix_BTD[0].split([row.tokens for row in rows])
        for row, prefix_TD in zip(rows, prefix_BTD, strict=True):
            if row.prefix not in self.prefix.where:
                fresh[1][row.prefix] = prefix_TD[: row.tokens].clone()

    def read(self, rows: Sequence[TextRow]) -> DenseStates:
        """Of a batch of these rows, as `with_states` asks; in pinned memory where there is a GPU.

        Raises:
            ArtifactError: a shard is damaged or gone, or a row is not there.
        """
        h_ND = pinned(torch.cat(self.dense.read([row.dense for row in rows])))
        if self.prefix is None:
            return DenseStates(h_ND)
        prefixes = self.prefix.read([row.prefix for row in rows])
        together = torch.cat(prefixes)[None] if self.distiller.packs else pad_sequence(prefixes, batch_first=True)
        return DenseStates(h_ND, pinned(together))


def with_states(collate: Collate, read: Callable[[Sequence[TextRow]], Any]) -> Collate:
    """As `collate`, with `states`, which the distiller asks for: read by a thread while steps are made."""
    reader = ThreadPoolExecutor(1, "states")

    def collated(rows: Sequence[SampleRow]) -> Batch:
        batch = collate(rows)
        return {**batch, "states": reader.submit(read, text_rows(batch)).result}

    return collated


def pinned(tensor: Tensor) -> Tensor:
    """In memory that a GPU copies from while it computes, where there is one."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def _refuse_full(folder: Path, needed: int) -> None:
    where = next(path for path in folder.absolute().parents if path.exists())
    free = shutil.disk_usage(where).free
    if needed > free:
        raise ArtifactError(
            f"{folder}: train.cache needs {needed:,} bytes more, {free:,} are free. Make room, name another folder, "
            "lower train.tokens, or leave train.cache out: then each step runs the dense model"
        )
