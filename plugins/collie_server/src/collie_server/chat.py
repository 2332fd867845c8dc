"""Chat in the terminal with a model folder, or with a server at a URL."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx2

HELP = """\
/reset          forget the conversation
/system TEXT    begin anew with an instruction; without TEXT, with none
/compare TEXT   ask both models, if there are two; neither question nor answers are remembered
/exit           end, as Ctrl-D does; Ctrl-C ends an answer"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Whom to talk to, and how answers are sampled."""
    parser.add_argument("model", metavar="DIR|URL", help="a model or adapter folder, a hub id, or http://host:port")
    parser.add_argument("--compare", metavar="DIR", help="another model, which /compare asks too; not with a URL")
    parser.add_argument("--token", metavar="X", help="of the server at the URL; default: the variable COLLIE_TOKEN")
    parser.add_argument("--system", metavar="TEXT", default="", help="an instruction before the conversation")
    parser.add_argument("--temperature", type=float, metavar="X", default=0.7, help="default: %(default)s")
    parser.add_argument("--top-p", type=float, metavar="X", default=1.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, metavar="N", help="default: other answers each time")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="the longest answer; default: as there is room")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that the folder brings")


def run(args: argparse.Namespace) -> int:
    """Talk until the end of input."""
    if args.model.startswith(("http://", "https://")):
        if args.compare is not None:
            from collie_core.api import RunError

            raise RunError("--compare: the server at the URL has the models; start it with --compare DIR")
        return _talk(args, args.model)
    with _served(args) as url:
        return _talk(args, url)


@contextmanager
def _served(args: argparse.Namespace) -> Iterator[str]:
    """A server of the folder that this process alone knows the token of."""
    import secrets

    from collie_core.api import serve
    from collie_server.http_config import HttpConfig
    from collie_server.serve import build, load

    args.token = secrets.token_urlsafe(24)
    folders = [args.model] if args.compare is None else [args.model, args.compare]
    loaded = []
    for folder in folders:
        print(f"loading {folder}", file=sys.stderr, flush=True)
        loaded.append(load(folder, trust_remote_code=args.trust_remote_code))
    places: list[str] = []
    failures: list[BaseException] = []
    settled, stop = threading.Event(), threading.Event()

    def announce(where: str) -> None:
        places.append(where)
        settled.set()

    def work() -> None:
        try:
            compare = loaded[1] if len(loaded) > 1 else None
            names = (args.model, args.compare or "")
            server = build(HttpConfig(port=0, token=args.token))
            serve(server, *loaded[0], compare=compare, names=names, ready=announce, stop=stop)
        except BaseException as error:  # noqa: BLE001 (raised again below, in the thread that waits)
            failures.append(error)
            settled.set()

    thread = threading.Thread(target=work, name="collie-model", daemon=True)
    thread.start()
    settled.wait()
    if failures:
        raise failures[0]
    try:
        yield places[0]
    finally:
        stop.set()
        thread.join(5)


def _talk(args: argparse.Namespace, url: str) -> int:
    import os

    import httpx2

    token = args.token or os.environ.get("COLLIE_TOKEN", "")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    timeout = httpx2.Timeout(10, read=600)
    with httpx2.Client(
        base_url=url.rstrip("/"), headers=headers, timeout=timeout, trust_env=url == args.model
    ) as client:
        return Conversation(client, args).run()


class Conversation:
    """The turns so far, and the loop that adds to them."""

    def __init__(self, client: httpx2.Client, args: argparse.Namespace) -> None:
        self._client = client
        options = {
            "temperature": args.temperature,
            "top_p": args.top_p,
            "seed": args.seed,
            "max_tokens": args.max_tokens,
        }
        self._options = {name: value for name, value in options.items() if value is not None}
        self._messages: list[dict[str, str]] = []
        self._begin(args.system)

    def run(self) -> int:
        """Read lines until the end of input or /exit."""
        if sys.stdin.isatty():
            _edit_lines()
            print("/exit ends the chat, /help says more")
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                print()
                continue
            if line == "/exit":
                return 0
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._turn(line)

    def _begin(self, system: str) -> None:
        self._messages = [{"role": "system", "content": system}] if system else []

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/reset":
            self._begin(next((turn["content"] for turn in self._messages if turn["role"] == "system"), ""))
        elif name == "/system":
            self._begin(rest.strip())
        elif name == "/compare" and rest.strip():
            self._compare(rest.strip())
        else:
            print(HELP)

    def _turn(self, line: str) -> None:
        """Ask, show the answer as it comes, and keep both unless there was none."""
        self._messages.append({"role": "user", "content": line})
        if answer := self._show(self._messages, self._options):
            self._messages.append({"role": "assistant", "content": answer})
        else:
            self._messages.pop()

    def _compare(self, line: str) -> None:
        """Show what each model answers, drawn with the same seed."""
        import random

        import httpx2

        try:
            models = self._client.get("/v1/models").raise_for_status().json()["data"]
        except httpx2.HTTPError as error:
            print(f"no answer from {self._client.base_url}: {error}")
            return
        if len(models) < 2:
            print("there is one model; start the chat or the server with --compare DIR, or a run with server.compare")
            return
        options = {"seed": random.getrandbits(32), **self._options}
        for model in models:
            print(f"[{model['id']}: {model['root']}]")
            self._show([*self._messages, {"role": "user", "content": line}], {**options, "model": model["id"]})

    def _show(self, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
        """Ask, show the answer as it comes, and give it."""
        answer, failure = "", ""
        try:
            for piece in self._answer(messages, options):
                print(piece, end="", flush=True)
                answer += piece
        except KeyboardInterrupt:
            failure = "(interrupted)"
        except OSError as error:
            failure = str(error)
        print(f"\n{failure}" if failure else "", flush=True)
        return answer

    def _answer(self, messages: list[dict[str, str]], options: dict[str, Any]) -> Iterator[str]:
        """The pieces of an answer.

        Raises:
            ConnectionError: there is none.
        """
        import httpx2

        body: dict[str, Any] = {"messages": messages, "stream": True, **options}
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise ConnectionError(_message(response))
                yield from _pieces(response)
        except httpx2.HTTPError as error:
            raise ConnectionError(f"no answer from {self._client.base_url}: {error}") from error


def _pieces(response: httpx2.Response) -> Iterator[str]:
    import json

    for line in response.iter_lines():
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            event = json.loads(data)
            if "error" in event:
                raise ConnectionError(event["error"]["message"])
            yield from (choice["delta"].get("content") or "" for choice in event["choices"])


def _message(response: httpx2.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.url} answers {response.status_code}"


def _edit_lines() -> None:
    """Arrow keys and history, where Python was built with them."""
    from importlib.util import find_spec

    if find_spec("readline"):
        import readline  # noqa: F401
