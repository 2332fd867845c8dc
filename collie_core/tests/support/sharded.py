"""Tiny models cut over tensor-parallel ranks as a run builds them, and what they are compared with."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
)

from collie_core.config.parallel import ParallelConfig
from collie_core.model.build import empty_model
from collie_core.model.collectives import Shares
from collie_core.model.family import StockFamily
from collie_core.model.partition import Partition, Rule, plan
from collie_core.model.shard import shard
from collie_core.topology import Topology


def start() -> Topology:
    """All processes share each layer."""
    return Topology.start(ParallelConfig(tensor_parallel_size=int(os.environ["WORLD_SIZE"])))


def assert_same(mine: Tensor | None, expected: Tensor | None, what: str = "", *, within: float = 1e-5) -> None:
    """Equal up to rounding, measured by the largest entry."""
    assert mine is not None, what
    assert expected is not None, what
    assert mine.shape == expected.shape, what
    if not mine.numel():
        return
    mine, expected = mine.detach(), expected.detach()
    error = float((mine - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    assert error < within, f"{what}: {error}"


SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 46,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config_of(name: str, **changes: Any) -> PretrainedConfig:
    """A tiny config by its name, with some attributes changed."""
    one_kv = SIZES | {"num_key_value_heads": 1}
    aligned = SIZES | {"intermediate_size": 48}  # the kernel of the experts wants rows of 16 bytes
    configs: dict[str, Callable[[], PretrainedConfig]] = {
        "llama": lambda: LlamaConfig(**SIZES),
        "llama tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
        "llama biases": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
        "llama one kv": lambda: LlamaConfig(**one_kv, attention_bias=True),
        "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
        "qwen3 one kv": lambda: Qwen3Config(**one_kv, head_dim=8),
        "olmo2": lambda: Olmo2Config(**SIZES),
        "phi3": lambda: Phi3Config(**SIZES),
        "mixtral": lambda: MixtralConfig(**aligned, num_local_experts=4, sliding_window=None),
        "gemma2": lambda: Gemma2Config(
            **SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=4, attn_implementation="eager"
        ),
        "gpt2": lambda: GPT2Config(
            vocab_size=67, n_embd=32, n_layer=3, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        ),
    }
    config = configs[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def family_of(config: PretrainedConfig) -> StockFamily:
    """With the declarations that transformers does not have."""
    if config.model_type != "gpt2":
        return StockFamily(config.model_type)
    return StockFamily(
        "gpt2",
        tensor_plan={
            "transformer.h.*.attn.c_attn": "packed_colwise:3",
            "transformer.h.*.attn.c_proj": "rowwise",
            "transformer.h.*.mlp.c_fc": "colwise",
            "transformer.h.*.mlp.c_proj": "rowwise",
        },
        divided={"transformer.h.*.attn": ("split_size", "num_heads", "embed_dim")},
    )


def whole_model(config: PretrainedConfig) -> Any:
    """Random, with norms and biases that are not their neutral start values."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def sharded_model(
    whole: Any, config: PretrainedConfig, topology: Topology, *, sequence_parallel: bool = False
) -> tuple[Any, Partition]:
    """The model as it is built in a run: on the meta device, cut, then filled with this rank's slices."""
    family = family_of(config)
    model = empty_model(family, config)
    partition = plan(model, family, tensor_size=topology.tp.size)
    shard(model, partition, family, topology, sequence_parallel=sequence_parallel)
    filled: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        assert parameter.is_meta
        assert tuple(parameter.shape) == partition.placements[name].local_shape(topology.tp.size, topology.tp.rank)
        if parameter not in filled:
            values = slice_of(whole.get_parameter(name).detach(), partition.placements[name].rule, topology)
            filled[parameter] = nn.Parameter(values.clone())
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._parameters[leaf] = filled[parameter]
    return model.train(), partition


def slice_of(whole: Tensor, rule: Rule | None, topology: Topology) -> Tensor:
    """This rank's part of a whole tensor."""
    return whole if rule is None else Shares.by_rule(rule, topology.tp).take(whole, rule.dim)


def batches() -> list[dict[str, Tensor]]:
    """Two rows of 7 positions, then one of 10 in which two samples are packed."""
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randint(0, 67, shape, generator=generator) for shape in ((2, 7), (1, 10)))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    return [{"input_ids": first}, {"input_ids": second, "position_ids": positions}]
