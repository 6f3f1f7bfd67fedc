"""A tiny real training in a process of its own, and ways to hurt it: killed, signalled, its disk broken, NaN put in.

The process is a fork of this one, so that thousands of trials do not import torch each time.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import two_processes
from accelerate.state import AcceleratorState, PartialState
from byte_tokenizer import byte_tokenizer
from faulty_disk import Disk
from safetensors.torch import load_file
from tiny import tiny

from recover import cli
from recover.base import artifacts
from recover.base.errors import RecoverError
from recover.base.process import graceful_stop
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.run.directory import TRAINED, RunDirectory
from recover.train.checkpoints import STEPS, Checkpoints
from recover.train.train import train
from recover.train.trainer import RecoverTrainer

OPTIONS = {"lora": {"rank": 4, "dropout": 0.2}, "save_steps": 1, "micro_batch_size": 4}
CRASHED = 70  # exit code of a process that met an error that is none of ours


def train_tiny(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """The whole of it, as `recover run` calls it: lock, handlers, training; the best adapter's folder."""
    with graceful_stop(), RunDirectory(folder).lock():
        two_processes.write_text(folder)
        twin = Twin(tiny().to(dtype), Plan("depth", 6, (2, 4)))
        cfg = two_processes.cfg(folder, **{**OPTIONS, **changes})
        return train(twin, byte_tokenizer(), cfg, folder / "train", lambda epoch, _: float(epoch), seed=3)


def start(work: Callable[[], Any], log: Path) -> int:
    """Do `work` in a fork, which exits as the command line would; its process id."""
    process = os.fork()
    if process:
        return process
    code = CRASHED
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = sys.stderr = open(descriptor, "w", buffering=1, closefd=False)  # noqa: SIM115
        torch.set_num_threads(1)
        work()
        code = 0
    except RecoverError as error:
        print(f"{type(error).__name__}: {error}")
        code = error.exit_code
    except KeyboardInterrupt:  # before the handlers were in place; the command line says it so
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def command(*words: object) -> None:
    """`recover` with these words, in a fork: ends it with the command's exit code."""
    sys.argv = ["recover", *map(str, words)]
    try:
        cli.main()
    except SystemExit as ended:
        sys.stdout.flush()
        os._exit(int(ended.code or 0))


def end(process: int) -> int:
    """Wait for it; its exit code, negative for the signal that killed it. Whoever stops waiting kills it."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    except BaseException:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        raise


def run(folder: Path, work: Callable[[], Any] | None = None, **changes: Any) -> tuple[int, str]:
    """Exit code and output of one process that trains (or works) to its end."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    log.unlink(missing_ok=True)
    code = end(start(work or (lambda: train_tiny(folder, **changes)), log))
    return code, log.read_text()


def together(work: Callable[[int], Any], folder: Path, processes: int = 2) -> None:
    """Do `work(rank)` in that many forks, which find one another as a launcher's processes do; a failure ends all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def ranked(rank: int) -> None:
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        os.environ.update({name: str(value) for name, value in (here | where).items()})
        for state in (AcceleratorState, PartialState):
            state._shared_state.clear()  # this process's own, of one
        work(rank)

    logs = [folder / f"log-{rank}" for rank in range(processes)]
    left = [start(partial(ranked, rank), log) for rank, log in enumerate(logs)]
    failed = False
    while left and not failed:
        ended = {process: status for process, status in (os.waitpid(each, os.WNOHANG) for each in left) if process}
        left, failed = [each for each in left if each not in ended], any(ended.values())
        time.sleep(0.02)
    for process in left:  # it would wait for the other one
        os.kill(process, signal.SIGKILL)
        end(process)
    assert not failed, "".join(log.read_text()[-6000:] for log in logs)


def adapter(folder: Path, stage: str = "train") -> dict[str, torch.Tensor]:
    """What the training of this folder published last."""
    last = sorted((folder / stage).glob("epoch-*"))[-1]
    artifacts.check_manifest(last)
    return load_file(last / "adapter_model.safetensors")


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def goes_on(folder: Path, expected: dict[str, torch.Tensor], **changes: Any) -> str | None:
    """Run the same command again; None if it ends with the bits of the straight run, else what was wrong."""
    code, output = run(folder, **changes)
    if code != 0:
        return f"exit code {code}: {output}"
    if not same(adapter(folder), expected):
        return f"other weights: {output}"
    steps = [line["step"] for line in artifacts.read_jsonl(folder / "train" / STEPS)]
    if steps != list(range(1, len(steps) + 1)):
        return f"lines of steps {steps}: {output}"
    left = [path.name for path in folder.rglob(".*") if path.name != ".lock"]
    return f"left over: {left}" if left else None


def newest_is_listed(recover: Path) -> str | None:
    """Nothing that was published is lost: the newest that verifies is the newest of the list, or newer."""
    if not (recover / "checkpoints.jsonl").exists() or not (recover / "checkpoints").exists():
        return None
    artifacts.settle(recover, TRAINED)
    artifacts.settle(recover / "checkpoints", r"checkpoint-\d+")
    training = artifacts.read_json(recover / "training.json")
    if training["finished"]:
        return None
    last = [line["step"] for line in artifacts.read_jsonl(recover / "checkpoints.jsonl")][-1:]
    found = Checkpoints(recover, training["fingerprint"]).newest()
    return None if not last or (found is not None and found[1]["step"] >= last[0]) else f"step {last[0]} was lost"


def interrupted(folder: Path, numbers: list[int], after: float, between: float = 0.0, **changes: Any) -> int:
    """Start a training and send it these signals; its exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    process = start(lambda: train_tiny(folder, **changes), folder.with_name(f"{folder.name}.log"))
    time.sleep(after)
    for number in numbers:
        with suppress(ProcessLookupError):
            os.kill(process, number)
        time.sleep(between)
    return end(process)


