"""Private names of other packages that `recover` relies on: each is listed here, with what breaks, and is there.

DeepSpeed's are in `base/zero.py`, which has a list and a test of its own (`test_zero.py`).
"""

import ast
import atexit
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft.tuners.lora import Linear
from tiny import tiny
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_files
from trl.trainer.sft_trainer import SFTTrainer

from recover.models.arch import blocks_of

PACKAGE = Path(__file__).parent.parent / "recover"
APART = {PACKAGE / "base" / "zero.py"}
PUBLIC = {"_exit", "_replace"}  # documented, of os and of named tuples


def in_module() -> object:
    return nn.Linear(1, 1)


def hooked() -> object:
    return add_hook_to_module(nn.Linear(1, 1), ModelHook())


def ignored() -> object:
    """A model that DDP was told to leave parameters alone of."""
    model = nn.Linear(1, 1)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["weight"])
    return model


def experts() -> object:
    model = tiny("qwen3_moe")
    return blocks_of(model)[0].get_submodule("mlp.experts")


# Name -> who has it, and what is lost without it.
INTERNALS: dict[str, tuple[Callable[[], object], str]] = {
    # Python
    "_run_exitfuncs": (lambda: atexit, "one of several processes ends without what was to be done at its end"),
    # torch
    "_modules": (in_module, "modules of a block or a list are not found by name"),
    "_parameters": (in_module, "a model without memory is not given its weights"),
    "_buffers": (in_module, "the same, and an export on the disk is not widened"),
    "_forward_hooks": (in_module, "a LoRA layer with hooks is taken for a plain one"),
    "_forward_pre_hooks": (in_module, "the same"),
    "_backward_hooks": (in_module, "the same"),
    "_backward_pre_hooks": (in_module, "the same"),
    "_foreach_copy_": (lambda: torch, "factors are not lowered, and means of adapters not kept, in one launch"),
    "_foreach_lerp_": (lambda: torch, "means of adapters are not kept in one launch"),
    "_flash_attention_forward": (lambda: torch.ops.aten, "packed rows are not attended by flash attention"),
    "_flash_attention_backward": (lambda: torch.ops.aten, "the same"),
    "_symmetric_memory": (
        lambda: importlib.import_module("torch.distributed"),
        "weights that are shared out come by broadcasts: slower",
    ),
    "_ddp_params_and_buffers_to_ignore": (ignored, "weights that come and go are sent to other processes at the start"),
    # transformers
    "_attn_implementation": (PretrainedConfig, "attention of ours is not put in the place of the stock one"),
    "_experts_implementation": (
        PretrainedConfig,
        "a mixture is verified in float64 by a product that torch has not, and adapters on experts go through a loop",
    ),
    "_supports_sdpa": (lambda: PreTrainedModel, "a family without SDPA is refused, in place of using 'eager'"),
    "_supports_attention_backend": (lambda: PreTrainedModel, "attention of ours goes where it cannot be replaced"),
    "_keep_in_fp32_modules_strict": (lambda: PreTrainedModel, "weights kept in float32 are exported in few bits"),
    "_from_config": (lambda: PreTrainedModel, "no model is made that has no memory"),
    "_apply_gate": (experts, "pruned experts of a mixture are not run"),
    # accelerate
    "_hf_hook": (hooked, "weights on the disk are not read when an export is verified"),
    "_old_forward": (hooked, "the same"),
    # peft
    "_cast_input_dtype": (lambda: Linear, "under autocast each adapter keeps a copy of its input for backward"),
    # trl and transformers: what a trainer calls and ours replaces
    "_prepare_inputs": (lambda: SFTTrainer, "a batch does not come to the device"),
    "_save_checkpoint": (lambda: SFTTrainer, "checkpoints of theirs are written"),
    "_get_train_sampler": (lambda: SFTTrainer, "text comes in another order"),
    "_clip_grad_norm": (lambda: SFTTrainer, "gradients are clipped twice"),
    "_send_telemetry": (lambda: SFTTrainer, "nothing, if there is no telemetry any more: delete ours"),
}


@functools.cache
def parsed() -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text())) for path in sorted(PACKAGE.rglob("*.py"))]


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and len(name) > 1


def defined(tree: ast.AST) -> Iterator[str]:
    """Names of methods, fields and attributes of our own classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield inner.name
                targets = [inner.target] if isinstance(inner, ast.AnnAssign) else getattr(inner, "targets", [])
                yield from (target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "object.__setattr__":
            yield ast.literal_eval(node.args[1])


def used(tree: ast.AST) -> Iterator[str]:
    """Private names that are imported, looked up, asked for by `getattr` and the like, or set by a keyword."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from [*str(node.module).split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("getattr", "hasattr", "setattr", "delattr") and isinstance(node.args[1], ast.Constant):
                yield str(node.args[1].value)
            yield from (keyword.arg for keyword in node.keywords if keyword.arg and called.startswith("vars("))


def inherited(tree: ast.AST) -> Iterator[str]:
    """What a method of ours hands on to the one that it is in the way of."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "super()":
            yield node.attr


@functools.cache
def found() -> dict[str, list[str]]:
    """Private names of others, and the files that use them; a method that is in the way of one of theirs is one."""
    own = {name for _, tree in parsed() for name in defined(tree)}
    names: dict[str, list[str]] = {}
    for path, tree in parsed():
        replaced = {name for name in defined(tree) if hasattr(SFTTrainer, name)} if path.name == "trainer.py" else set()
        for name in ({*used(tree)} - own) | replaced | {*inherited(tree)}:
            if private(name) and name not in PUBLIC and path not in APART:
                names.setdefault(name, []).append(str(path.relative_to(PACKAGE)))
    return names


def test_every_private_name_of_another_package_is_known():
    unknown = {name: files for name, files in found().items() if name not in INTERNALS}
    assert not unknown, f"{unknown}: take a public way, or add a row to INTERNALS that says what breaks"


def test_no_row_is_left_of_what_is_used_no_more():
    assert {*INTERNALS} - {*found()} == set()


@pytest.mark.parametrize("name", INTERNALS)
def test_the_package_still_has_it(name):
    owner, lost = INTERNALS[name]
    assert hasattr(owner(), name), f"{name} is gone; without it: {lost}. Used in {found().get(name)}"


def test_shared_memory_of_gpus_is_asked_for_as_torch_has_it():
    symmetric = importlib.import_module("torch.distributed._symmetric_memory")
    assert {"empty", "rendezvous"} <= {*dir(symmetric)}


def test_a_file_that_a_repository_lacks_is_asked_for_without_an_error():
    from recover.models.source import QUIETLY

    taken = inspect.signature(cached_files).parameters
    assert all(f"_raise_exceptions_for_{each}" in taken for each in QUIETLY)
