"""Commands beside those on runs, as a shell sees them: options, help and examples of each.

What a command does stands in the other files of this folder, and is imported when the command is called: they need
torch, which help and a shell's completion do without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from recover.base import console, dist
from recover.base.errors import RecipeError
from recover.base.products import refuse_input, refuse_other_kind
from recover.config import named
from recover.config.base import checked, option
from recover.config.recipe import Measure, Model, Probe, local_path
from recover.run import input_digests as inputs
from recover.run.directory import RunDirectory

More = Annotated[
    list[str] | None, typer.Argument(metavar="[TASK]...", help="More tasks, after --tasks.", show_default=False)
]
SOURCE = "A hub id, a folder, a GGUF file, or embedded:NAME"
Source = Annotated[str, typer.Argument(metavar="MODEL", help=f"{SOURCE}.", show_default=False)]


def doctor() -> None:
    """Say what this machine can run: versions, GPU, memory, disk, hub, data that goes by a name, sizes of models."""
    from recover.commands import start

    start.doctor()


def families() -> None:
    """Say which model families are supported, by which methods, and for the others why they are not."""
    from recover.commands import start

    start.families()


Recipe = Annotated[
    Path | None, typer.Option("--out", help="The recipe to write; default: its name and .yaml, in this folder.")
]
Drop = Annotated[str | None, typer.Option("--drop", help="Share of the blocks, 10%, or how many.")]
WidthShare = Annotated[str | None, typer.Option("--width", help="Share of the MLP neurons; the default is 12.5%.")]
Zeros = Annotated[str | None, typer.Option("--sparsity", help="Share of the weights, 50%, or a pattern, 2:4.")]
Params = Annotated[str | None, typer.Option("--params", help="Parameters that may stay, 1.2B.")]
Memory = Annotated[str | None, typer.Option("--memory", help="For weights and a KV cache of 4,096 tokens, 8GB.")]
Speedup = Annotated[float | None, typer.Option("--speedup", help="Of decoding, by the weights a token reads, 1.3.")]
By = Annotated[
    str | None, typer.Option("--by", help="What goes for --params and --memory: width (neurons; default), or depth.")
]
For = Annotated[str, typer.Option("--for", help="What it is wanted for: math, code, chat, commas between them.")]
Asking = Annotated[
    Path | None, typer.Option("--prompts", help="Prompts of your own (JSONL), in place of those of --for.")
]
Asked = Annotated[
    list[str] | None, typer.Option("--tasks", help="Tasks of your own, or by name, in place of those of --for.")
]


def init(
    model: Source,
    more: More = None,
    out: Recipe = None,
    drop: Drop = None,
    width: WidthShare = None,
    sparsity: Zeros = None,
    params: Params = None,
    memory: Memory = None,
    speedup: Speedup = None,
    by: By = None,
    uses: For = "math,code,chat",
    prompts: Asking = None,
    tasks: Asked = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, help="Teacher-scored tokens of the recovery.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the run.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Write over a file that is there.")] = False,
) -> None:
    """Write a recipe for any model: what goes, what text, which tasks, sized to this machine; each line says why."""
    if more and not tasks:
        raise RecipeError(f"{more[0]}: found after the model; tasks are named after --tasks")
    if out is not None and out.exists() and not replace:
        raise RecipeError(f"{out}: is there; name another --out, or say --replace")
    from recover.commands import start

    wanted = start.Wanted(drop, width, sparsity, params, memory, speedup, by)
    listed = [*(tasks or ()), *(more or ())]
    start.init(model, wanted, out, uses=uses, prompts=prompts, tasks=listed, tokens=tokens, name=name, replace=replace)


Measured = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help=f"{SOURCE}; or a run directory, whose dense, pruned and recovered models are measured, and get a column "
        "each in its report.",
        show_default=False,
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        help="Names (gsm8k, mmlu: docs/recipe.md), task files (YAML), embedded:NAME; one or more.",
        autocompletion=named.task_names,
    ),
]


def _suites() -> list[str]:
    return [*named.lists().suites]


Suite = Annotated[
    str | None,
    typer.Option("--suite", help="Named tasks together: standard, base, choice, or chat.", autocompletion=_suites),
]
Harness = Annotated[
    str, typer.Option("--lm-eval", help="Tasks of lm-evaluation-harness, commas between them (extra 'eval').")
]
Include = Annotated[Path | None, typer.Option("--lm-eval-include", help="Folder with harness tasks of your own.")]
Allow = Annotated[
    bool,
    typer.Option(
        "--allow-code-execution",
        help="Let code tasks run what the model writes, behind Linux namespaces: no network, no files, no other "
        "processes. Refused where there are none.",
    ),
]
Unconfined = Annotated[
    bool,
    typer.Option(
        "--allow-code-execution-unconfined",
        help="Let code tasks run it without them: such a program can read and write all that you can.",
    ),
]
Figures = Annotated[
    Path | None, typer.Option("--out", help="JSON file for all figures, samples, versions and machine; replaced.")
]


def measure(
    model: Measured,
    others: More = None,
    tasks: Tasks = None,
    suite: Suite = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Items of each task, the first ones.")] = None,
    out: Figures = None,
    lm_eval: Harness = "",
    lm_eval_include: Include = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Default: 64; of a run, its recipe's.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            help="Texts cut here are counted. Default: 128, or what the longest prompt leaves of the model's context; "
            "of a run, its recipe's.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Default: as the checkpoint is stored.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Where it lies, if not beside the model.", show_default=False)
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Of a hub model: branch, tag or commit.", show_default=False)
    ] = None,
    attention: Annotated[
        str | None, typer.Option("--attention", help="sdpa (the default) or eager.", show_default=False)
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Texts of each task kept. Default: 3.", show_default=False)
    ] = None,
    allow_code_execution: Allow = False,
    allow_code_execution_unconfined: Unconfined = False,
) -> None:
    """Measure any checkpoint: what it writes, chooses, retrieves, expects; the same items and prompts for each.

    Of a run directory: tasks that its recipe does not have, on each of its models, without training.
    """
    names, theirs = _named(suite, tasks, others, lm_eval)
    allowed = "unconfined" if allow_code_execution_unconfined else allow_code_execution or None
    fields = _given(
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        samples=samples,
        allow_code_execution=allowed,
    )
    about = _given(dtype=dtype, tokenizer=tokenizer, revision=revision, attention=attention)
    if out is not None:
        read = names if _is_run(model) else [model, *names]  # a run's own files are told by their stamps
        refuse_input(out, (model, *names, *inputs.files_of([str(Path(name).absolute()) for name in read])))
        refuse_other_kind(out, ".json")
    from recover.commands import measure as work

    # The launcher's processes share the items; without one this does nothing.
    dist.start()
    if _is_run(model):
        record = work.measure_run(Path(model), names, theirs, about, fields)
    else:
        cfg = checked(Measure, option, tasks=tuple(names) or ("none",), sampling=None, **fields)
        wanted = work.Wanted(tuple(names), theirs, lm_eval_include)
        record = work.measure_checkpoint(model, wanted, cfg, fit=max_new_tokens is None, **about)
        work.say(record)
    if out is not None:
        work.write(record, out)
    dist.stop()


def _named(suite: str | None, tasks: More, others: More, lm_eval: str) -> tuple[list[str], tuple[str, ...]]:
    """Names of our tasks and of the harness's. RecipeError where there is none, or one in a wrong place."""
    names = [*(named.suite(suite) if suite else ()), *(tasks or ()), *(others or ())]
    theirs = tuple(name.strip() for name in lm_eval.split(",") if name.strip())
    if others and not tasks:
        raise RecipeError(f"{others[0]}: found after the model; tasks are named after --tasks")
    if not names and not theirs:
        raise RecipeError(
            "nothing to measure: give --tasks gsm8k task.yaml ..., --suite standard, or --lm-eval arc_easy,gsm8k"
        )
    return names, theirs


