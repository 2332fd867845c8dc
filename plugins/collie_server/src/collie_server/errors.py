"""Errors as OpenAI's interface words them: a message, the kind, and the field that is meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

UNWRITTEN = ("body", "str", "constrained-str")
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a client is told.

    Args:
        status: of HTTP.
        message: for a person; it never repeats what the client sent.
        param: the field, as `messages.0.role`.
        code: for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        message = _plain(message, 2000)
        self.status = status
        self.headers = dict(headers or {})
        kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """As an answer of HTTP."""
        return JSONResponse(self.body, self.status, self.headers)


def invalid(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """The error of a body that pydantic refuses: of several alternatives for a value, the one it is nearest to."""
    problem = max(problems, key=lambda one: (len(_path(one)), not one["type"].endswith("_type")))
    if problem["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON", code="invalid_json")
    where = ".".join(_path(problem))
    rule = "is not a field of this request" if problem["type"] == "extra_forbidden" else str(problem["msg"])
    return ApiError(400, f"{where or 'the body'}: {rule}", param=where or None, code=str(problem["type"]))


def _path(problem: Mapping[str, Any]) -> list[str]:
    """What leads to a value, without names of alternatives, which nobody has written: `stop.constrained-str`."""
    *before, last = problem["loc"] or ("",)
    known = [part for part in before if _written(part)]
    if problem["type"] == "extra_forbidden" or _written(last):
        known.append(last)
    return [_plain(str(part), 100) for part in known if part != ""]


def _written(part: object) -> bool:
    return isinstance(part, int) or (isinstance(part, str) and "[" not in part and part not in UNWRITTEN)


def _plain(text: str, limit: int) -> str:
    """What can be sent as UTF-8: JSON can name half a character, which then stands in a key."""
    return text[:limit].encode(errors="replace").decode()
