"""Everything a plugin can be or hook into: API 1.

Importing this file costs the standard library only. Components (one wins, chosen by `type` in the config)
are described by a `Component` and obey a Protocol; hooks (many may run) are the functions of `Hooks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from torch import Tensor, nn
    from torch.optim import Optimizer
    from transformers import PretrainedConfig

    from collie_core.config.parallel import ParallelConfig
    from collie_core.config.run import RunConfig
    from collie_core.evaluate.context import EvaluationContext, Outcome
    from collie_core.generate import SampleText
    from collie_core.model.vocabulary_extension import VocabularyExtension
    from collie_core.serving.served import Served
    from collie_core.topology import Topology

API = 1
KINDS = ("model", "optimizer", "adapter", "metric", "evaluator", "server", "tracker")


# -- components ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Can:
    """What a component declares to be able to do. The core asks these fields, never a class name."""


@dataclass(frozen=True)
class OptimizerCan(Can):
    state_bytes_per_parameter: float = 8.0  # float32 training; shown in the summary before the run
    fuses_backward: bool = False  # it is a `FusedOptimizer`
    estimates_curvature: bool = False  # it is a `CurvatureOptimizer`
    whole_tensors: bool = False  # it cannot work on the flat slices of parameters that ZeRO hands out
    parameter_roles: bool = False  # its groups come divided by `role`: hidden matrices, and the others
    factored_state: Mapping[str, int] = field(default_factory=dict)  # state that lacks this dimension of its parameter


@dataclass(frozen=True)
class MetricCan(Can):
    reads: str = "token_losses"  # or "token_ids", "texts", "choices": what `Metric.update` is given; see there
    higher_is_better: bool | None = None  # all of its numbers; None: neither more nor less of them is


@dataclass(frozen=True)
class EvaluatorCan(Can):
    feeds: tuple[str, ...] = ()  # the kinds of `MetricCan.reads` that it gives to metrics
    reads: str = "rows"  # what it asks of its context: "rows" as they are written, or "samples", which are tokenised


@dataclass(frozen=True)
class AdapterCan(Can):
    peft_type: str = ""  # what peft's files call it, where that is not the name in capitals
    starts_as_identity: bool = False  # attached with the defaults of its section it changes nothing, as yet


@dataclass(frozen=True)
class Component:
    """What an entry point in a `collie.<kind>` group points to: light, imported when a config names it."""

    build: str  # "package.module:attribute", imported when the run starts
    config: str = ""  # "package.module:Model": a pydantic model with `type: Literal[<name>]`; "" = no options
    summary: str = ""
    can: Can = field(default_factory=Can)
    api: int = API  # the contract the author wrote against
    hint: str = ""  # what to type when importing `build` fails, e.g. "pip install 'collie-x[triton]'"


class ModelFamily(Protocol):
    """What is special about a model family. A family that transformers contains says nothing but its name.

    `StockFamily` has these and every declaration of the partition (`tensor_plan`, `pipeline_plan`, `weights`, ...).
    """

    model_type: str  # the `model_type` of its config.json

    def make_config(self, raw: Mapping[str, Any]) -> PretrainedConfig:
        """The transformers config for the raw config.json of this family."""

    def write_config(self, config: PretrainedConfig, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json of an export; `raw` is the one that was read."""


class OptimizerFactory(Protocol):
    """A `torch.optim.Optimizer` class, or a function that returns one."""

    def __call__(self, params: Iterable[dict[str, Any]], **options: Any) -> Optimizer:
        """`params` are torch parameter groups; `options` are the fields of the plugin's config, less `type`."""


@runtime_checkable
class FusedOptimizer(Protocol):
    """A `torch.optim.Optimizer` that updates a parameter in the middle of backward, so that gradients never add up.

    The weights are those of the run's precision, without float32 copies. `step()` is called after backward, when no
    gradient is left.
    """

    def update(self, param: nn.Parameter, grad: Tensor) -> None:
        """Update one parameter in place by its gradient of the global batch, which is clipped already.

        `grad` has the shape of `param`; in float16 runs it is float32. It may be overwritten.
        """


@runtime_checkable
class CurvatureOptimizer(Protocol):
    """A `torch.optim.Optimizer` that needs the gradient of another loss now and then: labels drawn from the model."""

    def curvature_due(self) -> bool:
        """Whether the coming step begins with an estimate; the same on every rank."""

    def estimating(self, target_tokens: int) -> AbstractContextManager[None]:
        """Inside, `step()` takes the gradients as those of the mean loss over `target_tokens` labels that were drawn
        from the model's own distribution, and updates its estimate of the curvature alone.
        """


