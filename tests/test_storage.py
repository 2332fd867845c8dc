"""Data, models, exports and checkpoints in an S3 store: a server on this machine that speaks its protocol."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem
from transformers import AutoModelForCausalLM, AutoTokenizer

from collie_core.api import RunConfig, Trainer
from collie_core.checkpoint import files
from collie_core.checkpoint.files import CheckpointError
from collie_core.checkpoint.mirror import Mirror
from collie_core.cli import main
from collie_core.storage import Place, StorageError, exists, fetch, local_folder, put_folder

BUCKET = "s3://bucket"


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """Its address."""
    served = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    served.start()
    host, port = served.get_host_and_port()
    yield f"http://{host}:{port}"
    served.stop()


@pytest.fixture
def s3(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3FileSystem]:
    """The store with an empty bucket, found as users let it be found: by the environment."""
    for name, value in environment(server, tmp_path).items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    system = S3FileSystem()
    system.mkdir("bucket")
    yield system
    system.rm("bucket", recursive=True)
    S3FileSystem.clear_instance_cache()


def environment(server: str, folder: Path) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }


def sections(output: Path) -> dict[str, Any]:
    return {
        "model": {"model_name_or_path": f"{BUCKET}/models/tiny"},
        "data": {"train": f"{BUCKET}/rows.jsonl", "max_length": 128, "cache_dir": str(output / "cache")},
        "train": {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "output_dir": str(output / "run"),
            "overwrite_output_dir": True,
        },
    }


def train_from_store(server: str, output: Path) -> list[str]:
    """Of one rank; which files it has fetched."""
    os.environ |= environment(server, output)
    fetched: list[str] = []
    get = Place.get

    def watched(place: Place, files: Mapping[str, Any], target: Path) -> None:
        fetched.append(place.url)
        get(place, files, target)

    Place.get = watched  # type: ignore[method-assign]  (the rank ends with this function)
    trainer = Trainer(RunConfig(**sections(output)), observers=())
    trainer.train()
    trainer.save_model(f"{BUCKET}/exports/tiny")
    return fetched


def test_two_ranks_train_from_a_store_into_a_store(
    zygote: Any, server: str, s3: S3FileSystem, tiny_llama: Path, instructions: Path, tmp_path: Path
) -> None:
    put_folder(tiny_llama, f"{BUCKET}/models/tiny")
    s3.put_file(str(instructions), "bucket/rows.jsonl")
    fetched = zygote.run(__file__, "train_from_store", world_size=2, args=(server, tmp_path))
    assert sorted(fetched[0] + fetched[1]) == [f"{BUCKET}/models/tiny", f"{BUCKET}/rows.jsonl"]
    assert f"{BUCKET}/models/tiny" in (tmp_path / "run" / "config.yaml").read_text()
    copy = fetch(f"{BUCKET}/exports/tiny")
    found = AutoModelForCausalLM.from_pretrained(copy).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    before = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not all(torch.equal(found[name], before[name]) for name in found)
    assert AutoTokenizer.from_pretrained(copy)("abc") == AutoTokenizer.from_pretrained(tiny_llama)("abc")


class Losses:
    """Keeps them, and ends the run before a step, as a machine that is taken away."""

    def __init__(self, end: int | None = None) -> None:
        self.end = end
        self.losses: list[float] = []

    def collie_before_step(self, run: Any) -> None:
        if run.step == self.end:
            raise KeyboardInterrupt

    def collie_after_step(self, loss: torch.Tensor) -> None:
        self.losses.append(loss.item())


def test_a_run_goes_on_from_the_store_on_a_new_machine(
    s3: S3FileSystem, tiny_llama: Path, instructions: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = sections(tmp_path) | {"model": {"model_name_or_path": str(tiny_llama)}}
    own["data"]["train"], own["train"]["max_steps"] = str(instructions), 6
    whole = Losses()
    Trainer(RunConfig(**own), callbacks=[whole], observers=()).train()
    store = {"save_steps": 2, "save_total_limit": 2, "store": f"{BUCKET}/runs/a", "resume_from_checkpoint": "auto"}
    own["checkpoint"] = store
    own["train"] |= {"output_dir": str(tmp_path / "b"), "overwrite_output_dir": False}
    with pytest.raises(KeyboardInterrupt):
        Trainer(RunConfig(**own), callbacks=[Losses(5)], observers=()).train()
    shutil.rmtree(tmp_path / "b")
    mirror = Mirror(f"{BUCKET}/runs/a/checkpoints")
    assert mirror.steps() == [4, 2]
    name = "bucket/runs/a/checkpoints/step-00000004/optimizer.safetensors"
    content = s3.cat_file(name)
    s3.pipe_file(name, content[:-1] + bytes([content[-1] ^ 1]))
    rest = Losses()
    Trainer(RunConfig(**own), callbacks=[rest], observers=()).train()  # the newest is damaged
    assert "going on from step-00000002" in caplog.text
    assert rest.losses == whole.losses[2:]
    assert mirror.steps() == [6, 4]
    assert [mirror.verify(step).step for step in mirror.steps()] == [6, 4]
    own["train"] |= {"output_dir": str(tmp_path / "c"), "max_steps": 7}
    own["checkpoint"] = {"save_steps": 2, "resume_from_checkpoint": f"{BUCKET}/runs/a"}
    own["lr_scheduler"] = {"type": "constant"}
    longer = Losses()
    Trainer(RunConfig(**own), callbacks=[longer], observers=()).train()
    assert len(longer.losses) == 1
    found = AutoModelForCausalLM.from_pretrained(fetch(f"{BUCKET}/runs/a/model")).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "b" / "model").state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_store_that_is_gone_does_not_end_a_run_that_may_go_on(
    s3: S3FileSystem, tiny_llama: Path, instructions: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = sections(tmp_path) | {"model": {"model_name_or_path": str(tiny_llama)}}
    own["data"]["train"] = str(instructions)
    own["checkpoint"] = {"save_steps": 2, "store": "s3://nowhere/run", "on_error": "continue"}
    with pytest.raises(StorageError, match="s3://nowhere/run/model"):  # the model at the end has no other place
        Trainer(RunConfig(**own), observers=()).train()
    assert "s3://nowhere/run/checkpoints/step-00000002" in caplog.text
    assert "the training goes on, and the last one is step-00000002" in caplog.text
    assert [files.verify(path).step for path in files.checkpoints_in(tmp_path / "run" / "checkpoints")] == [4, 2]
    own["checkpoint"]["on_error"] = "stop"
    with pytest.raises(StorageError, match="s3://nowhere/run/checkpoints/step-00000002"):
        Trainer(RunConfig(**own), observers=()).train()


def test_adapters_are_trained_merged_and_asked_by_url(
    s3: S3FileSystem, tiny_llama: Path, instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_folder(tiny_llama, f"{BUCKET}/models/tiny")
    s3.put_file(str(instructions), "bucket/rows.jsonl")
    first = sections(tmp_path) | {"adapter": {"type": "lora", "r": 4}, "optimizer": {"type": "adamw", "lr": 0.1}}
    Trainer(RunConfig(**first), observers=()).train()
    saved = tmp_path / "run" / "model"
    for name, key in (("collie_adapter.json", "base"), ("adapter_config.json", "base_model_name_or_path")):
        assert json.loads((saved / name).read_text())[key] == f"{BUCKET}/models/tiny"
    put_folder(saved, f"{BUCKET}/adapters/one")
    shutil.rmtree(saved)
    again = sections(tmp_path) | {"adapter": {"type": "lora", "adapter_name_or_path": f"{BUCKET}/adapters/one"}}
    trainer = Trainer(RunConfig(**again), observers=())
    trainer.train()
    assert trainer.results["step"] == 4

    out = f"{BUCKET}/models/merged"
    assert main(["merge", "--adapter", f"{BUCKET}/adapters/one", "--out", out, "--verify"]) == 0
    assert main(["merge", "--adapter", f"{BUCKET}/adapters/one", "--out", out]) == 1
    assert "exists already" in capsys.readouterr().err
    config = str(tmp_path / "run" / "config.yaml")
    assert main(["eval", config, f"data.eval={BUCKET}/rows.jsonl", "--model", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["eval/loss"] > 0
    answers = []
    for words in (["--model", out], ["--model", f"{BUCKET}/adapters/one"]):
        assert main(["generate", "Count to 3: ", "--max-new-tokens", "8", *words]) == 0
        answers.append(capsys.readouterr().out)
    named = ["--model", f"{BUCKET}/models/tiny", "--adapter", f"{BUCKET}/adapters/one"]
    assert main(["generate", "Count to 3: ", "--max-new-tokens", "8", *named]) == 0
    assert answers == [capsys.readouterr().out] * 2


def test_checkpoints_in_a_store(s3: S3FileSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mirror = Mirror(f"{BUCKET}/run/checkpoints")
    assert mirror.steps() == []
    for step in (1, 2, 3):
        beside = files.begin(tmp_path, step)
        (beside / files.MODEL).mkdir()
        for name in (f"{files.MODEL}/model [1].safetensors", files.STATES, files.TRAINER):
            (beside / name).write_bytes(os.urandom(1000))
        mirror.put(files.commit(beside, step))
    assert mirror.steps() == [3, 2, 1]
    copy = mirror.get(2, tmp_path / "elsewhere")
    assert files.verify(copy) == files.verify(tmp_path / copy.name)
    path = f"bucket/run/checkpoints/step-00000003/{files.STATES}"
    content = bytearray(s3.cat_file(path))
    content[500] ^= 1
    s3.pipe_file(path, bytes(content))
    s3.rm_file("bucket/run/checkpoints/step-00000001/manifest.json")
    assert mirror.steps() == [3, 2]
    with pytest.raises(CheckpointError, match=f"^{mirror.url_of(3)} is damaged: {files.STATES} is not what was"):
        mirror.get(3, tmp_path / "elsewhere")
    assert main(["checkpoint", "verify", f"{BUCKET}/run"]) == 1
    assert "is damaged" in capsys.readouterr().out
    assert main(["checkpoint", "prune", f"{BUCKET}/run"]) == 0
    assert mirror.steps() == [3, 2]  # the newest is not sound, so that the last sound one stays
    s3.invalidate_cache()
    assert not s3.exists("bucket/run/checkpoints/step-00000001")


def test_a_changed_object_is_fetched_anew(s3: S3FileSystem) -> None:
    s3.pipe_file("bucket/a/x.txt", b"one")
    s3.pipe_file("bucket/a.txt", b"beside")
    s3.pipe_file("bucket/ab/x.txt", b"beside")
    first = fetch(f"{BUCKET}/a")
    assert [path.name for path in first.rglob("*")] == ["x.txt"]
    other = S3FileSystem(skip_instance_cache=True)  # another program
    other.pipe_file("bucket/a/x.txt", b"two")
    assert (fetch(f"{BUCKET}/a") / "x.txt").read_text() == "two"
    assert not exists(f"{BUCKET}/b")


@pytest.mark.parametrize(
    ("verb", "sentence", "code"),
    [
        (["generate", "a", "--model", "s3://nowhere/model"], "s3://nowhere/model", 2),
        (["generate", "a", "--model", "s3://bucket/none"], "s3://bucket/none does not exist", 2),
        (["checkpoint", "list", "s3://nowhere/run"], "s3://nowhere/run", 1),
        (["merge", "--adapter", "s3://bucket/none", "--out", "s3://bucket/out"], "s3://bucket/none does not exist", 2),
        (["generate", "a", "--model", "s3://key:word@bucket/m"], "has credentials in it", 2),
    ],
)
def test_mistakes_are_one_sentence(
    s3: S3FileSystem, capsys: pytest.CaptureFixture[str], verb: list[str], sentence: str, code: int
) -> None:
    assert main(verb) == code
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert "word" not in said


def test_a_web_server_has_files_and_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.txt").write_text("one")
    (tmp_path / "served" / "index.html").write_text('<a href="a.txt">a</a>')
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert fetch(f"{address}/a.txt").read_text() == "one"
        with pytest.raises(StorageError, match=r"b\.txt does not exist"):
            fetch(f"{address}/b.txt")
        with pytest.raises(StorageError, match="is a file, and a folder is needed here"):
            local_folder(f"{address}/index.html")
        server.shutdown()


def test_nothing_is_put_into_a_bucket_that_is_not_there(s3: S3FileSystem, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(StorageError, match=r"^s3://nowhere/model cannot be .*no such file, folder or bucket"):
        put_folder(tmp_path / "model", "s3://nowhere/model")
    assert not s3.exists("nowhere")


def test_no_credentials_and_no_server_are_one_sentence(s3: S3FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match=r"^s3://bucket/a cannot be listed: .*credentials"):
        fetch(f"{BUCKET}/a")
