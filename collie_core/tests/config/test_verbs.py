"""`collie validate` and `collie init` as a person meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from collie_core.cli import main
from collie_core.cli.init import PRESETS as NAMES
from collie_core.config.presets import PRESETS, WIDTH, render
from collie_core.config.run import RunConfig
from collie_core.plugins import Plugins

ROOT = Path(__file__).parents[3]
GOOD = "model: {config: {model_type: llama}}\ntokenizer: byte\ndata: {train: t.jsonl}\n"


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    return path


def test_one_line_when_all_is_well(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["validate", str(run_yaml), "train.global_batch_size=8", "--parallel.data_parallel_size=2"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert out.startswith(f"{run_yaml}: ok; model llama (")
    assert "optimizer adamw (collie-core " in out
    assert "8 samples per step = 1 per device x 4 accumulated x 2 data-parallel" in out
    assert out.count("\n") == 1


def test_a_batch_that_needs_several_processes(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["train.global_batch_size=8", "train.per_device_train_batch_size=2"]
    assert main(["validate", str(run_yaml), *sizes, "train.gradient_accumulation_steps=1"]) == 0
    assert "8 samples per step, on more than one process" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["train.max_steps=7"],
        ["--train.max_steps", "7"],
        ["--train.max_steps=7"],
        ["--json", "train.max_steps=7"],
        ["train.seed=1", "--json", "--train.max_steps", "7"],
        ["--optimizer.lr", "1e-5", "train.max_steps=7", "--train.logging_steps=2", "--json"],
    ],
)
def test_every_form_of_an_override(run_yaml: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    load = RunConfig.from_yaml

    def record(*args: Any, **options: Any) -> RunConfig:
        seen.append(load(*args, **options))
        return seen[-1]

    monkeypatch.setattr(RunConfig, "from_yaml", record)
    assert main(["validate", str(run_yaml), *words]) == 0
    assert seen[0].train.max_steps == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "'nonsense' is no override: write key=value"),
        (["--train.max_steps"], "--train.max_steps needs a value"),
        (["--train.max_steps", "--json", "--x"], "needs a value"),
    ],
)
def test_words_that_are_no_override(
    run_yaml: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["validate", str(run_yaml), *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--train.max_step=7", "--max_st=7", "--js=1"])
def test_nothing_is_abbreviated(run_yaml: Path, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(run_yaml), word]) == 2
    key = word.removeprefix("--").partition("=")[0]
    assert f"command line: {key} = " in capsys.readouterr().err


def test_names_of_other_tools_are_noted_on_stderr(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_yaml.write_text(GOOD + "train: {learning_rate: 1e-3}\n")
    assert main(["validate", str(run_yaml), "--micro_batch_size", "2"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"note: {run_yaml}:4: train.learning_rate is called optimizer.lr here",
        "note: command line: micro_batch_size is called train.per_device_train_batch_size here",
    ]


def test_json_of_a_good_and_of_a_bad_file(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(run_yaml), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is True
    assert answer["plugins"][1].startswith("optimizer adamw")
    run_yaml.write_text("train: {max_steps: .inf}\ndata: {train: t}\nmodel: x\n")
    assert main(["validate", str(run_yaml), "--json", "seed=[.nan]"]) == 2
    answer = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert answer == {
        "ok": False,
        "problems": [
            {
                "file": "command line",
                "line": None,
                "key": "seed",
                "value": ["NaN"],
                "rule": "is not a known key",
                "hint": "It belongs to train: train.seed.",
            },
            {
                "file": str(run_yaml),
                "line": 1,
                "key": "train.max_steps",
                "value": "Infinity",
                "rule": "must be a finite number",
                "hint": "",
            },
        ],
    }


def test_validating_costs_no_torch_and_no_second(python: Any) -> None:
    code = (
        "import sys, time\nfrom collie_core.cli import main\n"
        f"assert main(['validate', {str(ROOT / 'examples' / 'quickstart.yaml')!r}]) == 0\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\nprint(time.process_time())"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 1.0  # seconds of CPU


def _needs_its_plugin(preset: str) -> None:
    adapter = PRESETS[preset].sections.get("adapter")
    if adapter and adapter["type"] not in Plugins.discover().names("adapter"):
        pytest.skip(f"the pack of adapter {adapter['type']} is not installed")


# -- init ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_presets_validate_and_say_what_comes_next(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _needs_its_plugin(name)
    path = tmp_path / "new" / "run.yaml"
    assert main(["init", str(path), "--preset", name]) == 0
    out = capsys.readouterr().out
    assert f"collie validate {path}" in out
    assert f"collie train {path}" in out
    assert main(["validate", str(path)]) == 0
    assert max(map(len, path.read_text().splitlines())) <= WIDTH + 10
    assert f"# CoLLiE: {PRESETS[name].summary}." in path.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_are_the_presets(name: str) -> None:
    _needs_its_plugin(name)  # its descriptions are the comments
    data = {split: f"examples/data/quickstart_{split}.jsonl" for split in ("train", "eval")}
    text = render(name, data) if name == "quickstart" else render(name)
    assert (ROOT / "examples" / f"{name}.yaml").read_text(encoding="utf-8") == text


def test_every_preset_is_offered() -> None:
    assert tuple(PRESETS) == NAMES


def test_comments_are_the_descriptions_of_the_fields() -> None:
    text = render("finetune")
    assert "lr: 2.0e-05  # Learning rate after warm-up" in text
    assert "global_batch_size: 16" in text
    assert "# Samples per optimizer step" in text


def test_nothing_is_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("mine")
    assert main(["init", str(path)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert main(["init", str(path), "--force"]) == 0
    assert "model:" in path.read_text()


def test_a_folder_gets_run_yaml_and_a_schema_beside_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "collie.schema.json").write_text("{}")
    assert main(["init", str(tmp_path)]) == 0
    text = (tmp_path / "run.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=collie.schema.json\n# CoLLiE")


def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["init", str(tmp_path / "file" / "run.yaml")]) == 1
    assert "cannot write" in capsys.readouterr().err
