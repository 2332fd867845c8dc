"""The pages about plugins say what is so: each error in their tables comes about, each field of a contract is there."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_dists import write_distribution
from families import PACKS
from safetensors.torch import save_file
from torch import nn

from collie_core import hookspecs
from collie_core.api import CollieError, Plugins, RunConfig, ServerConfig, Source, StockFamily, Topology
from collie_core.checkpoint.states import WholeStates
from collie_core.config.model import ModelConfig
from collie_core.data.tokenizer import byte_tokenizer
from collie_core.engine.state import _kinds
from collie_core.model.adapters import AdapterPart, _compute_whole, fill
from collie_core.model.build import empty_model, new_model
from collie_core.model.files import Checkpoint
from collie_core.model.layout import layout
from collie_core.model.merge import merge_adapter
from collie_core.model.partition import Placement, Rule, plan
from collie_core.model.shard import _divide_attributes, note
from collie_core.parts import _require_declared
from collie_core.plugins import check_agreement
from collie_core.scaffold import write_package
from collie_core.serving.answerer import Answerer
from collie_core.serving.batch import Batch
from collie_core.serving.beside import ServerBeside
from collie_core.serving.served import Served, ServerThread
from collie_core.serving.standalone import serve
from collie_core.topology import Axis
from collie_testkit.server import small_model

DOCS = Path(__file__).resolve().parent.parent / "docs"
ROW = re.compile(r"^\| `(.+?)` \| ", re.MULTILINE)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
API = "from collie_core.api import Component, ComponentConfig, OptimizerCan, hookimpl\nfrom typing import Literal\n"


class Site:
    """Installs broken plugins, and collects what is said about them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: list[str] = []
        self._numbers = count()

    def hears(self, function: Callable[..., Any], *args: Any, **options: Any) -> None:
        """What the function complains about."""
        with pytest.raises(CollieError) as caught:
            function(*args, **options)
        self.said.append(str(caught.value))

    def install(self, group: str, value: str = "{module}:ONE", code: str = "", **options: Any) -> Plugins:
        """A new distribution, alone with the core, whose plugin `one` is in a module with this code."""
        module = f"page_pack_{next(self._numbers)}"
        site = self.folder / module
        name = options.pop("name", "one")
        dist = options.pop("dist", "acme-extras")
        write_distribution(
            site,
            dist,
            groups={f"collie.{group}": {name: value.format(module=module)}},
            files={f"{module}.py": API + code.format(module=module)},
            **options,
        )
        sys.path.insert(0, str(site))
        importlib.invalidate_caches()
        return Plugins.discover()

    def component(self, kind: str, code: str, component: str = "build='{module}:T'", **options: Any) -> Plugins:
        """The same of a component, given by the arguments of its description."""
        return self.install(kind, code=f"{code}\nONE = Component({component})\n", **options)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    path, modules = list(sys.path), set(sys.modules)
    yield Site(tmp_path)
    sys.path[:] = path
    for name in [name for name in set(sys.modules) - modules if name.startswith("page_pack_")]:
        del sys.modules[name]


def run(**sections: Any) -> RunConfig:
    """A run that is validated and not begun."""
    return RunConfig(**{"model": {"config": LLAMA}, "tokenizer": "byte", "data": {"train": "x.jsonl"}} | sections)


