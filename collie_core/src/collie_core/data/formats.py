"""From a row to tokens and targets.

Every format becomes a text and the spans of it that are to be learned; tokens that reach into such a span are targets.
`labels[i]` is the target at position i, -100 where there is none; nothing predicts the first token of a sample.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from collie_core.data.loader import IGNORED
from collie_core.data.sources import Row
from collie_core.data.tokenizer import CHATML
from collie_core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from collie_core.config.data import DataConfig

Format = Literal["text", "completion", "messages", "tokens"]
Span = tuple[int, int]
TEMPLATES = {"chatml": CHATML}

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}


@dataclass(frozen=True)
class Sample:
    """Token ids and targets of equal length."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class MarkedText:
    """A text whose `spans` are to be learned. A template writes its special tokens itself (`templated`)."""

    text: str
    spans: Sequence[Span]
    templated: bool = False


@dataclass
class Counts:
    """What happened to the samples of a data set."""

    samples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    split: int = 0
    dropped_long: int = 0
    dropped_without_target: int = 0
    formats: set[str] = field(default_factory=set)


def detect(row: Row) -> Format:
    """The format that the columns of a row show.

    Raises:
        DataError: none that is known.
    """
    columns = row.values.keys()
    if "input_ids" in columns:
        return "tokens"
    if columns & {"messages", "conversations"}:
        return "messages"
    if columns >= {"input", "output"}:
        return "completion"
    if "text" in columns:
        return "text"
    raise DataError(
        f"{row.origin}: the columns {', '.join(map(str, columns))} are no known format; "
        "have text, or input and output, or messages, or conversations, or input_ids and labels"
    )


