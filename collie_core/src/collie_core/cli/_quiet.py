"""What a command-line process switches off in the libraries it runs, which would talk into its display."""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from logging import ERROR, getLogger


def quiet_libraries() -> None:
    """No progress bars of transformers and datasets, no announcements of DeepSpeed, no deprecations not ours."""
    import torch

    quiet_imports()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares its search for one, and the warning about it


def quiet_imports() -> None:
    """As much of it as can be had without looking for a device, which a process that is to be forked must not do."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read by its import, which takes a second
    if "datasets" in sys.modules:
        import_module("datasets.utils.logging").disable_progress_bar()
    getLogger("bitsandbytes").setLevel(ERROR)  # it misses an optional kernel when peft imports it, used or not
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch\.distributed|transformers|peft)\b")
