"""A server beside a training run: who asks, and on how many ranks the model lies, changes nothing in the training."""

from __future__ import annotations

import importlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from combos import more
from fake_dists import write_distribution
from runs import changed, sections_on
from served_runs import SERVER, Crowd, long_run
from topologies import world_size_of

from collie_core.api import ConfigError, Run, RunConfig, Trainer
from collie_core.cli import main

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = [f"Count to {number}: " * (1 + number % 3) for number in range(1, 21)]
ASKED = (2, 5)  # steps before which all prompts are asked
TOKENS = 8


class Losses:
    """The loss of every step, bit by bit."""

    def __init__(self) -> None:
        self.losses: list[str] = []

    def collie_after_step(self, loss: Any) -> None:
        self.losses.append(float(loss).hex())


class Asking(Losses):
    """Before some steps it asks everything and waits until all of it waits; after them it asks `generate` as well."""

    def __init__(self) -> None:
        super().__init__()
        self.trainer: Any = None
        self.url = ""
        self.pool = ThreadPoolExecutor(2 * len(PROMPTS) + 4)
        self.open: list[Future[list[dict[str, Any]]]] = []
        self.found: list[tuple[int, list[str], list[list[dict[str, Any]]]]] = []

    def collie_run_start(self, run: Run) -> None:
        self.url = str(run.facts.get("server", ""))

    def collie_before_step(self, run: Run) -> None:
        if run.step + 1 in ASKED and run.topology.is_main:
            bodies = [body(prompt, stream=stream) for prompt in PROMPTS for stream in (False, True)]
            bodies += [body(prompt, stream=False, model="compare") for prompt in PROMPTS[:4]]
            self.open = [self.pool.submit(ask, self.url, one) for one in bodies]
            until(lambda: get(self.url, "/health")["waiting"] == len(bodies))
            time.sleep(0.3)  # which earns the answers ten times as long

    def collie_after_step(self, run: Run, loss: Any) -> None:
        super().collie_after_step(loss)
        if run.step in ASKED:
            answers = [one.result(60) for one in self.open]
            self.found.append((run.step, expected(self.trainer, PROMPTS, TOKENS), answers))


