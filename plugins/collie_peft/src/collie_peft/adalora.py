"""AdaLoRA through peft (Zhang et al., arXiv 2303.10512): a budget of ranks that goes where it matters.

W x + (lora_alpha / init_r) B diag(E) A x. A triplet is a row of A, an entry of E and a column of B. Layers and averages
are peft's; the order of a step is that of the paper's algorithm 1:

    gradient of loss and penalty ► sensitivity, with the weights before the update ► update ► E outside the budget = 0

Scores of all pipeline stages are compared with each other. Where tensor-parallel ranks share a layer, each computes the
whole adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import peft
import torch
from peft.tuners.adalora import AdaLoraLayer, RankAllocator
from torch import Tensor, nn

from collie_core.api import AdapterConfig, Run, RunError, Topology, whole_of_part
from collie_peft.adalora_config import FLOAT16, unreachable
from collie_peft.files import read_config
from collie_peft.injected import NAME, InjectedAdapter

SENSITIVITY, UNCERTAINTY = "sensitivity", "uncertainty"  # averages, eq. (9) and (10)
PARTS = {"lora_A": 0, "lora_E": 0, "lora_B": 1}  # and the dimension of the triplets


class AdaLoraAdapter(InjectedAdapter):
    """Puts AdaLoRA onto a transformers model, and allocates its ranks in a run."""

    config_class: ClassVar = peft.AdaLoraConfig

    def attach(self, model: nn.Module, config: AdapterConfig) -> nn.Module:
        """See `InjectedAdapter`."""
        options: Any = config
        if options.total_step is None:  # peft wants a number; that of the run comes when it starts
            config = config.model_copy(update={"total_step": options.tinit + options.tfinal + 1})
        return super().attach(model, config)

    def state(self, path: Path) -> Mapping[str, Tensor]:
        """See `InjectedAdapter`. Triplets that peft has left out of a file come as zeros."""
        values = dict(super().state(path))
        for name, kept in (read_config(path, self.config_class).rank_pattern or {}).items():
            layer = name.removesuffix(f".{NAME}").removesuffix(".lora_E")
            for part, dim in PARTS.items():
                key = f"{layer}.{part}.{NAME}"
                values[key] = spread(values[key], torch.tensor(kept), dim)
        return values

    def _inject(self, model: nn.Module, config: Any) -> nn.Module:
        config.rank_pattern = None  # else peft saves and expects what is left of each layer, and `state` gives it whole
        return super()._inject(model, config)

    def collie_run_start(self, run: Run) -> None:
        """Begin with the budget of the whole model, or keep that of a saved adapter which is pruned already.

        Raises:
            RunError: the run is too short for the schedule or computes in float16, or its model has no such layer.
        """
        if run.facts.get("precision") == "float16":  # chosen by the device
            raise RunError(f"adapter.type=adalora: {FLOAT16}")
        layers, config = layers_of(run.model), config_of(run.model)
        found = run.topology.gather_objects((config, {name: masks_of(layer) for name, layer in layers.items()}))
        masks = {name: mask for _, masks in found for name, mask in masks.items()}
        if not masks:
            raise RunError("adapter.type=adalora: the model has no AdaLoRA layer")
        config = config or next(config for config, _ in found if config)
        goes_on = bool(run.config.adapter and run.config.adapter.adapter_name_or_path)
        is_pruned = goes_on and 0 < sum(map(sum, masks.values())) < sum(map(len, masks.values()))
        if run.step > 0:  # from a checkpoint, which has averages as long as there is something to decide
            is_pruned = not any(run.topology.gather_objects(any(map(_averages, run.model.parameters()))))
        last = 0 if is_pruned else _last_allocation(run, config, goes_on=goes_on)
        run.model.collie_adalora = Schedule(run.model, layers, config, masks, last)  # type: ignore[assignment]

    def collie_before_update(self, run: Run) -> None:
        """Add the gradient of the penalty; average sensitivities."""
        schedule: Any = run.model.collie_adalora
        schedule.before_update(run.step + 1)

    def collie_after_step(self, run: Run) -> None:
        """Set singular values outside the budget to zero."""
        schedule: Any = run.model.collie_adalora
        run.metrics["adalora_rank"] = schedule.after_update(run.step, run.topology)


def _last_allocation(run: Run, config: Any, *, goes_on: bool) -> int:
    """The step of the last allocation. How long the schedule is stands in peft's configuration after it.

    Raises:
        RunError: the run ends too early for it.
    """
    total = (None if goes_on else getattr(run.config.adapter, "total_step", None)) or run.max_steps
    if why := unreachable(config.tinit, config.tfinal, total, run.max_steps):
        raise RunError(f"adapter: {why}")
    for one in (config, config_of(whole_of_part(run.model))):  # the second one will be saved
        if one is not None:
            one.total_step = total
    return total - int(config.tfinal)


class Schedule:
    """The budget of one run; stands on the model as `collie_adalora`. Steps count from 1, as in the paper."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, AdaLoraLayer],
        config: Any,
        masks: Mapping[str, list[bool]],
        last: int,
    ) -> None:
        self.model, self.layers = model, layers  # of this rank
        self.masks = {name: torch.tensor(masks[name]) for name in layers}  # which triplets have a singular value
        self.last = last  # the step of the last allocation; 0: there is none
        self.penalty = config.orth_reg_weight / (2 * len(masks))  # for each A and B of the whole model
        self.allocator = RankAllocator(model, config, NAME)
        self.allocator.init_bgt = sum(map(len, masks.values()))
        self.allocator.target_bgt = config.target_r * len(masks)
        self.rank = sum(map(sum, masks.values()))  # of the whole model, as far as the budget says

    @torch.no_grad()
    def before_update(self, step: int) -> None:
        """Gradients become those of loss and penalty, and sensitivities are averaged, eq. (8) to (10).

        Raises:
            RunError: the optimizer has dropped the gradients.
        """
        parameters = [getattr(layer, part)[NAME] for layer in self.layers.values() for part in PARTS]
        if parameters and all(parameter.grad is None for parameter in parameters):
            raise RunError("adapter.type=adalora: the optimizer has dropped the gradients in backward; use another one")
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for layer in self.layers.values() if self.penalty else ():
            a, b = layer.lora_A[NAME], layer.lora_B[NAME]
            a.grad.add_(penalty_gradient(a), alpha=self.penalty)
            b.grad.add_(penalty_gradient(b.T).T, alpha=self.penalty)
        if step <= self.last:
            self._average()

    @torch.no_grad()
    def after_update(self, step: int, topology: Topology) -> int:
        """Mask singular values when it is time, and after the last allocation always; returns how many may be left."""
        is_due = step > self.last
        if not is_due:
            self.rank, is_due = self.allocator.budget_schedule(step)
            is_due = is_due or step == self.last
            if is_due:
                self._allocate(topology)
            if step == self.last:
                self._forget()  # the averages are not needed any more
        if is_due:
            for name, layer in self.layers.items():
                values = layer.lora_E[NAME]
                values.masked_fill_(~self.masks[name].to(values.device)[:, None], 0.0)
        return self.rank

    def _average(self) -> None:
        """peft's averages, which lie on the parameters, so that checkpoints have them."""
        allocator, parameters = self.allocator, dict(self.model.named_parameters())
        for name, parameter in parameters.items():
            if found := _averages(parameter):
                allocator.ipt[name] = found[SENSITIVITY]
                allocator.exp_avg_ipt[name], allocator.exp_avg_unc[name] = found[SENSITIVITY], found[UNCERTAINTY]
        allocator.update_ipt(self.model)
        for name in allocator.ipt:
            kept = {SENSITIVITY: allocator.exp_avg_ipt[name], UNCERTAINTY: allocator.exp_avg_unc[name]}
            parameters[name].collie_state = kept  # type: ignore[attr-defined]

    def _forget(self) -> None:
        for parameter in self.model.parameters():
            if _averages(parameter):
                parameter.collie_state = {}  # type: ignore[attr-defined]
        self.allocator.reset_ipt()

    def _allocate(self, topology: Topology) -> None:
        """Decide with the scores of one rank of each stage, so that all ranks decide alike."""
        is_speaker = topology.tp.rank == 0 and topology.dp.rank == 0
        own = {name: self.score(name).tolist() for name in self.layers} if is_speaker else {}
        scores = {name: score for found in topology.gather_objects(own) for name, score in found.items()}
        kept = most_important(scores, self.rank)
        self.masks = {name: torch.tensor(kept[name]) for name in self.layers}

    def score(self, name: str) -> Tensor:
        """The importance of the triplets of a layer, [r]: s(E) + mean s(A) + mean s(B), eq. (7)."""

        def importance(part: str) -> Tensor:  # eq. (11)
            key = f"{name}.{part}.{NAME}"
            averages: tuple[Tensor, Tensor] = self.allocator.exp_avg_ipt[key], self.allocator.exp_avg_unc[key]
            return averages[0] * averages[1]

        return importance("lora_E").view(-1) + (importance("lora_A").mean(1) + importance("lora_B").mean(0))


