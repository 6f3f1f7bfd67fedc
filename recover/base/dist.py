"""One process or many, the same code: who am I, wait for the others, share values, and share failures.

A process that fails alone leaves the others waiting in a collective. So what one process decides runs through `on_main`
and what each does on its own through `everywhere`: both raise the failure on every process.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from math import fsum
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from recover.base import zero
from recover.base.errors import RecoverError, TrainingError

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Value = TypeVar("Value")

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # what a launcher sets
TIMEOUT = timedelta(hours=2)  # one process may generate or merge for long while the others wait


_as_one = False  # inside `as_one`


def _group() -> ModuleType | None:
    """`torch.distributed` if a process group is up; torch is never imported to find out."""
    group = None if _as_one else sys.modules.get("torch.distributed")
    return group if group is not None and group.is_available() and group.is_initialized() else None


def rank() -> int:
    """Number of this process, 0 for the main one."""
    group = _group()
    return group.get_rank() if group else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are."""
    group = _group()
    return group.get_world_size() if group else 1 if _as_one else int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """How many processes there are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or world_size())


def is_main() -> bool:
    """True on the one process that prints and writes."""
    return rank() == 0


def device() -> torch.device:
    """Where this process computes: its own GPU, or the CPU."""
    import torch

    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def start() -> None:
    """Bring up the process group that the launcher's environment describes; does nothing with one process, or again.

    Raises:
        TrainingError: more processes on this machine than GPUs, a group of another size than was launched, or
            DeepSpeed is asked for and not installed.
    """
    if _deepspeed():
        if importlib.util.find_spec("deepspeed") is None:
            raise TrainingError(
                "the launch file asks for DeepSpeed, which is not installed: pip install 'recover[deepspeed]', or take "
                "a launch file that needs none, such as launch/gpu.yaml"
            )
        zero.skip_compilation()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched == 1:
        return
    import torch.distributed

    if not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            if local_rank() >= torch.cuda.device_count():
                raise TrainingError(
                    f"process {local_rank()} of this machine has no GPU: {torch.cuda.device_count()} found; "
                    "launch as many processes a machine as it has GPUs"
                )
            torch.cuda.set_device(local_rank())
            torch.distributed.init_process_group("nccl", timeout=TIMEOUT)
        else:
            torch.distributed.init_process_group("gloo", timeout=TIMEOUT)
    found = torch.distributed.get_world_size()
    if found != launched:
        raise TrainingError(f"{launched} processes were launched, the process group has {found}")


def _deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def zero_stage() -> int:
    """DeepSpeed's stage that `accelerate launch` was told; 0 without DeepSpeed."""
    if not _deepspeed():
        return 0
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file in ("", "none"):
        return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    return json.loads(Path(file).read_text()).get("zero_optimization", {}).get("stage", 0)


def stop() -> None:
    """Take the process group down, if one is up."""
    group = _group()
    if group:
        group.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process, as `sys.exit(code)` does; of several processes, without taking the interpreter apart.

    A thread of gloo may still hold the tensors of the last collective. If it lets go of them while the interpreter is
    being taken apart, C++ aborts the process ("terminate called without an active exception"), when all is done.
    """
    if world_size() == 1:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def barrier() -> None:
    """Wait until every process is here."""
    group = _group()
    if group:
        group.barrier(device_ids=[local_rank()] if group.get_backend() == "nccl" else None)


def broadcast(value: Value) -> Value:
    """The main process's `value`, on every process."""
    group = _group()
    if not group:
        return value
    box = [value]
    group.broadcast_object_list(box, src=0)
    return box[0]


# Set while a function runs on the main process alone: the others wait for its value, and would take another broadcast
# for it.
_alone = False


def alone() -> bool:
    """Whether no other process takes part in what this one does now: inside `on_main`, or with one process."""
    return _alone or world_size() == 1


def on_main(function: Callable[[], Value]) -> Value:
    """Run on the main process alone; its value is returned, or its exception raised, on every process."""
    if not _group():
        return function()
    if not is_main():
        return _open(broadcast(b""))
    global _alone
    if _alone:
        return function()
    _alone = True
    try:
        value = function()
        packed = pickle.dumps((value, None))
    except BaseException as error:
        broadcast(_pack(error))
        raise
    finally:
        _alone = False
    broadcast(packed)
    return value


@contextmanager
def as_one() -> Iterator[None]:
    """Inside, on the main process while the others wait (`on_main`), all is as if there were no other process."""
    global _as_one
    before, _as_one = _as_one, True
    try:
        yield
    finally:
        _as_one = before


@contextmanager
def main_first() -> Iterator[None]:
    """The main process goes through the body before the others enter it; if it fails there, they fail with it.

    Inside `on_main` there are no others to wait.
    """
    if _alone:
        yield
        return
    if not is_main():
        _open(broadcast(b""))
        yield
        return
    try:
        yield
    except BaseException as error:
        broadcast(_pack(error))
        raise
    broadcast(pickle.dumps((None, None)))


def everywhere(function: Callable[[], Value]) -> Value:
    """Run on every process; each gets its own value, or, if any failed, each raises its own failure or the first."""
    group = _group()
    if not group:
        return function()
    value, failure = None, None
    try:
        value = function()
    except BaseException as error:
        failure = error
    outcomes: list[Any] = [None] * world_size()
    group.all_gather_object(outcomes, None if failure is None else _pack(failure))
    if failure is not None:
        raise failure
    for outcome in outcomes:
        if outcome is not None:
            _open(outcome)
    return value  # type: ignore[return-value]


def _pack(error: BaseException) -> bytes:
    """The exception as bytes that surely open again on another process; one that cannot travel goes as its text."""
    try:
        packed = pickle.dumps((None, error))
        pickle.loads(packed)
        return packed
    except Exception:
        kind = RecoverError if isinstance(error, RecoverError) else RuntimeError
        return pickle.dumps((None, kind(f"{type(error).__name__}: {error}")))


def _open(packed: bytes) -> Any:
    value, error = pickle.loads(packed)
    if error is not None:
        error.add_note("raised on another process, and passed on to this one")
        raise error
    return value


def shard(items: Sequence[Value]) -> list[Value]:
    """This process's share: items rank, rank + world size, ... ; `gather` puts results back in order."""
    return list(items[rank() :: world_size()])


def gather(results: Sequence[Value]) -> list[Value]:
    """Every process's results in the order of the items that `shard` dealt out."""
    group = _group()
    if not group:
        return list(results)
    parts: list[Any] = [None] * world_size()
    group.all_gather_object(parts, list(results))
    total = sum(map(len, parts))
    return [parts[index % len(parts)][index // len(parts)] for index in range(total)]


def over(items: Sequence[Item], work: Callable[[list[Item]], Sequence[Value]]) -> list[Value]:
    """What `work` gives for the items, one result each and in their order, the same on every process.

    Each process works on its share; if one fails, all raise (`everywhere`).
    """
    return gather(everywhere(lambda: work(shard(items))))


def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Each key's sum over all processes, in float64 and the same to the last bit on each; a missing key counts 0."""
    group = _group()
    if not group:
        return {key: float(value) for key, value in values.items()}
    parts: list[Any] = [None] * world_size()
    group.all_gather_object(parts, {key: float(value) for key, value in values.items()})
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: fsum(part.get(key, 0.0) for part in parts) for key in keys}
