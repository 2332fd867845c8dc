"""What a person sees, in a terminal and in a log file."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_runs import make_run, play, row, save_model, tell
from rich.console import Console

from collie_core.generate import SampleText
from collie_core.report.console import ConsoleReporter


def plain() -> tuple[ConsoleReporter, io.StringIO]:
    out = io.StringIO()
    return ConsoleReporter(Console(file=out, width=60)), out  # narrower than the lines: they must not wrap


def terminal(**options: Any) -> tuple[ConsoleReporter, io.StringIO]:
    out = io.StringIO()
    options = {
        "force_terminal": True,
        "color_system": "standard",
        "width": 100,
        "legacy_windows": False,
    } | options
    return ConsoleReporter(Console(file=out, **options)), out


def without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_summary_says_what_will_run(tmp_path: Path) -> None:
    reporter, out = plain()
    tell([reporter], "collie_run_start", run=make_run(tmp_path))
    lines = [line.split(maxsplit=1) for line in out.getvalue().splitlines()]
    said = {words[0]: words[1] for words in lines if len(words) == 2}
    assert said["CoLLiE"] == str(tmp_path)
    assert said["model"] == "llama, 1.06 M parameters, 10.6 k trained (1 %)"
    assert said["data"] == "2,000 samples, 91.4 k tokens; 100 samples to evaluate on"
    assert said["batch"] == "32 samples per step = 16 per device x 2 accumulated x 1 data-parallel"
    assert said["steps"] == "3, 1.5 epochs"
    assert said["optimizer"] == "adamw"
    assert "float32, CPU, torch" in out.getvalue()
    assert said["plugins"] == "llama (collie-llama 0.1.0)"
    assert "3 samples were longer than 128 tokens and truncated" in out.getvalue()


def test_plain_sample_marks_its_targets(tmp_path: Path) -> None:
    reporter, out = plain()
    tell([reporter], "collie_run_start", run=make_run(tmp_path))
    assert "  Spell [red]cat[/red].«c-a-t»\n" in out.getvalue()  # and what looks like markup is left alone


def test_terminal_sample_colours_its_targets(tmp_path: Path) -> None:
    reporter, out = terminal()
    run = make_run(tmp_path)
    tell([reporter], "collie_run_start", run=run)
    tell([reporter], "collie_run_end", run=run, error=None)
    assert "\x1b[1;32mc-a-t" in out.getvalue()
    assert "«" not in out.getvalue()


def test_terminal_without_colour_marks_instead(tmp_path: Path) -> None:
    reporter, out = terminal(color_system=None)
    run = make_run(tmp_path)
    tell([reporter], "collie_run_start", run=run)
    tell([reporter], "collie_run_end", run=run, error=None)
    assert "«c-a-t»" in out.getvalue()


def test_plain_output_is_one_line_per_logged_step(tmp_path: Path) -> None:
    reporter, out = plain()
    play([reporter], make_run(tmp_path))
    steps = [line for line in out.getvalue().splitlines() if re.match(r"step \d+/3  loss", line)]
    assert len(steps) == 3
    assert re.fullmatch(r"step 2/3  loss 2\.000  lr 3\.00e-04  12\.3 k tok/s  3\.00 GiB  eta \d+\.\d s", steps[1])
    assert "\x1b" not in out.getvalue()
    assert "\r" not in out.getvalue()


def test_plain_evaluation_shows_results_and_answers(tmp_path: Path) -> None:
    reporter, out = plain()
    play([reporter], make_run(tmp_path))
    assert "step 3/3  eval\n  loss        1.250\n  perplexity  3.490\n" in out.getvalue()
    assert "  What does a cow say? → Moo.\n" in out.getvalue()
    assert "  Spell cat. → c-a⏎r  (expected: c-a-t)\n" in out.getvalue()


def test_end_says_where_everything_lies_and_what_to_type(tmp_path: Path) -> None:
    reporter, out = plain()
    play([reporter], make_run(tmp_path))
    said = out.getvalue()
    assert re.search(r"Done: 3 steps in [\d.]+ s, loss 1\.333, eval loss 1\.250  perplexity 3\.490\.", said)
    assert f"collie generate 'What does a cow say?' --model {tmp_path}/model\n" in said
    assert f"collie eval {tmp_path}/config.yaml --model {tmp_path}/model\n" in said
    assert f"{tmp_path}/report.html\n" in said
    assert f"{tmp_path}/metrics.jsonl\n" in said


@pytest.mark.parametrize("prompt", ["two\nlines", "", "long " * 100, "\x1b[31m"])
def test_a_prompt_that_cannot_be_typed_is_left_to_the_person(tmp_path: Path, prompt: str) -> None:
    reporter, out = plain()
    run = make_run(tmp_path)
    tell([reporter], "collie_run_start", run=run)
    samples = [SampleText(prompt, "a", "b")]
    tell([reporter], "collie_evaluated", run=run, results={"eval/loss": 1.0}, samples=samples)
    save_model([reporter], run)
    tell([reporter], "collie_run_end", run=run, error=None)
    assert f'collie generate "..." --model {tmp_path}/model' in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_commands_at_the_end_survive_spaces_in_paths(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    reporter, out = plain()
    play([reporter], make_run(folder))
    assert f"--model '{folder}/model'" in out.getvalue()


def test_nothing_is_promised_that_was_not_saved(tmp_path: Path) -> None:
    reporter, out = plain()
    run = make_run(tmp_path)
    tell([reporter], "collie_run_start", run=run)
    tell([reporter], "collie_run_end", run=run, error=None)
    assert "collie generate" not in out.getvalue()


def test_early_stop_gives_its_reason(tmp_path: Path) -> None:
    reporter, out = plain()
    run = make_run(tmp_path)
    run.request_stop("the loss stood still")
    play([reporter], run)
    assert "stopped early: the loss stood still." in out.getvalue()


def test_terminal_shows_progress_and_results(tmp_path: Path) -> None:
    reporter, out = terminal()
    play([reporter], make_run(tmp_path))
    said = without_escapes(out.getvalue())
    assert re.search(r"3/3 ━+ loss 1\.333  lr 3\.00e-04  12\.3 k tok/s  3\.00 GiB  eta 0\.0 s", said)
    assert re.search(r"step 3/3  eval\s+loss        1\.250\s+perplexity  3\.490", said)
    assert f"collie generate 'What does a cow say?' --model {tmp_path}/model" in said.replace("\n", "")


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_an_error_closes_the_live_display(tmp_path: Path, error: BaseException) -> None:
    reporter, out = terminal()
    run = make_run(tmp_path)
    tell([reporter], "collie_run_start", run=run)
    run.step = 1
    tell([reporter], "collie_metrics", run=run, values=row(run))
    tell([reporter], "collie_run_end", run=run, error=error)
    said = out.getvalue()
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h") == 1  # the cursor was hidden once and is back
    assert f"after step 1 of 3: {type(error).__name__}." in without_escapes(said)
    assert "Done" not in said
    assert not reporter.console._live_stack


def test_missing_numbers_and_facts_are_left_out(tmp_path: Path) -> None:
    reporter, out = plain()
    run = make_run(tmp_path)
    run.facts.clear()
    tell([reporter], "collie_run_start", run=run)
    tell([reporter], "collie_metrics", run=run, values={"step": 1, "loss": float("nan")})
    tell([reporter], "collie_run_end", run=run, error=None)
    assert "step 0/3  loss nan\n" in out.getvalue()


def test_an_evaluation_without_a_run_is_shown(tmp_path: Path) -> None:
    reporter, out = plain()
    tell([reporter], "collie_evaluated", run=make_run(tmp_path), results={"eval/loss": 1.0}, samples=[])
    assert out.getvalue() == "step 0/3  eval\n  loss  1.000\n"


def test_results_stand_under_each_other_with_their_change_and_a_mark_at_the_best(tmp_path: Path) -> None:
    reporter, out = plain()
    run = make_run(tmp_path)
    run.config.evaluation.best = SimpleNamespace(metric="eval/accuracy", mode="max")  # type: ignore[assignment]
    for loss, accuracy in ((2.0, 0.5), (1.5, 0.25), (1.75, 0.75), (math.nan, math.nan), (1.25, 0.75)):
        run.step += 1
        results = {"eval/loss": loss, "eval/accuracy": accuracy, "eval/words": 1200.0}
        tell([reporter], "collie_evaluated", run=run, results=results, samples=[])
    lines = out.getvalue().splitlines()
    assert lines[1:4] == ["  loss       2.000", "  accuracy  0.5000", "  words       1200"]
    assert lines[5:8] == [
        "  loss       1.500      -0.5  best so far",
        "  accuracy  0.2500     -0.25",
        "  words       1200        +0",
    ]
    assert lines[9:11] == ["  loss       1.750     +0.25", "  accuracy  0.7500      +0.5  best so far"]
    assert [line.split() for line in lines[13:15]] == [["loss", "nan"], ["accuracy", "nan"]]
    assert [line.split() for line in lines[17:19]] == [["loss", "1.250", "best", "so", "far"], ["accuracy", "0.7500"]]


def test_the_end_says_which_step_was_best(tmp_path: Path) -> None:
    reporter, out = plain()
    run = make_run(tmp_path)
    run.best = {"step": 2, "epoch": 1.0, "metric": "eval/loss", "value": 1.25}
    play([reporter], run)
    assert f"best      {tmp_path}/best (eval/loss 1.250 at step 2)\n" in out.getvalue()
