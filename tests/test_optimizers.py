"""Every optimizer on every topology: the losses of one process, the same bits after a restart, and clear words where
something cannot be. Short runs with random weights are among the checks of `test_kit.py`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from combos import in_everything, more
from families import write_family
from runs import Record, changed, largest_difference, sections_on, train
from topologies import OPTIMIZERS, sizes_of, world_size_of
from torch import Tensor, nn

from collie_core.api import ConfigError, PluginError, RunConfig, Trainer
from collie_core.parts import HandedIn, Parts

STEPS, BATCH = 20, 4
IN_BACKWARD = ("lomo", "adalomo")
TOPOLOGIES = ["dp2", "tp2", "pp2", "tp2dp2zero1", "dp2zero2", "dp2zero3"]


def names_on(topology: str) -> list[str]:
    """The optimizers that are not refused on a topology."""
    sizes = sizes_of(topology)
    refused: set[str] = {"muon", "normuon"} if sizes["zero"] else set()
    if sizes["pp"] > 1 or sizes["zero"] in (1, 2):
        refused |= set(IN_BACKWARD)
    return [name for name in OPTIMIZERS if name not in refused]


def sections(
    topology: str, name: str, model: Path, data: Path, output: Path, changes: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """A run on one micro-batch per step, with clipping."""
    found = sections_on(topology, model, data, output, steps=STEPS, micro_batch=BATCH)
    found["data"] |= {"max_length": 128, "long_samples": "truncate"}
    found["optimizer"] = {"type": name, "weight_decay": 0.01, **OPTIMIZERS[name]}
    return changed(found, changes)


Numbers = dict[str, tuple[list[float], list[float]]]
"""Losses and gradient norms by optimizer."""


def train_all(
    topology: str, names: list[str], model: Path, data: Path, output: Path, changes: dict[str, Any]
) -> Numbers:
    """What one rank sees with each optimizer."""
    found = {}
    for name in names:
        record = train(sections(topology, name, model, data, output / name, changes))
        found[name] = (record.losses, record.norms)
    return found


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small llama with tied embeddings and random weights."""
    folder = tmp_path_factory.mktemp("llama")
    write_family(folder, "llama_tied")
    return folder


def run_all(zygote: Any, topology: str, names: list[str], *args: Any, changes: dict[str, Any] | None = None) -> Numbers:
    """What the first rank sees; all see the same losses."""
    ranks = zygote.run(
        __file__,
        "train_all",
        world_size=world_size_of(topology),
        args=(topology, names, *args, changes or {}),
        limit_s=400,
    )
    for name in names:
        assert all(rank[name][0] == ranks[0][name][0] for rank in ranks), name
    first: Numbers = ranks[0]
    return first


SHORT = {"train.max_steps": 7}  # two estimates of Sophia's; the long runs are those of the real model


