"""Prompt, p- and prefix tuning and LLaMA-Adapter on a tiny llama against peft's own model: start, logits, text."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from collie_core.api import ModelError, ParallelConfig
from collie_peft.llama_adapter import LlamaAdapter
from collie_peft.llama_adapter_config import LlamaAdapterConfig
from collie_peft.prompt import ENCODER, PrefixTuningAdapter, PromptTuningAdapter, PTuningAdapter
from collie_peft.prompt_config import PrefixTuningConfig, PromptTuningConfig, PTuningConfig

METHODS: dict[str, tuple[type[Any], type[Any], type[Any], dict[str, Any]]] = {
    "prompt": (PromptTuningAdapter, PromptTuningConfig, peft.PromptTuningConfig, {"num_virtual_tokens": 5}),
    "words": (
        PromptTuningAdapter,
        PromptTuningConfig,
        peft.PromptTuningConfig,
        {"num_virtual_tokens": 3, "prompt_tuning_init": "SAMPLE_VOCAB"},
    ),
    "mlp": (PTuningAdapter, PTuningConfig, peft.PromptEncoderConfig, {"num_virtual_tokens": 5}),
    "lstm": (
        PTuningAdapter,
        PTuningConfig,
        peft.PromptEncoderConfig,
        {"num_virtual_tokens": 5, "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8},
    ),
    "prefix": (PrefixTuningAdapter, PrefixTuningConfig, peft.PrefixTuningConfig, {"num_virtual_tokens": 5}),
    "projected": (
        PrefixTuningAdapter,
        PrefixTuningConfig,
        peft.PrefixTuningConfig,
        {"num_virtual_tokens": 5, "prefix_projection": True},
    ),
    "llama": (
        LlamaAdapter,
        LlamaAdapterConfig,
        peft.AdaptionPromptConfig,
        {"adapter_len": 4, "adapter_layers": 2},
    ),
}
IDS = torch.arange(14).view(2, 7)


def tiny(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    options = {**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, **changes}
    return LlamaForCausalLM(LlamaConfig(**options)).eval()


def adapter(method: str) -> Any:
    return METHODS[method][0]()


def config(method: str) -> Any:
    _, ours, _, options = METHODS[method]
    return ours(**options)


def with_adapter(method: str) -> Any:
    """Ours, with values that are not those of the start."""
    torch.manual_seed(1)
    model = adapter(method).attach(tiny(), config(method))
    with torch.no_grad():
        for value in trained(model):
            value.add_(0.1)
    return model


def trained(model: Any) -> list[torch.Tensor]:
    return [value for value in model.parameters() if value.requires_grad]


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of the tokens, without those of virtual ones, which peft gives too."""
    return model(IDS).logits[:, -IDS.shape[1] :]  # type: ignore[no-any-return]


def written(model: Any, mask: torch.Tensor, **options: Any) -> torch.Tensor:
    ids = IDS[: len(mask)]
    options |= {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=mask, **options)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:Position ids are not supported", "ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("method", METHODS)
def test_it_starts_computes_and_writes_as_in_peft(method: str) -> None:
    _, _, theirs, options = METHODS[method]
    torch.manual_seed(1)
    expected = peft.get_peft_model(tiny(), theirs(task_type="CAUSAL_LM", **options)).eval()
    torch.manual_seed(1)
    model = adapter(method).attach(tiny(), config(method))
    assert [value.tolist() for value in trained(model)] == [value.tolist() for value in trained(expected)]
    with torch.no_grad():
        for own, other in zip(trained(model), trained(expected), strict=True):
            own.add_(0.1)
            other.add_(0.1)
    assert (logits(model) - logits(tiny())).abs().max() > 1e-4
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-6)
    padded = torch.ones_like(IDS)
    padded[0, :3] = 0
    for mask in (torch.ones_like(IDS), padded):
        assert torch.equal(written(model, mask), written(expected, mask))
    assert torch.equal(written(model, padded, num_beams=3), written(expected, padded, num_beams=3))
    assert torch.equal(written(model, IDS[:1] * 0 + 1, use_cache=False), written(model, IDS[:1] * 0 + 1))


