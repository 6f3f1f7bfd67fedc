"""Recording of GPU work as a CUDA graph: launched as one, it no longer waits for Python between its kernels."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Value = TypeVar("Value")


def record(work: Callable[[], Value], pool: Any) -> tuple[torch.cuda.CUDAGraph, Value]:
    """A graph of the kernels that `work` launches, which do not run yet, and what it returned.

    Tensors that `work` makes lie in the memory `pool` (of `torch.cuda.graph_pool_handle`), and hold the values of the
    last replay. The same work must have run once before, at the same shapes: that sets up what a first run sets up.

    Raises:
        RuntimeError: it cannot be recorded, or there is too little memory; the device is usable after it.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # thread_local: a data loader that pins memory in a thread of its own must not spoil the recording.
        with _nothing_collected(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            value = work()
    except RuntimeError:
        torch.cuda.synchronize()
        end_recording_of_draws()
        raise
    return graph, value


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """A graph that anyone left to the collector and that goes during a recording breaks it, and the allocator with it.

    torch only warns ("operation not permitted when stream is capturing"), and the process aborts when it ends.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def end_recording_of_draws() -> None:
    """A recording that failed leaves the random numbers' state as if it still ran, and every draw would be an error."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())
