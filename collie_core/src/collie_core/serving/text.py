"""New tokens to text as they come: whole characters only, and nothing that may turn out to begin a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # how the decoder writes bytes that are no character, or not yet


class TextStream:
    """The text of one answer, token by token. What is given out, joined, is the whole answer.

    Args:
        decode: token ids to text without special tokens.
        stop: texts at which the answer ends; they are not part of it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = stop
        self._ids: list[int] = []
        self._context = 0  # first id of the last piece: decoders look at what stands before, e.g. for a space
        self._read = 0  # ids whose text is known
        self._held = ""
        self.stopped = False  # a stop text has come

    def push(self, token: int) -> str:
        """The text that is certain with this token, often none."""
        self._ids.append(token)
        return self._release(self._next(finish=False), finish=False)

    def finish(self) -> str:
        """The rest of the text, when no token comes any more."""
        return self._release(self._next(finish=True), finish=True)

    def _next(self, *, finish: bool) -> str:
        if self._read == len(self._ids):
            return ""
        text = self._decode(self._ids[self._context :])
        if text.endswith(UNFINISHED) and not finish:
            return ""
        known = self._decode(self._ids[self._context : self._read])
        self._context, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def _release(self, text: str, *, finish: bool) -> str:
        if self.stopped:
            return ""
        held = self._held + text
        end = min((place for place in map(held.find, self._stop) if place >= 0), default=None)
        if end is not None:
            self.stopped, self._held = True, ""
            return held[:end]
        kept = 0 if finish else max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
