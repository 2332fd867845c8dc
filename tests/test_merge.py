"""`collie merge`: the model of base and adapter, against peft's own, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import reference, write_family
from safetensors.torch import load_file, save_file

from collie_core.cli import main
from collie_core.model.adapters import trainable
from collie_core.model.build import describe_adapter
from collie_peft.ia3 import Ia3Adapter
from collie_peft.ia3_config import Ia3Config
from collie_peft.lora import LoraAdapter
from collie_peft.lora_config import LoraConfig

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, tuple[Any, Any]] = {
    "lora": (LoraAdapter(), LoraConfig(target_modules=LINEAR, rank_pattern={"q_proj": 2}, use_rslora=True)),
    "dora": (LoraAdapter(), LoraConfig(target_modules=["o_proj", "up_proj"], use_dora=True)),
    "head": (LoraAdapter(), LoraConfig(target_modules=["v_proj"], modules_to_save=["lm_head"])),
    "ia3": (Ia3Adapter(), Ia3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
}


def write_adapter(base: Path, family: str, name: str, folder: Path, *, size: float = 0.2) -> Path:
    """An adapter that is not zero, as a run writes it."""
    adapter, config = ADAPTERS[name]
    torch.manual_seed(0)
    model = adapter.attach(reference(base, family), config)
    state = {key: (value + size * torch.randn_like(value)).detach() for key, value in trainable(model).items()}
    if size == 0:
        state = {key: value.detach() for key, value in trainable(model).items()}
    folder.mkdir()
    adapter.save(model, folder, state)
    describe_adapter(folder, config.type, str(base))
    return folder


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "lora"), ("llama", "dora"), ("llama", "head"), ("llama_tied", "ia3"), ("internlm2", "lora")],
)
def test_it_is_what_peft_merges(family: str, name: str, tmp_path: Path, capsys: Any) -> None:
    base = tmp_path / "base"
    write_family(base, family, shards=3)
    adapter = write_adapter(base, family, name, tmp_path / "adapter")
    arguments = ["merge", "--base", str(base), "--adapter", str(adapter), "--out", str(tmp_path / "out"), "--verify"]
    assert main(arguments) == 0
    assert "its logits are those of the adapter" in capsys.readouterr().out
    by_peft = peft.PeftModel.from_pretrained(reference(base, family), str(adapter)).merge_and_unload()
    merged = reference(tmp_path / "out", family)
    torch.testing.assert_close(logits(merged), logits(by_peft), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(merged), logits(reference(base, family)), atol=1e-3)
    before, after = (keys_of(folder) for folder in (base, tmp_path / "out"))
    assert before == after  # names and types of the files
    assert (tmp_path / "out" / "tokenizer.json").exists()


def keys_of(folder: Path) -> dict[str, torch.dtype]:
    return {key: value.dtype for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def test_the_base_may_be_left_out_and_the_type_of_the_files_stays(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_family(base, "llama")
    (file,) = base.glob("*.safetensors")
    save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    # Small, since merged weights are rounded to bfloat16, and this random model magnifies what is rounded away.
    adapter = write_adapter(base, "llama", "lora", tmp_path / "adapter", size=0.02)
    assert main(["merge", "--adapter", str(adapter), "--out", str(tmp_path / "out"), "--verify"]) == 0
    assert set(keys_of(tmp_path / "out").values()) == {torch.bfloat16}


def refusal(capsys: Any, *arguments: str) -> str:
    assert main(["merge", *arguments]) != 0
    return str(capsys.readouterr().err)


def test_what_is_refused_leaves_nothing(tmp_path: Path, capsys: Any) -> None:
    base, other, out = tmp_path / "base", tmp_path / "other", tmp_path / "out"
    write_family(base, "llama")
    write_family(other, "llama", seed=1)
    zero = write_adapter(base, "llama", "lora", tmp_path / "zero", size=0)
    said = refusal(capsys, "--adapter", str(zero), "--out", str(out))
    assert "changes nothing: its update is zero" in said
    good = write_adapter(base, "llama", "lora", tmp_path / "good")
    said = refusal(capsys, "--base", str(other), "--adapter", str(good), "--out", str(out))
    assert "was trained on other weights" in said
    assert "holds no adapter" in refusal(capsys, "--adapter", str(base), "--out", str(out))
    assert not out.exists()
    out.mkdir()
    assert "exists already" in refusal(capsys, "--adapter", str(good), "--out", str(out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "good", "other", "out", "zero"]
