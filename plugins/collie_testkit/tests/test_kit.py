"""What a person meets: known failures, wrong names, the verb, the page of the docs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from collie_core.api import PluginError, Plugins
from collie_core.cli import main
from collie_testkit import checks
from collie_testkit.context import Context
from collie_testkit.launches import Planned, outcome
from collie_testkit.reference import checks_page
from collie_testkit.registry import Failed, checks_of
from collie_testkit.results import FAILED, KNOWN, PASSED, run_check
from collie_testkit.zygote import RanksFailed, Zygote

pytestmark = pytest.mark.usefixtures("mutants")
DOCS = Path(__file__).resolve().parents[3] / "docs"


def context(name: str, folder: Path) -> Context:
    def nothing() -> None:
        raise AssertionError("no check of one process asks for ranks")

    return Context("metric", name, folder, nothing, plugins=Plugins.discover())  # type: ignore[arg-type]


def test_a_known_failure_needs_to_fail_and_to_have_a_reason(tmp_path: Path) -> None:
    (splits,) = [check for check in checks_of("metric") if check.name == "splits"]
    broken, right = (context(name, tmp_path) for name in ("mean-of-means", "off-by-one"))
    assert run_check(splits, broken).outcome == FAILED
    known = run_check(splits, broken, {"splits": "it is a mean of means"})
    assert (known.outcome, known.reason) == (KNOWN, "it is a mean of means")
    assert run_check(splits, right).outcome == PASSED
    passes = run_check(splits, right, {"splits": "it is a mean of means"})
    assert (passes.outcome, passes.reason) == (
        FAILED,
        "passes, though it is a known failure (it is a mean of means): take it off that list",
    )
    with pytest.raises(PluginError, match="known failure 'splits' has no reason"):
        checks("metric", "off-by-one", known_failures={"splits": " "})
    with pytest.raises(PluginError, match="known failure 'split' is no check of metric plugins; these are metadata"):
        checks("metric", "off-by-one", known_failures={"split": "?"})
    with pytest.raises(TypeError, match="gold"):
        checks("metric", "off-by-one", gold=())


def test_what_a_plugin_raises_is_its_failure(tmp_path: Path) -> None:
    (unicode,) = [check for check in checks_of("metric") if check.name == "unicode"]
    result = run_check(unicode, context("ascii", tmp_path))
    assert result.outcome == FAILED
    assert result.reason.startswith("UnicodeEncodeError: 'ascii' codec")
    assert not isinstance(result.error, Failed)


@pytest.mark.slow
def test_a_run_that_fails_takes_none_with_it(tmp_path: Path, zygote: Zygote) -> None:
    sizes = {"good": (1, 4.0), "bad": (1, -1.0), "later": (2, 9.0)}
    planned = {name: Planned(ranks, math.sqrt, (number,)) for name, (ranks, number) in sizes.items()}
    shares = Context("metric", "off-by-one", tmp_path, lambda: zygote)
    assert outcome(shares, "good", planned) == [2.0]
    assert shares.shared.outcomes.keys() == {"good", "bad"}
    with pytest.raises(RanksFailed, match="ValueError"):
        outcome(shares, "bad", planned)
    assert outcome(shares, "later", planned) == [3.0, 3.0]


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["check", "metric", "mean-of-means", "--level", "1"]
    assert main([*arguments, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [row["check"] for row in found["checks"] if row["outcome"] == FAILED][:1] == ["splits"]
    assert found["failed"] >= 1
    assert main([*arguments, "--known", "splits=it is a mean of means", "--known", "merge=the same"]) == 0
    said = capsys.readouterr().out
    assert "known failure  1 one process       splits" in said
    assert "0 of 13 checks failed." in said


def test_other_kinds_have_the_checks_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "evaluator", "perplexity"]) == 0
    said = capsys.readouterr().out
    assert "0 of 6 checks failed. There are no checks of evaluator plugins beside those of the package." in said


def test_wrong_words_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in [
        (["metric", "meen-of-means"], "Did you mean 'mean-of-means'"),
        (["metrik", "off-by-one"], "unknown kind 'metrik'"),
        (["metric", "off-by-one", "--set", "lr"], "'lr' must be written as NAME=VALUE"),
    ]:
        assert main(["check", *arguments]) == 1
        assert words in capsys.readouterr().err


def test_the_page_of_the_docs_is_what_the_checks_say() -> None:
    assert (DOCS / "checks.md").read_text(encoding="utf-8") == checks_page(), "make docs writes it anew"
