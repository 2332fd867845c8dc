"""Trackers: CSV for real; wandb and mlflow by stand-ins, since their packages are large and are not installed here."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fake_runs import make_run, play, row, tell

from collie_core.config.evaluation import PerplexityConfig
from collie_core.config.run import RunConfig
from collie_core.errors import ConfigError, PluginError, RunError
from collie_core.plugins import Plugins
from collie_core.report import standard_observers
from collie_core.report.csv import CsvFile
from collie_core.report.mlflow import MlflowTracker
from collie_core.report.tensorboard import TensorBoardReporter
from collie_core.report.wandb import WandbTracker
from collie_core.topology import Topology


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# -- which ones ---------------------------------------------------------------------------------------------


def config_with(report_to: Any, **train: Any) -> RunConfig:
    return RunConfig(train={"output_dir": "unused", **train}, report_to=report_to)


def test_observers_follow_report_to_and_rank() -> None:
    assert len(standard_observers(config_with([]), Topology())) == 3
    *_, first, second = standard_observers(config_with(["csv", {"type": "tensorboard"}]), Topology())
    assert isinstance(first, CsvFile)
    assert isinstance(second, TensorBoardReporter)
    assert standard_observers(config_with(["csv"], monitors=["host"]), Topology(rank=1)) == []


def test_one_tracker_needs_no_list_and_none_is_none() -> None:
    assert [tracker.type for tracker in config_with("csv").report_to] == ["csv"]
    (tracker,) = config_with({"type": "wandb", "project": "demo"}).report_to
    assert tracker.project == "demo"  # type: ignore[attr-defined]
    assert config_with("none").report_to == []
    assert RunConfig.from_text(config_with("wandb").to_yaml()).report_to == config_with("wandb").report_to


@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        (["csw"], "unknown tracker 'csw'. Did you mean 'csv'"),
        ([{"type": "csv", "path": "x"}], "path"),
        (["csv", "csv"], "would record the same run in the same place"),
        ([PerplexityConfig()], "unknown tracker 'perplexity'. It is the name of a plugin of another kind"),
    ],
)
def test_what_cannot_be_meant_is_refused(report_to: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_with(report_to)


def test_hooks_match_their_specification() -> None:
    """pluggy refuses a hook with an argument that its specification does not have."""
    config = config_with(["csv", "tensorboard"], monitors=["host"])
    manager = Plugins.discover().hook_manager(standard_observers(config, Topology()))
    for tracker in (WandbTracker, MlflowTracker):
        manager.register(object.__new__(tracker))
    manager.check_pending()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_said_in_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RunError, match=rf"pip install 'collie-core\[{name}\]'") as caught:
        standard_observers(config_with([name]), Topology())
    assert "\n" not in str(caught.value)


def test_a_tracker_of_another_package(install: Any, tmp_path: Path) -> None:
    code = """
        from typing import Literal
        from collie_core.api import Component, ComponentConfig

        class Config(ComponentConfig):
            type: Literal["shout"] = "shout"
            times: int = 1

        class Shout:
            def __init__(self, times):
                if times > 9:
                    raise OSError("hoarse")
                self.times, self.heard = times, []

            def collie_metrics(self, values):
                self.heard += [values["loss"]] * self.times

        class Deaf:
            pass

        SHOUT = Component(build="shouting:Shout", config="shouting:Config")
        DEAF = Component(build="shouting:Deaf")
    """
    entries = {"collie.tracker": {"shout": "shouting:SHOUT", "deaf": "shouting:DEAF"}}
    install("collie-shout", groups=entries, files={"shouting.py": _dedent(code)})
    config = config_with([{"type": "shout", "times": 2}])
    tracker = standard_observers(config, Topology())[-1]
    play([tracker], make_run(tmp_path))
    assert tracker.heard == [4, 4, 2, 2, 4 / 3, 4 / 3]  # type: ignore[attr-defined]
    assert [used["name"] for used in config.registry.used()] == ["shout"]
    with pytest.raises(PluginError, match=r"tracker 'shout' .* could not be built: OSError: hoarse"):
        standard_observers(config_with([{"type": "shout", "times": 10}]), Topology())
    config = config_with(["deaf"])
    with pytest.raises(PluginError, match="callback Deaf implements no hook"):
        config.registry.hook_manager(standard_observers(config, Topology()))


def _dedent(code: str) -> str:
    from textwrap import dedent

    return dedent(code)


def test_a_configuration_with_trackers_and_monitors_is_checked_without_their_packages(
    python: Any, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\ndata: {train: t}\ntrain: {monitors: [host, disk, network]}\n"
        "report_to: [csv, tensorboard, {type: wandb, project: p}, {type: mlflow, experiment: e}]\n"
    )
    code = (
        "import sys\nfrom collie_core.cli import main\n"
        f"assert main(['validate', {str(file)!r}]) == 0\n"
        "heavy = {'torch', 'psutil', 'tensorboard', 'wandb', 'mlflow', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


# -- metrics.csv --------------------------------------------------------------------------------------------


def test_csv_has_the_rows_of_metrics_jsonl(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    play([CsvFile()], run)
    rows = table(tmp_path / "metrics.csv")
    assert [item["step"] for item in rows] == ["1", "2", "3", "3"]
    assert list(rows[0]) == [*row(run), "eval/loss", "eval/perplexity"]
    assert [item["loss"] for item in rows] == ["4.0", "2.0", str(4 / 3), ""]
    assert [item["eval/loss"] for item in rows] == ["", "", "", "1.25"]


def test_csv_columns_grow_and_rows_are_on_disk_at_once(tmp_path: Path) -> None:
    file, run = CsvFile(), make_run(tmp_path)
    tell([file], "collie_run_start", run=run)
    tell([file], "collie_metrics", run=run, values={"step": 1, "a, b": 1.5})
    tell([file], "collie_metrics", run=run, values={"step": 2, "late": math.nan, 'quoted "c"': 3})
    tell([file], "collie_metrics", run=run, values={"step": 3, "a, b": 2.5})
    assert table(tmp_path / "metrics.csv") == [
        {"step": "1", "a, b": "1.5", "late": "", 'quoted "c"': ""},
        {"step": "2", "a, b": "", "late": "", 'quoted "c"': "3"},
        {"step": "3", "a, b": "2.5", "late": "", 'quoted "c"': ""},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    tell([file], "collie_run_end", run=run, error=None)


def test_csv_outside_of_a_run_writes_nothing(tmp_path: Path) -> None:
    tell([CsvFile()], "collie_evaluated", run=make_run(tmp_path), results={"eval/loss": 1.0}, samples=[])
    assert not list(tmp_path.iterdir())


# -- wandb --------------------------------------------------------------------------------------------------


class FakeWandb(ModuleType):
    """As much of wandb as is called."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.options: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.summary: dict[str, Any] = {}
        self.exit_codes: list[int] = []

    def init(self, **options: Any) -> FakeWandb:
        self.options = options
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


