"""Checkpoints: a run that was stopped goes on as if it had not been, on the same topology and on any other."""

from __future__ import annotations

import json
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
from combos import in_everything, more
from families import write_family
from runs import Record, Sections, changed, largest_difference, sections_on
from safetensors.torch import load_file
from topologies import sizes_of, world_size_of

from collie_core.api import CollieError, RunConfig, Trainer
from collie_core.checkpoint import files
from collie_core.cli import main

STEPS, BATCH = 8, 8
LORA = {"type": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]}
# What is trained: optimizer, family, and sections that differ.
KINDS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "adamw": ({"type": "adamw", "lr": 3e-3, "weight_decay": 0.01}, "fused", {}),
    "dropout": ({"type": "adamw", "lr": 3e-3}, "dropout", {"data.num_workers": 2}),
    "sophia": ({"type": "sophia", "lr": 1e-3, "hessian_interval": 3}, "dropout", {}),
    "sgd": ({"type": "sgd", "lr": 1e-2}, "fused", {}),
    "lion": ({"type": "lion", "lr": 1e-4}, "fused", {}),
    "muon": ({"type": "muon", "lr": 1e-2}, "dropout", {}),
    "adalomo": ({"type": "adalomo", "lr": 1e-3}, "fused", {"train.gradient_accumulation_steps": 1}),
    "lora": ({"type": "adamw", "lr": 1e-2}, "dropout", {"adapter": LORA}),
}


class Crash(Exception):
    """What a run does not expect."""


class Watcher(Record):
    """Keeps losses and which samples were read, and ends the run before a step."""

    def __init__(self, crash_at: int | None) -> None:
        super().__init__()
        self.crash_at = crash_at
        self.positions: list[int] = []

    def collie_before_step(self, run: Any, batch: Any) -> None:
        if run.step == self.crash_at:
            raise Crash
        rows = [row for micro_batch in batch.micro_batches for row in micro_batch.layout]
        self.positions += [position for row in rows for position, _ in row if position >= 0]


