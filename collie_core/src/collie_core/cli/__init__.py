"""The command line: `collie VERB ...`.

A verb is one module with `add_arguments(parser)` and `run(args) -> exit code`, imported only when it is asked
for. Plugins add verbs through the entry-point group `collie.commands`, whose values are such modules.

Exit codes: 0 done, 1 an error of the run, 2 a mistake in the configuration or on the command line, 130
interrupted. An error written for users is shown without a traceback; COLLIE_TRACEBACK=1 shows it too.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from collie_core import __version__
from collie_core.errors import CollieError

if TYPE_CHECKING:
    from collie_core.plugins import Plugins

VERBS = {
    "init": ("collie_core.cli.init", "write a commented configuration to start from"),
    "validate": ("collie_core.cli.validate", "check a configuration without running it"),
    "schema": ("collie_core.cli.schema", "print the JSON Schema of the configuration, plugins included"),
    "plan": ("collie_core.cli.plan", "say how much memory a run will need, without running it"),
    "profile": ("collie_core.cli.profile", "say where the time of a training step goes, from a few steps"),
    "train": ("collie_core.cli.train", "train as a configuration says"),
    "compare": ("collie_core.cli.compare", "train with several optimizers and adapters, and report them side by side"),
    "eval": ("collie_core.cli.eval", "evaluate a model as a configuration says"),
    "generate": ("collie_core.cli.generate", "complete a prompt with a model"),
    "merge": ("collie_core.cli.merge", "make one model of an adapter and its base model"),
    "checkpoint": ("collie_core.cli.checkpoint", "list, verify and delete the checkpoints of a run"),
    "verify": ("collie_core.cli.verify", "check that a run trains on one topology as on another"),
    "doctor": ("collie_core.cli.doctor", "check that this machine is fit to train, by a short run too"),
    "plugins": ("collie_core.cli.plugins", "list, explain and check the installed plugins"),
}

Run = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; argparse itself exits for --help and wrong arguments."""
    _never_fail_to_print()
    try:
        run, args = _parse(list(sys.argv[1:] if argv is None else argv))
        code = run(args)
        sys.stdout.flush()  # here and not at exit, so that a closed pipe is met inside this `try`
    except CollieError as error:
        return _report(error)
    except BrokenPipeError:
        return _end_of_pipe()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return code


def _parse(argv: list[str]) -> tuple[Run, argparse.Namespace]:
    verb = argv[0] if argv else "--help"
    if verb.startswith("-"):
        _overview().parse_args([verb])  # exits, whatever it is
    summary, module = _module_of(verb)
    parser = argparse.ArgumentParser(prog=f"collie {verb}", description=summary, allow_abbrev=False)
    module.add_arguments(parser)
    return module.run, parser.parse_args(argv[1:])


def _overview() -> argparse.ArgumentParser:
    """All verbs with one line each. Those of plugins come from metadata: nothing of them is imported."""
    parser = argparse.ArgumentParser(
        prog="collie",
        usage="collie [-h] [--version] VERB ...",
        description="Train large language models together with other people's parts.",
        epilog="collie VERB --help explains a verb.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"collie {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", title="verbs", required=True)
    for name, (_, summary) in VERBS.items():
        verbs.add_parser(name, help=summary)
    for name, summary in _plugin_verbs(_discover()).items():
        verbs.add_parser(name, help=_literal(summary))
    return parser


def _module_of(verb: str) -> tuple[str, ModuleType]:
    """Summary and module of a verb; exits with the nearest names when nobody has it."""
    if verb in VERBS:
        module, summary = VERBS[verb]
        return summary, import_module(module)
    from collie_core.plugins import CATALOGUE, near, normalise

    plugins = _discover()
    known_elsewhere = ("commands", verb) in CATALOGUE  # then `command` says what to install
    if ":" not in verb and normalise(verb) not in plugins.names("commands") and not known_elsewhere:
        known = [*VERBS, *_plugin_verbs(plugins)]
        _overview().error(f"unknown verb {verb!r}.{near(verb, known)} The verbs are {', '.join(known)}.")
    command: ModuleType = plugins.command(verb)
    return (command.__doc__ or "").strip().partition("\n")[0], command


def _plugin_verbs(plugins: Plugins) -> dict[str, str]:
    """The shortest unambiguous name of each plugin's verb, and where it comes from."""
    verbs = {}
    for entry in plugins.entries:
        if entry.kind == "commands":
            taken = entry.name in VERBS or plugins.is_ambiguous(entry)
            verbs[entry.qualified if taken else entry.name] = f"{entry.summary} ({entry.distribution})".strip()
    return verbs


def _discover() -> Plugins:
    from collie_core.plugins import Plugins

    return Plugins.discover()


def _literal(text: str) -> str:
    return text.replace("%", "%%")  # argparse formats help texts with %


def _never_fail_to_print() -> None:
    """A terminal that cannot show a character gets its escape, not a UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _report(error: CollieError) -> int:
    if os.environ.get("COLLIE_TRACEBACK", "0") not in ("", "0"):
        import traceback

        traceback.print_exception(error)
    else:
        print(error, file=sys.stderr)
    return error.exit_code


def _end_of_pipe() -> int:
    """The reader, for instance `head`, has closed our output: keep the interpreter from flushing it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141  # as a program that dies of SIGPIPE
