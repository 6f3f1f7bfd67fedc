"""Fixtures shared by all tests: nothing reaches a hub, one thread, a tiny Llama."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import socket
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tiny import LIKE_OTHERS, tiny

from recover.text import rows

torch.set_num_threads(1)
gc.disable()  # thousands of tests are collected, and nothing of them can go: looking for it takes a third of that time

# No test takes the power away: what the kernel was given is there. Waiting for the disk was a tenth of the time.
os.fsync = lambda _descriptor: None

# Some thirty tests start processes, each of which would compile the package again, and each run all tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A shell ignores SIGINT for what it puts into the background, and nohup SIGHUP; runs started here would inherit it.
for _name, _default in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, _name), _default)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Short names for whole files among parameters, whose bytes may differ between workers (a time in them)."""
    if isinstance(val, bytes):
        return f"{len(val)} bytes"
    return f"{val[:40]}..." if isinstance(val, str) and len(val) > 80 else None


@pytest.hookimpl(tryfirst=True)  # before tests are left out by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Families that are like another one are tested with the slow tests."""
    for item in items:
        given = getattr(item, "callspec", None)
        if given and any(isinstance(value, str) and value in LIKE_OTHERS for value in given.params.values()):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """From here on garbage is looked for, and not among what the tests are made of."""
    gc.enable()
    gc.collect()
    gc.freeze()


# Read for `functions:python`: to parse all of Python's library takes each worker four seconds.
LIBRARY = ("bisect", "calendar", "heapq", "shutil", "statistics", "textwrap", "turtle")


@pytest.fixture(scope="session", autouse=True)
def small_library(tmp_path_factory: pytest.TempPathFactory):
    """A few modules in the place of Python's library; `test_named.py` reads it whole."""
    folder = tmp_path_factory.mktemp("library")
    for name in LIBRARY:
        shutil.copy(rows.library() / f"{name}.py", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "library", lambda: folder)
        yield


@pytest.fixture
def tiny_llama():
    """A LlamaForCausalLM: float32, eval, 6 blocks, width 64, 4 heads / 2 kv, vocabulary 256."""
    return tiny("llama")


@pytest.fixture
def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
