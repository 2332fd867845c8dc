"""The parts of a run, each built when first needed: from the config, or handed in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from collie_core.config.rules import require_parts
from collie_core.data.dataset import TokenizedDataset, prepare_dataset
from collie_core.data.formats import chat_template
from collie_core.data.loader import Batch, Loader, check_packing, eval_batches
from collie_core.data.tokenizer import build_tokenizer, padding_id
from collie_core.engine.step import LossFn, Step, TorchStep, TrainFn, autocast, token_mean_loss
from collie_core.model.build import check_length, compute_dtype, load_pretrained, parameter_counts
from collie_core.optimizers.build import parameter_groups, schedule
from collie_core.topology import Topology

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from collie_core.config.run import RunConfig

EvalFn = Callable[[nn.Module, Iterator[Batch]], Mapping[str, float]]
"""(model in evaluation mode, batches) -> results by name; replaces the configured evaluators."""


@dataclass(frozen=True)
class HandedIn:
    """What a program gives to the `Trainer` instead of the config; see there."""

    model: nn.Module | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    train_dataset: Sequence[Mapping[str, Any]] | None = None
    eval_dataset: Sequence[Mapping[str, Any]] | None = None
    optimizer: Optimizer | Callable[[list[dict[str, Any]]], Optimizer] | None = None
    lr_scheduler: LRScheduler | Callable[[Optimizer, int], LRScheduler] | None = None
    loss_fn: LossFn = token_mean_loss
    train_fn: TrainFn | None = None
    eval_fn: EvalFn | None = None


class Parts:
    """Everything the loop drives."""

    def __init__(self, config: RunConfig, given: HandedIn) -> None:
        require_parts(config, model=given.model is not None, train_data=True)  # evaluation needs none
        self.config = config
        self.given = given
        self.registry = config.registry
        self.topology = Topology.start(config.parallel)
        self.device = self.topology.device
        self.dtype = compute_dtype(config.model.dtype, self.device)

    def build(self) -> None:
        """Everything that training needs, in the order in which mistakes are cheapest to find."""
        require_parts(self.config, model=True, train_data=self.given.train_dataset is not None)
        _ = self.tokenizer, self.model, self.train_dataset, self.eval_dataset, self.parameter_counts, self.step

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with the chat template of the run, so that it is exported with the model."""
        tokenizer = self.given.tokenizer or build_tokenizer(self.config.tokenizer, self.config.model)
        if self.config.data.chat_template is not None:
            tokenizer.chat_template = chat_template(self.config.data.chat_template, tokenizer)
        return tokenizer

    @cached_property
    def model(self) -> nn.Module:
        """The model on its device, with its weights and adapter; in float32, computing under autocast."""
        model = self._new_model() if self.given.model is None else self.given.model
        return model.to(self.device)

    def _new_model(self) -> nn.Module:
        section, adapter = self.config.model, self.config.adapter
        torch.manual_seed(self.config.train.seed)
        model: Any = load_pretrained(section, self.registry, self.tokenizer, torch.float32)
        check_length(model.config, self.config.data.max_length)
        if section.gradient_checkpointing == "full":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if adapter is not None:
            model = self.registry.build("adapter", adapter.type, model=model, config=adapter)
        return cast(nn.Module, model)

    @cached_property
    def parameter_counts(self) -> tuple[int, int]:
        """All and trainable parameters, counted before an engine partitions them."""
        return parameter_counts(self.model)

    # -- data --------------------------------------------------------------------------------------------------

    @cached_property
    def train_dataset(self) -> TokenizedDataset:
        """The tokenised training samples."""
        return self._dataset("train", self.given.train_dataset, self.config.data.train)

    @cached_property
    def eval_dataset(self) -> TokenizedDataset | None:
        """The tokenised evaluation samples, if there are any."""
        rows, sources = self.given.eval_dataset, self.config.data.eval
        return None if rows is None and not sources else self._dataset("eval", rows, sources)

    def _dataset(self, name: Literal["train", "eval"], rows: Any, sources: Any) -> TokenizedDataset:
        return prepare_dataset(
            sources if rows is None else rows,
            self.config.data,
            self.tokenizer,
            vocab_size=cast(int, self.model.config.vocab_size),  # type: ignore[union-attr]
            name=name,
        )

    @property
    def micro_batch_size(self) -> int:
        """Samples, or packed rows, per forward of one rank."""
        return self.config.per_device_train_batch_size(self.topology.dp.size)

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self.config.global_batch_size(self.topology.dp.size)

    @cached_property
    def total_samples(self) -> int:
        """Samples of the whole run, each counted as often as it is seen."""
        steps, epochs = self.config.train.max_steps, self.config.num_train_epochs
        if steps is not None:
            return steps * self.global_batch_size
        assert epochs is not None
        return max(1, round(self.train_dataset.samples_per_epoch * epochs))

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the run; the last may hold fewer samples."""
        return math.ceil(self.total_samples / self.global_batch_size)

    def loader(self) -> Loader:
        """The training samples as one `StepBatch` per optimizer step."""
        data = self.config.data
        return Loader(
            self.train_dataset,
            samples_per_step=self.global_batch_size,
            rows_per_micro_batch=self.micro_batch_size,
            max_length=data.max_length,
            packing=data.packing,
            pad_token_id=padding_id(self.tokenizer),
            seed=self.config.train.seed,
            rank=self.topology.dp.rank,
            size=self.topology.dp.size,
            total=self.total_samples,
            num_workers=data.num_workers,
        )

    def eval_batches(self, dataset: TokenizedDataset) -> Iterator[Batch]:
        """The evaluation samples, each on one rank only."""
        batches = eval_batches(
            dataset,
            batch_size=self.config.evaluation.per_device_eval_batch_size or self.micro_batch_size,
            pad_token_id=padding_id(self.tokenizer),
            rank=self.topology.dp.rank,
            size=self.topology.dp.size,
        )
        return (batch.to(self.device) for batch in batches)

    # -- engine ------------------------------------------------------------------------------------------------

    @cached_property
    def step(self) -> Step:
        """The engine: built when training starts, since DeepSpeed takes over the model it is given."""
        if self.config.data.packing:
            check_packing(self.model, rows=self.micro_batch_size)
        optimizer = self._optimizer()
        scheduler = self._scheduler(optimizer)
        stage, max_grad_norm = self.config.parallel.zero_stage, self.config.train.max_grad_norm
        shared: dict[str, Any] = {
            "topology": self.topology,
            "loss_fn": self.given.loss_fn,
            "train_fn": self.given.train_fn,
        }
        if stage == 0:
            return TorchStep(self.model, optimizer, scheduler, dtype=self.dtype, max_grad_norm=max_grad_norm, **shared)
        from collie_core.engine.deepspeed_step import DeepSpeedStep, deepspeed_config

        config = deepspeed_config(
            parallel=self.config.parallel,
            dtype=self.dtype,
            micro_batch_size=self.micro_batch_size,
            data_parallel_size=self.topology.dp.size,
            max_grad_norm=max_grad_norm,
            overrides=self.config.deepspeed,
        )
        return DeepSpeedStep(self.model, optimizer, scheduler, config=config, **shared)

    @property
    def training(self) -> bool:
        """Whether the engine stands, so that the model must be called through it."""
        return "step" in self.__dict__

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast context of a forward pass outside training."""
        return self.step.precision() if self.training else autocast(self.device, self.dtype)

    @contextmanager
    def whole_weights(self) -> Iterator[Mapping[str, Tensor]]:
        """The weights of the whole model by name, on the main rank; the trainable ones also inside the model.

        Collective: under ZeRO-3 every rank enters. With an adapter the frozen base is not gathered.
        """
        if not self.training:
            yield self.model.state_dict()
        elif self.config.adapter is None:
            yield self.step.state_dict()
        else:
            with self.step.gathered():
                yield {}

    def _optimizer(self) -> Optimizer:
        given, section = self.given.optimizer, self.config.optimizer
        if isinstance(given, Optimizer):
            return given
        groups = parameter_groups(self.model, section.weight_decay)
        if given is not None:
            return given(groups)
        return cast(Optimizer, self.registry.build("optimizer", section.type, params=groups, config=section))

    def _scheduler(self, optimizer: Optimizer) -> LRScheduler:
        given = self.given.lr_scheduler
        if isinstance(given, LRScheduler):
            return given
        if given is not None:
            return given(optimizer, self.max_steps)
        return schedule(self.config.lr_scheduler, optimizer, self.max_steps)
