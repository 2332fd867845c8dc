"""Pipeline stages against the whole model: losses, norms, generation; tied head, uneven cuts, few micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from collie_core.config.parallel import ParallelConfig
from collie_core.data.loader import Batch, StepBatch
from collie_core.engine.deepspeed_config import deepspeed_config
from collie_core.engine.pipeline import forward_only
from collie_core.engine.step import Step, TorchStep, stage_forward
from collie_core.errors import RunError
from collie_core.model.family import StockFamily
from collie_core.model.partition import plan
from collie_core.model.stages import Stub, borrow_head, cut, lend, stage_cache
from collie_core.topology import Topology

FAMILY = StockFamily("llama")
STEPS = 3


def make_model(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).eval()


def make_stage(parallel: ParallelConfig, tied: bool = True) -> tuple[LlamaForCausalLM, Topology]:
    """This rank's stage of `make_model`, or the whole of it."""
    topology = Topology.start(parallel)
    model = make_model(tied)
    if topology.pp.size > 1:
        cut(model, plan(model, FAMILY, pipeline_size=topology.pp.size), FAMILY, topology)
        borrow_head(model)
        lend(model)
    return model, topology


def make_steps(topology: Topology, micro_batches: int) -> list[StepBatch]:
    """Batches of different lengths: a step has `micro_batches` on each data-parallel rank."""
    generator = torch.Generator().manual_seed(1)
    steps = []
    for _ in range(STEPS):
        all_batches = []
        for _ in range(micro_batches * topology.dp.size):
            length = int(torch.randint(5, 12, (1,), generator=generator))
            ids = torch.randint(3, 101, (2, length), generator=generator)
            labels = ids.clone()
            labels[0, :2] = -100
            all_batches.append(Batch(ids, labels))
        mine = all_batches[topology.dp.rank :: topology.dp.size]
        steps.append(StepBatch(mine, samples=len(all_batches) * 2, tokens=0, epoch=0.0))
    return steps


def make_step(
    model: LlamaForCausalLM, topology: Topology, parallel: ParallelConfig, dtype: torch.dtype = torch.float32
) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-5)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if parallel.zero_stage == 0:
        return TorchStep(model, optimizer, scheduler, topology=topology, dtype=dtype, max_grad_norm=0.5)
    from collie_core.engine.deepspeed_step import DeepSpeedStep

    config = deepspeed_config(
        parallel=parallel,
        dtype=dtype,
        micro_batch_size=2,
        data_parallel_size=topology.dp.size,
        max_grad_norm=0.5,
        overrides={"fp16": {"initial_scale_power": 8}} if dtype == torch.float16 else {},
    )
    return DeepSpeedStep(model, optimizer, scheduler, config=config, topology=topology)


def train(
    stages: int, zero_stage: int, micro_batches: int, tied: bool, dtype: str = "float32"
) -> list[tuple[float, float]]:
    """Loss and norm of each step on this rank."""
    parallel = ParallelConfig.model_validate({"pipeline_parallel_size": stages, "zero_stage": zero_stage})
    model, topology = make_stage(parallel, tied)
    step = make_step(model, topology, parallel, getattr(torch, dtype))
    step.model.train()
    numbers = []
    for batch in make_steps(topology, micro_batches):
        target_tokens = int(topology.sum_over_data(batch.target_tokens))
        numbers.append((step.forward_backward(batch, target_tokens).item(), step.update()))
    return numbers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("stages", "data_parallel", "zero_stage", "micro_batches", "tied"),
    [
        (2, 1, 0, 1, True),
        (2, 1, 0, 4, False),
        (3, 1, 0, 2, True),
        (5, 1, 0, 3, False),
        (2, 2, 1, 3, True),
        (2, 2, 2, 2, True),
        (3, 1, 1, 5, False),
    ],
)
def test_stages_train_as_the_whole_model_does(
    stages: int, data_parallel: int, zero_stage: int, micro_batches: int, tied: bool, zygote: Any
) -> None:
    # One process sees the micro-batches of all data-parallel ranks.
    (expected,) = zygote.run(__file__, "train", world_size=1, args=(1, 0, micro_batches * data_parallel, tied))
    ranks = zygote.run(
        __file__, "train", world_size=stages * data_parallel, args=(stages, zero_stage, micro_batches, tied)
    )
    assert all(rank == ranks[0] for rank in ranks)
    assert torch.tensor(ranks[0]).sub(torch.tensor(expected)).abs().max() <= 2e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_float16_gradients_are_scaled_once_over_all_stages(zero_stage: int, zygote: Any) -> None:
    if zero_stage and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("DeepSpeed refuses float16 on this CPU, which does not calculate in it")
    (expected,) = zygote.run(__file__, "train", world_size=1, args=(1, 0, 3, True))
    ranks = zygote.run(__file__, "train", world_size=2, args=(2, zero_stage, 3, True, "float16"))
    assert all(rank == ranks[0] for rank in ranks)
    assert torch.tensor(ranks[0]).sub(torch.tensor(expected)).abs().max() <= 2e-2


def use(stages: int) -> dict[str, Any]:
    """What a stage is, and what calling it outside of training gives."""
    model, _ = make_stage(ParallelConfig(pipeline_parallel_size=stages))
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 101, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padded on the left
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6}
    refused = ""
    if stages > 1:
        try:
            model(ids)
        except RunError as error:
            refused = str(error)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        greedy = model.generate(ids, do_sample=False, past_key_values=stage_cache(model), **options)
        torch.manual_seed(3)
        sampled = model.generate(ids, do_sample=True, top_k=20, past_key_values=stage_cache(model), **options)
        batches = [Batch(ids[:, :length], ids[:, :length]) for length in (3, 7)]
        outputs = forward_only(model, iter(batches), lambda batch, hidden: stage_forward(model, batch, hidden).logits)
        evaluated = [None if output is None else output.tolist() for _, output in outputs]
    stubs = [name for name, module in model.named_modules() if isinstance(module, Stub)]
    return {
        "logits": logits.tolist(),
        "greedy": greedy.tolist(),
        "sampled": sampled.tolist(),
        "evaluated": evaluated,
        "stubs": stubs,
        "parameters": [name for name, _ in model.named_parameters()],
        "refused": refused,
    }


def test_stages_called_as_usual_work_as_a_chain(zygote: Any) -> None:
    (whole,) = zygote.run(__file__, "use", world_size=1, args=(1,))
    ranks = zygote.run(__file__, "use", world_size=3, args=(3,))
    for rank in ranks:
        torch.testing.assert_close(torch.tensor(rank["logits"]), torch.tensor(whole["logits"]), rtol=0, atol=1e-5)
        assert rank["greedy"] == whole["greedy"]
        assert rank["sampled"] == whole["sampled"]
        assert "outside the training schedule" in rank["refused"]
    assert [rank["evaluated"] for rank in ranks[:2]] == [[None, None]] * 2
    for found, expected in zip(ranks[2]["evaluated"], whole["evaluated"], strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-5)


def test_every_parameter_is_on_one_stage(zygote: Any) -> None:
    ranks = zygote.run(__file__, "use", world_size=3, args=(3,))
    owned = [name for rank in ranks for name in rank["parameters"]]
    assert sorted(owned) == sorted(name for name, _ in make_model().named_parameters())
    assert "lm_head" in ranks[0]["stubs"]
    assert "model.embed_tokens" in ranks[2]["stubs"]
