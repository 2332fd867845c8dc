"""Plugins: found without being imported, broken ones isolated, contracts checked, hooks in order."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from fake_dists import write_distribution

from collie_core.config.base import ComponentConfig, OptimizerConfig
from collie_core.errors import ModelError, PluginError
from collie_core.hookspecs import Can, EvaluatorCan, MetricCan, OptimizerCan
from collie_core.plugins import CATALOGUE, GROUPS, Entry, Plugins, check_agreement

COMPONENT = "from collie_core.api import Component, OptimizerCan\n"
CONFIG = """
from typing import Literal
from collie_core.api import OptimizerConfig
class Config(OptimizerConfig):
    type: Literal["swift"] = "swift"
    lr: float = 0.1
    speed: float = 2.0
"""
OPTIMIZER = """
class Swift:
    def __init__(self, params, lr, weight_decay=0.0, speed=1.0):
        self.params, self.lr, self.speed = params, lr, speed
"""


def _swift(install: Any, name: str = "collie-swift", *, module: str = "swift_pack", **options: Any) -> None:
    """A working optimizer plugin `swift`."""
    component = f'{COMPONENT}SWIFT = Component(build="{module}.impl:Swift", config="{module}.config:Config")'
    files = {
        f"{module}/__init__.py": component,
        f"{module}/config.py": CONFIG,
        f"{module}/impl.py": OPTIMIZER,
    }
    options = {"groups": {"collie.optimizer": {"swift": f"{module}:SWIFT"}}, "files": files, **options}
    install(name, **options)


def _one(install: Any, kind: str, component: str, code: str, dist: str = "collie-one") -> Plugins:
    """A plugin `one` in a single module; `component` are the arguments of its `Component`."""
    text = f"{COMPONENT}{code}\nONE = Component({component})\n"
    install(dist, groups={f"collie.{kind}": {"one": "one_pack:ONE"}}, files={"one_pack.py": text})
    return Plugins.discover()


def _hooks(install: Any, code: str, dist: str = "collie-hooked", module: str = "hooked") -> Plugins:
    text = f"from collie_core.api import hookimpl\n{code}"
    install(dist, groups={"collie.hooks": {"main": module}}, files={f"{module}.py": text})
    return Plugins.discover()


# -- stage 0 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [("optimizer", "adamw"), ("optimizer", "sgd"), ("metric", "perplexity")])
def test_built_ins_come_through_the_entry_point_groups(kind: str, name: str) -> None:
    (point,) = [
        point
        for point in metadata.entry_points(group=f"collie.{kind}", name=name)
        if point.dist is not None and point.dist.name == "collie-core"
    ]
    assert Plugins.discover().find(kind, name).value == point.value
    with pytest.raises(PluginError, match=f"unknown {kind} '{name}'"):
        Plugins([]).find(kind, name)  # nothing is known but what metadata says


@pytest.mark.parametrize(("kind", "name"), [("optimizer", "adamw"), ("optimizer", "sgd"), ("metric", "perplexity")])
def test_built_ins_obey_their_contract(kind: str, name: str) -> None:
    plugins = Plugins.discover()
    assert issubclass(plugins.config_model(kind, name), ComponentConfig)
    plugins.load(kind, name)


def test_metadata_is_read_and_normalised(install: Any) -> None:
    install(
        "Collie_Odd.Name",
        version="2.5",
        summary="an odd one",
        requires=["torch>=2", "collie.core[deepspeed] (<1,>=0.1)"],
        groups={
            "collie.optimizer": {"Ada_Lomo": "odd.pack:ADA [extra]"},
            "console_scripts": {"odd": "odd:main"},
        },
    )
    (entry,) = [entry for entry in Plugins.discover().entries if entry.version == "2.5"]
    assert entry == Entry("optimizer", "ada-lomo", "collie-odd-name", "2.5", "odd.pack:ADA", "an odd one", "<1,>=0.1")
    assert Plugins.discover().find("optimizer", "ada.LOMO") == entry


def test_entries_are_sorted(install: Any) -> None:
    install("collie-z", groups={"collie.metric": {"b": "z:B", "a": "z:A"}})
    install("collie-a", groups={"collie.metric": {"b": "a:B"}, "collie.adapter": {"z": "a:Z"}})
    found = [(entry.kind, entry.name, entry.distribution) for entry in Plugins.discover().entries]
    assert found == sorted(found)
    assert len([1 for kind, name, _ in found if (kind, name) == ("metric", "b")]) == 2


def test_requirements_under_a_foreign_marker_do_not_count(install: Any) -> None:
    install(
        "collie-marked",
        groups={"collie.metric": {"one": "m:ONE"}},
        requires=["collie-core>=9 ; extra == 'future'", "collie-core<1 ; python_version >= '3'"],
    )
    assert Plugins.discover().find("metric", "one").requires_core == "<1"


def test_the_first_installation_on_the_path_is_the_one(
    install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _swift(install, version="1.0")
    write_distribution(tmp_path / "first", "collie_swift", version="3.0", groups={"collie.metric": {"m": "m:M"}})
    monkeypatch.syspath_prepend(str(tmp_path / "first"))
    ours = [entry for entry in Plugins.discover().entries if entry.distribution == "collie-swift"]
    assert [(entry.kind, entry.version) for entry in ours] == [("metric", "3.0")]


def test_an_installation_without_plugins_hides_a_later_one_with(
    install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _swift(install)
    write_distribution(tmp_path / "first", "collie-swift", version="3.0", groups={})
    monkeypatch.syspath_prepend(str(tmp_path / "first"))
    assert "swift" not in Plugins.discover().names("optimizer")


def test_damaged_installations_stop_nothing(install: Any) -> None:
    info = install("collie-bytes", groups={})
    (info / "entry_points.txt").write_bytes(b"[collie.metric]\nm = \xff\xfe:M\n")
    (install("collie-nameless", groups={"collie.metric": {"n": "n:N"}}) / "METADATA").unlink()
    (install("collie-torn", groups={}) / "entry_points.txt").write_text("[collie.metric]\n# note\ntorn\n")
    plugins = Plugins.discover()
    names = set(plugins.names("metric"))
    assert {"perplexity", "torn"} <= names
    assert not {"m", "n"} & names
    with pytest.raises(PluginError, match=r"'' is not of the form 'package\.module:attribute'"):
        plugins.component("metric", "torn")


STAGE_0 = """
import sys
from collie_core.plugins import Plugins
from collie_core.errors import PluginError
plugins = Plugins.discover()
plugins.find("optimizer", "swift")
try:
    plugins.find("optimizer", "swfit")
