"""From a row to a prompt, as `collie generate` reads one, and the answers that would be right."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from collie_core.data import formats
from collie_core.data.formats import PAIRS, Conversation, detect_format
from collie_core.data.loader import IGNORE
from collie_core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from collie_core.data.sources import Row

FIELD = re.compile(r"\{(\w+)\}")  # nothing but a name, so that a template reads columns and cannot look into objects


class Prompt(NamedTuple):
    """What stands before an answer."""

    origin: str  # the file and line of the row
    text: str
    ids: Sequence[int] | None  # given as tokens
    references: Sequence[str]
    templated: bool = False  # a chat template has written the special tokens

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Its token ids, at least one; without an end of text.

        Raises:
            DataError: it has no token.
        """
        ids = [*self.ids] if self.ids is not None else text_ids(tokenizer, self.text, special=not self.templated)
        if not ids:
            raise DataError(f"{self.origin}: the prompt is empty, and nothing stands before its first token")
        return ids


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """The token ids of a text that goes on; some tokenizers close every text, which is taken back."""
    ids = list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def cut_left(ids: Sequence[int], limit: int | None, first: int | None) -> tuple[list[int], bool]:
    """The last `limit` ids, and whether some are missing; `first`, the beginning of a text, stays in front."""
    if limit is None or len(ids) <= limit:
        return list(ids), False
    if first is not None and ids[0] == first and limit > 1:
        return [first, *ids[len(ids) - limit + 1 :]], True
    return list(ids[len(ids) - limit :]), True


class PromptReader:
    """Reads the prompt of a row: what comes before the output, or before the last turn of an assistant.

    Args:
        tokenizer: of the model.
        template: for conversations; None: there is none.
        references: whether a row without right answers is refused.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None, *, references: bool) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.references = references

    def __call__(self, row: Row) -> Prompt:
        """The prompt and its references: `references`, else the answer that the row holds.

        Raises:
            DataError: there is no prompt or no right answer, or one of them is no text.
        """
        read = {"tokens": self._tokens, "messages": self._messages, "completion": self._pair, "text": self._text}
        prompt = read["completion" if _is_pair(row) else detect_format(row)](row)
        if "references" in row.values:
            prompt = prompt._replace(references=_texts(row, "references"))
        if self.references and not prompt.references:
            raise DataError(f"{row.origin}: there is no right answer to compare with; have output, or references")
        return prompt

    def _pair(self, row: Row) -> Prompt:
        prompt, answer = next(pair for pair in PAIRS if pair[0] in row.values)
        formats.refuse_instruction(row, prompt)
        references = _texts(row, answer) if answer in row.values else []
        if isinstance(row.values.get(answer), list) and "target" in row.values:
            raise DataError(
                f"{row.origin}: {answer} is a list of choices with target the right one; evaluate it with "
                "type: classification, or write the right answers into references"
            )
        return Prompt(row.origin, formats.text_of(row, prompt), None, references)

    def _text(self, row: Row) -> Prompt:
        if "references" not in row.values:
            raise DataError(
                f"{row.origin}: a text alone is no prompt; have input and output, messages, or text and references"
            )
        return Prompt(row.origin, formats.text_of(row, "text"), None, ())

    def _messages(self, row: Row) -> Prompt:
        if self.template is None:
            raise DataError(
                f"{row.origin}: a conversation needs a chat template and the tokenizer has none; set "
                "data.chat_template to chatml, a file, or a Jinja template"
            )
        messages, references = formats.messages_of(row), []
        if messages[-1]["role"] == "assistant":
            answer = messages.pop().get("content")
            references = [answer] if isinstance(answer, str) else []
        if not messages:
            raise DataError(f"{row.origin}: nothing stands before the assistant's turn")
        conversation = Conversation(row, messages, formats.tools_of(row), self.template, self.tokenizer)
        return Prompt(row.origin, conversation.prompt(), None, references, templated=True)

    def _tokens(self, row: Row) -> Prompt:
        ids = formats.integers_of(row, "input_ids")
        labels = formats.integers_of(row, "labels") if "labels" in row.values else ids
        targets = [place for place, label in enumerate(labels) if place and label != IGNORE]  # the first never is
        start = targets[0] if targets else len(ids)
        end = next((place for place in range(start, len(labels)) if labels[place] == IGNORE), len(labels))
        references = [self._decoded(ids[start:end])] if targets else []
        return Prompt(row.origin, self._decoded(ids[:start]), ids[:start], references)

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def filled(template: str, row: Row) -> str:
    """The template with {name} replaced by that column of the row; any other brace stays as it is.

    Raises:
        DataError: the row has no such column, or it is neither text nor a number.
    """

    def value(match: re.Match[str]) -> str:
        found: Any = row.values.get(match[1])
        if isinstance(found, bool) or not isinstance(found, str | int | float):
            columns = ", ".join(map(str, row.values)) or "none"
            what = f"is a {type(found).__name__}" if match[1] in row.values else f"is missing; the row has {columns}"
            raise DataError(f"{row.origin}: the column {match[1]} of the prompt {what}")
        return str(found)

    return FIELD.sub(value, template)


def _is_pair(row: Row) -> bool:
    """Whether it has a prompt in a column of its own; the right answers may stand in `references`."""
    values: Mapping[str, Any] = row.values
    return any(pair[0] in values and (pair[1] in values or "references" in values) for pair in PAIRS)


def _texts(row: Row, name: str) -> list[str]:
    """A text or a list of texts."""
    value = row.values[name]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{row.origin}: {name} must be a text or a list of texts")
    return texts
