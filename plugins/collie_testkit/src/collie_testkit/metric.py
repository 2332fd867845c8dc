"""Checks of metrics: a number over a set of samples, however they are cut into batches and ranks."""

from __future__ import annotations

import json
import math
import pickle
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from collie_core.api import RunConfig, Trainer
from collie_testkit.context import Context
from collie_testkit.registry import Skipped, check, expect
from collie_testkit.training import sections_on, sizes_of

Sample = tuple[Any, Any]
"""A prediction and its target."""

SAMPLES = 23
WORDS = ("the", "cat", "sat.", "12", "3.50", "-7", "on", "a", "mat", "Über")
STRANGE = (
    "",
    " ",
    "\n",
    "\0",
    "u\u0308ber",
    "überü",
    "猫坐在垫子上",
    "नमस्ते",
    "مرحبا",
    "🐈‍⬛",
    "\u202e",
    "\ud7ff",
    "12,3",
)


def samples_for(reads: str, count: int = SAMPLES) -> list[Sample]:
    """Predictions that are right at times, and their targets, of the kind that a metric reads."""
    draw = random.Random(1)
    if reads in ("token_losses", "token_ids"):
        ids = [draw.randrange(5) for _ in range(count)]
        return [(draw.expovariate(1.0) if reads == "token_losses" else draw.randrange(5), target) for target in ids]
    if reads == "choices":
        return [(draw.choice("abc"), draw.choice("abc")) for _ in range(count)]
    return [(_text(draw), [_text(draw) for _ in range(draw.randint(1, 3))]) for _ in range(count)]


def _text(draw: random.Random) -> str:
    """Words and a number, as many metrics look for one."""
    return " ".join([*(draw.choice(WORDS) for _ in range(draw.randint(1, 7))), "####", str(draw.randint(1, 3))])


def feed(metric: Any, reads: str, samples: Sequence[Sample]) -> Any:
    """The metric after a batch."""
    predictions, targets = [prediction for prediction, _ in samples], [target for _, target in samples]
    if reads in ("token_losses", "token_ids"):
        kind = torch.float32 if reads == "token_losses" else torch.long
        metric.update(torch.tensor(predictions, dtype=kind), torch.tensor(targets, dtype=torch.long))
    else:
        metric.update(predictions, targets)
    return metric


def numbers_of(context: Context, samples: Sequence[Sample]) -> dict[str, float]:
    """Of all samples in one batch."""
    return dict(feed(context.build(), context.can.reads, samples).compute())


def _expect_same(found: Mapping[str, float], wanted: Mapping[str, float], where: str, relative: float = 1e-9) -> None:
    close = found.keys() == wanted.keys() and all(
        math.isclose(found[name], value, rel_tol=relative, abs_tol=1e-12)
        or (math.isnan(found[name]) and math.isnan(value))
        for name, value in wanted.items()
    )
    expect(close, f"{where} gives {dict(found)} instead of {dict(wanted)}")


# -- level 1 --------------------------------------------------------------------------------------------------------


@check("metric", level=1, mutant="in-words")
def reads(context: Context) -> None:
    """It takes what `can.reads` says, and gives finite numbers by name, and texts beside them if any."""
    metric = feed(context.build(), context.can.reads, samples_for(context.can.reads))
    numbers = metric.compute()
    expect(isinstance(numbers, Mapping), f"compute() gives a {type(numbers).__name__}, not a mapping")
    for name, value in numbers.items():
        right = isinstance(name, str) and isinstance(value, int | float) and math.isfinite(value)
        expect(right, f"compute() gives {name!r}: {value!r}, which is no finite number by name")
    for name, text in getattr(metric, "details", dict)().items():
        expect(isinstance(name, str) and isinstance(text, str), f"details() gives {name!r}: {text!r}, which is no text")


@check("metric", level=1, mutant="optimist")
def empty(context: Context) -> None:
    """Without samples it has the same names, each NaN, and a batch without samples changes nothing."""
    samples = samples_for(context.can.reads)
    whole = numbers_of(context, samples)
    nothing = dict(context.build().compute())
    nans = nothing.keys() == whole.keys() and all(map(math.isnan, nothing.values()))
    expect(nans, f"without samples it gives {nothing} instead of NaN for {', '.join(whole)}")
    metric = feed(feed(context.build(), context.can.reads, []), context.can.reads, samples)
    _expect_same(feed(metric, context.can.reads, []).compute(), whole, "with empty batches before and after, it")


@check("metric", level=1, mutant="mean-of-means")
def splits(context: Context) -> None:
    """Batches of any size, and samples in any order, give the same numbers."""
    reads, samples = context.can.reads, samples_for(context.can.reads)
    whole = numbers_of(context, samples)
    for size in (1, 4, 7):
        metric = context.build()
        for start in range(0, len(samples), size):
            feed(metric, reads, samples[start : start + size])
        _expect_same(metric.compute(), whole, f"in batches of {size} it")
    _expect_same(numbers_of(context, samples[::-1]), whole, "the other way round it")


