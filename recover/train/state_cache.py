"""Hidden states of the dense model on disk, by the text they belong to: computed once, read by all runs that need them.

    FOLDER/<16 hex digits>/about.json            all that the states depend on but the text; the digits are of its hash
    FOLDER/<16 hex digits>/<sha256>.safetensors  states of some rows of text; the name is the sha256 of the file

A shard is immutable and vouches for itself, so processes and runs may fill one cache at once, and a filling that was
interrupted goes on: rows of shards that are there are not computed again. Rows are known by their tokens, whatever
their order, the seed or the run. Another model, dtype or library gives another folder, and leaves this one alone. A
training fills the cache before its first step, and reads it while steps are made (`TrainingStates`).

Legend: B batch, T tokens, N positions, D width, R rows of text.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
import transformers
from accelerate.utils import send_to_device
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from recover.base import console, dist
from recover.base.artifacts import TEMPORARY, explained, read_json, sha256, write_bytes, write_json
from recover.base.errors import ArtifactError
from recover.distill.distiller import IGNORED, Batch, DenseStates, Distiller, packing_of
from recover.kernels import fused
from recover.models.attention import packing_configs
from recover.models.stored_weights import each_weight
from recover.train.sources import Collate, SampleRow

if TYPE_CHECKING:
    from datasets import Dataset

    from recover.config.recipe import Cache
    from recover.models.twin import Twin

ABOUT, SUFFIX = "about.json", ".safetensors"
SHARD_BYTES = 128 * 2**20
CHECKED_AHEAD = 3  # shards: a check takes longer than a step may
FORGOTTEN_SECONDS = 3600  # a temporary file as old as this belongs to no process that still writes

NOT_MATHS = ("_name_or_path", "transformers_version", "architectures")  # of a config
MEND = "Delete it and run the same command: its rows are computed again"

Key = bytes  # sha256 of a row's tokens, and of which positions are kept


def row_key(ids: Sequence[int] | Tensor, positions: Sequence[int] | Tensor) -> Key:
    """By what a row of text is known: its tokens, and the positions whose states are kept."""
    digest = hashlib.sha256()
    for numbers in (ids, positions):
        values = torch.as_tensor(numbers, dtype=torch.int64)
        digest.update(len(values).to_bytes(8, "little") + values.numpy().tobytes())
    return digest.digest()


def about(twin: Twin) -> dict[str, Any]:
    """All that the dense view's states depend on, beside the text and which states they are.

    Every byte of the dense weights is read (about a second a gigabyte).
    """
    config = {name: value for name, value in twin.base.config.to_dict().items() if name not in NOT_MATHS}
    device = next(twin.base.parameters()).device
    return {
        "weights": _weights_sha256(twin),
        "config": config,
        "attention": f"{twin.base.config._attn_implementation}, no mask",
        "rows": "packed" if packing_configs(twin.base) else "padded",
        "dtype": str(twin.base.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "float32_products": torch.get_float32_matmul_precision(),
        "libraries": {"torch": torch.__version__, "transformers": transformers.__version__},
        **({"kernels": fused.VERSION} if twin.switch.kernels and fused.available(device) else {}),
    }


def _weights_sha256(twin: Twin) -> str:
    digest = hashlib.sha256()
    for name, parameter in each_weight(twin.base):
        if not parameter.requires_grad:  # an adapter is none of the dense model's
            digest.update(f"{name.replace('.base_layer', '')} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().flatten().cpu().clone().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class StateCache:
    """States (N, D) of rows of text, in one folder below `folder`: that of `about`, all that they depend on.

    Raises:
        ArtifactError: the folder is of something else, or cannot be read.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        about = json.loads(json.dumps(about, sort_keys=True, default=str))
        self.about = about
        self.folder = folder / hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self.where: dict[Key, tuple[Path, int, int]] = {}
        self._known: set[Path] = set()
        self._order: dict[Path, int] = {}  # place of a shard in the order in which they will be read
        self._checks: dict[Path, Future[None]] = {}
        self._checker = ThreadPoolExecutor(1, "checks of shards")
        self._check_about()
        self.refresh()

    def _check_about(self) -> None:
        path = self.folder / ABOUT
        if not path.exists():
            return
        found = read_json(path)
        if found != self.about:
            differing = sorted(
                name for name in self.about if not isinstance(found, dict) or found.get(name) != self.about[name]
            )
            raise ArtifactError(
                f"{path}: the states beside it are of something else ({', '.join(differing) or 'more fields'} differ). "
                f"Delete {self.folder}: the same command fills it again"
            )

    def refresh(self) -> None:
        """Take note of shards that were written since, by whichever process."""
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if path not in self._known:
                self._take_note(path)

    def _take_note(self, path: Path) -> None:
        with _reading(path), safetensors.safe_open(path, "pt") as shard:
            keys_R, starts = shard.get_tensor("keys").numpy(), shard.get_tensor("starts").tolist()
        for number, key in enumerate(keys_R):
            self.where.setdefault(key.tobytes(), (path, starts[number], starts[number + 1]))
        self._known.add(path)

    def missing(self, keys: Iterable[Key]) -> set[Key]:
        """Those whose states are not there yet."""
        return {key for key in keys if key not in self.where}

    def read(self, keys: Sequence[Key]) -> list[Tensor]:
        """States (N, D) of each row, on the CPU. The first row that is read of a shard has all of it checked.

        Raises:
            ArtifactError: a shard is damaged or gone, or a row is not there, with what to do.
        """
        rows: list[Tensor] = []
        for key in keys:
            if key not in self.where:
                raise ArtifactError(
                    f"{self.folder}: no states of a row of {len(self.where):,} expected there. Were all machines given "
                    "the same folder? Run the same command again: what is missing is computed"
                )
            path, start, stop = self.where[key]
            self._check(path)
            with _reading(path), safetensors.safe_open(path, "pt") as shard:
                rows.append(shard.get_slice("states")[start:stop])
        return rows

    def expect(self, keys: Iterable[Key]) -> None:
        """Rows will be read in this order: a thread then checks shards a few ahead of the one that is read."""
        paths = dict.fromkeys(self.where[key][0] for key in keys if key in self.where)
        self._order = {path: place for place, path in enumerate(paths)}

    def _check(self, path: Path) -> None:
        """Wait until this shard is checked; have those that come next checked meanwhile."""
        coming = [path]
        if path in self._order:  # dictionaries keep their order
            coming = list(islice(self._order, self._order[path], self._order[path] + 1 + CHECKED_AHEAD))
        for each in coming:
            if each not in self._checks:
                self._checks[each] = self._checker.submit(_check_shard, each)
        self._checks[path].result()

    def write(self, rows: dict[Key, Tensor]) -> None:
        """Add a shard of these rows' states, whole or not at all.

        Raises:
            ArtifactError: it could not be written.
        """
        if not (self.folder / ABOUT).exists():
            write_json(self.folder / ABOUT, self.about)
        lengths = torch.tensor([0, *(len(states_ND) for states_ND in rows.values())])
        keys_R = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), -1)
        tensors = {"states": torch.cat(list(rows.values())), "starts": lengths.cumsum(0), "keys": keys_R}
        data = safetensors.torch.save(tensors)
        path = self.folder / f"{hashlib.sha256(data).hexdigest()}{SUFFIX}"
        write_bytes(path, data)
        self._take_note(path)

    def tidy(self) -> None:
        """Delete what a process that was killed left half written."""
        ours = re.compile(rf"\.({re.escape(ABOUT)}|[0-9a-f]{{64}}{re.escape(SUFFIX)})\.\d+{re.escape(TEMPORARY)}")
        for path in self.folder.glob(f".*{TEMPORARY}"):
            if ours.fullmatch(path.name) and time.time() - path.stat().st_mtime > FORGOTTEN_SECONDS:
                path.unlink(missing_ok=True)

    @property
    def bytes(self) -> int:
        """Of all shards, on disk."""
        return sum(path.stat().st_size for path in self._known)