def _is_run(model: str) -> bool:
    folder = Path(model).expanduser()
    return (
        not (folder / "config.json").is_file() and RunDirectory(folder).recipe.is_file() and RunDirectory(folder).is_run
    )


def _given(**options: Any) -> dict[str, Any]:
    """Options that were given."""
    return {name: value for name, value in options.items() if value is not None}


Dense = Annotated[
    str,
    typer.Argument(
        metavar="DENSE",
        help="The reference: a hub id, a folder, a GGUF file, a quantized checkpoint, or embedded:NAME.",
    ),
]
Other = Annotated[str, typer.Argument(metavar="OTHER", help="What is held against it, of the same tokenizer.")]
Folder = Annotated[
    Path, typer.Option("--out", help="Folder for the records; the same command goes on where it stopped.")
]
Prompts = Annotated[Path | None, typer.Option("--prompts", help="JSONL with a `prompt` column: both models write on.")]
Texts = Annotated[Path | None, typer.Option("--texts", help="JSONL with a `text` column: both models read it.")]
Probed = Annotated[
    list[str] | None, typer.Option("--task", help="Choice or retrieval task (YAML, or embedded:NAME); may be repeated.")
]
Pairs = Annotated[
    Path | None, typer.Option("--retrieval", help="JSONL with `query` and `documents` (and `relevant`): embedding use.")
]
Blocks = Annotated[
    str | None,
    typer.Option("--blocks", help="Where depths differ: the dense block that each block of OTHER is, such as 0,1,4."),
]
Seeds = Annotated[str, typer.Option("--seeds", help="Also texts drawn at T = 1, from these seeds, such as 0,1,2.")]
Temperatures = Annotated[str, typer.Option("--temperatures", help="Of the softmax, such as 0.5,1,2.")]


