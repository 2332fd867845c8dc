"""A server that takes its requests from a file, as a terminal is one: a line is a prompt, the answer is printed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Literal

from collie_core.api import Component, Served, ServerConfig


class TerminalConfig(ServerConfig):
    type: Literal["terminal"] = "terminal"
    path: str = "/dev/stdin"
    max_tokens: int = 40


class Terminal:
    def __init__(self, path: str, max_tokens: int) -> None:
        self.path = path
        self.max_tokens = max_tokens
        self.stopped = False

    def serve(self, served: Served, ready: Callable[[str], None]) -> None:
        with open(self.path) as lines:
            ready(self.path)
            for line in lines:
                if self.stopped:
                    break
                for piece in served.model.answer(line.rstrip(), max_tokens=self.max_tokens):
                    sys.stdout.write(piece)
                print(f" [step {served.model.step}]", flush=True)

    def stop(self) -> None:
        self.stopped = True


TERMINAL = Component(build="collie_terminal:Terminal", config="collie_terminal:TerminalConfig")