def test_wandb_gets_the_configuration_and_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, run = FakeWandb(), make_run(tmp_path / "my-run")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run.best = {"step": 2, "epoch": 1.0, "metric": "eval/loss", "value": 1.25}
    tracker = WandbTracker(project="demo", entity=None, name=None, tags=[], mode="offline")
    tell([tracker], "collie_evaluated", run=run, results={"eval/loss": 9.0}, samples=[])  # outside of a run
    play([tracker], run)
    assert wandb.options == {
        "project": "demo",
        "mode": "offline",
        "name": "my-run",
        "dir": str(tmp_path / "my-run"),
        "config": {"model": {"config": {"model_type": "llama"}}, "train": {"max_steps": 3}},
        "reinit": "create_new",
    }
    assert [step for step, _ in wandb.logged] == [1, 2, 3, 3]
    assert wandb.logged[1][1]["train/loss"] == 2.0
    assert "step" not in wandb.logged[1][1]
    assert wandb.logged[3][1] == {"eval/loss": 1.25, "eval/perplexity": math.exp(1.25)}
    assert wandb.summary["best/step"] == 2
    assert wandb.exit_codes == [0]


def test_wandb_is_told_of_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    play([WandbTracker()], make_run(tmp_path), error=RuntimeError("boom"))
    assert wandb.exit_codes == [1]


# -- mlflow -------------------------------------------------------------------------------------------------


class FakeMlflow(ModuleType):
    """As much of mlflow as is called; it is its own client."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.entities = ModuleType("mlflow.entities")
        self.entities.Param = lambda name, value: (name, value)  # type: ignore[attr-defined]
        self.entities.Metric = lambda name, value, time, step: (name, value, step)  # type: ignore[attr-defined]
        self.experiments: dict[str, str] = {}
        self.params: list[list[tuple[str, str]]] = []
        self.metrics: list[list[tuple[str, float, int]]] = []
        self.tags: dict[str, Any] = {}
        self.created: list[Any] = []
        self.status = ""

    def MlflowClient(self, tracking_uri: str | None) -> FakeMlflow:
        self.created.append(tracking_uri)
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        return self.experiments.setdefault(name, f"id of {name}")

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.created += [experiment, run_name]
        return SimpleNamespace(info=SimpleNamespace(run_id="r"))

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        assert run_id == "r"
        assert len(params) <= 100
        self.params += [params] if params else []
        self.metrics += [metrics] if metrics else []

    def set_tag(self, run_id: str, key: str, value: Any) -> None:
        self.tags[key] = value

    def set_terminated(self, run_id: str, status: str) -> None:
        self.status = status


@pytest.mark.parametrize("error", [None, RuntimeError("boom")])
def test_mlflow_gets_the_configuration_and_every_number(
    error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow, run = FakeMlflow(), make_run(tmp_path / "my-run")
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.entities", mlflow.entities)
    run.best = {"step": 2, "metric": "eval/loss"}
    run.config.model_dump = lambda mode: {"a": {"b": 1, "none": None}, "many": {str(n): n for n in range(150)}}  # type: ignore[method-assign,assignment,return-value,misc]
    for _ in range(2):
        play([MlflowTracker(tracking_uri="file:x", experiment="demo", run_name=None)], run, error)
    assert mlflow.created == ["file:x", "id of demo", "my-run"] * 2
    assert [len(batch) for batch in mlflow.params] == [100, 51] * 2
    assert mlflow.params[0][:2] == [("a.b", "1"), ("many.0", "0")]
    assert ("train/loss", 2.0, 2) in mlflow.metrics[1]
    assert mlflow.metrics[3] == [("eval/loss", 1.25, 3), ("eval/perplexity", math.exp(1.25), 3)]
    assert mlflow.tags == {"best.step": 2, "best.metric": "eval/loss"}
    assert mlflow.status == ("FINISHED" if error is None else "FAILED")