except PluginError as error:
    print(error)
print(*sorted({"torch", "pydantic", "pluggy", "swift_pack", "packaging"} & set(sys.modules)))
"""


def test_names_cost_the_standard_library_only(install: Any, python: Any) -> None:
    _swift(install)
    result = python(STAGE_0)
    assert "Did you mean 'swift'?" in result.stdout, result.stderr
    assert result.stdout.splitlines()[-1] == ""


STAGE_1 = """
import sys
from collie_core.plugins import Plugins
plugins = Plugins.discover()
print(plugins.component("optimizer", "swift").build)
print(*plugins.config_model("optimizer", "swift").model_fields)
print(*sorted({"torch", "transformers", "pluggy", "swift_pack.impl"} & set(sys.modules)))
plugins.load("optimizer", "swift")
print("swift_pack.impl" in sys.modules)
"""


def test_descriptions_do_not_cost_torch(install: Any, python: Any) -> None:
    _swift(install)
    result = python(STAGE_1)
    assert result.stdout.splitlines() == [
        "swift_pack.impl:Swift",
        "type lr weight_decay param_groups speed",
        "",
        "True",
    ]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_descriptions_of_built_ins_do_not_cost_torch(python: Any, name: str) -> None:
    code = STAGE_1.replace("swift_pack.impl", "collie_core.loop").replace("swift", name).partition("plugins.load")[0]
    assert python(code).stdout.splitlines()[2:] == [""]


# -- blocking, conflicts, unknown names ---------------------------------------------------------------------


@pytest.mark.parametrize("through", ["argument", "environment"])
def test_blocked_distributions_are_not_imported(install: Any, monkeypatch: pytest.MonkeyPatch, through: str) -> None:
    _hooks(install, "raise AssertionError('imported')\n", dist="Collie_Hooked")
    if through == "environment":
        monkeypatch.setenv("COLLIE_BLOCK", "other, collie.hooked ,")
    plugins = Plugins.discover(["COLLIE-hooked"] if through == "argument" else [])
    plugins.hook_manager()
    assert [entry.distribution for entry in plugins.blocked] == ["collie-hooked"]
    assert "hooked" not in sys.modules
    assert plugins.state(plugins.blocked[0]) == "blocked"


def test_a_blocked_component_says_so(install: Any) -> None:
    _swift(install)
    with pytest.raises(PluginError, match=r"'swift' is in collie-swift 1\.0, which is blocked by COLLIE_BLOCK"):
        Plugins.discover(["collie-swift"]).find("optimizer", "swift")


def test_the_core_cannot_be_blocked() -> None:
    with pytest.raises(PluginError, match="collie-core cannot be blocked"):
        Plugins.discover(["collie_core"])


def test_a_name_given_twice_is_an_error_only_when_asked_for(install: Any) -> None:
    _swift(install)
    _swift(install, "collie-swift-too", module="swift_too")
    plugins = Plugins.discover()
    assert plugins.find("optimizer", "adamw").distribution == "collie-core"
    for dist in ("collie-swift", "collie-swift-too"):
        assert plugins.find("optimizer", f"{dist}:swift").distribution == dist
    with pytest.raises(PluginError, match="is given 2 times") as caught:
        plugins.find("optimizer", "swift")
    assert "collie-swift:swift (version 1.0" in str(caught.value)
    assert "collie-swift-too:swift (version 1.0" in str(caught.value)
    assert plugins.state(plugins.find("optimizer", "collie-swift:swift")) == "ambiguous: write collie-swift:swift"


def test_an_ambiguous_name_is_built_by_its_full_name(install: Any) -> None:
    _swift(install)
    _swift(install, "collie-swift-too", module="swift_too")
    plugins = Plugins.discover()
    section = plugins.config_model("optimizer", "collie-swift-too:swift")(type="swift")
    built = plugins.build("optimizer", "collie-swift-too:swift", params=[], config=section)
    assert type(built).__module__ == "swift_too.impl"


def test_one_distribution_that_gives_a_name_twice(install: Any) -> None:
    install("collie-twice", groups={"collie.metric": {"a_b": "t:A", "a-b": "t:B"}})
    with pytest.raises(PluginError, match="The distribution names it twice"):
        Plugins.discover().find("metric", "collie-twice:a-b")


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("optimizer", "sgdd", "unknown optimizer 'sgdd'. Did you mean 'sgd'?"),
        ("optimizer", "loin", "Did you mean 'lion' or 'muon'?"),
        ("optimizer", "lion", "'lion' is in collie-optim, which is not installed: pip install collie-optim"),
        ("adapter", "LoRA", "'LoRA' is in collie-peft, which is not installed: pip install collie-peft"),
        ("adapter", "adamw", "It is the name of a plugin of another kind: optimizer."),
        ("optimizer", "elsewhere:adamw", "unknown optimizer 'elsewhere:adamw'."),
        ("server", "http", "'http' is in collie-server, which is not installed: pip install collie-server"),
        ("server", "grpc", "unknown server 'grpc'. Installed: none."),
    ],
)
def test_unknown_names(kind: str, name: str, words: str) -> None:
    core = [entry for entry in Plugins.discover().entries if entry.distribution == "collie-core"]
    with pytest.raises(PluginError) as caught:
        Plugins(core).find(kind, name)
    assert words in str(caught.value)


def test_the_catalogue_tells_the_truth() -> None:
    entries = Plugins.discover().entries
    installed = {entry.distribution for entry in entries}
    known = {((entry.kind, entry.name), entry.distribution) for entry in entries}
    assert {item for item in CATALOGUE.items() if item[1] in installed} <= known


# -- broken plugins -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "code", "cause"),
    [
        ("one_pack:ONE", "import tritonish", "ModuleNotFoundError: No module named 'tritonish'"),
        ("one_pack:ONE", "import sys; sys.exit(3)", "SystemExit: 3"),
        ("one_pack:ONE", "1 +", "SyntaxError"),
        ("one_pack:ONE", "TWO = 2", "AttributeError: module 'one_pack' has no attribute 'ONE'"),
        ("one_pack:ONE", "ONE = {'build': 'x'}", "one_pack:ONE is a dict, not a Component"),
        ("one_pack", "", "'one_pack' is not of the form 'package.module:attribute'"),
        ("one_pack:", "", "'one_pack:' is not of the form"),
        ("no_such_pack:ONE", "", "No module named 'no_such_pack'"),
        (
            "one_pack:ONE",
            "from collie_core.api import Component; ONE = Component('x:y', api=2)",
            "it is written for API 2 of CoLLiE, and collie-core 0.1.0 has API 1",
        ),
        (
            "one_pack:ONE",
            "from collie_core.api import Component; ONE = Component('x:y', can=5)",
            "can=5 must be of type OptimizerCan",
        ),
    ],
)
def test_a_broken_description(install: Any, value: str, code: str, cause: str) -> None:
    install("collie-one", groups={"collie.optimizer": {"one": value}}, files={"one_pack.py": code})
    plugins = Plugins.discover()
    assert "one" in plugins.names("optimizer")  # silent until it is asked for
    with pytest.raises(PluginError) as caught:
        plugins.component("optimizer", "one")
    text = str(caught.value)
    assert f"collie-one 1.0: optimizer 'one' ({value}) does not work: " in text
    assert cause in text
    assert "\n  fix: " in text
    assert "\n  block it: COLLIE_BLOCK=collie-one, or `plugins: {block: [collie-one]}`" in text
    assert "\n  full trace: collie plugins show collie-one:one --kind optimizer --trace" in text


def test_the_fix_is_the_authors_hint_or_names_what_is_missing(install: Any) -> None:
    code = "raise_on_use = 1"
    plugins = _one(install, "metric", 'build="one_broken:M", hint="pip install \'collie-one[fast]\'"', code)
    with pytest.raises(PluginError, match=r"fix: pip install 'collie-one\[fast\]'"):
        plugins.load("metric", "one")
    install("collie-two", groups={"collie.metric": {"two": "two:T"}}, files={"two.py": "import tritonish"})
    with pytest.raises(PluginError, match="fix: install the package that provides 'tritonish', or pip install"):
        Plugins.discover().load("metric", "two")


def test_nobody_is_told_to_block_the_core() -> None:
    entry = Entry("metric", "gone", "collie-core", "0.1.0", "collie_core.gone:GONE")
    with pytest.raises(PluginError) as caught:
        Plugins([entry]).component("metric", "gone")
    assert "block it" not in str(caught.value)


@pytest.mark.parametrize(
    ("requirement", "cause"),
    [
        ("collie-core>=7", "it needs collie-core >=7, and this is collie-core 0.1.0"),
        ("collie-core<<7", "its requirement on collie-core, '<<7', is no version specifier"),
    ],
)
def test_a_plugin_for_another_core(install: Any, requirement: str, cause: str) -> None:
    _swift(install, requires=[requirement])
    plugins = Plugins.discover()
    assert plugins.state(plugins.find("optimizer", "swift")) == cause
    with pytest.raises(PluginError) as caught:
        plugins.component("optimizer", "swift")
    assert cause in str(caught.value)
    assert "fix: pip install --upgrade collie-core collie-swift" in str(caught.value)
    assert "swift_pack" not in sys.modules  # known before it is imported


def test_a_development_version_of_the_core_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collie_core.plugins.__version__", "0.2.0.dev3")
    entry = Entry("metric", "one", "collie-one", "1.0", "one:ONE", requires_core=">=0.1.5,<1")
    assert entry.incompatible() == ""


def test_an_unknown_group_is_reported_and_harmless(install: Any) -> None:
    install("collie-typo", groups={"collie.optimiser": {"one": "typo:ONE"}})
    (entry,) = [entry for entry in Plugins.discover().entries if entry.distribution == "collie-typo"]
    assert "group 'collie.optimiser' is unknown" in entry.incompatible()
    assert all(group in entry.incompatible() for group in GROUPS)


# -- stage 1: config and capabilities -----------------------------------------------------------------------


def test_no_config_means_nothing_but_the_type(install: Any) -> None:
    plugins = _one(install, "metric", 'build="one_pack:Nothing"', "")
    model = plugins.config_model("metric", "one")
    assert list(model.model_fields) == ["type"]
    assert model(type="one").type == "one"
    for wrong in ({"type": "two"}, {"type": "one", "extra": 1}):
        with pytest.raises(ValueError, match="validation error"):
            model(**wrong)
    assert plugins.config_model("metric", "collie-one:one") is model


def test_an_optimizer_without_options_still_has_a_learning_rate(install: Any) -> None:
    model = _one(install, "optimizer", 'build="one_pack:O"', "").config_model("optimizer", "one")
    assert list(model.model_fields) == ["type", "lr", "weight_decay", "param_groups"]
    assert issubclass(model, OptimizerConfig)


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ("class Config: pass", "one_pack:Config is no subclass of collie_core.api.ComponentConfig"),
        (CONFIG, "one_pack:Config has type 'swift', its entry point 'one'"),
    ],
)
def test_a_config_that_is_none(install: Any, config: str, cause: str) -> None:
    plugins = _one(install, "optimizer", 'build="one_pack:O", config="one_pack:Config"', config)
    with pytest.raises(PluginError) as caught:
        plugins.config_model("optimizer", "one")
    assert cause in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("optimizer", OptimizerCan()), ("metric", MetricCan()), ("evaluator", EvaluatorCan()), ("server", Can())],
)
def test_capabilities_are_those_of_the_kind(install: Any, kind: str, expected: Can) -> None:
    assert _one(install, kind, 'build="x:y"', "").component(kind, "one").can == expected


# -- stage 2: contracts -------------------------------------------------------------------------------------

METRIC = """
class M:
    def update(self, prediction, target): ...
    def merge(self, other): ...
    def compute(self): return {}
