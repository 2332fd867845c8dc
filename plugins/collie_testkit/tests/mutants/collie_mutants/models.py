"""Llamas, each with something wrong."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from collie_core.api import Component, StockFamily


@dataclass(frozen=True)
class DropsAKey(StockFamily):
    def write_config(self, config: Any, raw: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in super().write_config(config, raw).items() if key != "intermediate_size"}


@dataclass(frozen=True)
class OtherEpsilon(StockFamily):
    def make_config(self, raw: Mapping[str, Any]) -> Any:
        return super().make_config({**raw, "rms_norm_eps": 1e-2})


@dataclass(frozen=True)
class ForgetsTies(StockFamily):
    def make_config(self, raw: Mapping[str, Any]) -> Any:
        return super().make_config({**raw, "tie_word_embeddings": False})


@dataclass(frozen=True)
class HiddenDropout(StockFamily):
    def make_config(self, raw: Mapping[str, Any]) -> Any:
        return super().make_config({**raw, "attention_dropout": 0.5})


@dataclass(frozen=True)
class RewritesFiles(StockFamily):
    """What is in a file has a dtype, what a check makes up has none."""

    def write_config(self, config: Any, raw: Mapping[str, Any]) -> dict[str, Any]:
        written = super().write_config(config, raw)
        return written | {"max_position_embeddings": 128} if "torch_dtype" in raw else written


@dataclass(frozen=True)
class FourIsTooMany(StockFamily):
    """On four ranks and no fewer it is another model."""

    def make_config(self, raw: Mapping[str, Any]) -> Any:
        four = {"rms_norm_eps": 1e-2} if os.environ.get("WORLD_SIZE") == "4" else {}
        return super().make_config({**raw, **four})


@dataclass(frozen=True)
class TakesAnySize(StockFamily):
    """Where ranks cannot share its 32 heads it has 24, which fit the same weights and mean something else."""

    def make_config(self, raw: Mapping[str, Any]) -> Any:
        uneven = 32 % int(os.environ.get("WORLD_SIZE", "1"))
        other = {"num_attention_heads": 24, "num_key_value_heads": 24, "head_dim": 8} if uneven else {}
        return super().make_config({**raw, **other})


_DROPS_A_KEY = DropsAKey("drops-a-key", stock_type="llama")
_OTHER_EPSILON = OtherEpsilon("other-epsilon", stock_type="llama")
_FORGETS_TIES = ForgetsTies("forgets-ties", stock_type="llama")
_HIDDEN_DROPOUT = HiddenDropout("hidden-dropout", stock_type="llama")
_REWRITES_FILES = RewritesFiles("rewrites-files", stock_type="llama")
_FOUR_IS_TOO_MANY = FourIsTooMany("four-is-too-many", stock_type="llama")
_TAKES_ANY_SIZE = TakesAnySize("takes-any-size", stock_type="llama")
_CUT_WRONGLY = StockFamily("cut-wrongly", stock_type="llama", tensor_plan={"model.layers.*.mlp.up_proj": "rowwise"})
_STUBBED_WRONGLY = StockFamily("stubbed-wrongly", stock_type="llama", later_stages={"variance_epsilon": 0.1})

DROPS_A_KEY = Component("collie_mutants.models:_DROPS_A_KEY")
OTHER_EPSILON = Component("collie_mutants.models:_OTHER_EPSILON")
FORGETS_TIES = Component("collie_mutants.models:_FORGETS_TIES")
HIDDEN_DROPOUT = Component("collie_mutants.models:_HIDDEN_DROPOUT")
REWRITES_FILES = Component("collie_mutants.models:_REWRITES_FILES")
FOUR_IS_TOO_MANY = Component("collie_mutants.models:_FOUR_IS_TOO_MANY")
TAKES_ANY_SIZE = Component("collie_mutants.models:_TAKES_ANY_SIZE")
CUT_WRONGLY = Component("collie_mutants.models:_CUT_WRONGLY")
STUBBED_WRONGLY = Component("collie_mutants.models:_STUBBED_WRONGLY")
