"""Whether a deploy folder is the model that was trained, checked by a fresh process that knows no class of ours.

    python -m recover.export.verify FOLDER --expected FILE.safetensors --plan PLAN.json --out VERIFY.json

Shapes: B batch, T tokens, V vocabulary, S decoding steps, O out features, I in features.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import accelerate
import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from recover.base import artifacts
from recover.base.clock import part
from recover.base.errors import ArtifactError, ExportError, RecoverError
from recover.base.safe_path import child_environment
from recover.maths.divergence import all_finite

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from recover.models.plan import MaskEntry, PlanRecord
    from recover.models.twin import Twin

# Tolerated differences of logits, in units of the model's own rounding: the largest change of a logit when the same
# weights are computed with in wider arithmetic. How far rounding carries depends on dtype, depth and weights (measured:
# 3e-7 to 0.8 of the largest logit), what a right export is off by does not: at most 2.4 units against the training view
# and 1.4 with a cache, over 13 families, 6 and 24 blocks, three dtypes, two sizes of adapter.
TRAINED = 5.0  # W + s B A was rounded once to the exported dtype, and sums are in another order
CACHED = 4.0  # the same weights, one token at a time
STATES = 16.0  # as CACHED, where a state is multiplied at every token and rounding with it (5 units, Nemotron-H, fp32)
RELOADED = 1.0  # the same weights on the same device

NEW_TOKENS = 16
TEXT, TOWER = "text_config", "model.language_model."  # settings and module of a text model inside a wrapper
# The argument, before its parent's id, of a process that is given the others when there is something to verify.
WAITING = "--waiting"
WATCHED_SECONDS = 0.2
ORPHANED = 3  # exit code of a process whose parent is gone
FLAGS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def write_expected(path: Path, twin: Twin, merged: PreTrainedModel, ids_BT: Tensor) -> None:
    """Record what the folder must reproduce on these ids: fp32 logits of the training view and of the merged model.

    Where the twin's weights come and go, the checking process reads the folder's blocks one by one too. Where they are
    held in few bits, its logits are those of other weights than the export's, and not judged.
    """
    # Not at module level: the process that checks does without.
    from recover.models.stored_weights import stored_in

    with torch.no_grad():
        trained_BTV = twin.model(input_ids=ids_BT.to(twin.model.device), use_cache=False).logits.float().cpu()
        merged_BTV = merged(input_ids=ids_BT.to(merged.device), use_cache=False).logits.float().cpu()
    tensors = {"input_ids": ids_BT.cpu().clone(), "trained": trained_BTV, "merged": merged_BTV}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # Kernels of another device round otherwise: the checking process has to use the one that the merged model was on.
    made = {"device": str(merged.device)}
    if (stored := stored_in(twin.base)) is not None:
        made["by_blocks"] = "yes"
        if not stored.exact:
            made["quantized"] = stored.kind
    artifacts.write_bytes(path, safetensors.torch.save(contiguous, made))


@contextmanager
def fresh_process() -> Iterator[subprocess.Popen[str]]:
    """A process for `verify` that loads its libraries meanwhile; one that is not used is gone at the end."""
    command = [sys.executable, "-P", "-m", "recover.export.verify", WAITING, str(os.getpid())]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=_environment(), text=True, **pipes) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


class Cached(TypedDict):
    """Steps of generation with a cache, and how far its logits are from those of one pass."""

    steps: int
    logits_max_difference: float


class Logits(TypedDict):
    """Largest differences of logits; `rounding`: the unit that they are held against."""

    rounding: float
    logits_max_difference: float
    logits_max_difference_reload: float
    cache: Cached
    generated: list[int]


class Zeros(TypedDict):
    """Zeros in the weights that have a certificate: so many certified, so many found, and their share."""

    weights: int
    certified: int
    found: int
    share: float


class Verdict(TypedDict):
    """What stands in verify.json even of a folder that could not be checked."""

    ok: bool
    problems: list[str]


class Verified(Verdict, Logits):
    """verify.json of a folder that was checked; `files`: their sha256.

    `quantized`: how the weights were held in training, where that was in few bits; `logits_max_difference` is then what
    that made of the logits, and is not judged.
    """

    dtype: str
    blocks: int
    parameters: int
    zeros: Zeros
    files: dict[str, str]
    versions: dict[str, str]
    quantized: NotRequired[str]


@part("verifying")
def verify(
    folder: Path, expected: Path, plan: Path, out: Path, *, process: subprocess.Popen[str] | None = None
) -> Verified:
    """Check `folder` in a fresh process and give the record that it wrote to `out` (verify.json).

    `process`: one of `fresh_process`; default: another.

    Checked: hashes; keys; finite weights; zeros against the plan's certificates; logits against the training view and
    the merged model; logits of generation with a KV cache against one pass without. Raises ExportError naming
    everything that differs.
    """
    if process is None:
        with fresh_process() as process:
            return verify(folder, expected, plan, out, process=process)
    arguments = [str(folder), "--expected", str(expected), "--plan", str(plan), "--out", str(out)]
    out.unlink(missing_ok=True)
    _, said = process.communicate(json.dumps(arguments))
    if not out.is_file():
        raise ExportError(f"{folder}: verification ended with {process.returncode} and no record:\n{said[-2000:]}")
    record: Verified = artifacts.read_json(out)
    if process.returncode or not record["ok"]:
        raise ExportError(f"{folder}: is not the model that was trained: {'; '.join(record['problems'])}")
    return record


def _environment() -> dict[str, str]:
    """One process, no rendezvous, no module of the working folder; offline, because the folder must be enough."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in child_environment().items() if k not in launcher and not k.startswith("ACCELERATE_")}
    return {**kept, "HF_HUB_OFFLINE": "1"}


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone: its verdict would lie over that of a later run."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCHED_SECONDS)
        os._exit(ORPHANED)

    threading.Thread(target=watch, daemon=True).start()


