"""What follows from the cells: means over seeds, the learning rate that is kept, the ranking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from compared import STEP_S, TOKENS, asked, grid_of, rows_of, write_cell

from collie_core.compare.folder import Folder, write_whole
from collie_core.compare.grid import Grid, Pair
from collie_core.compare.pictures import Course
from collie_core.compare.results import Goal, Results, Spread

ADAMW, SGD, LORA = Pair("adamw", "none"), Pair("sgd", "none"), Pair("adamw", "lora")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    found = Folder(tmp_path / "compared")
    (found.root / "memory").mkdir(parents=True)
    return found


def results(
    folder: Folder,
    ends: Mapping[tuple[Pair, float, int], float | None],
    overrides: Sequence[str] = (),
    name: str = "eval/loss",
) -> Results:
    """Of runs by the last value of their evaluation; None: they failed."""
    base = Grid.of(asked(folder.root.parent, overrides))
    pairs, rates, seeds = ([*dict.fromkeys(key[at] for key in ends)] for at in range(3))
    grid = grid_of(base, pairs, rates, seeds)  # type: ignore[arg-type]
    for cell in grid.cells:
        if (cell.pair, cell.lr, cell.seed) in ends:
            end = ends[cell.pair, cell.lr, cell.seed]
            rows = rows_of([3.0, 2.0], [2.5, end])
            rows = [{name if key == "eval/loss" else key: value for key, value in row.items()} for row in rows]
            write_cell(folder, cell, rows, *([] if end is not None else ["failed", "it fell over"]))
    return Results.read(folder, grid)


def test_means_and_deviations_over_seeds(folder: Folder) -> None:
    ends = {(ADAMW, 1e-3, seed): value for seed, value in ((1, 1.0), (2, 2.0), (3, 3.0))}
    (choice,) = results(folder, ends).choices
    assert choice.best.spread("eval/loss") == Spread(2.0, 1.0, 3)
    assert choice.best.spread("tokens_per_second") == Spread(TOKENS / STEP_S, 0.0, 3)
    assert choice.best.spread("nothing") is None
    assert Spread.of([1.0]) == Spread(1.0, None, 1)


def test_the_best_learning_rate_is_kept_and_an_edge_is_known(folder: Folder) -> None:
    ends = {(ADAMW, rate, 1): value for rate, value in ((1e-4, 2.0), (1e-3, 1.0), (1e-2, 3.0))}
    ends |= {(SGD, rate, 1): value for rate, value in ((1e-4, 2.0), (1e-3, 1.5), (1e-2, 1.4))}
    first, second = results(folder, ends).choices
    assert (first.pair, first.best.lr, first.at_edge) == (ADAMW, 1e-3, False)
    assert (second.pair, second.best.lr, second.at_edge) == (SGD, 1e-2, True)


def test_a_rate_at_which_a_seed_fails_is_not_kept(folder: Folder) -> None:
    ends: dict[tuple[Pair, float, int], float | None] = {(ADAMW, 1e-3, 1): 0.5, (ADAMW, 1e-3, 2): None}
    ends |= {(ADAMW, 1e-4, 1): 1.0, (ADAMW, 1e-4, 2): 1.2}
    found = results(folder, ends)
    (choice,) = found.choices
    assert choice.best.lr == 1e-4
    assert [line[1:] for line in found.without_result] == [("failed", "it fell over")]


def test_pairs_without_a_result_are_not_ranked(folder: Folder) -> None:
    found = results(folder, {(ADAMW, 1e-3, 1): 1.0, (SGD, 1e-3, 1): None})
    assert [choice.pair for choice in found.choices] == [ADAMW]
    assert results(folder, {(LORA, 1e-3, 9): None}).choices == ()


def test_what_is_best_decides_where_the_file_says_it(folder: Folder) -> None:
    overrides = ["evaluation.best={metric: eval/bleu, mode: max}"]
    found = results(folder, {(ADAMW, 1e-3, 1): 1.0, (SGD, 1e-3, 1): 2.0}, overrides, "eval/bleu")
    assert found.goal == Goal("eval/bleu", "max")
    assert [choice.pair for choice in found.choices] == [SGD, ADAMW]


def test_which_way_is_better_is_what_the_runs_knew(folder: Folder) -> None:
    grid = grid_of(Grid.of(asked(folder.root.parent)), [ADAMW, SGD])
    for cell in grid.cells:
        write_cell(folder, cell, rows_of([2.0], [1.0]))
        (folder.run(cell) / "summary.json").write_text('{"facts": {"better": {"eval/bleu": "max"}}}')
    better = Results.read(folder, grid).better
    assert better["eval/bleu"] == better["tokens_per_second"] == "max"
    assert better["eval/loss"] == better["loss"] == better["peak_memory_bytes"] == "min"
    assert "eval/other" not in better


def test_without_evaluation_the_training_loss_decides(folder: Folder) -> None:
    grid = grid_of(Grid.of(asked(folder.root.parent)), [ADAMW, SGD])
    for cell, last in zip(grid.cells, (1.0, 0.5), strict=True):
        write_cell(folder, cell, rows_of([3.0] * 18 + [last, last + 1]))
    found = Results.read(folder, grid)
    assert found.goal == Goal("loss")
    assert [(choice.pair, choice.best.spread("loss")) for choice in found.choices] == [
        (SGD, Spread(1.0, None, 1)),  # the last tenth of twenty rows
        (ADAMW, Spread(1.5, None, 1)),
    ]


def test_a_value_that_is_no_number_ranks_last(folder: Folder) -> None:
    found = results(folder, {(ADAMW, 1e-3, 1): float("nan"), (SGD, 1e-3, 1): 9.0})
    assert [choice.pair for choice in found.choices] == [SGD, ADAMW]


def test_speed_leaves_the_first_step_out_and_curves_know_tokens_and_seconds(folder: Folder) -> None:
    grid = grid_of(Grid.of(asked(folder.root.parent)), [ADAMW])
    rows = rows_of([3.0, 2.0, 1.0], [2.5, 1.5])
    rows[0] |= {"step_time_s": 10.0}
    write_cell(folder, grid.cells[0], rows)
    (found,) = Results.read(folder, grid).found
    assert found.numbers["tokens_per_second"] == TOKENS / STEP_S
    assert found.numbers["seconds"] == 10 + 2 * STEP_S
    curve = found.curve("eval/loss")
    assert curve.steps.tolist() == [1, 2]
    assert curve.tokens.tolist() == [TOKENS, 2 * TOKENS]
    assert curve.seconds.tolist() == [10, 10 + STEP_S]


def test_rows_of_several_steps_count_all_of_them(folder: Folder) -> None:
    grid = grid_of(Grid.of(asked(folder.root.parent)), [ADAMW])
    row = {"loss": 1.0, "step_time_s": 2.0, "peak_memory_bytes": 1}
    write_cell(folder, grid.cells[0], [{"step": step, "tokens": 10 * step, **row} for step in (5, 10)])
    (found,) = Results.read(folder, grid).found
    assert (found.numbers["seconds"], found.numbers["tokens_per_second"]) == (20.0, 5.0)


def test_a_mean_over_seeds_has_the_steps_that_all_of_them_have(folder: Folder) -> None:
    grid = grid_of(Grid.of(asked(folder.root.parent)), [ADAMW], seeds=[1, 2])
    write_cell(folder, grid.cells[0], rows_of([4.0, 2.0, 1.0]))
    write_cell(folder, grid.cells[1], rows_of([6.0, 4.0]))  # it was stopped early
    (choice,) = Results.read(folder, grid).choices
    course = Course.of(choice.best, "loss", "tokens")
    assert course.x.tolist() == [TOKENS, 2 * TOKENS]
    assert course.mean.tolist() == [5.0, 3.0]
    np.testing.assert_allclose(course.std, [2**0.5, 2**0.5])


def test_memory_belongs_to_the_pair_whatever_became_of_its_runs(folder: Folder) -> None:
    write_whole(folder.memory(SGD), {"predicted_peak_bytes": 7})
    assert results(folder, {(SGD, 1e-3, 1): None}).memory == {SGD: {"predicted_peak_bytes": 7}}
    write_whole(folder.memory(ADAMW), {"predicted_peak_bytes": 5, "measured_peak_bytes": 6})
    (choice,) = results(folder, {(ADAMW, 1e-3, 1): 1.0}).choices
    assert choice.memory["measured_peak_bytes"] == 6
