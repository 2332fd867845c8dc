"""The checkpoints of one run: which to go on from, when one is due, and how it is written and read."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from collie_core.checkpoint import files
from collie_core.checkpoint.files import MODEL, STATES, TRAINER, CheckpointError
from collie_core.checkpoint.progress import data_identity, require_same_data, restore_schedule, schedule_state
from collie_core.checkpoint.signals import Asked
from collie_core.checkpoint.states import Inventory, WholeStates, require_same_parameters
from collie_core.engine.state import WEIGHT
from collie_core.errors import CollieError
from collie_core.model.boxes import whole
from collie_core.model.build import base_of_adapter
from collie_core.model.files import TensorFile
from collie_core.model.stages import lend
from collie_core.model.weights import Checkpoint
from collie_core.report.metrics import plain
from collie_core.report.rundir import CHECKPOINTS, CONFIG, PLUGINS, is_unfinished, write_json

if TYPE_CHECKING:
    from collie_core.data.loader import StepBatch
    from collie_core.hookspecs import Run
    from collie_core.parts import Parts
    from collie_core.topology import Topology

AUTO = "auto"
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
    write_model: puts the model, or the adapter, into a folder. Collective.
    """

    def __init__(self, parts: Parts, write_model: Callable[[Path], None]) -> None:
        self.parts = parts
        self.section = parts.config.checkpoint
        self.topology: Topology = parts.topology
        self.write_model = write_model
        self.folder = Path(parts.config.train.output_dir) / CHECKPOINTS
        self.source: Path | None = None  # what the run goes on from
        self.restored: dict[str, Any] = {}  # its trainer.json
        self.position = 0  # samples that were consumed, over all ranks
        self.leaving = False

    # -- going on --------------------------------------------------------------------------------------------------

    def find(self) -> None:
        """Choose what to go on from, and prove that it is sound. Collective.

        Raises:
            CheckpointError: there is none where one is asked for, or none that is sound; on every rank.
        """
        if (wanted := self.section.resume_from_checkpoint) is None:
            return
        chosen: list[Path | None] = [None]
        on_main(self.topology, lambda: chosen.__setitem__(0, self._choose(wanted)))
        self.source = self.topology.gather_objects(chosen[0])[0]
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

    def _choose(self, wanted: str) -> Path | None:
        if wanted == AUTO:
            return self._newest_sound(self.folder)
        path = Path(wanted)
        if files.step_of(path) is None:
            below = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
            found = self._newest_sound(below)
            if found is None:
                raise CheckpointError(f"checkpoint.resume_from_checkpoint={wanted} holds no checkpoint")
            path = found
        step = files.verify(path).step
        later = [one.name for one in files.checkpoints_in(self.folder) if (files.step_of(one) or 0) > step]
        if path.resolve().parent == self.folder.resolve() and later and files.step_of(Path(wanted)) is not None:
            raise CheckpointError(
                f"checkpoint.resume_from_checkpoint={wanted}: the run has gone on to {later[0]}; choose another "
                "train.output_dir to go another way from here, or delete the later checkpoints"
            )
        return path

    def _newest_sound(self, folder: Path) -> Path | None:
        """None when there is none at all.

        Raises:
            CheckpointError: there are some, and none is sound.
        """
        problems = []
        for path in files.checkpoints_in(folder):
            try:
                files.verify(path)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                logger.warning("%s; going on from %s", problem, path.name)
            return path
        if problems:
            raise CheckpointError(f"no checkpoint in {folder} is sound: {'; '.join(problems)}")
        return None

    def restore(self, run: Run) -> None:
        """Bring the engine and the run to where the checkpoint was. Collective.

        Raises:
            CheckpointError: it is of another model, optimizer or data set.
        """
        if self.source is None:
            return
        found, step, states = self.restored, self.parts.step, self._states
        self._require_same_run(found, self.source)
        file = Checkpoint(str(self.source), [self.source / STATES])
        model = None if found["weights"] == STATES else Checkpoint.open(self.source / MODEL)
        states.load(file, model)
        lend(self.parts.model)
        step.states.set_numbers(found["numbers"])
        restore_schedule(step.scheduler, found["schedule"], self.source)
        step.set_loss_scale(found["loss_scale"])
        run.step, run.epoch, self.position = found["step"], found["epoch"], found["position"]

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
        on_main(self.topology, lambda: self._require_same_base(source / MODEL))

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
        if signal := self._agreed(asked):
            run.request_stop(f"{signal} asked for it; go on with checkpoint.resume_from_checkpoint=auto")
            self.leaving = not last
        return last or self.leaving or run.step % self.section.save_steps == 0

    def save(self, run: Run, followers: Mapping[str, Follower], results: Mapping[str, float]) -> Path:
        """Write a checkpoint, whole or not at all, and delete those that are too many. Collective.

        Raises:
            CheckpointError: the main rank cannot write; on every rank.
        """
        numbers = self._numbers(run, followers, results)
        inventory = self._states.inventory()
        if self._states.part is not None and all(k[WEIGHT].dtype == self.parts.dtype for k in inventory.values()):
            numbers["weights"] = MODEL
            inventory = {name: {key: kinds[key] for key in kinds if key != WEIGHT} for name, kinds in inventory.items()}
        beside = self.folder / f".{files.folder_name(run.step)}.new"
        on_main(self.topology, lambda: (files.begin(self.folder, run.step) / MODEL).mkdir())
        try:
            self.write_model(beside / MODEL)
            self._write_states(beside / STATES, inventory)
            on_main(self.topology, lambda: self._finish(beside, numbers))
        except BaseException:
            if self.topology.is_main:
                shutil.rmtree(beside, ignore_errors=True)
            raise
        return self.folder / files.folder_name(run.step)

    def _write_states(self, path: Path, inventory: Inventory) -> None:
        """Copied to the main rank's host one tensor at a time, and written as they come."""
        kinds = {f"{name}/{key}": kind for name, found in inventory.items() for key, kind in found.items()}
        copies = self._states.stream(inventory)

        def write() -> None:
            try:
                file = TensorFile(path, kinds)
                for name, value in copies:
                    assert value is not None
                    file.write(name, whole(value.shape), value)
                file.close()
            except OSError:
                _go_through(copies)
                raise

        on_main(self.topology, write, others=lambda: _go_through(copies))

    def _finish(self, beside: Path, numbers: Mapping[str, Any]) -> None:
        """On the main rank: the rest of the files, the manifest, the name."""
        config = self.parts.config
        write_json(beside / TRAINER, numbers)
        (beside / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
        write_json(beside / PLUGINS, list(config.registry.used()))
        files.commit(beside, int(numbers["step"]))
        if self.section.save_total_limit is not None:
            files.prune(self.folder, self.section.save_total_limit)

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
        if self.topology.world_size == 1:
            return asked.name
        any_rank = torch.tensor(float(bool(asked.name)), device=self.topology.device)
        dist.all_reduce(any_rank, op=dist.ReduceOp.MAX)
        if not any_rank.item():
            return ""
        return str(next(filter(None, self.topology.gather_objects(asked.name))))


def on_main(topology: Topology, action: Callable[[], object], *, others: Callable[[], object] | None = None) -> None:
    """Do something on the main rank, and `others` elsewhere meanwhile. Collective.

    Raises:
        CheckpointError: the main rank has failed; on every rank.
    """
    said = ""
    cause: Exception | None = None
    if topology.is_main:
        try:
            action()
        except CollieError as error:
            cause, said = error, str(error)
        except OSError as error:
            cause, said = error, f"a checkpoint cannot be written: {error}"
    elif others is not None:
        others()
    said = topology.gather_objects(said)[0]
    if said:
        raise CheckpointError(said) from cause


def _go_through(copies: Iterable[object]) -> None:
    """All ranks take part in every gather, also when the main one has nowhere to put the values."""
    for _ in copies:
        pass
