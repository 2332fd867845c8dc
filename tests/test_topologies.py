"""The promise of parity: every topology trains as one process does, for every family, and so as plain torch does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from combos import more
from families import reference, write_family
from plain import PlainRun
from runs import Record, changed, largest_difference, sections_on
from topologies import FAMILIES, sizes_of, world_size_of
from transformers import AutoModelForCausalLM

from collie_core.api import RunConfig, Trainer

STEPS, BATCH = 8, 8
TOPOLOGIES = [
    "dp1",
    more("tp2"),
    more("tp4"),
    more("pp2"),
    "pp3",
    more("tp2pp2"),
    "tp2pp2dp2zero1",
    more("dp2zero1"),
    more("dp2zero2"),
    more("dp2zero3"),
    more("tp2dp2zero1"),
    more("tp2dp2zero2"),
    "tp2dp2zero3",
]
REAL_TOPOLOGIES = [  # each of the others once with real weights
    *("tp4", "pp2", "tp2pp2", "dp2zero1"),
    *map(more, ("dp1", "tp2", "pp3", "tp2pp2dp2zero1", "dp2zero2", "dp2zero3", "tp2dp2zero3")),
]


def train(topology: str, model: Path, data: Path, output: Path, changes: dict[str, Any]) -> Record:
    """This rank's part of a run: clipping, two micro-batches per step, padding."""
    sections = sections_on(topology, model, data, output, steps=STEPS, micro_batch=BATCH // 2)
    sections["train"] |= {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0}
    sections["optimizer"] = {"type": "adamw", "lr": 1e-3, "weight_decay": 0.01}
    return runs.train(changed(sections, changes))


def train_all(topology: str, folder: Path, data: Path, output: Path, names: list[str], changes: dict[str, Any]) -> Any:
    """One rank's losses and norms of every family."""
    found = {}
    for name in names:
        record = train(topology, folder / name, data, output / name, changes)
        found[name] = (record.losses, record.norms)
    return found


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random checkpoint of each family."""
    folder = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        write_family(folder / name, name)
    return folder


@pytest.fixture(scope="session")
def plain(families: Path, instructions: Path) -> dict[str, tuple[PlainRun, dict[str, torch.Tensor]]]:
    """The same training in plain torch: what came out, and the weights at the end."""
    found = {}
    for name in FAMILIES:
        model = reference(families / name, name)
        run = PlainRun(steps=STEPS, batch=BATCH).train(model, families / name, instructions)
        found[name] = (run, model.state_dict())
    return found


def assert_weights_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = (found[name].float() - value).norm() / value.norm()
        assert difference <= 1e-4, f"{name}: {difference:.2g}"


@pytest.mark.filterwarnings("ignore")  # DeepSpeed calls collectives that torch deprecates
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_topology_trains_every_family_as_plain_torch_does(
    topology: str, zygote: Any, families: Path, plain: Any, instructions: Path, tmp_path: Path
) -> None:
    ranks = zygote.run(
        __file__,
        "train_all",
        world_size=world_size_of(topology),
        args=(topology, families, instructions, tmp_path, FAMILIES, {}),
        limit_s=400,
    )
    for name in FAMILIES:
        expected, weights = plain[name]
        losses, norms = ranks[0][name]
        assert all(rank[name][0] == losses for rank in ranks), f"{name}: ranks report different losses"
        assert losses[-1] < losses[0]
        assert largest_difference(losses, expected.losses) <= 1e-5, name
        assert largest_difference(norms, expected.norms) <= 1e-5 * max(1.0, *expected.norms), name
        assert_weights_close(reference(tmp_path / name / "run" / "model", name).state_dict(), weights)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("topology", ["tp2", "pp2", more("tp2pp2dp2zero1"), more("tp2dp2zero3")])
def test_bfloat16_stays_near_float32(
    topology: str, zygote: Any, families: Path, plain: Any, instructions: Path, tmp_path: Path
) -> None:
    names = ["llama_tied"]
    ranks = zygote.run(
        __file__,
        "train_all",
        world_size=world_size_of(topology),
        args=(topology, families, instructions, tmp_path, names, {"model.dtype": "bfloat16"}),
    )
    losses, _ = ranks[0]["llama_tied"]
    assert largest_difference(losses, plain["llama_tied"][0].losses) <= 2e-2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("topology", "changes"),
    [
        ("tp2", {"parallel.sequence_parallel": True}),
        ("tp2pp2", {"parallel.sequence_parallel": True, "model.gradient_checkpointing": "full"}),
        ("tp2pp2", {"data.packing": True}),
        ("pp3", {"model.gradient_checkpointing": "full", "parallel.pipeline_cuts": "uniform"}),
        ("pp2", {"parallel.pipeline_cuts": [1, 3]}),
        ("pp2dp2zero1", {}),
        ("pp2dp2zero2", {}),
        ("dp2zero3", {"parallel.offload_optimizer": True, "parallel.offload_param": True}),
        ("tp2dp2zero2", {"parallel.offload_optimizer": True}),
        ("tp2pp2", {"train.gradient_accumulation_steps": 8, "train.per_device_train_batch_size": 1}),
        ("pp2", {"train.gradient_accumulation_steps": 1, "train.per_device_train_batch_size": 8}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items()),
)
def test_options_change_nothing(
    topology: str, changes: Any, zygote: Any, families: Path, plain: Any, instructions: Path, tmp_path: Path
) -> None:
    names = ["mistral" if changes.get("data.packing") else "llama_tied"]
    ranks = zygote.run(
        __file__,
        "train_all",
        world_size=world_size_of(topology),
        args=(topology, families, instructions, tmp_path, names, changes),
    )
    (name,) = names
    losses, norms = ranks[0][name]
    assert largest_difference(losses, plain[name][0].losses) <= 1e-5
    assert largest_difference(norms, plain[name][0].norms) <= 1e-5 * max(1.0, *plain[name][0].norms)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("topology", REAL_TOPOLOGIES)
def test_a_real_model_trains_the_same_on_every_topology(
    topology: str, zygote: Any, real_data: Path, tmp_path: Path, real_run: PlainRun
) -> None:
    data = real_data / "text" / "gsm8k_train_2000.jsonl"
    (losses, norms), *_ = zygote.run(
        __file__,
        "train_one",
        world_size=world_size_of(topology),
        args=(topology, real_data / "stories260K-hf", data, tmp_path, {}),
        limit_s=400,
    )
    assert largest_difference(losses, real_run.losses) <= 1e-5 * max(1.0, *real_run.losses)
    assert largest_difference(norms, real_run.norms) <= 1e-5 * max(1.0, *real_run.norms)


def train_one(topology: str, model: Path, data: Path, output: Path, changes: dict[str, Any]) -> Any:
    record = train(topology, model, data, output, changes)
    return record.losses, record.norms


@pytest.fixture(scope="session")
def real_run(real_data: Path) -> PlainRun:
    """The real model in plain torch."""
    folder = real_data / "stories260K-hf"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return PlainRun(steps=STEPS, batch=BATCH).train(model, folder, real_data / "text" / "gsm8k_train_2000.jsonl")


def test_too_few_processes_are_refused_with_the_number_that_works(
    families: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert "RANK" not in os.environ
    with pytest.raises(Exception, match=r"needs a multiple of 4 processes, but 1 were started; .* --nproc 4"):
        train("tp2pp2", families / "llama", instructions, tmp_path, {})


@pytest.mark.filterwarnings("ignore")
def test_dropout_is_the_same_on_every_topology(zygote: Any, families: Path, instructions: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dropped"
    write_family(folder, "llama_tied", changes={"attention_dropout": 0.2})
    topologies: list[tuple[str, dict[str, Any]]] = [
        ("dp1", {}),
        ("dp2zero1", {}),
        ("tp2", {"parallel.sequence_parallel": True}),
        ("tp2pp2", {"model.gradient_checkpointing": "full"}),
        ("dp1", {"train.per_device_train_batch_size": 1, "train.gradient_accumulation_steps": 8}),
        ("dp1", {"data.packing": True}),
    ]
    runs = []
    for number, (topology, changes) in enumerate(topologies):
        args = (topology, folder, instructions, tmp_path / str(number), changes)
        losses, _ = zygote.run(__file__, "train_one", world_size=world_size_of(topology), args=args)[0]
        runs.append(losses)
    (plain,) = zygote.run(
        __file__, "train_one", world_size=1, args=("dp1", families / "llama_tied", instructions, tmp_path / "x", {})
    )
    assert largest_difference(runs[0], plain[0]) > 1e-3  # it does drop
    for losses in runs[1:]:
        assert largest_difference(losses, runs[0]) <= 1e-5


class Samples:
    """Keeps the sample answers of evaluations, which the main rank is told."""

    def __init__(self) -> None:
        self.predictions: list[str] = []

    def collie_evaluated(self, samples: Any) -> None:
        self.predictions += [sample.prediction for sample in samples]


def token_sum(outputs: Any, labels: torch.Tensor, target_tokens: int) -> torch.Tensor:
    """A loss of one's own, which needs the logits of the whole vocabulary."""
    assert outputs.logits.shape[-1] == 259
    losses = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    return 0.5 * losses / target_tokens


def evaluate(topology: str, model: Path, data: Path, output: Path) -> Any:
    """Losses by a function of one's own, perplexity and answers before and after training."""
    sizes = sizes_of(topology)
    config = RunConfig(
        model={"model_name_or_path": str(model)},
        data={"train": str(data), "eval": str(data), "max_length": 256, "cache_dir": str(output / "cache")},
        parallel={
            "tensor_parallel_size": sizes["tp"],
            "pipeline_parallel_size": sizes["pp"],
            "zero_stage": sizes["zero"],
        },
        train={"max_steps": 2, "global_batch_size": 8, "output_dir": str(output / "run"), "seed": 7},
        optimizer={"type": "adamw", "lr": 1e-3},
        evaluation={"on_start": True, "print_samples": 3, "per_device_eval_batch_size": 3},
    )
    record, samples = Record(), Samples()
    trainer = Trainer(config, callbacks=[record, samples], observers=(), loss_fn=token_sum)
    results = trainer.train()
    return record.losses, results["eval/perplexity"], samples.predictions


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("topology", ["pp3", "tp2pp2dp2", "dp2zero3"])
def test_evaluation_samples_and_a_loss_of_ones_own_are_those_of_one_process(
    topology: str, zygote: Any, families: Path, instructions: Path, tmp_path: Path
) -> None:
    args = (families / "llama_tied", instructions)
    ((losses, perplexity, predictions),) = zygote.run(
        __file__, "evaluate", world_size=1, args=("dp1", *args, tmp_path / "one")
    )
    ranks = zygote.run(
        __file__, "evaluate", world_size=world_size_of(topology), args=(topology, *args, tmp_path / "many")
    )
    assert len(predictions) == 6
    assert ranks[0][2] == predictions
    for found, found_perplexity, _ in ranks:
        torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=0, atol=1e-5)
        assert found_perplexity == pytest.approx(perplexity, rel=1e-5)