def _check_shard(path: Path) -> None:
    if not path.exists():
        raise ArtifactError(f"{path}: gone. Run the same command again: its rows are computed again")
    found = sha256(path)
    if found != path.stem:
        raise ArtifactError(f"{path}: damaged: its sha256 is {found}. {MEND}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Inside, a file that cannot be read is an ArtifactError that names it."""
    try:
        yield
    except (SafetensorError, IndexError, TypeError, ValueError) as error:  # or whole, and no shard of ours
        raise ArtifactError(f"{path}: damaged ({error}). {MEND}") from error
    except OSError as error:
        raise explained(error, path) from error


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
        for numbers in console.track(batches, "looking up dense states", unit="batches"):
            rows = text_rows(batch_of(numbers))
            missing = self._missing(rows, seen)
            positions += sum(missing)
            coming += [(row.dense, row.prefix) for row in rows]
            todo += [numbers] if missing else []
        config = self.distiller.twin.base.config
        needed = positions * config.hidden_size * self.distiller.twin.base.dtype.itemsize
        console.say(
            f"dense states: {console.size(sum(cache.bytes for cache in self._caches))} in {self.dense.folder.parent}, "
            f"{console.size(needed)} to compute in {len(todo):,} of {len(batches):,} batches"
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
        for numbers in console.track(todo, "dense model runs over the text", unit="batches"):
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
        states = self.distiller.dense_states(model, **self.distiller.given(on_device))
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
