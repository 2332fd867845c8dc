"""From a request to what the engine works on: token ids within the limits, and how each answer is to be sampled."""

from __future__ import annotations

import copy
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from collie_core.api import Sampling
from collie_server.errors import ApiError
from collie_server.schemas import ChatRequest, CompletionRequest, Message


@dataclass(frozen=True)
class Limits:
    """What a prompt and an answer may have.

    Attributes:
        context: tokens of prompt and answer together.
        prompt: tokens of the prompt.
        new: tokens of the answer.
        vocabulary: token ids are below.
    """

    context: int
    prompt: int
    new: int
    vocabulary: int


class Prompts:
    """Encodes prompts and names tokens; encoding may take long and is safe to call from any thread."""

    def __init__(self, tokenizer: Any, limits: Limits) -> None:
        self.limits = limits
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # one tokenizer cannot encode for two threads at once
        self._names = copy.deepcopy(tokenizer)  # so that naming a token never waits for a long prompt

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return bool(self._tokenizer.chat_template)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """The token ids before the assistant's next turn.

        Raises:
            ApiError: there is no chat template, it refuses the messages, or they are too long.
        """
        if not self.chats:
            raise ApiError(400, "this model has no chat template; use /v1/completions", param="messages")
        turns = [{"role": message.role, "content": message.text} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise ApiError(400, f"the model's chat template refuses the messages: {error}", param="messages") from error
        return self._checked(self._encode(str(text), special=False), "messages")

    def completion(self, prompt: str | Sequence[int]) -> list[int]:
        """The token ids of a prompt.

        Raises:
            ApiError: it is empty or too long, or holds ids that the model does not have.
        """
        ids = self._encode(prompt, special=True) if isinstance(prompt, str) else list(prompt)
        if max(ids, default=0) >= self.limits.vocabulary:
            raise ApiError(400, f"prompt: token ids must be below {self.limits.vocabulary}", param="prompt")
        return self._checked(ids, "prompt")

    def name(self, token: int) -> str:
        """A token as text."""
        return str(self._names.decode([token]))

    def _encode(self, text: str, *, special: bool) -> list[int]:
        with self._lock:
            ids = list(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        # Some tokenizers close every text; this one goes on.
        return ids[:-1] if ids and ids[-1] == self._tokenizer.eos_token_id else ids

    def _checked(self, ids: list[int], field: str) -> list[int]:
        if not ids:
            raise ApiError(400, f"{field}: the prompt is empty, and nothing stands before its first token", param=field)
        longest = min(self.limits.prompt, self.limits.context - 1)
        if len(ids) > longest:
            message = f"{field}: the prompt has {len(ids)} tokens and may have {longest}"
            raise ApiError(400, message, param=field, code="context_length_exceeded")
        return ids


def sampling_of(
    request: ChatRequest | CompletionRequest, prompts: Sequence[Sequence[int]], limits: Limits
) -> list[Sampling]:
    """How each answer is sampled: the answers to the first prompt, then those to the next.

    Raises:
        ApiError: they may become longer than there is room for.
    """
    ways: list[Sampling] = []
    for prompt in prompts:
        seed = secrets.randbits(62) if request.seed is None else request.seed
        for number in range(request.n):
            way = Sampling(
                max_tokens=_max_tokens(request, len(prompt), limits),
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=request.top_k,
                seed=seed + number,
                stop=request.stops,
                logprobs=_logprobs(request),
            )
            ways.append(way)
    return ways


def _max_tokens(request: ChatRequest | CompletionRequest, prompt: int, limits: Limits) -> int:
    room = min(limits.new, limits.context - prompt)
    given = [name for name in ("max_completion_tokens", "max_tokens") if name in request.model_fields_set]
    given = [name for name in given if getattr(request, name) is not None]
    if not given:
        return min(room, request.max_tokens or room)
    asked = int(getattr(request, given[0]))
    if asked > room:
        message = f"{given[0]}: after a prompt of {prompt} tokens an answer may have {room}"
        raise ApiError(400, message, param=given[0], code="context_length_exceeded")
    return asked


def _logprobs(request: ChatRequest | CompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs: only together with logprobs: true", param="top_logprobs")
    return (request.top_logprobs or 0) if request.logprobs else None
