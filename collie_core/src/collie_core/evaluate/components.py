"""The metric and the evaluators of the core, as plugins of the same kind as any other."""

from __future__ import annotations

from collie_core.hookspecs import Component, EvaluatorCan, MetricCan

PERPLEXITY = Component(
    build="collie_core.evaluate.perplexity:Perplexity",
    config="collie_core.config.evaluation:PerplexityConfig",
    summary="exp of the mean loss per target token",
    can=MetricCan(reads="token_losses", higher_is_better=False),
)
PERPLEXITY_EVALUATOR = Component(
    build="collie_core.evaluate.perplexity:PerplexityEvaluator",
    config="collie_core.config.evaluation:PerplexityEvaluatorConfig",
    summary="the losses of the target tokens",
    can=EvaluatorCan(feeds=("token_losses", "token_ids"), reads="samples"),
)
GENERATION = Component(
    build="collie_core.evaluate.generation:GenerationEvaluator",
    config="collie_core.config.evaluation:GenerationEvaluatorConfig",
    summary="answers that the model writes",
    can=EvaluatorCan(feeds=("texts",)),
)
CLASSIFICATION = Component(
    build="collie_core.evaluate.classification:ClassificationEvaluator",
    config="collie_core.config.evaluation:ClassificationEvaluatorConfig",
    summary="choices among given answers",
    can=EvaluatorCan(feeds=("choices",)),
)
