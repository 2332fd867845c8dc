"""From rows to tokens and targets, with tokenizers of different kinds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertTokenizerLegacy, PreTrainedTokenizerFast

from collie_core.config.data import DataConfig
from collie_core.data.formats import DataStats, Encoder, Sample, detect_format
from collie_core.data.sources import Row
from collie_core.data.tokenizer import byte_tokenizer
from collie_core.errors import DataError, ModelError

TEXTS = ["the cat sat on the mat", "a cat, a mat: the end.\n", "on the mat sat the cat"]


def llama_like() -> PreTrainedTokenizerFast:
    """Merges, a space mark in front, BOS by the tokenizer, bytes for the unknown; no padding, no template."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=330, special_tokens=special[:3]))
    vocabulary = json.loads(core.to_str())
    bytes_too = {symbol: len(vocabulary["model"]["vocab"]) + place for place, symbol in enumerate(special[3:])}
    vocabulary["model"]["vocab"].update(bytes_too)
    core = Tokenizer.from_str(json.dumps(vocabulary))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def gpt_like() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", clean_up_tokenization_spaces=False)


BYTES, LLAMA, GPT = byte_tokenizer(), llama_like(), gpt_like()
TOKENIZERS = pytest.mark.parametrize("tokenizer", [BYTES, LLAMA, GPT], ids=["bytes", "llama", "gpt"])


def encode(
    rows: Sequence[dict[str, Any]], tokenizer: Any = BYTES, vocab_size: int = 1000, **options: Any
) -> tuple[list[Sample], DataStats]:
    encoder = Encoder(tokenizer, DataConfig(**options), vocab_size)
    numbered = [Row(f"t.jsonl:{number}", row) for number, row in enumerate(rows, 1)]
    stats = DataStats()
    return list(encoder.encode(numbered, detect_format(numbered[0]), stats)), stats


def encode_one(row: dict[str, Any], tokenizer: Any = BYTES, **options: Any) -> Sample:
    samples, _ = encode([row], tokenizer, **options)
    (sample,) = samples
    return sample


def text_of(sample: Sample, tokenizer: Any = BYTES) -> str:
    return str(tokenizer.decode(sample.input_ids, skip_special_tokens=True))


def targets_of(sample: Sample, tokenizer: Any = BYTES) -> str:
    """The targets as text, with | where tokens lie between them."""
    pieces: list[list[int]] = [[]]
    for label in sample.labels:
        if label != -100:
            pieces[-1].append(label)
        elif pieces[-1]:
            pieces.append([])
    return "|".join(tokenizer.decode(piece) for piece in pieces if piece)


def assert_well_formed(sample: Sample) -> None:
    assert len(sample.input_ids) == len(sample.labels) > 0
    assert sample.labels[0] == -100
    assert all(label in (-100, token) for token, label in zip(sample.input_ids, sample.labels, strict=True))


# -- text and completion ------------------------------------------------------------------------------------


@TOKENIZERS
def test_all_of_a_text_is_learned_and_then_its_end(tokenizer: Any) -> None:
    sample = encode_one({"text": "the cat 😀\n"}, tokenizer)
    assert_well_formed(sample)
    assert text_of(sample, tokenizer) == "the cat 😀\n"
    assert sample.labels[1:] == sample.input_ids[1:]
    assert sample.input_ids[-1] == tokenizer.eos_token_id


@TOKENIZERS
@settings(deadline=None, max_examples=60)
@given(
    st.text(st.sampled_from("thecat son,:é😀\n"), max_size=12),
    st.text(st.sampled_from("thecat son.中\n"), min_size=1),
)
def test_a_completion_is_learned_to_the_character(tokenizer: Any, prompt: str, answer: str) -> None:
    sample = encode_one({"input": prompt, "output": answer}, tokenizer, max_length=4096)
    assert_well_formed(sample)
    assert text_of(sample, tokenizer) == prompt + answer
    begin = next(index for index, label in enumerate(sample.labels) if label != -100)
    learned = sample.labels[begin:]
    assert learned == sample.input_ids[begin:]  # one run, to the end
    assert learned[-1] == tokenizer.eos_token_id
    # What goes before is of the prompt alone, and the first token learned reaches into the answer.
    before = tokenizer.decode(sample.input_ids[:begin], skip_special_tokens=True)
    assert begin == 1 or prompt.startswith(before.rstrip("\ufffd"))
    with_first = tokenizer.decode(sample.input_ids[: begin + 1], skip_special_tokens=True)
    assert not prompt or len(with_first) > len(prompt)


