"""AdaLoRA on a tiny random llama: the equations, the budget, what is written and read, what is refused."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from collie_core.api import Can, ModelError, RunError, ShardedAdapter, Topology
from collie_peft.adalora import (
    AdaLoraAdapter,
    Schedule,
    config_of,
    layers_of,
    masks_of,
    most_important,
    penalty_gradient,
)
from collie_peft.adalora_config import AdaLoraConfig, unreachable
from collie_peft.injected import NAME

SMALL: dict[str, Any] = {"target_r": 2, "init_r": 4, "target_modules": ["q_proj", "down_proj"]}


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def attach(**options: Any) -> Any:
    return AdaLoraAdapter().attach(tiny(), AdaLoraConfig.model_validate({"type": "adalora", **SMALL, **options}))


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits  # type: ignore[no-any-return]


def filled(model: Any, seed: int = 1) -> Any:
    """With values that are not those of the start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in trainable(model).values():
            value.add_(0.5 * torch.randn_like(value))
    return model


def run_of(model: Any, steps: int = 6, saved: str | None = None, **facts: Any) -> Any:
    adapter = SimpleNamespace(adapter_name_or_path=saved, total_step=None)
    config = SimpleNamespace(adapter=adapter)
    run = {"config": config, "topology": Topology(), "model": model, "max_steps": steps, "step": 0}
    return SimpleNamespace(**run, facts=facts, metrics={})


def step(run: Any, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.arange(8)[None]
    run.model(ids, labels=ids).loss.backward()
    AdaLoraAdapter().collie_before_update(run)
    optimizer.step()
    optimizer.zero_grad()
    run.step += 1
    AdaLoraAdapter().collie_after_step(run)


def ranks(model: Any) -> list[int]:
    return [sum(masks_of(layer)) for layer in layers_of(model).values()]


# -- the section ----------------------------------------------------------------------------------------------------


def test_fields_have_the_names_and_defaults_of_peft() -> None:
    theirs = {field.name: field for field in fields(peft.AdaLoraConfig)}
    for name, field in AdaLoraConfig.model_fields.items():
        if name not in AdaLoraConfig.for_the_core:
            factory, default = theirs[name].default_factory, theirs[name].default
            assert field.default == (default if factory is MISSING else factory()), name


@pytest.mark.parametrize(
    ("field", "value"),
    [("target_r", 0), ("init_r", -1), ("tinit", -1), ("deltaT", 0), ("beta1", 1.0), ("beta2", 0), ("r", 8)],
)
def test_wrong_values_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        AdaLoraConfig.model_validate({"type": "adalora", field: value})
    assert {error["loc"][0] for error in caught.value.errors()} == {field}


def sections(zero_stage: int = 0, steps: int | None = 10, dtype: str = "auto", fuses: bool = False) -> Any:
    can = SimpleNamespace(fuses_backward=True) if fuses else Can()
    return SimpleNamespace(
        parallel=SimpleNamespace(zero_stage=zero_stage),
        optimizer=SimpleNamespace(type="lomo"),
        registry=SimpleNamespace(component=lambda kind, name: SimpleNamespace(can=can)),
        model=SimpleNamespace(dtype=dtype),
        train=SimpleNamespace(max_steps=steps),
    )


def test_what_is_refused() -> None:
    def why(run: Any, **options: Any) -> str:
        return AdaLoraConfig.model_validate({"type": "adalora", **options}).refused(run)

    assert not why(sections())
    assert not why(sections(), tinit=4, tfinal=5, total_step=10)
    assert "set parallel.zero_stage to 0" in why(sections(zero_stage=2))
    assert "lomo drops them in backward" in why(sections(fuses=True))
    assert "float16 scales by a changing factor" in why(sections(dtype="float16"))
    assert "target_r=16 is above init_r=12" in why(sections(), target_r=16)
    assert "tinit=4 and tfinal=6 leave none of 10 steps" in why(sections(), tinit=4, tfinal=6)
    assert "leave none of 8 steps" in why(sections(steps=None), tinit=4, tfinal=4, total_step=8)
    assert "the run of 10 steps ends before" in why(sections(), total_step=100)
    assert not why(sections(steps=None), tinit=4, tfinal=6)  # found when the run starts
    assert not why(sections(), adapter_name_or_path="x")
    assert not unreachable(1, 90, 100, 10)


# -- the equations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 16), (3, 1), (2, 2)])
def test_the_gradient_of_the_penalty_is_that_of_autograd(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    rows = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.norm(rows @ rows.T - torch.eye(shape[0], dtype=torch.float64), p="fro").backward()
    torch.testing.assert_close(penalty_gradient(rows.detach()), rows.grad)
    assert not penalty_gradient(torch.eye(3)).any()  # there it has no gradient


def test_the_budget_goes_to_the_highest_scores_of_all_layers() -> None:
    scores = {"b": [3.0, 1.0, 4.0], "a": [1.0, 5.0, 0.0]}
    assert most_important(scores, 3) == {"b": [True, False, True], "a": [False, True, False]}
    assert most_important(scores, 4) == {"b": [True, False, True], "a": [True, True, False]}  # equal: by name
    assert most_important(scores, 6) == {name: [True] * 3 for name in scores}
    assert most_important(scores, 0) == {name: [False] * 3 for name in scores}


def test_scores_and_masks_are_those_of_peft() -> None:
    model = filled(attach(target_modules=["q_proj", "v_proj", "up_proj"], orth_reg_weight=0.0))
    layers, config = layers_of(model), config_of(model)
    masks = {name: masks_of(layer) for name, layer in layers.items()}
    schedule = Schedule(model, layers, config, masks, last=9)
    ids = torch.arange(8)[None]
    for number in (1, 2):
        model(ids, labels=ids).loss.backward()
        schedule.before_update(number)
    pattern = schedule.allocator.mask_to_budget(model, 13)  # peft's own
    found = most_important({name: schedule.score(name).tolist() for name in layers}, 13)
    assert {f"{name}.lora_E.{NAME}": mask for name, mask in found.items()} == pattern
    assert sum(ranks(model)) == 13


# -- a run ----------------------------------------------------------------------------------------------------------


def test_the_model_starts_as_it_was_and_only_the_adapter_is_trained() -> None:
    model = attach()
    assert all(("lora_" in name) == value.requires_grad for name, value in model.named_parameters())
    assert torch.equal(logits(model), logits(tiny()))


@pytest.mark.parametrize(
    ("delta", "expected"),
    [(1, [16, 11, 9, 8, 8, 8]), (3, [16, 16, 9, 16, 8, 8])],  # from one allocation to the next they may come back
)
def test_the_budget_shrinks_over_the_run(delta: int, expected: list[int]) -> None:
    model = attach(tinit=1, tfinal=1, deltaT=delta)
    run = run_of(model)
    AdaLoraAdapter().collie_run_start(run)
    assert config_of(model).total_step == 6
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    seen, left = [], []
    for _ in range(6):
        step(run, optimizer)
        seen.append(run.metrics["adalora_rank"])
        left.append(sum(ranks(model)))
    assert seen == [16, 11, 9, 8, 8, 8]  # 8 + (16 - 8) (1 - (t - 1) / 4)^3
    assert left == expected
    assert not model.collie_adalora.allocator.exp_avg_ipt  # memory of the schedule is given back


def test_an_allocation_of_everything_and_a_start_without_scores_work() -> None:
    for options in ({"target_r": 4}, {"orth_reg_weight": 0.0}):  # at first every score is 0
        model = attach(**options)
        run = run_of(model, steps=4)
        AdaLoraAdapter().collie_run_start(run)
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.5)
        for _ in range(4):
            step(run, optimizer)
        assert sum(ranks(model)) == 4 * options.get("target_r", 2)


def test_what_a_run_cannot_do_ends_it_at_its_start() -> None:
    adapter = AdaLoraAdapter()
    with pytest.raises(RunError, match="adapter: tinit=2 and tfinal=2 leave none of 4 steps"):
        adapter.collie_run_start(run_of(attach(tinit=2, tfinal=2), steps=4))
    with pytest.raises(RunError, match="float16"):
        adapter.collie_run_start(run_of(attach(), precision="float16"))
    with pytest.raises(RunError, match="the model has no AdaLoRA layer"):
        adapter.collie_run_start(run_of(tiny()))
    run = run_of(attach())
    adapter.collie_run_start(run)
    with pytest.raises(RunError, match="has dropped the gradients"):
        adapter.collie_before_update(run)


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"], "lora_dropout": 0.1}])
def test_a_pruned_adapter_loads_in_peft_and_back(tmp_path: Path, options: dict[str, Any]) -> None:
    model = filled(attach(tinit=1, **options))
    run = run_of(model)
    AdaLoraAdapter().collie_run_start(run)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    for _ in range(6):
        step(run, optimizer)
    assert sum(ranks(model)) == 8
    state = {name: value.detach() for name, value in trainable(model).items()}
    AdaLoraAdapter().save(model, tmp_path, state)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["total_step"], written["rank_pattern"]) == ("ADALORA", 6, None)
    loaded = peft.PeftModel.from_pretrained(tiny(), str(tmp_path))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
    assert not torch.equal(logits(loaded), logits(tiny()))
    torch.testing.assert_close(logits(loaded.merge_and_unload()), logits(model), rtol=0, atol=1e-5)
    read = AdaLoraAdapter().state(tmp_path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], value) for name, value in state.items())