def _awaited() -> list[str]:
    """The arguments, once they come; libraries are loaded before. None come where nothing is left to verify."""
    assert transformers.AutoModelForCausalLM and transformers.AutoTokenizer  # loaded when they are named
    return json.loads(sys.stdin.read() or "[]")


def main(arguments: list[str] | None = None) -> int:
    """The fresh process: writes the record, gives 0 if all is as it must be."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parent = None
    if arguments[:1] == [WAITING]:
        parent = int(arguments[1])
        _end_with(parent)
        arguments = _awaited()
        if not arguments:
            return 0
    parser = argparse.ArgumentParser(prog="python -m recover.export.verify", description="Verify an exported folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--expected", type=Path, required=True, help="safetensors: input_ids, logits trained and merged"
    )
    parser.add_argument("--plan", type=Path, required=True, help="plan.json, with the certificates of the masks")
    parser.add_argument("--out", type=Path, required=True, help="where the record is written")
    options = parser.parse_args(arguments)
    try:
        record: Verdict = check(options.folder, options.expected, options.plan)
    except RecoverError as error:
        record = {"ok": False, "problems": [str(error)]}
    if parent is not None and os.getppid() != parent:
        return ORPHANED
    artifacts.write_json(options.out, record)
    return 0 if record["ok"] else 1


def check(folder: Path, expected: Path, plan: Path) -> Verified:
    """All checks on one folder; `problems` names what failed.

    Raises ArtifactError when a hash differs, ExportError when the folder does not load.
    """
    artifacts.check_manifest(folder)
    tensors, made = _expected(expected)
    planned: PlanRecord = artifacts.read_json(plan)
    manifest = artifacts.read_json(folder / artifacts.MANIFEST)["files"]
    with tempfile.TemporaryDirectory(prefix="recover-") as beside:
        model, problems = _load(folder, made["device"], Path(beside) if "by_blocks" in made else None)
        problems += _size_problems(model, planned)
        dtype, parameters = str(model.dtype).removeprefix("torch."), model.num_parameters()
        zeros = _zeros(model, planned["masks"], problems)
        logits = _logits(model, tensors, problems, judged="quantized" not in made)
    record: Verified = {
        "ok": not problems,
        "problems": problems,
        "dtype": dtype,
        "blocks": model.config.get_text_config(decoder=True).num_hidden_layers,
        "parameters": parameters,
        "zeros": zeros,
        **logits,
        "files": {name: entry["sha256"] for name, entry in manifest.items()},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")},
    }
    if "quantized" in made:
        record["quantized"] = made["quantized"]
    return record


def _expected(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that `write_expected` recorded, on the device it recorded, and how they were made."""
    try:
        with safe_open(path, "pt") as file:
            made = {"device": "cpu", **(file.metadata() or {})}
            return {name: file.get_tensor(name).to(made["device"]) for name in ("input_ids", "trained", "merged")}, made
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: holds no expected logits ({error}); run the stage export again") from error


