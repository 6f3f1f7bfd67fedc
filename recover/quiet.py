"""Libraries speak in our words: bars and notices that a user can do nothing about are kept off the screen."""

from __future__ import annotations

import os
import warnings


def quiet_libraries() -> None:
    """Silence load bars, deprecations inside transformers, and DeepSpeed's notice that a machine has no GPU."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|torch\.distributed)\.")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