def diagnose(
    dense: Dense,
    other: Other,
    out: Folder,
    prompts: Prompts = None,
    texts: Texts = None,
    task: Probed = None,
    retrieval: Pairs = None,
    blocks: Blocks = None,
    samples: Annotated[int, typer.Option("--samples", help="Prompts or texts used, the first ones.")] = 32,
    steps: Annotated[int, typer.Option("--steps", help="Decoding steps.")] = 48,
    seeds: Seeds = "",
    temperatures: Temperatures = "0.5,1,2",
    batch_size: Annotated[int, typer.Option("--batch-size")] = 16,
    length: Annotated[int, typer.Option("--length", help="Tokens read of each text.")] = 512,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    parquet: Annotated[bool, typer.Option("--parquet", help="Figures of positions as parquet, not JSONL.")] = False,
) -> None:
    """Measure how far two checkpoints are apart: in three spaces, by layer, by step, in choices, as embedders."""
    from recover.commands import diagnose as work

    # The launcher's processes share the work; without one this does nothing.
    dist.start()
    cfg = checked(
        Probe,
        samples=samples,
        steps=steps,
        batch_size=batch_size,
        seeds=_numbers("--seeds", seeds, int),
        temperatures=_numbers("--temperatures", temperatures, float),
    )
    given = [None if path is None else local_path(str(path)) for path in (prompts, texts, retrieval)]
    wanted = work.Wanted(given[0], given[1], task or (), given[2], length)
    first, second = (checked(Model, source=source, dtype=dtype) for source in (dense, other))
    numbers = None if blocks is None else _numbers("--blocks", blocks, int)
    found = work.diagnosis(first, second, wanted, cfg, out, numbers=numbers, parquet=parquet)
    work.say(found)
    console.say(f"wrote {out / 'probe.jsonl'}, {out / 'probe.json'}; recover report {out} makes a page of them")
    dist.stop()


def _numbers(option: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise RecipeError(f"{option}: found {text!r}, expected numbers with commas between them") from None


Text = Annotated[
    str, typer.Argument(metavar="TEXT", help="Rows with messages, prompt and completion, or text: JSONL, parquet, hub.")
]
Rows = Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="The file to write; replaced when it is there.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Default: as the checkpoint is stored.")]


