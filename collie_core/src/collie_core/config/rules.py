"""Combinations that cannot work, in one table: it refuses them, and it writes docs/compatibility.md."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from collie_core.config.batch import batch_sizes, impossible_batch
from collie_core.config.evaluation import EvaluationConfig
from collie_core.config.split import impossible_split
from collie_core.errors import MISSING, ConfigError, Problem

if TYPE_CHECKING:
    from collie_core.config.run import RunConfig
    from collie_core.hookspecs import EvaluatorCan, MetricCan, OptimizerCan


Part = Literal["", "model", "tokenizer", "train_data", "eval_data"]
PARTS: frozenset[Part] = frozenset(("model", "tokenizer", "train_data", "eval_data"))


@dataclass(frozen=True)
class Rule:
    """`key` is refused when `broken` says so; `what` names the combination, `why` gives the reason."""

    key: str
    what: str
    why: str | Callable[[RunConfig], str]  # a function: the reason is a plugin's
    fix: str
    broken: Callable[[RunConfig], bool]
    part: Part = ""  # what a program may hand in instead, which makes the rule void


def _optimizer_can(config: RunConfig) -> OptimizerCan:
    return cast("OptimizerCan", config.registry.component("optimizer", config.optimizer.type).can)


_NOT_WHOLE = "it uses a gradient at once and drops it, and of several micro-batches none has the whole gradient"
_ACCUMULATION = Rule(
    "train.gradient_accumulation_steps",
    "`train.gradient_accumulation_steps` above 1",
    _NOT_WHOLE,
    "Set it to 1 and train.per_device_train_batch_size higher (model.gradient_checkpointing: full makes room), "
    "or use an optimizer that accumulates, as lion or adamw.",
    lambda config: (config.train.gradient_accumulation_steps or 1) > 1,
)
FUSED = (
    _ACCUMULATION,
    Rule(
        "parallel.pipeline_parallel_size",
        "`parallel.pipeline_parallel_size` above 1",
        _NOT_WHOLE,
        "Set it to 1 and share the model by parallel.tensor_parallel_size or zero_stage 3, or use an optimizer that "
        "accumulates, as lion or adamw.",
        lambda config: config.parallel.pipeline_parallel_size > 1,
    ),
    Rule(
        "parallel.zero_stage",
        "`parallel.zero_stage` 1 or 2",
        "those stages share optimizer states and gradients, of which there are none",
        "Set it to 0, or to 3 to share the parameters.",
        lambda config: config.parallel.zero_stage in (1, 2),
    ),
    Rule(
        "parallel.offload_optimizer",
        "`parallel.offload_optimizer` and `parallel.zero_stage: 3`",
        "there are no optimizer states to move",
        "Remove it; parallel.offload_param moves the parameters.",
        lambda config: config.parallel.offload_optimizer and config.parallel.zero_stage == 3,
    ),
    Rule(
        "train.spike_factor",
        "`train.spike_factor`",
        "when the loss is known, parameters have been updated",
        "Remove it; train.on_nan still looks at what is no number.",
        lambda config: config.train.spike_factor is not None,
    ),
)
"""What an optimizer that updates in backward does not go with."""


def _with_fused(rule: Rule) -> Rule:
    return replace(
        rule,
        what=f"an optimizer that updates in backward (lomo, adalomo) with {rule.what}",
        broken=lambda config: _optimizer_can(config).fuses_backward and rule.broken(config),
    )


def _refused_by_adapter(config: RunConfig) -> str:
    return "" if config.adapter is None else config.adapter.refused(config)


def _nothing_to_evaluate(config: RunConfig) -> bool:
    return not config.data.eval and not any(evaluator.data for evaluator in config.evaluation.evaluators)


def _unfed_metric(config: RunConfig) -> str:
    """Which metric reads something else than its evaluator gives; "" when none does."""
    for evaluator in config.evaluation.evaluators:
        feeds = cast("EvaluatorCan", config.registry.component("evaluator", evaluator.type).can).feeds
        for metric in evaluator.metrics:
            reads = cast("MetricCan", config.registry.component("metric", metric.type).can).reads
            if reads not in feeds:
                given = " and ".join(feeds) or "nothing"
                return f"the metric {metric.type} reads {reads}, and {evaluator.known_as} gives {given}"
    return ""


RULES = (
    Rule(
        "model.model_name_or_path",
        "neither `model.model_name_or_path` nor `model.config`",
        "is required, unless model.config describes a model to train from random weights",
        "Set it to a folder or a hub id.",
        lambda config: config.model.model_name_or_path is None and config.model.config is None,
        part="model",
    ),
    Rule(
        "parallel.sequence_parallel",
        "`parallel.sequence_parallel` with `parallel.tensor_parallel_size: 1`",
        "tensor-parallel ranks share the positions, and there is one",
        "Set parallel.tensor_parallel_size above 1.",
        lambda config: config.parallel.sequence_parallel and config.parallel.tensor_parallel_size == 1,
    ),
    Rule(
        "parallel.pipeline_cuts",
        "a list of `parallel.pipeline_cuts` of another length than `parallel.pipeline_parallel_size`",
        "the list has the number of layers of each stage",
        "Give one number for each stage.",
        lambda config: (
            isinstance(config.parallel.pipeline_cuts, list)
            and len(config.parallel.pipeline_cuts) != config.parallel.pipeline_parallel_size
        ),
    ),
    Rule(
        "parallel.zero_stage",
        "`parallel.zero_stage: 3` with `parallel.pipeline_parallel_size` above 1",
        "DeepSpeed fetches parameters in the order of one forward and one backward, and a pipeline interleaves several",
        "Set parallel.zero_stage to 2 or less; the stages have taken the parameters apart already.",
        lambda config: config.parallel.zero_stage == 3 and config.parallel.pipeline_parallel_size > 1,
    ),
    Rule(
        "train.on_nan",
        "`train.on_nan: rewind` without `checkpoint.save_steps`",
        "it goes back to a checkpoint, and there are none",
        "Set checkpoint.save_steps, or train.on_nan to skip.",
        lambda config: config.train.on_nan == "rewind" and config.checkpoint.save_steps is None,
    ),
    Rule(
        "train.spike_factor",
        "`train.spike_factor` with a `parallel.zero_stage`",
        "DeepSpeed cannot drop gradients when the loss is known",
        "Remove it; train.on_nan still looks at what is no number.",
        lambda config: config.train.spike_factor is not None and config.parallel.zero_stage > 0,
    ),
    Rule(
        "adapter.type",
        "an `adapter:` whose plugin refuses what stands elsewhere",
        _refused_by_adapter,
        "",
        lambda config: bool(_refused_by_adapter(config)),
    ),
    Rule(
        "adapter.adapter_name_or_path",
        "`adapter.adapter_name_or_path` with other options of the adapter",
        "a saved adapter brings its own options",
        "Keep `type`, `name` and `adapter_name_or_path` alone.",
        lambda config: (
            config.adapter is not None
            and config.adapter.adapter_name_or_path is not None
            and bool(config.adapter.model_fields_set - config.adapter.for_the_core)
        ),
    ),
    Rule(
        "parallel.offload_optimizer",
        "`parallel.offload_optimizer` with `parallel.zero_stage: 0`",
        "DeepSpeed moves optimizer states, and stage 0 is plain torch",
        "Set parallel.zero_stage to 1, 2 or 3.",
        lambda config: config.parallel.offload_optimizer and config.parallel.zero_stage == 0,
    ),
    Rule(
        "parallel.offload_param",
        "`parallel.offload_param` with `parallel.zero_stage` below 3",
        "only stage 3 takes parameters apart, so that they can lie elsewhere",
        "Set parallel.zero_stage to 3.",
        lambda config: config.parallel.offload_param and config.parallel.zero_stage < 3,
    ),
    Rule(
        "deepspeed",
        "a `deepspeed:` section with `parallel.zero_stage: 0`",
        "nothing reads it, since stage 0 is plain torch",
        "Set parallel.zero_stage to 1, 2 or 3, or remove the section.",
        lambda config: bool(config.deepspeed) and config.parallel.zero_stage == 0,
    ),
    *map(_with_fused, FUSED),
    Rule(
        "parallel.zero_stage",
        "an optimizer that works on whole matrices (muon, normuon) with `parallel.zero_stage` above 0",
        "DeepSpeed hands it flat slices of many parameters, which no longer say what matrix they were",
        "Set it to 0; parallel.tensor_parallel_size and pipeline_parallel_size share the model.",
        lambda config: _optimizer_can(config).whole_tensors and config.parallel.zero_stage > 0,
    ),
    Rule(
        "model.config",
        "`model.config` with `model.model_name_or_path`",
        "an architecture to train from random weights and pretrained weights exclude each other",
        "Keep one of model.config and model.model_name_or_path.",
        lambda config: config.model.config is not None and config.model.model_name_or_path is not None,
    ),
    Rule(
        "model.config.model_type",
        "`model.config` without `model_type`",
        "is required: it names the family, for example llama",
        "",
        lambda config: config.model.config is not None and not isinstance(config.model.config.get("model_type"), str),
    ),
    Rule(
        "model.resize_vocabulary",
        "`model.resize_vocabulary` with `model.config`",
        "rows are added to pretrained weights, and random ones have any number from the start",
        "Set model.config.vocab_size, and give the tokenizer its tokens beforehand.",
        lambda config: config.model.resize_vocabulary is not None and config.model.config is not None,
    ),
    Rule(
        "model.quantization",
        "`model.quantization` without an `adapter:`",
        "quantized weights cannot be trained",
        "Add an adapter, or remove model.quantization.",
        lambda config: config.model.quantization is not None and config.adapter is None,
    ),
    Rule(
        "parallel",
        "`model.quantization` with `parallel.tensor_parallel_size` above 1 or `zero_stage: 3`",
        "quantized weights are packed integers, which ranks cannot share",
        "Set tensor_parallel_size to 1 and zero_stage to 2 or less; pipeline_parallel_size shares the model by layers.",
        lambda config: (
            config.model.quantization is not None
            and (config.parallel.tensor_parallel_size > 1 or config.parallel.zero_stage == 3)
        ),
    ),
    Rule(
        "adapter",
        "an `adapter:` with `model.config`",
        "an adapter is saved without its base model, and these random weights would be lost",
        "Train the whole model first, or set model.model_name_or_path.",
        lambda config: config.adapter is not None and config.model.config is not None,
    ),
    Rule(
        "tokenizer.name_or_path",
        "`tokenizer.name_or_path` with `tokenizer.type: byte`",
        "the byte tokenizer is built in and reads no folder",
        "Remove it, or set tokenizer.type to pretrained.",
        lambda config: config.tokenizer.type == "byte" and config.tokenizer.name_or_path is not None,
    ),
    Rule(
        "tokenizer",
        "`model.config` without a tokenizer",
        "is required with model.config, since there is no model folder to take it from",
        "Set tokenizer.name_or_path, or tokenizer.type to byte.",
        lambda config: (
            config.model.config is not None
            and config.model.model_name_or_path is None
            and config.tokenizer.type == "pretrained"
            and config.tokenizer.name_or_path is None
        ),
        part="tokenizer",
    ),
    Rule(
        "data.train",
        "training without `data.train`",
        "is required",
        "Set it to a file or a hub id.",
        lambda config: not config.data.train,
        part="train_data",
    ),
    Rule(
        "evaluation.steps",
        "`evaluation.steps` without `data.eval`",
        "there is nothing to evaluate on",
        "Set data.eval to a file or a split, or remove evaluation.steps.",
        lambda config: config.evaluation.steps is not None and _nothing_to_evaluate(config),
        part="eval_data",
    ),
    Rule(
        "evaluation.epochs",
        "`evaluation.epochs` without `data.eval`",
        "there is nothing to evaluate on",
        "Set data.eval to a file or a split, or remove evaluation.epochs.",
        lambda config: config.evaluation.epochs is not None and _nothing_to_evaluate(config),
        part="eval_data",
    ),
    Rule(
        "evaluation.on_start",
        "`evaluation.on_start` without `data.eval`",
        "there is nothing to evaluate on",
        "Set data.eval to a file or a split, or remove evaluation.on_start.",
        lambda config: config.evaluation.on_start and _nothing_to_evaluate(config),
        part="eval_data",
    ),
    Rule(
        "server.compare",
        "`server.compare: base` without `model.model_name_or_path`",
        "the run begins with no saved model",
        "Set it to the folder of one, or remove it.",
        lambda config: (
            config.server is not None and config.server.compare == "base" and config.model.model_name_or_path is None
        ),
    ),
    Rule(
        "report_to",
        "a tracker that `report_to` names twice",
        "both would record the same run in the same place",
        "Keep one of them.",
        lambda config: len({tracker.type for tracker in config.report_to}) < len(config.report_to),
    ),
    Rule(
        "evaluation.best",
        "`evaluation.best` without `data.eval`",
        "there is nothing to evaluate on",
        "Set data.eval to a file or a split, or remove evaluation.best.",
        lambda config: config.evaluation.best is not None and _nothing_to_evaluate(config),
        part="eval_data",
    ),
    Rule(
        "evaluation.best.min_delta",
        "`evaluation.best.min_delta` without `evaluation.best.patience`",
        "it says what counts as an improvement for patience, and nothing waits",
        "Set evaluation.best.patience, or remove it.",
        lambda config: (
            config.evaluation.best is not None
            and config.evaluation.best.min_delta > 0
            and config.evaluation.best.patience is None
        ),
    ),
    Rule(
        "train.max_steps",
        "`train.max_steps` with `train.num_train_epochs`",
        "both say how long to train",
        "Keep one; on the command line, train.num_train_epochs=null takes the other back.",
        lambda config: config.train.max_steps is not None and config.train.num_train_epochs is not None,
    ),
    Rule(
        "lr_scheduler.warmup_ratio",
        "`lr_scheduler.warmup_ratio` with `lr_scheduler.warmup_steps`",
        "both say how long to warm up",
        "Keep one of lr_scheduler.warmup_ratio and lr_scheduler.warmup_steps.",
        lambda config: config.lr_scheduler.warmup_ratio > 0 and config.lr_scheduler.warmup_steps is not None,
    ),
    Rule(
        "evaluation.evaluators",
        "a metric under an evaluator that does not give what it reads",
        _unfed_metric,
        "Put it under another evaluator: generation for texts, classification for choices, perplexity for tokens.",
        lambda config: bool(_unfed_metric(config)),
    ),
    Rule(
        "evaluation.evaluators",
        "two items of `evaluation.evaluators` with one name",
        "their results and files would have the same names",
        "Set `name` of one of them; without it, `type` is the name.",
        lambda config: (
            len({evaluator.known_as for evaluator in config.evaluation.evaluators}) < len(config.evaluation.evaluators)
        ),
    ),
    Rule(
        "evaluation.evaluators",
        "an evaluator without samples",
        "one of them has neither data of its own nor data.eval",
        "Set its `data`, or data.eval.",
        lambda config: (
            config.evaluation.evaluators != EvaluationConfig().evaluators
            and not config.data.eval
            and not all(evaluator.data for evaluator in config.evaluation.evaluators)
        ),
        part="eval_data",
    ),
)


def check(config: RunConfig, given: Collection[Part] = PARTS) -> list[Problem]:
    """Every rule that the configuration breaks, a global batch that cannot come out whole, a model that cannot be cut.

    `given` is what a program may hand in beside the configuration.
    """
    found = [_problem(config, rule) for rule in RULES if rule.part not in given and rule.broken(config)]
    size = config.parallel.data_parallel_size
    batch = impossible_batch(config.train) if size == "auto" else batch_sizes(config.train, size)
    sums = [batch] if isinstance(batch, Problem) else []
    return [*found, *sums, *impossible_split(config.model, config.parallel)]


def require_fusable(config: RunConfig, data_parallel_size: int) -> None:
    """Refuse what an optimizer that updates in backward cannot do, also one that a program hands in.

    Raises:
        ConfigError: it breaks a rule of `FUSED`, accumulation being known with the number of ranks.
    """
    found = [_problem(config, rule) for rule in FUSED if rule.broken(config)]
    if not found and config.gradient_accumulation_steps(data_parallel_size) > 1:
        found = [_problem(config, _ACCUMULATION)]
    if found:
        raise ConfigError(found)


def require_parts(config: RunConfig, *, model: bool, train_data: bool, eval_data: bool = True) -> None:
    """Refuse a run that lacks what neither the configuration nor the program gives.

    Args:
        model: whether the program hands in a model.
        train_data: whether it hands in training samples.
        eval_data: whether it hands in evaluation samples, or they are not asked for.

    Raises:
        ConfigError: one of them is missing.
    """
    needed = {"model": model, "train_data": train_data, "eval_data": eval_data}
    missing = [rule for rule in RULES if needed.get(rule.part) is False and rule.broken(config)]
    if missing:
        raise ConfigError([_problem(config, rule) for rule in missing])


def _problem(config: RunConfig, rule: Rule) -> Problem:
    why = rule.why if isinstance(rule.why, str) else rule.why(config)
    return Problem(rule.key, why, value(config, rule.key), rule.fix)


def value(config: RunConfig, key: str) -> object:
    """What stands at a dotted key of the core's sections; MISSING when it is nothing."""
    found: Any = config
    for name in key.split("."):
        found = found.get(name, MISSING) if isinstance(found, Mapping) else getattr(found, name)
    return MISSING if found is None or found == [] else found


def compatibility_page() -> str:
    """docs/compatibility.md."""
    rows = [
        f"| {rule.what} | {rule.why if isinstance(rule.why, str) else 'the message says why'} | {rule.fix} |"
        for rule in RULES
    ]
    return "\n".join([_PAGE, *rows, ""])


_PAGE = """\
# Compatibility

Combinations that CoLLiE refuses before a run starts, with the reason. Every other combination works and is
tested. This page is written from the table in `collie_core/config/rules.py`.

| combination | reason | what to do |
|---|---|---|"""