@pytest.fixture(scope="session")
def alone(zygote: Any, llama: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Numbers:
    """One process."""
    folder = tmp_path_factory.mktemp("alone")
    return run_all(zygote, "dp1", list(OPTIMIZERS), llama, instructions, folder, changes=SHORT)


def assert_the_same(found: Numbers, expected: Numbers) -> None:
    for name, (losses, norms) in found.items():
        wanted, wanted_norms = expected[name]
        assert min(losses[-3:]) < losses[0], name
        assert largest_difference(losses, wanted) <= 1e-5 * max(1.0, *wanted), name
        assert largest_difference(norms, wanted_norms) <= 1e-4 * max(1.0, *wanted_norms), name


@pytest.fixture(scope="session")
def real_alone(zygote: Any, real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Numbers:
    """One process, with real weights and questions."""
    return run_all(zygote, "dp1", list(OPTIMIZERS), *real_input(real_data), tmp_path_factory.mktemp("real"))


def real_input(real_data: Path) -> tuple[Path, Path]:
    return real_data / "stories260K-hf", real_data / "text" / "gsm8k_train_2000.jsonl"


@in_everything
@pytest.mark.slow
@pytest.mark.real
@pytest.mark.filterwarnings("ignore")  # DeepSpeed calls collectives that torch deprecates
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_real_model_has_the_losses_of_one_process(
    topology: str, zygote: Any, real_data: Path, real_alone: Numbers, tmp_path: Path
) -> None:
    found = run_all(zygote, topology, names_on(topology), *real_input(real_data), tmp_path)
    assert_the_same(found, real_alone)
    if topology == "dp2":
        expected = real_alone["lomo"][0]
        assert largest_difference(found["lomo"][0], expected) <= 1e-6 * max(expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("topology", "changes"),
    [
        ("dp2", {"model.gradient_checkpointing": "full", "train.max_grad_norm": 0}),
        ("tp2", {"parallel.sequence_parallel": True, "data.packing": True}),
        ("dp2zero3", {"parallel.offload_param": True, "model.gradient_checkpointing": "full"}),
        ("dp2zero3", {"train.max_grad_norm": 0}),
    ],
    ids=["dp2 checkpointing unclipped", "tp2 sequence packed", "dp2zero3 offload checkpointing", "dp2zero3 unclipped"],
)
def test_updates_in_backward_go_with_every_option(
    topology: str, changes: dict[str, Any], zygote: Any, llama: Path, instructions: Path, tmp_path: Path
) -> None:
    kept = SHORT | {key: value for key, value in changes.items() if key == "train.max_grad_norm"}
    expected = run_all(zygote, "dp1", list(IN_BACKWARD), llama, instructions, tmp_path / "one", changes=kept)
    found = run_all(
        zygote, topology, list(IN_BACKWARD), llama, instructions, tmp_path / "many", changes=SHORT | changes
    )
    assert_the_same(found, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("topology", ["tp2", "dp2zero3"])
def test_weights_in_bfloat16_follow_float32(
    topology: str, zygote: Any, llama: Path, instructions: Path, alone: Numbers, tmp_path: Path
) -> None:
    names = [*IN_BACKWARD, "muon"] if topology != "dp2zero3" else [*IN_BACKWARD, "sophia"]
    changes = SHORT | {"model.dtype": "bfloat16"}
    for name, (losses, _) in run_all(zygote, topology, names, llama, instructions, tmp_path, changes=changes).items():
        # There are no float32 copies of weights to add small updates to, so this is no rounding of the losses alone.
        assert largest_difference(losses, alone[name][0]) <= 0.1, name


# -- LOMO is gradient descent ------------------------------------------------------------------------------------


def descents(model: Path, data: Path, output: Path, changes: dict[str, Any]) -> list[list[float]]:
    """Losses of LOMO and of SGD without momentum, at the same learning rate."""
    found = []
    for name in ("lomo", "sgd"):
        chosen = {"optimizer.lr": 0.1, "optimizer.weight_decay": 0.0, **changes}
        chosen |= {"optimizer.momentum": 0.0} if name == "sgd" else {}
        found.append(train_all("dp1", [name], model, data, output / name, chosen)[name][0])
    return found


@pytest.mark.parametrize("clip", [0, 1.0])
def test_lomo_is_gradient_descent_bit_for_bit(
    clip: float, zygote: Any, llama: Path, instructions: Path, tmp_path: Path
) -> None:
    args = (llama, instructions, tmp_path, {"train.max_grad_norm": clip})
    ((lomo, sgd),) = zygote.run(__file__, "descents", world_size=1, args=args)
    assert lomo == sgd
    assert lomo[-1] < lomo[0]


# -- restarts -------------------------------------------------------------------------------------------------------


def restart(topology: str, names: list[str], model: Path, data: Path, output: Path) -> dict[str, bool]:
    """For each optimizer, whether a run that is saved at step 10 and goes on in another has the losses of one."""
    found = {}
    for name in names:
        parts, config = [], RunConfig(**sections(topology, name, model, data, output / name, {}))
        for _ in range(2):
            parts.append(Parts(config, HandedIn()))
            parts[-1].build()
            parts[-1].step.model.train()
        first, second = parts
        batches = list(first.loader())
        losses_of(first, batches[:10])
        carry_over(first, second, output / name / "saved")
        found[name] = losses_of(second, batches[10:]) == losses_of(first, batches[10:])
    return found


def losses_of(parts: Parts, batches: list[Any]) -> list[float]:
    losses = []
    for batch in batches:
        tokens = int(parts.topology.sum_over_data(batch.target_tokens))
        losses.append(parts.step.forward_backward(batch, tokens).item())
        parts.step.update()
    return losses


def carry_over(first: Parts, second: Parts, folder: Path) -> None:
    """Weights, the optimizer's `state_dict` and the schedule's, through a file that holds no code."""
    ours, theirs = (vars(parts.step) for parts in (first, second))
    if "engine" in ours and "optimizer" not in ours:  # DeepSpeed keeps what it has taken apart in files of its own
        ours["engine"].save_checkpoint(str(folder))
        theirs["engine"].load_checkpoint(str(folder))
        theirs["scheduler"].load_state_dict(ours["scheduler"].state_dict())
        return
    path = folder / f"{first.topology.rank}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = {key: ours[key].state_dict() for key in ("optimizer", "scheduler")}
    torch.save({**saved, "weights": weights_of(first.model)}, path)
    loaded = torch.load(path, weights_only=True)
    for key in saved:
        theirs[key].load_state_dict(loaded[key])
    with torch.no_grad():
        for own, value in zip(stored(second.model), loaded["weights"], strict=True):
            own.copy_(value)


def stored(model: nn.Module) -> list[Tensor]:
    """What this rank holds of the parameters."""
    return [getattr(parameter, "ds_tensor", parameter).data for parameter in model.parameters()]


def weights_of(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in stored(model)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("topology", "names"),
    [
        more("dp1", list(OPTIMIZERS)),
        more("tp2", ["adalomo", "muon"]),
        more("dp2", ["adalomo", "sophia"]),
        more("dp2zero2", ["adan", "sophia"]),
        more("dp2zero3", ["adalomo", "sophia"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_restart_changes_no_bit(
    topology: str, names: list[str], zygote: Any, llama: Path, instructions: Path, tmp_path: Path
) -> None:
    args = (topology, names, llama, instructions, tmp_path)
    for rank in zygote.run(__file__, "restart", world_size=world_size_of(topology), args=args, limit_s=400):
        assert rank == dict.fromkeys(names, True)


# -- parameter groups -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("topology", ["tp2", "pp2", "pp2dp2zero1", "dp2zero3"])
def test_groups_by_pattern_are_the_same_everywhere(
    topology: str, zygote: Any, llama: Path, instructions: Path, alone: Numbers, tmp_path: Path
) -> None:
    patterns = [{"match": "*.layers.3.*", "lr": 1e-4}, {"match": "*norm.weight", "weight_decay": 0.5}]
    changes = SHORT | {"optimizer.param_groups": patterns}
    expected = run_all(zygote, "dp1", ["adamw"], llama, instructions, tmp_path / "one", changes=changes)
    assert largest_difference(expected["adamw"][0], alone["adamw"][0]) > 1e-3  # they do something
    found = run_all(zygote, topology, ["adamw"], llama, instructions, tmp_path / "many", changes=changes)
    assert_the_same(found, expected)


# -- what a person is told ------------------------------------------------------------------------------------------


def facts_of(name: str, model: Path, data: Path, output: Path, changes: dict[str, Any]) -> str:
    record = train(sections("dp1", name, model, data, output, {"train.max_steps": 1, **changes}))
    return str(record.facts["optimizer"])


def test_a_second_backward_is_announced(llama: Path, instructions: Path, tmp_path: Path) -> None:
    clipped = facts_of("lomo", llama, instructions, tmp_path, {})
    assert "two backward passes per step, because of train.max_grad_norm (0: one)" in clipped
    assert "backward" not in facts_of("lomo", llama, instructions, tmp_path, {"train.max_grad_norm": 0})
    assert "because of float16" in facts_of(
        "lomo", llama, instructions, tmp_path, {"train.max_grad_norm": 0, "model.dtype": "float16"}
    )
    assert "another forward and backward" in facts_of("sophia", llama, instructions, tmp_path, {})


def test_accumulation_that_follows_from_sizes_is_refused_before_anything_is_written(
    llama: Path, instructions: Path, tmp_path: Path
) -> None:
    changes = {"train.global_batch_size": 8, "train.per_device_train_batch_size": 2}
    config = RunConfig(**sections("dp1", "lomo", llama, instructions, tmp_path, changes))
    with pytest.raises(ConfigError, match=r"train\.gradient_accumulation_steps: it uses a gradient at once"):
        Trainer(config, observers=()).train()
    assert not (tmp_path / "run").exists()


def test_a_train_fn_cannot_be_asked_for_the_loss_of_other_labels(
    llama: Path, instructions: Path, tmp_path: Path
) -> None:
    config = RunConfig(**sections("dp1", "sophia", llama, instructions, tmp_path, {}))
    trainer = Trainer(config, observers=(), train_fn=lambda model, batch, tokens: model(batch.input_ids).logits.mean())
    with pytest.raises(ConfigError, match=r"estimates curvature from the loss of labels that it draws"):
        trainer.train()


def test_a_handed_in_optimizer_may_update_in_backward_too(llama: Path, instructions: Path, tmp_path: Path) -> None:
    from collie_optim.lomo import Lomo

    found = []
    for optimizer in (lambda groups: Lomo(groups, lr=0.1), None):
        record = Record()
        config = RunConfig(**sections("dp1", "lomo", llama, instructions, tmp_path, {"train.max_steps": 3}))
        Trainer(config, callbacks=[record], observers=(), optimizer=optimizer).train()
        found.append(record.losses)
    assert len(found[0]) == 3
    assert all(math.isfinite(loss) for loss in found[0])
    assert found[0] == found[1]


def test_an_optimizer_that_does_not_declare_what_it_is(
    llama: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import collie_optim.lion
    from collie_optim.lomo import Lomo

    monkeypatch.setattr(collie_optim.lion, "Lion", lambda params, **options: Lomo(params))
    config = RunConfig(**sections("dp1", "lion", llama, instructions, tmp_path, {}))
    with pytest.raises(PluginError, match=r"lion has the methods of a FusedOptimizer, and its methods and its `can`"):
        Trainer(config, observers=()).train()
