"""`collie train run.yaml`: fine-tune or pre-train."""

from __future__ import annotations

import argparse

from collie_core.cli._config import add_config_arguments, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config file and its overrides."""
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train as the file says; the config is checked before torch is imported."""
    config = load_config(args, complete=True)
    from collie_core.cli._quiet import quiet_libraries
    from collie_core.loop import Trainer

    quiet_libraries()
    Trainer(config).train()
    return 0