"""
ADAPTER = """
class A:
    def attach(self, model, config): return model
    def save(self, model, path, state): ...
    def load(self, model, path): ...
    def state(self, path): ...
"""


@pytest.mark.parametrize(
    ("kind", "code", "cause"),
    [
        (
            "optimizer",
            "def T(): ...",
            "T() must accept (params, lr=..., weight_decay=...): too many positional arguments",
        ),
        ("optimizer", "T = 5", "an object of type int cannot be called"),
        ("adapter", "class T: pass", "T has no method attach(model, config)"),
        (
            "adapter",
            ADAPTER.replace("(self, model, config)", "(self, model)") + "T = A",
            "A.attach(model) must accept",
        ),
        (
            "adapter",
            ADAPTER.replace("model, path", "model, path, how") + "T = A()",
            "missing a required argument",
        ),
        ("adapter", "class T:\n  def __init__(self, x): ...", "one_pack:T() failed: TypeError"),
        ("metric", METRIC.replace("merge", "join") + "T = M", "M has no method merge(other)"),
        ("metric", METRIC.replace("prediction, ", "") + "T = M", "M.update(self, target) must accept"),
        ("metric", METRIC + "def T(n): return M()", "T(n) must accept (): missing a required argument: 'n'"),
        ("model", "class T:\n  def make_config(self, raw): ...", "T has no attribute 'model_type'"),
        ("evaluator", "class T:\n  def evaluate(self): ...", "T.evaluate(self) must accept (self, context"),
        ("server", "class T:\n  def serve(self): ...", "T.serve(self) must accept (self, served, ready"),
    ],
)
def test_a_target_that_does_not_fit(install: Any, kind: str, code: str, cause: str) -> None:
    plugins = _one(install, kind, 'build="one_pack:T"', code)
    plugins.component(kind, "one")
    with pytest.raises(PluginError) as caught:
        plugins.load(kind, "one")
    assert cause in str(caught.value)
    assert f"collie-one 1.0: {kind} 'one'" in str(caught.value)
    assert plugins.used() == []


def test_an_optimizer_must_take_the_fields_of_its_config(install: Any, site: Path) -> None:
    _swift(install)
    (site / "swift_pack" / "impl.py").write_text(OPTIMIZER.replace("speed=1.0", "pace=1.0"))
    with pytest.raises(PluginError, match="got an unexpected keyword argument 'speed'"):
        Plugins.discover().load("optimizer", "swift")


def test_a_factory_function_is_checked_by_what_it_returns(install: Any) -> None:
    plugins = _one(install, "metric", 'build="one_pack:T"', "def T(): return []")
    section = plugins.config_model("metric", "one")(type="one")
    with pytest.raises(PluginError, match=r"list has no method update\(prediction, target\)"):
        plugins.build("metric", "one", config=section)


def test_adapter_and_model_classes_are_instantiated_once(install: Any) -> None:
    plugins = _one(install, "adapter", 'build="one_pack:A"', ADAPTER)
    adapter = plugins.load("adapter", "one")
    assert not isinstance(adapter, type)
    assert plugins.load("adapter", "collie-one:one") is adapter
    section = plugins.config_model("adapter", "one")(type="one")
    assert plugins.build("adapter", "one", model="the model", config=section) == "the model"


def test_used_lists_what_was_loaded(install: Any) -> None:
    _swift(install)
    plugins = _hooks(install, "")
    plugins.component("optimizer", "swift")
    assert plugins.used() == []
    plugins.load("optimizer", "swift")
    plugins.hook_manager()
    hooks, swift = plugins.used()
    assert swift == {
        "kind": "optimizer",
        "name": "swift",
        "distribution": "collie-swift",
        "version": "1.0",
        "value": "swift_pack:SWIFT",
    }
    assert (hooks["kind"], hooks["distribution"]) == ("hooks", "collie-hooked")


# -- building through hooks ---------------------------------------------------------------------------------

SUBSTITUTE = """
@hookimpl(trylast=True)
def collie_build_optimizer(target, params, config):
    return ("instead", config.speed)
