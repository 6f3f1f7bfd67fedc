"""One recovery of a tiny twin, with every gradient caught; as a script under a launcher, on each engine in turn.

torchrun --standalone --nproc_per_node 2 tests/two_processes.py FOLDER plain zero2 zero3

`zero3:2`: two sequences at once; `zero3:own`: the pruned model writes some of the text itself; behind a +: `MORE`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from byte_tokenizer import byte_tokenizer
from tiny import tiny
from transformers import TrainerCallback

from recover.base import dist
from recover.config.recipe import Model, Probe, Train
from recover.models.load import load_model
from recover.models.plan import Plan
from recover.models.stored_weights import stored_in
from recover.models.stores import MachineMemory
from recover.models.twin import Twin
from recover.probe.probe import final_drift
from recover.text.generate import generate
from recover.text.likelihood import Continuation, log_likelihoods
from recover.train import trials
from recover.train.train import train
from recover.train.trainer import RecoverTrainer

LAUNCH = Path(__file__).parent.parent / "launch"
STEPS = 3


def cfg(folder: Path, **changes) -> Train:
    """Uneven lengths, prompts masked: processes and micro-batches hold unlike numbers of scored tokens.

    The loss differs from step to step.
    """
    source = folder / "given.jsonl"
    fields = {
        "data": [{"kind": "given", "source": str(source), "columns": {"prompt": "p", "completion": "c"}}],
        "epochs": 2,
        "tokens": 760,
        "length": 64,
        "batch_size": 8,
        "lr": 1e-2,
        "max_grad_norm": 1e9,
        "lora": {"rank": 4},
        "loss": {"kl": 1.0, "variance": 0.2, "variance_until": 0.5, "ce": 0.1, "temperature": 2.0},
    }
    return Train.model_validate({**fields, **changes})


def own_text(folder: Path, **changes) -> dict:
    """Changes of the config: half of the text is the pruned model's own, written for two steps at once."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}:"}) + "\n" for i in range(10)))
    source = {"kind": "pruned", "prompts": str(folder / "prompts.jsonl"), "max_new_tokens": 12, "batch_size": 8}
    loss = {"kl": 1.0, "variance": 0.2, "temperature": 2.0}
    return {"loss": loss, "data": [cfg(folder).data[0].model_dump(), {**source, "every": 2, **changes}]}