class Adapter(Protocol):
    """A parameter-efficient method. Where it is put around a layer, it keeps that as its `base_layer`.

    `model` may be this rank's part of a model, or a whole one without values: modules and names are what counts. Whole
    tensors of the adapter come and go by the names of its trainable parameters.

    It may have hooks: methods as those of `Hooks`, which a `Trainer` calls before those of plugins and callbacks. What
    they keep between steps belongs on `run.model`, since one object serves several runs.
    """

    def attach(self, model: nn.Module, config: Any) -> nn.Module:
        """Insert the trainable parts and freeze the rest; returns the model to train."""

    def save(self, model: nn.Module, path: Path, state: Mapping[str, Tensor]) -> None:
        """Write the adapter alone, in the peft format. On the main rank; `model` is whole, possibly without values."""

    def load(self, model: nn.Module, path: Path) -> nn.Module:
        """`attach` as the saved adapter in `path` says; its values are filled in afterwards."""

    def state(self, path: Path) -> Mapping[str, Tensor]:
        """The values of a saved adapter, as they were given to `save`."""


@runtime_checkable
class ShardedAdapter(Adapter, Protocol):
    """An adapter that works on a tensor-parallel share of a layer. Others are computed whole on every rank."""

    def cut(self, name: str, shape: tuple[int, ...]) -> tuple[int, str] | None:
        """For a trainable parameter and its whole shape, the dimension that lies along the layer's "inputs" or
        "outputs" and is to be cut with them; None: every rank has it whole.
        """


@runtime_checkable
class MergeableAdapter(Adapter, Protocol):
    """An adapter whose effect can be put into the weights of the layers that it sits on."""

    def merge(self, module: nn.Module) -> None:
        """Put the adapter of `module` into the weight of its `base_layer`, in place."""


class Metric(Protocol):
    """A number over an evaluation set. `merge` is associative and commutative, so that any split of the samples into
    batches and ranks gives the same, up to rounding.

    What `update` is given, by `MetricCan.reads`:

    * "token_losses": float losses [N] in nats, and the token ids [N] that they are of;
    * "token_ids": the ids [N] with the highest logits where a target was to come, and the ids [N] of the targets;
    * "texts": a sequence of answers, and for each a sequence of references, at least one;
    * "choices": a sequence of classes, texts or integers, and as many right ones.
    """

    def update(self, prediction: Any, target: Any) -> None:
        """Add samples; there is one target for each prediction."""

    def merge(self, other: Any) -> None:
        """Join the state of another rank, which may have no samples. That rank sent it pickled: keep it small."""

    def compute(self) -> Mapping[str, float]:
        """The final numbers by name; without samples the same names, each NaN."""


@runtime_checkable
class DetailedMetric(Metric, Protocol):
    """A metric that has words beside its numbers, as what they were computed with; kept with the results."""

    def details(self) -> Mapping[str, str]:
        """Texts by name; may be empty without samples."""


class Evaluator(Protocol):
    """Asks a model about samples, and feeds metrics with what it says. Each evaluation has a new one."""

    def evaluate(self, context: EvaluationContext) -> Outcome:
        """Go once over `context.rows()` or `context.dataset()` and give `context.outcome()`. Collective: every rank
        calls it, and each works on the share that `context.deal` hands it.
        """


class Server(Protocol):
    """Takes requests and hands them to models that others run; it never touches a model itself.

    Its config is a `ServerConfig`, whose own fields the core reads.
    """

    def serve(self, served: Served, ready: Callable[[str], None]) -> None:
        """Take requests until `stop`, in a thread of its own on the main rank; what it raises ends the server alone.

        `served.model` answers. `ready` is called once, with where the server is: "http://127.0.0.1:8000".
        """

    def stop(self) -> None:
        """Let `serve` return within a few seconds. From any thread; open answers have been ended before."""


class TrackerFactory(Protocol):
    """Makes what records a run elsewhere: an object with methods named as the event hooks, on the main rank only.

    It is made before the model is built, which is the time to say that a package is missing.
    """

    def __call__(self, **options: Any) -> object:
        """`options` are the fields of the plugin's config, less `type`."""


