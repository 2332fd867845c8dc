"""Steps against a loop that knows only torch and transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from steps import CLIP, STEPS, make_batches, make_model, weights_of
from torch import Tensor, nn
from transformers import get_scheduler

from collie_core.config.parallel import ParallelConfig
from collie_core.data.loader import Batch, StepBatch
from collie_core.engine import ranks
from collie_core.engine.deepspeed_config import deepspeed_config
from collie_core.engine.step import Step, TorchStep, token_mean_loss
from collie_core.errors import RunError
from collie_core.topology import Topology

LR = 1e-2


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, fused=True)


def reference(batches: list[StepBatch]) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Losses, gradient norms and final weights of a hand-written loop over one concatenated float32 loss."""
    model = make_model()
    optimizer = optimizer_of(model)
    scheduler = get_scheduler("cosine", optimizer, 1, STEPS)
    numbers = []
    for step in batches:
        losses = []
        for batch in step.micro_batches:
            logits = model(batch.input_ids).logits[:, :-1]
            targets = batch.labels[:, 1:]
            losses.append(nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").flatten())
        loss = torch.cat(losses).sum() / step.target_tokens
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        numbers.append((loss.item(), norm.item()))
    return numbers, model.state_dict()


def torch_step(dtype: torch.dtype = torch.float32) -> TorchStep:
    model = make_model()
    optimizer = optimizer_of(model)
    scheduler = get_scheduler("cosine", optimizer, 1, STEPS)
    return TorchStep(model, optimizer, scheduler, topology=Topology(), dtype=dtype, max_grad_norm=CLIP)


def deepspeed_step(
    stage: int, dtype: torch.dtype = torch.float32, overrides: Mapping[str, Any] | None = None, **offload: bool
) -> Step:
    from collie_core.engine.deepspeed_step import DeepSpeedStep

    model = make_model()
    optimizer = optimizer_of(model)
    scheduler = get_scheduler("cosine", optimizer, 1, STEPS)
    config = deepspeed_config(
        parallel=ParallelConfig.model_validate({"zero_stage": stage, **offload}),
        dtype=dtype,
        micro_batch_size=2,
        data_parallel_size=1,
        max_grad_norm=CLIP,
        overrides=overrides or {},
    )
    return DeepSpeedStep(model, optimizer, scheduler, config=config, topology=Topology())


def drive(step: Step, batches: list[StepBatch]) -> list[tuple[float, float]]:
    return [(step.forward_backward(batch, batch.target_tokens).item(), step.update()) for batch in batches]


def assert_equal(numbers: list[tuple[float, float]], expected: list[tuple[float, float]], within: float) -> None:
    assert torch.tensor(numbers).sub(torch.tensor(expected)).abs().max() <= within


def test_torch_step_equals_a_hand_written_loop() -> None:
    expected, weights = reference(make_batches())
    step = torch_step()
    assert_equal(drive(step, make_batches()), expected, 1e-6)
    for name, value in weights_of(step).items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # DeepSpeed calls collectives that torch deprecates
@pytest.mark.parametrize(
    ("stage", "offload"),
    [
        (1, {}),
        (2, {}),
        (3, {}),
        (1, {"offload_optimizer": True}),
        (2, {"offload_optimizer": True}),
        (3, {"offload_optimizer": True, "offload_param": True}),
    ],
)
def test_deepspeed_step_equals_a_hand_written_loop(stage: int, offload: dict[str, bool]) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is an extra of collie-core and is not installed")
    expected, weights = reference(make_batches())
    step = deepspeed_step(stage, **offload)
    assert_equal(drive(step, make_batches()), expected, 1e-6)
    state = weights_of(step)
    assert state.keys() == weights.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bent", [True, False])
def test_zero_3_gathers_once_a_step_whatever_was_before(bent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """When this fails without the bend, DeepSpeed no longer remembers releases: remove `forget_gather_order`."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is an extra of collie-core and is not installed")
    from collie_core.engine import deepspeed_step as module

    if not bent:
        monkeypatch.setattr(module, "forget_gather_order", lambda engine: None)
    step: Any = deepspeed_step(3, overrides={"zero_optimization": {"stage3_param_persistence_threshold": 0}})
    batch = make_batches()[0]
    with torch.no_grad():
        step.model(batch.micro_batches[0].input_ids)
    whole: list[bool] = []

    @contextmanager
    def note(batch: Batch) -> Iterator[None]:
        """Entered before each forward and each backward."""
        whole.append(all(value.ds_status.name == "AVAILABLE" for value in step.model.parameters()))
        yield

    step.around = note
    for _ in range(4):
        whole.clear()
        step.forward_backward(batch, batch.target_tokens)
        step.update()
    assert step.head.is_last
    assert whole == [False, bent] * len(batch.micro_batches)


@pytest.mark.filterwarnings("ignore")
def test_deepspeed_starts_again_after_a_program_has_ended_the_process_group() -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is an extra of collie-core and is not installed")
    first = drive(deepspeed_step(3), make_batches())
    torch.distributed.destroy_process_group()
    assert drive(deepspeed_step(3), make_batches()) == first


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [torch_step, lambda dtype: deepspeed_step(1, dtype)], ids=["torch", "deepspeed"])
def test_bfloat16_follows_float32(make: Callable[[torch.dtype], Step]) -> None:
    expected, _ = reference(make_batches())
    assert_equal(drive(make(torch.bfloat16), make_batches()), expected, 2e-2)


def test_float16_scaler_skips_an_overflow_and_recovers() -> None:
    step = torch_step(torch.float16)
    before = weights_of(step)
    batch = make_batches()[0]
    step.forward_backward(batch, batch.target_tokens)
    step.parameters[0].grad.fill_(float("inf"))  # type: ignore[union-attr]
    scale = step.scaler.get_scale()
    assert step.update() == float("inf")
    assert step.scaler.get_scale() < scale
    assert step.learning_rate == 0.0  # the schedule did not advance
    for name, value in weights_of(step).items():
        assert torch.equal(value, before[name])
    losses = [loss for loss, _ in drive(step, make_batches())]
    assert all(loss == loss for loss in losses)


def test_a_gradient_that_is_not_a_number_stops_before_the_update() -> None:
    step = torch_step()
    before = weights_of(step)
    batch = make_batches()[0]
    step.forward_backward(batch, batch.target_tokens)
    step.parameters[0].grad.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(RunError, match=r"gradient norm is nan.*optimizer\.lr"):
        step.update()
    for name, value in weights_of(step).items():
        assert torch.equal(value, before[name])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_too_applies_no_gradient_that_is_not_a_number(stage: int, dtype: torch.dtype) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is an extra of collie-core and is not installed")
    step = deepspeed_step(stage, dtype)
    before = weights_of(step)
    step.train_fn = lambda model, batch, targets: model(batch.input_ids).logits.sum() * float("nan")  # type: ignore[attr-defined]
    batch = make_batches()[0]
    step.forward_backward(batch, batch.target_tokens)
    with pytest.raises(RunError, match=r"update was not applied"):
        step.update()
    for name, value in weights_of(step).items():
        assert torch.equal(value, before[name])


def test_token_mean_ignores_masked_and_unpredicted_positions() -> None:
    logits = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, 1, 2, -100, 3], [-100, -100, 4, 5, -100]])
    picked = [(0, 0, 1), (0, 1, 2), (0, 3, 3), (1, 1, 4), (1, 2, 5)]
    expected = -sum(logits[row, at].log_softmax(0)[token] for row, at, token in picked) / 11
    outputs = type("Outputs", (), {"logits": logits})
    torch.testing.assert_close(
        token_mean_loss(outputs, labels, 11).double(), torch.as_tensor(expected), rtol=1e-6, atol=1e-6
    )


def test_handed_in_functions_replace_loss_and_forward() -> None:
    model = make_model()
    optimizer = optimizer_of(model)
    scheduler = get_scheduler("constant", optimizer)
    batch = make_batches()[0]

    def train_fn(model: nn.Module, batch: Batch, target_tokens: int) -> Tensor:
        return 3 * token_mean_loss(model(batch.input_ids), batch.labels, target_tokens)

    tripled = TorchStep(
        model, optimizer, scheduler, topology=Topology(), dtype=torch.float32, max_grad_norm=None, train_fn=train_fn
    )
    expected, _ = reference(make_batches())
    assert tripled.forward_backward(batch, batch.target_tokens).item() == pytest.approx(3 * expected[0][0], rel=1e-6)
    assert tripled.update() == pytest.approx(3 * expected[0][1], rel=1e-5)


def test_missing_deepspeed_is_one_sentence_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"needs DeepSpeed: pip install 'collie-core\[deepspeed\]'"):
        ranks.start_deepspeed(Topology())
