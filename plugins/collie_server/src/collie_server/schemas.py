"""What a client may ask: OpenAI's names, exact types, and nothing that would be ignored in silence."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

MOST_CHOICES = 16
MOST_PROMPTS = 64


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


def _whole_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a character: a surrogate without the other") from None
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]


class TextPart(_Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text | list[TextPart]

    @property
    def text(self) -> str:
        """The whole content."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    """Of a streamed answer."""

    include_usage: bool = Field(False, description="Count tokens in a chunk of its own, before the end.")


StopText = Annotated[Text, StringConstraints(min_length=1, max_length=200)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class _Request(_Strict):
    model: str | None = Field(None, description="As /v1/models names it.")
    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the likeliest token each time.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw from this probability mass.")
    top_k: int = Field(0, ge=0, le=1_000_000, description="Draw from so many tokens; 0: from all.")
    n: int = Field(1, ge=1, le=MOST_CHOICES, description="Answers to each prompt.")
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="The same seed draws the same answer. Default: another each time."
    )
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = Field(
        None, description="Texts at which an answer ends; they are not part of it."
    )
    stream: bool = Field(False, description="Send the answer as server-sent events while it is written.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    user: str | None = Field(None, max_length=512, description="Accepted, since many clients send it; not used.")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts as a list."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ErrorBody(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None = Field(description="The field, as messages.0.role.")
    code: str | None


class ErrorAnswer(BaseModel):
    """The answer to a request that is refused."""

    error: ErrorBody


class ChatRequest(_Request):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1, max_length=10_000)
    max_tokens: int | None = Field(None, ge=1, description="The longest answer. Default: as long as there is room.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")
    logprobs: bool = Field(False, description="Name the probability of each token.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="And of so many likeliest ones; with logprobs.")


class CompletionRequest(_Request):
    """POST /v1/completions"""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MOST_PROMPTS)]
    ) = Field(description="A text, several, or the same as token ids.")
    max_tokens: int = Field(16, ge=1, description="The longest answer.")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Name the probability of each token, and so many others."
    )

    @property
    def prompts(self) -> list[str | list[int]]:
        """One item for each prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        return [ids] if ids else [item for item in self.prompt if not isinstance(item, int)]