def _load(folder: Path, device: str, beside: Path | None) -> tuple[PreTrainedModel, list[str]]:
    """The folder as anyone loads it, and what is wrong with its keys and weights.

    `beside`: where accelerate may write what it cannot read from the files as it is; then blocks stay on the disk.
    """
    try:
        kind, options = _class_of(folder), {}
        if beside is not None:
            options = {"device_map": _blocks_on_disk(folder, kind, device), "offload_folder": str(beside)}
        loaded: Any = kind.from_pretrained(
            folder, dtype="auto", output_loading_info=True, trust_remote_code=False, **options
        )
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a foreign loader raises: the folder does not load
        raise ExportError(f"{folder}: stock transformers cannot load it: {type(error).__name__}: {error}") from error
    model, info = loaded
    problems = [f"{flag.replace('_', ' ')}: {sorted(map(str, info[flag]))[:4]}" for flag in FLAGS if info.get(flag)]
    problems += [f"{name}: not finite" for name, weight in _values(model) if not all_finite(weight)]
    if model.generation_config.eos_token_id is None:
        problems.append("generation_config.json: no eos_token_id, so generation would never stop")
    return (model if beside is not None else model.to(device)).eval(), problems


def _blocks_on_disk(folder: Path, kind: Any, device: str) -> dict[str, str]:
    """Where each module goes: elements of the largest list of modules, which are the blocks, stay on the disk."""
    with accelerate.init_empty_weights():
        model = kind.from_config(AutoConfig.from_pretrained(folder))
    lists = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
    blocks = max(lists, key=lambda name: sum(each.numel() for each in lists[name].parameters()))
    found = {f"{blocks}.{number}": "disk" for number in range(len(lists[blocks]))}

    def place(path: str, module: torch.nn.Module) -> None:
        for name, inner in module.named_children():
            full = f"{path}{name}"
            if blocks.startswith(f"{full}."):
                place(f"{full}.", inner)
            elif full != blocks:
                found[full] = device

    place("", model)
    return found


