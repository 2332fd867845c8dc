"""Updates in backward against the same optimizer after backward, bit for bit; and what must not reach the weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from steps import CLIP, STEPS, make_batches, make_model, weights_of
from torch import Tensor, nn
from transformers import get_scheduler

from collie_core.config.parallel import ParallelConfig
from collie_core.data.loader import StepBatch
from collie_core.engine.deepspeed_config import deepspeed_config
from collie_core.engine.fused_step import FusedStep, LossScale, Zero3FusedStep
from collie_core.engine.step import TorchStep
from collie_core.errors import RunError
from collie_core.hookspecs import FusedOptimizer
from collie_core.topology import Topology

LR = 0.05


class Descent(torch.optim.Optimizer):
    """Gradient descent in backward. Looks around at each update: no other gradient may exist then."""

    def __init__(self, params: Any, lr: float = LR) -> None:
        super().__init__(params, {"lr": lr})
        self.updates = 0

    @torch.no_grad()
    def update(self, param: nn.Parameter, grad: Tensor) -> None:
        assert all(other.grad is None for group in self.param_groups for other in group["params"])
        param.add_(grad, alpha=-self.param_groups[0]["lr"])
        self.updates += 1

    def step(self, closure: Any = None) -> None:
        """Nothing is left to do."""


def fused_step(
    model: nn.Module, *, clip: float | None, dtype: torch.dtype = torch.float32, zero3: bool = False, **more: Any
) -> FusedStep:
    optimizer = Descent(model.parameters())
    assert isinstance(optimizer, FusedOptimizer)
    scheduler = get_scheduler("cosine", optimizer, 1, STEPS)
    shared: dict[str, Any] = {"topology": Topology(), "dtype": dtype, "max_grad_norm": clip, **more}
    if not zero3:
        return FusedStep(model, optimizer, scheduler, **shared)
    config = deepspeed_config(
        parallel=ParallelConfig(zero_stage=3),
        dtype=dtype,
        micro_batch_size=2,
        data_parallel_size=1,
        max_grad_norm=clip,
        overrides={},
        keeps_small_parameters=False,
    )
    return Zero3FusedStep(model, optimizer, scheduler, config=config, **shared)


def torch_step(model: nn.Module, *, clip: float | None) -> TorchStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    scheduler = get_scheduler("cosine", optimizer, 1, STEPS)
    return TorchStep(model, optimizer, scheduler, topology=Topology(), dtype=torch.float32, max_grad_norm=clip)


def single(batches: list[StepBatch]) -> list[StepBatch]:
    """The first micro-batch of each step."""
    return [StepBatch(step.micro_batches[:1], samples=2, tokens=0, epoch=0.0) for step in batches]


def drive(step: Any, batches: list[StepBatch]) -> list[tuple[float, float, float]]:
    return [
        (step.learning_rate, step.forward_backward(batch, batch.target_tokens).item(), step.update())
        for batch in batches
    ]


@pytest.mark.filterwarnings("ignore")  # DeepSpeed calls collectives that torch deprecates
@pytest.mark.parametrize("zero3", [False, True], ids=["whole", "zero3"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("clip", [None, CLIP])
def test_it_is_the_update_after_backward_bit_for_bit(clip: float | None, checkpointing: bool, zero3: bool) -> None:
    if zero3:
        pytest.importorskip("deepspeed", reason="DeepSpeed is an extra of collie-core and is not installed")
    models = [make_model().train() for _ in range(2)]
    if checkpointing:
        for model in models:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    fused, plain = fused_step(models[0], clip=clip, zero3=zero3), torch_step(models[1], clip=clip)
    expected = drive(plain, single(make_batches()))
    within = 1e-6 if zero3 else 0.0  # DeepSpeed has a matrix product of its own
    torch.testing.assert_close(
        torch.tensor(drive(fused, single(make_batches()))), torch.tensor(expected), rtol=0, atol=within
    )
    assert any(norm > CLIP for _, _, norm in expected)  # clipping does something
    expected_weights = weights_of(plain)
    for name, value in weights_of(fused).items():
        torch.testing.assert_close(value, expected_weights[name], rtol=0, atol=within)


def test_every_parameter_is_updated_once_and_no_gradient_is_left() -> None:
    model = make_model()
    step = fused_step(model, clip=CLIP)
    (batch, *_) = single(make_batches())
    step.forward_backward(batch, batch.target_tokens)
    assert step.optimizer.updates == len(list(model.parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_several_micro_batches_are_refused() -> None:
    step = fused_step(make_model(), clip=None)
    batch = make_batches()[1]
    assert len(batch.micro_batches) == 2
    with pytest.raises(RunError, match=r"one micro-batch per step, and this one has 2; .*accumulation_steps=1"):
        step.forward_backward(batch, batch.target_tokens)


@pytest.mark.parametrize("clip", [None, CLIP])
def test_a_loss_that_is_not_a_number_reaches_no_weight(clip: float | None) -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    step = fused_step(model, clip=clip, train_fn=lambda model, batch, _: model(batch.input_ids).logits.sum() * math.nan)
    (batch, *_) = single(make_batches())
    with pytest.raises(RunError, match=r"is nan: (nothing was updated|the update was not applied)"):
        step.forward_backward(batch, batch.target_tokens)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


class Infinite(torch.autograd.Function):
    """A loss that is fine and a gradient that is not."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * math.inf


