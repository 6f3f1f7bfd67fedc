"""A tiny training in several processes: stopped and taken on by another launch, or given a NaN on one of them.

torchrun --standalone --nproc_per_node 2 tests/faulty_launch.py FOLDER plain|zero2|zero3 [stop|poison]
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import faulty
import torch
import two_processes
from byte_tokenizer import byte_tokenizer
from tiny import tiny
from transformers import TrainerCallback

from recover.base import artifacts, dist
from recover.base.errors import StopRequested
from recover.models.plan import Plan
from recover.models.twin import Twin
from recover.train.train import train
from recover.train.trainer import RecoverTrainer


class Ends(two_processes.Catch):
    """Losses and the last parameters; a skipped step has no gradients to catch."""

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        pass


class StopInStep2(TrainerCallback):
    """The last process of a launch gets SIGTERM; all must stop."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1 and dist.rank() == dist.world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def poison_step_2(trainer: RecoverTrainer, number: int) -> None:
    """On the last process only, in the first micro-step."""
    first = 1 + trainer.args.gradient_accumulation_steps
    if number == first and dist.rank() == dist.world_size() - 1:
        faulty.poison_loss(trainer, math.nan)


def command(script: str, folder: Path, engine: str, processes: int, *more: str) -> tuple[list[str], dict[str, str]]:
    """What starts `script` in so many processes, and its environment; without a GPU in sight all is for the CPU."""
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["GLOO_SOCKET_IFNAME"] = "lo"  # with --local_addr: no name of this machine is looked up
    environment["PYTHONFAULTHANDLER"] = "1"  # a process that aborts says where
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"  # DeepSpeed might look for GPUs that CUDA_VISIBLE_DEVICES hides
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1"]
    return [*torchrun, "--nproc_per_node", str(processes), script, str(folder), engine, *more], environment


def launch(folder: Path, engine: str, processes: int, *more: str, script: str = __file__) -> tuple[int, str]:
    """Run `main` below, or that of another script, in so many processes; exit code and output."""
    words, environment = command(script, folder, engine, processes, *more)
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return result.returncode, result.stdout + result.stderr


def straight(folder: Path, **changes: Any) -> dict[str, Any]:
    """The training in one process, which nothing happens to: a fork of this one, which stays as it is."""

    def work() -> None:
        torch.save(two_processes.run(folder, "straight", micro_batch_size=2, **changes), folder / "straight.pt")

    code, output = faulty.run(folder, work)
    assert code == 0, output
    return torch.load(folder / "straight.pt")


def apart(losses: Iterable[tuple[float, float]], weights: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> str | None:
    """None if all is the same but for the order of additions: losses to 1e-6, parameters to 5e-5.

    See test_two_processes.py.
    """
    loss = max(abs(a - b) for a, b in losses)
    weight = max((a - b).abs().max().item() for a, b in weights)
    return None if loss < 1e-6 and weight < 5e-5 else f"losses differ by {loss:.2g}, parameters by {weight:.2g}"


def moved(folder: Path, before: tuple[str, int], after: tuple[str, int]) -> str | None:
    """Steps 1 and 2 of 3 on one engine and number of processes, step 3 on another: None if all is as if in one."""
    two_processes.write_text(folder)
    expected = straight(folder)
    _, output = launch(folder, *before, "stop")
    lines = folder / "run" / "checkpoints.jsonl"
    if not lines.exists() or artifacts.read_jsonl(lines)[-1]["step"] not in (1, 2):
        return f"not stopped in step 2: {output}"
    code, output = launch(folder, *after)
    if code != 0 or "going on from checkpoint-" not in output or "moments" in output:
        return f"exit code {code}: {output}"
    found = torch.load(folder / "found.pt")
    losses = zip(found["losses"], expected["losses"][-len(found["losses"]) :], strict=True)
    return apart(losses, zip(found["parameters"], expected["parameters"], strict=True))


def poisoned_together(folder: Path, engine: str) -> str | None:
    """One of two processes meets a NaN in step 2 of 3: None if both skip it, and train on as one process would."""
    two_processes.write_text(folder)
    code, output = launch(folder, engine, 2, "poison")
    if code != 0:
        return f"exit code {code}: {output}"
    found, counts = torch.load(folder / "found.pt"), artifacts.read_json(folder / "run" / "training.json")
    shutil.rmtree(folder / "run")
    (folder / "found.pt").unlink()
    code, output = launch(folder, "plain", 1, "poison")
    if code != 0:
        return f"exit code {code}: {output}"
    expected = torch.load(folder / "found.pt")
    if not counts["skipped"] == 1 == len(counts["findings"]) or counts["findings"][0]["step"] != 2:
        return f"counted {counts}"
    weights = zip(found["parameters"], expected["parameters"], strict=True)
    weight = max((a - b).abs().max().item() for a, b in weights)
    return None if weight < 5e-5 else f"parameters differ by {weight:.2g} from one process's"


def main(folder: Path, engine: str, *more: str, **changes: Any) -> None:
    """A part of a training, in each process of a launch."""
    torch.set_num_threads(1)
    if engine != "plain":
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(two_processes.LAUNCH / f"{engine}.json")
    dist.start()
    catch = Ends()
    init = RecoverTrainer.__init__

    def with_stop(trainer: RecoverTrainer, *arguments: Any, **named: Any) -> None:
        init(trainer, *arguments, **named)
        if "stop" in more:
            trainer.add_callback(StopInStep2())

    RecoverTrainer.__init__ = with_stop  # type: ignore[method-assign]
    cfg = two_processes.cfg(folder, micro_batch_size=2, **changes)
    if "poison" in more:
        faulty.count_micro_steps(poison_step_2)
    with two_processes.caught_by(catch):
        twin = Twin(tiny(), Plan("depth", 6, (2, 4)))
        try:
            train(twin, byte_tokenizer(), cfg, folder / "run", lambda *_: 1.0, seed=5)
        except StopRequested:
            assert "stop" in more
    if dist.is_main() and "stop" not in more:
        torch.save({"losses": catch.losses, "parameters": catch.parameters}, folder / "found.pt")
    dist.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
