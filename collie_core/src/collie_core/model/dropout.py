"""Dropout that is the same on every topology.

Which elements of a sample are dropped depends on the seed, on the sample's position in the run, on the module, and on
the place within the sample; not on the rank, the micro-batch, the row or the padding that the sample meets. So runs
with other parallel sizes, another cut into micro-batches or packing train the same model, and tensor-parallel ranks,
which must drop the same elements of a tensor that they all hold, do.

Shapes: B rows, L positions, H hidden size, A attention heads of this rank, D size of a head.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from collie_core.errors import ModelError
from collie_core.model.blocks import Positions
from collie_core.model.layers import RowParallel
from collie_core.model.sequence import sequence_parallel_layers

if TYPE_CHECKING:
    from collie_core.data.loader import Layout
    from collie_core.model.collectives import Shares
    from collie_core.topology import Axis, Topology

KERNEL = "collie_dropout"
"""The name of our attention function in transformers."""

ATTENTION_KEYS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")
"""What model configs call the probability that an attention weight is dropped."""

UNSUPPORTED = ("position_bias", "s_aux", "sinks")
"""Arguments of attention functions that change its result in ways that ours does not know."""


class DropoutState:
    """Which samples are being computed; the modules of a model share it, and copies of them do."""

    def __init__(self, axis: Axis, positions: Positions | None) -> None:
        self.axis = axis  # tensor-parallel
        self.positions = positions  # under sequence parallelism
        self._seed = 0
        self._layout: Layout | None = None
        self._generators: dict[torch.device, torch.Generator] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> DropoutState:
        return self

    @contextmanager
    def samples(self, seed: int, layout: Layout) -> Iterator[None]:
        """Inside, masks are those of the samples of a micro-batch; `layout` says which lie in each row.

        To be entered around its forward, and again around its backward for what gradient checkpointing computes
        anew. Outside, dropout is torch's own.
        """
        before = self._seed, self._layout
        self._seed, self._layout = seed, layout
        try:
            yield
        finally:
            self._seed, self._layout = before

    @property
    def active(self) -> bool:
        """Whether masks are those of samples."""
        return self._layout is not None

    def fits(self, rows: int, length: int) -> bool:
        """Whether tensors of so many rows and positions can be those of the samples."""
        layout = self._layout or ()
        return rows == len(layout) and all(sum(tokens for _, tokens in row) <= length for row in layout)

    def segments(self) -> Iterator[tuple[int, int, int, int]]:
        """(row, first position, position after the last, position of the sample in the run) of each sample."""
        for row, samples in enumerate(self._layout or ()):
            begin = 0
            for position, tokens in samples:
                yield row, begin, begin + tokens, position
                begin += tokens

    def draw(self, shape: tuple[int, ...], probability: float, device: torch.device, *place: int | str) -> Tensor:
        """True with `probability`, in a pattern that belongs to the seed and the place."""
        generator = self._generators.setdefault(device, torch.Generator(device))
        digest = hashlib.blake2b(repr((self._seed, *place)).encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(probability, generator=generator)


class SampleDropout(nn.Dropout):
    """Dropout of hidden states [B, L, ...], of which this rank may hold a share of the positions or features."""

    state: DropoutState
    name: str  # of the module in the model
    features: Shares | None  # of the last dimension, where that is cut

    def forward(self, input: Tensor) -> Tensor:
        """The input with elements dropped and the rest scaled; unchanged in evaluation."""
        if not self.training or not self.p or not self.state.active:
            return super().forward(input)
        positions = self._positions()
        length = input.shape[1] if positions is None else positions.whole
        if input.ndim != 3 or not self.state.fits(input.shape[0], length):
            return self._plain(input)
        return _drop(input, self._dropped(input, length, positions), self.p)

    def _positions(self) -> Shares | None:
        """The shares of the positions that may lie before us; None where every rank has all."""
        positions = self.state.positions
        return positions.shares if positions is not None and positions.in_layer else None

    def _dropped(self, input: Tensor, length: int, positions: Shares | None) -> Tensor:
        width = input.shape[2] if self.features is None else self.features.whole
        dropped = torch.zeros(input.shape[0], length, width, dtype=torch.bool, device=input.device)
        for row, begin, end, position in self.state.segments():
            dropped[row, begin:end] = self.state.draw((end - begin, width), self.p, input.device, position, self.name)
        if positions is not None and input.shape[1] != length:
            dropped = positions.take(dropped, 1)
        return dropped if self.features is None else self.features.take(dropped, 2)

    def _plain(self, input: Tensor) -> Tensor:
        """What is not laid out as the samples: torch's dropout, where ranks need not agree."""
        if self.state.axis.size > 1:
            raise ModelError(
                f"dropout in {self.name} of a tensor of shape {list(input.shape)}: tensor-parallel ranks agree only on "
                "[rows, positions, features] of the micro-batch; set its probability to 0 in model.config"
            )
        return super().forward(input)


