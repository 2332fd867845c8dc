"""What every request passes before anything is read of it: is it from here, does it know the token, is it too large."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from collie_server.errors import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/", "/docs", "/openapi.json", "/health"})  # nothing of the model or of anybody's texts is told there
BODY_SECONDS = 30.0  # for the whole body: a client that sends a byte now and then must not hold a connection


def is_local(host: str) -> bool:
    """Whether a host name or address is this machine itself."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """Middleware of ASGI around the application.

    Args:
        app: what answers.
        token: what clients must know; None: nothing, and then only requests addressed to this machine are answered,
            since a page of the web may have its name resolved to this machine (DNS rebinding).
        max_body_bytes: the largest body.
    """

    def __init__(self, app: App, *, token: str | None, max_body_bytes: int) -> None:
        self._app = app
        self._token = None if token is None else token.encode()
        self._limit = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            self._check_origin(headers)
            self._check_token(scope["path"], headers)
            body = await self._body(headers, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, _replayed(body, receive), send)

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        if self._token is not None:  # no page knows it but ours, and browsers do not add it by themselves
            return
        host = headers.get(b"host", b"").decode("latin-1")
        if not is_local(_name(f"//{host}")):
            raise ApiError(403, "this server answers only under the name of this machine, as 127.0.0.1", code="host")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin.partition("://")[2] != host:
            raise ApiError(403, "pages of other sites may not use this server", code="origin")

    def _check_token(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._token is None or path in OPEN:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._token):
            raise ApiError(
                401,
                "this server needs its token: Authorization: Bearer TOKEN",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and (len(length) > 18 or int(length) > self._limit):
            raise self._too_large()
        try:
            return await asyncio.wait_for(self._read(receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self._limit:
                raise self._too_large()
            if not message.get("more_body"):  # a disconnect has none either
                return bytes(body)

    def _too_large(self) -> ApiError:
        message = f"the body has more than {self._limit} bytes"
        # What is left of the body is not read, so no other request can follow on this connection.
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body that was read already, then whatever follows: that the client has gone."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
