"""The command line: what it imports, how verbs are found, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_dists import write_many

from collie_core.cli import VERBS, main
from collie_core.hookspecs import KINDS
from collie_core.plugins import Plugins

VERB = '''"""Make 100% coffee.

More about it.
"""
import sys
from collie_core.errors import ConfigError, MISSING, PluginError, Problem
def add_arguments(parser):
    parser.add_argument("how")
    parser.add_argument("--milk")
def run(args):
    print(sys._getframe(1).f_code.co_name, args.how, args.milk)
    if args.how == "config":
        raise ConfigError([Problem("a.b", "is wrong", 3), Problem("c", "is missing", MISSING)])
    if args.how == "plugin":
        raise PluginError("no such plugin")
    if args.how == "interrupt":
        raise KeyboardInterrupt
    if args.how == "bug":
        raise RuntimeError("a bug")
    return 7
'''


@pytest.fixture
def brew(install: Any) -> None:
    """The plugin verb `brew`."""
    install(
        "collie-cafe",
        summary="hot drinks, 100% real",
        groups={"collie.commands": {"brew": "cafe_verb"}},
        files={"cafe_verb.py": VERB},
    )


def _exit_of(*argv: str) -> int | str | None:
    """How argparse ends the program."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    return caught.value.code


# -- help ---------------------------------------------------------------------------------------------------


def test_help_lists_every_verb(brew: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_of() == 0  # a bare `collie`
    bare = capsys.readouterr().out
    assert _exit_of("--help") == 0
    assert capsys.readouterr().out == bare
    for verb, (_, summary) in VERBS.items():
        assert f"    {verb}" in [line[: 4 + len(verb)] for line in bare.splitlines()]
        assert summary in " ".join(bare.split())
    assert "hot drinks, 100% real (collie-cafe)" in bare
    assert "cafe_verb" not in sys.modules


HEAVY = """
import sys
from collie_core.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
loaded = {name.partition(".")[0] for name in sys.modules}
heavy = {"torch", "transformers", "deepspeed", "pydantic", "pluggy", "rich", "yaml", "packaging", "cafe_verb"}
print(code, *sorted(heavy & loaded))
"""


@pytest.mark.parametrize("argv", [[], ["--help"], ["--version"], ["tarin"], ["plugins", "--help"]])
def test_help_imports_the_standard_library_only(brew: None, python: Any, argv: list[str]) -> None:
    code = "2" if argv == ["tarin"] else "0"
    assert python(HEAVY, *argv).stdout.splitlines()[-1] == code


@pytest.mark.parametrize("argv", [["plugins"], ["plugins", "--json"]])
def test_listing_plugins_imports_none_of_them(brew: None, python: Any, argv: list[str]) -> None:
    result = python(HEAVY.replace('"packaging", ', ""), *argv)
    assert result.stdout.splitlines()[-1] == "0"
    assert "brew" in result.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_without_torch(python: Any, verb: str) -> None:
    result = python(HEAVY, verb, "--help")
    assert result.returncode == 0, result.stderr
    assert f"usage: collie {verb}" in result.stdout
    assert not {"torch", "transformers", "deepspeed"} & set(result.stdout.splitlines()[-1].split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_of("--version") == 0
    assert capsys.readouterr().out == "collie 0.1.0\n"


@pytest.mark.parametrize(("argv", "times"), [(["--help"], 3), (["plugins"], 4)])
def test_starting_with_fifty_plugins_is_quick(
    site: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], times: float
) -> None:
    write_many(site, count=50, broken=5, heavy=20)
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # as users run it: with compiled modules
    least = ("-c", "import argparse, importlib.metadata")  # 0.05 s where --help takes 0.12: any program needs as much
    pairs = [(_cpu_seconds("-m", "collie_core.cli", *argv), _cpu_seconds(*least)) for _ in range(5)]
    ours, bare = (min(column) for column in zip(*pairs, strict=True))
    assert ours <= times * bare


def _cpu_seconds(*argv: str) -> float:
    """User and system time of one interpreter, which other programs on the machine do not lengthen."""
    with subprocess.Popen([sys.executable, *argv], stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


# -- finding verbs ------------------------------------------------------------------------------------------


def test_an_unknown_verb_gives_the_nearest(brew: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_of("tarin") == 2
    assert "unknown verb 'tarin'. Did you mean 'train'" in capsys.readouterr().err
    assert _exit_of("brw") == 2
    assert "Did you mean 'brew'" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["plugins", "--js"], ["plugins", "--chek"], ["brew", "black", "--mil", "1"]])
def test_options_are_not_abbreviated(brew: None, capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert _exit_of(*argv) == 2
    error = capsys.readouterr().err
    assert f"unrecognized arguments: {argv[2] if argv[0] == 'brew' else argv[1]}" in error
    assert f"usage: collie {argv[0]}" in error


def test_a_verb_is_called_by_main_itself(brew: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["brew", "black", "--milk", "oat"]) == 7
    assert capsys.readouterr().out == "main black oat\n"  # no frame of ours between `main` and `run`


def test_the_help_of_a_plugin_verb_is_its_docstring(brew: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_of("brew", "--help") == 0
    out = capsys.readouterr().out
    assert "usage: collie brew" in out
    assert "Make 100% coffee." in out
    assert "More about it" not in out


def test_a_built_in_verb_is_not_displaced(brew: None, install: Any, capsys: pytest.CaptureFixture[str]) -> None:
    groups = {"collie.commands": {"train": "rival", "brew": "rival"}}
    install("collie-rival", groups=groups, files={"rival.py": VERB.replace("return 7", "return 8")})
    assert _exit_of("--help") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("collie-rival:train", "collie-rival:brew", "collie-cafe:brew"))
    assert main(["collie-rival:train", "x"]) == 8
    assert main(["collie-cafe:brew", "x"]) == 7
    assert main(["brew", "x"]) == 1
    assert "'brew' is given 2 times" in capsys.readouterr().err


def test_a_broken_plugin_verb(install: Any, capsys: pytest.CaptureFixture[str]) -> None:
    install("collie-bad", groups={"collie.commands": {"bad": "bad_verb"}}, files={"bad_verb.py": "import gone"})
    assert _exit_of("--help") == 0
    assert main(["bad"]) == 1
    assert "collie-bad 1.0: commands 'bad' (bad_verb) does not work" in capsys.readouterr().err


# -- how it ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("config", 2, "a.b = 3: is wrong.\nc: is missing.\n"),
        ("plugin", 1, "no such plugin\n"),
        ("interrupt", 130, "interrupted\n"),
    ],
)
def test_errors_end_without_a_traceback(
    brew: None, capsys: pytest.CaptureFixture[str], how: str, code: int, message: str
) -> None:
    assert main(["brew", how]) == code
    assert capsys.readouterr().err == message


