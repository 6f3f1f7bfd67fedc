"""How the threads of a product wait for each other on a CPU: asleep, unless the user says otherwise.

OpenMP's threads wait by counting, for a while or for good. Where other programs use the cores too, a thread that counts
keeps the core from the very thread that it waits for: two threads then do a tenth of what one does. Asleep they take
what the others leave. The number of threads, on which the last bits of a sum depend, stays torch's own.
"""

from __future__ import annotations

import os
import sys
from typing import Any

WAIT, ASLEEP = "OMP_WAIT_POLICY", "PASSIVE"
# Each tells an OpenMP library how long to count before it sleeps: the standard's name, GNU's, and LLVM's and Intel's.
WAITING = (WAIT, "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
NUMBERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def wait_asleep() -> None:
    """Have threads wait asleep, here and in processes started later, if the environment says nothing about it.

    OpenMP reads the environment once, when it is loaded: to be called before torch is imported.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ[WAIT] = ASLEEP


def described() -> dict[str, Any]:
    """For the record of a run: torch's threads (None: torch is not loaded), and what the environment says of them."""
    torch = sys.modules.get("torch")
    said = {name: os.environ[name] for name in (*NUMBERS, *WAITING) if name in os.environ}
    return {"number": None if torch is None else torch.get_num_threads(), **said}
