"""The loss of the targets alone against the whole logits of transformers and torch's cross-entropy in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from collie_core.data.loader import IGNORE, Batch
from collie_core.engine import target_loss as module
from collie_core.engine.step import stage_output, token_mean_loss
from collie_core.engine.target_loss import Head

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def llama(vocabulary: int = 97, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **SIZES, **changes))


def batch_of(vocabulary: int = 97, rows: int = 3, length: int = 23, *, find: bool = True) -> Batch:
    """Prompts without targets, padding, and a row that has none."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, vocabulary, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, :9] = labels[1, 15:] = labels[2] = IGNORE
    batch = Batch(ids, labels)
    if find:
        batch.find_targets()
    return batch


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def run(model: Any, batch: Batch, head: Head | None, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = stage_output(model, batch, None, count, loss_fn=token_mean_loss, train_fn=None, head=head)
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("chunk", [97, 97 * 5, 1 << 24])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("find", [False, True])
def test_loss_and_gradients_are_those_of_whole_logits(
    chunk: int, tied: bool, find: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    model, batch = llama(tie_word_embeddings=tied), batch_of(find=find)
    head = Head.of(model)
    assert head is not None
    loss, found = run(model, batch, head, 20)
    assert run(model, batch, head, 20)[0] == loss  # the model is known by now
    expected, wanted = run(model, batch, None, 20)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("find", [False, True])
def test_against_float64_with_a_bias(find: bool) -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(16, 50), torch.randn(2, 11, 16, requires_grad=True)
    labels = torch.randint(0, 50, (2, 11))
    labels[0, 3:6] = IGNORE
    batch = Batch(labels, labels)
    if find:
        batch.find_targets()
    Head(head).loss(hidden, batch, 7).backward()
    wide, exact = nn.Linear(16, 50).double(), hidden.detach().double().requires_grad_()
    wide.load_state_dict(head.state_dict())
    logits, targets = wide(exact)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    (F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") / 7).backward()
    for found, wanted in [(hidden, exact), (head.weight, wide.weight), (head.bias, wide.bias)]:
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-5, atol=1e-7)


def test_a_micro_batch_without_targets_and_a_frozen_head() -> None:
    model, batch = llama(), batch_of()
    batch.labels.fill_(IGNORE)
    batch.find_targets()
    loss, found = run(model, batch, Head(model.lm_head), 5)
    assert loss == 0
    assert not any(gradient.any() for gradient in found.values())
    model.lm_head.requires_grad_(False)
    batch = batch_of()
    loss, found = run(model, batch, Head(model.lm_head), 5)
    expected, wanted = run(model, batch, None, 5)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert "lm_head.weight" not in found
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def test_targets_that_are_taken_away_later_do_not_count() -> None:
    """A hook may mask labels after the places were noted."""
    model, batch = llama(), batch_of()
    batch.labels[0, 12:] = IGNORE
    loss, _ = run(model, batch, Head(model.lm_head), 20)
    expected, _ = run(model, batch, None, 20)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_below_float32_the_error_is_that_of_whole_logits() -> None:
    model, batch = llama(vocabulary=300), batch_of(vocabulary=300)
    exact, truth = run(model, batch, None, 20)
    with torch.autocast("cpu", torch.bfloat16):
        loss, found = run(model, batch, Head(model.lm_head), 20)
        coarse, wanted = run(model, batch, None, 20)
    assert abs(loss - exact) <= 2 * abs(coarse - exact) + 1e-3
    for name, gradient in truth.items():
        error, usual = ((one[name] - gradient).norm() / gradient.norm() for one in (found, wanted))
        assert error <= 1.5 * usual + 1e-3, name


def test_backward_may_be_taken_twice() -> None:
    model, batch = llama(), batch_of()
    loss = stage_output(model, batch, None, 20, loss_fn=token_mean_loss, train_fn=None, head=Head(model.lm_head))
    loss.backward(retain_graph=True)
    once = {name: value.clone() for name, value in gradients(model).items()}
    loss.backward()
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, 2 * once[name])


def test_a_model_that_does_more_with_its_logits_computes_them_itself() -> None:
    """Also with dropout: what the first forward drew is drawn again."""
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(Gemma2Config(vocab_size=97, head_dim=8, attention_dropout=0.5, **SIZES))
    watched = llama(attention_dropout=0.5)
    watched.lm_head.register_forward_hook(lambda module, inputs, output: None)
    for model in (capped, watched):
        head = Head.of(model)
        for _ in range(2):
            torch.manual_seed(1)
            expected, wanted = run(model, batch_of(), None, 20)
            torch.manual_seed(1)
            loss, found = run(model, batch_of(), head, 20)
            assert loss == expected
            assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())
    assert Head.of(nn.Linear(2, 2)) is None


def test_other_families_lose_nothing() -> None:
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(vocab_size=97, eos_token_id=1, bos_token_id=1, **SIZES))
    head = Head.of(model)
    loss, _ = run(model, batch_of(), head, 20)
    assert head is not None
    assert head.is_last
    torch.testing.assert_close(loss, run(model, batch_of(), None, 20)[0], rtol=1e-6, atol=0)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in output if isinstance(output, tuple | list) else (output,):
            if isinstance(value, Tensor):
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return output


def test_logits_take_a_quarter_of_the_memory() -> None:
    vocabulary = 32_000
    model, batch = llama(vocabulary), batch_of(vocabulary, rows=4, length=600)
    batch.labels[:] = batch.input_ids
    batch.find_targets()
    peaks = []
    for head in (None, Head.of(model)):
        with Largest() as largest:
            run(model, batch, head, 2396)
        peaks.append(largest.bytes)
    assert peaks[0] >= 4 * 600 * vocabulary * 4
    assert peaks[1] * 4 <= peaks[0]
