"""The tokenizer: of the model's folder, of another one, or the built-in one that needs no file."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from collie_core import storage
from collie_core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from collie_core.config.model import ModelConfig
    from collie_core.config.tokenizer import TokenizerConfig

# ChatML, but a turn ends with the tokenizer's own end of text: the token at which generation stops.
CHATML = (
    "{% set end = eos_token if eos_token else '<|im_end|>' %}"
    "{% if tools %}{{ '<|im_start|>system\\nTools:\\n' }}"
    "{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}{{ end + '\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + (message.content or '') }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<tool_call>\\n' + (call.function or call) | tojson + '\\n</tool_call>' }}{% endfor %}"
    "{{ end + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer(section: TokenizerConfig, model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that the config names.

    Raises:
        ModelError: there is none in the folder or at the hub, or it does not tell where its tokens lie.
    """
    if section.type == "byte":
        return byte_tokenizer()
    name = section.name_or_path or model.model_name_or_path
    if name is None:
        raise ModelError(
            "a model from random weights brings no tokenizer; set tokenizer.name_or_path to a folder or hub "
            "id, or tokenizer.type to byte"
        )
    folder = storage.local_folder(name)
    try:
        tokenizer = _tokenizer_class(folder).from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # (a torn tokenizer.json raises a bare Exception)
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"cannot load a tokenizer from {name}: {reason}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes up an empty one without files
        raise ModelError(f"{name} holds no tokenizer; set tokenizer.name_or_path, or tokenizer.type to byte")
    require_fast(tokenizer, name)
    return cast("PreTrainedTokenizerBase", tokenizer)


def _tokenizer_class(name: str) -> Any:
    """The class of the files: for some model types `AutoTokenizer` takes another, which adds tokens of its own."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    written = get_tokenizer_config(name).get("tokenizer_class")
    return PreTrainedTokenizerFast if written in ("TokenizersBackend", "PreTrainedTokenizerFast") else AutoTokenizer


def require_fast(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer that cannot tell which characters a token stands for.

    Raises:
        ModelError: it is written in Python, without character offsets.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of {name} ({type(tokenizer).__name__}) does not tell which characters its tokens "
            "stand for, so targets cannot be marked; convert it to a tokenizer.json"
        )


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token per UTF-8 byte, id = byte; then <eos> 256, <pad> 257, <|im_start|> 258. Chats as ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(vocab=_byte_symbols(), merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return cast("PreTrainedTokenizerBase", tokenizer)


def _byte_symbols() -> dict[str, int]:
    """The printable character that byte-level tokenizers write for each byte (as GPT-2's does)."""
    ranges = ("!", "~"), ("¡", "¬"), ("®", "ÿ")
    printable = [byte for first, last in ranges for byte in range(ord(first), ord(last) + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {chr(byte): byte for byte in printable}
    return symbols | {chr(256 + index): byte for index, byte in enumerate(others)}


class TokenizerFiles:
    """The files of a tokenizer, made once: to write a large vocabulary can take as long as a step of training."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._files: dict[Path, bytes] = {}

    def save_pretrained(self, folder: Path) -> None:
        """Write them."""
        if not self._files:
            with TemporaryDirectory() as scratch:
                self._tokenizer.save_pretrained(scratch)
                found = [path for path in Path(scratch).rglob("*") if path.is_file()]
                self._files = {path.relative_to(scratch): path.read_bytes() for path in found}
        for path, content in self._files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to fill rows with. Which one is all the same: padding is never a target and never attended to."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    return 0