def sections(topology: str, kind: str, models: Path, data: Path, output: Path, **changes: Any) -> Sections:
    """Packing, a warm-up, two micro-batches, and an epoch that ends in the middle."""
    optimizer, family, own = KINDS[kind]
    found = sections_on(topology, models / family, data, output / kind, steps=STEPS, micro_batch=BATCH // 2)
    found["train"] |= {"gradient_accumulation_steps": 2, "overwrite_output_dir": False}
    if "train.gradient_accumulation_steps" in own:
        found["train"]["per_device_train_batch_size"] *= 2
    found["optimizer"] = optimizer
    found["checkpoint"] = {"save_steps": 2, "resume_from_checkpoint": "auto"}
    adapter = own.get("adapter")
    found |= {"adapter": adapter} if adapter else {}
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return changed(found, {"data.packing": True} | {key: own[key] for key in own if "." in key} | changes)


def train(own: Sections, crash_at: int | None = None) -> tuple[list[float], list[int]]:
    """The losses of a part of a run, and the samples that this rank has read."""
    watcher = Watcher(crash_at)
    try:
        Trainer(RunConfig(**own), callbacks=[watcher], observers=()).train()
    except Crash:
        assert crash_at is not None
    return watcher.losses, watcher.positions


def train_all(runs: list[tuple[str, str]], crashes: list[int | None], *args: Any, **changes: Any) -> Any:
    """For each (topology, kind) what happens until each crash, one start after the other."""
    return {
        kind: [train(sections(topology, kind, *args, **changes), crash) for crash in crashes] for topology, kind in runs
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose files are laid out otherwise, with shared key-value heads, and one that drops out."""
    folder = tmp_path_factory.mktemp("models")
    write_family(folder / "fused", "internlm2_tied", changes={"num_key_value_heads": 2})
    write_family(folder / "dropout", "llama_tied", changes={"attention_dropout": 0.1})
    return folder


@pytest.fixture(scope="module")
def whole(models: Path, instructions: Path, zygote: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The losses of runs that nothing stops, in one process."""
    output = tmp_path_factory.mktemp("whole")
    runs = [("dp1", kind) for kind in KINDS]
    args = (runs, models, instructions, output, {"checkpoint__save_steps": None})
    (found,) = zygote.run(__file__, "train_some", world_size=1, args=args)
    return {kind: legs[0][0] for kind, legs in found.items()}


# -- the same topology ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # DeepSpeed calls collectives that torch deprecates
@pytest.mark.parametrize(
    "runs",
    [
        [("dp1", "dropout"), ("dp1", "sophia"), ("dp1", "muon"), ("dp1", "adalomo"), ("dp1", "lora"), ("dp1", "sgd")],
        more([("dp1zero1", "dropout"), ("dp1zero3", "adalomo"), ("dp1zero3", "lora")]),
    ],
)
def test_the_same_bits_after_every_crash(
    runs: list[tuple[str, str]], models: Path, instructions: Path, zygote: Any, tmp_path: Path, whole: Any
) -> None:
    args = (runs, [3, 7, None], models, instructions, tmp_path)
    (found,) = zygote.run(__file__, "train_all", world_size=1, args=args, limit_s=200)
    for topology, kind in runs:
        losses, positions = zip(*found[kind], strict=True)
        if "zero" in topology:
            assert largest_difference(losses[0], whole[kind][:3]) <= 1e-5, kind
        else:
            assert losses[0] == whole[kind][:3], kind
        assert losses[1][0] == losses[0][2], kind  # step 3, from the checkpoint after step 2
        assert losses[2][0] == losses[1][4], kind  # step 7, from that after step 6
        kept = [*losses[0][:2], *losses[1][:4], *losses[2]]
        assert kept == whole[kind] if "zero" not in topology else largest_difference(kept, whole[kind]) <= 1e-5, kind
        seen = [*positions[0][: 2 * BATCH], *positions[1][: 4 * BATCH], *positions[2]]
        assert sorted(seen) == list(range(STEPS * BATCH)), kind


def one_step_after_the_other(own: Sections, steps: int) -> tuple[list[float], list[int]]:
    """A run that is stopped after every step, and started again."""
    losses, positions = [], []
    for stop in [*range(1, steps), None]:
        more = train(own, stop)
        losses += more[0]
        positions += more[1]
    return losses, positions


@in_everything
def test_stopped_after_every_one_of_twenty_steps(models: Path, instructions: Path, zygote: Any, tmp_path: Path) -> None:
    """Dropout, packing and two workers; epochs end between."""
    changes = {"train__max_steps": 20, "checkpoint__save_steps": 1, "data__num_workers": 2}
    once, often = (sections("dp1", "dropout", models, instructions, tmp_path / name, **changes) for name in "ab")
    ((expected, order),) = zygote.run(__file__, "train", world_size=1, args=(once,))
    ((losses, positions),) = zygote.run(
        __file__, "one_step_after_the_other", world_size=1, args=(often, 20), limit_s=200
    )
    assert len(losses) == 20
    assert losses == expected
    assert positions == order
    assert sorted(order) == list(range(20 * BATCH))


# -- another topology -----------------------------------------------------------------------------------------------

CHAINS: dict[str, list[str]] = {  # of 4, 2, 4 and 1 ranks
    "adamw": ["tp2pp2zero1", "dp2zero3offload1", "tp4", "dp1"],
    "lion": ["pp2dp2zero1", "dp2zero2offload1", "tp2pp2", "dp1zero3"],
    "adalomo": ["tp2dp2", "dp2zero3", "tp4", "dp1zero3"],
    "lora": ["tp2pp2zero1", "dp2zero3", "tp4", "dp1"],
    "sophia": ["tp2dp2zero3", "pp2", "pp2dp2zero2", "dp1"],
}


@pytest.mark.filterwarnings("ignore")
def test_every_leg_on_another_topology(
    models: Path, instructions: Path, zygote: Any, tmp_path: Path, whole: Any
) -> None:
    kept: dict[str, list[float]] = {kind: [] for kind in CHAINS}
    seen: dict[str, list[int]] = {kind: [] for kind in CHAINS}
    for leg in range(4):
        runs = [(chain[leg], kind) for kind, chain in CHAINS.items()]
        args = (runs, [2 * leg + 2 if leg < 3 else None], models, instructions, tmp_path)
        ranks = zygote.run(__file__, "train_all", world_size=world_size_of(runs[0][0]), args=args, limit_s=300)
        for topology, kind in runs:
            kept[kind] += ranks[0][kind][0][0]
            size = sizes_of(topology)["tp"]
            one_copy = [rank for rank in range(0, len(ranks), size) if rank < size * sizes_of(topology)["dp"]]
            seen[kind] += [position for rank in one_copy for position in ranks[rank][kind][0][1]]
    for kind, losses in kept.items():
        assert largest_difference(losses, whole[kind]) <= 1e-5, (kind, losses, whole[kind])
        assert sorted(seen[kind]) == list(range(STEPS * BATCH)), kind


def state_of(folder: Path) -> dict[str, Any]:
    """All tensors of a checkpoint, weights by the names of the files."""
    weights = {f"model/{name}": value for name, value in load_file(folder / "model" / "model.safetensors").items()}
    return load_file(folder / files.STATES) | weights


def copy_at_start(
    jobs: list[tuple[str, str]], source: Path, target: Path, models: Path, data: Path, output: Path, **changes: Any
) -> None:
    """Resume and save at once what was read, without a step between."""

    class Copy:
        def collie_run_start(self, run: Any) -> None:
            trainer.checkpoints.saver.folder = target / run.config.optimizer.type
            trainer.checkpoints.save(run, {}, {})
            raise Crash

    for topology, kind in jobs:
        own = sections(topology, kind, models, data, output / target.name, **changes)
        own["checkpoint"]["resume_from_checkpoint"] = str(source / KINDS[kind][0]["type"] / "step-00000002")
        trainer = Trainer(RunConfig(**own), callbacks=[Copy()], observers=())
        with pytest.raises(Crash):
            trainer.train()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("dtype", "first", "others"),
    [
        ("float32", "dp1", ["dp2zero1", "tp2"]),
        ("bfloat16", "dp1zero1", ["dp2zero3", "tp2"]),
    ],
)
def test_no_bit_changes_on_the_way_through_other_topologies(
    dtype: str, first: str, others: list[str], models: Path, instructions: Path, zygote: Any, tmp_path: Path
) -> None:
    """Weights of float32, their masters below it, and every state."""
    jobs = [(first, "adamw"), (first, "lion")]
    changes = {"model__dtype": dtype, "data__packing": False}
    zygote.run(__file__, "train_some", world_size=1, args=(jobs, models, instructions, tmp_path, changes))
    for _, kind in jobs:
        name = KINDS[kind][0]["type"]
        (tmp_path / "0" / name).parent.mkdir(exist_ok=True)
        (tmp_path / kind / "run" / "checkpoints").rename(tmp_path / "0" / name)
    for number, topology in enumerate(others):
        args = ([(topology, kind) for _, kind in jobs], tmp_path / str(number), tmp_path / str(number + 1))
        rest = (models, instructions, tmp_path / "out", changes)
        zygote.run(__file__, "copy_some", world_size=2, args=(*args, *rest))
    for _, kind in jobs:
        name = KINDS[kind][0]["type"]
        before = state_of(tmp_path / "0" / name / "step-00000002")
        assert any(key.endswith("/weight") for key in before) == (dtype != "float32")
        for number in range(1, len(others) + 1):
            after = state_of(tmp_path / str(number) / name / "step-00000002")
            assert before.keys() == after.keys()
            for key, value in before.items():
                assert value.dtype == after[key].dtype, key
                assert value.equal(after[key]), (key, others[number - 1])


def train_some(jobs: list[tuple[str, str]], models: Path, data: Path, output: Path, changes: dict[str, Any]) -> Any:
    return train_all(jobs, [3 if changes.get("checkpoint__save_steps", 2) else None], models, data, output, **changes)


def copy_some(jobs: Any, source: Path, target: Path, models: Path, data: Path, output: Path, changes: Any) -> None:
    copy_at_start(jobs, source, target, models, data, output, **changes)


# -- signals, records, bad input ------------------------------------------------------------------------------------


@pytest.fixture
def own(models: Path, instructions: Path, tmp_path: Path) -> Sections:
    """A small run in this process."""
    return sections("dp1", "dropout", models, instructions, tmp_path, data__num_workers=0)


def output_of(own: Sections) -> Path:
    return Path(own["train"]["output_dir"])


class Signal:
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number: int, at: int) -> None:
        self.number, self.at = number, at

    def collie_before_update(self, run: Any) -> None:
        if run.step == self.at:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_leaves_at_the_end_of_the_step(number: signal.Signals, own: Sections, whole: Any) -> None:
    before = signal.getsignal(number)
    trainer = Trainer(RunConfig(**own), callbacks=[record := Record(), Signal(number, 2)])
    trainer.train()
    assert record.losses == whole["dropout"][:3]
    assert number.name in trainer.run.stop_reason
    assert signal.getsignal(number) is before
    assert not (output_of(own) / "model").exists()
    newest = files.checkpoints_in(output_of(own) / "checkpoints")[0]
    assert files.verify(newest).step == 3
    assert train(own)[0] == whole["dropout"][3:]
    assert (output_of(own) / "model" / "model.safetensors").is_file()


