"""The tokenizer: of the model's folder, of another one, or the built-in one that needs no file."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from collie_core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from collie_core.config.model import ModelConfig
    from collie_core.config.tokenizer import TokenizerConfig

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer(section: TokenizerConfig, model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that the config names.

    Raises:
        ModelError: there is none in the folder or at the hub, or it cannot say where a token lies in the text.
    """
    if section.type == "byte":
        return byte_tokenizer()
    name = section.name_or_path or model.model_name_or_path
    if name is None:
        raise ModelError(
            "a model from random weights brings no tokenizer; set tokenizer.name_or_path to a folder or hub id, "
            "or tokenizer.type to byte"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"no tokenizer in {name}: {str(error).strip().splitlines()[0]}") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of {name} ({type(tokenizer).__name__}) does not tell where its tokens lie in the text, "
            "which marking the targets needs; convert it to a tokenizer.json"
        )
    return cast("PreTrainedTokenizerBase", tokenizer)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token per UTF-8 byte, id = byte; then end of text (256) and padding (257). Chats as ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(vocab=_byte_symbols(), merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def _byte_symbols() -> dict[str, int]:
    """The printable character that byte-level tokenizers write for each byte (as GPT-2's does)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {chr(byte): byte for byte in printable}
    return symbols | {chr(256 + index): byte for index, byte in enumerate(others)}


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to fill rows with. Which one does not matter: padding is never a target and never attended to."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0
