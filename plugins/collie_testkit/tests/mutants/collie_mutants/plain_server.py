"""A server of the standard library, which is right, and what is wrong in one way each."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from typing import Any, ClassVar

import torch

from collie_core.api import Served


class Handler(BaseHTTPRequestHandler):
    wrong: ClassVar[tuple[type[Exception], ...]] = (KeyError, TypeError, ValueError)

    def do_POST(self) -> None:
        try:
            status, answer = 200, self.completion(self.body())
        except self.wrong as error:
            status, answer = 400, {"error": {"message": str(error)}}
        self.reply(status, answer)

    def body(self) -> Any:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def completion(self, body: Any) -> dict[str, Any]:
        prompt, most = body["prompt"], body.get("max_tokens", 16)
        pieces = self.pieces(prompt, most)
        ended = "length" if len(pieces) > most else "stop"
        return {"object": "text_completion", "choices": [{"index": 0, "text": "".join(pieces), "finish_reason": ended}]}

    def pieces(self, prompt: Any, most: Any) -> list[str]:
        """One for each token, and the end."""
        served: Served = self.server.served  # type: ignore[attr-defined]
        return list(served.model.answer(prompt, max_tokens=most))

    def reply(self, status: int, answer: Any) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class Plain:
    handler: ClassVar[type[Handler]] = Handler
    kind: ClassVar[type[HTTPServer]] = HTTPServer

    def __init__(self, port: int = 8000) -> None:
        self.http = self.kind(("127.0.0.1", port), self.handler)

    def serve(self, served: Served, ready: Callable[[str], None]) -> None:
        self.http.served = served  # type: ignore[attr-defined]
        ready(f"http://127.0.0.1:{self.http.server_port}")
        self.http.serve_forever(poll_interval=0.05)
        self.http.server_close()

    def stop(self) -> None:
        self.http.shutdown()


class _Tidy(Handler):
    def pieces(self, prompt: Any, most: Any) -> list[str]:
        return [piece.upper() for piece in super().pieces(prompt, most)]


class TidiesUp(Plain):
    handler = _Tidy


class _Terse(Handler):
    def completion(self, body: Any) -> dict[str, Any]:
        return {"choices": [{"text": super().completion(body)["choices"][0]["text"]}]}


class Terse(Plain):
    handler = _Terse


class _Crashes(Handler):
    wrong = ()

    def handle(self) -> None:
        try:
            super().handle()
        except Exception:  # noqa: BLE001  (the connection ends without a word)
            self.close_connection = True


class CrashesOnRubbish(Plain):
    handler = _Crashes


class _Endless(Handler):
    def do_POST(self) -> None:
        try:
            body = self.body()
            if len(body["prompt"]) > 128:
                self.reply(500, {"error": {"message": "the context is full"}})
                return
            self.reply(200, self.completion(body))
        except self.wrong as error:
            self.reply(400, {"error": {"message": str(error)}})


class Endless(Plain):
    handler = _Endless


class _MixesUp(Handler):
    """Prompts lie in one place, for whoever comes first."""

    one = threading.Lock()

    def pieces(self, prompt: Any, most: Any) -> list[str]:
        self.server.prompt = prompt  # type: ignore[attr-defined]
        time.sleep(0.1)
        with self.one:
            return super().pieces(self.server.prompt, most)  # type: ignore[attr-defined]


class MixesUp(Plain):
    handler = _MixesUp
    kind = ThreadingHTTPServer


class _Offended(Handler):
    offended = False

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length)
        if len(body) < length or _Offended.offended:
            _Offended.offended = True
            self.reply(503, {"error": {"message": "somebody left"}})
            return
        try:
            self.reply(200, self.completion(json.loads(body)))
        except self.wrong as error:
            self.reply(400, {"error": {"message": str(error)}})


class EasilyOffended(Plain):
    handler = _Offended


class _Counted(Handler):
    def do_POST(self) -> None:
        self.server.asked = getattr(self.server, "asked", 0) + 1  # type: ignore[attr-defined]
        super().do_POST()


class Stays(Plain):
    """Until it has answered twice."""

    handler = _Counted

    def stop(self) -> None:
        if getattr(self.http, "asked", 0) > 1:
            super().stop()


class _Itself(Handler):
    """Runs the model of one process, which the `rows` of several ranks do not have."""

    def pieces(self, prompt: Any, most: Any) -> list[str]:
        served: Served = self.server.served  # type: ignore[attr-defined]
        tokenizer, model = served.model.tokenizer, served.model._batch._model  # type: ignore[attr-defined]
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        if ids.shape[1] >= served.model.context:
            raise ValueError("the prompt is too long")
        found = model.generate(ids, max_new_tokens=most, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        return [*tokenizer.batch_decode(found[:, None], skip_special_tokens=True), *[""] * (1 not in found)]


class AsksByItself(Plain):
    handler = _Itself
