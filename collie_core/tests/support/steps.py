"""A tiny model, a few steps of samples, and what the tests of engines ask of them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from collie_core.data.loader import Batch, StepBatch
from collie_core.engine.step import Step

STEPS, CLIP = 6, 0.5


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def make_batches(rows: int = 2) -> list[StepBatch]:
    """Steps of one to three micro-batches of different lengths and numbers of targets."""
    generator = torch.Generator().manual_seed(1)
    steps = []
    for step in range(STEPS):
        micro_batches = []
        for index in range(1 + step % 3):
            ids = torch.randint(0, 64, (rows, 9 + index), generator=generator)
            labels = ids.clone()
            labels[:, 0] = -100
            labels[0, :4] = -100
            micro_batches.append(Batch(ids, labels, None))
        steps.append(StepBatch(micro_batches, samples=2, tokens=0, epoch=0.0))
    return steps


def weights_of(step: Step) -> dict[str, Tensor]:
    """A copy of every weight, whatever the engine has taken apart."""
    module = getattr(step.model, "module", step.model)
    with step.gathered(list(module.parameters())):
        return {name: value.detach().clone() for name, value in module.named_parameters(remove_duplicate=False)}
