"""From a row to tokens and targets.

Every format becomes a text and the spans of it to learn; a token that reaches into a span is a target, also
when it begins before it. `labels[i]` is the target AT position i, -100 where there is none; position 0, which
nothing predicts, never has one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from collie_core.data.loader import IGNORE
from collie_core.data.sources import Row
from collie_core.data.tokenizer import CHATML, require_fast
from collie_core.errors import DataError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

    from collie_core.config.data import DataConfig

Format = Literal["text", "completion", "messages", "tokens"]
Span = tuple[int, int]
TEMPLATES = {"chatml": CHATML}
PAIRS = (("input", "output"), ("prompt", "completion"))
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")  # transformers' mark around what the assistant says
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


@dataclass
class Sample:
    """Token ids and targets of equal length."""

    input_ids: list[int]
    labels: list[int]


class MarkedText(NamedTuple):
    """A text and the spans of it to learn."""

    text: str
    spans: Sequence[Span]


@dataclass
class DataStats:
    """What a data set holds, and what was done to make it fit."""

    samples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    longest: int = 0  # tokens, before anything was cut
    truncated: int = 0
    split: int = 0
    dropped_long: int = 0
    dropped_no_target: int = 0
    prompted: int = 0  # rows that hold more than what is to be learned

    @property
    def target_share(self) -> float:
        """Targets among the tokens that can be one: all but the first of each sample."""
        return self.target_tokens / max(1, self.tokens - self.samples)

    def __add__(self, other: DataStats) -> DataStats:
        sums = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        return DataStats(**sums | {"longest": max(self.longest, other.longest)})

    def lines(self) -> list[str]:
        """Sentences for a person."""
        lines = [f"{self.target_share:.0%} of {self.tokens:,} tokens are targets"]
        for count, what in (
            (self.truncated, "longer than data.max_length: the end was cut off"),
            (self.split, "longer than data.max_length: cut into pieces"),
            (self.dropped_long, "longer than data.max_length: left out"),
            (self.dropped_no_target, "without a target token: left out"),
        ):
            if count:
                lines.append(f"{count:,} sample{'s' if count > 1 else ''} {what}")
        if self.truncated or self.split or self.dropped_long:
            lines.append(f"the longest sample had {self.longest:,} tokens")
        return lines


def detect_format(row: Row) -> Format:
    """The format that the columns of a row show.

    Raises:
        DataError: none that is known.
    """
    columns = row.values.keys()
    if columns & {"messages", "conversations"}:
        return "messages"
    if "input_ids" in columns:
        return "tokens"
    if any(columns >= set(pair) for pair in PAIRS):
        return "completion"
    if "text" in columns:
        return "text"
    raise DataError(
        f"{row.origin}: the columns {', '.join(map(str, columns)) or '(none)'} are no known format; have "
        "text, or input and output, or messages, or conversations, or input_ids and labels"
    )


class Encoder:
    """Turns rows into samples as `data:` says.

    Raises:
        DataError: the chat template that `data.chat_template` names is not to be had.
        ModelError: the tokenizer cannot tell which characters its tokens stand for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, vocab_size: int) -> None:
        require_fast(tokenizer, "this run")
        self.tokenizer = tokenizer
        self.data = data
        self.vocab_size = vocab_size
        self.template = chat_template(data.chat_template, tokenizer)

    def learns_all(self, format: Format) -> bool:
        """Whether every token of this format should be a target, or is what its labels say."""
        return self.data.train_on == "all" or format in ("text", "tokens")

    def encode(self, rows: Sequence[Row], format: Format, stats: DataStats) -> Iterator[Sample]:
        """The samples of rows of one format, counted in `stats`. Many rows at once is what makes it fast.

        Raises:
            DataError: a row does not have the format, is too long, or holds a token outside the vocabulary.
        """
        samples = map(self._labelled, rows) if format == "tokens" else self._tokenised(rows, format, stats)
        for row, sample in zip(rows, samples, strict=True):
            self._check_vocabulary(row, sample)
            stats.longest = max(stats.longest, len(sample.input_ids))
            for piece in self._fitted(row, sample, stats):
                targets = len(piece.labels) - piece.labels.count(IGNORE)
                if targets == 0:
                    stats.dropped_no_target += 1
                    continue
                stats.samples += 1
                stats.tokens += len(piece.input_ids)
                stats.target_tokens += targets
                yield piece

    # -- a row to a marked text ----------------------------------------------------------------------------

    def _marked(self, format: Format) -> Callable[[Row], MarkedText]:
        return {"text": self._text, "completion": self._completion, "messages": self._messages}[format]

    def _text(self, row: Row) -> MarkedText:
        train_on = self.data.train_on
        if train_on in ("completion", "assistant"):
            raise DataError(
                f"{row.origin}: a text has no {train_on} of its own, 100 % of its tokens would be targets "
                f"against data.train_on={train_on}; set data.train_on to auto or all"
            )
        text = text_of(row, "text")
        return MarkedText(text, [(0, len(text))])

    def _completion(self, row: Row) -> MarkedText:
        names = next((pair for pair in PAIRS if pair[0] in row.values), PAIRS[0])
        refuse_instruction(row, names[0])
        prompt, answer = (text_of(row, name) for name in names)
        start = 0 if self.data.train_on == "all" else len(prompt)
        return MarkedText(prompt + answer, [(start, len(prompt) + len(answer))])

    def _messages(self, row: Row) -> MarkedText:
        if self.template is None:
            raise DataError(
                f"{row.origin}: a conversation needs a chat template and the tokenizer has none; set "
                "data.chat_template to chatml, a file, or a Jinja template"
            )
        conversation = Conversation(row, messages_of(row), tools_of(row), self.template, self.tokenizer)
        if self.data.train_on == "all":
            return MarkedText(conversation.text, [(0, len(conversation.text))])
        spans = conversation.assistant_spans()
        return MarkedText(conversation.text, spans[-1:] if self.data.train_on == "completion" else spans)

    # -- to tokens -----------------------------------------------------------------------------------------

    def _tokenised(self, rows: Sequence[Row], format: Format, stats: DataStats) -> Iterator[Sample]:
        templated = format == "messages"  # a chat template writes all special tokens itself
        marked = [*map(self._marked(format), rows)]
        encoded = self.tokenizer(
            [text for text, _ in marked],
            add_special_tokens=not templated,
            return_attention_mask=False,
            verbose=False,
        )
        for index, (text, spans) in enumerate(marked):
            stats.prompted += sum(stop - start for start, stop in spans) < len(text)
            ids: list[int] = encoded["input_ids"][index]
            labels = [IGNORE] * len(ids)
            for span in spans:
                begin, end = _token_range(encoded, index, span, len(text), len(ids))
                labels[begin:end] = ids[begin:end]
            if text and not templated:
                self._close(ids, labels)
            labels[:1] = [IGNORE] * len(labels[:1])
            yield Sample(ids, labels)

    def _close(self, ids: list[int], labels: list[int]) -> None:
        """End the text with a learned end of text, unless the tokenizer has ended it already."""
        end = self.tokenizer.eos_token_id
        if not isinstance(end, int):
            return
        if ids[-1] != end:
            ids.append(end)
            labels.append(end)
        labels[-1] = end

    def _labelled(self, row: Row) -> Sample:
        ids = integers_of(row, "input_ids")
        labels = integers_of(row, "labels") if "labels" in row.values else [*ids]
        if len(ids) != len(labels):
            raise DataError(f"{row.origin}: {len(ids)} input_ids but {len(labels)} labels")
        if 0 in row.values.get("attention_mask", ()):
            raise DataError(f"{row.origin}: the attention_mask hides tokens; have samples without padding")
        return Sample(ids, [IGNORE] * len(labels[:1]) + labels[1:])

    def _check_vocabulary(self, row: Row, sample: Sample) -> None:
        size, targets = self.vocab_size, (label for label in sample.labels if label != IGNORE)
        if sample.input_ids and (min(sample.input_ids) < 0 or max(sample.input_ids) >= size):
            wrong = next(token for token in sample.input_ids if not 0 <= token < size)
            raise DataError(f"{row.origin}: token {wrong} lies outside the model's vocabulary, 0 to {size - 1}")
        wrong_label = next((label for label in targets if not 0 <= label < size), None)
        if wrong_label is not None:
            raise DataError(f"{row.origin}: label {wrong_label} is neither -100 nor from 0 to {size - 1}")

    def _fitted(self, row: Row, sample: Sample, stats: DataStats) -> Iterator[Sample]:
        """The sample, or what `data.long_samples` makes of one that is longer than `data.max_length`."""
        limit, length, action = self.data.max_length, len(sample.input_ids), self.data.long_samples
        if length <= limit:
            yield sample
        elif action == "truncate":
            stats.truncated += 1
            yield Sample(sample.input_ids[:limit], sample.labels[:limit])
        elif action == "drop":
            stats.dropped_long += 1
        elif action == "split":
            stats.split += 1
            # Pieces share a token, last target of one and first input of the next: none is lost or doubled.
            for start in range(0, length - 1, limit - 1):
                stop = start + limit
                yield Sample(sample.input_ids[start:stop], [IGNORE, *sample.labels[start + 1 : stop]])
        else:
            raise DataError(
                f"{row.origin}: the sample has {length} tokens, more than data.max_length={limit}; raise "
                "that, or set data.long_samples to truncate, split or drop"
            )


