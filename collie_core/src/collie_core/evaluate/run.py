"""One evaluation: every evaluator of the configuration, one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from collie_core.errors import RunError
from collie_core.evaluate.context import EvaluationContext, Reading, require_new_names
from collie_core.evaluate.predictions import Predictions
from collie_core.generate import SampleText
from collie_core.report.rundir import PREDICTIONS

if TYPE_CHECKING:
    from torch import nn

    from collie_core.config.evaluation import EvaluatorConfig, Mode
    from collie_core.hookspecs import Evaluator, MetricCan
    from collie_core.parts import Parts
    from collie_core.plugins import Plugins


class Evaluated(NamedTuple):
    """What an evaluation found, by the names of metrics.jsonl; `samples` on the main rank alone."""

    results: dict[str, float]
    details: dict[str, str]
    samples: list[SampleText]


def run_evaluators(parts: Parts, model: nn.Module, step: int | None) -> Evaluated:
    """Every evaluator that has samples. Collective.

    Args:
        parts: of the run.
        model: as it is called, in evaluation mode.
        step: for the names of the files; None outside of a run.
    """
    found = Evaluated({}, {}, [])
    for section in parts.config.evaluation.evaluators:
        if not parts.has_samples(section):
            continue
        context = _context(parts, section, model, step)
        evaluator = cast("Evaluator", parts.registry.build("evaluator", section.type, config=section))
        with context.predictions.written():
            outcome = evaluator.evaluate(context)
        found.results.update({f"eval/{section.prefix}{name}": float(n) for name, n in outcome.results.items()})
        found.details.update({f"eval/{section.prefix}{name}": text for name, text in outcome.details.items()})
        found.samples.extend(context.predictions.shown)
        if outcome.details and parts.topology.is_main:
            _write_details(context.predictions.path.with_suffix(".details.json"), dict(outcome.details))
    return found


def check_metrics(registry: Plugins, section: EvaluatorConfig) -> None:
    """Build the metrics of an evaluator before anything is measured.

    Raises:
        PluginError: one cannot be built.
        RunError: two of them give a result of the same name.
    """
    names: dict[str, float] = {}
    for reading in _readings(registry, section):
        found = reading.metric.compute()
        require_new_names(section.known_as, names, found)
        names |= found


def better(registry: Plugins, section: EvaluatorConfig) -> dict[str, Mode]:
    """Whether less or more of its results is better, by the names of metrics.jsonl, as far as metrics declare it."""
    found: dict[str, Mode] = {f"eval/{section.prefix}loss": "min"}
    modes: tuple[Mode, Mode] = ("min", "max")
    for config, reading in zip(section.metrics, _readings(registry, section), strict=True):
        up = cast("MetricCan", registry.component("metric", config.type).can).higher_is_better
        if up is not None:
            found |= dict.fromkeys((f"eval/{section.prefix}{name}" for name in reading.metric.compute()), modes[up])
    return found


def _readings(registry: Plugins, section: EvaluatorConfig) -> Iterator[Reading]:
    for metric in section.metrics:
        can = cast("MetricCan", registry.component("metric", metric.type).can)
        yield Reading(can.reads, registry.build("metric", metric.type, config=metric))


def _context(parts: Parts, section: EvaluatorConfig, model: nn.Module, step: int | None) -> EvaluationContext:
    when = "" if step is None else f"-step-{step:08d}"
    path = Path(parts.config.train.output_dir) / PREDICTIONS / f"{section.known_as}{when}.jsonl"
    return EvaluationContext(
        name=section.known_as,
        model=model,
        tokenizer=parts.tokenizer,
        topology=parts.topology,
        data=parts.config.data,
        batch_size=section.batch_size or parts.eval_batch_size,
        seed=parts.config.train.seed,
        readings=[*_readings(parts.registry, section)],
        rows=partial(parts.evaluator_rows, section),
        dataset=partial(parts.evaluator_dataset, section),
        precision=parts.precision,
        predictions=Predictions(path, parts.config.evaluation.print_samples, parts.topology),
        before_turn=parts.before_turn,
        synced=parts.training and parts.config.parallel.zero_stage == 3 and parts.topology.dp.size > 1,
    )


def _write_details(path: Path, details: dict[str, str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(details, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from error
