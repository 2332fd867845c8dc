"""The tokenised data set: cached whole or not at all, built once, honest about its targets."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from collie_core.config.data import DataConfig
from collie_core.config.model import ModelConfig
from collie_core.config.tokenizer import TokenizerConfig
from collie_core.data import dataset as module
from collie_core.data.dataset import TokenizedDataset, cache_root, prepare_dataset, segments
from collie_core.data.formats import Encoder
from collie_core.data.loader import Loader
from collie_core.data.tokenizer import build_tokenizer, byte_tokenizer
from collie_core.errors import DataError

BYTES = byte_tokenizer()
ROWS = [{"input": f"{number}?", "output": "!" * (1 + number % 4)} for number in range(20)]
REAL = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "train.jsonl", ROWS)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one whenever a batch is tokenised."""
    calls: list[str] = []
    encode = Encoder.encode

    def counting(self: Encoder, *arguments: Any) -> Iterator[Any]:
        calls.append("batch")
        return encode(self, *arguments)

    monkeypatch.setattr(Encoder, "encode", counting)
    return calls


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare(train: Any, cache: Path, tokenizer: Any = BYTES, **options: Any) -> TokenizedDataset:
    data = DataConfig(train=train, cache_dir=str(cache), **options)
    return prepare_dataset(data.train, data, tokenizer, vocab_size=1000, name="train")


def ids_of(data: TokenizedDataset) -> list[list[int]]:
    return [sample["input_ids"].tolist() for sample in data]


# -- what it holds ------------------------------------------------------------------------------------------


def test_samples_are_read_by_index_and_slice(file: Path, tmp_path: Path) -> None:
    data = prepare(str(file), tmp_path / "cache")
    assert len(data) == data.samples_per_epoch == 20
    first = data[0]
    assert first["input_ids"].tolist() == [*b"0?!", 256]
    assert first["labels"].tolist() == [-100, -100, ord("!"), 256]
    assert first["input_ids"].dtype == first["labels"].dtype == np.int32
    assert [len(sample["input_ids"]) for sample in data[2:5]] == data.lengths[2:5].tolist()
    assert data[-1]["input_ids"].tolist() == data[19]["input_ids"].tolist()
    assert data.lengths.sum() == data.stats.tokens
    with pytest.raises(IndexError):
        data[20]


def test_rows_of_a_program_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = DataConfig()
    for rows in (ROWS, datasets.Dataset.from_list(ROWS)):
        prepared = prepare_dataset(rows, data, BYTES, vocab_size=1000, name="train")  # type: ignore[arg-type]
        assert ids_of(prepared)[0] == [*b"0?!", 256]
    assert list(tmp_path.iterdir()) == []


def test_sources_of_several_formats_are_joined(file: Path, tmp_path: Path) -> None:
    chat = write(tmp_path / "chat.jsonl", [{"messages": [{"role": "assistant", "content": "ho"}]}])
    sources = [
        {"path": str(file), "weight": 2.0},
        str(chat),
        {"path": str(file), "split": "train[:50%]", "weight": 0.5},
    ]
    data = prepare(sources, tmp_path / "cache")
    assert [tuple(part) for part in data.ranges] == [(0, 20, 2.0), (20, 21, 1.0), (21, 31, 0.5)]
    assert data.samples_per_epoch == 40 + 1 + 5
    assert BYTES.decode(data[20]["input_ids"]) == "<|im_start|>assistant\nho<eos>\n"
    assert ids_of(data)[21:] == ids_of(data)[:10]
    assert data.stats.samples == 31