def install(model: nn.Module, topology: Topology) -> DropoutState:
    """Make the dropout of a model, adapters included, that of its samples; in place. To be called when it is complete.

    Raises:
        ModelError: it drops attention weights in a kernel that has no place for our masks.
    """
    layers = sequence_parallel_layers(model)
    state = DropoutState(topology.tp, layers[0].positions if layers else None)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.__class__ = SampleDropout
            module.state, module.name, module.features = state, name, _features(model, name)  # type: ignore[assignment]
    _install_attention(model, state)
    return state


def _features(model: nn.Module, name: str) -> Shares | None:
    """How the features before a dropout are cut: an adapter's see the inputs of the module that it adapts."""
    path = name.split(".")
    for depth in (1, 2):  # lora_dropout, or its ModuleDict
        base = getattr(model.get_submodule(".".join(path[:-depth])), "base_layer", None)
        if isinstance(base, RowParallel) and not base.splits:
            return base.shares
    return None


def _drop(tensor: Tensor, dropped: Tensor, probability: float) -> Tensor:
    return (tensor / (1 - probability) if probability < 1 else tensor).masked_fill(dropped, 0.0)


# -- attention weights ----------------------------------------------------------------------------------------------


def _install_attention(model: Any, state: DropoutState) -> None:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    key = next((key for key in ATTENTION_KEYS if getattr(config, key, 0)), "")
    if not key:
        return
    kernel = config._attn_implementation
    if kernel not in ("sdpa", "eager", KERNEL) or not model._can_set_attn_implementation():
        raise ModelError(
            f"model.config.{key}={getattr(config, key)}: the {kernel} attention of {config.model_type} cannot drop the "
            f"same weights on every topology; set model.config.{key}=0, or model.attn_implementation=sdpa where the "
            "model has it"
        )
    AttentionInterface.register(KERNEL, attention)
    AttentionMaskInterface.register(KERNEL, sdpa_mask)
    model.set_attn_implementation(KERNEL)
    for name, module in model.named_modules():
        if hasattr(module, "is_causal") or "Attention" in type(module).__name__:
            module.collie_dropout = (state, name)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers that drops weights by sample, global head, query and key.

    `query` [B, A, L, D], `key` and `value` [B, key-value heads, L, D] -> [B, L, A, D]. Without dropout it is sdpa.
    """
    if not dropout and softcap is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **options
        )
    if unknown := [name for name in UNSUPPORTED if options.get(name) is not None]:
        raise ModelError(f"dropout of attention weights does not go with {unknown[0]}; set it to 0 in model.config")
    groups = query.shape[1] // key.shape[1]
    scores = query @ repeat_kv(key, groups).mT * (1 / math.sqrt(query.shape[-1]) if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = _drop_weights(module, scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout)
    return (weights @ repeat_kv(value, groups)).transpose(1, 2).contiguous(), None


def _drop_weights(module: nn.Module, weights: Tensor, probability: float) -> Tensor:
    """`weights` [B, A, queries, keys] with some dropped."""
    state, name = vars(module).get("collie_dropout", (None, ""))
    if not probability or state is None or not state.active:
        return F.dropout(weights, probability)
    rows, heads, queries, keys = weights.shape
    if queries != keys or not state.fits(rows, queries):
        raise ModelError(
            f"dropout of attention weights in {name}: {rows} rows of {queries} queries and {keys} keys are not those "
            "of the micro-batch; set the attention dropout to 0 in model.config"
        )
    first = _first_head(module, heads, state.axis)
    dropped = torch.zeros(weights.shape, dtype=torch.bool, device=weights.device)
    for row, begin, end, position in state.segments():
        for head in range(heads):
            shape = (end - begin, end - begin)
            drawn = state.draw(shape, probability, weights.device, position, name, first + head)
            dropped[row, head, begin:end, begin:end] = drawn
    return _drop(weights, dropped, probability)


def _first_head(module: nn.Module, heads: int, axis: Axis) -> int:
    """The number of this rank's first query head in the whole model."""
    whole: int = module.config.num_attention_heads  # type: ignore[union-attr, assignment]
    return 0 if heads == whole else axis.rank * math.ceil(whole / axis.size)
