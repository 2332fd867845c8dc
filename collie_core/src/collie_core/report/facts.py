"""What is known of a run before its first step, for the summary a person sees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from collie_core.data.dataset import segments
from collie_core.evaluate.run import better
from collie_core.report import text

if TYPE_CHECKING:
    from collie_core.parts import Parts


def run_facts(parts: Parts) -> dict[str, Any]:
    """Model, batch arithmetic, precision, data and plugins of parts that are built."""
    config, data_parallel, samples = parts.config, parts.topology.dp.size, parts.train_dataset
    parameters, trainable = parts.parameter_counts
    return {
        "model": parts.model.config.model_type,  # type: ignore[union-attr]
        "parameters": parameters,
        "trainable_parameters": trainable,
        "precision": str(parts.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(parts.device) if parts.device.type == "cuda" else "CPU",
        "engine": "torch" if config.parallel.zero_stage == 0 else f"DeepSpeed ZeRO-{config.parallel.zero_stage}",
        "optimizer": _optimizer(parts, trainable),
        "global_batch_size": parts.global_batch_size,
        "per_device_train_batch_size": parts.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps(data_parallel),
        "data_parallel_size": data_parallel,
        "max_steps": parts.max_steps,
        "epochs": parts.total_samples / samples.samples_per_epoch,
        "train_samples": len(samples),
        "train_tokens": samples.stats.tokens,
        "eval_samples": parts.eval_samples,
        "better": _better(parts),
        "data_notes": samples.stats.lines(),
        "plugins": [f"{row['name']} ({row['distribution']} {row['version']})" for row in parts.registry.used()],
        "sample": segments(samples[0], parts.tokenizer),
    }


def _better(parts: Parts) -> dict[str, str]:
    """Whether less or more of a result of evaluations is better, "min" or "max", where that is known."""
    found = {"eval/loss": "min"}
    for section in parts.config.evaluation.evaluators if parts.given.eval_fn is None else ():
        if parts.has_samples(section):
            found |= better(parts.registry, section)
    return found


def _optimizer(parts: Parts, trainable: int) -> str:
    """Name, learning rate, what it declares to keep beside the weights, and passes that it takes more than others."""
    if parts.given.optimizer is not None:
        return "handed in"
    section, can = parts.config.optimizer, parts.optimizer_can
    line = f"{section.type}, lr {section.lr:g}, {text.memory(trainable * can.state_bytes_per_parameter)} of state"
    if can.estimates_curvature:
        line += "; another forward and backward on steps that estimate curvature"
    max_grad_norm = parts.config.train.max_grad_norm
    if can.fuses_backward and (max_grad_norm or parts.dtype == torch.float16):
        cause = "train.max_grad_norm (0: one)" if max_grad_norm else "float16"
        line += f"; two backward passes per step, because of {cause}"
    return line
