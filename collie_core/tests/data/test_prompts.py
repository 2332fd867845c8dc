"""From rows to prompts and right answers."""

from __future__ import annotations

from typing import Any

import pytest

from collie_core.data.prompts import PromptReader, cut_left, filled, text_ids
from collie_core.data.sources import Row
from collie_core.data.tokenizer import CHATML, byte_tokenizer
from collie_core.errors import DataError


def read(values: dict[str, Any], *, references: bool = True, template: str | None = CHATML) -> tuple[str, list[str]]:
    prompt = PromptReader(byte_tokenizer(), template, references=references)(Row("f:1", values))
    return prompt.text, list(prompt.references)


USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
CHAT = "<|im_start|>user\nHi<eos>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"input": "2+2=", "output": "4"}, ("2+2=", ["4"])),
        ({"prompt": "2+2=", "completion": ["4", "four"]}, ("2+2=", ["4", "four"])),
        ({"input": "2+2=", "references": ["4", "four"]}, ("2+2=", ["4", "four"])),
        ({"input": "2+2=", "output": "4", "references": "four"}, ("2+2=", ["four"])),
        ({"text": "2+2=", "references": ["4"]}, ("2+2=", ["4"])),
        ({"messages": [USER, REPLY]}, (CHAT, ["Yo"])),
        ({"messages": [USER], "references": ["Hey"]}, (CHAT, ["Hey"])),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}, (CHAT, ["Yo"])),
        (
            {"messages": [USER, REPLY, USER, {"role": "assistant", "content": "Bye"}]},
            (f"{CHAT}Yo<eos>\n{CHAT}", ["Bye"]),
        ),
        ({"input_ids": [97, 98, 99, 100], "labels": [-100, -100, 99, 100]}, ("ab", ["cd"])),
        ({"input_ids": [97, 98, 99, 100], "labels": [-100, 98, -100, 100]}, ("a", ["b"])),
        ({"input_ids": [97, 98]}, ("a", ["b"])),
    ],
)
def test_a_prompt_ends_where_the_answer_begins(values: dict[str, Any], expected: Any) -> None:
    assert read(values) == expected


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"input": "2+2=", "output": []}, "f:1: there is no right answer to compare with"),
        ({"messages": [USER]}, "there is no right answer"),
        ({"input_ids": [97], "labels": [-100]}, "there is no right answer"),
        ({"input": "x", "output": [1]}, "output must be a text or a list of texts"),
        ({"input": "x", "references": {"a": 1}}, "references must be a text or a list of texts"),
        ({"input": 3, "output": "x"}, "input must be text, not int"),
        ({"input": "x", "output": [" a", " b"], "target": 0}, "output is a list of choices with target the right one"),
        ({"input": "x", "output": "y", "instruction": "z"}, "the column instruction would be ignored"),
        ({"text": "only"}, "a text alone is no prompt"),
        ({"messages": [REPLY]}, "nothing stands before the assistant's turn"),
        ({"other": 1}, "are no known format"),
    ],
)
def test_rows_that_are_no_prompt(values: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        read(values)
    assert said in str(caught.value)


def test_without_a_metric_no_answer_is_needed_and_without_a_template_no_chat() -> None:
    assert read({"messages": [USER]}, references=False) == (CHAT, [])
    with pytest.raises(DataError, match="needs a chat template"):
        read({"messages": [USER]}, references=False, template=None)


def test_tokens_of_a_prompt() -> None:
    tokenizer = byte_tokenizer()
    reader = PromptReader(tokenizer, CHATML, references=False)
    chat = reader(Row("f:1", {"messages": [USER]})).tokens(tokenizer)
    assert chat[0] == 258  # <|im_start|>, as one token
    assert tokenizer.decode(chat) == CHAT
    assert reader(Row("f:1", {"input_ids": [97, 98, 99], "labels": [-100, -100, 9]})).tokens(tokenizer) == [97, 98]
    with pytest.raises(DataError, match="the prompt is empty"):
        reader(Row("f:1", {"input": "", "output": ""})).tokens(tokenizer)
    assert text_ids(tokenizer, "ab<eos>") == [97, 98]


def test_what_does_not_fit_is_cut_from_the_left() -> None:
    assert cut_left([1, 2, 3], None, 1) == ([1, 2, 3], False)
    assert cut_left([1, 2, 3], 3, 1) == ([1, 2, 3], False)
    assert cut_left([1, 2, 3, 4], 2, None) == ([3, 4], True)
    assert cut_left([1, 2, 3, 4], 2, 1) == ([1, 4], True)  # a text still begins as texts do
    assert cut_left([1, 2, 3, 4], 1, 1) == ([4], True)


def test_templates_read_columns_and_nothing_else() -> None:
    row = Row("f:1", {"text": "{other}", "n": 2, "flag": True})
    assert filled("{text} x {n} {} {text.upper} {{n}}", row) == "{other} x 2 {} {text.upper} {2}"
    with pytest.raises(DataError, match="the column missing of the prompt is missing; the row has text, n, flag"):
        filled("{missing}", row)
    with pytest.raises(DataError, match="the column flag of the prompt is a bool"):
        filled("{flag}", row)