# -- the run as a hook sees it ------------------------------------------------------------------------------


@dataclass
class Run:
    """The narrow view of a run that hooks and callbacks get."""

    config: RunConfig
    topology: Topology
    model: nn.Module
    output_dir: Path
    max_steps: int = 0  # known once training starts
    step: int = 0  # finished optimizer steps
    epoch: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)  # parameters, samples, steps, ...: shown before step 1
    metrics: dict[str, float] = field(default_factory=dict)  # plugins may add numbers; logged with the next step
    best: dict[str, Any] = field(default_factory=dict)  # with `evaluation.best`: step, epoch, metric, value
    stop_reason: str = ""

    def request_stop(self, reason: str = "a plugin asked for it") -> None:
        """End training after the step that is running; evaluation and export still happen.

        Every rank must ask at the same step; in `collie_evaluated` the main rank alone asks, for all.
        """
        self.stop_reason = self.stop_reason or reason


# -- hooks --------------------------------------------------------------------------------------------------
# pluggy passes each implementation only the arguments it names, so that hooks can grow. An exception in any
# hook stops the run. The build steps are `firstresult`: the core implements them last, plugins may wrap. A tracker
# has none: it is made of hooks itself.


class Hooks:
    """The hook specifications; `plugins.py` marks and registers them with pluggy."""

    FIRST_RESULT = (
        "collie_build_model_partition",
        "collie_build_optimizer",
        "collie_build_adapter",
        "collie_build_metric",
        "collie_build_evaluator",
        "collie_build_server",
    )

    def collie_build_model_partition(  # type: ignore[empty-body]
        self,
        target: ModelFamily,
        config: PretrainedConfig,
        weights: str | None,
        vocabulary: VocabularyExtension | None,
        topology: Topology,
        parallel: ParallelConfig,
        store: Any,
    ) -> nn.Module:
        """Build this rank's part of the model with `weights` of a folder or hub id, or random ones (None).

        `config` has the size of the model, and `vocabulary` says which rows the files lack (None: they lack none).
        `store(module, name, shape, read)` puts one parameter into its module; see `collie_core.model.weights`.
        """

    def collie_build_optimizer(  # type: ignore[empty-body]
        self, target: OptimizerFactory, params: list[dict[str, Any]], config: Any
    ) -> Optimizer:
        """Build the optimizer over parameter groups, after the model stands on its device."""

    def collie_build_adapter(self, target: Adapter, model: nn.Module, config: Any) -> nn.Module:  # type: ignore[empty-body]
        """Attach the adapter, after the weights are loaded and before the optimizer is built."""

    def collie_build_metric(self, target: Callable[..., Metric], config: Any) -> Metric:  # type: ignore[empty-body]
        """Build an empty metric, once per evaluation."""

    def collie_build_evaluator(self, target: Callable[..., Evaluator], config: Any) -> Evaluator:  # type: ignore[empty-body]
        """Build an evaluator, once per evaluation."""

    def collie_build_server(self, target: Callable[..., Server], config: Any) -> Server:  # type: ignore[empty-body]
        """Build a server that has not started yet."""

    def collie_run_start(self, run: Run) -> None:
        """Before the first step, everything built. May register module hooks; may add to `run.facts`."""

    def collie_before_step(self, run: Run, batch: Any) -> None:
        """Before forward of each optimizer step. May change the tensors of `batch.micro_batches` in place."""

    def collie_before_update(self, run: Run) -> None:
        """After the last backward of a step, before clipping and update. May change gradients in place.

        An optimizer that updates in backward has used and dropped them by then.
        """

    def collie_after_step(self, run: Run, loss: Tensor) -> None:
        """After the update of each optimizer step; `loss` is the token mean of the global batch, a scalar."""

    def collie_metrics(self, run: Run, values: Mapping[str, Any]) -> None:
        """Rank 0, each logged step: one row of metrics.jsonl. Read only."""

    def collie_evaluated(self, run: Run, results: Mapping[str, float], samples: Sequence[SampleText]) -> None:
        """Rank 0, after an evaluation: results by name, as `eval/...`; sample answers if any. Read only."""

    def collie_checkpoint_saved(self, run: Run, path: Path) -> None:
        """Rank 0, after weights were written to `path`; those of a checkpoint are its folder `model`."""

    def collie_run_end(self, run: Run, error: BaseException | None) -> None:
        """Always, last; `error` is what ended the run early, or None."""
