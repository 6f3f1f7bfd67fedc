"""The command line. It calls the stages or the report and says errors in one line; it never imports torch itself."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Annotated, ParamSpec, TypeVar

import typer

from recover import __version__
from recover.base import console, dist
from recover.base.errors import RecoverError
from recover.base.safe_path import leave_working_folder
from recover.base.threads import wait_asleep
from recover.commands import gguf as commands_gguf
from recover.commands import measure as commands_measure
from recover.commands import probe as commands_probe
from recover.commands import report as commands_report
from recover.commands import run as commands_run
from recover.commands import teacher as commands_teacher

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

INTERRUPTED = 130  # 128 + SIGINT, as shells say it

app = typer.Typer(
    help="Prune a language model and get its generation back.",
    epilog="[bold]Examples[/bold]\n\n"
    "  recover run recipes/quickstart.yaml            all of it, in minutes on a CPU\n\n"
    "  recover plan recipes/quickstart.yaml           what it will cost, before any weight is loaded\n\n"
    "  recover show checkpoints/quickstart            which stages are done, and what came out\n\n"
    "  recover measure ORG/NAME --tasks my_task.yaml  any checkpoint, no recipe\n\n"
    "  accelerate launch --config_file launch/gpu.yaml -m recover run recipes/quickstart.yaml",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # plain tracebacks: they are for reports and logs
)


LESS_MEMORY = (
    "Less is taken in training by recover.micro_batch_size, recover.gradient_checkpointing and recover.loss.chunk, in "
    "measuring by measure.batch_size and probe.batch_size, in pruning by prune.calibration.batch_size; `recover plan` "
    "says how much. Stages that are done are kept"
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


COMMANDS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    **{command.__name__: (command, lines) for command, lines in commands_run.COMMANDS.items()},
    **{command.__name__: (command, lines) for command, lines in commands_report.COMMANDS.items()},
    "measure": (commands_measure.measure, commands_measure.EXAMPLES),
    "diagnose": (commands_probe.probe_pair, commands_probe.EXAMPLES),
    "teacher": (commands_teacher.teacher, commands_teacher.EXAMPLES),
    "gguf": (commands_gguf.gguf, commands_gguf.EXAMPLES),
}
for name, (command, lines) in COMMANDS.items():
    app.command(name, epilog=examples(*lines))(says_errors(command))


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python does, but for what a terminal would obey: a message may quote a file of others."""
    sys.stderr.write(console.visible("".join(traceback.format_exception(kind, error, trace))))


def main() -> None:
    """Entry point of `recover` and of `python -m recover`."""
    leave_working_folder()
    wait_asleep()
    sys.excepthook = _print_traceback
    try:
        app(prog_name="recover")
    except SystemExit as ended:
        if not isinstance(ended.code, int | None):
            raise  # a sentence, for Python to print
        dist.leave(ended.code or os.EX_OK)
