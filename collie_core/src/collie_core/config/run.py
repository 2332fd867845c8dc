"""`RunConfig`: the whole configuration of a run. Built in Python or read from YAML, it is the same thing."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from os import PathLike
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from collie_core.config import aliases, problems, rules
from collie_core.config.base import AdapterConfig, ComponentConfig, ConfigModel, OptimizerConfig, PlainMapping
from collie_core.config.batch import BatchSizes, batch_sizes
from collie_core.config.checkpoint import CheckpointConfig
from collie_core.config.component import OfKind
from collie_core.config.data import DataConfig
from collie_core.config.document import Document
from collie_core.config.evaluation import EvaluationConfig
from collie_core.config.model import ModelConfig
from collie_core.config.optimizer import LRSchedulerConfig
from collie_core.config.parallel import ParallelConfig
from collie_core.config.server import ServerConfig
from collie_core.config.tokenizer import TokenizerConfig
from collie_core.config.train import TrainConfig
from collie_core.errors import ConfigError, PluginError, Problem
from collie_core.plugins import Plugins

DEFAULT_OPTIMIZER = "adamw"

logger = logging.getLogger("collie")


def _typed(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


def _trackers(value: Any) -> Any:
    """One tracker without its list; `none` as other tools write it."""
    return [one for one in [value] if one != "none"] if isinstance(value, str | Mapping | ComponentConfig) else value


_Tracker = Annotated[ComponentConfig, OfKind("tracker")]


class PluginsConfig(ConfigModel):
    """Installed plugins."""

    block: list[str] = Field([], description="Distributions that are never imported, by name.")


class RunConfig(ConfigModel):
    """A run of CoLLiE.

    Raises:
        ConfigError: everything that is wrong, at once.
    """

    model: ModelConfig = Field(ModelConfig(), description="The model to train.")
    tokenizer: Annotated[
        TokenizerConfig,
        BeforeValidator(_typed, json_schema_input_type=Literal["pretrained", "byte"] | TokenizerConfig),
    ] = Field(TokenizerConfig(), description="The tokenizer.")
    data: DataConfig = Field(DataConfig(), description="The samples and how they become tokens.")
    parallel: ParallelConfig = Field(ParallelConfig(), description="How the processes share the work.")
    train: TrainConfig = Field(TrainConfig(), description="How long, how much at a time, and where to.")
    optimizer: Annotated[OptimizerConfig, OfKind("optimizer", default=DEFAULT_OPTIMIZER)] = Field(
        {"type": DEFAULT_OPTIMIZER},
        validate_default=True,
        description="The optimizer: `type`, and its own fields.",
    )
    lr_scheduler: Annotated[
        LRSchedulerConfig,
        BeforeValidator(_typed, json_schema_input_type=Literal["constant", "linear", "cosine"] | LRSchedulerConfig),
    ] = Field(LRSchedulerConfig(), description="The learning rate over the run.")
    adapter: Annotated[AdapterConfig, OfKind("adapter")] | None = Field(
        None, description="Train a few added parameters instead of all: `type`, and the adapter's own fields."
    )
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="When and how the model is measured.")
    checkpoint: CheckpointConfig = Field(
        CheckpointConfig(), description="What a run goes on from, after it has ended or was ended."
    )
    report_to: Annotated[
        list[_Tracker],
        BeforeValidator(_trackers, json_schema_input_type=_Tracker | Literal["none"] | list[_Tracker]),
    ] = Field([], description="Trackers, besides metrics.jsonl and report.html: names, or sections with `type`.")
    server: Annotated[ServerConfig, OfKind("server")] | None = Field(
        None, description="Ask the model while it trains: `type`, and the server's own fields."
    )
    deepspeed: PlainMapping = Field({}, description="Keys laid over the DeepSpeed configuration that CoLLiE makes.")
    plugins: PluginsConfig = Field(PluginsConfig(), description="Installed plugins.")

    def __init__(self, **sections: Any) -> None:
        document = Document(sections)
        self._fill(document)
        for note in document.notes:
            logger.warning("%s", note)

    @classmethod
    def from_yaml(
        cls,
        path: str | PathLike[str],
        overrides: Iterable[str] = (),
        *,
        notes: list[str] | None = None,
        complete: bool = False,
    ) -> RunConfig:
        """The configuration in a file, with `key=value` overrides such as `train.max_steps=10`.

        Args:
            notes: receives one line per name of another tool that was understood; default: they are logged.
            complete: also refuse what only a program could still hand in: no model, no training data.
        """
        from collie_core.config.loading import read_file

        return cls._from_document(read_file(path), overrides, notes, complete)

    @classmethod
    def from_text(cls, text: str, overrides: Iterable[str] = (), *, name: str = "<text>") -> RunConfig:
        """The same from YAML at hand; `name` stands for the file in messages."""
        from collie_core.config.loading import read_text

        return cls._from_document(read_text(text, name), overrides, None, False)

    @classmethod
    def _from_document(
        cls, document: Document, overrides: Iterable[str], notes: list[str] | None, complete: bool
    ) -> RunConfig:
        config = cls.__new__(cls)
        config._fill(document, overrides, complete)
        for note in document.notes if notes is None else ():
            logger.warning("%s", note)
        if notes is not None:
            notes.extend(document.notes)
        return config

    def _fill(self, document: Document, overrides: Iterable[str] = (), complete: bool = False) -> None:
        """Validate everything into this instance, or raise all problems together."""
        registry = _registry(document)
        guide = problems.Guide(type(self), registry)
        aliases.normalise(document, guide)
        if overrides:
            from collie_core.config.loading import apply_overrides

            apply_overrides(document, overrides, guide)
        found, given = document.problems, () if complete else rules.PARTS
        try:
            self._validate(document.data, registry)
        except ValidationError as error:
            refused = problems.translate(error, document.data, guide)
            found += [*refused, *self._broken_rules(document.data, registry, given, refused)]
        else:
            found += rules.check(self, given)
        if found:
            raise ConfigError(document.located(found))

    def _validate(self, data: Mapping[str, Any], registry: Plugins) -> None:
        type(self).__pydantic_validator__.validate_python(data, self_instance=self, context={"registry": registry})
        self.__dict__["registry"] = registry

    def _broken_rules(
        self,
        data: Mapping[str, Any],
        registry: Plugins,
        given: Collection[rules.Part],
        refused: list[Problem],
    ) -> list[Problem]:
        """What the sound sections break: told now, and not only when the others are repaired."""
        mistaken = {problem.key.partition(".")[0] for problem in refused}
        rest = type(self).__new__(type(self))
        try:
            rest._validate({key: value for key, value in data.items() if key not in mistaken}, registry)
        except ValidationError:  # the default of a section is refused as well, and that is told already
            return []
        return [problem for problem in rules.check(rest, given) if problem.key.partition(".")[0] not in mistaken]

    @cached_property
    def registry(self) -> Plugins:
        """The installed plugins, less the blocked ones, that the component sections were validated by."""
        return Plugins.discover(self.plugins.block)

    def __getstate__(self) -> dict[Any, Any]:
        """Without the registry: a process that receives the configuration resolves plugins itself."""
        state = super().__getstate__()
        kept = {name: value for name, value in state["__dict__"].items() if name != "registry"}
        return {**state, "__dict__": kept}

    def to_yaml(self) -> str:
        """Every field with its value, defaults included; reads back as an equal configuration."""
        from collie_core.config.loading import dump

        return dump(self.model_dump(mode="json"))

    # -- derived values -----------------------------------------------------------------------------------

    def batch_sizes(self, data_parallel_size: int) -> BatchSizes:
        """How the samples of one optimizer step are dealt out, once the number of ranks is known.

        Raises:
            ConfigError: the global batch does not come out whole.
        """
        sizes = batch_sizes(self.train, data_parallel_size)
        if isinstance(sizes, Problem):
            raise ConfigError([sizes])
        return sizes

    def per_device_train_batch_size(self, data_parallel_size: int) -> int:
        """Samples per forward on one device."""
        return self.batch_sizes(data_parallel_size).per_device

    def gradient_accumulation_steps(self, data_parallel_size: int) -> int:
        """Forwards per optimizer step."""
        return self.batch_sizes(data_parallel_size).accumulation

    def global_batch_size(self, data_parallel_size: int) -> int:
        """Samples per optimizer step over all ranks."""
        return self.batch_sizes(data_parallel_size).total

    @property
    def num_train_epochs(self) -> float | None:
        """Passes over the data; None when `train.max_steps` decides."""
        if self.train.max_steps is not None:
            return None
        return 1.0 if self.train.num_train_epochs is None else self.train.num_train_epochs


def _registry(document: Document) -> Plugins:
    """The registry with the file's own block list, before any component is looked at."""
    section = document.data.get("plugins")
    block = section.get("block", ()) if isinstance(section, Mapping) else getattr(section, "block", ())
    names = [name for name in block if isinstance(name, str)] if isinstance(block, list | tuple) else []
    try:
        return Plugins.discover(names)
    except PluginError as error:
        document.problems.append(Problem("plugins.block", str(error), names))
        return Plugins.discover()
