"""The command line. A command's module is imported when that command is called: the list of commands costs nothing."""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Annotated, Any, NamedTuple, ParamSpec, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from recover import __version__
from recover.base import console, dist
from recover.base.errors import RecoverError
from recover.base.process import wait_asleep
from recover.base.safe_path import leave_working_folder

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

INTERRUPTED = 130  # 128 + SIGINT, as shells say it


class Listed(NamedTuple):
    """A command by the module of `recover.commands` that has it, with what the list of commands says of it."""

    module: str
    says: str


# In the order of the list; `says` is how the function's docstring begins. The functions are in each module's COMMANDS.
COMMANDS = {
    "quickstart": Listed(
        "run", "Do the whole job on the small model that ships with the package: CPU, offline, minutes."
    ),
    "doctor": Listed(
        "options",
        "Say what this machine can run: versions, GPU, memory, disk, hub, data that goes by a name, sizes of models.",
    ),
    "init": Listed(
        "options",
        "Write a recipe for any model: what goes, what text, which tasks, sized to this machine; each line says why.",
    ),
    "run": Listed("run", "Do all stages of a recipe: plan, dense, prune, before, train, after, export, report."),
    "plan": Listed("run", "Check a recipe and say what it will cost: sizes, memory, and time on this machine."),
    "prune": Listed("run", "Run up to pruning: which blocks or weights go, and the scores behind it."),
    "probe": Listed(
        "run", "Run up to the diagnosis of the pruned model: drift in three spaces, tasks, where texts diverge."
    ),
    "train": Listed(
        "run", "Run up to recovery: LoRA distillation from the dense model, generation measured after each epoch."
    ),
    "export": Listed("run", "Run up to the exported checkpoint, verified in a fresh process; stock tools load it."),
    "report": Listed(
        "run",
        "Write the report of each run again, finished or not, and a comparison of several; of a diagnosis, its page.",
    ),
    "show": Listed(
        "run",
        "Say which stages of a run are done, why one would be done again, the best epoch, and the headline figures.",
    ),
    "list": Listed(
        "run",
        "List the runs of a folder, the newest first: what is done, and generation of dense, pruned and recovered.",
    ),
    "compare": Listed(
        "run",
        "Put runs side by side, best recovered generation first; tasks as a share of what the dense model reaches.",
    ),
    "measure": Listed(
        "options",
        "Measure any checkpoint: what it writes, chooses, retrieves, expects; the same items and prompts for each.",
    ),
    "diagnose": Listed(
        "options",
        "Measure how far two checkpoints are apart: in three spaces, by layer, by step, in choices, as embedders.",
    ),
    "teacher": Listed(
        "options",
        "Write the likeliest tokens a model gives each position of a text: for distilling where it is not at hand.",
    ),
    "gguf": Listed(
        "options",
        "Write an exported checkpoint as one GGUF file: llama.cpp, and what is built on it, runs and quantizes it.",
    ),
    "families": Listed(
        "options", "Say which model families are supported, by which methods, and for the others why they are not."
    ),
}

LESS_MEMORY = (
    "Less is taken in training by train.micro_batch_size, train.gradient_checkpointing and train.loss.chunk, in "
    "measuring by measure.batch_size and probe.batch_size, in pruning by prune.calibration.batch_size; `recover plan` "
    "says how much. Stages that are done are kept"
)
WHOLE = "Fetch the model again; if its files are whole, its tokenizer cannot be used for this text"


class Lazy(TyperGroup):
    """The commands, by name; a module is imported for the one that is called, or whose help is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | None:
        """What the list shows of a command."""
        if cmd_name not in COMMANDS:
            return None
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name].says, rich_markup_mode="rich")

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command itself."""
        name, found, rest = super().resolve_command(ctx, args)
        return name, None if found is None or name is None else command(name), rest