def test_the_record_goes_on_where_the_run_does(own: Sections, tmp_path: Path) -> None:
    """Rows between two logged steps, of evaluations and of tokens are those of a run that nothing stopped."""
    more = {"report_to": "csv", "data.eval": own["data"]["train"], "evaluation.steps": 4, "train.logging_steps": 3}
    more["evaluation.best"] = {"metric": "eval/loss", "mode": "min", "patience": 3}
    config = changed(own, {key: value for key, value in more.items() if "." in key}) | {"report_to": "csv"}
    once = {**config, "train": {**config["train"], "output_dir": str(tmp_path / "once")}}
    expected = Trainer(RunConfig(**once)).train()
    with pytest.raises(Crash):
        Trainer(RunConfig(**config), callbacks=[Watcher(5)]).train()
    with (output_of(own) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # the machine failed while it was written
    results = Trainer(RunConfig(**config)).train()
    measured = ("tokens_per_second", "tokens_per_second_per_device", "step_time_s", "peak_memory_bytes")
    assert {key: results[key] for key in results if key not in measured} == {
        key: expected[key] for key in expected if key not in measured
    }

    def rows(folder: Path) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if key not in measured} for row in found]

    assert rows(output_of(own)) == rows(tmp_path / "once")
    assert {row["step"] for row in rows(output_of(own))} == {3, 4, 6, 8}
    tables = [(folder / "metrics.csv").read_text().splitlines() for folder in (output_of(own), tmp_path / "once")]
    assert tables[0][0] == tables[1][0]
    assert [line.split(",")[0] for line in tables[0]] == [line.split(",")[0] for line in tables[1]]
    best = [json.loads((folder / "best" / "best.json").read_text()) for folder in (output_of(own), tmp_path / "once")]
    assert best[0] == best[1]


