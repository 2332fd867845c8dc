"""A rehearsal of a run: a few steps on one topology, with a record of what came out, to compare with another's.

The record holds loss and gradient norm of every step. Of the first step it also holds a fingerprint of each module's
output, sample by sample: ranks hold different samples, layers and shards, but a sample at a position of the run is
the same everywhere. Where two records differ, `first_difference` finds the module in which it begins.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from collie_core.config.run import RunConfig
    from collie_core.data.loader import Layout, StepBatch
    from collie_core.hookspecs import Run

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}
"""Of losses, and of gradient norms relative to their size."""

OUTPUT_TOLERANCE = 10.0
"""Of outputs, relative to their size, in units of the above: rounding grows over the layers."""

_CHUNK = 1 << 22  # entries that are looked at in float64 at a time


# -- topologies ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """A topology by name: `tp2pp2dp2zero1`."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero: int = 0

    @classmethod
    def parse(cls, name: str) -> Sizes:
        """What is not named is 1, and ZeRO 0.

        Raises:
            RunError: the name says something else.
        """
        parts = re.findall(r"(tp|pp|dp|zero)(\d+)", name)
        sizes = {axis: int(size) for axis, size in parts}
        whole = "".join(map("".join, parts)) == name and len(sizes) == len(parts) > 0
        if not whole or min(sizes.get(axis, 1) for axis in ("tp", "pp", "dp")) < 1 or sizes.get("zero", 0) > 3:
            raise RunError(
                f"{name!r} is no topology: write sizes of tp, pp and dp and the ZeRO stage, as tp2pp2dp2zero1"
            )
        return cls(**sizes)

    @property
    def processes(self) -> int:
        """How many it takes."""
        return self.tp * self.pp * self.dp

    def overrides(self, config: RunConfig) -> list[str]:
        """The `parallel:` section of the run on this topology; what only makes sense on another is left out."""
        parallel = config.parallel
        changed: dict[str, int | bool | str] = {
            "tensor_parallel_size": self.tp,
            "pipeline_parallel_size": self.pp,
            "data_parallel_size": self.dp,
            "zero_stage": self.zero,
            "sequence_parallel": parallel.sequence_parallel and self.tp > 1,
            "offload_optimizer": parallel.offload_optimizer and self.zero > 0,
            "offload_param": parallel.offload_param and self.zero == 3,
        }
        if isinstance(parallel.pipeline_cuts, list) and len(parallel.pipeline_cuts) != self.pp:
            changed["pipeline_cuts"] = "parameters"
        unread = [] if self.zero else ["deepspeed={}"]
        return [f"parallel.{key}={json.dumps(value)}" for key, value in changed.items()] + unread


def rehearsal(config: RunConfig, sizes: Sizes, *, global_batch: int, steps: int, folder: Path) -> list[str]:
    """Overrides that make of a run its first steps on a topology, without evaluation.

    Raises:
        RunError: the data-parallel ranks cannot share the global batch evenly.
    """
    share, rest = divmod(global_batch, sizes.dp)
    if rest or not share:
        raise RunError(
            f"{sizes.dp} data-parallel ranks cannot share a global batch of {global_batch} evenly; "
            f"set train.global_batch_size={max(1, share) * sizes.dp}"
        )
    can: Any = config.registry.component("optimizer", config.optimizer.type).can
    # An optimizer that updates in backward takes its share at once, however much that is on this topology.
    most = share if can.fuses_backward else config.train.per_device_train_batch_size or 1
    micro_batch = max(size for size in range(1, share + 1) if share % size == 0 and size <= most)
    return [
        *sizes.overrides(config),
        f"train.global_batch_size={global_batch}",
        f"train.per_device_train_batch_size={micro_batch}",
        "train.gradient_accumulation_steps=null",
        f"train.max_steps={steps}",
        "train.num_train_epochs=null",
        "train.logging_steps=1",
        f"train.output_dir={json.dumps(str(folder / 'run'))}",
        f"model.dtype={dtype_of(config)}",
        "data.eval=[]",
        "evaluation={}",
        "report_to=[]",
    ]


def dtype_of(config: RunConfig) -> str:
    """The precision that is compared: float32, unless the configuration names another."""
    return "float32" if config.model.dtype == "auto" else config.model.dtype


# -- the record ---------------------------------------------------------------------------------------------


def record(config: RunConfig, folder: Path) -> None:
    """Train as `config` says, export nothing, and write this rank's part of the record into `folder`."""
    from collie_core.rehearsal import Rehearsal

    recorder = Recorder()
    Rehearsal(config, callbacks=[recorder], observers=()).train()
    recorder.write(folder)