"""
WRAP = """
@hookimpl(wrapper=True)
def collie_build_optimizer(params):
    params.append("seen")
    return (yield)
"""
REPLACE = """
@hookimpl(wrapper=True)
def collie_build_optimizer(params):
    yield
    return "replaced"
"""


def _build_swift(plugins: Plugins) -> Any:
    section = plugins.config_model("optimizer", "swift")(type="swift", speed=3.0)
    return plugins.build("optimizer", "swift", params=["group"], config=section)


def test_the_core_passes_the_fields_of_the_config(install: Any, caplog: pytest.LogCaptureFixture) -> None:
    _swift(install)
    with caplog.at_level(logging.INFO, "collie"):
        built = _build_swift(Plugins.discover())
    assert (built.params, built.lr, built.speed) == (["group"], 0.1, 3.0)
    assert caplog.messages == []


@pytest.mark.parametrize(("code", "expected"), [(SUBSTITUTE, ("instead", 3.0)), (REPLACE, "replaced")])
def test_a_substitution_is_logged_in_one_line(
    install: Any, caplog: pytest.LogCaptureFixture, code: str, expected: object
) -> None:
    _swift(install)
    plugins = _hooks(install, code)
    with caplog.at_level(logging.INFO, "collie"):
        assert _build_swift(plugins) == expected  # also with trylast: the core really is the last
    (line,) = caplog.messages
    assert "collie-swift 1.0: optimizer 'swift'" in line
    assert "substituted by hooks of collie-hooked:main" in line


def test_a_wrapper_that_substitutes_nothing_is_not_logged(install: Any, caplog: pytest.LogCaptureFixture) -> None:
    _swift(install)
    plugins = _hooks(install, WRAP)
    with caplog.at_level(logging.INFO, "collie"):
        assert _build_swift(plugins).params == ["group", "seen"]
    assert caplog.messages == []


def test_a_failing_build_names_the_plugin(install: Any) -> None:
    plugins = _one(install, "metric", 'build="one_pack:T"', "def T(): raise KeyError('vocab')")
    section = plugins.config_model("metric", "one")(type="one")
    with pytest.raises(PluginError, match=r"collie-one 1\.0: metric 'one' .* could not be built: KeyError: 'vocab'"):
        plugins.build("metric", "one", config=section)


def test_an_error_for_users_passes_as_it_is() -> None:
    def target() -> None:
        raise ModelError("the weight lm_head is missing")

    with pytest.raises(ModelError, match=r"^the weight lm_head is missing$"):
        Plugins([]).build_target("metric", target, config=ComponentConfig(type="x"))


# -- hooks --------------------------------------------------------------------------------------------------

RECORD = """
import collections
@hookimpl
def collie_before_step(run, batch): batch.append(__name__)
"""


def test_hooks_load_by_distribution_and_callbacks_run_too(install: Any) -> None:
    class Callback:
        def collie_before_step(self, batch: list[str]) -> None:  # no decorator, fewer arguments
            batch.append("callback")

    _hooks(install, RECORD, "collie-hooked-b", "hooked_b")
    plugins = _hooks(install, RECORD, "collie-hooked-a", "hooked_a")
    manager = plugins.hook_manager([Callback()])
    order = [name for name, _ in manager.list_name_plugin()]
    assert order[:2] == ["collie-hooked-a:main", "collie-hooked-b:main"]
    assert order[-1] == "collie-core"
    seen: list[str] = []
    manager.hook.collie_before_step(run=None, batch=seen)
    assert sorted(seen) == ["callback", "hooked_a", "hooked_b"]


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("raise RuntimeError('no licence')", "importing hooked: RuntimeError: no licence"),
        ("@hookimpl\ndef collie_befor_step(run): ...", "Did you mean 'collie_before_step'"),
        ("@hookimpl\ndef collie_before_step(run, bach): ...", "bach"),
    ],
)
def test_a_broken_hooks_module_stops_the_run(install: Any, code: str, cause: str) -> None:
    plugins = _hooks(install, code)
    with pytest.raises(PluginError) as caught:
        plugins.hook_manager()
    text = str(caught.value)
    assert text.startswith("collie-hooked 1.0: hooks 'main' (hooked) does not work: ")
    assert cause in text
    assert "block it: COLLIE_BLOCK=collie-hooked" in text
    Plugins.discover(["collie-hooked"]).hook_manager()


class _Misspelt:
    def collie_after_stpe(self, run: object) -> None: ...


class _Foreign:
    def on_step_end(self) -> None: ...


class _Fine:
    def collie_after_step(self, run: object) -> None: ...


@pytest.mark.parametrize(
    ("callback", "cause"),
    [
        (_Misspelt(), "callback _Misspelt: .*Did you mean 'collie_after_step'"),
        (_Foreign(), "callback _Foreign implements no hook. The hooks are collie_build_model_partition,"),
        (_Fine, r"callback _Fine is a class: hand in an instance, _Fine\(\)"),
    ],
)
def test_a_callback_that_would_not_be_heard_is_refused(callback: object, cause: str) -> None:
    with pytest.raises(PluginError, match=f"(?s){cause}"):
        Plugins([]).hook_manager([callback])


def test_the_same_callback_twice_is_refused() -> None:
    callback = _Fine()
    with pytest.raises(PluginError, match="already registered"):
        Plugins([]).hook_manager([callback, callback])


# -- commands and check -------------------------------------------------------------------------------------


def test_check_covers_every_kind(install: Any) -> None:
    _swift(install)
    _hooks(install, "@hookimpl\ndef collie_nothing(): ...")
    install("collie-verb", groups={"collie.commands": {"verb": "verb"}}, files={"verb.py": "def run(args): ..."})
    plugins = Plugins.discover()
    plugins.check(plugins.find("optimizer", "swift"))
    with pytest.raises(PluginError, match="collie_nothing"):
        plugins.check(plugins.find("hooks", "main"))
    with pytest.raises(PluginError, match=r"it has no function add_arguments\(parser\)"):
        plugins.check(plugins.find("commands", "verb"))


# -- several processes --------------------------------------------------------------------------------------

ROW = {
    "kind": "optimizer",
    "name": "lion",
    "distribution": "collie-optim",
    "version": "1.0",
    "value": "o:LION",
}
RANK = """
import json, sys
from collie_core.topology import Topology
import torch.distributed as dist
from collie_core.errors import PluginError
from collie_core.plugins import check_agreement
rank, store, table = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
try:
    check_agreement(table, Topology(rank=rank, world_size=2))
    print("agreed")
except PluginError as error:
    print(error)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ([ROW], "agreed"),
        (
            [{**ROW, "version": "2.0"}],
            "rank 1 disagrees about optimizer 'lion': collie-optim 2.0 (o:LION); on rank 0: collie-optim 1.0 "
            "(o:LION). Install the same plugins for every process.",
        ),
        (
            [],
            "rank 1 disagrees about optimizer 'lion': not loaded; on rank 0: collie-optim 1.0 (o:LION). "
            "Install the same plugins for every process.",
        ),
    ],
)
def test_ranks_that_resolve_different_plugins_stop(tmp_path: Path, other: list[Any], expected: str) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store"), json.dumps(table)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank, table in enumerate(([ROW], other))
    ]
    try:
        assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == [expected, expected]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_one_process_agrees_with_itself_without_torch(python: Any) -> None:
    code = (
        "import sys; from types import SimpleNamespace; from collie_core.plugins import check_agreement\n"
        "check_agreement([], SimpleNamespace(rank=0, world_size=1)); print('torch' in sys.modules)"
    )
    assert python(code).stdout == "False\n"
    assert callable(check_agreement)
