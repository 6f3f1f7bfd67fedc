"""Libraries speak in our words: bars and notices that a user can do nothing about are kept off the screen."""

from __future__ import annotations

import os
import warnings
from logging import LogRecord, getLogger

from recover.base.console import visible

LOGGING = ("", "transformers", "huggingface_hub", "datasets", "accelerate", "peft")


def _shown(record: LogRecord) -> bool:
    """Let the record pass, as text without control characters."""
    record.msg, record.args = visible(record.getMessage()), None
    return True


def quiet_libraries() -> None:
    """Silence load bars, deprecations inside transformers, and DeepSpeed's notice that a machine has no GPU.

    What the libraries still say may quote a file of others: control characters in it are shown, as in our own lines.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|torch\.distributed)\.")
    for name in LOGGING:
        for handler in getLogger(name).handlers:
            if _shown not in handler.filters:
                handler.addFilter(_shown)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