def test_a_token_over_the_border_belongs_to_the_answer() -> None:
    whole = GPT("the cat")["input_ids"]
    (place,) = [index for index, token in enumerate(whole) if GPT.decode([token]) == " cat"]
    sample = encode_one({"input": "the c", "output": "at"}, GPT)
    assert sample.input_ids == [*whole, GPT.eos_token_id]
    assert [label != -100 for label in sample.labels].index(True) == place


def test_no_space_appears_between_prompt_and_answer() -> None:
    sample = encode_one({"input": "the ", "output": "cat"}, LLAMA)
    assert text_of(sample, LLAMA) == "the cat"
    assert sample.input_ids[:1] == [LLAMA.bos_token_id]
    assert sample.input_ids[1:-1] == LLAMA("the cat")["input_ids"][1:]


def test_the_prompt_is_learned_too_when_all_is() -> None:
    sample = encode_one({"input": "ab", "output": "cd"}, train_on="all")
    assert targets_of(sample) == "bcd<eos>"


def test_prompt_and_completion_are_other_names() -> None:
    assert targets_of(encode_one({"prompt": "ab", "completion": "cd"})) == "cd<eos>"


def test_an_empty_answer_teaches_to_end() -> None:
    assert targets_of(encode_one({"input": "ab", "output": ""})) == "<eos>"


def test_a_text_that_the_tokenizer_ends_gets_no_second_end() -> None:
    tokenizer = llama_like()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    sample = encode_one({"input": "the", "output": " cat"}, tokenizer)
    assert sample.input_ids.count(2) == 1
    assert sample.labels[-1] == 2


def test_a_tokenizer_without_an_end_adds_none() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=GPT.backend_tokenizer)
    assert encode_one({"text": "the cat"}, tokenizer).input_ids == tokenizer("the cat")["input_ids"]


# -- conversations ------------------------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ciao"},
]
TAGGED = (
    "{% for message in messages %}[{{ message.role }}] {% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }};{% endgeneration %}"
    "{% else %}{{ message.content }};{% endif %}{% endfor %}"
)
UNSTABLE = "{% for message in messages %}{% if loop.last %}LAST {% endif %}{{ message.content }};{% endfor %}"


def test_every_turn_of_the_assistant_is_learned() -> None:
    sample = encode_one({"messages": CHAT})
    assert_well_formed(sample)
    assert targets_of(sample) == "hello<eos>\n|ciao<eos>\n"
    assert text_of(sample) == BYTES.decode(
        BYTES(BYTES.apply_chat_template(CHAT, tokenize=False), add_special_tokens=False)["input_ids"],
        skip_special_tokens=True,
    )


@pytest.mark.parametrize(
    ("train_on", "targets"),
    [("assistant", "hello<eos>\n|ciao<eos>\n"), ("completion", "ciao<eos>\n")],
)
def test_train_on_chooses_the_turns(train_on: str, targets: str) -> None:
    assert targets_of(encode_one({"messages": CHAT}, train_on=train_on)) == targets


def test_all_of_a_conversation_can_be_learned() -> None:
    sample = encode_one({"messages": CHAT}, train_on="all", chat_template=UNSTABLE)
    assert sample.labels[1:] == sample.input_ids[1:]


@TOKENIZERS
def test_marks_of_the_template_are_used(tokenizer: Any) -> None:
    sample = encode_one({"messages": CHAT}, tokenizer, chat_template=TAGGED)
    assert text_of(sample, tokenizer).startswith("[system] Be kind.;[user] hi;[assistant] hello;")
    assert targets_of(sample, tokenizer).replace(" ", "") == "hello;|ciao;"


@TOKENIZERS
def test_turns_are_found_without_marks(tokenizer: Any) -> None:
    sample = encode_one({"messages": CHAT}, tokenizer, chat_template="chatml")
    end = tokenizer.eos_token
    # (A llama tokenizer puts a space mark behind each special token.)
    assert targets_of(sample, tokenizer).replace(" ", "") == f"hello{end}\n|ciao{end}\n"


def test_a_template_that_changes_earlier_turns_is_refused() -> None:
    with pytest.raises(DataError, match=r"t\.jsonl:1: the chat template writes message 3 otherwise once others follow"):
        encode_one({"messages": CHAT}, chat_template=UNSTABLE)


def test_sharegpt_is_a_conversation() -> None:
    turns = [
        {"from": "human", "value": "hi"},
        {"from": "function_call", "value": "{}"},
        {"from": "observation", "value": "7"},
        {"from": "gpt", "value": "seven"},
    ]
    sample = encode_one({"conversations": turns, "system": "Be kind."})
    assert targets_of(sample) == "{}<eos>\n|seven<eos>\n"
    assert text_of(sample).startswith("system\nBe kind.\nuser\nhi\n")
    assert "\ntool\n7\n" in text_of(sample)