def _token_range(encoded: BatchEncoding, index: int, span: Span, text_length: int, length: int) -> Span:
    """The tokens that reach into the characters of a span."""
    start, stop = span
    if start >= stop:
        return 0, 0
    begin = 0 if start == 0 else _token_from(encoded, index, start, stop)
    if begin is None:
        return 0, 0
    after = _token_from(encoded, index, stop, text_length)
    if after is None:
        return begin, length
    characters = encoded.token_to_chars(index, after)
    return begin, after + (characters is not None and characters.start < stop)


def _token_from(encoded: BatchEncoding, index: int, start: int, stop: int) -> int | None:
    """The first token over a character from `start` on; a tokenizer may drop characters such as spaces."""
    tokens = (encoded.char_to_token(index, character) for character in range(start, stop))
    return next((token for token in tokens if token is not None), None)


# -- conversations ------------------------------------------------------------------------------------------


def chat_template(setting: str | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The Jinja text that `data.chat_template` names (a built-in, a file, itself), else the tokenizer's.

    Raises:
        DataError: it is none of these, or the file is no text.
    """
    if setting is None:
        return str(tokenizer.get_chat_template()) if tokenizer.chat_template else None
    if setting in TEMPLATES:
        return TEMPLATES[setting]
    if "{%" in setting or "{{" in setting:
        return setting
    path = Path(setting).expanduser()
    if not path.is_file():
        raise DataError(
            f"data.chat_template={setting} is no file, no Jinja template, and none of: {', '.join(TEMPLATES)}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"data.chat_template={setting} is not UTF-8 text") from error


class Conversation:
    """One conversation under a chat template; `text` is the whole of it."""

    def __init__(
        self,
        row: Row,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        template: str,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.row = row
        self.messages = messages
        self.tools = tools
        self.template = template
        self.tokenizer = tokenizer
        self.text, self._tagged = self._render(len(messages))

    def prompt(self) -> str:
        """The whole of it, and what the template writes before the assistant's next turn."""
        return self._render(len(self.messages), prompt=True)[0]

    def assistant_spans(self) -> list[Span]:
        """Where the assistant speaks: what the template tags, or from the prompt for a turn to the end of it.

        Raises:
            DataError: an untagged template writes a turn otherwise once others follow.
        """
        if GENERATION_TAG.search(self.template):
            return self._tagged
        turns = [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]
        return [self._turn(index) for index in turns]

    def _turn(self, index: int) -> Span:
        before, _ = self._render(index, prompt=True)
        through, _ = self._render(index + 1)
        if not (self.text.startswith(through) and through.startswith(before)):
            raise DataError(
                f"{self.row.origin}: the chat template writes message {index + 1} otherwise once others "
                "follow, so the assistant's turns cannot be told apart; set data.chat_template to chatml or "
                "to one that marks them with {% generation %}, or data.train_on to all"
            )
        return len(before), len(through)

    def _render(self, count: int, *, prompt: bool = False) -> tuple[str, list[Span]]:
        """The first `count` messages as text, and the tagged spans of it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        tagged = bool(GENERATION_TAG.search(self.template))
        render: Any = render_jinja_template  # (annotated as returning a str)
        try:
            texts, spans = render(
                [[*self.messages[:count]]],
                tools=self.tools,
                chat_template=self.template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=tagged,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # (a template is a program: it may raise anything)
            reason = " ".join(str(error).split())
            raise DataError(f"{self.row.origin}: the chat template fails on this row: {reason}") from error
        return texts[0], spans[0] if tagged else []


def messages_of(row: Row) -> list[dict[str, Any]]:
    """The turns with the roles of the transformers templates; `system` may stand beside ShareGPT's turns."""
    name = "messages" if "messages" in row.values else "conversations"
    turns = _column(row, name)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{row.origin}: {name} must be a list of turns, with at least one")
    messages = [_message(row, turn) for turn in turns]
    system = row.values.get("system")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": text_of(row, "system")})
    return messages


def _message(row: Row, written: Any) -> dict[str, Any]:
    if not isinstance(written, Mapping):
        raise DataError(f"{row.origin}: a turn must be an object, not {type(written).__name__}")
    # Parquet fills absent keys with null.
    turn = {str(key): value for key, value in written.items() if value is not None}
    if "from" in turn:
        if turn["from"] not in SHAREGPT_ROLES:
            raise DataError(f"{row.origin}: from={turn['from']!r} is none of {', '.join(SHAREGPT_ROLES)}")
        turn = {"role": SHAREGPT_ROLES[turn.pop("from")], "content": turn.pop("value", None), **turn}
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str):
        raise DataError(f"{row.origin}: a turn must have a role and a content (or from and value)")
    if isinstance(content, str):
        _check_characters(row, "a turn", content)
    elif not isinstance(content, list) and not turn.get("tool_calls"):
        raise DataError(f"{row.origin}: the content of a turn must be text, not {type(content).__name__}")
    return turn


