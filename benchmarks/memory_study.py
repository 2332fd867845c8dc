"""How many bytes training takes per parameter, by optimizer and adapter, from 3 to 65 billion parameters.

The study of CoLLiE's paper (arXiv 2312.00407, the chart of required memory), taken again by `collie plan`: the training
step itself on tensors without values, so no GPU is needed and nothing is allocated. Five llamas in the shapes of the
chart, 1 x 2048 tokens in bfloat16, two accumulated (one where the optimizer updates in backward and cannot
accumulate), gradient checkpointing, all on one device that is large enough. What counts is the peak of a step, in
GB = 10^9 bytes, and the slope of a straight line through the sizes (least squares), in bytes per parameter. Beside it
stand the slopes of the chart, and what two estimators say that count parameters: `accelerate estimate-memory`, and
DeepSpeed's of ZeRO.

    python benchmarks/memory_study.py [--sizes 3B,7B] [--write benchmarks/results/memory_study.md]

`--write` draws it too, into a .svg beside the page.
"""

from __future__ import annotations

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # read by the import of DeepSpeed

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from accelerate.commands.estimate import estimate_training_usage  # type: ignore[import-untyped]
from accelerate.utils import calculate_maximum_sizes  # type: ignore[import-untyped]
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from transformers import LlamaConfig, LlamaForCausalLM

from collie_core.api import RunConfig
from collie_core.cli._quiet import quiet_libraries
from collie_core.plan.plan import make_plan

GB = 1e9
LENGTH, VOCABULARY = 2048, 32_000
# hidden size, intermediate size, layers, heads: OpenLLaMA 3B, and LLaMA 7B to 65B (arXiv 2302.13971, table 2)
SHAPES = {
    "3B": (3200, 8640, 26, 32),
    "7B": (4096, 11008, 32, 32),
    "13B": (5120, 13824, 40, 40),
    "30B": (6656, 17920, 60, 52),
    "65B": (8192, 22016, 80, 64),
}
CHART = {"Adan, Sophia": 34.5, "Adam, Lion": 30.5, "LOMO, adapters": 2.1}  # the slopes that are printed in it
LORA = {"type": "lora", "r": 4, "lora_alpha": 32, "target_modules": "all-linear"}
FLOAT32, ZERO = "float32 weights, autocast", "ZeRO-1, bfloat16 weights and float32 copies"
NOTES = f"""
How the chart counted, by the scripts beside it (examples/profile in the original repository): what the driver said
was in use on all GPUs together after a step, with bfloat16 through DeepSpeed without ZeRO, tensor parallelism (by
default on 8 GPUs; one for adapters), flash attention, gradient checkpointing, 1 x {LENGTH} tokens, two accumulated (one
for LOMO), LoRA of rank 4 on all linear layers. So its bytes hold what belongs to no tensor too: the CUDA context and
NCCL's buffers of every GPU, and what torch's allocator had kept, which is more than the peak. Ours are the bytes of
tensors at the peak, on one device.

`zero_stage: 0` keeps weights in float32 and computes under autocast, which holds a second copy in bfloat16, of those
that are trained, from a forward to the end of its backward. With ZeRO weights are bfloat16, with float32 copies of
those that are trained, on whose gradients the update works. LOMO and AdaLomo keep bfloat16 weights alone. The linear
layers that an adapter leaves as they are stand in bfloat16 without ZeRO too, since autocast computes in it.

The estimators count weights, gradients and states of Adam by the number of parameters. They know no other optimizer, no
adapter, and neither activations nor logits.
"""


@dataclass(frozen=True)
class Subject:
    """What is planned at every size."""

    name: str
    engine: str
    chart: str  # the line of the chart it belongs to
    sections: dict[str, Any] = field(default_factory=dict)


def subjects() -> Iterable[Subject]:
    """Every line of the table."""
    for engine, zero in ((FLOAT32, 0), (ZERO, 1)):
        parallel = {"parallel": {"zero_stage": zero}}
        for name in ("Adan", "Sophia", "AdamW", "Lion"):
            chart = next(line for line in CHART if name.removesuffix("W") in line)
            yield Subject(name, engine, chart, parallel | {"optimizer": name.lower()})
        yield Subject("LoRA, AdamW", engine, "LOMO, adapters", parallel | {"adapter": LORA})
    for name in ("LOMO", "AdaLomo"):
        fused = {"optimizer": name.lower(), "train": {"gradient_accumulation_steps": 1, "max_grad_norm": 0}}
        yield Subject(name, "bfloat16 weights", "LOMO, adapters", fused)


def shape_of(size: str) -> dict[str, Any]:
    """The config.json of a llama."""
    hidden, intermediate, layers, heads = SHAPES[size]
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": LENGTH,
    }


