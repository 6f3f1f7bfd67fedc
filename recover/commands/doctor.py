"""`recover doctor`: what this machine can run. `recover families`: which models can be pruned, and how."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from recover import __version__
from recover.base import console, hub, memory, provenance
from recover.base.errors import RecipeError
from recover.config import named, yaml_values
from recover.export.gguf.family import FAMILIES
from recover.measure.sandbox import why_no_wall
from recover.models.arch import ARCHS, Arch
from recover.models.refusal import KINDS
from recover.models.wrapper import WRAPPERS, Wrapper
from recover.run.draft import Machine, this_machine
from recover.text.rows import NotHad, first_had

FAMILIES_EXAMPLES = ("recover families",)
NOT_ONE = "prune.repair: the norm behind each sublayer lets nothing be folded in"

MIXED = "prune.repair and width: mlp: what mixtures of experts write goes through no one matrix: prune.kind experts"


def families() -> None:
    """Say which model families are supported, by which methods, and for the others why they are not."""
    columns = ["model_type", "depth, masks", "repair", "width: mlp", "kv_groups", "experts", "gguf"]
    console.table("supported, by config.json's model_type", columns, map(_row, ARCHS.values()))
    for line in _reasons():
        console.say(line)
    console.table(
        "supported, as text models inside a wrapper", ["model_type", "text model"], map(_inside, WRAPPERS.values())
    )
    console.say("exported as the same wrapper, its other parts as they were, bit for bit")
    console.say("")
    console.say("not supported:")
    for kind in KINDS:
        console.say(f"- {kind.called} ({kind.such_as}): {kind.why}")


def _row(arch: Arch) -> list[str]:
    dense = arch.experts is None
    can = (True, dense and not arch.norm_behind, dense, not arch.kv_groups_stay, not dense, arch.model_type in FAMILIES)
    return [arch.model_type, *("yes" if yes else "no" for yes in can)]


def _inside(wrapper: Wrapper) -> list[str]:
    """The wrapper, and the row of its text model in the table above."""
    return [wrapper.model_type, ", ".join(wrapper.texts)]


def _reasons() -> Iterator[str]:
    """Why a method is not there, once for all families that share the reason."""
    behind = [arch.model_type for arch in ARCHS.values() if arch.norm_behind]
    yield f"{NOT_ONE} ({', '.join(behind)})"
    yield f"{MIXED} ({', '.join(arch.model_type for arch in ARCHS.values() if arch.experts)})"
    for reason in dict.fromkeys(arch.kv_groups_stay for arch in ARCHS.values() if arch.kv_groups_stay):
        those = [arch.model_type for arch in ARCHS.values() if arch.kv_groups_stay == reason]
        yield f"prune.kv_groups: {reason} ({', '.join(those)})"


EXAMPLES = ("recover doctor",)
Row = tuple[str, str, str]  # what, what was found, what it is for or what to do
OPTIONAL = {  # distribution -> what it is for
    "deepspeed": "ZeRO launches (launch/zero*.yaml); pip install 'recover[deepspeed]'",
    "lm-eval": "recover measure --lm-eval; pip install 'recover[eval]'",
    "triton": "fused kernels on a GPU; comes with torch for CUDA",
}
TOKENS = 2048  # at once on a process, in what is said of sizes


def doctor() -> None:
    """Say what this machine can run: versions, GPU, memory, disk, hub, data that goes by a name, sizes of models."""
    machine, software = this_machine(), [*_software()]
    console.table("software", ["what", "found", ""], software)
    console.table("machine", ["what", "found", ""], _machine(machine))
    console.table(f"LoRA recovery, rank 16, {TOKENS:,} tokens at once", ["model", "fits", "needs"], _sizes(machine))
    console.table("data that goes by a name", ["what", "here", ""], _data())
    wrong = [f"{name} {found}: {note}" for name, found, note in software if note.startswith("too old")]
    if wrong:
        raise RecipeError("; ".join(wrong))


def _software() -> Iterator[Row]:
    yield "recover", __version__, ""
    yield "python", platform.python_version(), ""
    for requirement in _required():
        found = _version(requirement.name)
        if found is None:
            yield requirement.name, "not installed", f"needed: {requirement}"
        elif requirement.specifier.contains(Version(found), prereleases=True):
            yield requirement.name, found, ""
        else:
            yield requirement.name, found, f"too old: {requirement}"
    for name, use in OPTIONAL.items():
        found = _version(name)
        yield name, found or "not installed", "" if found else f"for {use}"


def _required() -> list[Requirement]:
    """What is needed of the libraries that matter most; without a specifier where recover is not installed itself."""
    try:
        found = [Requirement(line) for line in metadata.requires("recover") or ()]
    except metadata.PackageNotFoundError:
        found = []
    needed = {each.name: each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})}
    names = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "gguf")
    return [needed.get(name, Requirement(name)) for name in names]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _machine(machine: Machine) -> Iterator[Row]:
    found = provenance.machine()
    yield "processor", f"{found['processor']}, {found['cores']} cores", ""
    yield "memory", console.size(found["memory_bytes"]), ""
    yield (
        "disk, free here",
        console.size(shutil.disk_usage(Path.cwd()).free),
        "runs go to checkpoints/ below this folder",
    )
    for gpu in found["gpus"]:
        yield "GPU", f"{gpu['name']}, {console.size(gpu['memory_bytes'])}", ""
    if machine.device == "cuda":
        yield "CUDA of torch", str(torch.version.cuda), ""
        half = machine.dtype == "bfloat16"
        yield "bfloat16", "yes" if half else "no", "" if half else "model.dtype: float16 on this GPU"
        yield "fused kernels", "yes" if importlib.util.find_spec("triton") else "no, triton is missing", ""
    else:
        built = torch.version.cuda
        why = f"torch is built for CUDA {built}, and sees no GPU" if built else "torch is built for the CPU"
        yield "GPU", "none", f"{why}; model.dtype: float32, and small models"
    why = why_no_wall()
    yield "wall for code", "no" if why else "yes", f"code tasks are refused: {why} (docs/security.md)" if why else ""
    reason = hub.unreached()
    yield "hub", "reached" if reason is None else "not reached", reason or ""


def _sizes(machine: Machine) -> Iterator[Row]:
    """Whether models of published sizes train here, by `plan`'s arithmetic."""
    element = 2 if machine.device == "cuda" else 4
    for name, shape in memory.PUBLISHED.items():
        plain, less = (
            memory.peak_bytes(shape, memory.Training(TOKENS, checkpointing=on, element=element)) for on in (False, True)
        )
        if plain <= machine.usable:
            yield name, "yes", console.size(plain)
        elif less <= machine.usable:
            yield name, "with gradient checkpointing", console.size(less)
        else:
            yield name, "no", console.size(less)


def _data() -> Iterator[Row]:
    for name in named.task_names():
        path = named.task_path(name)
        try:
            sources = named.read_sources(yaml_values.read(path)["sources"], path)
            source = first_had(sources, path.parent, fetch=False)
        except NotHad as error:
            yield name, "no", " or ".join(dict.fromkeys(error.brings))
            continue
        yield name, "yes", source.pip or source.data
    for name in named.blend_names():
        yield from _blend(name)


def _blend(name: str) -> Iterator[Row]:
    path = named.blend_paths(f"blend:{name}")[0]
    had, brings = [], []
    for part in named.read_blend(path).parts:
        try:
            had.append(first_had(part.sources, path.parent, fetch=False).data)
        except NotHad as error:
            brings += error.brings
    missing = f"more by {' or '.join(dict.fromkeys(brings))}" if brings else ""
    yield f"blend:{name}", "yes" if had else "no", missing


COMMANDS = {doctor: EXAMPLES, families: FAMILIES_EXAMPLES}
