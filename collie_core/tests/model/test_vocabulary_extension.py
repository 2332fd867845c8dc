"""New rows for a vocabulary: which there are, and their values to the last bit, however the matrix is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_models import CONFIGS, FUSED, LLAMA, config_of, family_of, tensors, write
from transformers import AutoConfig, AutoModelForCausalLM

from collie_core.config.model import ResizeVocabulary
from collie_core.data.tokenizer import byte_tokenizer
from collie_core.errors import ModelError
from collie_core.model import vocabulary_extension
from collie_core.model.build import base_of_adapter, build_model, describe_adapter
from collie_core.model.export import save_pretrained
from collie_core.model.family import Source, StockFamily
from collie_core.model.vocabulary_extension import ExtendedCheckpoint, VocabularyExtension, extend
from collie_core.model.weights import Checkpoint

OLD, SIZE, KNOWN = 37, 43, 33  # the files' last four rows belong to no token
PIECES = {33: (5, 7, 7), 34: (30,), 38: (0, 1, 2, 32), 39: ()}
EXTENSION = VocabularyExtension(OLD, SIZE, KNOWN, PIECES)


def with_new_rows(matrix: torch.Tensor) -> torch.Tensor:
    """As the class says it: in float64, rounded once."""
    old = matrix.double()
    mean = old[:KNOWN].sum(0) / KNOWN
    rows = [*old, *[mean] * (SIZE - OLD)]
    for row, ids in PIECES.items():
        rows[row] = sum(old[one] for one in ids) / len(ids) if ids else mean
    return torch.stack(rows).to(matrix.dtype)


# -- which rows -----------------------------------------------------------------------------------------------------


def section(**options: Any) -> ResizeVocabulary:
    return ResizeVocabulary.model_validate(options)


def test_a_new_token_is_the_mean_of_what_its_text_was_before() -> None:
    before = byte_tokenizer()
    tokenizer, extension = extend(before, section(tokens=["aé", "<eos>b"]), 259)
    assert extension == VocabularyExtension(259, 261, 259, {259: (97, 195, 169), 260: (256, 98)})
    assert tokenizer("xaé")["input_ids"] == [120, 259]
    assert len(before) == 259  # it is a copy that grew
    _, extension = extend(before, section(tokens=["aé", "<eos>b"], init="mean"), 259)
    assert extension.pieces == {259: (), 260: ()}


@pytest.mark.parametrize(
    ("rows", "options", "size"),
    [
        (259, {"tokens": ["ab"]}, 260),
        (300, {"tokens": ["ab"]}, 300),  # the files have room for it
        (300, {"tokens": ["ab"], "multiple_of": 64}, 320),
        (320, {"tokens": ["ab"], "multiple_of": 64}, 320),
        (259, {"size": 300}, 300),
        (259, {"size": 300, "multiple_of": 64}, 320),
        (250, {"init": "mean"}, 259),  # a tokenizer that has grown already
    ],
)
def test_the_size(rows: int, options: dict[str, Any], size: int) -> None:
    _, extension = extend(byte_tokenizer(), section(**options), rows)
    assert (extension.old_size, extension.size, extension.known) == (rows, size, min(rows, 259))
    assert VocabularyExtension.from_json(json.loads(json.dumps(extension.to_json()))) == extension


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (259, {"tokens": ["ab", "a"]}, "the tokenizer has 'a' already"),
        (259, {"tokens": ["<pad>"]}, "the tokenizer has '<pad>' already"),
        (259, {"tokens": [" "]}, "the tokenizer has ' ' already"),  # as a byte's symbol
        (259, {"tokens": ["ab"], "size": 259}, "size=259 is below what the tokenizer needs, 260"),
        (300, {"size": 299}, "size=299 is below the 300 rows of the model's files"),
        (258, {}, "the model has no rows for '<|im_start|>' of the tokenizer"),
    ],
)
def test_what_cannot_be_is_one_sentence(rows: int, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError) as caught:
        extend(byte_tokenizer(), section(**options), rows)
    assert said in str(caught.value)


# -- their values ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("matrices")
    torch.manual_seed(0)
    matrix, bias = torch.randn(OLD, 6), torch.randn(OLD)
    save_file({"matrix": matrix, "half": matrix.bfloat16(), "bias": bias}, folder / "model.safetensors")
    return folder


@given(box=st.tuples(*[st.tuples(st.integers(0, end), st.integers(0, end)).map(sorted) for end in (SIZE, 6)]))
def test_any_box_is_that_of_the_whole(files: Path, box: Any) -> None:
    rows, columns = map(tuple, box)
    checkpoint = ExtendedCheckpoint(Checkpoint.open(files), EXTENSION, ["matrix", "half", "bias"])
    for key, matrix in tensors(files).items():
        assert checkpoint.shape(key) == (SIZE, *matrix.shape[1:])
        expected = with_new_rows(matrix)
        found = checkpoint.read(key, (rows, columns)[: matrix.ndim])
        assert found.dtype == matrix.dtype
        assert torch.equal(found, expected[(slice(*rows), slice(*columns))[: matrix.ndim]])


def test_the_mean_is_taken_a_block_at_a_time(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_extension, "BLOCK", 60)  # ten rows
    boxes = []
    monkeypatch.setattr(Checkpoint, "read", counting(Checkpoint.read, boxes))
    checkpoint = ExtendedCheckpoint(Checkpoint.open(files), EXTENSION, ["matrix"])
    row = checkpoint.read("matrix", ((40, 41), (0, 6)))
    checkpoint.read("matrix", ((40, 43), (0, 6)))  # of which it is kept
    assert torch.equal(row[0], with_new_rows(tensors(files)["matrix"])[40])
    assert [box[0] for box in boxes] == [(0, 10), (10, 20), (20, 30), (30, 33)]


def counting(read: Any, boxes: list[Any]) -> Any:
    def counted(self: Checkpoint, key: str, box: Any) -> torch.Tensor:
        boxes.append(box)
        return read(self, key, box)

    return counted


# -- in a model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama_tied", "fused", "gpt2", "mixtral", "phi"])
def test_every_matrix_with_a_row_for_each_token_grows_and_nothing_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIGS, "phi", ("phi", LLAMA))  # whose head has a bias
    write(tmp_path / "old", name)
    config = config_of(name)
    config.vocab_size = SIZE
    model = build_model(family_of(name), config, str(tmp_path / "old"), vocabulary=EXTENSION)
    (tmp_path / "new").mkdir()
    save_pretrained(tmp_path / "new", model, None, dtype=torch.float32)
    before, after = tensors(tmp_path / "old"), tensors(tmp_path / "new")
    grown = {key for key, value in before.items() if value.shape[0] == OLD}
    assert len(grown) == {"llama_tied": 1, "gpt2": 1, "phi": 3}.get(name, 2)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(after[key], with_new_rows(value) if key in grown else value), key
    assert model.config.vocab_size == SIZE
    assert model.get_input_embeddings().weight.shape[0] == SIZE


def test_files_that_do_not_fit_are_refused_as_ever(tmp_path: Path) -> None:
    write(tmp_path, "llama")
    config = config_of("llama")
    config.vocab_size = SIZE
    with pytest.raises(ModelError, match=r"shape of .*: \[37, 16\] in the file, \[36, 16\] in the model"):
        build_model(family_of("llama"), config, str(tmp_path), vocabulary=VocabularyExtension(36, SIZE, 30, {}))


def test_a_matrix_that_lies_in_pieces_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "fused")
    halves = Source("embeddings", lambda config: [(10, config.vocab_size), (0, 10)])
    family = StockFamily("fused", stock_type="llama", weights={**FUSED.weights, "model.embed_tokens.weight": halves})
    config = config_of("llama")
    config.vocab_size = SIZE
    with pytest.raises(ModelError, match=r"embed_tokens.weight .* does not have one row for each token in the files"):
        build_model(family, config, str(tmp_path), vocabulary=EXTENSION)


def test_it_stands_beside_an_adapter(tmp_path: Path) -> None:
    for extension in (None, EXTENSION):
        describe_adapter(tmp_path, "lora", "", extension)
        assert base_of_adapter(tmp_path).vocabulary == extension


def test_transformers_reads_what_was_written(tmp_path: Path) -> None:
    write(tmp_path / "old", "llama")
    config = config_of("llama")
    config.vocab_size = SIZE
    model = build_model(family_of("llama"), config, str(tmp_path / "old"), vocabulary=EXTENSION)
    (tmp_path / "new").mkdir()
    save_pretrained(tmp_path / "new", model, None, dtype=torch.float32)
    assert AutoConfig.from_pretrained(tmp_path / "new").vocab_size == SIZE
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32).eval()
    ids = torch.arange(SIZE - 20, SIZE)[None]
    assert torch.equal(read(ids).logits, model(ids).logits)
