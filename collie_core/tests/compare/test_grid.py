"""Which runs a comparison is made of, and what is refused before any of them starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compared import asked

from collie_core.api import RunConfig
from collie_core.compare.grid import Grid, Pair, parse_list, parse_rates, seed
from collie_core.errors import CollieError, ConfigError, RunError


def configs(grid: Grid, path: str) -> list[RunConfig]:
    return [RunConfig.from_yaml(path, cell.overrides) for cell in grid.cells]


def test_the_section_of_the_file_is_for_its_optimizer_and_others_begin_with_their_own(tmp_path: Path) -> None:
    words = asked(tmp_path, ["train.max_steps=5", "optimizer.weight_decay=0.5"])
    adamw, sgd = configs(Grid.of(words), words.config)
    assert adamw.optimizer.lr == 3e-4
    assert adamw.optimizer.betas == (0.8, 0.9)  # type: ignore[attr-defined]
    assert (sgd.optimizer.type, sgd.optimizer.lr) == ("sgd", 1e-2)
    for config in (adamw, sgd):
        assert (config.train.max_steps, config.optimizer.weight_decay, config.train.seed) == (5, 0.5, 7)


def test_a_rate_for_all_may_have_the_name_of_another_tool(tmp_path: Path) -> None:
    words = asked(tmp_path, ["train.learning_rate=0.5"])
    assert [config.optimizer.lr for config in configs(Grid.of(words), words.config)] == [0.5, 0.5]


def test_rates_and_seeds_multiply_and_every_run_has_its_folder(tmp_path: Path) -> None:
    words = asked(tmp_path, rates={"": [1e-4, 1e-3], "sgd": [0.1]}, seeds=[1, 2])
    grid = Grid.of(words)
    assert [(cell.pair.optimizer, cell.lr, cell.seed) for cell in grid.cells] == [
        *(("adamw", rate, number) for rate in (1e-4, 1e-3) for number in (1, 2)),
        *(("sgd", 0.1, number) for number in (1, 2)),
    ]
    made = configs(grid, words.config)
    for cell, config in zip(grid.cells, made, strict=True):
        assert (config.optimizer.lr, config.train.seed) == (cell.lr, cell.seed)
    folders = [config.train.output_dir for config in made]
    assert len(set(folders)) == 6
    assert folders[0] == str(tmp_path / "compared/cells/adamw-none-lr0.0001-seed1")


def test_runs_that_share_a_store_have_a_place_of_their_own_in_it(tmp_path: Path) -> None:
    words = asked(tmp_path, ["checkpoint.store=memory://here", "checkpoint.save_steps=1"])
    stores = {config.checkpoint.store for config in configs(Grid.of(words), words.config)}
    assert stores == {"memory://here/adamw-none-lr0.0003-seed7", "memory://here/sgd-none-lr0.01-seed7"}


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s "no": #1 \N{SNOWMAN}\N{GRINNING FACE}'
    folder.mkdir()
    words = asked(folder)
    places = [config.train.output_dir for config in configs(Grid.of(words), words.config)]
    names = ("adamw-none-lr0.0003-seed7", "sgd-none-lr0.01-seed7")
    assert places == [str(folder / "compared" / "cells" / name) for name in names]


def test_what_an_optimizer_refuses_is_refused_for_it_alone(tmp_path: Path) -> None:
    grid = Grid.of(asked(tmp_path, ["optimizer.betas=[0.5, 0.6]"]))
    assert [cell.pair.optimizer for cell in grid.cells] == ["adamw"]
    (refusal,) = grid.refused
    assert refusal.pair == Pair("sgd", "none")
    assert "optimizer.betas" in refusal.reason


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (["optimizer.type=sgd"], {}, "say it by --optimizers"),
        (["adapter=lora"], {}, "say it by --adapters"),
        (["train.output_dir=x"], {}, "say it by --output"),
        (["train.seed=1"], {"seeds": [1]}, "say it by --seeds"),
        (["optimizer.lr=1"], {"rates": {"": [1.0]}}, "say it by --learning-rates"),
        (["learning_rate=1"], {"rates": {"": [1.0]}}, "say it by --learning-rates"),
        (["optim=sgd"], {}, "say it by --optimizers"),
        ([], {"rates": {"lion": [1.0]}}, "lion is none of --optimizers"),
        ([], {"optimizers": ["adamv"]}, "Did you mean 'adamw'"),
        ([], {"adapters": ["none", "lorra"]}, "unknown adapter 'lorra'"),
        ([], {"optimizers": ["sgd", "collie-core:SGD"]}, "'collie-core:SGD' and 'sgd' are one optimizer"),
        (["train.max_steps=0"], {}, "train.max_steps"),
    ],
)
def test_mistakes_end_it_before_it_begins(
    tmp_path: Path, overrides: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CollieError, match=message):
        Grid.of(asked(tmp_path, overrides, **options))


def test_the_file_must_be_a_run(tmp_path: Path) -> None:
    words = asked(tmp_path)
    Path(words.config).write_text("train: {max_steps: 1}\n")
    with pytest.raises(ConfigError, match=r"model\.model_name_or_path"):
        Grid.of(words)


def test_words_of_the_command_line() -> None:
    assert parse_rates(["1e-4, 3e-4", "lion=1e-5"]) == {"": [1e-4, 3e-4], "lion": [1e-5]}
    assert parse_list("--seeds", "1,20", seed) == [1, 20]
    for rates, message in (
        (["1e-4", "1e-3"], "twice"),
        (["0"], "above 0"),
        (["x=a"], "above 0"),
        (["1,1.0"], "twice"),
        (["inf"], "above"),
    ):
        with pytest.raises(RunError, match=message):
            parse_rates(rates)
    for seeds in ("", "1,", "-1", "1.5", f"{2**31}"):
        with pytest.raises(RunError, match="whole number"):
            parse_list("--seeds", seeds, seed)
