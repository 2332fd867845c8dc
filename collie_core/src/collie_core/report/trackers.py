"""What trackers have in common: the package they need, and the names of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from collie_core.errors import RunError


def required(module: str, tracker: str) -> Any:
    """The module that a tracker of the core cannot do without.

    Raises:
        RunError: it does not import; says what to install.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise RunError(
            f"report_to: {tracker} needs a package that is not installed; pip install 'collie-core[{tracker}]', "
            f"or remove it from report_to ({error})"
        ) from error


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by the names that trackers group them by: `train/loss`, `eval/perplexity`, `host/...`.

    Numbers that are missing in this row, and `step`, are left out.
    """
    return {
        name if "/" in name else f"train/{name}": float(value)
        for name, value in values.items()
        if name != "step" and value is not None
    }