def body(prompt: str, *, stream: bool, tokens: int = TOKENS, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": stream, **more}


def get(url: str, path: str) -> Any:
    with urlopen(url + path, timeout=10) as response:
        return json.load(response)


def ask(url: str, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of an answer, one where it is not streamed."""
    request = Request(f"{url}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as response:
        if not asked["stream"]:
            answer = json.load(response)
            assert response.headers["Collie-Step"] == (None if asked.get("model") else str(answer["collie_step"]))
            return [answer]
        lines = [line.decode().removeprefix("data: ").strip() for line in response if line.strip()]
    assert lines[-1] == "[DONE]", lines[-1]
    return [json.loads(line) for line in lines[:-1]]


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def expected(trainer: Trainer, prompts: list[str], tokens: int) -> list[str]:
    """What transformers' `generate` writes with the weights of this moment. Collective."""
    from collie_core.generate import generate

    tokenizer = trainer.parts.tokenizer
    ids = [[*tokenizer(prompt)["input_ids"]] for prompt in prompts]
    ids = [one[:-1] if one[-1] == tokenizer.eos_token_id else one for one in ids]
    model: Any = trainer.model
    with trainer.parts.precision():
        found = generate(model, tokenizer, ids, max_new_tokens=tokens, synced=trainer.config.parallel.zero_stage == 3)
    return [str(tokenizer.decode(one, skip_special_tokens=True)) for one in found]


HARD = {"train.seed": 11, "model.gradient_checkpointing": "full", "data.num_workers": 0}


def quiet_and_asked(topology: str, model: Path, data: Path, output: Path, changes: dict[str, Any]) -> Any:
    """This rank's losses without a server and with one that is asked; and on the first one the answers."""

    def sections(name: str) -> dict[str, Any]:
        return changed(sections_on(topology, model, data, output / name, steps=6, micro_batch=4), {**HARD, **changes})

    quiet, asking = Losses(), Asking()
    Trainer(RunConfig(**sections("quiet")), callbacks=[quiet], observers=()).train()
    config = RunConfig(**sections("asked"), server=SERVER)
    asking.trainer = Trainer(config, callbacks=[asking], observers=())
    asking.trainer.train()
    return quiet.losses, asking.losses, asking.found


def check_answers(ranks: list[Any], base: Path) -> None:
    assert all(quiet == asked for quiet, asked, _ in ranks)
    assert len(ranks[0][0]) == 6
    found = ranks[0][2]
    assert [step for step, _, _ in found] == list(ASKED)
    for step, wanted, answers in found:
        asked = answers[:-4]
        assert [text_of(one) for one in asked[::2]] == wanted
        assert [text_of(one) for one in asked[1::2]] == wanted, "streamed answers"
        assert {(chunk["collie_first_step"], chunk["collie_step"]) for one in asked for chunk in one} == {(step, step)}
        assert [text_of(one) for one in answers[-4:]] == stock(base, PROMPTS[:4], TOKENS), "the model before the run"
    assert found[0][1] != found[1][1], "the weights have not changed"


def stock(folder: Path, prompts: list[str], tokens: int) -> list[str]:
    """What transformers' own model writes, one prompt after the other."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        ids = ids[:, :-1] if ids[0, -1] == tokenizer.eos_token_id else ids
        with torch.no_grad():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
        found.append(str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)))
    return found


@pytest.fixture(scope="session")
def dropping(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with dropout in its attention."""
    folder = tmp_path_factory.mktemp("dropping") / "model"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    return folder


def test_answers_are_those_of_the_moment_and_training_does_not_notice(
    dropping: Path, instructions: Path, tmp_path: Path
) -> None:
    fast = {"optimizer.type": "adamw", "optimizer.lr": 0.01}
    check_answers([quiet_and_asked("tp1", dropping, instructions, tmp_path, fast)], dropping)


LORA = {"adapter.type": "lora", "adapter.r": 4, "adapter.lora_dropout": 0.1}
PROMPT = {"adapter.type": "prompt-tuning", "adapter.num_virtual_tokens": 3}
SEQUENCE = {"parallel.sequence_parallel": True}


@pytest.mark.parametrize(
    ("topology", "changes"),
    [
        ("tp2", {}),
        ("pp2", LORA),
        ("dp2zero3", {}),
        more("dp2", {}),
        more("dp2zero2", {}),
        more("dp2zero3", LORA),
        more("dp2tp2", {}),
        more("pp2", PROMPT),
        more("tp2", LORA),
        more("tp2", SEQUENCE),
        more("tp2pp2", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_ranks_answer_together(
    zygote: Any, dropping: Path, instructions: Path, tmp_path: Path, topology: str, changes: dict[str, Any]
) -> None:
    changes = changes | {"optimizer.type": "adamw", "optimizer.lr": 0.01}
    ranks = zygote.run(
        __file__,
        "quiet_and_asked",
        world_size=world_size_of(topology),
        args=(topology, dropping, instructions, tmp_path, changes),
    )
    check_answers(ranks, dropping)


def connected(url: str, asked: dict[str, Any], room: int = 65536) -> socket.socket:
    """A connection over which something has been asked."""
    raw, data = socket.socket(), json.dumps(asked).encode()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    raw.connect(("127.0.0.1", int(url.rpartition(":")[2])))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    raw.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
    return raw


def test_a_crowd_is_answered_while_the_run_goes_on(dropping: Path, instructions: Path, tmp_path: Path) -> None:
    """64 clients read streams, 50 go away in the midst of one, and 3 do not read theirs."""
    prompts = [f"client {number} says {'x' * (number % 7)}" for number in range(64)]
    seen: dict[str, Any] = {}

    def leave(url: str, number: int) -> None:
        with connected(url, body(f"leaving {number}", stream=True, tokens=400)) as raw:
            raw.recv(100)

    def scenario(url: str) -> list[list[dict[str, Any]]]:
        slow = [connected(url, body("slow", stream=True, tokens=200, logprobs=20), 2048) for _ in range(3)]
        with ThreadPoolExecutor(64) as many, ThreadPoolExecutor(50) as others:
            answers = [many.submit(ask, url, body(prompt, stream=True, tokens=24)) for prompt in prompts]
            for one in [others.submit(leave, url, number) for number in range(50)]:
                one.result()
            found = [one.result() for one in answers]
        until(lambda: get(url, "/health") == {"status": "ok", "running": 0, "waiting": 0})
        seen["run"], seen["models"] = get(url, "/run"), get(url, "/v1/models")["data"]
        for raw in slow:
            raw.close()
        return found

    crowd = Crowd(scenario)
    config = long_run(dropping, instructions, tmp_path, train_share=0.5, max_batch_size=32, compare=None)
    trainer = Trainer(config, callbacks=[crowd], observers=())
    trainer.train()
    found = crowd.result.result()
    assert [text_of(one) for one in found] == stock(dropping, prompts, 24)
    assert 0 < seen["run"]["run"]["step"] <= trainer.run.step < 100_000
    assert seen["run"]["run"]["output_dir"] == str(tmp_path / "run")
    assert {"step", "loss", "tokens_per_second"} <= set(seen["run"]["rows"][-1])
    assert seen["models"][0]["root"] == str(tmp_path / "run")


def test_an_answer_goes_on_over_several_steps(dropping: Path, instructions: Path, tmp_path: Path) -> None:
    """A share so small that a step pays for no whole pass."""
    crowd = Crowd(lambda url: ask(url, body(PROMPTS[0], stream=True, tokens=6)))
    config = long_run(dropping, instructions, tmp_path, train_share=0.02, compare=None)
    Trainer(config, callbacks=[crowd], observers=()).train()
    chunks = crowd.result.result()
    assert text_of(chunks) == stock(dropping, PROMPTS[:1], 6)[0]
    steps = [chunk["collie_step"] for chunk in chunks]
    assert steps == sorted(steps)
    assert steps[0] < steps[-1]
    assert {chunk["collie_first_step"] for chunk in chunks} == {chunks[0]["collie_first_step"]}


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outside package with a server of its own."""
    code = (ROOT / "tests" / "support" / "collie_terminal" / "collie_terminal.py").read_text()
    groups = {"collie.server": {"terminal": "collie_terminal:TERMINAL"}}
    write_distribution(tmp_path / "site", "collie-terminal", groups=groups, files={"collie_terminal.py": code})
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(("last", "reason"), [("", "it returned"), ("\n", "this one has 0")])
def test_another_server_takes_its_place_and_its_end_is_not_that_of_the_run(
    dropping: Path,
    instructions: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    last: str,
    reason: str,
) -> None:
    prompts = ["Count to 3: ", "Once"]
    (tmp_path / "lines").write_text("".join(f"{prompt}\n" for prompt in prompts) + last)

    def said() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "collie"]

    class UntilItEnds:
        def collie_after_step(self, run: Run) -> None:
            if said():
                run.request_stop()

    options = {"type": "terminal", "path": str(tmp_path / "lines"), "max_tokens": 9}
    sections = long_run(dropping, instructions, tmp_path).model_dump() | {"server": options | {"train_share": 0.5}}
    with caplog.at_level("WARNING", "collie"):
        Trainer(RunConfig.model_validate(sections), callbacks=[UntilItEnds()], observers=()).train()
    printed = capsys.readouterr().out
    wanted = stock(dropping, [prompt.rstrip() for prompt in prompts], 9)
    assert printed.count("[step ") == 2
    assert all(text in printed for text in wanted)
    (line,) = said()
    assert line.startswith("the server has ended by itself (")
    assert reason in line
    assert line.endswith("); training goes on without it")
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_a_port_that_is_taken_ends_the_run_before_it_writes(
    dropping: Path, instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = long_run(dropping, instructions, tmp_path, port=port, compare=None)
        path = tmp_path / "run.yaml"
        path.write_text(config.to_yaml())
        assert main(["train", str(path)]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"cannot listen on 127.0.0.1:{port}: ")
    assert not (tmp_path / "run").exists()


def test_the_section_is_validated(dropping: Path) -> None:
    wrong = {"type": "http", "port": -1, "train_share": 1, "timeout": "soon", "prot": 8000}
    with pytest.raises(ConfigError) as caught:
        RunConfig(model={"model_name_or_path": str(dropping)}, server=wrong)
    keys = {problem.key for problem in caught.value.problems}
    assert keys == {"server.port", "server.train_share", "server.timeout", "server.prot"}
    with pytest.raises(ConfigError, match=r"server.compare = 'base': the run begins with no saved model"):
        RunConfig(model={"config": {"model_type": "llama"}}, tokenizer="byte", server=SERVER)


def test_answers_take_their_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from collie_core.serving.beside import Allowance

    now = 0.0
    monkeypatch.setattr("collie_core.serving.beside.time.monotonic", lambda: now)
    allowance, answering, training = Allowance(0.2), 0.0, 0.0
    for _ in range(100):
        now, training = now + 1.0, training + 1.0
        allowance.trained()
        while allowance.left:
            now, answering = now + 0.7, answering + 0.7  # a pass takes longer than a step earns
    assert answering / (answering + training) == pytest.approx(0.2, abs=0.01)
    now += 1000  # nobody asks: nothing is saved up for later
    allowance.trained()
    assert allowance.left
    now += 1001 / 4
    assert not allowance.left


def serve_alone(sizes: tuple[int, int], folder: Path) -> list[str]:
    """What the first rank's clients are answered; sizes are tensor- and pipeline-parallel."""
    from collie_core.api import ParallelConfig, Topology, load_for_generation, serve
    from collie_server.server import HttpServer

    parallel = ParallelConfig(tensor_parallel_size=sizes[0], pipeline_parallel_size=sizes[1])
    topology = Topology.start(parallel)
    model, tokenizer = load_for_generation(str(folder), topology=topology, parallel=parallel)
    stop, pool = threading.Event(), ThreadPoolExecutor(len(PROMPTS) + 1)
    asked: list[Future[list[str]]] = []

    def questions(url: str) -> list[str]:
        time.sleep(1.5)  # the ranks have nothing to do for a while
        chunks = pool.map(lambda prompt: ask(url, body(prompt, stream=True, tokens=20)), PROMPTS)
        found = [text_of(one) for one in chunks]
        stop.set()
        return found

    def ready(url: str) -> None:
        asked.append(pool.submit(questions, url))

    serve(HttpServer(port=0), model, tokenizer, topology=topology, ready=ready, stop=stop)
    return asked[0].result() if topology.is_main else []


@pytest.mark.parametrize("sizes", [(2, 1), more((1, 2)), more((2, 2))], ids=["tp2", "pp2", "tp2pp2"])
def test_ranks_serve_a_model_that_stays(zygote: Any, dropping: Path, sizes: tuple[int, int]) -> None:
    found = zygote.run(__file__, "serve_alone", world_size=sizes[0] * sizes[1], args=(sizes, dropping))
    assert found[0] == stock(dropping, PROMPTS, 20)