class Encoder:
    """Turns rows into samples as `data:` says, and counts what it does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.data = data
        self.vocab_size = vocab_size
        self.template = _template(data.chat_template, tokenizer)
        self.counts = Counts()

    def encode(self, rows: Sequence[Row], format: Format) -> Iterator[Sample]:
        """Samples of a batch of rows of one format; tokenised together, which is where the speed comes from."""
        self.counts.formats.add(format)
        if format == "tokens":
            encoded = [(row, self._given(row)) for row in rows]
        else:
            mark = {"text": self._text, "completion": self._completion, "messages": self._messages}[format]
            encoded = list(zip(rows, self._tokenise([mark(row) for row in rows]), strict=True))
        for row, sample in encoded:
            for piece in self._fitted(row, sample):
                if all(label == IGNORED for label in piece.labels):
                    self.counts.dropped_without_target += 1
                    continue
                self._count(piece)
                yield piece

    def check_share(self, name: str) -> None:
        """Compare the share of target tokens with what `train_on` says.

        Raises:
            DataError: nothing is a target, or everything where only the answers should be.
        """
        counts, train_on = self.counts, self.data.train_on
        if counts.target_tokens == 0:
            raise DataError(
                f"{name}: 0 % of the tokens are targets ({counts.dropped_without_target} samples have none); check "
                "data.train_on, data.max_length and that the answers are not empty"
            )
        everything = counts.target_tokens == counts.tokens - counts.samples
        if everything and train_on in ("completion", "assistant"):
            raise DataError(
                f"{name}: 100 % of the tokens are targets, but data.train_on={train_on} says that only the answers "
                "are; give prompts to the samples, or set data.train_on=all"
            )

    # -- formats -----------------------------------------------------------------------------------------------

    def _text(self, row: Row) -> MarkedText:
        if self.data.train_on in ("completion", "assistant"):
            raise DataError(
                f"{row.origin}: a {{text}} sample has no {self.data.train_on}, so 100 % of its tokens would be "
                f"targets against data.train_on={self.data.train_on}; set data.train_on=all"
            )
        text = _string(row, "text")
        return MarkedText(text, [(0, len(text))])

    def _completion(self, row: Row) -> MarkedText:
        prompt, answer = _string(row, "input"), _string(row, "output")
        start = 0 if self.data.train_on == "all" else len(prompt)
        return MarkedText(prompt + answer, [(start, len(prompt) + len(answer))])

    def _messages(self, row: Row) -> MarkedText:
        if self.template is None:
            raise DataError(
                f"{row.origin}: a conversation needs a chat template and the tokenizer has none; set "
                "data.chat_template to chatml, a file, or a Jinja template"
            )
        messages, tools = _conversation(row), _tools(row)
        text = self._render(row, messages, tools)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if self.data.train_on == "all":
            return MarkedText(text, [(0, len(text))], templated=True)
        if self.data.train_on == "completion":
            turns = turns[-1:]
        return MarkedText(text, [self._turn(row, messages, tools, text, index) for index in turns], templated=True)

    def _turn(self, row: Row, messages: list[dict[str, Any]], tools: Any, text: str, index: int) -> Span:
        """Where one assistant turn lies in the rendered text, found by rendering up to it and with it."""
        before = self._render(row, messages[:index], tools, prompt=True)
        with_it = text if index == len(messages) - 1 else self._render(row, messages[: index + 1], tools)
        if not (with_it.startswith(before) and text.startswith(with_it)):
            raise DataError(
                f"{row.origin}: the chat template renders message {index + 1} otherwise once others follow, so its "
                "tokens cannot be told apart; train on the last answer alone (data.train_on=completion, one answer "
                "per sample), or set data.chat_template"
            )
        return len(before), len(with_it)

    def _render(self, row: Row, messages: list[dict[str, Any]], tools: Any, *, prompt: bool = False) -> str:
        import jinja2

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=self.template, add_generation_prompt=prompt, tokenize=False
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataError(f"{row.origin}: the chat template refuses this conversation: {error}") from error

    def _given(self, row: Row) -> Sample:
        ids = _integers(row, "input_ids")
        labels = _integers(row, "labels") if "labels" in row.values else list(ids)
        if len(ids) != len(labels):
            raise DataError(f"{row.origin}: {len(ids)} input_ids but {len(labels)} labels")
        wrong = [token for token in ids if not 0 <= token < self.vocab_size]
        wrong += [token for token in labels if token != IGNORED and not 0 <= token < self.vocab_size]
        if wrong:
            raise DataError(f"{row.origin}: token {wrong[0]} is outside the vocabulary of {self.vocab_size}")
        return _sample(ids, labels)

    # -- tokens ------------------------------------------------------------------------------------------------

    def _tokenise(self, texts: Sequence[MarkedText]) -> Iterator[Sample]:
        end = self.tokenizer.eos_token_id
        templated = texts[0].templated
        encoded = self.tokenizer(
            [marked.text for marked in texts],
            add_special_tokens=not templated,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for marked, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            labels = [
                token if _reaches_into(offset, marked.spans) else IGNORED
                for token, offset in zip(ids, offsets, strict=True)
            ]
            if not templated and end is not None:
                closed = bool(ids) and ids[-1] == end  # by a tokenizer that ends every text itself
                ids, labels = [*ids[: len(ids) - closed], end], [*labels[: len(labels) - closed], end]
            yield _sample(ids, labels)

    def _fitted(self, row: Row, sample: Sample) -> Iterator[Sample]:
        """The sample, or what `long_samples` makes of one that is too long."""
        limit, length, counts = self.data.max_length, len(sample.input_ids), self.counts
        if length < 2:
            counts.dropped_without_target += 1
        elif length <= limit:
            yield sample
        elif self.data.long_samples == "truncate":
            counts.truncated += 1
            yield Sample(sample.input_ids[:limit], sample.labels[:limit])
        elif self.data.long_samples == "drop":
            counts.dropped_long += 1
        elif self.data.long_samples == "split":
            counts.split += 1
            # Pieces share one token: it is the last target of one and the first input of the next.
            for start in range(0, length - 1, limit - 1):
                yield _sample(sample.input_ids[start : start + limit], sample.labels[start : start + limit])
        else:
            raise DataError(
                f"{row.origin}: the sample has {length} tokens, more than data.max_length={limit}; raise it, or set "
                "data.long_samples to truncate, split or drop"
            )

    def _count(self, sample: Sample) -> None:
        counts = self.counts
        counts.samples += 1
        counts.tokens += len(sample.input_ids)
        counts.target_tokens += sum(label != IGNORED for label in sample.labels)
        counts.longest = max(counts.longest, len(sample.input_ids))


def _sample(ids: Sequence[int], labels: Sequence[int]) -> Sample:
    return Sample(list(ids), [IGNORED, *labels[1:]] if labels else [])


def _reaches_into(offset: Span, spans: Sequence[Span]) -> bool:
    start, end = offset
    return end > start and any(start < last and end > first for first, last in spans)


def _template(setting: str | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    if setting is None:
        return tokenizer.get_chat_template() if tokenizer.chat_template else None
    if setting in TEMPLATES:
        return TEMPLATES[setting]
    if "{" in setting:
        return setting
    if not Path(setting).is_file():
        raise DataError(
            f"data.chat_template={setting} is no file, no template, and none of: {', '.join(TEMPLATES)}"
        )
    return Path(setting).read_text(encoding="utf-8")


# -- columns ------------------------------------------------------------------------------------------------


def _column(row: Row, name: str) -> Any:
    if name not in row.values:
        raise DataError(f"{row.origin}: the column {name} is missing")
    return row.values[name]


def _string(row: Row, name: str) -> str:
    value = _column(row, name)
    if not isinstance(value, str):
        raise DataError(f"{row.origin}: {name} must be text, not {type(value).__name__}")
    return _encodable(row, name, value)


def _encodable(row: Row, name: str, value: str) -> str:
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{row.origin}: {name} holds half of a surrogate pair, which is no character")
    return value


def _integers(row: Row, name: str) -> list[int]:
    value = _column(row, name)
    items = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(items, list) or any(type(item) is not int for item in items):
        raise DataError(f"{row.origin}: {name} must be a list of whole numbers")
    return items


def _conversation(row: Row) -> list[dict[str, Any]]:
    name = "messages" if "messages" in row.values else "conversations"
    turns = _column(row, name)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{row.origin}: {name} must be a list of turns, with at least one")
    return [_message(row, turn) for turn in turns]


def _message(row: Row, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise DataError(f"{row.origin}: a turn must be an object, not {type(turn).__name__}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role not in _ROLES:
        raise DataError(f"{row.origin}: the role {role!r} is none of {', '.join(_ROLES)}")
    if not isinstance(content, str) and not turn.get("tool_calls"):
        raise DataError(f"{row.origin}: the content of a turn must be text, not {type(content).__name__}")
    rest = {key: value for key, value in turn.items() if key not in ("role", "from", "content", "value")}
    text = _encodable(row, "a turn", content) if isinstance(content, str) else ""
    return {"role": _ROLES[role], "content": text, **rest}


def _tools(row: Row) -> Any:
    tools = row.values.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise DataError(f"{row.origin}: tools is text but not JSON: {error.msg}") from error
    return tools or None
