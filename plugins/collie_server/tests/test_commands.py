"""`collie serve` and `collie chat` as processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
COLLIE = [sys.executable, "-m", "collie_core.cli"]


@contextmanager
def command(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    with subprocess.Popen([*COLLIE, *arguments], **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def test_serve_says_where_it_is_and_stops_cleanly(folder: Path) -> None:
    with command("serve", str(folder), "--port", "0", "--model-name", "small", "--host", "0.0.0.0") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        where = process.stdout.readline()
        token = next(line for line in process.stderr if line.startswith("token: "))
        assert where.startswith("serving small on http://0.0.0.0:")
        url = f"http://127.0.0.1:{where.strip().rpartition(':')[2]}/v1/completions"
        body = {"prompt": "x", "max_tokens": 3}
        assert httpx2.post(url, json=body, trust_env=False).status_code == 401
        header = {"Authorization": f"Bearer {token.split()[1]}"}
        with httpx2.Client(trust_env=False, headers=header) as client:  # whose connection stays open
            assert client.post(url, json=body).status_code == 200
            start = time.monotonic()
            process.send_signal(signal.SIGTERM)
            output, errors = process.communicate(timeout=10)
        assert time.monotonic() - start < 5
        assert process.returncode == 0, errors
        assert "Traceback" not in output + errors


def test_an_interrupt_stops_it_too(folder: Path) -> None:
    with command("serve", str(folder), "--port", "0") as process:
        assert process.stdout is not None
        assert f"serving {folder.name} on http://127.0.0.1:" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=10)
        assert (process.returncode, output) == (0, ""), errors
        assert "Traceback" not in errors


def run(*arguments: str, lines: str = "") -> subprocess.CompletedProcess[str]:
    options: dict[str, Any] = {"capture_output": True, "text": True, "env": ENVIRONMENT, "timeout": 60, "check": False}
    return subprocess.run([*COLLIE, *arguments], input=lines, **options)


def test_wrong_options_are_named(folder: Path) -> None:
    done = run("serve", str(folder), "--port", "99999", "--max-queue", "-1")
    assert done.returncode == 2
    assert "--port = 99999" in done.stderr
    assert "--max-queue = -1" in done.stderr


def test_chat_with_a_folder_and_with_a_server(folder: Path, running: Any) -> None:
    options = ["--temperature", "0", "--max-tokens", "12"]
    lines = "hello\n/reset\nhello\n/system be brief\nhello\n/nonsense\n/exit\nnot read\n"
    local = run("chat", str(folder), "--compare", str(folder), *options, lines="/compare hello\n" + lines)
    assert local.returncode == 0, local.stderr
    remote = run("chat", running.url, *options, lines=lines)
    assert local.stdout.endswith(remote.stdout), remote.stderr
    answer = remote.stdout.partition("\n")[0]
    compared = local.stdout.removesuffix(remote.stdout)
    assert compared == f"[model: {folder}]\n{answer}\n[compare: {folder}]\n{answer}\n"
    with httpx2.Client(base_url=running.url, trust_env=False) as client:
        user = {"role": "user", "content": "hello"}
        answers = [
            client.post("/v1/chat/completions", json={"messages": turns, "temperature": 0, "max_tokens": 12})
            for turns in ([user], [{"role": "system", "content": "be brief"}, user])
        ]
    first, second = (answer.json()["choices"][0]["message"]["content"] for answer in answers)
    assert first in local.stdout.partition("forget the conversation")[0]
    assert second in local.stdout
    assert first != second
    assert "forget the conversation" in local.stdout


def test_chat_says_what_is_wrong(running: Any) -> None:
    done = run("chat", running.url, "--temperature", "9", lines="hello\n")
    assert "temperature: Input should be less than or equal to 2" in done.stdout
    done = run("chat", running.url, lines="/compare hello\n")
    assert "there is one model; start the chat or the server with --compare DIR" in done.stdout
    done = run("chat", "http://127.0.0.1:9", lines="hello\n")
    assert "no answer from http://127.0.0.1:9" in done.stdout


def test_the_description_is_light() -> None:
    code = (
        "import sys, collie_server; print([m for m in ('torch', 'pydantic', 'fastapi', 'httpx2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("verb", ["serve", "chat"])
def test_help_needs_no_torch(verb: str) -> None:
    code = f"import sys, collie_core.cli as c\ntry: c.main(['{verb}', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=ENVIRONMENT)


def test_it_is_a_component_of_its_kind(small: Any) -> None:
    from collie_core.plugins import Plugins
    from collie_server.server import HttpServer

    plugins = Plugins.discover()
    config = plugins.config_model("server", "http")(port=0, max_queue=3)
    assert isinstance(plugins.build("server", "http", config=config), HttpServer)


def test_an_adapter_folder_is_served(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("collie_peft")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    options = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, r=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), options)
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.tensor([tokenizer("hello")["input_ids"]])
    with torch.no_grad():
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
    wanted = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    body = {"prompt": "hello", "max_tokens": 12, "temperature": 0}
    with command("serve", str(tmp_path), "--port", "0") as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        answer = httpx2.post(f"{url}/v1/completions", json=body, trust_env=False).json()
    assert answer["choices"][0]["text"] == wanted


def test_a_port_in_use_is_said(small: Any, running: Any) -> None:
    from collie_core.api import RunError, serve
    from collie_server.server import HttpServer

    port = int(running.url.rpartition(":")[2])
    with pytest.raises(RunError, match=f"cannot listen on 127.0.0.1:{port}: "):
        serve(HttpServer(port=port), small.model, small.tokenizer)


def test_two_processes_share_the_model_of_a_checkpoint_and_another_is_compared(folder: Path, tmp_path: Path) -> None:
    checkpoint, run_of_then = tmp_path / "step-00000002", tmp_path / "then"
    shutil.copytree(folder, checkpoint / "model")
    shutil.copytree(folder, run_of_then / "model")
    parallel = ["--nproc", "2", "parallel.pipeline_parallel_size=2"]
    with command("serve", str(checkpoint), "--port", "0", "--compare", str(run_of_then), *parallel) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        with httpx2.Client(base_url=url, trust_env=False, timeout=60) as client:
            assert [(one["id"], one["root"]) for one in client.get("/v1/models").json()["data"]] == [
                (checkpoint.name, str(checkpoint)),
                ("compare", str(run_of_then)),
            ]
            body = {"prompt": "hello", "max_tokens": 12, "temperature": 0}
            now, then = (
                client.post("/v1/completions", json=body | {"model": name}).json()
                for name in (checkpoint.name, "compare")
            )
            assert now["choices"] == then["choices"]
            assert (now["model"], then["model"]) == (checkpoint.name, "compare")
        chat = run("chat", url, "--temperature", "0", "--max-tokens", "5", lines="/compare hello\n/compare\n")
        first, second, *_ = chat.stdout.split("[")[1:]
        assert first.startswith(f"{checkpoint.name}: {checkpoint}]\n")
        assert second.startswith(f"compare: {run_of_then}]\n")
        assert first.partition("\n")[2].strip() == second.partition("\n")[2].partition("/reset")[0].strip()
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    assert time.monotonic() - start < 10
    assert "Traceback" not in errors