def test_errors_of_every_plugin(site: Site) -> None:
    core = Plugins([entry for entry in Plugins.discover().entries if entry.distribution == "collie-core"])
    site.hears(core.find, "optimizer", "loin")
    site.hears(core.find, "optimizer", "lion")
    for dist in ("a", "b"):
        plugins = site.component("metric", "", name="x", dist=dist)
    site.hears(plugins.find, "metric", "x")
    named = ("optimizer", "acme-extras:one")
    site.hears(site.component("optimizer", "", "build='acme_kernels:RMSprop'").load, *named)
    site.hears(site.install("optimizer", "{module}").component, *named)
    site.hears(site.install("optimizer", code="ONE = {{'build': 'x'}}").component, *named)
    site.hears(site.component("optimizer", "", "build='x:y', can=5").component, *named)
    section = "class C(ComponentConfig):\n  type: Literal['a'] = 'a'\n"
    plugins = site.component("optimizer", section, "build='x:y', config='{module}:C'", name="b")
    site.hears(plugins.config_model, "optimizer", "b")
    site.hears(site.component("optimizer", "class C: pass", "build='x:y', config='{module}:C'").config_model, *named)
    site.component("optimizer", section.replace("'a'", "'one'"), "build='x:y', config='{module}:C'")
    site.hears(run, optimizer={"type": "one"})
    site.hears(site.component("optimizer", "class T:\n  def __init__(self): ...").load, *named)
    plugins = site.component("metric", "def T(): raise KeyError('vocab')")
    site.hears(plugins.build, "metric", "one", config=plugins.config_model("metric", "one")(type="one"))
    site.hears(site.component("metric", "", requires=["collie-core>=2"]).component, "metric", "one")
    site.hears(site.component("metric", "", "build='x:y', api=2").component, "metric", "one")
    row = {"kind": "optimizer", "name": "lion", "distribution": "collie-optim", "version": "1.0", "value": "o:LION"}
    ranks: Any = SimpleNamespace(world_size=2, gather_objects=lambda table: [table, [row | {"version": "2.0"}]])
    site.hears(check_agreement, [row], ranks)
    assert_said("plugins.md", site.said)


def test_errors_of_optimizers(site: Site) -> None:
    site.hears(site.component("optimizer", "def T(): ...").load, "optimizer", "one")
    params = [nn.Parameter(torch.ones(2))]
    plain, updating = torch.optim.SGD(params), torch.optim.SGD(params)
    updating.update = lambda param, grad: None  # type: ignore[attr-defined]
    site.hears(_require_declared, plain, hookspecs.OptimizerCan(fuses_backward=True), "one")
    site.hears(_require_declared, updating, hookspecs.OptimizerCan(), "one")
    site.hears(_kinds, {"count": 3}, "lm_head.weight")
    parameter = Placement("q_proj.weight", (128, 64), 0, Rule(0, (128,)))
    topology: Any = Topology(tp=Axis(2))
    states = WholeStates(None, {"q_proj.weight": parameter}, {}, topology, None)  # type: ignore[arg-type]
    site.hears(states._placement, "q_proj.weight", "row", (64, 1))
    site.hears(run, optimizer={"type": "normuon", "lr": 1e-3}, parallel={"zero_stage": 1})
    site.hears(run, optimizer={"type": "lomo", "lr": 1e-3}, train={"gradient_accumulation_steps": 2})
    assert_said("plugins/optimizer.md", site.said)


ADAPTER = """
class LnTuning:
  def attach(self, model, config): ...
  def save(self, model, path, state): ...
  def load(self, model, path): ...
  def state(self, path): ...
"""


def test_errors_of_adapters(site: Site) -> None:
    build = "build='{module}:LnTuning'"
    for code in (
        ADAPTER.replace("def state", "def states"),
        ADAPTER.replace("path, state)", "path)"),
        ADAPTER + "  def __init__(self, rank): ...",
    ):
        site.hears(site.component("adapter", code, build).load, "adapter", "acme-extras:one")
    model: Any = nn.Linear(64, 4, bias=False)
    model.collie_adapter = AdapterPart({"weight": Placement("weight", (4, 64), 0)}, Topology(), None)
    site.hears(fill, model, {}, "runs/tuned/model")
    site.hears(fill, model, {"weight": torch.ones(4, 64), "bias": torch.ones(1)}, "runs/tuned/model")
    site.hears(fill, model, {"weight": torch.ones(8, 64)}, "runs/tuned/model")
    (site.folder / "adapter_config.json").write_text('{"peft_type": "LN_TUNING", "base_model_name_or_path": "x"}')
    registry = site.component("adapter", ADAPTER, build, name="ln-tuning")
    site.hears(merge_adapter, site.folder, site.folder / "merged", registry)
    embedding = nn.Embedding(4, 2)
    note(embedding, Axis(2), rules={"weight": Rule(0, (4,))}, partial={})
    site.hears(_compute_whole, "model.embed_tokens", nn.Module(), embedding)
    assert_said("plugins/adapter.md", site.said)


METRIC = """
class KnownTokens:
  def update(self, prediction, target): ...
  def merge(self, other): ...
  def compute(self): return {{}}
"""