@pytest.mark.parametrize("wrap", [json.dumps, list], ids=["text", "list"])
def test_tools_reach_the_template(wrap: Any) -> None:
    tools = wrap([{"name": "add", "parameters": {}}])
    sample = encode_one({"messages": CHAT, "tools": tools})
    assert '{"type": "function", "function": {"name": "add", "parameters": {}}}' in text_of(sample)


def test_calls_without_content_are_rendered() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [CHAT[1], {"role": "assistant", "content": None, "tool_calls": [call], "name": None}]
    sample = encode_one({"messages": messages})
    assert targets_of(sample) == '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><eos>\n'


def test_a_template_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(TAGGED)
    sample = encode_one({"messages": CHAT}, chat_template=str(tmp_path / "chat.jinja"))
    assert targets_of(sample) == "hello;|ciao;"


# -- tokens -------------------------------------------------------------------------------------------------


def test_tokens_are_taken_as_they_are_labelled() -> None:
    sample = encode_one({"input_ids": [5, 6, 7], "labels": [5, -100, 9]}, train_on="completion")
    assert sample == Sample([5, 6, 7], [-100, -100, 9])
    assert encode_one({"input_ids": [5, 6, 7]}) == Sample([5, 6, 7], [-100, 6, 7])


# -- too long -----------------------------------------------------------------------------------------------


def test_a_long_sample_loses_its_end() -> None:
    samples, stats = encode([{"text": "abcdefgh"}, {"text": "ab"}], max_length=5)
    assert [text_of(sample) for sample in samples] == ["abcde", "ab"]
    assert (stats.truncated, stats.longest) == (1, 9)


@given(st.integers(1, 40), st.integers(2, 9))
@settings(deadline=None)
def test_pieces_hold_every_token_and_every_target_once(length: int, max_length: int) -> None:
    ids = list(range(length))
    labels = [-100 if index % 5 == 0 else index for index in ids]
    samples, stats = encode([{"input_ids": ids, "labels": labels}], max_length=max_length, long_samples="split")
    assert stats.split == (length > max_length)
    for sample in samples:
        assert len(sample.input_ids) <= max_length
        assert_well_formed(sample)
    assert [label for sample in samples for label in sample.labels if label != -100] == [
        label for label in labels if label != -100
    ]
    if max_length > 2 and length > 1:
        assert {token for sample in samples for token in sample.input_ids} >= set(ids[1:]) - {
            token for token in ids if token % 5 == 0
        }


def test_long_samples_can_be_left_out_or_refused() -> None:
    rows = [{"text": "ab"}, {"text": "abcdefgh"}]
    samples, stats = encode(rows, max_length=5, long_samples="drop")
    assert ([text_of(sample) for sample in samples], stats.dropped_long) == (["ab"], 1)
    with pytest.raises(DataError, match=r"t\.jsonl:2: the sample has 9 tokens, more than data\.max_length=5"):
        encode(rows, max_length=5, long_samples="error")


def test_samples_without_a_target_are_left_out_and_counted() -> None:
    rows = [{"input": "abcdefgh", "output": "x"}, {"input": "a", "output": "b"}]
    samples, stats = encode(rows, max_length=5)
    assert [text_of(sample) for sample in samples] == ["ab"]
    assert (stats.samples, stats.tokens, stats.target_tokens, stats.dropped_no_target) == (1, 3, 2, 1)
    assert encode([{"text": ""}, {"text": "a"}])[1].dropped_no_target == 1


def test_what_was_done_is_told() -> None:
    rows = [
        {"input": "abcdefgh", "output": "x"},
        {"input": "a", "output": "bcdefgh"},
        {"input": "a", "output": "b"},
    ]
    _, stats = encode(rows, max_length=5)
    assert stats.lines() == [
        "100% of 8 tokens are targets",
        "2 samples longer than data.max_length: the end was cut off",
        "1 sample without a target token: left out",
        "the longest sample had 10 tokens",
    ]
    assert stats + stats == DataStats(4, 16, 12, 10, 4, 0, 0, 2, 6)