def test_the_format_may_be_written(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": "ab", "input": "xy", "output": "z"}])
    assert prepare(str(file), tmp_path)[0]["labels"].tolist() == [-100, -100, ord("z"), 256]
    assert prepare({"path": str(file), "format": "text"}, tmp_path)[0]["labels"].tolist() == [
        -100,
        ord("b"),
        256,
    ]


def test_a_person_sees_what_is_learned() -> None:
    data = prepare_dataset([{"input": "2+2=", "output": " 4 😀"}], DataConfig(), BYTES, vocab_size=300, name="train")
    assert segments(data[0], BYTES) == [("2+2=", False), (" 4 😀<eos>", True)]


# -- the share of targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("train_on", ["auto", "completion", "assistant"])
def test_answers_without_any_prompt_are_refused(tmp_path: Path, train_on: str) -> None:
    file = write(tmp_path / "a.jsonl", [{"input": "", "output": "abc"}] * 3)
    with pytest.raises(DataError, match=rf"data\.train: 100 % of the 12 tokens are targets, .*train_on={train_on}"):
        prepare(str(file), tmp_path / "cache", train_on=train_on)
    assert prepare(str(file), tmp_path / "cache", train_on="all").stats.target_share == 1


def test_a_data_set_without_targets_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"input": "a long question", "output": "b"}] * 3)
    with pytest.raises(DataError, match=r"a\.jsonl: no sample is left, 0 % of the tokens are targets \(3 samples had"):
        prepare(str(file), tmp_path / "cache", max_length=4)
    with pytest.raises(DataError, match=r"\(0 samples had none, 3 were too long\)"):
        prepare(str(file), tmp_path / "cache", max_length=4, long_samples="drop")
    with pytest.raises(DataError, match=r"data\.train holds no samples"):
        prepare([], tmp_path / "cache")


def test_texts_may_be_learned_whole(tmp_path: Path) -> None:
    assert prepare(str(write(tmp_path / "a.jsonl", [{"text": "ab"}])), tmp_path).stats.target_share == 1


# -- the cache ----------------------------------------------------------------------------------------------


def test_the_same_is_tokenised_once(file: Path, tmp_path: Path, counted: list[str]) -> None:
    first = prepare(str(file), tmp_path / "cache")
    second = prepare({"path": str(file), "weight": 3.0}, tmp_path / "cache")  # weights are not in the tokens
    assert counted == ["batch"]
    assert ids_of(first) == ids_of(second)
    assert first.stats == second.stats


CHANGES: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 3},
    "train_on": {"train_on": "all"},
    "long_samples": {"long_samples": "drop"},
    "template": {"chat_template": "chatml {{ 1 }}"},
}


@pytest.mark.parametrize("options", CHANGES.values(), ids=CHANGES)
def test_another_option_is_another_cache(
    file: Path, tmp_path: Path, counted: list[str], options: dict[str, Any]
) -> None:
    prepare(str(file), tmp_path / "cache")
    prepare(str(file), tmp_path / "cache", **options)
    assert len(counted) == 2


def test_a_changed_file_or_tokenizer_is_tokenised_again(file: Path, tmp_path: Path, counted: list[str]) -> None:
    cache = tmp_path / "cache"
    prepare(str(file), cache)
    write(file, ROWS[:5])
    assert len(prepare(str(file), cache)) == 5
    other = byte_tokenizer()
    other.add_tokens(["!!"])
    assert 259 in ids_of(prepare(str(file), cache, other))[1]
    assert len(counted) == 3
    BYTES("another call", truncation=True, max_length=2, padding="max_length")  # leaves its options in the tokenizer
    prepare(str(file), cache)
    assert len(counted) == 3