def test_errors_of_metrics(site: Site) -> None:
    build = "build='{module}:KnownTokens'"
    for code in (METRIC.replace("merge", "join"), METRIC.replace("prediction, ", "")):
        site.hears(site.component("metric", code, build).load, "metric", "one")
    plugins = site.component("metric", "def T(): return []")
    site.hears(plugins.build, "metric", "one", config=plugins.config_model("metric", "one")(type="one"))
    site.component("metric", METRIC, build, name="known-tokens", dist="acme-more")
    site.hears(run, evaluation={"evaluators": [{"type": "generation", "metrics": ["known-tokens"]}]})
    assert_said("plugins/metric.md", site.said)


def test_errors_of_model_families(site: Site) -> None:
    config = {"model_type": "llama", "hidden_sise": 64}
    site.hears(new_model, ModelConfig(config=config), Plugins.discover(), byte_tokenizer(), torch.float32)
    up = "model.layers.*.mlp.up_proj.weight"
    half = {up: Source("model.layers.*.mlp.gate_up.weight", lambda config: [(32, 64)])}
    acme = model_of(StockFamily("acme-llama", stock_type="llama"), LLAMA)
    save_file({"x": torch.ones(1)}, site.folder / "model.safetensors")
    site.hears(layout, *acme, Checkpoint.open(str(site.folder)))
    site.hears(layout, acme[0], StockFamily("acme-llama", stock_type="llama", weights=half), None)
    gpt2 = model_of(StockFamily("gpt2"), {"n_embd": 8, "n_layer": 1, "n_head": 2})
    site.hears(plan, *gpt2, tensor_size=2)
    llama, _ = model_of(StockFamily("llama"), LLAMA)
    magic = StockFamily("llama", tensor_plan={"model.layers.*.mlp.up_proj": "magic"})
    site.hears(plan, llama, magic, tensor_size=2)
    site.hears(plan, llama, StockFamily("llama"), tensor_size=3)
    moss: Any = Plugins.discover().load("model", "moss")
    site.hears(plan, *model_of(moss, PACKS["moss"] | {"n_head": 24, "n_embd": 192, "n_layer": 1}), tensor_size=4)
    attention: Any = SimpleNamespace(num_heads=4)
    site.hears(_divide_attributes, {"h.0.attn": attention}, {"h.*.attn": ["num_heads"]}, Axis(3))
    for children in (("embed_tokens", "norm"), ("embed_tokens", "layers")):
        site.hears(plan, llama, StockFamily("llama", pipeline_plan=children), pipeline_size=2)
    assert_said("plugins/model.md", site.said)


def model_of(family: Any, raw: Any) -> tuple[Any, Any]:
    """A model without memory, and its family."""
    config = family.make_config(raw)
    config.dtype = torch.float32
    return empty_model(family, config), family


SERVER = """
class MyServer:
  def serve(self, served, ready): ...
  def stop(self): ...
"""
BUSY = """
import socket
free = socket.socket()
free.bind(("127.0.0.1", 0))
def T(**fields):
  with socket.socket() as mine:
    mine.bind(free.getsockname())
"""


class Ends:
    """A server that does not stay."""

    def __init__(self, *, announces: bool, error: Exception | None = None) -> None:
        self.announces = announces
        self.error = error

    def serve(self, served: Any, ready: Any) -> None:
        if self.announces:
            ready("here")
        if self.error is not None:
            raise self.error

    def stop(self) -> None: ...