def write_text(folder: Path) -> None:
    rows = [{"p": f"say {i}: ", "c": "ab" * (1 + (7 * i) % 25)} for i in range(60)]
    (folder / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def cached(folder: Path, states: str) -> dict:
    """What to change of the config for training from states on disk: "dense", or "prefix" with them."""
    prefix = states == "prefix"
    lora = {"lora": {"rank": 4, "blocks": "after_cut"}} if prefix else {}
    return {"cache": {"folder": str(folder / "states"), "prefix": prefix}, **lora}


def few(twin: Twin, tokenizer) -> list[float]:
    """Of both views: fewer items than processes, and an uneven number: some process has nothing to do, or less."""
    prompts = [f"say {i}" * (1 + i) for i in range(9)]
    found = []
    for count in (1, 9):  # one batch, and three
        cfg = Probe(samples=count, batch_size=4, steps=4)
        found.append(final_drift(twin, tokenizer, prompts, cfg)["kl"]["mean"])
    rows = [Continuation(tokenizer(prompt)["input_ids"], 1) for prompt in prompts[:3]]
    for texts in (rows[:1], rows):
        found += dist.over(texts, lambda mine: log_likelihoods(twin.model, mine, batch_size=1, title="few"))
    written = dist.over(prompts[:1], lambda mine: generate(twin.model, tokenizer, mine, max_new_tokens=3, batch_size=1))
    return [*found, *map(float, written[0].ids)]


def auto(_folder: Path) -> dict:
    """Changes of the config: trials of rates, as few steps as they can be."""
    trials.SHARE, trials.STEPS = 20.0, (1, 2)
    return {"lr": "auto"}


# Runs that are also measured at the end (`few`); in the others no test looks at it.
MEASURED = ("alone", "plain", "zero2", "zero3", "plain+shards", "zero3:2")
FOCUSED = {"loss": {"kl": 1.0, "ce": 0.1, "focus": {"by": "disagreement", "power": 0.7}}}
MORE = {
    "dense": lambda folder: cached(folder, "dense"),
    "prefix": lambda folder: cached(folder, "prefix"),
    "shards": lambda _folder: {"shard_weights": True},
    "loaded": lambda _folder: {"shard_weights": True},  # shared from the first byte: see `loaded`
    "focus": lambda _folder: FOCUSED,
    "auto": auto,
    "average": lambda _folder: {"average": 0.5},
    "checkpointing": lambda _folder: {"gradient_checkpointing": True},
    "machines": lambda _folder: os.environ.update(LOCAL_WORLD_SIZE="2") or {},  # as on machines of two processes
}  # behind a + of a variant's name


class Catch(TrainerCallback):
    """Gradients of each step before it is taken, and parameters after the last one, whole, on every engine."""

    def __init__(self) -> None:
        self.gradients: list[list[torch.Tensor]] = []
        self.losses: list[float] = []
        self.parameters: list[torch.Tensor] = []
        self.engine = None

    def on_train_begin(self, args, state, control, model=None, **_):
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.engine is not None:
            engine, step = self.engine(), self.engine().step

            def caught(*arguments, **named):
                if engine.is_gradient_accumulation_boundary():
                    from deepspeed.utils import safe_get_full_grad

                    self.gradients.append([safe_get_full_grad(p).cpu().clone() for p in self.trained])
                return step(*arguments, **named)

            engine.step = caught

    def on_pre_optimizer_step(self, args, state, control, **_):
        if self.engine is None:
            self.gradients.append([parameter.grad.clone() for parameter in self.trained])

    def on_log(self, args, state, control, logs=None, **_):
        if "kl" in logs:
            self.losses.append(logs["loss"])

    def on_train_end(self, args, state, control, **_):
        if self.engine is None:
            self.parameters = [parameter.detach().clone() for parameter in self.trained]
            return
        from deepspeed.utils import safe_get_full_fp32_param

        self.parameters = [safe_get_full_fp32_param(parameter).cpu().clone() for parameter in self.trained]


def run(folder: Path, name: str, **changes) -> dict:
    """Losses, gradients and parameters of a whole `train` of this config, and what it wrote."""
    catch = Catch()
    with caught_by(catch):
        twin = Twin(loaded(folder) if "loaded" in name else tiny(), Plan("depth", 6, (2, 4)))
        tokenizer = byte_tokenizer()
        texts: list[str] = []

        measured: list[float] = []

        def after_epoch(epoch: int, context: dict) -> float:
            if epoch == 2 and name in MEASURED:
                measured.extend(few(twin, tokenizer))
            mine = generate(twin.model, tokenizer, dist.shard(["one", "two", "six"]), max_new_tokens=5, batch_size=4)
            texts.extend(dist.gather([generation.text for generation in mine]))
            return float(epoch)

        best = train(twin, tokenizer, cfg(folder, **changes), folder / name, after_epoch, seed=5)
    return {
        "losses": catch.losses,
        "gradients": catch.gradients,
        "parameters": catch.parameters,
        "texts": texts,
        "measured": measured,
        "best": str(best),
    }


def loaded(folder: Path):
    """The same model, read from files by all processes of the machine together, which hold it once."""
    dist.on_main(lambda: tiny().save_pretrained(folder / "model"))
    model = load_model(Model(source=str(folder / "model")), shared=True)
    assert type(stored_in(model)._store) is MachineMemory
    return model


@contextmanager
def caught_by(catch: Catch):
    """Inside, every RecoverTrainer carries the callback."""
    init = RecoverTrainer.__init__

    def with_callback(trainer, *arguments, **named):
        init(trainer, *arguments, **named)
        if trainer.is_deepspeed_enabled:
            catch.engine = lambda: trainer.deepspeed
        trainer.add_callback(catch)

    RecoverTrainer.__init__ = with_callback
    try:
        yield
    finally:
        RecoverTrainer.__init__ = init


def main(folder: Path, variants: list[str]) -> None:
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # accelerate looks for garbage after each training
    for variant in variants:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # of the variant before
        engine, *more = variant.split("+")
        engine, _, micro = engine.partition(":")
        if engine.startswith("zero"):
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
            os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(LAUNCH / f"{engine}.json")
        dist.start()
        changes = {"micro_batch_size": int(micro)} if micro.isdigit() else {}
        if micro == "own":
            changes = own_text(folder, temperature=0)  # greedy: what is drawn depends on how prompts are dealt out
        for name in more:
            changes |= MORE[name](folder)
        result = run(folder, variant, **changes)
        if dist.is_main():
            torch.save(result, folder / f"{variant}.pt")
    dist.stop()
    dist.leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
