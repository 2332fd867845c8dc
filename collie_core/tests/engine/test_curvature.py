"""Labels drawn from the model's own distribution: rightly, alike on every layout and rank, and used as they should."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from sharded import start
from steps import CLIP, make_batches, make_model
from torch import Tensor, nn
from transformers import get_scheduler

from collie_core.config.parallel import ParallelConfig
from collie_core.data.loader import IGNORE, Batch, StepBatch, collate
from collie_core.engine.curvature import drawn_labels
from collie_core.engine.deepspeed_config import deepspeed_config
from collie_core.engine.step import Curvature, Step, TorchStep
from collie_core.hookspecs import CurvatureOptimizer
from collie_core.model.vocabulary import Vocabulary
from collie_core.topology import Topology


def samples(count: int, tokens: int = 6) -> list[dict[str, Any]]:
    """Samples whose first two tokens are no targets."""
    ids = torch.arange(tokens).numpy()
    labels = torch.tensor([IGNORE, IGNORE, *range(2, tokens)]).numpy()
    return [{"input_ids": ids, "labels": labels, "position": position} for position in range(count)]


def test_labels_follow_the_distribution_of_the_logits() -> None:
    vocabulary, count = 7, 4000
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 1.5])
    batch = collate([[sample] for sample in samples(count)], pad_token_id=0, packing=False)
    labels = drawn_labels(seed=3)(logits.expand(count, 6, vocabulary), batch, None)
    assert torch.equal(labels == IGNORE, batch.labels == IGNORE)  # the same targets, other labels
    drawn = labels[batch.labels != IGNORE]
    found = torch.bincount(drawn, minlength=vocabulary) / len(drawn)
    expected = logits.softmax(0)
    error = 5 * (expected * (1 - expected) / len(drawn)).sqrt()  # five standard deviations
    assert ((found - expected).abs() <= error).all()


def test_a_label_is_drawn_from_the_logits_before_it() -> None:
    batch = collate([samples(1)], pad_token_id=0, packing=False)
    logits = torch.full((1, 6, 9), -100.0)
    logits[0, range(6), range(6)] = 100.0  # position i is sure of token i
    labels = drawn_labels(seed=0)(logits, batch, None)
    assert labels.tolist() == [[IGNORE, IGNORE, 1, 2, 3, 4]]


def test_other_seeds_and_samples_draw_other_labels() -> None:
    logits = torch.zeros(1, 6, 1000)
    batch, other = (collate([[sample]], pad_token_id=0, packing=False) for sample in samples(2))
    first = drawn_labels(seed=0)(logits, batch, None)
    assert torch.equal(drawn_labels(seed=0)(logits, batch, None), first)
    assert not torch.equal(drawn_labels(seed=1)(logits, batch, None), first)
    assert not torch.equal(drawn_labels(seed=0)(logits, other, None), first)


def test_padding_and_packing_draw_the_same() -> None:
    one, two = samples(2)
    two = {key: value[:5] if key != "position" else value for key, value in two.items()}
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(6, 11, generator=generator), torch.randn(5, 11, generator=generator)
    padded = torch.zeros(2, 6, 11)
    padded[0], padded[1, :5] = first, second
    apart = drawn_labels(4)(padded, collate([[one], [two]], pad_token_id=0, packing=False), None)
    packed = collate([[one, two]], pad_token_id=0, packing=True)
    together = drawn_labels(4)(torch.cat([first, second])[None], packed, None)
    assert together[0].tolist() == [*apart[0].tolist(), *apart[1, :5].tolist()]


def draw_on_ranks() -> list[list[int]]:
    """Labels by each rank's share of the vocabulary."""
    axis = start().tp
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, 6, 37, generator=generator)
    batch = collate([[sample] for sample in samples(40)], pad_token_id=0, packing=False)
    bounds = [37 * rank // axis.size for rank in range(axis.size + 1)]
    begin, end = bounds[axis.rank], bounds[axis.rank + 1]
    vocabulary = Vocabulary(axis, begin, end - begin) if axis.size > 1 else None
    return drawn_labels(seed=9)(logits[..., begin:end], batch, vocabulary).tolist()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_share_the_vocabulary_draw_what_one_does(ranks: int, zygote: Any) -> None:
    (expected,) = zygote.run(__file__, "draw_on_ranks", world_size=1)
    assert zygote.run(__file__, "draw_on_ranks", world_size=ranks) == [expected] * ranks


# -- through the engines --------------------------------------------------------------------------------------------


class Watcher(torch.optim.SGD):
    """Is due every second step, and keeps what it is given then."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.steps = 0
        self.estimates: list[tuple[int, Tensor]] = []
        self._tokens = 0

    def curvature_due(self) -> bool:
        return self.steps % 2 == 0

    @contextmanager
    def estimating(self, target_tokens: int) -> Iterator[None]:
        self._tokens = target_tokens
        yield
        self._tokens = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if not self._tokens:
            super().step()
            self.steps += 1
            return
        flat = torch.cat(
            [p.grad.flatten() for group in self.param_groups for p in group["params"] if p.grad is not None]
        )
        self.estimates.append((self._tokens, flat.clone()))


def engine(stage: int) -> tuple[Step, Watcher, nn.Module]:
    model = make_model()
    optimizer = Watcher(model.parameters())
    assert isinstance(optimizer, CurvatureOptimizer)
    scheduler = get_scheduler("constant", optimizer)
    shared: dict[str, Any] = {"topology": Topology(), "curvature": Curvature(optimizer, drawn_labels(seed=5))}
    if stage == 0:
        return (
            TorchStep(model, optimizer, scheduler, dtype=torch.float32, max_grad_norm=CLIP, **shared),
            optimizer,
            model,
        )
    from collie_core.engine.deepspeed_step import DeepSpeedStep

    config = deepspeed_config(
        parallel=ParallelConfig.model_validate({"zero_stage": stage}),
        dtype=torch.float32,
        micro_batch_size=2,
        data_parallel_size=1,
        max_grad_norm=CLIP,
        overrides={},
    )
    return DeepSpeedStep(model, optimizer, scheduler, config=config, **shared), optimizer, model


def with_layout(batches: list[Batch]) -> list[Batch]:
    """Positions of the run for samples that fill their rows."""
    rows = 0
    for batch in batches:
        count, tokens = batch.input_ids.shape
        batch.layout = tuple(((rows + row, tokens),) for row in range(count))
        rows += count
    return batches


def expected_estimate(batches: list[Batch], target_tokens: int) -> Tensor:
    """The gradient of the mean loss over drawn labels, by autograd alone."""
    model = make_model()
    for batch in batches:
        logits = model(batch.input_ids).logits
        labels = drawn_labels(seed=5)(logits, batch, None)
        loss = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
        )
        (loss / target_tokens).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@pytest.mark.filterwarnings("ignore")  # DeepSpeed calls collectives that torch deprecates
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_optimizer_is_given_the_gradient_of_drawn_labels_unclipped(stage: int) -> None:
    if stage:
        pytest.importorskip("deepspeed", reason="DeepSpeed is an extra of collie-core and is not installed")
    step, optimizer, _ = engine(stage)
    steps = make_batches()
    losses = []
    for batch in steps[:3]:
        with_layout(batch.micro_batches)
        losses.append(step.forward_backward(batch, batch.target_tokens).item())
        step.update()
    assert [tokens for tokens, _ in optimizer.estimates] == [steps[0].target_tokens, steps[2].target_tokens]
    expected = expected_estimate(steps[0].micro_batches, steps[0].target_tokens)
    assert expected.norm() > CLIP
    found = optimizer.estimates[0][1]
    if stage < 3:  # there the parts come one after the other, in another order
        found = found[: expected.numel()]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.norm(), expected.norm(), rtol=1e-5, atol=0)
    assert losses[0] == pytest.approx(plain_loss(steps[0].micro_batches), abs=1e-5)  # of the true labels


def plain_loss(batches: list[Batch]) -> float:
    model = make_model()
    step = TorchStep(
        model,
        optimizer := torch.optim.SGD(model.parameters()),
        get_scheduler("constant", optimizer),
        topology=Topology(),
        dtype=torch.float32,
        max_grad_norm=None,
    )
    batch = StepBatch(batches, samples=2, tokens=0, epoch=0.0)
    return step.forward_backward(batch, batch.target_tokens).item()


def test_an_estimate_leaves_weights_and_gradients_as_they_were() -> None:
    step, optimizer, model = engine(0)
    without = make_model()
    reference = torch.optim.SGD(without.parameters(), lr=0.1)
    plain = TorchStep(
        without,
        reference,
        get_scheduler("constant", reference),
        topology=Topology(),
        dtype=torch.float32,
        max_grad_norm=CLIP,
    )
    for batch in make_batches():
        with_layout(batch.micro_batches)
        for one in (step, plain):
            one.forward_backward(batch, batch.target_tokens)
            one.update()
    assert len(optimizer.estimates) == 3
    for value, expected in zip(model.parameters(), without.parameters(), strict=True):
        assert torch.equal(value, expected)