def teacher(
    model: Source,
    text: Text,
    out: Rows,
    top: Annotated[int, typer.Option("--top", min=1, help="Likeliest tokens kept of each position.")] = 64,
    length: Annotated[int, typer.Option("--length", min=8, help="Longest sequence, in tokens.")] = 512,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
    dtype: Dtype = None,
) -> None:
    """Write the likeliest tokens a model gives each position of a text: for distilling where it is not at hand.

    A recipe takes it as train.data=[{kind: teacher, source: OUT.jsonl}]; each row carries the marks of
    the teacher's tokenizer, which must be the pruned model's too. About 16 bytes for each token that is kept.
    """
    refuse_input(out, (text, *inputs.files_of([str(Path(name).absolute()) for name in (text, model)])))
    refuse_other_kind(out, ".jsonl")
    from recover.commands import files

    rows, tokens = files.write_teacher(model, dtype, text, out, top=top, length=length, batch_size=batch_size)
    console.say(f"wrote {out}: {tokens:,} positions of {rows:,} rows ({console.size(out.stat().st_size)})")


Deploy = Annotated[
    Path, typer.Argument(metavar="DEPLOY", help="Folder of a checkpoint, such as checkpoints/quickstart/deploy.")
]
GgufOut = Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write; replaced when it is there.")]
GgufDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="float32, float16, bfloat16, or quantized: q8_0, q5_1, q5_0, q4_1, q4_0; by llama.cpp's own code (extra "
        "'gguf') q6_k, q5_k_m, q4_k_m; else that of the checkpoint.",
        show_default=False,
    ),
]


GgufImportance = Annotated[
    str | None,
    typer.Option(
        "--importance",
        metavar="TEXT",
        help="Round by the importance of input channels (llama.cpp's imatrix, extra 'gguf'): rows with a text on which "
        "the model is measured, or a file that llama-imatrix or stage deploy wrote (imatrix.gguf).",
        show_default=False,
    ),
]


def gguf(deploy: Deploy, out: GgufOut, dtype: GgufDtype = None, importance: GgufImportance = None) -> None:
    """Write an exported checkpoint as one GGUF file: llama.cpp, and what is built on it, runs and quantizes it."""
    from recover.commands import files

    files.gguf(deploy, out, dtype, importance)


COMMANDS = {
    doctor: ("recover doctor",),
    families: ("recover families",),
    init: (
        "recover init ORG/NAME --width 12.5% --for math,code,chat",
        "recover init ORG/NAME --drop 10% --for math",
        "recover init ORG/NAME --params 1.2B --out smaller.yaml",
        "recover init model.gguf --memory 8GB --by depth --for chat",
        "recover init my-folder --sparsity 2:4 --prompts prompts.jsonl --tasks my_task.yaml arc_easy",
    ),
    measure: (
        "recover measure embedded:fable-2m --tasks embedded:stories embedded:facts --limit 50",
        "recover measure ORG/NAME --tasks gsm8k arc_easy --dtype bfloat16 --batch-size 256 --out out.json",
        "recover measure checkpoints/quickstart/deploy --tasks humaneval --allow-code-execution",
        "recover measure ORG/NAME --suite standard --limit 200 --allow-code-execution",
        "recover measure checkpoints/quickstart --tasks gsm8k",
        "recover measure ORG/NAME --lm-eval arc_easy,gsm8k --limit 200",
    ),
    diagnose: (
        "recover diagnose embedded:fable-2m checkpoints/quickstart/deploy --prompts embedded:tasks/prompts.jsonl "
        "--out drift",
        "recover diagnose ORG/NAME name-q4.gguf --prompts prompts.jsonl --task mcq.yaml --dtype bfloat16 --out drift",
        "recover diagnose ORG/NAME ORG/SMALLER --blocks 0,1,2,5,6 --texts texts.jsonl --out drift",
    ),
    teacher: (
        "recover teacher ORG/LARGE text.jsonl teacher.jsonl --top 64 --dtype bfloat16",
        "recover teacher embedded:fable-2m embedded:tasks/calibration.jsonl teacher.jsonl --top 16 --length 128",
    ),
    gguf: (
        "recover gguf checkpoints/quickstart/deploy quickstart.gguf",
        "recover gguf checkpoints/quickstart/deploy quickstart-f16.gguf --dtype float16",
        "recover gguf checkpoints/quickstart/deploy quickstart-q8.gguf --dtype q8_0",
        "recover gguf checkpoints/quickstart/deploy quickstart-q4.gguf --dtype q4_k_m --importance my_text.jsonl",
    ),
}
