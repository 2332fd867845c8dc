"""Functions of one's own in place of a step of the run: on a topology they give what they give in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import write_family
from runs import Record, changed, largest_difference, sections_on
from topologies import world_size_of
from torch import Tensor, nn
from torch.nn import functional as F

from collie_core.api import Batch, ConfigError, RunConfig, Topology, Trainer

STEPS = 4


def half_the_loss(outputs: Any, labels: Tensor, target_tokens: int) -> Tensor:
    """A `loss_fn`. It has the logits of the whole vocabulary, on every topology."""
    assert outputs.logits.shape[-1] == 259
    losses = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
    return 0.5 * losses / target_tokens


def smoothed(model: nn.Module, batch: Batch, target_tokens: int) -> Tensor:
    """A `train_fn`: its own forward pass and loss."""
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits[:, :-1].flatten(0, 1).float()
    labels = batch.labels[:, 1:].flatten()
    return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1) / target_tokens


class Accuracy:
    """An `eval_fn`: the share of target tokens that have the highest logit, and their mean logit; over all ranks."""

    topology = Topology()

    def __call__(self, model: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
        assert not any(module.training for module in list(model.modules())[1:])  # an engine itself has no mode
        right, seen, logit = 0, 0, 0.0
        for batch in batches:
            logits = model(input_ids=batch.input_ids).logits[:, :-1].float()
            labels = batch.labels[:, 1:]
            chosen = labels != -100
            right += int((logits.argmax(-1) == labels)[chosen].sum())
            logit += float(logits[chosen].gather(-1, labels[chosen].unsqueeze(-1)).double().sum())
            seen += int(chosen.sum())
        total = self.topology.sum_over_data(seen)
        return {
            "accuracy": self.topology.sum_over_data(right) / total,
            "logit": self.topology.sum_over_data(logit) / total,
            "tokens": float(total),
        }


def train(topology: str, model: Path, data: Path, output: Path, functions: list[str]) -> Any:
    """Losses, norms and results of a run with these functions handed in."""
    sections = sections_on(topology, model, data, output, steps=STEPS, micro_batch=4)
    changes: dict[str, Any] = {"data.eval": str(data), "evaluation.per_device_eval_batch_size": 3}
    changes |= {"train.gradient_accumulation_steps": 2, "optimizer.type": "adamw", "optimizer.lr": 1e-3}
    config = RunConfig(**changed(sections, changes))
    record, eval_fn = Record(), Accuracy()
    given: dict[str, Any] = {"loss_fn": half_the_loss, "train_fn": smoothed, "eval_fn": eval_fn}
    handed_in = {name: given[name] for name in functions}
    trainer = Trainer(config, callbacks=[record], observers=(), **handed_in)
    eval_fn.topology = trainer.topology
    results = trainer.train()
    return record.losses, record.norms, {name: value for name, value in results.items() if name.startswith("eval/")}


def train_all(topology: str, model: Path, data: Path, output: Path) -> Any:
    """The same with a loss_fn, and where the topology has no stages with a train_fn; an eval_fn with both."""
    both = {"loss_fn": train(topology, model, data, output / "loss", ["loss_fn", "eval_fn"])}
    if "pp" not in topology:
        both["train_fn"] = train(topology, model, data, output / "train", ["train_fn", "eval_fn"])
    return both


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("functions") / "llama_tied"
    write_family(folder, "llama_tied")
    return folder


@pytest.fixture(scope="module")
def alone(model: Path, zygote: Any, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process gives."""
    args = ("dp1", model, instructions, tmp_path_factory.mktemp("alone"))
    return zygote.run(__file__, "train_all", world_size=1, args=args)[0]


@pytest.mark.filterwarnings("ignore")  # DeepSpeed calls collectives that torch deprecates
@pytest.mark.parametrize("topology", ["tp2", "dp2", "dp2zero3", "pp2"])
def test_functions_of_ones_own_give_what_they_give_in_one_process(
    topology: str, model: Path, zygote: Any, instructions: Path, tmp_path: Path, alone: Any
) -> None:
    args = (topology, model, instructions, tmp_path)
    ranks = zygote.run(__file__, "train_all", world_size=world_size_of(topology), args=args)
    assert set(ranks[0]) == {"loss_fn"} | ({"train_fn"} if topology != "pp2" else set())
    for rank, found in enumerate(ranks):
        for function, (losses, norms, results) in found.items():
            expected_losses, expected_norms, expected = alone[function]
            assert largest_difference(losses, expected_losses) <= 1e-5, function
            if rank == 0:  # the others do not hear of norms
                assert largest_difference(norms, expected_norms) <= 1e-5 * max(1.0, *expected_norms), function
            assert results == pytest.approx(expected, rel=1e-4), function


def test_the_functions_are_at_work(alone: Any, model: Path, instructions: Path, tmp_path: Path, zygote: Any) -> None:
    args = ("dp1", model, instructions, tmp_path, [])
    ((losses, _, results),) = zygote.run(__file__, "train", world_size=1, args=args)
    torch.testing.assert_close(torch.tensor(alone["loss_fn"][0][0]), torch.tensor(losses[0] / 2))
    assert alone["train_fn"][0][0] != pytest.approx(losses[0], rel=1e-3)
    assert results.keys() == {"eval/loss", "eval/perplexity"}
    assert alone["loss_fn"][2].keys() == {"eval/accuracy", "eval/logit", "eval/tokens"}


def test_a_train_fn_is_refused_in_a_pipeline(model: Path, instructions: Path, tmp_path: Path) -> None:
    sections = sections_on("pp2", model, instructions, tmp_path, steps=STEPS, micro_batch=4)
    with pytest.raises(ConfigError, match="a train_fn calls the whole model, and a stage is a part of it"):
        Trainer(RunConfig(**sections), observers=(), train_fn=smoothed)