# -- what is refused ----------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no known columns": (
        [{"a": 1, "b": 2}],
        r"t\.jsonl:1: the columns a, b are no known format; have text, or",
    ),
    "a missing column": (
        [{"text": "a"}, {"txt": "a"}],
        r"t\.jsonl:2: the column text is missing; the row has txt",
    ),
    "a number for text": ([{"text": "a"}, {"text": 5}], r"t\.jsonl:2: text must be text, not int"),
    "choices": ([{"input": "a", "output": ["b"]}], r"t\.jsonl:1: output must be text, not list"),
    "an instruction beside": (
        [{"instruction": "a", "input": "", "output": "b"}],
        r"t\.jsonl:1: the column instruction would be ignored",
    ),
    "half a character": ([{"text": "\ud83d"}], r"t\.jsonl:1: text holds half of a surrogate pair"),
    "half a character said": (
        [{"messages": [{"role": "user", "content": "\ud83d"}]}],
        r"t\.jsonl:1: a turn holds half of a surrogate pair",
    ),
    "no turns": ([{"messages": []}], r"t\.jsonl:1: messages must be a list of turns"),
    "turns of text": ([{"messages": ["hi"]}], r"t\.jsonl:1: a turn must be an object, not str"),
    "a turn of nobody": ([{"messages": [{"content": "a"}]}], r"t\.jsonl:1: a turn must have a role"),
    "a turn of a stranger": (
        [{"conversations": [{"from": "alien", "value": "a"}]}],
        r"t\.jsonl:1: from='alien' is none of system, human",
    ),
    "a turn of nothing": (
        [{"messages": [{"role": "user"}]}],
        r"t\.jsonl:1: the content of a turn must be text",
    ),
    "tools not JSON": ([{"messages": CHAT, "tools": "["}], r"t\.jsonl:1: tools is text but not JSON"),
    "tools of numbers": ([{"messages": CHAT, "tools": [1]}], r"t\.jsonl:1: tools must be a list of objects"),
    "a token too high": (
        [{"input_ids": [1, 1000]}],
        r"t\.jsonl:1: token 1000 lies outside .*vocabulary, 0 to 999",
    ),
    "a token too low": ([{"input_ids": [1, -1]}], r"t\.jsonl:1: token -1 lies outside"),
    "a label too high": (
        [{"input_ids": [1, 2], "labels": [-100, 1000]}],
        r"t\.jsonl:1: label 1000 is neither -100",
    ),
    "a label too low": (
        [{"input_ids": [1, 2], "labels": [-100, -1]}],
        r"t\.jsonl:1: label -1 is neither -100",
    ),
    "labels too few": ([{"input_ids": [1, 2], "labels": [1]}], r"t\.jsonl:1: 2 input_ids but 1 labels"),
    "tokens of text": ([{"input_ids": ["1"]}], r"t\.jsonl:1: input_ids must be a list of whole numbers"),
    "tokens of truth": ([{"input_ids": [True, 1]}], r"t\.jsonl:1: input_ids must be a list of whole numbers"),
    "padding": (
        [{"input_ids": [1, 2], "attention_mask": [1, 0]}],
        r"t\.jsonl:1: the attention_mask hides tokens",
    ),
}


@pytest.mark.parametrize(("rows", "message"), REFUSED.values(), ids=REFUSED)
def test_a_row_that_does_not_fit_is_named(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode(rows)


def test_ids_beyond_the_models_vocabulary_are_found() -> None:
    with pytest.raises(DataError, match=r"t\.jsonl:1: token 256 lies outside the model's vocabulary, 0 to 255"):
        encode([{"text": "ab"}], vocab_size=256)


@pytest.mark.parametrize("train_on", ["completion", "assistant"])
def test_a_text_has_no_answer(train_on: str) -> None:
    with pytest.raises(DataError, match=rf"t\.jsonl:1: a text has no {train_on} of its own, 100 %"):
        encode([{"text": "ab"}], train_on=train_on)


def test_a_conversation_needs_a_template() -> None:
    with pytest.raises(DataError, match=r"t\.jsonl:1: .*set data\.chat_template to chatml, a file, or a Jinja"):
        encode([{"messages": CHAT}], LLAMA)


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ messages[0].content.nothing.more }}",
        "{{ raise_exception('no system') }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_fails_is_one_sentence(template: str) -> None:
    with pytest.raises(DataError, match=r"^t\.jsonl:1: the chat template fails on this row: [^\n]+$"):
        encode([{"messages": CHAT}], chat_template=template)


def test_a_template_must_be_had(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.chat_template=chatmel is no file, no Jinja template, and none of: cha"):
        encode([{"messages": CHAT}], chat_template="chatmel")
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        encode([{"messages": CHAT}], chat_template=str(tmp_path / "latin"))


def test_a_tokenizer_without_offsets_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[UNK]\n[SEP]\n[PAD]\n[CLS]\n[MASK]\na\n")
    slow = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    with pytest.raises(ModelError, match="does not tell which characters its tokens stand for"):
        encode([{"text": "a"}], slow)