def _averages(parameter: nn.Parameter) -> dict[str, Tensor]:
    """Of a parameter; empty when there are none."""
    return getattr(parameter, "collie_state", {})


def layers_of(model: nn.Module) -> dict[str, AdaLoraLayer]:
    """The layers with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaLoraLayer)}


def config_of(model: nn.Module) -> Any:
    """What peft keeps on a model; None when it has put nothing there."""
    found: Any = getattr(model, "peft_config", {})
    return found.get(NAME)


def masks_of(layer: AdaLoraLayer) -> list[bool]:
    """Which triplets have a singular value."""
    return [value != 0 for value in layer.lora_E[NAME].flatten().tolist()]


def most_important(scores: Mapping[str, list[float]], budget: int) -> dict[str, list[bool]]:
    """Which triplets of all layers are among the `budget` with the highest scores; of equal ones, the first by name."""
    every = [(-score, name, index) for name, found in scores.items() for index, score in enumerate(found)]
    kept = {(name, index) for _, name, index in sorted(every)[:budget]}
    return {name: [(name, index) in kept for index in range(len(found))] for name, found in scores.items()}


def penalty_gradient(rows: Tensor) -> Tensor:
    """The gradient of ||R R^T - I||_F with respect to R [r, n]: 2 (R R^T - I) R / ||R R^T - I||_F.

    So in peft and in the authors' code; eq. (4) of the paper has the square of the norm.
    """
    excess = rows @ rows.T
    excess.diagonal().sub_(1.0)
    norm: Tensor = torch.linalg.matrix_norm(excess).clamp_min(torch.finfo(excess.dtype).tiny)
    return (excess @ rows) * norm.reciprocal() * 2.0


def spread(values: Tensor, kept: Tensor, dim: int) -> Tensor:
    """`values` of the triplets that were kept, and zeros for the others."""
    if values.shape[dim] == len(kept):
        return values
    shape = list(values.shape)
    shape[dim] = len(kept)
    return values.new_zeros(shape).index_copy(dim, kept.nonzero().flatten(), values)
