"""The checkpoints of one run: which to go on from, when one is due, and how it is written and read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from collie_core.checkpoint import files
from collie_core.checkpoint.choose import AUTO, choose, newest_sound
from collie_core.checkpoint.files import MODEL, STATES, TRAINER, CheckpointError
from collie_core.checkpoint.progress import data_identity, require_same_data, restore_schedule, schedule_state
from collie_core.checkpoint.saving import FAILING, Finish, Saver
from collie_core.checkpoint.signals import Asked, EvaluationLeft
from collie_core.checkpoint.states import Inventory, WholeStates, require_same_parameters
from collie_core.engine.state import WEIGHT
from collie_core.errors import CollieError
from collie_core.export import put_trained, write_trained
from collie_core.model.boxes import whole
from collie_core.model.build import base_of_adapter
from collie_core.model.files import OpenFile, TensorFile
from collie_core.model.stages import lend
from collie_core.model.weights import Checkpoint
from collie_core.report.metrics import plain
from collie_core.report.rundir import CHECKPOINTS, CONFIG, PLUGINS, is_unfinished, write_json

if TYPE_CHECKING:
    from collie_core.data.loader import StepBatch
    from collie_core.hookspecs import Run
    from collie_core.parts import Parts
    from collie_core.topology import Topology

UNREADABLE = "a checkpoint cannot be read"
NEEDED = (
    *("step", "epoch", "position", "weights", "optimizer", "global_batch_size", "data", "parameters", "numbers"),
    *("schedule", "loss_scale", "results", "followers"),
)

logger = logging.getLogger("collie")


class Follower(Protocol):
    """What follows a run and keeps numbers of its own."""

    def state(self) -> dict[str, Any]:
        """Plain numbers. Collective."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state` gave."""


