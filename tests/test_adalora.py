"""AdaLoRA on every topology against peft's own model and allocator in a plain torch loop, in the paper's order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from combos import more
from families import reference, write_family
from peft.tuners.adalora import RankAllocator
from plain import PlainRun
from runs import changed, largest_difference, sections_on
from topologies import world_size_of
from torch.nn import functional as F

from collie_core.api import ConfigError, ModelError, RunConfig, Trainer
from collie_core.cli import main

STEPS, BATCH, SEED = 8, 8, 7
CLIP = 0.1  # so low that sensitivities of clipped gradients would be others
OPTIONS: dict[str, Any] = {
    "target_r": 2,
    "init_r": 4,
    "tinit": 2,
    "tfinal": 2,
    "lora_alpha": 16,
    "target_modules": ["v_proj", "o_proj", "up_proj", "down_proj"],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama_tied": OPTIONS,
    "internlm2": OPTIONS | {"deltaT": 2, "orth_reg_weight": 0.1},
}
TOPOLOGIES = ["dp1", "tp2", "pp2", "tp2pp2", more("tp2dp2")]


class Ranks:
    """A callback that keeps what is left after every step, of this rank's layers."""

    def __init__(self, end: int | None = None) -> None:
        self.end = end  # the run ends before the step after it
        self.left: list[dict[str, list[bool]]] = []
        self.losses: list[float] = []
        self.norms: list[float] = []

    def collie_before_step(self, run: Any) -> None:
        if run.step == self.end:
            raise KeyboardInterrupt

    def collie_after_step(self, run: Any, loss: Any) -> None:
        self.left.append(left(run.model))
        self.losses.append(loss.item())

    def collie_metrics(self, values: Any) -> None:
        self.norms.append(values["grad_norm"])


def left(model: Any) -> dict[str, list[bool]]:
    """Which singular values are not zero, by layer."""
    return {name: (value != 0).view(-1).tolist() for name, value in model.named_parameters() if ".lora_E." in name}


def train(topology: str, adapter: Any, model: Path, data: Path, output: Path, changes: dict[str, Any]) -> Any:
    """This rank's losses, norms and singular values."""
    sections = sections_on(topology, model, data, output, steps=STEPS, micro_batch=BATCH // 2)
    sections["train"] |= {"gradient_accumulation_steps": 2, "seed": SEED, "max_grad_norm": CLIP}
    sections["optimizer"] = {"type": "adamw", "lr": 1e-2, "weight_decay": 0.01}
    sections["adapter"] = {"type": "adalora", **adapter}
    end = changes.pop("end", None)
    seen = Ranks(end)
    try:
        Trainer(RunConfig(**changed(sections, changes)), callbacks=[seen], observers=()).train()
    except KeyboardInterrupt:
        assert end is not None
    return seen.losses, seen.norms, seen.left


def train_all(topology: str, folder: Path, data: Path, output: Path) -> Any:
    """One rank's numbers of every family."""
    return {
        family: train(topology, options, folder / family, data, output / family, {})
        for family, options in VARIANTS.items()
    }


class PeftRun(PlainRun):
    """Algorithm 1 with peft's model, penalty and allocator."""

    def __init__(self, base: Any, options: dict[str, Any]) -> None:
        super().__init__(steps=STEPS, batch=BATCH, lr=1e-2, clip=CLIP)
        torch.manual_seed(SEED)
        self.model = peft.get_peft_model(base, peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=STEPS, **options))
        self.allocator: RankAllocator = self.model.base_model.rankallocator
        self.last = STEPS - options["tfinal"]
        self.step = 1
        self.pattern: Any = None
        self.task_losses: list[float] = []
        self.left: list[dict[str, list[bool]]] = []

    def loss(self, model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        outputs = model(input_ids=ids, labels=labels)  # its loss is that of the task and the penalty
        self.task_losses.append(F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item())
        return outputs.loss

    def before_update(self, model: Any) -> None:
        if self.step <= self.last:
            self.allocator.update_ipt(model.base_model.model)

    def after_update(self, model: Any) -> None:
        inner = model.base_model.model
        budget, is_due = self.allocator.budget_schedule(self.step)
        if self.step == self.last or (self.step < self.last and is_due):
            self.pattern = self.allocator.mask_to_budget(inner, budget)
        elif self.step > self.last:
            self.allocator.mask_using_rank_pattern(inner, self.pattern)
        self.left.append(left(inner))
        self.step += 1


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(40)[None]).logits


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for name in VARIANTS:
        write_family(folder / name, name)
    return folder


@pytest.fixture(scope="session")
def plain(families: Path, instructions: Path) -> dict[str, tuple[PeftRun, torch.Tensor]]:
    found = {}
    for family, options in VARIANTS.items():
        run = PeftRun(reference(families / family, family), options)
        run.train(run.model, families / family, instructions)
        found[family] = (run, logits(run.model))
    return found