def test_a_finished_run_can_be_made_longer(own: Sections, whole: Any) -> None:
    assert train({**own, "train": {**own["train"], "max_steps": 4}, "lr_scheduler": {"type": "constant"}})[0]
    longer = {**own, "lr_scheduler": {"type": "constant"}}
    losses = train(longer)[0]
    assert len(losses) == 4
    again = Trainer(RunConfig(**longer)).train()  # nothing is left to do
    assert again["loss"] == losses[-1]


def damage(path: Path, how: str) -> None:
    values = bytearray(path.read_bytes())
    if how == "flipped":
        values[len(values) // 2] ^= 1
    path.unlink() if how == "missing" else path.write_bytes(values[:-1] if how == "truncated" else values)


def test_bad_input_is_told_in_a_sentence(
    own: Sections, models: Path, instructions: Path, tmp_path: Path, whole: Any, caplog: pytest.LogCaptureFixture
) -> None:
    train(own, crash_at=7)
    folder = output_of(own) / "checkpoints"
    newest = folder / "step-00000006"

    def refused(because: str, changes: dict[str, Any], start: Sections | None = None) -> None:
        new = {"train.output_dir": str(tmp_path / "other"), "checkpoint.resume_from_checkpoint": str(newest)}
        copied = {key: dict(value) for key, value in (start or own).items()}
        with pytest.raises(CollieError, match=because) as error:
            train(changed(copied, new | changes))
        assert "\n" not in str(error.value)
        assert not (tmp_path / "other").exists()

    refused("of a run with the optimizer AdamW, and it is Lion here", {"optimizer.type": "lion"})
    refused("global_batch_size=8, and it is 16 here", {"train.gradient_accumulation_steps": 4})
    refused("train.seed=7, which orders the samples; it is 8", {"train.seed": 8})
    refused("of other training data", {"data.max_length": 120, "data.long_samples": "drop"})
    refused("of another model: it lacks .*bias", {}, sections("dp1", "adamw", models, instructions, tmp_path / "new"))
    refused("of another model: no place for", {"adapter.type": "lora"})
    refused("holds no checkpoint", {"checkpoint.resume_from_checkpoint": str(models)})
    refused("no manifest.json", {"checkpoint.resume_from_checkpoint": str(tmp_path / "step-00000001")})
    earlier = {
        "train.output_dir": str(output_of(own)),
        "checkpoint.resume_from_checkpoint": str(folder / "step-00000004"),
    }
    with pytest.raises(CollieError, match="has gone on to step-00000006"):
        train(changed({key: dict(value) for key, value in own.items()}, earlier))
    damage(newest / "optimizer.safetensors", "flipped")
    refused(r"is damaged: optimizer\.safetensors is not what was written", {})
    assert main(["checkpoint", "verify", str(output_of(own))]) == 1
    losses = train(own)[0]
    assert losses == whole["dropout"][4:]
    assert "going on from step-00000004" in caplog.text
    assert main(["checkpoint", "verify", str(output_of(own))]) == 0  # the damaged one was written again
    for path in files.checkpoints_in(folder):
        damage(path / "trainer.json", "truncated")
    with pytest.raises(CollieError, match=r"no checkpoint in .* is sound"):
        train(own)


class Burglar:
    """Whoever unpickles it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


def test_nothing_in_a_checkpoint_is_executed(own: Sections, tmp_path: Path) -> None:
    """Also where whoever put it there has made the manifest fit."""
    train(own, crash_at=3)
    (newest,) = files.checkpoints_in(output_of(own) / "checkpoints")
    pickled, trace = pickle.dumps(Burglar(tmp_path / "trace")), tmp_path / "trace"
    weights = (newest / "model" / "model.safetensors").read_bytes()

    def goes_on() -> str:
        (newest / files.MANIFEST).unlink()
        files.write_manifest(newest, 2, {})
        try:
            Trainer(RunConfig(**own), callbacks=[Watcher(3)], observers=()).train()
        except (CollieError, Crash) as error:
            return str(error)
        raise AssertionError

    for name in ("optimizer.pt", "model/pytorch_model.bin", "model/training_args.bin"):
        (newest / name).write_bytes(pickled)
    assert goes_on() == ""  # they are not looked at
    (newest / "model" / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in goes_on()
    (newest / "model" / "model.safetensors").write_bytes(pickled)
    assert "cannot load the weights" in goes_on()
    (newest / "model" / "model.safetensors").write_bytes(weights)
    (newest / files.STATES).write_bytes(pickled)
    assert "cannot load the weights" in goes_on()
    (newest / "trainer.json").write_bytes(pickled)
    assert "trainer.json cannot be read" in goes_on()
    assert not trace.exists()


def test_what_a_run_would_go_on_from_is_told_before(own: Sections, tmp_path: Path, capsys: Any) -> None:
    path, output = tmp_path / "run.yaml", output_of(own)
    path.write_text(json.dumps(own))
    command = ["train", str(path), "--resume-explain"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"begins: {output}/checkpoints has no checkpoint\n"
    with pytest.raises(Crash):
        Trainer(RunConfig(**own), callbacks=[Watcher(5)]).train()
    before = sorted(output.rglob("*"))
    assert main([*command, "train.max_steps=20", "--nproc", "2", "parallel.zero_stage=3", "optimizer.type=lion"]) == 0
    told = capsys.readouterr().out
    for part in (
        f"goes on from  {output}/checkpoints/step-00000004, of 20",
        "files, every one as it was written",
        "restored      step 4 of 8, epoch 0.8; 32 samples read; 38 parameters; AdamW with exp_avg, exp_avg_sq, step",
        "cut anew      data_parallel_size 1 -> 2, zero_stage 0 -> 3: the same numbers to float32 rounding",
        'changed       optimizer.type: "adamw" -> "lion" (the run will refuse this)',
        "changed       train.max_steps: 8 -> 20",
        "begun again   steps 5 to 5, and their rows of metrics.jsonl",
    ):
        assert part in told
    assert sorted(output.rglob("*")) == before
    assert main(command) == 0
    assert "cut anew      nothing: the same ranks, so the same numbers to the last bit" in capsys.readouterr().out
    assert main([*command, "checkpoint.resume_from_checkpoint=null"]) == 0
    assert capsys.readouterr().out.startswith("begins: ")


def test_the_base_of_an_adapter_must_stay(models: Path, instructions: Path, tmp_path: Path) -> None:
    own = sections("dp1", "lora", models, instructions, tmp_path)
    train(own, crash_at=3)
    write_family(tmp_path / "other", "llama_tied", seed=1, changes={"attention_dropout": 0.1})
    with pytest.raises(CollieError, match="an adapter on other weights than those of"):
        train(changed(own, {"model.model_name_or_path": str(tmp_path / "other")}))


def test_another_run_goes_on_from_a_checkpoint(own: Sections, tmp_path: Path, whole: Any) -> None:
    train(own, crash_at=5)
    new = {"train.output_dir": str(tmp_path / "other"), "checkpoint.resume_from_checkpoint": str(output_of(own))}
    losses = train(changed({key: dict(value) for key, value in own.items()}, new))[0]
    assert losses == whole["dropout"][4:]
    assert files.checkpoints_in(output_of(own) / "checkpoints")[0].name == "step-00000004"


def test_a_run_that_never_saved_begins_again(own: Sections, whole: Any) -> None:
    assert train(own, crash_at=1)[0] == whole["dropout"][:1]
    assert train(own)[0] == whole["dropout"]
    twice = {**own, "checkpoint": {}}
    with pytest.raises(CollieError, match="already holds a run"):
        train(twice)
