"""Every error a user can cause, each with the exit code of the command line.

A message says where, what was found, what was expected, what to do. Invariants of our own raise
AssertionError by hand: `python -O` skips an `assert`, which is left to tell types.
"""

LONGEST = 2000  # characters of a line of a message: what was found may be a file


class RecoverError(Exception):
    """Something the user can mend; printed without a traceback. Lines that are far too long are cut in their middle."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__("\n".join(map(_shortened, str(message).split("\n"))))


def _shortened(line: str) -> str:
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"


class RecipeError(RecoverError, ValueError):
    """The recipe, or an override on the command line, asks for what cannot work."""

    exit_code = 2


class ModelError(RecoverError, ValueError):
    """The model or its tokenizer cannot be loaded, or is of a kind that is not supported."""


class DataError(RecoverError, ValueError):
    """A data source is missing, empty, or holds a row of the wrong shape."""


class PruneError(RecoverError, ValueError):
    """Pruning cannot do what the recipe asks on this model."""


class TrainingError(RecoverError, RuntimeError):
    """Recovery stopped: a non-finite loss, or processes that disagree."""


class ExportError(RecoverError, RuntimeError):
    """The exported checkpoint is not what was trained."""


class ArtifactError(RecoverError, RuntimeError):
    """A file of the run directory is missing, corrupt, or was written by something else."""


class StopRequested(RecoverError):
    """SIGTERM, SIGINT or the like arrived; what was done stays done."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}; what was done is kept, the same command goes on")
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple[type, tuple[int]]:
        # Exceptions are rebuilt from their message; this one travels between processes and is made from a number.
        return type(self), (self.signal_number,)
