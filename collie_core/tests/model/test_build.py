"""Models from folders and from architectures: what does not fit is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from collie_core.config.model import ModelConfig
from collie_core.config.tokenizer import TokenizerConfig
from collie_core.data.tokenizer import build_tokenizer
from collie_core.errors import ModelError
from collie_core.model.build import architecture, build_model, check_length, compute_dtype, parameter_counts
from collie_core.model.family import StockFamily
from collie_core.plugins import Plugins

SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=300, tie_word_embeddings=True, **SHAPE)).save_pretrained(tmp_path)
    return tmp_path


def byte_tokenizer() -> Any:
    return build_tokenizer(TokenizerConfig(type="byte"), ModelConfig())


def load(folder: Path) -> PreTrainedModel:
    section = ModelConfig(model_name_or_path=str(folder))
    family, config = architecture(section, Plugins.discover(), byte_tokenizer())
    config.dtype = torch.float32
    return build_model(family, config, str(folder))


def change(folder: Path, edit: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_loads_as_transformers_loads_it(folder: Path) -> None:
    ours, theirs = load(folder), LlamaForCausalLM.from_pretrained(folder)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    assert ours.get_input_embeddings().weight is ours.get_output_embeddings().weight
    assert parameter_counts(ours)[0] == sum(value.numel() for value in theirs.parameters())


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda weights: weights.pop(NORM), rf"missing: {NORM}"),
        (lambda weights: weights.update(extra=torch.ones(1)), r"unexpected: extra"),
        (lambda weights: weights.update({NORM: torch.ones(7)}), rf"shape of {NORM}: \[7\] in the file, \[16\]"),
        (lambda weights: weights[NORM].fill_(float("nan")), rf"not finite: {NORM}"),
    ],
)
def test_a_weight_that_does_not_fit_is_named(folder: Path, edit: Any, said: str) -> None:
    change(folder, edit)
    with pytest.raises(ModelError, match=said):
        load(folder)


def test_a_torn_file_is_one_sentence(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ModelError, match="cannot load the weights"):
        load(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        load(folder)


def test_an_index_may_not_leave_its_folder(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {NORM: "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"points outside its folder: '\.\./outside\.safetensors'"):
        load(folder)


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        load(tmp_path)


def from_config(**options: Any) -> tuple[Any, Any]:
    section = ModelConfig(config={"model_type": "llama", **SHAPE, **options})
    return architecture(section, Plugins.discover(), byte_tokenizer())


def test_random_weights_depend_on_the_random_state_alone() -> None:
    family, config = from_config()
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(build_model(family, config, None))
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(first, second)


def test_the_vocabulary_and_special_tokens_come_from_the_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    _, config = from_config()
    assert config.vocab_size == len(tokenizer)
    assert config.eos_token_id == tokenizer.eos_token_id


def test_an_unknown_key_of_the_architecture_has_its_neighbour_named() -> None:
    with pytest.raises(ModelError, match=r"hiden_size \(did you mean hidden_size\?\)"):
        from_config(hiden_size=3)


def test_a_key_that_transformers_translates_is_known() -> None:
    _, config = from_config(rope_theta=5000.0)
    assert config.rope_parameters["rope_theta"] == 5000.0


def test_a_wrong_type_in_the_architecture_is_one_sentence() -> None:
    with pytest.raises(ModelError, match=r"hidden_size.*expected int"):
        from_config(hidden_size="x")


def test_an_unknown_family_is_one_sentence() -> None:
    with pytest.raises(ModelError, match="nonesuch"):
        StockFamily("nonesuch").make_config({})


def test_a_tokenizer_larger_than_the_vocabulary_is_refused() -> None:
    with pytest.raises(ModelError, match="vocabulary only 100"):
        from_config(vocab_size=100)


def test_more_positions_than_the_model_has_are_refused() -> None:
    _, config = from_config(max_position_embeddings=64)
    check_length(config, 64)
    with pytest.raises(ModelError, match=r"max_length=65.*set data\.max_length to at most 64"):
        check_length(config, 65)


def test_auto_precision_on_the_cpu_is_float32() -> None:
    assert compute_dtype("auto", torch.device("cpu")) == torch.float32
    assert compute_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
