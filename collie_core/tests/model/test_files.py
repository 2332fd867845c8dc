"""Safetensors written box by box: the same bytes as safetensors writes, and readable box by box."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from collie_core.errors import ModelError
from collie_core.model.boxes import whole
from collie_core.model.files import DTYPES, INDEX, Checkpoint, Kind, TensorFile, TensorFolder


def kinds(tensors: dict[str, torch.Tensor]) -> dict[str, Kind]:
    return {name: Kind(tuple(value.shape), value.dtype) for name, value in tensors.items()}


def write_file(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    file = TensorFile(path, kinds(tensors))
    for name, value in tensors.items():
        file.write(name, whole(value.shape), value)
    file.close()
    return path


def of_every_type() -> dict[str, torch.Tensor]:
    values = torch.arange(24).reshape(2, 3, 4) % 7
    return {f"{code}.weight": values.to(dtype) for code, dtype in DTYPES.items()}


def as_bytes(value: torch.Tensor) -> bytes:
    return bytes(value.flatten().view(torch.uint8).tolist())


def test_a_file_has_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = of_every_type() | {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "ü": torch.ones(1)}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    write_file(tmp_path / "ours.safetensors", tensors)
    ours, theirs = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert ours[name].shape == value.shape
        assert as_bytes(ours[name]) == as_bytes(value)
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_in_one_type_it_is_the_same_file(tmp_path: Path) -> None:
    tensors = {name: torch.randn(3, 5).bfloat16() for name in ("b.weight", "a.weight", "c.bias")}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    ours = write_file(tmp_path / "ours.safetensors", tensors)
    assert ours.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@given(st.data())
def test_boxes_written_in_any_order_make_the_whole_and_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), max_size=4), label="shape")
    value = torch.randn(shape)
    boxes = [()]
    for size in shape:
        cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=2))})
        boxes = [(*box, side) for box in boxes for side in pairwise(cuts)]
    order = data.draw(st.permutations(boxes), label="boxes")
    path = tmp_path_factory.mktemp("boxes") / "model.safetensors"
    file = TensorFile(path, {"weight": Kind(tuple(shape), torch.float32)})
    for box in order:
        file.write("weight", box, value[tuple(slice(*side) for side in box)].double())
    file.close()
    assert torch.equal(load_file(path)["weight"], value)
    checkpoint = Checkpoint.open(path.parent)
    for box in boxes:
        assert torch.equal(checkpoint.read("weight", box), value[tuple(slice(*side) for side in box)])


def test_what_was_not_written_is_noticed(tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "x", {"weight": Kind((2, 2), torch.float32)})
    file.write("weight", ((0, 1), (0, 2)), torch.ones(1, 2))
    with pytest.raises(AssertionError, match="8 bytes were not written"):
        file.close()


def test_files_are_limited_in_size_and_have_an_index(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(10), "b": torch.randn(10), "huge": torch.randn(100), "c": torch.randn(10)}
    folder = TensorFolder(tmp_path, kinds(tensors), max_file_bytes=100)
    for name, value in reversed(tensors.items()):
        folder.write(name, whole(value.shape), value)
    folder.close()
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_parameters": 130, "total_size": 520}
    assert index["weight_map"] == {
        "a": "model-00001-of-00003.safetensors",
        "b": "model-00001-of-00003.safetensors",
        "huge": "model-00002-of-00003.safetensors",
        "c": "model-00003-of-00003.safetensors",
    }
    checkpoint = Checkpoint.open(tmp_path)
    for name, value in tensors.items():
        assert checkpoint.shape(name) == value.shape
        assert torch.equal(checkpoint.read(name, whole(value.shape)), value)


def test_an_index_that_names_an_absent_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(ModelError, match=r"names model-00001-of-00001\.safetensors, which is not there"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ModelError, match="index"):
        Checkpoint.open(tmp_path)


def test_a_hub_id_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    write_file(snapshot / "model.safetensors", {"a": torch.ones(2)})
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert torch.equal(Checkpoint.open("some/model").read("a", ((0, 2),)), torch.ones(2))
    with pytest.raises(ModelError, match="other/model"):
        Checkpoint.open("other/model")