def on_disk(folder: Path, disk: Disk, **changes: Any) -> tuple[int, str]:
    """One training on this disk."""

    def work() -> None:
        with disk.installed():
            train_tiny(folder, **changes)

    return run(folder, work)


def disk_calls(folder: Path, **changes: Any) -> tuple[int, int]:
    """(calls that change files, bytes written) in a training to its end."""
    disk, note = Disk(), folder.with_name("disk_calls.txt")

    def work() -> None:
        with disk.installed():
            train_tiny(folder, **changes)
        note.write_text(f"{disk.calls} {disk.written}")

    code, output = run(folder, work)
    assert code == 0, output
    calls, written = note.read_text().split()
    shutil.rmtree(folder)
    return int(calls), int(written)


def count_micro_steps(action: Callable[[RecoverTrainer, int], None]) -> None:
    """`action(trainer, n)` before micro-step n (from 1) of this process; for good: call it in a fork."""
    compute_loss, count = RecoverTrainer.compute_loss, [0]

    def counted(trainer: RecoverTrainer, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        action(trainer, count[0])
        return compute_loss(trainer, *args, **kwargs)

    RecoverTrainer.compute_loss = counted  # type: ignore[method-assign]


def stopped_at(folder: Path, micro_step: int, **changes: Any) -> tuple[int, str]:
    """One training that gets SIGTERM within this micro-step."""

    def stop(_trainer: RecoverTrainer, number: int) -> None:
        if number == micro_step:
            os.kill(os.getpid(), signal.SIGTERM)

    def work() -> None:
        count_micro_steps(stop)
        train_tiny(folder, **changes)

    return run(folder, work)


def once(module: torch.nn.Module, value: float) -> None:
    """The module's next output is `value` throughout the first sequence, the ones after it are not."""

    def poison(_module: Any, _args: Any, output: Any) -> Any:
        handle.remove()
        first = output[0] if isinstance(output, tuple) else output
        first = first.clone()
        first[0] = value
        return (first, *output[1:]) if isinstance(output, tuple) else first

    handle = module.register_forward_hook(poison)


def poison_loss(trainer: RecoverTrainer, value: float) -> None:
    run_distiller = trainer.distiller.run

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        trainer.distiller.run = run_distiller  # type: ignore[method-assign]
        out = run_distiller(*args, **kwargs)
        out["loss"] = out["loss"] + value
        return out

    trainer.distiller.run = poisoned  # type: ignore[method-assign]


def poison_gradient(trainer: RecoverTrainer, value: float) -> None:
    parameter = next(p for p in trainer.adapted.parameters() if p.requires_grad)

    def poisoned(gradient: torch.Tensor) -> torch.Tensor:
        handle.remove()
        return torch.full_like(gradient, value)

    handle = parameter.register_hook(poisoned)


def poison_teacher(trainer: RecoverTrainer, value: float) -> None:
    """A dropped block runs in the dense view only."""
    once(trainer.distiller.twin.blocks[2].mlp, value)


# Where a NaN comes from -> puts one there, once, in the next micro-step.
POISONS: dict[str, Callable[[RecoverTrainer, float], None]] = {
    "loss": poison_loss,
    "gradient": poison_gradient,
    "teacher": poison_teacher,
    "hidden state": lambda trainer, value: once(trainer.distiller.twin.blocks[5].mlp, value),
    "input embedding": lambda trainer, value: once(trainer.distiller.twin.base.get_input_embeddings(), value),
}


def poisoned_at(folder: Path, where: str, value: float, micro_steps: range, **changes: Any) -> tuple[int, str]:
    """One training with a value put in at each of these micro-steps; parameters must be finite at every step."""

    def act(trainer: RecoverTrainer, number: int) -> None:
        assert all(p.isfinite().all() for p in trainer.adapted.parameters() if p.requires_grad), "poisoned parameters"
        if number in micro_steps:
            POISONS[where](trainer, value)

    def work() -> None:
        count_micro_steps(act)
        train_tiny(folder, **changes)

    return run(folder, work)