def together(ranks: list[list[dict[str, list[bool]]]]) -> list[dict[str, list[bool]]]:
    """The layers of all stages after each step; ranks that hold the same layer agree on it."""
    steps: list[dict[str, list[bool]]] = []
    for found in zip(*ranks, strict=True):
        whole: dict[str, list[bool]] = {}
        for part in found:
            assert all(whole.setdefault(name, mask) == mask for name, mask in part.items())
        steps.append(whole)
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_topology_allocates_ranks_as_peft_does(
    topology: str, zygote: Any, families: Path, plain: Any, instructions: Path, tmp_path: Path
) -> None:
    args = (topology, families, instructions, tmp_path)
    ranks = zygote.run(__file__, "train_all", world_size=world_size_of(topology), args=args, limit_s=300)
    for family in VARIANTS:
        run, expected = plain[family]
        losses, norms, _ = ranks[0][family]
        assert all(rank[family][0] == losses for rank in ranks), family
        assert losses[-1] < losses[0]
        assert largest_difference(losses, run.task_losses) <= 1e-5, family
        assert largest_difference(norms, run.norms) <= 1e-5 * max(1.0, *run.norms), family
        found = together([rank[family][2] for rank in ranks])
        assert found == run.left, family
        matrices = len(found[-1])
        assert matrices == 4 * 4
        counts = [sum(map(sum, step.values())) for step in found]
        assert counts[:2] == [0, 4 * matrices]  # the learning rate starts at 0
        assert counts[-3:] == [2 * matrices] * 3
        assert len({sum(mask) for mask in found[-1].values()}) > 1  # layers have got different ranks
        saved = tmp_path / family / "run" / "model"
        loaded = peft.PeftModel.from_pretrained(reference(families / family, family), str(saved))
        torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=0, atol=1e-5)


# -- with everything else -------------------------------------------------------------------------------------------


def run_one(zygote: Any, topology: str, adapter: Any, model: Path, data: Path, output: Path, **changes: Any) -> Any:
    """The losses, and the singular values of all stages."""
    args = (topology, adapter, model, data, output, {key.replace("__", "."): value for key, value in changes.items()})
    ranks = zygote.run(__file__, "train", world_size=world_size_of(topology), args=args, limit_s=300)
    assert all(rank[0] == ranks[0][0] for rank in ranks)
    return ranks[0][0], together([rank[2] for rank in ranks])


def test_options_are_the_same_on_a_stage_that_others_share(
    zygote: Any, families: Path, instructions: Path, tmp_path: Path
) -> None:
    adapter = OPTIONS | {"layers_to_transform": [1], "lora_dropout": 0.2}  # the second stage has nothing to train
    args = (adapter, families / "internlm2", instructions)
    losses, ranks = run_one(zygote, "dp1", *args, tmp_path / "one")
    everything = {"parallel__sequence_parallel": True, "model__gradient_checkpointing": "full"}
    found, found_ranks = run_one(zygote, "tp2pp2", *args, tmp_path / "many", **everything)
    assert largest_difference(found, losses) <= 1e-5
    assert found_ranks == ranks
    assert sum(map(sum, ranks[-1].values())) == 2 * 4


def test_a_pruned_adapter_goes_on_with_its_ranks_and_is_merged(
    zygote: Any, families: Path, instructions: Path, tmp_path: Path
) -> None:
    base = families / "internlm2"
    _, ranks = run_one(zygote, "dp1", OPTIONS, base, instructions, tmp_path / "first")
    go_on = {"adapter_name_or_path": str(tmp_path / "first" / "run" / "model")}
    losses, found = run_one(zygote, "tp2", go_on, base, instructions, tmp_path / "second")
    assert losses[-1] < losses[0]
    assert found == [ranks[-1]] * STEPS
    with pytest.raises(ModelError, match="of another type; set adapter"):
        train("dp1", go_on | {"type": "lora"}, base, instructions, tmp_path / "third", {})
    saved, out = tmp_path / "second" / "run" / "model", tmp_path / "out"
    assert main(["merge", "--adapter", str(saved), "--out", str(out), "--verify"]) == 0
    loaded = peft.PeftModel.from_pretrained(reference(base, "internlm2"), str(saved))
    torch.testing.assert_close(logits(reference(out, "internlm2")), logits(loaded), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", VARIANTS)
def test_it_goes_on_from_a_checkpoint_before_and_after_its_last_allocation(
    family: str, zygote: Any, families: Path, instructions: Path, tmp_path: Path
) -> None:
    """Averages of sensitivities are part of it, on every topology."""
    args = (VARIANTS[family], families / family, instructions)
    expected, ranks = run_one(zygote, "dp1", *args, tmp_path / "whole")
    changes = {"checkpoint__save_steps": 1, "checkpoint__resume_from_checkpoint": "auto"}
    changes["train__overwrite_output_dir"] = False
    legs = [("dp1", 3), ("dp1", 4), ("pp2", 5), ("tp2", 7), ("dp1", None)]  # the last allocation is at step 6
    losses, found = [], []
    for topology, end in legs:
        more, left_then = run_one(zygote, topology, *args, tmp_path / "parts", **changes, end=end)
        losses += more
        found += left_then
    assert losses[:4] == expected[:4]
    assert largest_difference(losses, expected) <= 1e-5
    assert found == ranks


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"parallel.zero_stage": 1}, "set parallel.zero_stage to 0"),
        ({"optimizer.type": "lomo"}, "lomo drops them in backward"),
        ({"model.dtype": "float16"}, "float16 scales by a changing factor"),
        ({"adapter.tinit": 6}, "tinit=6 and tfinal=2 leave none of 8 steps"),
        ({"adapter.total_step": 100}, "ends before ranks are at target_r"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(changes: dict[str, Any], why: str) -> None:
    sections = sections_on("dp1", Path("m"), Path("d"), Path("o"), steps=STEPS, micro_batch=BATCH)
    sections["adapter"] = {"type": "adalora", **OPTIONS}
    with pytest.raises(ConfigError, match=why):
        RunConfig(**changed(sections, changes))