def test_a_traceback_can_be_asked_for(
    brew: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLLIE_TRACEBACK", "1")
    assert main(["brew", "plugin"]) == 1
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert "cafe_verb.py" in error
    monkeypatch.setenv("COLLIE_TRACEBACK", "0")
    main(["brew", "plugin"])
    assert capsys.readouterr().err == "no such plugin\n"


def test_a_bug_keeps_its_traceback(brew: None) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        main(["brew", "bug"])


def test_a_closed_pipe_is_no_error(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    code = "def add_arguments(parser): ...\ndef run(args):\n  print(input())\n  return 0\n"
    install("collie-echo", groups={"collie.commands": {"echo": "echo_verb"}}, files={"echo_verb.py": code})
    command = [sys.executable, "-m", "collie_core.cli", "echo"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write("a few words, less than a buffer\n")
        process.stdin.flush()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 141


def test_a_terminal_without_unicode(install: Any, python: Any) -> None:
    install("collie-bad", groups={"collie.metric": {"bad": "gone:BAD"}})
    result = python(HEAVY, "plugins", "--check", PYTHONIOENCODING="ascii")
    assert "\\u2717 broken" in result.stdout, result.stderr


# -- collie plugins -----------------------------------------------------------------------------------------

PACK = """
from typing import Literal
from collie_core.api import Component, ComponentConfig
from pydantic import Field
class Config(ComponentConfig):
    type: Literal["meteor"] = "meteor"
    order: int = Field(4, description="Longest n-gram.")
    reference: str = Field(description="File of references.")
    names: list[str] = Field(default_factory=list)
METEOR = Component("meteor_pack:Meteor", "meteor_pack:Config", summary="n-gram overlap", hint="pip install meteor")
"""
METEOR = """
class Meteor:
    def __init__(self, order, reference, names): ...
    def update(self, prediction, target): ...
    def merge(self, other): ...
    def compute(self): return {}
"""


@pytest.fixture
def meteor(install: Any) -> None:
    """A metric that works and one that does not."""
    groups = {"collie.metric": {"meteor": "meteor_pack:METEOR", "nist": "no_nist:NIST"}}
    install("collie-words", summary="metrics of words", groups=groups, files={"meteor_pack.py": PACK + METEOR})


def _json(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    main(argv)
    return json.loads(capsys.readouterr().out)


def test_the_table(meteor: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["KIND", "NAME", "DISTRIBUTION", "VERSION", "SUMMARY"]
    rows = [line.split(maxsplit=4) for line in lines]
    assert ["metric", "meteor", "collie-words", "1.0", "metrics of words"] in rows
    assert ["metric", "nist", "collie-words", "1.0", "metrics of words"] in rows  # broken, and nobody asked
    assert len({line.index(cells[2]) for line, cells in zip(lines, rows, strict=True)}) == 1


def test_the_table_shows_states(
    meteor: None, install: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("collie-new", groups={"collie.metric": {"new": "n:N"}}, requires=["collie-core>=9"])
    install("collie-other", groups={"collie.metric": {"adamw": "o:O", "perplexity": "o:P"}})
    monkeypatch.setenv("COLLIE_BLOCK", "collie-words")
    states = {(row["distribution"], row["name"]): row["state"] for row in _json(capsys, "plugins", "--json")}
    assert states["collie-words", "meteor"] == "blocked"
    assert states["collie-new", "new"] == "it needs collie-core >=9, and this is collie-core 0.1.0"
    assert states["collie-other", "perplexity"] == "ambiguous: write collie-other:perplexity"
    assert states["collie-core", "perplexity"] == "ambiguous: write collie-core:perplexity"
    assert states["collie-other", "adamw"] == ""  # another kind
    main(["plugins"])
    assert "[blocked]" in capsys.readouterr().out


def test_show(meteor: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "show", "meteor"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in (
        "metric meteor: n-gram overlap",
        "from collie-words 1.0",
        "entry point meteor_pack:METEOR",
        "build meteor_pack:Meteor",
        "hint pip install meteor",
        "reads token_losses",
        "higher_is_better None",
        "order = 4 Longest n-gram.",
        "reference required File of references.",
        "names = ...",
    ):
        assert words in out


def test_everything_in_the_core_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    registry = Plugins.discover()
    for kind in KINDS:
        for name in registry.names(kind):
            if registry.find(kind, name).distribution == "collie-core":
                assert main(["plugins", "show", name, "--kind", kind]) == 0, name
    out = capsys.readouterr().out
    assert "factored_state" in out
    assert "lr  " in out


@pytest.mark.parametrize("argv", [["plugins", "show", "meteor", "--json"], ["plugins", "--json", "show", "meteor"]])
def test_show_json(meteor: None, capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    facts = _json(capsys, *argv)
    assert facts["capabilities"] == {"reads": "token_losses", "higher_is_better": None}
    assert (facts["kind"], facts["distribution"], facts["version"]) == ("metric", "collie-words", "1.0")
    assert facts["fields"]["order"]["default"] == 4
    assert [name for name, field in facts["fields"].items() if field["required"]] == ["reference"]


def test_show_needs_the_kind_only_where_it_must(install: Any, meteor: None, capsys: Any) -> None:
    install("collie-server", groups={"collie.commands": {"meteor": "x"}})
    assert main(["plugins", "show", "meteor"]) == 1
    assert "add --kind commands|metric" in capsys.readouterr().err
    assert main(["plugins", "show", "meteor", "--kind", "metric"]) == 0
    assert main(["plugins", "show", "metoer"]) == 1
    assert "no plugin is called 'metoer'. Did you mean 'meteor'" in capsys.readouterr().err


def test_show_of_a_broken_plugin(meteor: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "show", "nist"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert main(["plugins", "show", "nist", "--trace"]) == 1
    traced = capsys.readouterr().err
    assert "Traceback (most recent call last)" in traced
    assert error.strip() in traced


def test_trace_reaches_the_build_target(install: Any, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"meteor_pack.py": PACK, "no_nist.py": ""}
    install("collie-words", groups={"collie.metric": {"meteor": "meteor_pack:METEOR"}}, files=files)
    assert main(["plugins", "show", "meteor"]) == 0
    assert main(["plugins", "show", "meteor", "--trace"]) == 1
    assert "module 'meteor_pack' has no attribute 'Meteor'" in capsys.readouterr().err


def test_check(meteor: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["plugins", "--check"]) == 1
    out = capsys.readouterr().out
    rows = {tuple(line.split()[:2]): line for line in out.splitlines() if line[:1] != " "}
    assert rows["metric", "meteor"].endswith(" ok")
    assert rows["metric", "nist"].endswith("✗ broken")
    assert "No module named 'no_nist'" in out
    verdicts = {row["name"]: row for row in _json(capsys, "plugins", "--check", "--json")}
    assert (verdicts["meteor"]["ok"], verdicts["nist"]["ok"]) == (True, False)
    assert "COLLIE_BLOCK=collie-words" in verdicts["nist"]["error"]


def test_check_passes_what_is_blocked(
    meteor: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLLIE_BLOCK", "collie-words")
    rows = _json(capsys, "plugins", "--check", "--json")
    assert {row["state"] for row in rows if row["distribution"] == "collie-words"} == {"blocked"}
    assert "no_nist" not in sys.modules


def test_everything_shipped_passes_the_check(python: Any) -> None:
    result = python(HEAVY, "plugins", "--check")
    assert result.stdout.splitlines()[-1].startswith("0 "), result.stdout


def test_a_verb_of_a_pack_that_is_missing_names_the_pack(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    core = [entry for entry in Plugins.discover().entries if entry.distribution == "collie-core"]
    monkeypatch.setattr("collie_core.cli._discover", lambda: Plugins(core))
    assert main(["serve", "model"]) == 1
    assert "'serve' is in collie-server, which is not installed: pip install collie-server" in capsys.readouterr().err