def command(name: str) -> Any:
    """The command of this name, from its module, with its examples at the end of its help page."""
    module: Any = says_errors(importlib.import_module)(f"recover.commands.{COMMANDS[name].module}")
    function, lines = next(each for each in module.COMMANDS.items() if each[0].__name__.rstrip("_") == name)
    lone = typer.Typer(rich_markup_mode="rich", add_completion=False, pretty_exceptions_enable=False)
    lone.command(name, epilog=examples(*lines))(says_errors(function))
    return typer.main.get_command(lone)


app = typer.Typer(
    cls=Lazy,
    help="Prune a language model and get its generation back.",
    epilog="[bold]Examples[/bold]\n\n"
    "  recover quickstart                             all of it on a small model, in minutes on a CPU\n\n"
    "  recover init ORG/NAME --drop 10% --for math    a recipe for any model, sized to this machine\n\n"
    "  recover plan my.yaml                           what it will cost: sizes, memory, time of each stage\n\n"
    "  recover show checkpoints/quickstart            which stages are done, and what came out\n\n"
    "  recover measure ORG/NAME --tasks my_task.yaml  any checkpoint, no recipe\n\n"
    "  accelerate launch --config_file launch/gpu.yaml -m recover run my.yaml",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # plain tracebacks: they are for reports and logs
)


def examples(*lines: str) -> str:
    """The end of a help page; a blank line keeps rich from joining two commands."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  {line}" for line in lines)])


def says_errors(command: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A user's error is one line on stderr and its exit code; anything else keeps its traceback."""

    @functools.wraps(command)
    def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return command(*args, **kwargs)
        except RecoverError as error:
            console.error(str(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for that
                raise
            _print_traceback(type(error), error, error.__traceback__)
            console.error(f"out of GPU memory: {str(error).partition('. ')[0]}. {LESS_MEMORY}")
            raise typer.Exit(1) from None
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of a library in Rust: no Exception to Python
                raise
            console.error(f"a library stopped at what it was given, most likely the tokenizer's: {error}. {WHOLE}")
            raise typer.Exit(1) from None

    return guarded


def _version(wanted: bool) -> None:
    if wanted:
        console.say(f"recover {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """Typer asks for the options before the command here."""


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python does, but for what a terminal would obey: a message may quote a file of others."""
    sys.stderr.write(console.visible("".join(traceback.format_exception(kind, error, trace))))


def _refuse_surroundings() -> None:
    """Raise RecoverError where Python or its libraries would give up in other words.

    SystemExit for the numbers of a launcher: where they are wrong, each process takes itself for one that says nothing.
    """
    numbers = {name: os.environ[name] for name in dist.NUMBERS if os.environ.get(name)}
    whole = all(re.fullmatch(r"-?\d{1,6}", text) for text in numbers.values())
    if not whole or not int(numbers.get("RANK", 0)) < max(0, int(numbers.get("WORLD_SIZE", 1))):
        said = ", ".join(f"{name}={console.visible(text)}" for name, text in numbers.items())
        raise SystemExit(f"error: {said}: no numbers that a launcher gives; unset them, or launch (accelerate launch)")
    try:
        os.getcwd()
    except OSError:
        raise RecoverError("the working folder is gone, or may not be read; change to another one") from None
    for word in sys.argv[1:]:
        try:
            os.fsencode(word).decode()
        except UnicodeDecodeError:
            raise RecoverError(
                f"{word!r}: holds bytes that are no UTF-8, and no model is read or written at such a path; rename it"
            ) from None


def main() -> None:
    """Entry point of `recover` and of `python -m recover`."""
    leave_working_folder()
    wait_asleep()
    sys.excepthook = _print_traceback
    try:
        _refuse_surroundings()
        app(prog_name="recover")
    except RecoverError as error:
        console.error(str(error))
        dist.leave(error.exit_code)
    except SystemExit as ended:
        if not isinstance(ended.code, int | None):
            raise  # a sentence, for Python to print
        dist.leave(ended.code or os.EX_OK)
