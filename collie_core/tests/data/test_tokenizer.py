"""Where a tokenizer comes from, and what the built-in one promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from collie_core.config.model import ModelConfig
from collie_core.config.tokenizer import TokenizerConfig
from collie_core.data.tokenizer import build_tokenizer, byte_tokenizer, padding_id
from collie_core.errors import ModelError

BYTES = byte_tokenizer()
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def small_tokenizer(**options: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "</s>": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, **options)


@given(st.text())
def test_bytes_give_any_text_back(text: str) -> None:
    ids = BYTES(text)["input_ids"]
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


@pytest.mark.parametrize("text", ["", " a  b ", "\n\r\n\t", "😀👩‍👩‍👧", "é", "中文", "\x00\x7f", "don 't , stop ."])
def test_bytes_give_awkward_texts_back(text: str) -> None:
    assert BYTES.decode(BYTES(text)["input_ids"]) == text


def test_the_byte_tokenizer_can_be_saved_and_loaded(tmp_path: Path) -> None:
    BYTES.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(BYTES) == 259
    assert (loaded.eos_token_id, loaded.pad_token_id) == (BYTES.eos_token_id, BYTES.pad_token_id) == (256, 257)
    text = " naïve 😀\n"
    assert loaded(text)["input_ids"] == list(text.encode())
    assert loaded.decode(loaded(text)["input_ids"]) == text
    render = {"tokenize": False}
    assert loaded.apply_chat_template(CHAT, **render) == BYTES.apply_chat_template(CHAT, **render)


def test_the_byte_tokenizer_chats() -> None:
    text = BYTES.apply_chat_template(CHAT, tokenize=False)
    assert text == "<|im_start|>user\nhi<eos>\n<|im_start|>assistant\nho<eos>\n"
    prompt = BYTES.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert prompt.endswith("<|im_start|>assistant\n")
    assert BYTES(text, add_special_tokens=False)["input_ids"].count(BYTES.eos_token_id) == 2


def test_a_tokenizer_comes_from_the_named_folder_or_the_models(tmp_path: Path) -> None:
    small_tokenizer(eos_token="</s>").save_pretrained(tmp_path)
    model = ModelConfig(model_name_or_path=str(tmp_path))
    for section in (TokenizerConfig(), TokenizerConfig(name_or_path=str(tmp_path))):
        assert build_tokenizer(section, model).get_vocab() == {"[UNK]": 0, "a": 1, "</s>": 2}
    assert len(build_tokenizer(TokenizerConfig(type="byte"), model)) == 259


def test_random_weights_bring_no_tokenizer() -> None:
    with pytest.raises(ModelError, match=r"set tokenizer\.name_or_path to a folder or hub id, or tokenizer\.type to"):
        build_tokenizer(TokenizerConfig(), ModelConfig(config={"model_type": "llama"}))


@pytest.mark.parametrize("files", [{}, {"tokenizer.json": "{"}, {"config.json": json.dumps({"model_type": "llama"})}])
def test_a_folder_without_a_tokenizer_is_one_sentence(tmp_path: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=rf"{tmp_path}[^\n]*$"):
        build_tokenizer(TokenizerConfig(), ModelConfig(model_name_or_path=str(tmp_path)))


def test_padding_needs_no_new_token() -> None:
    assert padding_id(BYTES) == 257
    without = small_tokenizer(eos_token="</s>")
    assert without.pad_token_id is None
    assert padding_id(without) == without.eos_token_id == 2
    assert without.pad_token_id is None
    assert padding_id(small_tokenizer()) == 0


def test_a_folder_has_the_tokens_that_its_files_say_whatever_the_model_type(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')  # AutoTokenizer would add <|endoftext|>
    tokenizer = build_tokenizer(TokenizerConfig(), ModelConfig(model_name_or_path=str(tmp_path)))
    assert len(tokenizer) == len(byte_tokenizer())
