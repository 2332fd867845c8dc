"""The step through DeepSpeed's engine: ZeRO stages 1 to 3, float32 master weights below float32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from collie_core.compat import deepspeed_start
from collie_core.engine.deepspeed_config import deepspeed_config as deepspeed_config
from collie_core.engine.step import NOT_A_NUMBER, LossFn, TrainFn, micro_batch_loss, token_mean_loss
from collie_core.errors import RunError

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from collie_core.data.loader import StepBatch
    from collie_core.topology import Topology


class DeepSpeedStep:
    """Holds the engine. DeepSpeed averages gradients over ranks, so each share is scaled by their number."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        *,
        config: dict[str, Any],
        topology: Topology,
        loss_fn: LossFn = token_mean_loss,
        train_fn: TrainFn | None = None,
    ) -> None:
        self.engine = _initialize(model, optimizer, config, topology)
        self.scheduler = scheduler
        self.topology = topology
        self.loss_fn = loss_fn
        self.train_fn = train_fn
        self.stage = int(config["zero_optimization"]["stage"])

    @property
    def model(self) -> nn.Module:
        """The engine: calling it gathers partitioned weights as needed."""
        return self.engine  # type: ignore[no-any-return]

    @property
    def learning_rate(self) -> float:
        """See `Step`."""
        return float(self.scheduler.get_last_lr()[0])

    def precision(self) -> AbstractContextManager[Any]:
        """No autocast: the engine holds the weights in the run's dtype."""
        return nullcontext()

    def forward_backward(self, batch: StepBatch, target_tokens: int) -> Tensor:
        """See `Step`."""
        total = torch.zeros((), device=self.engine.device)
        for micro_batch in batch.micro_batches:
            loss = micro_batch_loss(
                self.engine,
                micro_batch.to(self.engine.device),
                target_tokens,
                loss_fn=self.loss_fn,
                train_fn=self.train_fn,
            )
            self.engine.backward(loss * self.topology.dp.size)
            total += loss.detach()
        if self.topology.dp.size > 1:
            dist.all_reduce(total, group=self.topology.dp.group)
        return total

    def update(self) -> float:
        """See `Step`. An overflow in float16 skips the update and lowers the loss scale.

        Raises:
            RunError: a gradient is not a number; nothing was updated.
        """
        self.engine.step()
        reported = self.engine.get_global_grad_norm()
        norm = math.nan if reported is None else float(reported)
        if self.engine.was_step_applied():
            self.scheduler.step()
        elif not self.engine.fp16_enabled():
            raise RunError(NOT_A_NUMBER.format(norm=norm))
        return norm

    def state_dict(self) -> Mapping[str, Tensor]:
        """See `Step`."""
        module = self.engine.module
        if self.stage < 3:
            return module.state_dict()  # type: ignore[no-any-return]
        return _gathered_state_dict(module, keep=self.topology.is_main)

    def gathered(self) -> AbstractContextManager[Any]:
        """See `Step`."""
        if self.stage < 3:
            return nullcontext()
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        trainable = [parameter for parameter in self.engine.module.parameters() if parameter.requires_grad]
        return cast(AbstractContextManager[Any], GatheredParameters(trainable))


def _initialize(model: nn.Module, optimizer: Optimizer, config: dict[str, Any], topology: Topology) -> Any:
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        raise RunError(
            f"parallel.zero_stage={config['zero_optimization']['stage']} needs DeepSpeed: "
            "pip install 'collie-core[deepspeed]'"
        ) from error
    if not dist.is_initialized():  # DeepSpeed wants a process group even for one process: in memory, no open port
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    with deepspeed_start(topology.local_rank):
        deepspeed.init_distributed(verbose=False)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def _gathered_state_dict(module: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """All weights on the CPU of the main rank, gathered one tensor at a time. Collective: every rank calls it."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        with GatheredParameters([parameter]):
            if keep:
                state[name] = parameter.detach().cpu().clone()
    state.update({name: buffer for name, buffer in module.state_dict().items() if name not in state and keep})
    return state