@pytest.mark.parametrize("method", METHODS)
def test_saved_loaded_and_read_by_peft(method: str, tmp_path: Path) -> None:
    model = with_adapter(method)
    adapter(method).save(model, tmp_path, state_of(model))
    by_peft = peft.PeftModel.from_pretrained(tiny(), str(tmp_path)).eval()
    torch.testing.assert_close(logits(by_peft), logits(model), rtol=0, atol=1e-6)
    loaded = adapter(method).load(tiny(), tmp_path)
    loaded.load_state_dict(dict(adapter(method).state(tmp_path)), strict=False)
    assert torch.equal(logits(loaded), logits(model))
    assert len(trained(loaded)) == len(trained(model))  # the encoder is there again


@pytest.mark.parametrize("method", ["mlp", "projected"])
def test_what_peft_wrote_goes_on_without_the_encoder_that_it_drops(method: str, tmp_path: Path) -> None:
    model = with_adapter(method)
    adapter(method).save(model, tmp_path, state_of(model))
    (tmp_path / ENCODER).unlink()
    loaded = adapter(method).load(tiny(), tmp_path)
    loaded.load_state_dict(dict(adapter(method).state(tmp_path)), strict=False)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
    (only,) = trained(loaded)
    assert only.shape[0] == 5
    again = tmp_path / "again"
    again.mkdir()
    adapter(method).save(loaded, again, state_of(loaded))
    assert torch.equal(load_file(again / "adapter_model.safetensors")["prompt_embeddings"], only.detach())


def test_a_prompt_of_words_starts_at_their_embeddings(tmp_path: Path) -> None:
    from collie_core.data.tokenizer import byte_tokenizer

    byte_tokenizer().save_pretrained(tmp_path)
    model = tiny(vocab_size=259)
    options: dict[str, Any] = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "ab"}
    chosen = PromptTuningConfig(num_virtual_tokens=5, tokenizer_name_or_path=str(tmp_path), **options)
    model = PromptTuningAdapter().attach(model, chosen)
    words = model.get_input_embeddings().weight[[97, 98, 97, 98, 97]]
    assert torch.equal(trained(model)[0], words)
    with pytest.raises(ModelError, match="adapter: "):
        PromptTuningAdapter().attach(tiny(), PromptTuningConfig(tokenizer_name_or_path=str(tmp_path / "no"), **options))


def test_what_is_refused(tmp_path: Path) -> None:
    def run(**changes: Any) -> Any:
        there = {"packing": False, "sequence_parallel": False, "gradient_checkpointing": "none", **changes}
        return SimpleNamespace(
            data=SimpleNamespace(packing=there["packing"]),
            parallel=ParallelConfig(tensor_parallel_size=2, sequence_parallel=there["sequence_parallel"]),
            model=SimpleNamespace(gradient_checkpointing=there["gradient_checkpointing"]),
        )

    prefix = PrefixTuningConfig()
    assert "data.packing=false" in prefix.refused(run(packing=True))
    assert "sequence_parallel=false" in PTuningConfig().refused(run(sequence_parallel=True))
    assert "gradient_checkpointing=none" in prefix.refused(run(gradient_checkpointing="full"))
    assert not PromptTuningConfig().refused(run(gradient_checkpointing="full"))
    assert "set tensor_parallel_size to 1" in LlamaAdapterConfig().refused(run())
    with pytest.raises(ValidationError, match="need each other"):
        PromptTuningConfig(prompt_tuning_init="TEXT")
    with pytest.raises(ValidationError, match="an MLP has 2"):
        PTuningConfig(encoder_num_layers=3)
    with pytest.raises(ModelError, match="adapter_layers=4, but the model has 3 layers"):
        LlamaAdapter().attach(tiny(), LlamaAdapterConfig(adapter_layers=4))
    with pytest.raises(ModelError, match="a layer has no 'attn'"):
        LlamaAdapter().attach(tiny(), LlamaAdapterConfig(adapter_layers=1, target_modules="attn"))
    model = with_adapter("prompt")
    adapter("prompt").save(model, tmp_path, state_of(model))
    with pytest.raises(ModelError, match="it describes no PrefixTuningConfig"):
        adapter("prefix").load(tiny(), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot be read"):
        adapter("prompt").state(tmp_path)
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(options | {"peft_type": "none"}))
    with pytest.raises(ModelError, match=r"adapter_config\.json cannot be read"):
        adapter("prompt").load(tiny(), tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    assert list(adapter("prompt").state(tmp_path)) == ["other"]  # which the core then finds no place for