class Recorder:
    """A callback that keeps what `Record` holds."""

    def __init__(self) -> None:
        self._found: dict[str, Any] = {"losses": [], "norms": [], "modules": {}, "gradients": {}}
        self._run: Run | None = None
        self._layouts: list[Layout] = []
        self._forward = -1  # number of the forward that runs, or ran last, in the first step
        self._inside = False  # of a forward, not of one that checkpointing computes again in backward
        self._calls: dict[str, int] = {}  # of each module in this forward
        self._handles: list[Any] = []

    def collie_before_step(self, run: Run, batch: StepBatch) -> None:
        """Before the first one: look at every module's output, behind the hooks of others."""
        if run.step > 0:
            return
        self._run = run
        self._layouts = [micro_batch.layout for micro_batch in batch.micro_batches]
        self._handles.append(run.model.register_forward_pre_hook(self._begin))
        self._handles += [
            module.register_forward_hook(functools.partial(self._look, name))
            for name, module in run.model.named_modules()
            if name and _is_whole(module)
        ]
        self._handles.append(run.model.register_forward_hook(self._end))

    def collie_before_update(self, run: Run) -> None:
        """After the first backward: squares of the gradients, where this rank counts them."""
        if run.step > 0:
            return
        for handle in self._handles:
            handle.remove()
        if run.topology.dp.rank > 0:  # they hold the same
            return
        for name, parameter in run.model.named_parameters():
            counts = run.topology.tp.rank == 0 or getattr(parameter, "tensor_model_parallel", False)
            if parameter.grad is not None and counts:
                self._found["gradients"][name] = float(parameter.grad.double().square().sum())

    def collie_after_step(self, loss: Tensor) -> None:
        """Every step."""
        self._found["losses"].append(float(loss))

    def collie_metrics(self, values: Mapping[str, Any]) -> None:
        """Every step, on rank 0."""
        self._found["norms"].append(float(values["grad_norm"]))

    def write(self, folder: Path) -> None:
        """This rank's file."""
        assert self._run is not None
        topology = self._run.topology
        self._found["stage"] = topology.pp.rank
        (folder / f"rank-{topology.rank:05}.json").write_text(json.dumps(self._found))

    def _begin(self, *_: Any) -> None:
        self._forward += 1
        self._inside = True
        self._calls = {}

    def _end(self, *_: Any) -> None:
        self._inside = False

    def _look(self, name: str, module: nn.Module, _: Any, output: Any) -> None:
        tensor = _first_tensor(output)
        if not self._inside or tensor is None or self._forward >= len(self._layouts):
            return
        from collie_core.model.shard import gathered_output

        number = self._calls[name] = self._calls.get(name, 0) + 1
        whole = gathered_output(module, tensor.detach())
        prints = _fingerprints(tensor.detach() if whole is None else whole, self._layouts[self._forward])
        if prints:
            self._found["modules"].setdefault(name if number == 1 else f"{name} (call {number})", {}).update(prints)


def _is_whole(module: nn.Module) -> bool:
    """Not one in which stubs stand for what other stages own: its output is not the stock one."""
    from collie_core.model.stages import Stub

    return not any(isinstance(inner, Stub) for inner in module.modules())


def _first_tensor(output: Any) -> Tensor | None:
    import torch

    while not isinstance(output, torch.Tensor):
        if isinstance(output, Mapping):
            output = list(output.values())
        if not isinstance(output, Sequence) or not output:
            return None
        output = output[0]
    return output if output.is_floating_point() else None


def _fingerprints(output: Tensor, layout: Layout) -> dict[str, list[float]]:
    """Position in the run -> fingerprint of the sample's part; nothing where the output is not one row per sample.

    Args:
        output: [B, L, ...] or [B * L, ...].
        layout: for each of the B rows its samples.
    """
    rows = len(layout)
    longest = max(sum(length for _, length in samples) for samples in layout)
    if output.ndim == 2 and output.shape[0] == rows * longest:  # experts see a flat list
        output = output.unflatten(0, (rows, -1))
    if output.ndim < 3 or output.shape[0] != rows or output.shape[1] < longest:
        return {}
    found = {}
    for row, samples in enumerate(layout):
        begin = 0
        for position, length in samples:
            if length:
                found[str(position)] = _fingerprint(output[row, begin : begin + length].flatten(1))
            begin += length
    return found


