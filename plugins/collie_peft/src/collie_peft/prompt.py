"""Prompt tuning, p-tuning and prefix tuning, with peft's encoders, on every part of a model.

peft's own model for them looks for the embedding by its size and calls the whole model, which a part of one is not; so
the virtual tokens are put in by the core, and the encoders, configurations and files are peft's. A file has what the
encoder gives (`prompt_embeddings`), as peft writes it. peft drops the encoder; we keep it beside, to go on from.

The first token of a sample is never a target, here as without virtual tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import peft
import torch
from peft.utils import _prepare_prompt_learning_config
from safetensors.torch import save_file
from torch import Tensor, nn

from collie_core.api import AdapterConfig, ModelError, put_virtual_tokens
from collie_peft.files import WEIGHTS, read_config, read_tensors, write_config

ENCODER = "collie_prompt_encoder.safetensors"
"""The weights of the encoder, where it is more than what it gives."""
KEY = "prompt_embeddings"  # in peft's file
NAME = "collie_prompt.encoder."  # before the names of an encoder's parameters in a model


class Prompt(nn.Module):
    """Gives the virtual tokens [N, width] of one of peft's encoders."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self) -> Tensor:
        """Of all virtual tokens; no sample has others."""
        table = cast(nn.Embedding, self.encoder.embedding)
        if len(list(self.encoder.children())) == 1:  # nothing behind the table
            return table.weight
        return cast(Tensor, self.encoder(torch.arange(table.num_embeddings, device=table.weight.device)[None])[0])


class PromptAdapter:
    """Puts virtual tokens before the embeddings."""

    config_class: ClassVar[type[Any]]  # of peft
    form: ClassVar[Any] = "embeddings"

    def attach(self, model: Any, config: AdapterConfig) -> nn.Module:
        """Put a new encoder on the model and freeze the rest.

        Raises:
            ModelError: peft refuses the options, or there is no tokenizer for the text.
        """
        options = config.model_dump(exclude={*config.for_the_core})
        if options.get("prompt_tuning_init") == "TEXT":
            options["tokenizer_name_or_path"] = options["tokenizer_name_or_path"] or str(model.config.name_or_path)
        try:
            return self._put_on(model, self.config_class(task_type=peft.TaskType.CAUSAL_LM, **options))
        except (ValueError, OSError) as error:
            raise ModelError(f"adapter: {str(error).strip().splitlines()[0]}") from error

    def load(self, model: nn.Module, path: Path) -> nn.Module:
        """Put on an encoder like the saved one; where peft kept none, the virtual tokens alone.

        Raises:
            ModelError: its configuration cannot be read.
        """
        config = read_config(path, self.config_class)
        config.inference_mode = not (path / ENCODER).is_file()  # for peft: a table and nothing behind it
        return self._put_on(model, config)

    def save(self, model: Any, path: Path, state: Mapping[str, Tensor]) -> None:
        """Write adapter_model.safetensors and adapter_config.json, for `PeftModel.from_pretrained`."""
        config = model.collie_peft_config
        values = {name.removeprefix(NAME): value for name, value in state.items()}
        prompt = Prompt(self._encoder(model, config, words=None))
        prompt.encoder.load_state_dict(values)
        with torch.no_grad():
            save_file({KEY: prompt().contiguous().clone()}, path / WEIGHTS, metadata={"format": "pt"})
        if len(values) > 1:
            save_file(values, path / ENCODER)
        write_config(model, config, path)

    def state(self, path: Path) -> Mapping[str, Tensor]:
        """The saved values.

        Raises:
            ModelError: they cannot be read.
        """
        if (path / ENCODER).is_file():
            return {NAME + name: value for name, value in read_tensors(path / ENCODER).items()}
        tensors = read_tensors(path / WEIGHTS)
        return {NAME + "embedding.weight" if name == KEY else name: value for name, value in tensors.items()}

    def _put_on(self, model: Any, config: Any) -> nn.Module:
        config = _prepare_prompt_learning_config(config, model.config)
        config.num_transformer_submodules = 1
        model.requires_grad_(False)
        encoder = self._encoder(model, config, words=model.get_input_embeddings())
        put_virtual_tokens(model, Prompt(encoder), config.num_virtual_tokens, self.form)
        model.collie_peft_config = config
        return cast(nn.Module, model)

    def _encoder(self, model: Any, config: Any, words: nn.Module | None) -> nn.Module:
        """A new encoder of peft; `words`: the embedding to start from, None: it will be filled."""
        raise NotImplementedError


class PromptTuningAdapter(PromptAdapter):
    """A table of embeddings."""

    config_class: ClassVar = peft.PromptTuningConfig

    def _encoder(self, model: Any, config: Any, words: nn.Module | None) -> nn.Module:
        if words is None:
            return SimpleTable(config.num_virtual_tokens, config.token_dim)
        return cast(nn.Module, peft.PromptEmbedding(config, _Words(words, model.config.get_text_config().vocab_size)))


class PTuningAdapter(PromptAdapter):
    """A table behind which stands a network."""

    config_class: ClassVar = peft.PromptEncoderConfig

    def _encoder(self, model: Any, config: Any, words: nn.Module | None) -> nn.Module:
        if config.inference_mode:
            return SimpleTable(config.num_virtual_tokens, config.token_dim)
        return cast(nn.Module, peft.PromptEncoder(config))


class PrefixTuningAdapter(PromptAdapter):
    """Keys and values of all layers, or a table behind which stands a network that makes them."""

    config_class: ClassVar = peft.PrefixTuningConfig
    form: ClassVar = "keys"

    def _encoder(self, model: Any, config: Any, words: nn.Module | None) -> nn.Module:
        return cast(nn.Module, peft.PrefixEncoder(config))


class SimpleTable(nn.Module):
    """What an encoder is when nothing stands behind its table."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, width)


class _Words(SimpleNamespace):
    """The embedding as peft's `PromptEmbedding` asks it, with the whole vocabulary where ranks share it."""

    def __init__(self, words: nn.Module, vocab_size: int) -> None:
        super().__init__(num_embeddings=vocab_size, weight=getattr(words, "weight", torch.empty(0)), words=words)

    def parameters(self) -> Any:
        return self.words.parameters()

    def __call__(self, ids: Tensor) -> Tensor:
        return cast(Tensor, self.words(ids))