def _values(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each parameter, one after the other; those on the disk are read."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{path}.{name}" if path else name, _value(module, name, parameter)


def _value(module: Any, name: str, parameter: Tensor) -> Tensor:
    return module._hf_hook.weights_map[name] if parameter.is_meta else parameter


def _class_of(folder: Path) -> Any:
    """The auto class of the folder: a wrapper is loaded with all its parts."""
    inside = artifacts.read_json(folder / "config.json").get(TEXT)
    return AutoModelForCausalLM if inside is None else AutoModelForImageTextToText


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Its parameters under the names that a plan has: those of a text model without a wrapper around it."""
    text = model.config.get_text_config(decoder=True) is not model.config
    weights = dict(model.named_parameters())
    return {name.replace(TOWER, "model.", 1): weight for name, weight in weights.items()} if text else weights  # type: ignore[return-value]


def _size_problems(model: PreTrainedModel, planned: PlanRecord) -> list[str]:
    """Sizes that pruning changed are those of the plan, in the config and in the weights that it names."""
    problems = []
    for name, value in planned.get("config", {}).items():
        found = getattr(model.config.get_text_config(decoder=True), name, None)
        if found != value:
            problems.append(f"config.json: {name} is {found}, the plan says {value}")
    weights, turned = _weights(model), {f"{name}.weight" for name, each in model.named_modules() if _turned(each)}
    for name, shape in planned.get("weights", {}).items() if planned.get("config") else ():
        found = tuple(weights[name].shape) if name in weights else None
        found = found[::-1] if found is not None and name in turned else found
        if found != tuple(shape):
            problems.append(f"{name}: shape {found}, the plan says {tuple(shape)}")
    return problems


def _zeros(model: PreTrainedModel, certificates: dict[str, MaskEntry], problems: list[str]) -> Zeros:
    """Every certified weight has at least the zeros of its certificate, in its pattern."""
    found = total = 0
    for name, certificate in certificates.items():
        zero_OI = _matrix(model, name) == 0
        zeros = int(zero_OI.sum())
        found, total = found + zeros, total + zero_OI.numel()
        if zeros < certificate["zeros"]:
            problems.append(f"{name}.weight: {zeros} zeros, its certificate says {certificate['zeros']}")
        problems += _pattern_problems(name, zero_OI, certificate["pattern"])
    certified = sum(certificate["zeros"] for certificate in certificates.values())
    share = found / total if total else 0.0
    return {"weights": len(certificates), "certified": certified, "found": found, "share": share}


def _matrix(model: PreTrainedModel, name: str) -> Tensor:
    """The weight (O, I) of a layer; of a matrix of experts, one expert after the other."""
    if model.config.get_text_config(decoder=True) is not model.config:  # inside a wrapper
        name = name.replace("model.", TOWER, 1)
    parent, _, last = name.rpartition(".")
    module = model.get_submodule(parent)
    stored: Any = getattr(module, last)
    if not isinstance(stored, torch.nn.Parameter):
        value = _value(stored, "weight", stored.weight)
        return value.T if _turned(stored) else value
    value = _value(module, last, stored)
    return (value.transpose(1, 2) if getattr(module, "is_transposed", False) else value).flatten(0, 1)


def _turned(module: torch.nn.Module) -> bool:
    """Whether it stores its weight as (I, O): GPT-2's linear layers."""
    return isinstance(module, Conv1D)


def _pattern_problems(name: str, zero_OI: Tensor, pattern: str) -> list[str]:
    if ":" not in pattern:
        return []
    n, m = map(int, pattern.split(":"))
    alive = int((~zero_OI).reshape(-1, m).sum(1).max())
    return [f"{name}.weight: {alive} of {m} consecutive inputs are not zero, not {pattern}"] if alive > n else []


def _logits(model: Any, tensors: dict[str, Tensor], problems: list[str], *, judged: bool = True) -> Logits:
    """All comparisons of logits. Afterwards the model is in a wider dtype, and on the CPU if it was in memory.

    `judged`: whether the training view has to give the export's.
    """
    ids_BT, start = tensors["input_ids"], max(1, tensors["input_ids"].shape[1] // 2)
    logits_BTV = _forward(model, ids_BT)
    text_BT, cached_SV, states = _generate(model, ids_BT[:1, :start])
    whole_SV = _forward(model, text_BT[:, :-1])[0, start - 1 :]
    dtype = torch.float64 if model.dtype == torch.float32 else torch.float32
    wide = _widened(model, dtype) if _on_disk(model) else model.to(device="cpu", dtype=dtype)
    if getattr(wide.config, "_experts_implementation", None) == "grouped_mm":  # torch has no such product in float64
        wide.set_experts_implementation("eager")
    wide_BTV = _forward(wide, ids_BT if _on_disk(model) else ids_BT.cpu())
    unit = float((wide_BTV.cpu() - logits_BTV.cpu()).abs().max())
    near = TRAINED * unit if judged else float("inf")
    trained = _difference(logits_BTV, tensors["trained"], near, "logits and the training view", problems)
    merged = _difference(logits_BTV, tensors["merged"], RELOADED * unit, "logits and the merged model", problems)
    tolerance = (STATES if states else CACHED) * unit
    cached = _difference(cached_SV, whole_SV, tolerance, "logits with and without a KV cache", problems)
    return {
        "rounding": unit,
        "logits_max_difference": trained,
        "logits_max_difference_reload": merged,
        "cache": {"steps": len(cached_SV), "logits_max_difference": cached},
        "generated": text_BT[0, start:].tolist(),
    }


def _on_disk(model: torch.nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _widened(model: Any, dtype: torch.dtype) -> Any:
    """The model, which computes in this dtype: what is on the disk is widened while its module computes."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
        own = dict(module.named_parameters(recurse=False))
        if any(parameter.is_meta for parameter in own.values()):
            module._old_forward = _widely(module, module._old_forward, tuple(own), dtype)
        else:
            for parameter in own.values():
                parameter.data = parameter.data.to(dtype)
    return model


def _widely(module: Any, forward: Callable[..., Any], names: tuple[str, ...], dtype: torch.dtype) -> Callable[..., Any]:
    def widely(*args: Any, **kwargs: Any) -> Any:
        own = {name: module._parameters[name] for name in names}
        wide = {name: torch.nn.Parameter(each.to(dtype), requires_grad=False) for name, each in own.items()}
        try:
            module._parameters.update(wide)
            return forward(*args, **kwargs)
        finally:
            module._parameters.update(own)

    return widely


def _forward(model: Any, ids_BT: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids_BT, use_cache=False).logits.float()


def _generate(model: Any, prompt_BT: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Greedy decoding with a KV cache: the text, the logits that each new token was read off, and whether there are
    states in the cache.

    Logits are compared and not tokens, which mostly agree even where positions are wrong.
    """
    output = model.generate(
        prompt_BT,
        attention_mask=torch.ones_like(prompt_BT),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    cache = output.cache if hasattr(output, "cache") else output.past_key_values
    states = any(hasattr(layer, "conv_states") for layer in cache.layers)
    return output.sequences, torch.cat(output.logits).float(), states


def _difference(found: Tensor, expected: Tensor, tolerance: float, what: str, problems: list[str]) -> float:
    """Largest absolute difference; a problem if it is more than `tolerance`, or no number."""
    if found.shape != expected.shape:
        problems.append(f"{what}: shapes {tuple(found.shape)} and {tuple(expected.shape)}")
        return float("inf")
    largest = float((found - expected).abs().max())
    if not largest <= tolerance:  # `not <=`: NaN is a problem too
        problems.append(f"{what} differ by {largest:.3g}, tolerated is {tolerance:.3g}")
    return largest


if __name__ == "__main__":
    raise SystemExit(main())
