"""How the threads of a product wait for each other on a CPU: asleep, unless the user says otherwise.

OpenMP's threads wait by counting, for a while or for good. Where other programs use the cores too, a thread that counts
keeps the core from the very thread that it waits for: two threads then do a tenth of what one does. Asleep they take
what the others leave. On busy cores, and for small models, one thread may still be faster than several: that is timed.
The last bits of a sum depend on the number of threads, so a run keeps the one that it began with.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

from recover.base import console

WAIT, ASLEEP = "OMP_WAIT_POLICY", "PASSIVE"
# Each tells an OpenMP library how long to count before it sleeps: the standard's name, GNU's, and LLVM's and Intel's.
WAITING = (WAIT, "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
ROWS = 128  # texts that are written at once
TURNS, SECONDS = 3, 1.0
CLEARLY = 1.2  # times faster: less is left to torch, so that the same machine gives the same bits
NUMBERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def wait_asleep() -> None:
    """Have threads wait asleep, here and in processes started later, if the environment says nothing about it.

    OpenMP reads the environment once, when it is loaded: to be called before torch is imported.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ[WAIT] = ASLEEP


def chosen(width: int, inner: int, before: int | None = None) -> None:
    """Set torch's number of threads on the CPU, and say which: `before`, or else the fastest of a second's timing.

    Timed are products of a block's sizes (`width`, `inner`). Another number than torch's own is taken where it is
    `CLEARLY` faster. What the environment says stays, and so does torch's number where a launcher started several
    processes, or a GPU does the work.
    """
    import torch

    own = torch.get_num_threads()
    given = any(os.environ.get(name) for name in NUMBERS)
    if given or own == 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1 or torch.cuda.is_available():
        return
    if before is not None:
        torch.set_num_threads(min(before, own))
        return
    rates = rates_of([1, *(2**power for power in range(1, own.bit_length()) if 2**power < own), own], width, inner)
    number = fastest(rates, own)
    torch.set_num_threads(number)
    shown = ", ".join(f"{each}: {rate / max(rates.values()):.0%}" for each, rate in rates.items())
    console.say(f"[dim]{number} of {own} threads of torch (speed by threads, {shown}; OMP_NUM_THREADS sets it)[/dim]")


def fastest(rates: dict[int, float], own: int) -> int:
    """The number of threads with the highest rate, or torch's `own` where that is about as good."""
    best = max(rates, key=lambda number: rates[number])
    return best if rates[best] > CLEARLY * rates[own] else own


def rates_of(numbers: list[int], width: int, inner: int) -> dict[int, float]:
    """Products a second with so many threads each: by turns, so that what else runs is the same for all; the median."""
    import torch

    x, up, down = torch.randn(ROWS, width), torch.randn(width, inner), torch.randn(inner, width)

    def once() -> None:
        torch.mm(torch.nn.functional.silu(torch.mm(x, up)), down)

    found: dict[int, list[float]] = {number: [] for number in numbers}
    for _ in range(TURNS):
        for number in numbers:
            torch.set_num_threads(number)
            once()  # brings up the threads
            began, done = time.perf_counter(), 0
            while (took := time.perf_counter() - began) < SECONDS / TURNS / len(numbers) or not done:
                once()
                done += 1
            found[number].append(done / took if took else float(done))
    return {number: statistics.median(rates) for number, rates in found.items()}


def described() -> dict[str, str | int | None]:
    """For the record of a run: torch's threads (None: torch is not loaded), and what the environment says of them."""
    torch = sys.modules.get("torch")
    said = {name: os.environ[name] for name in (*NUMBERS, *WAITING) if name in os.environ}
    return {"number": None if torch is None else torch.get_num_threads(), **said}
