"""Answers that grow together: one forward pass gives the next token of every row.

transformers has continuous batching of its own (`transformers.generation.continuous_batching`). It runs on a CPU, but a
request there cannot have a seed (all rows draw from one global state, which it also seeds) nor the likeliest tokens
beside the chosen one, it switches the attention of the model that it is given, and its paged cache knows nothing of
virtual tokens that an adapter puts before the text. So here is a small one: rows stand right-aligned in one cache of
transformers, padded on the left as `generate` pads them, and rows join and leave between two passes.

Shapes: B rows, W columns, V tokens of the vocabulary, N virtual tokens, whose slots come before the columns.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from collie_core.errors import ModelError
from collie_core.model.stages import stage_cache


class Batch:
    """The keys, values and lengths of the rows.

    On several ranks that hold parts of a model each has its own, and all of them do the same.

    Args:
        model: a causal language model of transformers, or this rank's part of one; in evaluation mode when it is used.
        device: that the model computes on; None: where its parameters lie.

    Raises:
        ModelError: it remembers the past otherwise than by keys and values, so rows cannot be aligned.
    """

    def __init__(self, model: Any, device: torch.device | None = None) -> None:
        _require_keys_and_values(model)
        self._model = model
        self._device = device or next(model.parameters()).device
        self._first = getattr(getattr(model, "collie_virtual_tokens", None), "count", 0)
        stock = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's wrapper takes anything
        self._takes = {"position_ids", "logits_to_keep"} & set(inspect.signature(stock.forward).parameters)
        self.clear()

    def __len__(self) -> int:
        return len(self._mask)

    def clear(self) -> None:
        """Without any row."""
        self._cache: Any = None
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=self._device)  # [B, W]

    @torch.no_grad()  # and not inference_mode: what it leaves behind in a module could not be trained with
    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Add rows after the others; the logits after each prompt, [rows, V] in float32."""
        width = max(map(len, prompts))
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        ids = torch.tensor([[0] * (width - len(prompt)) + [*prompt] for prompt in prompts])
        cache, mask = _new_cache(self._model), mask.to(self._device)
        logits = self._forward(ids.to(self._device), mask, cache)
        if len(self):
            self._pad_to(width)
            mask = pad(mask, (self._mask.shape[1] - width, 0))
            cache = _joined(self._cache, cache, self._first)
            mask = torch.cat([self._mask, mask])
        self._cache, self._mask = cache, mask
        return logits

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append a token to each row; the logits after it, [B, V] in float32."""
        self._mask = pad(self._mask, (0, 1), value=1)
        ids = torch.tensor(tokens, device=self._device).unsqueeze(1)
        return self._forward(ids, self._mask, self._cache)

    @torch.no_grad()
    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows, and the columns that only they needed."""
        if not rows:
            self.clear()
            return
        index = torch.tensor(rows, device=self._device)
        self._mask = self._mask[index]
        empty = int((self._mask.sum(0) > 0).int().argmax())  # columns before the longest row
        self._mask = self._mask[:, empty:]
        for layer in _filled(self._cache):
            layer.batch_select_indices(index)
            for name in ("keys", "values") if empty else ():
                whole = getattr(layer, name)
                parts = [whole[:, :, : self._first], whole[:, :, self._first + empty :]]
                setattr(layer, name, torch.cat(parts, 2))

    def _pad_to(self, width: int) -> None:
        missing = width - self._mask.shape[1]
        if missing > 0:
            self._mask = pad(self._mask, (missing, 0))

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        options: dict[str, Any] = {}
        if "position_ids" in self._takes:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self._takes:
            options["logits_to_keep"] = 1
        output = self._model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
        last: Tensor = output.logits[:, -1].float()
        return last


def _new_cache(model: Any) -> Any:
    # Every layer keeps all positions, also where attention is limited to a window: so the rows stay aligned. The mask
    # limits what is seen.
    from transformers import DynamicCache

    cache = stage_cache(model, windows=False)
    return DynamicCache() if cache is None else cache


def _filled(cache: Any) -> list[Any]:
    """The layers with keys of their own; some models share those of an earlier layer."""
    return [layer for layer in cache.layers if layer.is_initialized]


def _joined(old: Any, new: Any, first: int) -> Any:
    """`old` with the rows of `new` below its own; the shorter one padded between virtual tokens and text."""
    for above, below in zip(_filled(old), _filled(new), strict=True):
        width = max(above.keys.shape[2], below.keys.shape[2])
        for name in ("keys", "values"):
            parts = [_widened(getattr(layer, name), width, first) for layer in (above, below)]
            setattr(above, name, torch.cat(parts))
    return old


def _widened(whole: Tensor, width: int, first: int) -> Tensor:
    """[B, heads, slots, D] with zeros after the first slots, `width` slots in all."""
    missing = width - whole.shape[2]
    if not missing:
        return whole
    return torch.cat([whole[:, :, :first], pad(whole[:, :, first:], (0, 0, missing, 0))], 2)


def _require_keys_and_values(model: Any) -> None:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise ModelError(f"a {type(model).__name__} cannot be served: it is no language model of transformers")
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    config = model.config.get_text_config()
    other = [type(layer).__name__ for layer in DynamicCache(config=config).layers if type(layer) not in known]
    if other or getattr(model.config, "is_encoder_decoder", False):
        what = f"it keeps {other[0]}" if other else "it has an encoder"
        raise ModelError(
            f"models of type {model.config.model_type} cannot be served: {what}, and rows of a batch could "
            "not be aligned; use `collie generate`"
        )