def infinite(model: nn.Module, batch: Any, target_tokens: int) -> Tensor:
    loss: Tensor = Infinite.apply(model(batch.input_ids).logits.mean())  # type: ignore[no-untyped-call]
    return loss


def test_a_gradient_that_is_not_a_number_stops_the_run_and_with_clipping_before_the_update() -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    (batch, *_) = single(make_batches())
    with pytest.raises(RunError, match=r"the update was not applied"):
        fused_step(model, clip=CLIP, train_fn=infinite).forward_backward(batch, batch.target_tokens)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    step = fused_step(make_model(), clip=None, train_fn=infinite)
    step.forward_backward(batch, batch.target_tokens)
    with pytest.raises(RunError, match=r"the weights were updated with it.*train\.max_grad_norm above 0"):
        step.update()


def test_float16_skips_an_overflow_and_grows_back() -> None:
    model = make_model().half()
    step = fused_step(model, clip=None, dtype=torch.float16)
    batches = single(make_batches())
    assert step.two_passes  # an overflow must be known before the first update
    before = copy.deepcopy(model.state_dict())
    step.scale.value = 2.0**40  # far beyond float16
    step.forward_backward(batches[0], batches[0].target_tokens)
    assert not math.isfinite(step.update())
    assert step.scale.value == 2.0**39
    assert step.learning_rate == 0.0  # the schedule did not advance
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    step.scale = LossScale(True, 2.0**8, growth_steps=3)
    numbers = drive(step, batches)
    assert step.scale.value == 2.0**10  # doubled twice in six steps
    assert all(math.isfinite(norm) for _, _, norm in numbers)
    reference = drive(fused_step(make_model(), clip=None), batches)
    torch.testing.assert_close(torch.tensor(numbers), torch.tensor(reference), rtol=1e-2, atol=1e-2)


def test_bfloat16_weights_follow_float32() -> None:
    model = make_model().bfloat16()
    step = fused_step(model, clip=CLIP, dtype=torch.bfloat16)
    numbers, reference = (drive(one, single(make_batches())) for one in (step, fused_step(make_model(), clip=CLIP)))
    torch.testing.assert_close(torch.tensor(numbers), torch.tensor(reference), rtol=2e-2, atol=2e-2)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_float32_weights_compute_in_the_precision_of_the_run() -> None:
    seen = []
    step = fused_step(make_model(), clip=None, dtype=torch.bfloat16)
    step.loss_fn = lambda outputs, labels, targets: seen.append(outputs.logits.dtype) or outputs.logits.float().mean()  # type: ignore[func-returns-value]
    (batch, *_) = single(make_batches())
    step.forward_backward(batch, batch.target_tokens)
    assert seen == [torch.bfloat16]


def test_what_is_frozen_stays() -> None:
    model = make_model()
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    before = copy.deepcopy(model.model.layers[0].state_dict())
    step = fused_step(model, clip=CLIP)
    drive(step, single(make_batches()))
    for name, value in model.model.layers[0].state_dict().items():
        assert torch.equal(value, before[name])
