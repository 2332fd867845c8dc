"""The server through a real socket."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
import torch
from small_models import tiny

Client = httpx2.Client
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


def events(response: httpx2.Response) -> list[Any]:
    """The data of server-sent events, the last of which says that it is the last."""
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def streamed(client: Client, path: str, body: dict[str, Any]) -> list[Any]:
    with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return events(response)


def texts(chunks: list[Any], *, chat: bool) -> dict[int, str]:
    joined: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            piece = choice["delta"]["content"] if chat else choice["text"]
            joined[choice["index"]] = joined.get(choice["index"], "") + piece
    return joined


def greedy(small: Any, text: str, count: int) -> str:
    ids = torch.tensor([small.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        output = small.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
    return str(small.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def test_a_completion_is_what_generate_writes(client: Client, small: Any) -> None:
    body = {"model": "small", "prompt": ["a b", "some more text"], "temperature": 0, "max_tokens": 20}
    answer = client.post(TEXT, json=body).json()
    assert answer["object"] == "text_completion"
    assert [choice["text"] for choice in answer["choices"]] == [greedy(small, text, 20) for text in body["prompt"]]
    assert answer["usage"]["prompt_tokens"] == len("a b") + len("some more text")
    assert answer["usage"]["completion_tokens"] <= 40
    ids = [small.tokenizer(text)["input_ids"] for text in body["prompt"]]
    again = client.post(TEXT, json=body | {"prompt": ids}).json()
    assert again["choices"] == answer["choices"]


def test_a_chat_goes_through_the_template(client: Client, small: Any) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    answer = client.post(CHAT, json={"messages": messages, "temperature": 0, "max_tokens": 9}).json()
    choice = answer["choices"][0]
    assert choice["message"] == {
        "role": "assistant",
        "content": greedy(small, "<system>s<eos><user>hi<eos><assistant>", 9),
    }
    assert choice["finish_reason"] in ("length", "stop")
    assert answer["model"] == "small"


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("more", [{"temperature": 0}, {"seed": 1, "n": 3}, {"seed": 2, "stop": ["a", "bc", "xyz"]}])
def test_a_stream_joined_is_the_answer(client: Client, chat: bool, more: dict[str, Any]) -> None:
    body = {"max_tokens": 40, **({"messages": HELLO} if chat else {"prompt": "hello"}), **more}
    path = CHAT if chat else TEXT
    whole = client.post(path, json=body).json()
    chunks = streamed(client, path, body | {"stream_options": {"include_usage": True}})
    wanted = {one["index"]: one["message"]["content"] if chat else one["text"] for one in whole["choices"]}
    assert texts(chunks, chat=chat) == wanted
    ends = {one["index"]: one["finish_reason"] for chunk in chunks for one in chunk["choices"] if one["finish_reason"]}
    assert ends == {one["index"]: one["finish_reason"] for one in whole["choices"]}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_seed_is_reproducible_and_no_seed_is_not(client: Client) -> None:
    body = {"prompt": "x", "max_tokens": 30, "n": 2}
    one, two, other = (client.post(TEXT, json=body | seed).json()["choices"] for seed in ({"seed": 7}, {"seed": 7}, {}))
    assert one == two
    assert other != one
    assert one[0]["text"] != one[1]["text"]
    assert client.post(TEXT, json={"prompt": "x", "max_tokens": 30, "seed": 7}).json()["choices"] == one[:1]


def test_probabilities_of_tokens(client: Client) -> None:
    body = {"messages": HELLO, "temperature": 0, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    content = client.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 4
    assert all(one["logprob"] == one["top_logprobs"][0]["logprob"] <= 0 for one in content)
    assert [len(one["top_logprobs"]) for one in content] == [2] * 4
    parts = [one["choices"][0]["logprobs"] for one in streamed(client, CHAT, body)]
    assert [entry for part in parts if part for entry in part["content"]] == content
    named = client.post(TEXT, json={"prompt": "x", "temperature": 0, "max_tokens": 4, "logprobs": 3}).json()
    logprobs = named["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == 4
    assert [max(top.values()) for top in logprobs["top_logprobs"]] == logprobs["token_logprobs"]


def test_many_clients_at_once_get_their_own_answers(client: Client, small: Any) -> None:
    prompts = [f"client {number} " * (1 + number % 5) for number in range(32)]
    wanted = [greedy(small, prompt, 24) for prompt in prompts]

    def ask(prompt: str) -> str:
        with Client(base_url=client.base_url, timeout=60, trust_env=False) as own:
            body = {"prompt": prompt, "temperature": 0, "max_tokens": 24}
            return texts(streamed(own, TEXT, body), chat=False)[0]

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, prompts)) == wanted


MALFORMED: list[tuple[str, Any, int, str | None]] = [
    (CHAT, b"", 400, None),
    (CHAT, b"{", 400, None),
    (CHAT, b'{"messages": "\xff\xfe"}', 400, None),
    (CHAT, b"[" * 100_000, 400, None),
    (CHAT, b'{"messages": ' + b"9" * 6000 + b"}", 400, None),
    (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "messages.0.content"),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', 400, "temperature"),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "\\ud800": 1}', 400, None),
    (TEXT, b'{"prompt": "a", "stop": "\\ud800"}', 400, "stop"),
    (CHAT, [], 400, None),
    (CHAT, {}, 400, "messages"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": None}, 400, "messages"),
    (CHAT, {"messages": [{"role": "robot", "content": "a"}]}, 400, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": 1}]}, 400, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content.0.type"),
    (CHAT, {"messages": [{"role": "user", "content": "refuse"}]}, 400, "messages"),
    (CHAT, {"messages": HELLO, "max_tokens": 0}, 400, "max_tokens"),
    (CHAT, {"messages": HELLO, "max_tokens": 1.5}, 400, "max_tokens"),
    (CHAT, {"messages": HELLO, "max_tokens": True}, 400, "max_tokens"),
    (CHAT, {"messages": HELLO, "max_tokens": 10**30}, 400, "max_tokens"),
    (CHAT, {"messages": HELLO, "max_tokens": 100_000}, 400, "max_tokens"),
    (CHAT, {"messages": HELLO, "max_completion_tokens": 100_000}, 400, "max_completion_tokens"),
    (CHAT, {"messages": HELLO, "temperature": "hot"}, 400, "temperature"),
    (CHAT, {"messages": HELLO, "temperature": -1}, 400, "temperature"),
    (CHAT, {"messages": HELLO, "top_p": 0}, 400, "top_p"),
    (CHAT, {"messages": HELLO, "n": 0}, 400, "n"),
    (CHAT, {"messages": HELLO, "n": 1000}, 400, "n"),
    (CHAT, {"messages": HELLO, "seed": 2**64}, 400, "seed"),
    (CHAT, {"messages": HELLO, "stop": ""}, 400, "stop"),
    (CHAT, {"messages": HELLO, "stop": ["a", 1]}, 400, "stop.1"),
    (CHAT, {"messages": HELLO, "stream": "yes"}, 400, "stream"),
    (CHAT, {"messages": HELLO, "stream_options": {}}, 400, "stream_options"),
    (CHAT, {"messages": HELLO, "top_logprobs": 2}, 400, "top_logprobs"),
    (CHAT, {"messages": HELLO, "tools": []}, 400, "tools"),
    (CHAT, {"messages": HELLO, "model": "another"}, 404, "model"),
    (CHAT, {"messages": [{"role": "user", "content": "long " * 100}]}, 400, "messages"),
    (TEXT, {"prompt": ""}, 400, "prompt"),
    (TEXT, {"prompt": []}, 400, "prompt"),
    (TEXT, {"prompt": [300]}, 400, "prompt"),
    (TEXT, {"prompt": [-1]}, 400, "prompt.0"),
    (TEXT, {"prompt": {}}, 400, "prompt"),
    (TEXT, {"prompt": ["a", "\ud800"]}, 400, "prompt.1"),
    (TEXT, {"prompt": "a" * 256}, 400, "prompt"),
    (TEXT, {"prompt": "a" * 200, "max_tokens": 100}, 400, "max_tokens"),
    (TEXT, {"prompt": "a", "echo": True}, 400, "echo"),
    (TEXT, {"prompt": "a", "logprobs": True}, 400, "logprobs"),
    (TEXT, b'{"prompt": "' + b"a" * 1_100_000 + b'"}', 413, None),
    ("/v1/nothing", {}, 404, None),
    ("/v1/models", {}, 405, None),
]


@pytest.mark.parametrize(("path", "body", "status", "field"), MALFORMED, ids=range(len(MALFORMED)))
def test_what_is_wrong_is_said_and_never_a_failure(
    client: Client, path: str, body: Any, status: int, field: str | None
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, field), answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert field is None or field.split(".")[0] in error["message"] or field == "model"


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", ""])
def test_another_content_type_is_refused(client: Client, kind: str) -> None:
    body = json.dumps({"messages": HELLO}).encode()
    answer = client.post(CHAT, content=body, headers={"Content-Type": kind})
    assert answer.status_code == 400
    assert "error" in answer.json()


def test_a_body_without_a_length_is_limited_too(client: Client) -> None:
    def endless() -> Any:
        for _ in range(30):
            yield b"x" * 100_000

    try:
        status = client.post(TEXT, content=endless()).status_code
    except (httpx2.WriteError, httpx2.ReadError):  # refused while it was still being sent
        status = 413
    assert status == 413


def test_what_is_no_http_does_no_harm(client: Client) -> None:
    for rubbish in (
        b"\x16\x03\x01\x00\xa5",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n",
    ):
        with socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=5) as raw:
            raw.sendall(rubbish)
            assert raw.recv(1000).startswith(b"HTTP/1.1 40")
    assert client.get("/health").json()["status"] == "ok"


def test_models_health_metrics_and_pages(client: Client) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["root"], model["chat"]) == ("small", "model", True)
    assert client.get("/run").json() == {"run": None, "logged": 0, "rows": []}
    refused = client.get("/run?after=-1")
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "query.after"
    assert client.get("/health").status_code == 200
    client.post(TEXT, json={"prompt": "x"})
    metrics = client.get("/metrics").text
    assert 'collie_requests_total{path="/v1/completions",status="200"}' in metrics
    assert "collie_running 0.0" in metrics
    assert "/v1/chat/completions" in client.get("/openapi.json").json()["paths"]
    for path in ("/", "/docs"):
        page = client.get(path)
        assert page.headers["content-type"].startswith("text/html")
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
        outside = [line for line in page.text.splitlines() if "http://" in line or "https://" in line]
        assert not outside, "a page needs something from elsewhere"


def test_pages_of_other_sites_are_kept_out(client: Client) -> None:
    body = {"prompt": "x"}
    assert client.post(TEXT, json=body, headers={"Origin": "http://evil.example"}).status_code == 403
    assert client.post(TEXT, json=body, headers={"Host": "evil.example"}).status_code == 403
    assert client.post(TEXT, json=body, headers={"Origin": str(client.base_url).rstrip("/")}).status_code == 200
    assert "access-control-allow-origin" not in client.options(TEXT, headers={"Origin": "http://a.example"}).headers


def test_a_token_is_needed_where_there_is_one(serve: Callable[..., Any]) -> None:
    one = serve(token="secret")
    with Client(base_url=one.url, trust_env=False) as client:
        body = {"prompt": "x", "max_tokens": 2}
        for header in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": b"Bearer \xff"},
        ):
            answer = client.post(TEXT, json=body, headers=header)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert client.get("/metrics", headers=header).status_code == 401
        assert client.post(TEXT, json=body, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client.get("/health").status_code == client.get("/").status_code == 200


def test_another_address_gets_a_token_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from collie_server.server import HttpServer

    assert (
        HttpServer(host="127.0.0.1").token is HttpServer(host="localhost").token is HttpServer(host="::1").token is None
    )
    made = {HttpServer(host=host).token for host in ("0.0.0.0", "::", "192.0.2.1", "example.org")}
    assert len(made) == 4
    assert all(token and len(token) > 30 for token in made)
    monkeypatch.setenv("COLLIE_TOKEN", "known")
    assert HttpServer(host="0.0.0.0").token == HttpServer(host="127.0.0.1").token == "known"
    assert HttpServer(host="0.0.0.0", token="own").token == "own"


def load(client: Client) -> tuple[int, int]:
    health = client.get("/health").json()
    return health["running"], health["waiting"]


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def slow(small: Any) -> Any:
    """The model, a step of which takes a while, so that answers are still growing when something happens."""

    class Slow(type(small.model)):  # type: ignore[misc]
        def forward(self, *args: Any, **options: Any) -> Any:
            time.sleep(0.02)
            return super().forward(*args, **options)

    slow = Slow(small.model.config).eval()
    slow.load_state_dict(small.model.state_dict())
    slow.generation_config.eos_token_id = small.tokenizer.eos_token_id
    return slow


LONG = {"prompt": "x", "max_tokens": 240, "temperature": 0, "stop": "never this"}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_slot(serve: Callable[..., Any], slow: Any, stream: bool) -> None:
    one = serve(slow, slots=1)
    with Client(base_url=one.url, trust_env=False) as client:
        body = json.dumps(LONG | {"stream": stream}).encode()
        head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw = socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=5)
        raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: load(client) == (1, 0))
        raw.close()
        until(lambda: load(client) == (0, 0), 2)


def test_a_full_queue_says_when_to_come_again(serve: Callable[..., Any], slow: Any) -> None:
    one = serve(slow, slots=1, queue=1)
    with Client(base_url=one.url, timeout=30, trust_env=False) as client, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(httpx2.post, one.url + TEXT, json=LONG | {"max_tokens": 60}, timeout=30) for _ in "12"]
        until(lambda: load(client) == (1, 1))
        answer = client.post(TEXT, json=LONG)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert [one.result().status_code for one in waiting] == [200, 200]
        assert client.post(TEXT, json={"prompt": "x"}).status_code == 200
        assert client.post(TEXT, json={"prompt": "x", "n": 3}).json()["error"]["param"] == "n"


def test_time_is_limited(serve: Callable[..., Any], slow: Any) -> None:
    one = serve(slow, timeout=0.3)
    with Client(base_url=one.url, trust_env=False) as client:
        assert client.post(TEXT, json=LONG).status_code == 504
        with client.stream("POST", TEXT, json=LONG | {"stream": True}) as response:
            last = [line for line in response.iter_lines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"


def test_slow_readers_block_nobody(serve: Callable[..., Any], small: Any) -> None:
    one = serve(slots=4)
    with Client(base_url=one.url, trust_env=False, timeout=20) as client:
        address = (client.base_url.host, client.base_url.port or 0)
        body = json.dumps(LONG | {"stream": True, "logprobs": 20, "n": 4}).encode()
        raws = []
        for _ in range(3):  # together they would fill all slots for ever, if a slot waited for its reader
            raw = socket.socket()
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            raw.connect(address)
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            raws.append(raw)
        assert client.post(TEXT, json={"prompt": "a b", "temperature": 0, "max_tokens": 9}).status_code == 200
        until(lambda: load(client) == (0, 0))
        for raw in raws:
            raw.close()


def test_stopping_ends_open_streams_quickly(serve: Callable[..., Any], slow: Any) -> None:
    one = serve(slow)
    seen: list[str] = []

    def read() -> None:
        with httpx2.stream("POST", one.url + TEXT, json=LONG | {"stream": True}, timeout=20) as response:
            seen.extend(line for line in response.iter_lines() if line)

    reader = threading.Thread(target=read)
    reader.start()
    with Client(base_url=one.url, trust_env=False) as client:
        until(lambda: load(client) == (1, 0))
        start = time.monotonic()
        one.stop.set()
        one.thread.join(5)
        assert not one.thread.is_alive()
        assert time.monotonic() - start < 5
    reader.join(5)
    assert json.loads(seen[-1].removeprefix("data: "))["error"]["code"] == "closed"


def test_the_official_client(running: Any) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["small"]
        options = {"model": "small", "temperature": 0, "max_tokens": 12}
        whole = client.chat.completions.create(messages=HELLO, **options)
        stream = client.chat.completions.create(messages=HELLO, stream=True, **options)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.choices[0].message.content
        assert whole.usage.completion_tokens <= 12
        assert client.completions.create(prompt="a b", logprobs=2, **options).choices[0].logprobs.tokens
        with pytest.raises(openai.BadRequestError, match="tools"):
            client.chat.completions.create(messages=HELLO, tools=[], **options)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(messages=HELLO, model="another")


def test_two_models_have_names(serve: Callable[..., Any], small: Any) -> None:
    other = tiny(small.tokenizer, rope_theta=100.0)
    one = serve(compare=(other, small.tokenizer), model_name="small")
    body = {"prompt": "hello", "max_tokens": 12, "temperature": 0}
    with Client(base_url=one.url, trust_env=False, timeout=20) as client:
        names = ["small", "compare"]
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == names
        answers = [client.post(TEXT, json=body | {"model": name}).json() for name in names]
        assert [answer["model"] for answer in answers] == names
        assert answers[0]["choices"][0]["text"] == greedy(small, "hello", 12)
        assert answers[1]["choices"][0]["text"] == greedy(small._replace(model=other), "hello", 12)
        assert "collie_step" not in answers[0]
        refused = client.post(TEXT, json=body | {"model": "third"})
        assert refused.status_code == 404
        assert "the models served here are 'small' and 'compare'" in refused.json()["error"]["message"]


def test_no_text_is_logged(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        client.post(CHAT, json={"messages": [{"role": "user", "content": "confidential"}], "max_tokens": 3})
        client.post(CHAT, json={"messages": [{"role": "user", "content": "confidential"}], "max_tokens": 3000})
    assert "1 answers" in caplog.text
    assert "confidential" not in caplog.text