@check("metric", level=1, mutant="ascii", concerns=lambda can: can.reads in ("texts", "choices"))
def unicode(context: Context) -> None:
    """It takes empty texts and those of every script, and gives finite numbers."""
    reads = context.can.reads
    for text in STRANGE:
        samples: list[Sample] = [(text, "a"), ("a", text), (text, text)]
        if reads == "texts":  # with a number, as many metrics look for one
            samples = [(prediction, [f"{target} #### 1"]) for prediction, target in samples]
        numbers = numbers_of(context, samples)
        expect(all(map(math.isfinite, numbers.values())), f"{text!r} gives {numbers}")


@check("metric", level=1, mutant="homebound")
def travels(context: Context) -> None:
    """Its state goes to another rank by pickle and comes out the same."""
    metric = feed(context.build(), context.can.reads, samples_for(context.can.reads))
    again = pickle.loads(pickle.dumps(metric))  # noqa: S301  (made a line before)
    _expect_same(again.compute(), metric.compute(), "after pickle it", 0.0)


@check("metric", level=1, mutant="halves")
def merge(context: Context) -> None:
    """`merge` is associative and commutative, takes an empty metric for nothing, and leaves the other as it is."""
    reads, samples = context.can.reads, samples_for(context.can.reads)
    whole = numbers_of(context, samples)
    shares = [samples[:3], samples[3:4], samples[4:]]

    def merged(first: Any, second: Any) -> Any:
        before = pickle.dumps(second)
        first.merge(second)
        expect(pickle.dumps(second) == before, "merge() has changed the other metric")
        return first

    def of(*numbers: int) -> Any:
        found = [feed(context.build(), reads, shares[number]) for number in numbers]
        return found if len(found) > 1 else found[0]

    _expect_same(merged(merged(of(0), of(1)), of(2)).compute(), whole, "(a + b) + c")
    _expect_same(merged(of(0), merged(of(1), of(2))).compute(), whole, "a + (b + c)")
    _expect_same(merged(of(2), merged(of(1), of(0))).compute(), whole, "c + (b + a)")
    alone = feed(context.build(), reads, samples)
    _expect_same(merged(merged(context.build(), alone), context.build()).compute(), whole, "0 + a + 0")


@check("metric", level=1, mutant="off-by-one")
def golden(context: Context) -> None:
    """The samples that its author gives have the numbers that its author gives."""
    if context.material.golden is None:
        raise Skipped("no golden values were given: checks(..., golden=(predictions, targets, numbers))")
    predictions, targets, numbers = context.material.golden
    found = dict(feed(context.build(), context.can.reads, list(zip(predictions, targets, strict=True))).compute())
    _expect_same({name: found.get(name, math.nan) for name in numbers}, numbers, "the golden samples it")


# -- level 2 --------------------------------------------------------------------------------------------------------


@check("metric", level=2, mutant="main-rank-alone")
def ranks(context: Context) -> None:
    """An evaluation on two ranks gives the numbers of one process."""
    _write_rows(context.folder)
    args = (context.section, context.can.reads, str(context.folder))
    (alone,) = context.on_ranks(evaluated, 1, *args, "dp1")
    found = context.on_ranks(evaluated, 2, *args, "dp2")[0]
    names = [f"eval/kit/{name}" for name in context.build().compute()]
    lacking = [name for name in names if name not in alone or name not in found]
    expect(not lacking, f"the evaluation has no {', '.join(lacking)}")
    _expect_same({name: found[name] for name in names}, {name: alone[name] for name in names}, "on two ranks it", 1e-5)


def _write_rows(folder: Path) -> None:
    """Of which every evaluator can make what it gives to metrics."""
    rows = [
        {"input": f"{'very ' * (number % 4)}well, #### {number}", "output": f"so {number}", "choices": ["one", "two 2"],
         "target": number % 2}
        for number in range(9)
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")


EVALUATORS: dict[str, dict[str, Any]] = {
    "token_losses": {"type": "perplexity"},
    "token_ids": {"type": "perplexity"},
    "texts": {"type": "generation", "max_new_tokens": 8},
    "choices": {"type": "classification", "choices": "choices"},
}


def evaluated(section: dict[str, Any], reads: str, folder: str, topology: str) -> dict[str, float]:
    """The numbers of an evaluation with this metric."""
    sections: dict[str, Any] = sections_on(topology, Path(folder), Path(folder) / topology, steps=1)
    sections["data"]["eval"] = sections["data"]["train"]
    sections["evaluation"] = {
        "per_device_eval_batch_size": 2 // sizes_of(topology)["dp"],
        "print_samples": 0,
        "evaluators": [{**EVALUATORS[reads], "name": "kit", "metrics": [section]}],
    }
    return Trainer(RunConfig(**sections), observers=()).evaluate()