def test_errors_of_servers(site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for code in (SERVER.replace("stop", "end"), SERVER.replace("served, ", "")):
        site.hears(site.component("server", code, "build='{module}:MyServer'").load, "server", "one")
    plugins = site.component("server", BUSY)
    site.hears(plugins.build, "server", "one", config=plugins.config_model("server", "one")(type="one"))
    sys.modules[plugins.load("server", "one").__module__].free.close()
    small: Any = small_model()
    rows = Batch(small.model)
    nobody: Any = Served(Answerer(*small, rows))
    for error in (None, ValueError("no certificate")):
        site.hears(ServerThread(Ends(announces=False, error=error), nobody).start)
    late = ServerThread(Ends(announces=True), nobody)
    with monkeypatch.context() as patch:
        patch.setattr(late._ready, "wait", lambda seconds: False)
        site.hears(late.start)
    site.hears(serve, Ends(announces=True), *small)
    beside: Any = ServerBeside.__new__(ServerBeside)
    beside._allowance = SimpleNamespace(trained=lambda: None, left=False)
    beside._thread, beside._served = SimpleNamespace(ending="it returned"), nobody
    beside._wire = SimpleNamespace(send=lambda message: None)
    with caplog.at_level("WARNING", "collie"):
        beside._answer()
    site.said += caplog.messages
    site.hears(lambda: list(Answerer(*small, rows).answer("a" * 1000)))
    site.hears(lambda: list(Answerer(*small, rows, slots=0, queue=0).answer("a")))
    closing = Answerer(*small, rows)
    closing.wake = closing.close
    site.hears(lambda: list(closing.answer("a")))
    assert_said("plugins/server.md", site.said)


class Callback:
    def collie_after_step(self) -> None: ...


def test_errors_of_the_other_kinds(site: Site) -> None:
    evaluator = "class AnswerLength: pass"
    site.hears(site.component("evaluator", evaluator, "build='{module}:AnswerLength'").load, "evaluator", "one")
    for number, hook in enumerate(("collie_on_step(run)", "collie_before_step(run, bach)")):
        plugins = site.install("hooks", "{module}", f"@hookimpl\ndef {hook}: ...", name=f"hooks-{number}")
        site.hears(plugins.check, plugins.find("hooks", f"hooks-{number}"))
    site.hears(Plugins([]).hook_manager, [Callback])
    site.hears(Plugins([]).hook_manager, [object()])
    plugins = site.component("tracker", "def T(): raise ValueError('no key')")
    site.hears(plugins.tracker, plugins.config_model("tracker", "one")(type="one"))
    site.hears(site.install("commands", "{module}", "def run(args): ...").command, "one")
    assert_said("plugins/other.md", site.said)


def assert_said(page: str, said: list[str]) -> None:
    """Each row of the table of errors is in a real message, and each message is in a row."""
    text = (DOCS / page).read_text().partition("## The errors")[2]
    rows = ROW.findall(text)
    patterns = [re.compile(re.escape(row).replace(re.escape("..."), ".*"), re.DOTALL) for row in rows]
    said = [message.replace("`", "") for message in said]
    assert rows
    for row, pattern in zip(rows, patterns, strict=True):
        assert any(map(pattern.search, said)), (row, said)
    for message in said:
        assert any(pattern.search(message) for pattern in patterns), message


# -- contracts ------------------------------------------------------------------------------------------------------

CONTRACTS: dict[str, list[type]] = {
    "plugins.md": [hookspecs.Component],
    "plugins/model.md": [StockFamily, hookspecs.ModelFamily],
    "plugins/optimizer.md": [hookspecs.OptimizerCan, hookspecs.FusedOptimizer, hookspecs.CurvatureOptimizer],
    "plugins/adapter.md": [
        hookspecs.AdapterCan, hookspecs.Adapter, hookspecs.ShardedAdapter, hookspecs.MergeableAdapter
    ],
    "plugins/metric.md": [hookspecs.MetricCan, hookspecs.Metric, hookspecs.DetailedMetric],
    "plugins/server.md": [hookspecs.Server],
    "plugins/other.md": [hookspecs.EvaluatorCan, hookspecs.Evaluator, hookspecs.Hooks, hookspecs.Run],
}  # fmt: skip


@pytest.mark.parametrize("page", CONTRACTS)
def test_a_page_has_every_name_of_its_contract(page: str) -> None:
    text = (DOCS / page).read_text()
    for contract in CONTRACTS[page]:
        names = [name for name, value in vars(contract).items() if inspect.isfunction(value) and name[0] != "_"]
        with suppress(TypeError):  # no dataclass
            names += [field.name for field in fields(contract)]
        for name in names:
            assert re.search(rf"[`.]{name}[`(]", text), (contract, name)
    if page == "plugins/server.md":
        assert all(f"`{name}`" in text for name in ServerConfig.for_the_core if name != "type")


def test_the_server_is_what_plugins_new_writes(tmp_path: Path) -> None:
    write_package("server", "my-server", tmp_path)
    text = (DOCS / "plugins" / "server.md").read_text()
    shown = re.findall(r"^```python file=collie-my-server/(\S+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert [file for file, _ in shown] == ["collie_my_server/__init__.py", "collie_my_server/server.py"]
    for file, code in shown:
        assert (tmp_path / file).read_text() == code, file
