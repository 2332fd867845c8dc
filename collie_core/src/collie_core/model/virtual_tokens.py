"""Virtual tokens: learned positions that stand before the tokens of every sample.

Either as embeddings before those of the tokens (prompt tuning, arXiv 2104.08691; p-tuning, 2103.10385), whose outputs
are dropped before the head, or as keys and values before those of every layer (prefix tuning, arXiv 2101.00190). A
module gives them; what it takes to have them on every stage and every tensor-parallel rank is here. The module belongs
to the first stage, and later ones borrow what it gives.

Shapes: B rows, L positions, N virtual tokens, H hidden size, D size of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from collie_core.errors import ModelError
from collie_core.model.collectives import Shares, copy_to
from collie_core.model.layers import ColumnParallel
from collie_core.model.part import part_of
from collie_core.model.stages import Loan, is_filled, stage_cache, stage_of

if TYPE_CHECKING:
    from collie_core.data.loader import Layout
    from collie_core.topology import Axis

PROMPT = "collie_prompt"
"""The module of the virtual tokens on a model."""

Form = Literal["embeddings", "keys"]


def put_virtual_tokens(model: Any, prompt: nn.Module, count: int, form: Form) -> None:
    """Let `count` virtual tokens stand before the tokens of every sample, in place; generation included.

    Args:
        model: a transformers model for causal language modelling, or this rank's part of one.
        prompt: `prompt()` gives them, "embeddings": [N, H]; "keys": [N, 2 x layers x key-value heads x D], a layer's
            keys before its values. It becomes the module `collie_prompt` of the model, or of its first stage.
        count: N.
        form: what they are.

    Raises:
        ModelError: tensor-parallel ranks share the keys in a way that is not known here.
    """
    stage, part = stage_of(model), part_of(model)
    if stage is None or stage.is_first:
        setattr(model, PROMPT, prompt)
    tokens = _VirtualTokens(model, count, form, part.topology.tp if part is not None else None)
    if stage is not None:
        if form == "embeddings":
            stage.virtual_tokens = count
        else:
            shape = (count, tokens.whole_width)
            stage.loans.append(Loan(tokens.own, shape, tuple(range(1, stage.axis.size)), tokens.borrow))
    model.base_model.register_forward_pre_hook(tokens.before, with_kwargs=True)
    model.base_model.register_forward_hook(tokens.after)
    model.collie_virtual_tokens = VirtualTokens(count, form)


@dataclass(frozen=True)
class VirtualTokens:
    """What stands on a model as `collie_virtual_tokens`."""

    count: int
    form: Form

    @property
    def positions(self) -> int:
        """How much longer the rows are in every layer."""
        return self.count if self.form == "embeddings" else 0

    def lengthened(self, layout: Layout) -> Layout:
        """Where the samples of a micro-batch lie in a layer; they are not packed."""
        if not self.positions:
            return layout
        return tuple(tuple((place, tokens + self.positions) for place, tokens in row) for row in layout)


def virtual_tokens_of(model: nn.Module) -> VirtualTokens:
    """Those before the tokens of a model."""
    found = getattr(model, "collie_virtual_tokens", None)
    return found if isinstance(found, VirtualTokens) else VirtualTokens(0, "keys")


class _VirtualTokens:
    """The hooks of a base model."""

    def __init__(self, model: Any, count: int, form: Form, axis: Axis | None) -> None:
        self.model = model
        self.count = count
        self.form = form
        self.axis = axis
        self._borrowed: Tensor | None = None
        self._drop = 0  # outputs of the forward that is running
        self._keep_cache = True

    def own(self) -> Tensor:
        """On the first stage: what the prompt gives."""
        return cast(Tensor, getattr(self.model, PROMPT)())

    def borrow(self, value: Tensor) -> None:
        """On a later stage: the same, a leaf."""
        self._borrowed = value

    def before(self, base: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The arguments of the base model with the virtual tokens in them."""
        cache = options.get("past_key_values")
        new = not is_filled(cache)
        self._keep_cache = cache is not None or options.get("use_cache") is not False
        stage = stage_of(self.model)
        mask, positions = options.get("attention_mask"), options.get("position_ids")
        if mask is not None:
            options["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], self.count), mask], 1)
        if positions is not None:
            options["position_ids"] = self._positions(positions, first=new and self.form == "embeddings")
        if new and self.form == "keys":
            options["past_key_values"] = self._fill(options, cache)
        elif new and (stage is None or stage.is_first):
            options |= {"input_ids": None, "inputs_embeds": self._embeddings(options)}
        last = stage is None or stage.is_last
        self._drop = self.count if new and last and self.form == "embeddings" else 0
        return inputs, options

    def after(self, base: nn.Module, inputs: Any, output: Any) -> Any:
        """Without the outputs of the virtual tokens, which nobody predicts from; stages pass them on."""
        if self._drop:
            output.last_hidden_state = output.last_hidden_state[:, self._drop :]
        if not self._keep_cache:  # it was there for the keys alone, and nobody asked for it
            output.past_key_values = None
        return output

    def _positions(self, positions: Tensor, *, first: bool) -> Tensor:
        own = torch.arange(self.count, device=positions.device).expand(positions.shape[0], -1)
        return torch.cat([own, positions + self.count], 1) if first else positions + self.count

    def _embeddings(self, options: dict[str, Any]) -> Tensor:
        """[B, N + L, H]"""
        embeddings = options.get("inputs_embeds")
        if embeddings is None:
            embeddings = self.model.get_input_embeddings()(options["input_ids"])
        prompt = self.own().to(embeddings.dtype)
        return torch.cat([prompt.expand(embeddings.shape[0], -1, -1), embeddings], 1)

    def _fill(self, options: dict[str, Any], cache: Any) -> Any:
        """The cache, or a new one, with keys and values of the layers that this rank has."""
        from transformers import DynamicCache

        stage = stage_of(self.model)
        if cache is None:
            cache = stage_cache(self.model) if stage is not None else DynamicCache(config=self._config)
        given = options.get("input_ids") if options.get("inputs_embeds") is None else options["inputs_embeds"]
        assert given is not None
        value = self.own() if stage is None or stage.is_first else self._borrowed
        assert value is not None, "borrowed nothing: `lend` comes first"
        heads = self._heads(value, given.shape[0])
        for layer in range(self._config.num_hidden_layers) if stage is None else stage.owned:
            cache.update(heads[2 * layer], heads[2 * layer + 1], layer)
        return cache

    def _heads(self, value: Tensor, rows: int) -> Tensor:
        """[2 x layers, B, this rank's key-value heads, N, D]"""
        config = self._config
        sizes = (self.count, 2 * config.num_hidden_layers, self._key_heads, -1)
        whole = value.to(self.model.dtype).view(sizes)
        if self.axis is not None and self.axis.size > 1:
            whole = self._own_heads(copy_to(whole, self.axis))
        return whole.permute(1, 2, 0, 3).unsqueeze(1).expand(-1, rows, -1, -1, -1)

    def _own_heads(self, whole: Tensor) -> Tensor:
        """Of [N, 2 x layers, heads, D] the heads whose keys this rank computes."""
        size = whole.shape[-1]
        shares = self._key_shares()
        numbers = [head for begin, end in shares.mine for head in range(begin // size, end // size)]
        return whole[:, :, numbers]

    def _key_shares(self) -> Shares:
        for name, module in self.model.named_modules():
            if name.endswith("k_proj") and isinstance(module, ColumnParallel):
                return module.shares
        raise ModelError(
            f"prefix tuning of {self._config.model_type} with parallel.tensor_parallel_size above 1 is not supported: "
            "it has no k_proj whose heads the ranks share; set tensor_parallel_size to 1"
        )

    @property
    def _config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def _key_heads(self) -> int:
        return int(getattr(self._config, "num_key_value_heads", None) or self._config.num_attention_heads)

    @property
    def whole_width(self) -> int:
        """Numbers of keys and values of one virtual token."""
        size = getattr(self._config, "head_dim", None) or self._config.hidden_size // self._config.num_attention_heads
        return int(2 * self._config.num_hidden_layers * self._key_heads * size)