def _fingerprint(values: Tensor) -> list[float]:
    """Width, norm, sum and a fixed projection of [L, width], in float64."""
    import torch

    length, width = values.shape
    # Cosines of whole numbers are as good as random and the same everywhere.
    across = torch.arange(1, width + 1, device=values.device, dtype=torch.float64).cos()
    along = torch.arange(1, length + 1, device=values.device, dtype=torch.float64).cos()
    rows = max(1, _CHUNK // max(1, width))
    squares = total = projection = 0.0
    for part, weights in zip(values.split(rows), along.split(rows), strict=True):
        exact = part.double()
        squares += float(exact.square().sum())
        total += float(exact.sum())
        projection += float(weights @ (exact @ across))
    return [float(width), math.sqrt(squares), total, projection]


# -- the comparison -----------------------------------------------------------------------------------------


@dataclass
class Record:
    """What all ranks of a rehearsal have written."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    modules: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    """Module, in the order of execution -> position of a sample -> fingerprints on the ranks that have it."""
    gradients: dict[str, float] = field(default_factory=dict)  # parameter -> norm, where the engine keeps them

    @classmethod
    def read(cls, folder: Path) -> Record:
        """The files that `Recorder.write` has written."""
        ranks = [json.loads(file.read_text()) for file in sorted(folder.glob("rank-*.json"))]
        found = cls(ranks[0]["losses"], ranks[0]["norms"])
        for rank in sorted(ranks, key=lambda rank: int(rank["stage"])):
            for name, samples in rank["modules"].items():
                kept = found.modules.setdefault(name, {})
                for position, fingerprint in samples.items():
                    kept.setdefault(position, []).append(fingerprint)
            for name, square in rank["gradients"].items():
                found.gradients[name] = found.gradients.get(name, 0.0) + square
        found.gradients = {name: math.sqrt(square) for name, square in found.gradients.items()}
        return found


@dataclass(frozen=True)
class Difference:
    """Between two records."""

    where: str  # the name of a module or parameter
    size: float  # relative
    position: int = -1  # of the sample


def largest(first: Sequence[float], second: Sequence[float], *, relative: bool = False) -> float:
    """The largest difference of two curves; infinite where one is not a number."""
    found = [
        abs(one - other) / (max(abs(one), abs(other)) or 1.0 if relative else 1.0)
        for one, other in zip(first, second, strict=True)
    ]
    return max((value if math.isfinite(value) else math.inf for value in found), default=math.inf)


@dataclass(frozen=True)
class Comparison:
    """How far two records lie apart."""

    loss: float
    norm: float  # relative
    output: float  # relative, of the module that differs most
    tolerance: float

    @classmethod
    def of(cls, first: Record, second: Record, tolerance: float) -> Comparison:
        """Of two records of equally many steps."""
        outputs = [difference.size for difference in differences(first, second)]
        norm = largest(first.norms, second.norms, relative=True)
        return cls(largest(first.losses, second.losses), norm, max(outputs, default=0.0), tolerance)

    @property
    def same(self) -> bool:
        """Whether all of it is within the tolerances."""
        return max(self.loss, self.norm, self.output / OUTPUT_TOLERANCE) <= self.tolerance

    def __str__(self) -> str:
        return (
            f"losses differ by at most {self.loss:.1e}, gradient norms by {self.norm:.1e} of their size "
            f"({self.tolerance:g} is allowed), outputs of modules in the first step by {self.output:.1e} of theirs "
            f"({self.tolerance * OUTPUT_TOLERANCE:g})"
        )


def differences(first: Record, second: Record) -> Iterator[Difference]:
    """For each module that both have looked at, in the order of execution, the sample that differs most."""
    for name, samples in first.modules.items():
        others = second.modules.get(name, {})
        found = [
            Difference(name, _distance(one, other), int(position))
            for position, prints in samples.items()
            for one in prints
            for other in others.get(position, ())
            if one[0] == other[0]  # a shard cannot be compared with a whole
        ]
        if found:
            yield max(found, key=lambda difference: difference.size)


def first_difference(first: Record, second: Record, tolerance: float) -> Difference | None:
    """Where the first forward begins to differ."""
    return next((found for found in differences(first, second) if found.size > tolerance), None)


def first_gradient_difference(first: Record, second: Record, tolerance: float) -> Difference | None:
    """In the order of backward: the last parameter of the model whose gradient differs."""
    for name in reversed(first.gradients):
        if name in second.gradients:
            size = largest([first.gradients[name]], [second.gradients[name]], relative=True)
            if size > tolerance:
                return Difference(name, size)
    return None


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Relative to the norm. A random error moves sum and projection by about as much as itself."""
    scale = max(one[1], other[1]) or 1.0
    size = max(abs(mine - theirs) for mine, theirs in zip(one[1:], other[1:], strict=True)) / scale
    return size if math.isfinite(size) else math.inf