class Checkpoints:
    """Args:
    parts: of the run.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.section = parts.config.checkpoint
        self.topology: Topology = parts.topology
        self.saver = Saver(Path(parts.config.train.output_dir) / CHECKPOINTS, self.section, self.topology)
        self.source: Path | None = None  # what the run goes on from
        self.restored: dict[str, Any] = {}  # its trainer.json
        self.position = 0  # samples that were consumed, over all ranks
        self.leaving = False
        self.owes_evaluation = False  # the one after the last step was left when a signal came
        self._owed = False  # before the evaluation that was last begun
        self._last = False  # whether the run ends after the last step

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self.saver.folder

    @property
    def are_saved(self) -> bool:
        """Whether the run saves any."""
        return self.section.save_steps is not None

    # -- going on --------------------------------------------------------------------------------------------------

    def find(self) -> None:
        """Choose what to go on from, and prove that it is sound. Collective.

        Raises:
            CheckpointError: there is none where one is asked for, or none that is sound; on every rank.
        """
        if (wanted := self.section.resume_from_checkpoint) is None:
            return
        self.source = self.topology.on_main(lambda: choose(wanted, self.folder, self.saver.mirror), failing=UNREADABLE)
        if self.source is not None:
            self.restored = files.read_json(self.source / TRAINER)
            if missing := [name for name in NEEDED if name not in self.restored]:
                raise CheckpointError(f"{self.source / TRAINER} lacks {', '.join(missing)}")

    @property
    def may_replace(self) -> bool | None:
        """Whether the run may write over what its folder holds; None: as the configuration says."""
        if self.source is not None:
            return True if self.source.resolve().parent == self.folder.resolve() else None
        restarts = self.section.resume_from_checkpoint == AUTO and is_unfinished(self.folder.parent)
        return True if restarts else None

    @property
    def continues(self) -> int | None:
        """The step from which the record of the folder goes on; None: it begins anew."""
        return int(self.restored["step"]) if self.source is not None and self.may_replace else None

    def restore(self, run: Run) -> None:
        """Bring the engine and the run to where the checkpoint was. Collective.

        Raises:
            CheckpointError: it is of another model, optimizer or data set.
        """
        if self.source is None:
            return
        found, step = self.restored, self.parts.step
        self._require_same_run(found, self.source)
        self._load(self.source, found)
        restore_schedule(step.scheduler, found["schedule"], self.source)
        step.set_loss_scale(found["loss_scale"])
        run.step, run.epoch, self.position = found["step"], found["epoch"], found["position"]

    def go_back(self) -> Path | None:
        """Give the engine weights and states of the newest sound checkpoint again, and gives it; None: there is none.

        Collective. The schedule and the position in the data stay where they are.
        """
        self.saver.wait()
        newest: Path | None = self.topology.on_main(lambda: newest_sound(self.folder), failing=UNREADABLE)
        source = newest or self.source
        if source is not None:
            self._load(source, files.read_json(source / TRAINER))
        return source

    def _load(self, source: Path, found: Mapping[str, Any]) -> None:
        """Weights, states, and the options of groups that the optimizer has changed."""
        model = None if found["weights"] == STATES else Checkpoint.open(source / MODEL)
        self._states.load(Checkpoint(str(source), [source / STATES]), model)
        lend(self.parts.model)
        self.parts.step.states.set_numbers(found["numbers"])
        self.owes_evaluation = found.get("owes_evaluation", False)

    def _require_same_run(self, found: Mapping[str, Any], source: Path) -> None:
        here = self._identity()
        if found["optimizer"] != here["optimizer"]:
            raise CheckpointError(
                f"{source} is of a run with the optimizer {found['optimizer']}, and it is {here['optimizer']} here; to "
                f"begin anew with its weights, name {source / MODEL} in model.model_name_or_path"
            )
        if found["global_batch_size"] != here["global_batch_size"]:
            raise CheckpointError(
                f"{source} is of a run with train.global_batch_size={found['global_batch_size']}, and it is "
                f"{here['global_batch_size']} here; set it as it was"
            )
        require_same_parameters(found["parameters"], self._states, str(source))
        require_same_data(found["data"], here["data"], source)
        self.topology.on_main(lambda: self._require_same_base(source / MODEL), failing=UNREADABLE)

    def _require_same_base(self, adapter: Path) -> None:
        """The frozen weights below an adapter are not part of a checkpoint, so they must be those that it had."""
        base = self.parts.config.model.model_name_or_path
        if self.parts.config.adapter is None or base is None:
            return
        saved = base_of_adapter(adapter)
        if saved.base_fingerprint and saved.base_fingerprint != Checkpoint.open(base).fingerprint():
            raise CheckpointError(f"{adapter.parent} is of an adapter on other weights than those of {base}")

    # -- saving ----------------------------------------------------------------------------------------------------

    def due(self, run: Run, batch: StepBatch, asked: Asked, *, last: bool) -> bool:
        """Whether a checkpoint follows the step of `batch`. Collective: all ranks agree on whether to leave."""
        self.position += batch.samples
        if self.section.save_steps is None:
            return False
        self._last = last = last or bool(run.stop_reason)
        self.heed(run, asked)
        return last or self.leaving or run.step % self.section.save_steps == 0

    def heed(self, run: Run, asked: Asked) -> None:
        """Leave, if a signal asked any rank for it. Collective."""
        if signal := self._agreed(asked):
            run.request_stop(f"{signal} asked for it; go on with checkpoint.resume_from_checkpoint=auto")
            self.leaving = not self._last or self.owes_evaluation

    def evaluate(self, evaluation: Callable[[], None]) -> None:
        """Run an evaluation. One that a signal ends before its end is done again when the run goes on."""
        self._owed, self.owes_evaluation = self.owes_evaluation, False
        try:
            evaluation()
        except EvaluationLeft:
            self.owes_evaluation = True

    def settle(self, run: Run, asked: Asked, followers: Mapping[str, Follower], results: Mapping[str, float]) -> None:
        """After an evaluation before the first step: leave, if a signal has ended it, or save that it is done.
        Collective.
        """
        if self.owes_evaluation:
            self.heed(run, asked)
        elif self._owed:
            self.save(run, followers, results)

    def save(self, run: Run, followers: Mapping[str, Follower], results: Mapping[str, float]) -> None:
        """Write a checkpoint, whole or not at all, and delete those that are too many. Collective.

        Raises:
            CollieError: the main rank cannot write, and `checkpoint.on_error` says to stop; on every rank.
        """
        numbers = self._numbers(run, followers, results)
        inventory = self._states.inventory()
        if self._states.part is not None and all(k[WEIGHT].dtype == self.parts.dtype for k in inventory.values()):
            numbers["weights"] = MODEL
            inventory = {name: {key: kinds[key] for key in kinds if key != WEIGHT} for name, kinds in inventory.items()}
        finish = Finish(lambda folder: self._write_rest(folder, numbers), run.best.get("step"))
        try:
            with self.saver.checkpoint(run.step, finish) as (beside, open_file):
                self.topology.on_main((beside / MODEL).mkdir, failing=FAILING)
                write_trained(self.parts, beside / MODEL, open_file)
                self._write_states(beside / STATES, inventory, open_file)
        except CollieError as error:
            self._failed(error)

    def finished(self) -> list[Path]:
        """The checkpoints that were finished since this was asked; on the main rank."""
        return self.saver.finished()

    def publish(self, model: Path) -> None:
        """Put what was exported into the store as well, if there is one. Collective.

        Raises:
            StorageError: it cannot be written; on every rank.
        """
        if (store := self.section.store) is not None:
            self.topology.on_main(lambda: put_trained(model, f"{store}/{MODEL}"), failing="the model cannot be stored")

    def close(self) -> None:
        """Wait until everything is on the disk. Collective.

        Raises:
            CollieError: see `save`.
        """
        self.saver.wait()
        self._share(0.0)

    def _failed(self, error: CollieError) -> None:
        """Stop, or say so and go on; all ranks alike.

        Raises:
            CollieError: it is to stop.
        """
        if self.section.on_error == "stop":
            raise error
        if self.topology.is_main:
            newest = next(iter(files.checkpoints_in(self.folder)), None)
            last = "there is none" if newest is None else f"the last one is {newest.name}"
            logger.warning("%s; the training goes on, and %s", error, last)

    def _write_states(self, path: Path, inventory: Inventory, open_file: OpenFile) -> None:
        """Copied to the main rank's host one tensor at a time, and written as they come."""
        kinds = {f"{name}/{key}": kind for name, found in inventory.items() for key, kind in found.items()}
        copies = self._states.stream(inventory)

        def write() -> None:
            try:
                file = TensorFile(path, kinds, open_file)
                for name, value in copies:
                    assert value is not None
                    file.write(name, whole(value.shape), value)
                file.close()
            except OSError:
                _go_through(copies)
                raise

        self.topology.on_main(write, failing=FAILING, others=lambda: _go_through(copies))

    def _write_rest(self, folder: Path, numbers: Mapping[str, Any]) -> None:
        config = self.parts.config
        write_json(folder / TRAINER, numbers)
        (folder / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
        write_json(folder / PLUGINS, list(config.registry.used()))

    def _numbers(self, run: Run, followers: Mapping[str, Follower], results: Mapping[str, float]) -> dict[str, Any]:
        step, topology = self.parts.step, self.topology
        everyone = topology.gather_objects(step.states.numbers())
        parallel = self.parts.config.parallel
        return {
            **self._identity(),
            "step": run.step,
            "epoch": run.epoch,
            "max_steps": run.max_steps,
            "position": self.position,
            "owes_evaluation": self.owes_evaluation,
            "weights": STATES,
            "parameters": {name: list(place.shape) for name, place in self._states.placements.items()},
            "numbers": {name: value for found in everyone for name, value in found.items()},
            "schedule": schedule_state(step.scheduler),
            "loss_scale": step.loss_scale(),
            "precision": str(self.parts.dtype).removeprefix("torch."),
            "topology": {
                "tensor_parallel_size": topology.tp.size,
                "pipeline_parallel_size": topology.pp.size,
                "data_parallel_size": topology.dp.size,
                "zero_stage": parallel.zero_stage,
            },
            "results": {name: plain(value) for name, value in results.items()},
            "followers": {name: follower.state() for name, follower in followers.items()},
        }

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {
            "optimizer": type(self.parts.step.states.optimizer).__name__,
            "global_batch_size": self.parts.global_batch_size,
            "data": self._data,
        }

    @cached_property
    def _data(self) -> dict[str, Any]:
        return data_identity(self.parts.train_dataset, self.parts.config.train.seed)

    @cached_property
    def _states(self) -> WholeStates:
        factored = self.parts.optimizer_can.factored_state
        return WholeStates.of(self.parts.model, self.parts.step.states, factored, self.topology)

    def _agreed(self, asked: Asked) -> str:
        """The signal that any rank has got; "": none has."""
        if not self._share(float(bool(asked.name))):
            return ""
        return str(next(filter(None, self.topology.gather_objects(asked.name))))

    def _share(self, number: float) -> float:
        """The largest number of any rank; also learns of a checkpoint that could not be written behind the training.

        Raises:
            CollieError: see `save`.
        """
        failed = self.saver.failure is not None
        if self.topology.world_size > 1:
            most = torch.tensor([number, float(failed)], device=self.topology.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            number, failed = float(most[0]), bool(most[1])
        if failed:
            said = self.topology.gather_objects(self.saver.failure)[0]
            self.saver.failure = None
            self._failed(said)
        return number


def _go_through(copies: Iterable[object]) -> None:
    """All ranks take part in every gather, also when the main one has nowhere to put the values."""
    for _ in copies:
        pass
