"""The public names of CoLLiE, for plugin authors and for programs that embed it.

Each name is imported on first use, so that a plugin's description costs no torch and no pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collie_core.cli._quiet import quiet_libraries
    from collie_core.config.base import AdapterConfig, ComponentConfig, ConfigModel, OptimizerConfig, ParamGroup
    from collie_core.config.evaluation import EvaluatorConfig
    from collie_core.config.parallel import ParallelConfig
    from collie_core.config.run import RunConfig
    from collie_core.config.server import ServerConfig
    from collie_core.data.loader import Batch
    from collie_core.errors import CollieError, ConfigError, DataError, ModelError, PluginError, Problem, RunError
    from collie_core.evaluate.context import EvaluationContext, Outcome
    from collie_core.generate import end_ids, load_for_generation
    from collie_core.hookspecs import (
        Adapter,
        AdapterCan,
        Can,
        Component,
        CurvatureOptimizer,
        DetailedMetric,
        Evaluator,
        EvaluatorCan,
        FusedOptimizer,
        Metric,
        MetricCan,
        ModelFamily,
        OptimizerCan,
        Run,
        Server,
        ShardedAdapter,
    )
    from collie_core.loop import Trainer
    from collie_core.model.adapters import whole_of_part
    from collie_core.model.family import Source, StockFamily
    from collie_core.model.named_adapters import folders_by_name, with_adapters
    from collie_core.model.stages import is_stage
    from collie_core.model.virtual_tokens import put_virtual_tokens
    from collie_core.model.whole import Whole, whole_of
    from collie_core.plugins import Plugins, hookimpl
    from collie_core.serving.answerer import Answerer, Closed, Event, Job, QueueFull
    from collie_core.serving.sampling import Likelihood, Sampling
    from collie_core.serving.served import Live, Served
    from collie_core.serving.standalone import model_folder, on_ranks, serve
    from collie_core.topology import Topology

_HOME = {
    "Adapter": "hookspecs",
    "AdapterCan": "hookspecs",
    "AdapterConfig": "config.base",
    "Answerer": "serving.answerer",
    "Batch": "data.loader",
    "Can": "hookspecs",
    "Closed": "serving.answerer",
    "CollieError": "errors",
    "Component": "hookspecs",
    "ComponentConfig": "config.base",
    "ConfigError": "errors",
    "ConfigModel": "config.base",
    "CurvatureOptimizer": "hookspecs",
    "DataError": "errors",
    "DetailedMetric": "hookspecs",
    "EvaluationContext": "evaluate.context",
    "Evaluator": "hookspecs",
    "EvaluatorCan": "hookspecs",
    "EvaluatorConfig": "config.evaluation",
    "Event": "serving.answerer",
    "FusedOptimizer": "hookspecs",
    "Job": "serving.answerer",
    "Likelihood": "serving.sampling",
    "Live": "serving.served",
    "Metric": "hookspecs",
    "MetricCan": "hookspecs",
    "ModelError": "errors",
    "ModelFamily": "hookspecs",
    "OptimizerCan": "hookspecs",
    "OptimizerConfig": "config.base",
    "Outcome": "evaluate.context",
    "ParallelConfig": "config.parallel",
    "ParamGroup": "config.base",
    "PluginError": "errors",
    "Plugins": "plugins",
    "Problem": "errors",
    "QueueFull": "serving.answerer",
    "Run": "hookspecs",
    "RunConfig": "config.run",
    "RunError": "errors",
    "Sampling": "serving.sampling",
    "Served": "serving.served",
    "Server": "hookspecs",
    "ServerConfig": "config.server",
    "ShardedAdapter": "hookspecs",
    "Source": "model.family",
    "StockFamily": "model.family",
    "Topology": "topology",
    "Trainer": "loop",
    "Whole": "model.whole",
    "end_ids": "generate",
    "folders_by_name": "model.named_adapters",
    "hookimpl": "plugins",
    "is_stage": "model.stages",
    "load_for_generation": "generate",
    "model_folder": "serving.standalone",
    "on_ranks": "serving.standalone",
    "put_virtual_tokens": "model.virtual_tokens",
    "quiet_libraries": "cli._quiet",
    "serve": "serving.standalone",
    "whole_of": "model.whole",
    "whole_of_part": "model.adapters",
    "with_adapters": "model.named_adapters",
}

__all__ = [
    "Adapter",
    "AdapterCan",
    "AdapterConfig",
    "Answerer",
    "Batch",
    "Can",
    "Closed",
    "CollieError",
    "Component",
    "ComponentConfig",
    "ConfigError",
    "ConfigModel",
    "CurvatureOptimizer",
    "DataError",
    "DetailedMetric",
    "EvaluationContext",
    "Evaluator",
    "EvaluatorCan",
    "EvaluatorConfig",
    "Event",
    "FusedOptimizer",
    "Job",
    "Likelihood",
    "Live",
    "Metric",
    "MetricCan",
    "ModelError",
    "ModelFamily",
    "OptimizerCan",
    "OptimizerConfig",
    "Outcome",
    "ParallelConfig",
    "ParamGroup",
    "PluginError",
    "Plugins",
    "Problem",
    "QueueFull",
    "Run",
    "RunConfig",
    "RunError",
    "Sampling",
    "Served",
    "Server",
    "ServerConfig",
    "ShardedAdapter",
    "Source",
    "StockFamily",
    "Topology",
    "Trainer",
    "Whole",
    "end_ids",
    "folders_by_name",
    "hookimpl",
    "is_stage",
    "load_for_generation",
    "model_folder",
    "on_ranks",
    "put_virtual_tokens",
    "quiet_libraries",
    "serve",
    "whole_of",
    "whole_of_part",
    "with_adapters",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"collie_core.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
