"""The parts of a run, each built when first needed: from the config, or handed in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from collie_core import storage
from collie_core.config.rules import require_fusable, require_parts
from collie_core.data.dataset import TokenizedDataset, prepare_dataset
from collie_core.data.formats import chat_template
from collie_core.data.loader import Batch, Loader, check_packing, eval_batches
from collie_core.data.sources import Row, Source, handed_rows
from collie_core.data.tokenizer import TokenizerFiles, build_tokenizer, padding_id
from collie_core.engine.curvature import drawn_labels
from collie_core.engine.step import Curvature, LossFn, Step, TorchStep, TrainFn, autocast, token_mean_loss
from collie_core.errors import MISSING, ConfigError, ModelError, PluginError, Problem
from collie_core.evaluate.run import check_metrics
from collie_core.hookspecs import CurvatureOptimizer, EvaluatorCan, FusedOptimizer, OptimizerCan
from collie_core.model.adapters import adapter_of, narrow_frozen
from collie_core.model.adapters import attach as attach_adapter
from collie_core.model.build import (
    base_of_adapter,
    check_length,
    compute_dtype,
    load_adapter,
    load_pretrained,
    parameter_counts,
    plugin_of,
    rows_of_files,
)
from collie_core.model.dropout import install as install_dropout
from collie_core.model.quantize import quantize
from collie_core.model.stages import borrow_head, lend
from collie_core.model.virtual_tokens import virtual_tokens_of
from collie_core.model.vocabulary_extension import VocabularyExtension
from collie_core.model.vocabulary_extension import extend as extend_vocabulary
from collie_core.optimizers.build import parameter_groups, schedule, with_equal_number
from collie_core.topology import Topology

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from collie_core.config.base import AdapterConfig
    from collie_core.config.evaluation import EvaluatorConfig
    from collie_core.config.run import RunConfig
    from collie_core.model.weights import Store

LONGEST = 2**31 - 1  # tokens of a sample, as the data set counts them

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
        _require_whole(config, given)
        self.config = config
        self.given = given
        self.registry = config.registry
        self.topology = Topology.start(config.parallel)
        self.device = self.topology.device
        self.dtype = compute_dtype(config.model.dtype, self.device)
        self._eval_sets: dict[tuple[str, bool], TokenizedDataset] = {}
        self.before_turn: Callable[[], None] = lambda: None  # called before each batch of an evaluation
        self.will_train = False  # so that an engine will gather what is taken apart

    def build(self) -> None:
        """Everything that training needs, in the order in which mistakes are cheapest to find."""
        train_data, eval_data = (given is not None for given in (self.given.train_dataset, self.given.eval_dataset))
        require_parts(self.config, model=True, train_data=train_data, eval_data=eval_data)
        self.will_train = True
        _ = self.tokenizer, self.model, self.train_dataset, self.eval_dataset
        self._check_evaluators()
        _ = self.parameter_counts, self.step

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with the chat template of the run, so that it is exported with the model."""
        tokenizer, _ = self._tokenizer_and_vocabulary
        if self.config.data.chat_template is not None:
            tokenizer.chat_template = chat_template(self.config.data.chat_template, tokenizer)
        return tokenizer

    @property
    def vocabulary(self) -> VocabularyExtension | None:
        """The rows that the model gets for new tokens; None: it stays as its files are."""
        return self._tokenizer_and_vocabulary[1]

    @cached_property
    def _tokenizer_and_vocabulary(self) -> tuple[PreTrainedTokenizerBase, VocabularyExtension | None]:
        section = self.config.model
        tokenizer = self.given.tokenizer or build_tokenizer(self.config.tokenizer, section)
        if section.resize_vocabulary is None:
            return tokenizer, None
        return extend_vocabulary(tokenizer, section.resize_vocabulary, rows_of_files(section, self.registry))

    @cached_property
    def tokenizer_files(self) -> TokenizerFiles:
        """The tokenizer as it is exported."""
        return TokenizerFiles(self.tokenizer)

    @cached_property
    def model(self) -> nn.Module:
        """The model on its device, with its weights and adapter; in float32, computing under autocast.

        What an adapter leaves frozen is in the precision of the run where that changes nothing.
        """
        model = self._new_model() if self.given.model is None else self.given.model
        if self.config.adapter is not None:
            model = self._adapted(model, self.config.adapter)
            config = cast("PretrainedConfig", model.config)
            check_length(config, self.config.data.max_length, virtual_tokens_of(model).count)
            if self.will_train and self.given.model is None:  # another's model stays as it is
                narrow_frozen(model, self.dtype)
        model = model.to(self.device)
        lend(model)
        return model

    def _new_model(self) -> nn.Module:
        section = self.config.model
        torch.manual_seed(self.config.train.seed)
        model: Any = self._stock_model()
        borrow_head(model)
        check_length(model.config, self.config.data.max_length)
        if section.quantization is not None:
            quantize(model, section.quantization, self.device, self.dtype)
        if section.gradient_checkpointing == "full":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return cast(nn.Module, model)

    def _stock_model(self) -> nn.Module:
        """What this rank holds of the model, with its weights, before anything is put on it."""
        return load_pretrained(
            self.config.model,
            self.registry,
            self.tokenizer,
            self._weights_dtype(),
            vocabulary=self.vocabulary,
            topology=self.topology,
            parallel=self.config.parallel,
            store=self._store(),
        )

    def _adapted(self, model: nn.Module, section: AdapterConfig) -> nn.Module:
        """The model with a new adapter on it, or with the one to go on from.

        Raises:
            ModelError: it has one, or a saved one is not what the configuration says.
        """
        if adapter_of(model) is not None:
            raise ModelError(
                f"{self.config.model.model_name_or_path or 'the model'} has an adapter already, and `adapter` would "
                "put another on it; merge the first by `collie merge`, or go on with it: "
                "adapter.adapter_name_or_path, with its base in model.model_name_or_path"
            )
        if section.adapter_name_or_path is not None:
            folder = Path(storage.local_folder(section.adapter_name_or_path))
            found = plugin_of(base_of_adapter(folder), self.registry)
            if self.registry.find("adapter", found) != self.registry.find("adapter", section.type):
                raise ModelError(f"the adapter in {folder} is of another type; set adapter.type to {found}")
            return load_adapter(model, folder, self.registry, self.topology)

        def put_on(model: nn.Module) -> nn.Module:
            return cast(nn.Module, self.registry.build("adapter", section.type, model=model, config=section))

        adapter = self.registry.load("adapter", section.type)
        return attach_adapter(model, adapter, put_on, self.topology, seed=self.config.train.seed)

    def _weights_dtype(self) -> torch.dtype:
        """Float32, except for an optimizer that keeps no float32 weights beside those of the run's precision."""
        return self.dtype if self.will_train and self.optimizer_can.fuses_backward else torch.float32

    @property
    def optimizer_can(self) -> OptimizerCan:
        """What the optimizer of the config declares; nothing of one that is handed in."""
        if self.given.optimizer is not None:
            return OptimizerCan()
        return cast(OptimizerCan, self.registry.component("optimizer", self.config.optimizer.type).can)

    def _store(self) -> Store | None:
        """What takes parameters apart while they are loaded; None: each rank holds its part whole."""
        if not self.will_train or self.config.parallel.zero_stage < 3 or self.config.adapter is not None:
            return None
        from collie_core.engine.zero3 import Zero3Store

        return Zero3Store(self.topology, self._deepspeed_config(), self.dtype)

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
        """The tokenised samples of `data.eval`, if there are any and something reads tokens of them."""
        rows, sources = self.given.eval_dataset, self.config.data.eval
        sections = self.config.evaluation.evaluators
        wanted = self.given.eval_fn is not None or any(self._reads_samples(own) and not own.data for own in sections)
        return self._dataset("eval", rows, sources) if wanted and (rows is not None or sources) else None

    @property
    def eval_samples(self) -> int:
        """How many there are in `data.eval`, or without them in what the first evaluator brings."""
        if self.eval_dataset is not None:
            return len(self.eval_dataset)
        section = next(filter(self.has_samples, self.config.evaluation.evaluators), None)
        return 0 if section is None else sum(1 for _ in self.evaluator_rows(section))

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate on."""
        if self.given.eval_fn is not None:
            return self.eval_dataset is not None
        return any(map(self.has_samples, self.config.evaluation.evaluators))

    def has_samples(self, section: EvaluatorConfig) -> bool:
        """Whether an evaluator has samples to work on; the default one has none in a run without `data.eval`."""
        return bool(section.data or self.config.data.eval) or self.given.eval_dataset is not None

    def evaluator_rows(self, section: EvaluatorConfig) -> Iterator[Row]:
        """The samples of an evaluator as they are written, in order."""
        if not section.data and self.given.eval_dataset is not None:
            return handed_rows(self.given.eval_dataset, "data.eval")
        sources = map(Source, section.data or self.config.data.eval)
        return chain.from_iterable(source.rows() for source in sources)

    def evaluator_dataset(self, section: EvaluatorConfig, *, whole: bool = False) -> TokenizedDataset:
        """The samples of an evaluator, tokenised; with `whole` none is cut, split or left out for its length."""
        if not section.data and not whole:
            assert self.eval_dataset is not None
            return self.eval_dataset
        rows = None if section.data else self.given.eval_dataset
        key = (repr(section.data), whole)
        if key not in self._eval_sets:
            self._eval_sets[key] = self._dataset("eval", rows, section.data or self.config.data.eval, whole=whole)
        return self._eval_sets[key]

    def _reads_samples(self, section: EvaluatorConfig) -> bool:
        can = cast(EvaluatorCan, self.registry.component("evaluator", section.type).can)
        return can.reads == "samples"

    def _check_evaluators(self) -> None:
        """What is wrong with an evaluator is told now, and not at the end of training."""
        for section in self.config.evaluation.evaluators if self.given.eval_fn is None else ():
            if self.has_samples(section):
                check_metrics(self.registry, section)
                self.registry.load("evaluator", section.type)
                next(self.evaluator_rows(section), None)
                if self._reads_samples(section):
                    self.evaluator_dataset(section)

    def _dataset(
        self, name: Literal["train", "eval"], rows: Any, sources: Any, *, whole: bool = False
    ) -> TokenizedDataset:
        data = self.config.data
        return prepare_dataset(
            sources if rows is None else rows,
            data.model_copy(update={"max_length": LONGEST, "long_samples": "error"}) if whole else data,
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

    def loader(self, start: int = 0) -> Loader:
        """The training samples as one `StepBatch` per optimizer step, without the first `start` of the run."""
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
            start=start,
            total=self.total_samples,
            num_workers=data.num_workers,
        )

    @property
    def eval_batch_size(self) -> int:
        """Samples per forward of one rank, in an evaluation."""
        return self.config.evaluation.per_device_eval_batch_size or self.micro_batch_size

    def eval_batches(self, dataset: TokenizedDataset) -> Iterator[Batch]:
        """The evaluation samples, each on one rank only."""
        batches = eval_batches(
            dataset,
            batch_size=self.eval_batch_size,
            pad_token_id=padding_id(self.tokenizer),
            rank=self.topology.dp.rank,
            size=self.topology.dp.size,
        )
        for batch in batches:
            self.before_turn()
            yield batch.to(self.device)

    # -- engine ------------------------------------------------------------------------------------------------

    @cached_property
    def step(self) -> Step:
        """The engine: built when training starts, since DeepSpeed takes over the model it is given."""
        optimizer = self._optimizer()
        step = self._engine(optimizer, self._scheduler(optimizer))
        if self.config.data.packing:
            with step.precision():
                check_packing(step.model, rows=self.micro_batch_size)
        return step

    def _engine(self, optimizer: Optimizer, scheduler: LRScheduler) -> Step:
        dropout, seed = install_dropout(self.model, self.topology), self.config.train.seed
        virtual_tokens = virtual_tokens_of(self.model)
        shared: dict[str, Any] = {
            "topology": self.topology,
            "loss_fn": self.given.loss_fn,
            "train_fn": self.given.train_fn,
            "around": lambda batch: dropout.samples(seed, virtual_tokens.lengthened(batch.layout)),
        }
        if isinstance(optimizer, FusedOptimizer):
            return self._fused_engine(optimizer, scheduler, shared)
        if isinstance(optimizer, CurvatureOptimizer):
            _require_own_forward(self.given)
            shared["curvature"] = Curvature(optimizer, drawn_labels(seed))
        if self.config.parallel.zero_stage == 0:
            max_grad_norm = self.config.train.max_grad_norm
            return TorchStep(self.model, optimizer, scheduler, dtype=self.dtype, max_grad_norm=max_grad_norm, **shared)
        from collie_core.engine.deepspeed_step import DeepSpeedStep

        return DeepSpeedStep(self.model, optimizer, scheduler, config=self._deepspeed_config(), **shared)

    def _fused_engine(self, optimizer: FusedOptimizer, scheduler: LRScheduler, shared: dict[str, Any]) -> Step:
        from collie_core.engine.fused_step import FusedStep, Zero3FusedStep

        require_fusable(self.config, self.topology.dp.size)
        shared |= {"dtype": self.dtype, "max_grad_norm": self.config.train.max_grad_norm}
        if self.config.parallel.zero_stage == 0:
            return FusedStep(self.model, optimizer, scheduler, **shared)
        return Zero3FusedStep(self.model, optimizer, scheduler, config=self._deepspeed_config(), **shared)

    def _deepspeed_config(self) -> dict[str, Any]:
        from collie_core.engine.deepspeed_config import deepspeed_config

        return deepspeed_config(
            parallel=self.config.parallel,
            dtype=self.dtype,
            micro_batch_size=self.micro_batch_size,
            data_parallel_size=self.topology.dp.size,
            max_grad_norm=self.config.train.max_grad_norm,
            pin_memory=self.device != torch.device("cpu"),
            keeps_small_parameters=not self.optimizer_can.fuses_backward,
            overrides=self.config.deepspeed,
        )

    @property
    def training(self) -> bool:
        """Whether the engine stands, so that the model must be called through it."""
        return "step" in self.__dict__

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast context of a forward pass outside training."""
        return self.step.precision() if self.training else autocast(self.device, self.dtype)

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        """See `Step.gathered`."""
        return self.step.gathered(parameters) if self.training else nullcontext()

    def _optimizer(self) -> Optimizer:
        given, section = self.given.optimizer, self.config.optimizer
        if isinstance(given, Optimizer):
            return given
        roles = self.optimizer_can.parameter_roles
        groups = parameter_groups(self.model, section, self.topology, roles=roles)
        if self.config.parallel.zero_stage > 0 and self.topology.model.size > 1:
            groups = with_equal_number(groups, self.model, self.topology)
        if given is not None:
            return given(groups)
        optimizer = cast(Optimizer, self.registry.build("optimizer", section.type, params=groups, config=section))
        _require_declared(optimizer, self.optimizer_can, section.type)
        return optimizer

    def _scheduler(self, optimizer: Optimizer) -> LRScheduler:
        given = self.given.lr_scheduler
        if isinstance(given, LRScheduler):
            return given
        if given is not None:
            return given(optimizer, self.max_steps)
        return schedule(self.config.lr_scheduler, optimizer, self.max_steps)


