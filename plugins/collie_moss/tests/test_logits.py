"""moss-moon-003 computes what CodeGen does, is saved in the layout it came in, and is cut between heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from moss_files import MOSS, masks, random_tensors, stock, write
from safetensors.torch import load_file
from transformers import CodeGenForCausalLM, PreTrainedModel

from collie_core.api import ModelError, Plugins
from collie_core.config.model import ModelConfig
from collie_core.data.tokenizer import byte_tokenizer
from collie_core.model.build import empty_model, new_model
from collie_core.model.export import save_pretrained
from collie_core.model.partition import plan


def build(**section: Any) -> PreTrainedModel:
    return new_model(ModelConfig(**section), Plugins.discover(), byte_tokenizer(), torch.float32)


def test_published_files_are_read_and_saved_bit_for_bit(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    tensors = random_tensors(MOSS)
    write(source, MOSS, tensors | masks(MOSS))
    model = build(model_name_or_path=str(source))
    assert isinstance(model, CodeGenForCausalLM)
    ids = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = stock(source)(ids).logits
        assert expected.std() > 0.3
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    target.mkdir()
    save_pretrained(target, model, byte_tokenizer(), dtype=torch.float32)
    after = load_file(target / "model.safetensors")
    assert sorted(after) == sorted(tensors)
    for name, value in tensors.items():
        assert torch.equal(after[name], value), name
    assert json.loads((target / "config.json").read_text()) == MOSS


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rms_norm_eps": 1e-6}, "the meaning of rms_norm_eps is not known here"),  # of the 7B model, another family
        ({"wbits": 4}, "wbits=4 says that weights are quantized"),
    ],
)
def test_another_model_of_this_name_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    write(tmp_path, MOSS | change, {"x": torch.ones(1)})
    with pytest.raises(ModelError, match=said):
        build(model_name_or_path=str(tmp_path))


def test_the_four_blocks_of_heads_are_cut_between_heads() -> None:
    family: Any = Plugins.discover().load("model", "moss")
    published = MOSS | {"n_head": 24, "n_embd": 192, "n_layer": 1}  # 4 blocks of 6 heads of 8, as moss-moon-003 has 6
    config = family.make_config(published)
    config.dtype = torch.float32
    model = empty_model(family, config)
    rule = plan(model, family, tensor_size=3).placements["transformer.h.0.attn.qkv_proj.weight"].rule
    assert rule is not None
    assert rule.intervals(3, 1) == [(48 * block + 16, 48 * block + 32) for block in range(12)]
    with pytest.raises(ModelError, match=r"_size=4 cannot share .*qkv_proj.* blocks of 6; sizes that can: 1, 2, 3, 6"):
        plan(model, family, tensor_size=4)