def tools_of(row: Row) -> list[Mapping[str, Any]] | None:
    """The tools of a row, in the form {"type": "function", "function": {...}} that templates expect."""
    tools = row.values.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except ValueError as error:
            raise DataError(f"{row.origin}: tools is text but not JSON: {error}") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"{row.origin}: tools must be a list of objects")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


# -- columns ------------------------------------------------------------------------------------------------


def _column(row: Row, name: str) -> Any:
    if name not in row.values:
        columns = ", ".join(map(str, row.values)) or "none"
        raise DataError(f"{row.origin}: the column {name} is missing; the row has {columns}")
    return row.values[name]


def refuse_instruction(row: Row, prompt: str) -> None:
    """Refuse a column that nothing reads and that says what is to be done."""
    if "instruction" in row.values:
        raise DataError(
            f"{row.origin}: the column instruction would be ignored; write it into {prompt}, or have messages"
        )


def text_of(row: Row, name: str) -> str:
    """The text in a column."""
    value = _column(row, name)
    if not isinstance(value, str):
        raise DataError(f"{row.origin}: {name} must be text, not {type(value).__name__}")
    _check_characters(row, name, value)
    return value


def _check_characters(row: Row, name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write it: "\ud83d"
        raise DataError(f"{row.origin}: {name} holds half of a surrogate pair, which is no character") from error


def integers_of(row: Row, name: str) -> list[int]:
    """The whole numbers in a column."""
    value = _column(row, name)
    items = value.tolist() if hasattr(value, "tolist") else value  # rows of a data set in numpy or torch format
    if not isinstance(items, list) or not {*map(type, items)} <= {int}:
        raise DataError(f"{row.origin}: {name} must be a list of whole numbers")
    return items