def _require_declared(optimizer: Optimizer, can: OptimizerCan, name: str) -> None:
    """The rules were asked about what the optimizer declares.

    Raises:
        PluginError: it has the methods of a contract that it does not declare, or lacks those of one that it does.
    """
    for declared, contract in ((can.fuses_backward, FusedOptimizer), (can.estimates_curvature, CurvatureOptimizer)):
        if declared != isinstance(optimizer, contract):
            verb = "declares to be" if declared else "has the methods of"
            raise PluginError(f"optimizer {name} {verb} a {contract.__name__}, and its methods and its `can` disagree")


def _require_own_forward(given: HandedIn) -> None:
    """Refuse a train_fn where the loss of other labels is wanted.

    Raises:
        ConfigError: there is one.
    """
    if given.train_fn is not None:
        raise ConfigError(
            [
                Problem(
                    "optimizer",
                    "estimates curvature from the loss of labels that it draws, which a train_fn cannot be given",
                    MISSING,
                    "Hand in a loss_fn, or use another optimizer.",
                )
            ]
        )


def _require_whole(config: RunConfig, given: HandedIn) -> None:
    """Refuse what a program cannot hand in when the ranks hold parts of a model, or its vocabulary is to grow.

    Raises:
        ConfigError: a model that is not cut or resized, or a forward pass of its own over pipeline stages.
    """
    parallel = config.parallel
    if given.model is not None and config.model.resize_vocabulary is not None:
        raise ConfigError(
            [
                Problem(
                    "model.resize_vocabulary",
                    "a model that is handed in has its rows already",
                    MISSING,
                    "Leave it out and resize the model, or name the model in `model:`.",
                )
            ]
        )
    if given.model is not None and parallel.copy_size > 1:
        raise ConfigError(
            [
                Problem(
                    "parallel",
                    "a model that is handed in is whole, so its ranks cannot share it",
                    MISSING,
                    "Set tensor_parallel_size and pipeline_parallel_size to 1, or name the model in `model:`.",
                )
            ]
        )
    if given.train_fn is not None and parallel.pipeline_parallel_size > 1:
        raise ConfigError(
            [
                Problem(
                    "parallel.pipeline_parallel_size",
                    "a train_fn calls the whole model, and a stage is a part of it",
                    parallel.pipeline_parallel_size,
                    "Set it to 1, or hand in a loss_fn.",
                )
            ]
        )
