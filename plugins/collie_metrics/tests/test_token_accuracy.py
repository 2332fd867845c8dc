"""Token accuracy."""

from __future__ import annotations

import pytest
import torch

from collie_metrics.token_accuracy import TokenAccuracy


def test_by_hand() -> None:
    metric = TokenAccuracy()
    metric.update(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 0]))
    metric.update(torch.tensor([7]), torch.tensor([7]))
    metric.update(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long))
    assert metric.compute() == {"token_accuracy": 3 / 5}


@pytest.mark.parametrize("shape", [(3, 1), (3,), ()])
def test_shapes_that_torch_would_spread_are_refused(shape: tuple[int, ...]) -> None:
    metric = TokenAccuracy()
    with pytest.raises(ValueError, match="give one predicted id for every target id"):
        metric.update(torch.ones(shape, dtype=torch.long), torch.ones(2, dtype=torch.long))
    assert metric.tokens == 0