DAMAGES = {
    "a flipped bit": lambda folder: flip(folder / "samples.arrow"),
    "a cut file": lambda folder: os.truncate(folder / "samples.arrow", 100),
    "a missing file": lambda folder: (folder / "samples.arrow").unlink(),
    "torn facts": lambda folder: (folder / "facts.json").write_text('{"stats"'),
    "other facts": lambda folder: (folder / "facts.json").write_text("[]"),
}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_built_again(file: Path, tmp_path: Path, counted: list[str], damage: Any) -> None:
    whole = ids_of(prepare(str(file), tmp_path / "cache"))
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    damage(folder)
    assert ids_of(prepare(str(file), tmp_path / "cache")) == whole
    assert len(counted) == 2
    prepare(str(file), tmp_path / "cache")
    assert len(counted) == 2


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": 5}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: text must be text"):
        prepare(str(file), tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_killed_builder_is_no_hindrance(file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    prepare(str(file), cache)
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    folder.rename(folder.with_name(folder.name + ".new"))  # what a kill before the rename leaves
    assert len(prepare(str(file), cache)) == 20
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]


def test_a_folder_that_cannot_be_written_is_named(file: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DataError, match=r"cannot keep the tokenised .*set data\.cache_dir to a folder with room"):
        prepare(str(file), blocked / "cache")


def test_the_cache_lies_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root(None) == tmp_path / "collie" / "datasets"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root(None) == tmp_path / ".cache" / "collie" / "datasets"
    assert cache_root("~/x") == tmp_path / "x"


def build_and_log(train: str, cache: Path, log: Path) -> None:
    build = module._build

    def logged(*arguments: Any) -> Any:
        with log.open("a") as file:
            file.write("built\n")
        return build(*arguments)

    module._build = logged
    assert len(prepare(train, cache)) == 20


def test_one_process_of_many_builds(file: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = (str(file), tmp_path / "cache", tmp_path / "log")
    processes = [context.Process(target=build_and_log, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_cached_data_set_travels_by_its_path(file: Path, tmp_path: Path) -> None:
    write(file, [{"text": "a" * 400}] * 2000)
    data = prepare(str(file), tmp_path / "cache")
    assert len(pickle.dumps(data)) < data.stats.tokens  # 8 bytes per token would lie in it
    assert ids_of(pickle.loads(pickle.dumps(data)))[:3] == ids_of(data)[:3]  # noqa: S301


# -- real texts ---------------------------------------------------------------------------------------------


@pytest.fixture
def real() -> Path:
    if not REAL.is_dir():
        pytest.skip(f"the real texts are not in {REAL}")
    return REAL


@pytest.mark.real
def test_real_instructions_keep_their_text(real: Path, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(TokenizerConfig(), ModelConfig(model_name_or_path=str(real / "stories260K-hf")))
    for name in ("alpaca_en_700", "alpaca_zh_700", "gsm8k_train_2000"):
        file = real / "text" / f"{name}.jsonl"
        data = prepare(str(file), tmp_path, tokenizer, max_length=4096)
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(data) == len(rows)
        for row, sample in zip(rows, data, strict=True):
            text = tokenizer.decode(sample["input_ids"], skip_special_tokens=True)
            assert text == row["input"] + row["output"]
            learned = tokenizer.decode(sample["labels"][sample["labels"] != -100], skip_special_tokens=True)
            assert row["output"].strip().endswith(learned.strip()[1:])
            assert sample["labels"][-1] == tokenizer.eos_token_id


@pytest.mark.real
def test_real_conversations_are_learned_turn_by_turn(real: Path, tmp_path: Path) -> None:
    file = real / "text" / "chat_toolcall_200.jsonl"
    data = prepare(str(file), tmp_path, max_length=16384)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(data) == len(rows) == 200
    for row, sample in zip(rows, data, strict=True):
        said = [turn["value"] for turn in row["conversations"] if turn["from"] in ("gpt", "function_call")]
        learned = [text for text, is_target in segments(sample, BYTES) if is_target]
        assert learned == [f"{text}<eos>\n" for text in said]


@pytest.mark.real
@pytest.mark.parametrize("packing", [False, True])
def test_real_texts_pass_through_the_loader(real: Path, tmp_path: Path, packing: bool) -> None:
    data = prepare(str(real / "text" / "shakespeare_text.jsonl"), tmp_path, long_samples="split", max_length=256)
    steps = Loader(
        data,
        samples_per_step=8,
        rows_per_micro_batch=2,
        max_length=256,
        packing=packing,
        pad_token_id=257,
        seed=1,
        total=len(data),
    )
    totals = [(step.tokens, step.target_tokens) for step in steps]
    assert sum(tokens for tokens, _ in totals) == data.stats.tokens
    assert sum(targets for _, targets in totals) == data.stats.target_tokens
