"""Hidden states of the dense model on disk, by the text they belong to: computed once, read by all runs that need them.

    FOLDER/<16 hex digits>/about.json            all that the states depend on but the text; the digits are of its hash
    FOLDER/<16 hex digits>/<sha256>.safetensors  states of some rows of text; the name is the sha256 of the file

A shard is immutable and vouches for itself, so processes and runs may fill one cache at once, and a filling that was
interrupted goes on: rows of shards that are there are not computed again. Rows are known by their tokens, whatever
their order, the seed or the run. Another model, dtype or library gives another folder, and leaves this one alone.

Legend: N positions, D width, R rows of text.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from recover.base.artifacts import TEMPORARY, explained, read_json, sha256, write_bytes, write_json
from recover.base.errors import ArtifactError
from recover.kernels import fused
from recover.models.attention import packing_configs

if TYPE_CHECKING:
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
    for name, parameter in twin.base.named_parameters():
        if not parameter.requires_grad:  # an adapter is none of the dense model's
            digest.update(f"{name.replace('.base_layer', '')} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().flatten().cpu().contiguous().view(torch.uint8).numpy().data)
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
