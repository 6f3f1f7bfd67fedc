"""Commands before a first run: what this machine can run, which models can be pruned, and a recipe for one of them.

`recover doctor` looks at the machine, `recover families` lists the models. `recover init` writes a recipe for any
model, each line with its reason, sized to this machine.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from recover import __version__
from recover.base import console, hub, memory, provenance
from recover.base.artifacts import write_text
from recover.base.console import quiet_libraries
from recover.base.errors import RecipeError
from recover.config import named, yaml_values
from recover.config.recipe import Model, Width
from recover.config.tasks import KINDS, WritingFile
from recover.export.gguf.family import FAMILIES
from recover.measure.sandbox import why_no_wall
from recover.measure.tasks import load_task
from recover.models import refusal
from recover.models.arch import ARCHS, Arch
from recover.models.load import describe, load_tokenizer
from recover.models.source import exported_dtype
from recover.models.wrapper import WRAPPERS, Wrapper
from recover.run import draft
from recover.run.draft import Machine, Wanted, target, this_machine
from recover.run.estimate import ELEMENT_BYTES, Estimate, estimate, matrix_rate, refuse, room, too_large
from recover.text.rows import NotHad, first_had, prompt_rows
from recover.train.sources import read_prompts

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
    for kind in refusal.KINDS:
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


Row = tuple[str, str, str]  # what, what was found, what it is for or what to do
OPTIONAL = {  # distribution -> what it is for
    "deepspeed": "ZeRO launches (launch/zero*.yaml); pip install 'recover[deepspeed]'",
    "bitsandbytes": "model.load_in: 4bit; pip install 'recover[quantized]'",
    "lm-eval": "recover measure --lm-eval; pip install 'recover[eval]'",
    "xllamacpp": "GGUF files in q6_k, q5_k_m and q4_k_m; pip install 'recover[gguf]'",
    "langdetect": "the task ifeval; pip install 'recover[ifeval]'",
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
        elif any(bound.operator in ("<", "<=") and not bound.contains(found) for bound in requirement.specifier):
            yield requirement.name, found, f"newer than what was tested: {requirement}"
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
    missing = " or ".join(dict.fromkeys(brings))
    yield f"blend:{name}", "yes" if had else "no", f"more by {missing}" if had and missing else missing


PROMPT = '{"prompt": "What is 7 times 8?"}'
OWN = "a file of your own in its place (--prompts, --tasks)"
A_WALL = "a machine that has a wall for the programs that a model writes (docs/security.md)"
LONG_SECONDS = 24 * 3600  # of training, or of a search, about which something is said


def init(
    model: str,
    wanted: Wanted,
    out: Path | None,
    *,
    uses: str,
    prompts: Path | None,
    tasks: Sequence[str],
    tokens: int | None,
    name: str | None,
    replace: bool,
) -> None:
    """Write a recipe to `out`, by default its name and .yaml in the working folder, and say what it will cost.

    Raises RecipeError for what cannot be asked of this model, and for a file that is there already.
    """
    quiet_libraries()
    folder = Path.cwd() if out is None else out.parent
    found = Model(source=model)
    description = describe(found)
    chat = bool(load_tokenizer(found).chat_template)
    texts, missing = _texts(_uses(uses), prompts, tasks, folder, chat=chat)
    calibration = draft.calibration_for(texts, description)
    machine = draft.this_machine()
    dtype: Any = draft.dtype_for(machine, description)[0]
    element = ELEMENT_BYTES[exported_dtype(dtype, description.stored, None)]
    whole = target(wanted, description, calibration, element)
    goal = draft.affordably(whole, description, machine)
    source = draft.relative(model, folder)
    lines = draft.draft(source, description, goal, texts, machine, name=name, tokens=tokens)
    less = [] if machine.device == "cuda" else draft.smaller(lines, whole, description, texts, tokens=tokens)
    recipe = draft.recipe_of(lines)
    refuse(recipe, description)
    path = out or Path(f"{recipe.name}.yaml")
    if path.exists() and not replace:
        raise RecipeError(f"{path}: is there; name another --out, or say --replace")
    cost = estimate(recipe, description, matrix_rate())
    write_text(path, draft.written(lines, _head(machine, path, missing, less)))
    _say(
        path,
        machine,
        cost,
        missing,
        [*goal.cost.warnings],
        short=too_large(recipe, description, room()),
        narrow=isinstance(recipe.prune, Width),
        code=texts.runs_code,
        less=less,
    )


def _uses(text: str) -> list[named.Use]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise RecipeError(f"--for: found {text!r}, expected some of {', '.join(named.lists().uses)}")
    return [named.use(name) for name in dict.fromkeys(names)]


def _texts(
    uses: Sequence[named.Use], prompts: Path | None, tasks: Sequence[str], folder: Path, *, chat: bool
) -> tuple[draft.Texts, list[str]]:
    """What the recipe reads, and what of it cannot be had here, with what would bring it.

    What a user names must be there. Of what goes by a name, what cannot be had is left in the recipe, and said.
    """
    missing: dict[tuple[str, ...], list[str]] = {}
    if prompts is not None:
        rows = read_prompts(str(prompts))
        if not all(isinstance(row.value["prompt"], str) for row in rows):
            raise RecipeError(f"--prompts {prompts}: holds conversations; expected lines such as {PROMPT}")
        sources = [(draft.relative(str(prompts), folder), f"{len(rows):,} prompts of your own")]
    else:
        sources = [(f"blend:{use.blend}", _blend_about(use, missing)) for use in uses]
    asked = list(tasks) or list(dict.fromkeys(task for use in uses for task in (use.tasks if chat else use.plain)))
    listed = [(_task_name(task, folder), _task_about(task, missing)) for task in asked]
    kinds = [KINDS[str(yaml_values.read(named.task_path(task)).get("kind"))] for task in asked]
    probe = None if any(kind.name == "generate" for kind in kinds) else sources[0][0]
    said = [f"{', '.join(names)}: {', or '.join([*ways, OWN])}" for ways, names in missing.items()]
    writing = sum(issubclass(kind.file, WritingFile) for kind in kinds)
    return draft.Texts(tuple(sources), tuple(listed), any(kind.runs_code for kind in kinds), probe, writing), said


Missing = dict[tuple[str, ...], list[str]]  # what would bring it -> what is missing


def _blend_about(use: named.Use, missing: Missing) -> str:
    try:
        rows = prompt_rows(f"blend:{use.blend}")
    except NotHad as error:
        return _lacking(f"blend:{use.blend}", error, missing)
    return f"{len(rows):,} prompts here: {use.about}"


def _task_name(task: str, folder: Path) -> str:
    return task if named.is_task_name(task) else draft.relative(task, folder)


def _task_about(task: str, missing: Missing) -> str:
    try:
        loaded = load_task(task)
    except NotHad as error:
        return _lacking(task, error, missing)
    if KINDS[loaded.kind].runs_code and why_no_wall():
        return _lacking(task, NotHad("", [A_WALL]), missing)
    return f"{len(loaded.items):,} items: {loaded.file.about or loaded.kind}"


def _lacking(name: str, error: NotHad, missing: Missing) -> str:
    ways = tuple(sorted({*error.brings}, reverse=True))
    missing.setdefault(ways, []).append(name)
    return "CANNOT BE USED HERE: see the top of this file"


def _launch() -> str:
    """What `accelerate launch` is told for several GPUs: by the file, or the same by flags where there is no clone."""
    file = Path("launch/gpu.yaml")
    return f"--config_file {file}" if file.is_file() else "--multi_gpu --num_machines 1 --mixed_precision no"


def _head(machine: draft.Machine, path: Path, missing: Sequence[str], less: Sequence[str] = ()) -> Iterator[str]:
    yield f"Written by `recover init` for {machine.name}, {console.size(machine.memory)}. Then:"
    yield f"  recover plan {path}"
    yield f"  recover run {path}"
    if machine.count > 1:
        yield f"  accelerate launch {_launch()} --num_processes {machine.count} -m recover run {path}"
    yield "How long it takes is not said here: `recover plan` times a step, a text and a probe on this machine."
    yield "Values come from recover/config/defaults.py and docs/results.md; docs/recipes.md says what to expect."
    if less:
        said = (
            f"Smaller for {machine.name}, so that a run takes minutes; in brackets what a GPU takes: {', '.join(less)}"
        )
        yield from textwrap.wrap(said, 116, break_on_hyphens=False)
    for each in missing:
        yield from textwrap.wrap(f"CANNOT BE USED HERE: {each}", 116, break_on_hyphens=False)


def _say(
    path: Path,
    machine: draft.Machine,
    cost: Estimate,
    missing: Sequence[str],
    warnings: Sequence[str],
    *,
    short: str,
    narrow: bool,
    code: bool,
    less: Sequence[str],
) -> None:
    dense, pruned = cost["parameters_dense"], cost["parameters_pruned"]
    sizes = [console.size(cost["file_bytes_dense"]), console.size(cost["file_bytes_pruned"])]
    rows = [
        ["parameters", f"{dense:,}", f"{pruned:,}"],
        ["file", *sizes],
        ["teacher-scored tokens", "", f"{cost['teacher_tokens']:,}"],
        ["memory", "", f"about {console.size(cost['memory_bytes_per_process'])} of {console.size(machine.memory)}"],
    ]
    console.table(f"{path}, for {machine.name} (estimates)", ["what", "dense", "pruned"], rows)
    if less:
        console.say(f"smaller than with a GPU (in brackets): {', '.join(less)}")
    for line in warnings:
        console.warn(line)
    if short:
        less = "; or give --drop (narrower MLPs lie beside the dense ones)" if narrow else ""
        console.warn(f"{short}{less}")
    if cost["training_seconds"] > LONG_SECONDS:
        console.warn("training takes more than a day here: give --tokens, or take a machine with a GPU")
    if cost["search_seconds"] > LONG_SECONDS:
        console.warn("the search for what goes takes more than a day here: take a machine with a GPU")
    if code:
        console.warn(
            "a task runs what the model writes, locked away: the recipe has measure.allow_code_execution: true"
        )
    for each in missing:
        console.warn(f"cannot be used here: {each}")
    console.say(f"wrote {path}")
    then = "refuses it until nothing is missing" if missing else "says how long each stage takes on this machine"
    console.say(f"[dim]next: recover plan {path}, which {then}[/dim]")
