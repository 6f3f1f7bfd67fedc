"""Nothing is imported from the working folder: it may be a downloaded one, with an argparse.py or a torch.py in it.

This module is the first that `python -m recover` imports, and itself imports only what Python has loaded already.
"""

from __future__ import annotations

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def leave_working_folder() -> None:
    """Take the working folder that `python -m` puts first off the import path, here and in all processes started later.

    A folder that PYTHONPATH names stays. One that an empty entry of it stands for does not, nor one that accelerate
    added: with DeepSpeed, `accelerate launch` puts the working folder last in PYTHONPATH. Where this package was itself
    imported from the working folder, as in a checkout that is not installed, that is searched last.
    """
    os.environ["PYTHONSAFEPATH"] = "1"  # read by every Python that is started with this environment
    try:
        here = os.getcwd()
    except OSError:  # deleted meanwhile
        here = ""
    if sys.path and not sys.flags.safe_path and sys.path[0] in ("", here):
        del sys.path[0]
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if named[-1] == here and any(name.startswith("ACCELERATE_") for name in os.environ):
        named[-1] = ""
        os.environ["PYTHONPATH"] = os.pathsep.join(entry for entry in named if entry)
    by_mistake = "" in named and here not in [os.path.abspath(entry) for entry in named if entry]
    sys.path[:] = [entry for entry in sys.path if entry and not (by_mistake and entry == here and not _installed(here))]
    if ROOT not in sys.path:
        sys.path.append(ROOT)


def _installed(folder: str) -> bool:
    """Whether this is a folder of Python's own or of its packages, which it searches wherever it is started."""
    return folder == os.path.dirname(os.__file__) or os.path.basename(folder) in ("site-packages", "dist-packages")


def child_environment() -> dict[str, str]:
    """The environment of a Python process that is to find this package, and nothing in the working folder."""
    named = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(entry)]
    # Never first of all if it is a folder of installed packages: they would come before the standard library.
    ours = [] if ROOT in named or _installed(ROOT) else [ROOT]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*ours, *named]), "PYTHONSAFEPATH": "1"}