def planned(subject: Subject, size: str) -> int:
    """Bytes at the peak of a step."""
    with tempfile.TemporaryDirectory() as folder:  # an adapter wants a base model that lies somewhere
        (Path(folder) / "config.json").write_text(json.dumps(shape_of(size)))
        sections: dict[str, Any] = {
            "model": {"model_name_or_path": folder, "dtype": "bfloat16", "gradient_checkpointing": "full"},
            "tokenizer": "byte",
            "data": {"train": "not read", "max_length": LENGTH},
            "train": {"max_steps": 10, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        }
        for name, value in subject.sections.items():
            sections[name] = sections.get(name, {}) | value if isinstance(value, dict) else value
        return make_plan(RunConfig(**sections), 1, gpu=True).largest.predicted


def estimated(size: str) -> tuple[int, dict[str, float]]:
    """Parameters, and the bytes that those find who count them."""
    with init_empty_weights():
        model = LlamaForCausalLM(LlamaConfig(**shape_of(size)))
    parameters = sum(one.numel() for one in model.parameters())
    largest = max(sum(one.numel() for one in module.parameters(recurse=False)) for module in model.modules())
    nbytes, _ = calculate_maximum_sizes(model)
    found: dict[str, float] = {}
    for dtype in ("float32", "float16"):
        found[f"accelerate estimate-memory, {dtype}"] = max(estimate_training_usage(nbytes, dtype).values())
    _, found["DeepSpeed, ZeRO-2 on one GPU"] = estimate_zero2_model_states_mem_needs(parameters, cpu_offload=False)
    _, found["DeepSpeed, ZeRO-3 on one GPU"], _ = estimate_zero3_model_states_mem_needs(
        parameters, largest, cpu_offload=False, cpu_offload_params=False
    )
    return parameters, found


def slope(billions: Sequence[float], gigabytes: Sequence[float]) -> float:
    """Bytes per parameter; of one size alone their ratio."""
    if len(billions) == 1:
        return gigabytes[0] / billions[0]
    return float(np.polyfit(billions, gigabytes, 1)[0])


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    engine: str
    gigabytes: list[float]
    chart: str = ""


def table(billions: Sequence[float], sizes: Sequence[str], rows: Sequence[Row]) -> str:
    """Markdown."""
    head = [f"{size} ({number:.2f} B)" for size, number in zip(sizes, billions, strict=True)]
    lines = [
        f"| | weights | {' | '.join(head)} | bytes per parameter | the chart's |",
        f"|---|---|{'--:|' * (len(sizes) + 2)}",
    ]
    for row in rows:
        cells = [f"{value:.1f}" for value in row.gigabytes]
        cells += [f"{slope(billions, row.gigabytes):.2f}", f"{CHART[row.chart]}" if row.chart else ""]
        lines.append(f"| {row.name} | {row.engine} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(file: Path, billions: Sequence[float], rows: Sequence[Row]) -> None:
    """GB over parameters: ours as points, the chart's slopes as lines, the estimators dotted."""
    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    ends = np.array([0, max(billions)])
    for number, (name, bytes_per_parameter) in enumerate(CHART.items()):
        axes.plot(
            ends, bytes_per_parameter * ends, color=f"C{number}", label=f"the chart: {name}", linewidth=4, alpha=0.3
        )
    for number, row in enumerate(row for row in rows if row.chart):
        color, marker = f"C{list(CHART).index(row.chart)}", "osd^vP*Xph<>"[number]
        axes.plot(billions, row.gigabytes, marker, color=color, fillstyle="none", label=f"{row.name}, {row.engine}")
    for row in rows:
        if not row.chart:
            axes.plot(billions, row.gigabytes, ":", label=row.name)
    axes.set(xlabel="parameters, billions", ylabel="GB at the peak", ylim=(0, None), xlim=(0, None))
    axes.legend(fontsize="x-small")
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Plan, print, and write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SHAPES), help="some of them (default: %(default)s)")
    parser.add_argument("--write", type=Path, metavar="PAGE.md", help="write the page and the plot too")
    args = parser.parse_args()
    sizes = args.sizes.split(",")
    if unknown := [size for size in sizes if size not in SHAPES]:
        parser.error(f"--sizes {args.sizes}: {unknown[0]!r} is none of {', '.join(SHAPES)}")
    if args.write and not os.access(args.write.parent, os.W_OK):
        parser.error(f"--write {args.write}: {args.write.parent} is no folder that may be written")
    began = time.perf_counter()
    quiet_libraries()
    warnings.filterwarnings("ignore")
    counted = [estimated(size) for size in sizes]
    billions = [parameters / 1e9 for parameters, _ in counted]
    rows = []
    for subject in subjects():
        rows.append(Row(subject.name, subject.engine, [planned(subject, size) / GB for size in sizes], subject.chart))
        print(f"{time.perf_counter() - began:.0f} s: {subject.name}, {subject.engine}", file=sys.stderr)
    rows += [Row(name, "", [found[name] / GB for _, found in counted]) for name in counted[0][1]]
    packages = ", ".join(f"{name} {version(name)}" for name in ("transformers", "deepspeed", "accelerate"))
    lines = [
        "# Bytes per parameter",
        "",
        f"{time.strftime('%Y-%m-%d')}; planned in {time.perf_counter() - began:.0f} s on {os.cpu_count()} cores, "
        f"torch {torch.__version__}, {packages}; 1 x {LENGTH} tokens, bfloat16, gradient checkpointing, "
        "one device. GB at the peak of a step:",
        "",
        table(billions, sizes, rows),
        NOTES,
    ]
    text = "\n".join(lines)
    print(text)
    if args.write:
        args.write.write_text(text, encoding="utf-8")
        draw(args.write.with_suffix(".svg"), billions, rows)


if __name__ == "__main__":
    main()
