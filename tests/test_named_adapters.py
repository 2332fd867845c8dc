"""Several adapters on one base model, by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import runs
import torch
from families import reference, write_family
from runs import sections_on
from transformers import AutoTokenizer

from collie_core.api import ModelError, RunConfig, Topology, folders_by_name, with_adapters
from collie_core.cli import main
from collie_core.model.build import new_model
from collie_core.model.stages import borrow_head, lend

FAMILY = "llama_tied"
METHODS: list[dict[str, Any]] = [
    {"type": "lora", "name": "low-rank", "target_modules": ["q_proj", "down_proj"]},
    {"type": "prefix_tuning", "name": "prefix", "num_virtual_tokens": 5},
    {"type": "ia3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
]
IDS = torch.arange(5, 45)[None]


def train(family: Path, data: Path, output: Path) -> None:
    for method in METHODS:
        sections = sections_on("dp1", family, data, output / method["type"], steps=2, micro_batch=4)
        runs.train(sections | {"adapter": method, "optimizer": {"type": "adamw", "lr": 1e-2}})


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family") / FAMILY
    write_family(folder, FAMILY)
    return folder


@pytest.fixture(scope="module")
def saved(family: Path, tmp_path_factory: pytest.TempPathFactory, instructions: Path, zygote: Any) -> dict[str, Path]:
    output = tmp_path_factory.mktemp("adapters")
    zygote.run(__file__, "train", world_size=1, args=(family, instructions, output))
    return {method.get("name", "model"): output / method["type"] / "run" / "model" for method in METHODS}


def logits_on(topology: str, family: Path, folders: dict[str, Path]) -> dict[str, torch.Tensor]:
    """Of the base alone, with each adapter, and of the base again; from the rank that has them."""
    config = RunConfig(**sections_on(topology, family, family, family, steps=1, micro_batch=4))
    ranks = Topology.start(config.parallel)
    tokenizer = AutoTokenizer.from_pretrained(family)
    base = new_model(config.model, config.registry, tokenizer, torch.float32, topology=ranks)
    borrow_head(base)
    lend(base)
    models = with_adapters(base, folders, config.registry, ranks)
    own = {id(value) for value in base.parameters()}
    assert all(own <= {id(value) for value in model.parameters()} for model in models.values())
    with torch.no_grad():
        every = {"base": base, **models, "base again": base}
        return {name: model.eval()(input_ids=IDS).logits for name, model in every.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("topology", ["dp1", "tp2", "pp2"])
def test_each_answers_as_in_peft_and_the_base_as_before(
    topology: str, family: Path, saved: dict[str, Path], zygote: Any
) -> None:
    size = 1 if topology == "dp1" else 2
    found = zygote.run(__file__, "logits_on", world_size=size, args=(topology, family, saved))[-1]
    assert torch.equal(found["base"], found["base again"])
    for name, folder in saved.items():
        theirs = peft.PeftModel.from_pretrained(reference(family, FAMILY), folder, adapter_name=name).eval()
        with torch.no_grad():
            torch.testing.assert_close(found[name], theirs(input_ids=IDS).logits, rtol=0, atol=1e-5)
        assert not torch.equal(found[name], found["base"])


def test_names_are_given_saved_or_those_of_folders(saved: dict[str, Path], family: Path, tmp_path: Path) -> None:
    low, prefix, nameless = saved.values()
    assert folders_by_name(map(str, saved.values())) == saved
    assert list(folders_by_name([f"a={low}", str(prefix), str(nameless)])) == ["a", "prefix", "model"]
    theirs = peft.PeftModel.from_pretrained(reference(family, FAMILY), low, adapter_name="one")
    theirs.load_adapter(str(low), adapter_name="two")
    theirs.save_pretrained(str(tmp_path / "peft"))
    assert list(folders_by_name([str(tmp_path / "peft")])) == ["one", "two"]


def test_what_cannot_be_told_apart_is_one_sentence(
    saved: dict[str, Path], family: Path, tmp_path: Path, capsys: Any
) -> None:
    low, _, nameless = saved.values()
    command = ["generate", "Hello", "--model", str(family), "--max-new-tokens", "2"]
    assert main([*command, "--adapter", str(low), "--adapter", f"low-rank={nameless}"]) == 2
    assert capsys.readouterr().err == (
        f"two adapters are called low-rank: {low} and {nameless}; write NAME={nameless} to give one another name\n"
    )
    shutil.copytree(low, tmp_path / "several" / "a")
    shutil.copytree(low, tmp_path / "several" / "b")
    with pytest.raises(ModelError, match=r"has adapters in folders below it; name one: .*/a, .*/b"):
        folders_by_name([f"x={tmp_path / 'several'}"])
    with pytest.raises(ModelError, match="holds no adapter"):
        folders_by_name([str(family)])


def test_the_command_line_shows_the_answer_of_each(saved: dict[str, Path], family: Path, capsys: Any) -> None:
    command = ["generate", "Hello", "--model", str(family), "--max-new-tokens", "3"]
    adapters = [word for folder in saved.values() for word in ("--adapter", str(folder))]
    assert main([*command, *adapters]) == 0
    answers = capsys.readouterr().out
    assert all(f"[{name}] " in answers for name in saved)
    assert main([*command, *adapters[:2]]) == 0
    assert f"[low-rank] {capsys.readouterr().out}" in answers