def by_peft(path: Path, *, prune: bool) -> tuple[Any, torch.Tensor]:
    """An adapter that peft has trained and written, and its logits."""
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=20, tinit=1, **SMALL)
    model = filled(peft.get_peft_model(tiny(), config))
    if prune:
        ids = torch.arange(8)[None]
        for number in range(1, 21):
            model(ids, labels=ids).loss.backward()
            model.base_model.update_and_allocate(number)
            model.zero_grad()
    model.save_pretrained(str(path))
    return model, logits(model)


@pytest.mark.parametrize("prune", [False, True])
def test_an_adapter_of_peft_is_read_and_goes_on(tmp_path: Path, prune: bool) -> None:
    theirs, expected = by_peft(tmp_path, prune=prune)
    shapes = {tuple(v.shape) for k, v in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_E" in k}
    assert (shapes == {(4, 1)}) != prune  # peft leaves pruned triplets out
    model = AdaLoraAdapter().load(tiny(), tmp_path)
    model.load_state_dict(dict(AdaLoraAdapter().state(tmp_path)), strict=False)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    before = [masks_of(layer) for layer in layers_of(model).values()]
    assert before == [masks_of(layer) for layer in layers_of(theirs).values()]
    run = run_of(model, steps=4, saved=str(tmp_path))
    AdaLoraAdapter().collie_run_start(run)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    for _ in range(4):
        step(run, optimizer)
    after = [masks_of(layer) for layer in layers_of(model).values()]
    assert (after == before) == prune  # a pruned one keeps its ranks, another one begins with the schedule
    assert sum(ranks(model)) == 8
    assert config_of(model).total_step == (20 if prune else 4)


def test_it_is_computed_whole() -> None:
    assert not isinstance(AdaLoraAdapter(), ShardedAdapter)


def test_wrong_names_are_refused() -> None:
    with pytest.raises(ModelError, match="did you mean q_proj"):
        attach(target_modules=["q_prj"])
    with pytest.raises(ModelError, match=r"adapter: "):
        attach(target_modules=["norm"])
