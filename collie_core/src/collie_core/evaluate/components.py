"""The metrics of the core, as plugins of the same kind as any other."""

from __future__ import annotations

from collie_core.hookspecs import Component, MetricCan

PERPLEXITY = Component(
    build="collie_core.evaluate.perplexity:Perplexity",
    config="collie_core.config.evaluation:PerplexityConfig",
    summary="exp of the mean loss per target token",
    can=MetricCan(reads="token_losses", higher_is_better=False),
)
