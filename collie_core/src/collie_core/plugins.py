"""Finding, checking and loading plugins, each stage no earlier than it is needed.

Stage 0, names:        `Plugins.discover`, `find`, `names`: package metadata and the standard library.
Stage 1, description:  `component`, `config_model`: imports the plugin's `Component` and its pydantic model.
Stage 2, build:        `load`, `build`: imports the thing itself, torch included.

Components are found by entry point and exactly one answers to a name. Hooks come from the group
`collie.hooks` and from callbacks; all of them run, through pluggy. A plugin that nobody asked for is never
imported, so it cannot break anything; one that was asked for and does not work is a `PluginError`.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from email import message_from_string
from email.message import Message
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any, get_args

from collie_core import __version__
from collie_core.errors import CollieError, PluginError
from collie_core.hookspecs import (
    API,
    KINDS,
    Adapter,
    Can,
    Component,
    Evaluator,
    EvaluatorCan,
    Hooks,
    Metric,
    MetricCan,
    ModelFamily,
    OptimizerCan,
    Server,
)

if TYPE_CHECKING:
    import pluggy

    hookimpl = pluggy.HookimplMarker("collie")  # at run time through __getattr__ below

    from collie_core.config.base import ComponentConfig
    from collie_core.topology import Topology

GROUPS = (*(f"collie.{kind}" for kind in KINDS), "collie.hooks", "collie.commands")
CORE = "collie-core"
BLOCK_VARIABLE = "COLLIE_BLOCK"

# Names whose distribution is known although it may not be installed, so that the error can say what to type.
CATALOGUE = {
    ("model", "chatglm"): "collie-glm",
    ("model", "gemma"): "collie-gemma",
    ("model", "gemma2"): "collie-gemma",
    ("model", "gemma3-text"): "collie-gemma",
    ("model", "internlm"): "collie-internlm",
    ("model", "internlm2"): "collie-internlm",
    ("model", "internlm3"): "collie-internlm",
    ("model", "llama"): "collie-llama",
    ("model", "mistral"): "collie-llama",
    ("model", "moss"): "collie-moss",
    ("model", "qwen2"): "collie-llama",
    ("model", "qwen2-moe"): "collie-qwen",
    ("model", "qwen3"): "collie-llama",
    ("model", "qwen3-moe"): "collie-qwen",
    ("optimizer", "adalomo"): "collie-optim",
    ("optimizer", "adan"): "collie-optim",
    ("optimizer", "lion"): "collie-optim",
    ("optimizer", "lomo"): "collie-optim",
    ("optimizer", "muon"): "collie-optim",
    ("optimizer", "normuon"): "collie-normuon",
    ("optimizer", "sophia"): "collie-optim",
    ("adapter", "adalora"): "collie-peft",
    ("adapter", "bottleneck"): "collie-peft",
    ("adapter", "ia3"): "collie-peft",
    ("adapter", "lora"): "collie-peft",
    ("metric", "accuracy"): "collie-metrics",
    ("metric", "bleu"): "collie-metrics",
    ("metric", "chrf"): "collie-metrics",
    ("metric", "decode"): "collie-metrics",
    ("metric", "exact-match"): "collie-metrics",
    ("metric", "f1"): "collie-metrics",
    ("metric", "numeric-match"): "collie-metrics",
    ("metric", "rouge"): "collie-metrics",
    ("metric", "token-accuracy"): "collie-metrics",
    ("server", "http"): "collie-server",
    ("commands", "chat"): "collie-server",
    ("commands", "check"): "collie-testkit",
    ("commands", "serve"): "collie-server",
}

_CAPABILITIES: Mapping[str, type[Can]] = {
    "optimizer": OptimizerCan,
    "metric": MetricCan,
    "evaluator": EvaluatorCan,
}
_PROTOCOLS: Mapping[str, type] = {
    "model": ModelFamily,
    "adapter": Adapter,
    "metric": Metric,
    "evaluator": Evaluator,
    "server": Server,
}
# Kinds whose target is an object with methods; the target of the others is called to make one.
_OBJECTS = ("model", "adapter")
_BUILD_HOOKS = dict(zip([kind for kind in KINDS if kind != "tracker"], Hooks.FIRST_RESULT, strict=True))
_HOOK_NAMES = tuple(name for name in vars(Hooks) if name.startswith("collie_"))

logger = logging.getLogger("collie")


def __getattr__(name: str) -> Any:
    if name == "hookimpl":  # on first use: listing plugins does not need pluggy
        from pluggy import HookimplMarker

        return HookimplMarker("collie")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# -- stage 0: names -----------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Entry:
    """One entry point of one distribution, as its metadata states it; nothing is imported."""

    kind: str  # the group without "collie."
    name: str  # normalised as PEP 503
    distribution: str  # normalised as PEP 503
    version: str
    value: str  # "package.module:attribute"
    summary: str = ""  # of the distribution
    requires_core: str = ""  # the version specifier of its requirement on collie-core

    @property
    def qualified(self) -> str:
        """The name that is never ambiguous."""
        return f"{self.distribution}:{self.name}"

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}: {self.kind} {self.name!r} ({self.value})"

    def incompatible(self) -> str:
        """Why this core cannot use the entry, from metadata alone; "" when it can."""
        if f"collie.{self.kind}" not in GROUPS:
            return f"the entry-point group 'collie.{self.kind}' is unknown; the groups are {', '.join(GROUPS)}"
        return _unmet_requirement(self.requires_core) if self.requires_core else ""


def normalise(name: str) -> str:
    """PEP 503: `Ada_Lomo`, `ada.lomo` and `ada-lomo` are one name."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


@functools.cache
def _unmet_requirement(specifier: str) -> str:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        met = SpecifierSet(specifier).contains(__version__, prereleases=True)
    except InvalidSpecifier:
        return f"its requirement on {CORE}, {specifier!r}, is no version specifier"
    return "" if met else f"it needs {CORE} {specifier}, and this is {CORE} {__version__}"


def _installed_entries() -> Iterator[Entry]:
    """The entries of every installed distribution that has a group of ours, each distribution once."""
    seen = set()
    for found in metadata.distributions():
        if "[collie." not in _read(found, "entry_points.txt"):
            continue
        name = normalise(_headers(found).get("Name", ""))
        if name and name not in seen:
            seen.add(name)
            yield from _entries_of(name, _importable(name, found))


def _importable(name: str, found: metadata.Distribution) -> metadata.Distribution:
    """Of several installations of one distribution, the one that Python imports: the first on the path."""
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:  # the folder is not named after the distribution
        return found


def _read(distribution: metadata.Distribution, file: str) -> str:
    try:
        return distribution.read_text(file) or ""
    except UnicodeDecodeError:  # a damaged installation, of whatever package, must not stop everything
        return ""


def _headers(distribution: metadata.Distribution) -> Message:
    text = _read(distribution, "METADATA") or _read(distribution, "PKG-INFO")
    return message_from_string(text.partition("\n\n")[0])  # the rest is the README: not needed, and long


def _entries_of(name: str, distribution: metadata.Distribution) -> Iterator[Entry]:
    headers = _headers(distribution)
    version, summary = headers.get("Version", ""), headers.get("Summary", "")
    requires_core = _core_specifier(headers.get_all("Requires-Dist", []))
    for kind, key, value in _parse_entry_points(_read(distribution, "entry_points.txt")):
        yield Entry(kind, normalise(key), name, version, value, summary, requires_core)


def _parse_entry_points(text: str) -> Iterator[tuple[str, str, str]]:
    """(kind, name, value) of our groups. A malformed line gives an entry that does not load, and says so."""
    group = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            group = line.strip("[] ")
        elif line and line[0] not in "#;" and group.startswith("collie."):
            name, _, value = line.partition("=")
            yield group.removeprefix("collie."), name.strip(), value.partition("[")[0].strip()  # no extras


def _core_specifier(requirements: Iterable[str]) -> str:
    """ ">=1,<2" of "collie-core[deepspeed] (>=1,<2) ; python_version > '3'"."""
    for requirement in requirements:
        text, _, marker = requirement.partition(";")
        match = re.match(r"\s*([\w.-]+?)\s*(?:\[[^]]*\])?\s*\(?\s*([<>=!~][^)]*?)?\s*\)?\s*$", text)
        if match and normalise(match[1]) == CORE and _applies(marker):
            return match[2] or ""
    return ""


def _applies(marker: str) -> bool:
    if not marker.strip():
        return True
    from packaging.markers import InvalidMarker, Marker

    try:
        return Marker(marker).evaluate({"extra": ""})
    except InvalidMarker:  # somebody else's typing mistake: better to keep the requirement than to lose it
        return True


def _blocked_names(block: Iterable[str]) -> set[str]:
    asked = [*block, *os.environ.get(BLOCK_VARIABLE, "").split(",")]
    names = {normalise(name) for name in asked} - {""}
    if CORE in names:
        raise PluginError(f"{CORE} cannot be blocked: it holds the built-in components")
    return names


def near(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'lion'?" or ""."""
    from difflib import get_close_matches

    matches = get_close_matches(name, sorted(set(known)), n=2, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, matches))}?" if matches else ""


# -- errors -------------------------------------------------------------------------------------------------


def broken(entry: Entry, cause: str, fix: str = "") -> PluginError:
    """The error of a plugin that was asked for: whose it is, the cause, the fix, and how to do without it."""
    lines = [f"{entry} does not work: {cause}", f"  fix: {fix or _upgrade(entry)}"]
    if entry.distribution != CORE:
        block = entry.distribution
        lines.append(f"  block it: {BLOCK_VARIABLE}={block}, or `plugins: {{block: [{block}]}}` in the YAML")
    lines.append(f"  full trace: collie plugins show {entry.qualified} --kind {entry.kind} --trace")
    return PluginError("\n".join(lines))


def _upgrade(entry: Entry) -> str:
    return f"pip install --upgrade {entry.distribution}"


def _fix(entry: Entry, error: BaseException, hint: str) -> str:
    if hint or not isinstance(error, ModuleNotFoundError) or not error.name:
        return hint
    own = {entry.value.partition(".")[0].partition(":")[0], "collie_core"}
    missing = error.name.partition(".")[0]
    return "" if missing in own else f"install the package that provides {missing!r}, or {_upgrade(entry)}"


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _resolve(entry: Entry, reference: str, hint: str = "") -> Any:
    """Import what "package.module:attribute" names. Whatever goes wrong in there is a `PluginError`."""
    module, _, attribute = reference.partition(":")
    well_formed = re.fullmatch(r"[^\W\d][\w.]*(:[^\W\d][\w.]*)?", reference)
    if not well_formed or (entry.kind in KINDS and not attribute):  # hooks and commands may be whole modules
        raise broken(entry, f"{reference!r} is not of the form 'package.module:attribute'")
    try:
        target = import_module(module)
        return functools.reduce(getattr, attribute.split("."), target) if attribute else target
    except (Exception, SystemExit) as error:  # a module that calls sys.exit() is as broken as any
        raise broken(entry, f"importing {reference}: {_cause(error)}", _fix(entry, error, hint)) from error


# -- the contracts ------------------------------------------------------------------------------------------


def _call_fault(call: Callable[..., Any], positional: Sequence[str], keywords: Iterable[str] = ()) -> str:
    """Why `call` cannot be called with these arguments, from its signature; "" when it can."""
    keywords = list(keywords)
    try:
        signature = inspect.signature(call)
    except ValueError:  # written in C, says nothing about its arguments: the call itself will tell
        return ""
    try:
        signature.bind(*positional, **dict.fromkeys(keywords))
    except TypeError as error:
        wanted = ", ".join([*positional, *(f"{name}=..." for name in keywords)])
        return f"{getattr(call, '__qualname__', call)}{signature} must accept ({wanted}): {error}"
    return ""


def _methods_fault(protocol: type, target: Any) -> str:
    """Which attribute or method of the protocol `target` (an object or a class) lacks; "" when none."""
    label = getattr(target, "__qualname__", type(target).__qualname__)
    for name in inspect.get_annotations(protocol):
        if not hasattr(target, name):
            return f"{label} has no attribute {name!r}"
    for name, specified in vars(protocol).items():
        if name.startswith("_") or not inspect.isfunction(specified):
            continue
        arguments = list(inspect.signature(specified).parameters)[1:]
        if not callable(method := getattr(target, name, None)):
            return f"{label} has no method {name}({', '.join(arguments)})"
        unbound = isinstance(target, type) and inspect.isfunction(inspect.getattr_static(target, name))
        if fault := _call_fault(method, ["self", *arguments] if unbound else arguments):
            return fault
    return ""


def _contract_fault(kind: str, target: Any, options: Iterable[str]) -> str:
    """Why `target` is no component of this kind, as far as signatures tell; "" when it is one."""
    if kind in _OBJECTS:
        return _methods_fault(_PROTOCOLS[kind], target)
    if not callable(target):
        return f"an object of type {type(target).__qualname__} cannot be called"
    fault = _call_fault(target, ["params"] if kind == "optimizer" else [], options)
    if not fault and kind in _PROTOCOLS and isinstance(target, type):
        fault = _methods_fault(_PROTOCOLS[kind], target)
    return fault


# -- the registry -------------------------------------------------------------------------------------------


class Plugins:
    """The installed plugins, less the blocked ones. Everything is imported on first use and then kept."""

    def __init__(self, entries: Iterable[Entry], blocked: Iterable[Entry] = ()) -> None:
        self.entries = tuple(sorted(entries))
        self.blocked = tuple(sorted(blocked))
        self._components: dict[Entry, Component] = {}
        self._config_models: dict[Entry, type[ComponentConfig]] = {}
        self._targets: dict[Entry, Any] = {}
        self._used: set[Entry] = set()
        self._core = CoreBuilders()
        self._manager: pluggy.PluginManager | None = None

    @classmethod
    def discover(cls, block: Iterable[str] = ()) -> Plugins:
        """Read the metadata of everything installed. Blocked distributions are never imported.

        `block` holds distribution names; those of the environment variable COLLIE_BLOCK (comma separated)
        are added. Raises `PluginError` when collie-core is among them.
        """
        names = _blocked_names(block)
        found = list(_installed_entries())
        return cls(
            (entry for entry in found if entry.distribution not in names),
            (entry for entry in found if entry.distribution in names),
        )

    # stage 0

    def names(self, kind: str) -> list[str]:
        """The short names of one kind."""
        return sorted({entry.name for entry in self.entries if entry.kind == kind})

    def find(self, kind: str, name: str) -> Entry:
        """The entry that `name` or `distribution:name` means; `PluginError` when there is none or several."""
        found = _matching(self.entries, kind, name)
        if len(found) == 1:
            return found[0]
        raise PluginError(self._ambiguous(found) if found else self._unknown(kind, name))

    def _ambiguous(self, found: Sequence[Entry]) -> str:
        full = ", ".join(f"{entry.qualified} (version {entry.version}, {entry.value})" for entry in found)
        advice = "Write the full name, or block one of the distributions"
        if len({entry.distribution for entry in found}) == 1:
            advice = "The distribution names it twice: block it or repair it"
        return f"{found[0].kind} {found[0].name!r} is given {len(found)} times: {full}. {advice}."

    def _unknown(self, kind: str, name: str) -> str:
        short = normalise(name.rpartition(":")[2])
        if blocked := _matching(self.blocked, kind, name):
            origin = f"{blocked[0].distribution} {blocked[0].version}"
            return f"{kind} {name!r} is in {origin}, which is blocked by {BLOCK_VARIABLE} or plugins.block."
        pack = CATALOGUE.get((kind, short))
        if pack and short == normalise(name):
            return f"{kind} {name!r} is in {pack}, which is not installed: pip install {pack}"
        elsewhere = sorted({entry.kind for entry in self.entries if entry.name == short} - {kind})
        known = {entry.qualified if ":" in name else entry.name for entry in self.entries if entry.kind == kind}
        advice = near(normalise(name), known if ":" in name else known | self._catalogued(kind))
        if elsewhere:
            advice = f" It is the name of a plugin of another kind: {', '.join(elsewhere)}."
        return f"unknown {kind} {name!r}.{advice} Installed: {', '.join(sorted(known)) or 'none'}."

    def _catalogued(self, kind: str) -> set[str]:
        return {name for (of_kind, name) in CATALOGUE if of_kind == kind}

    def state(self, entry: Entry) -> str:
        """What metadata says against an entry: blocked, incompatible, a name given twice; "" if nothing."""
        if entry in self.blocked:
            return "blocked"
        if reason := entry.incompatible():
            return reason
        return f"ambiguous: write {entry.qualified}" if self.is_ambiguous(entry) else ""

    def is_ambiguous(self, entry: Entry) -> bool:
        """Whether the short name means other entries too; the names of hooks modules are never asked for."""
        return entry.kind != "hooks" and len(_matching(self.entries, entry.kind, entry.name)) > 1

    # stage 1

    def component(self, kind: str, name: str) -> Component:
        """The description. Its `can` is always of the class that belongs to the kind.

        Raises `PluginError` when the plugin is unknown, ambiguous, incompatible or cannot be imported.
        """
        entry = self.find(kind, name)
        if entry not in self._components:
            self._components[entry] = _describe(entry)
        return self._components[entry]

    def config_model(self, kind: str, name: str) -> type[ComponentConfig]:
        """The pydantic model of the plugin's section; a generated one when the plugin has no options."""
        entry = self.find(kind, name)
        if entry not in self._config_models:
            component = self.component(kind, name)
            self._config_models[entry] = _config_model(entry, component)
        return self._config_models[entry]

    # stage 2

    def load(self, kind: str, name: str) -> Any:
        """The `build` target, checked against its Protocol; for a model or adapter class, an instance of it.

        Records the plugin as used. Raises `PluginError` as `component` does, or when the target does not
        import or does not fit the contract of its kind.
        """
        entry = self.find(kind, name)
        if entry not in self._targets:
            self._targets[entry] = self._target(entry)
        self._used.add(entry)
        return self._targets[entry]

    def _target(self, entry: Entry) -> Any:
        component = self.component(entry.kind, entry.qualified)
        options = _options(self.config_model(entry.kind, entry.qualified))
        target = _resolve(entry, component.build, component.hint)
        if entry.kind in _OBJECTS and isinstance(target, type):
            try:
                target = target()
            except Exception as error:
                raise broken(entry, f"{component.build}() failed: {_cause(error)}", component.hint) from error
        if fault := _contract_fault(entry.kind, target, options):
            raise broken(entry, f"{component.build} does not fit: {fault}")
        return target

    def build(self, kind: str, name: str, **objects: Any) -> Any:
        """Load a plugin and let the hook `collie_build_<kind>` make the thing from it and `objects`.

        `objects` are the arguments of the hook less `target`. Errors as `load` and `build_target`.
        """
        entry = self.find(kind, name)
        return self.build_target(kind, self.load(kind, name), label=str(entry), **objects)

    def build_target(self, kind: str, target: Any, *, label: str = "", **objects: Any) -> Any:
        """`build` for a target that is already at hand and need not be a plugin's, as a stock model family.

        A substitution by a hook is logged in one line. Raises `PluginError` that names `label` for whatever
        fails in there; errors of ours pass as they are.
        """
        label = label or f"{kind} {getattr(target, '__qualname__', type(target).__qualname__)}"
        manager = self._manager or self.hook_manager()
        hook = getattr(manager.hook, _BUILD_HOOKS[kind])
        core = self._core
        core.result = None
        try:
            result = hook(target=target, **objects)
        except CollieError:
            raise
        except Exception as error:
            raise PluginError(f"{label} could not be built: {_cause(error)}") from error
        if result is not core.result:
            others = [impl.plugin_name for impl in hook.get_hookimpls() if impl.plugin is not core]
            logger.info("%s is substituted by hooks of %s", label, " or ".join(others))
        core.result = None
        if kind in ("metric", "server") and (fault := _methods_fault(_PROTOCOLS[kind], result)):
            raise PluginError(f"{label} does not fit: {fault}")
        return result

    def tracker(self, config: ComponentConfig) -> object:
        """Load a tracker and make it, an object with hooks; on the main rank only. Errors as `load`, and as `build`."""
        entry = self.find("tracker", config.type)
        target = self.load("tracker", config.type)
        try:
            return target(**_fields(config))
        except CollieError:
            raise
        except Exception as error:
            raise PluginError(f"{entry} could not be built: {_cause(error)}") from error

    # hooks

    def hook_manager(self, callbacks: Sequence[object] = ()) -> pluggy.PluginManager:
        """Load the hooks of every plugin, then the callbacks, then the core's own build steps (asked last).

        `build` goes through the manager made last. Raises `PluginError` for a hooks module that does not
        import, a hook that does not exist or names arguments it has not, and a callback without hooks.
        """
        manager = _new_manager()
        for entry in sorted(self.entries, key=lambda entry: (entry.distribution, entry.name)):
            if entry.kind == "hooks":
                _register_hooks(manager, entry)
                self._used.add(entry)
        for callback in callbacks:
            _register_callback(manager, callback)
        manager.register(self._core, name=CORE)
        self._manager = manager
        return manager

    def hooked(self, kind: str, name: str) -> list[object]:
        """The component as the one callback that it is, when it has hooks; loads it. Errors as `load`."""
        target = self.load(kind, name)
        return [target] if any(_is_hook(target, attribute) for attribute in dir(target)) else []

    def command(self, name: str) -> Any:
        """The module of an extra verb of the command line: it has `add_arguments(parser)` and `run(args)`."""
        entry = self.find("commands", name)
        if reason := entry.incompatible():
            raise broken(entry, reason)
        module = _resolve(entry, entry.value)
        for function, argument in (("add_arguments", "parser"), ("run", "args")):
            if not callable(getattr(module, function, None)):
                raise broken(entry, f"it has no function {function}({argument})")
        return module

    def check(self, entry: Entry) -> None:
        """Import all there is of one plugin, its build target included; `PluginError` when it is broken."""
        if reason := entry.incompatible():
            raise broken(entry, reason)
        if entry.kind == "hooks":
            _register_hooks(_new_manager(), entry)
        elif entry.kind == "commands":
            self.command(entry.qualified)
        else:
            self.load(entry.kind, entry.qualified)

    def used(self) -> list[dict[str, str]]:
        """The table of what was loaded, for the run directory and for `check_agreement`."""
        fields = ("kind", "name", "distribution", "version", "value")
        return [{field: getattr(entry, field) for field in fields} for entry in sorted(self._used)]


def _matching(entries: Iterable[Entry], kind: str, name: str) -> list[Entry]:
    distribution, _, short = name.rpartition(":")
    wanted, origin = normalise(short), normalise(distribution)
    return [
        entry for entry in entries if entry.kind == kind and entry.name == wanted and origin in ("", entry.distribution)
    ]


def _describe(entry: Entry) -> Component:
    if reason := entry.incompatible():
        raise broken(entry, reason, f"pip install --upgrade {CORE} {entry.distribution}")
    component = _resolve(entry, entry.value)
    if not isinstance(component, Component):
        raise broken(entry, f"{entry.value} is a {type(component).__qualname__}, not a Component")
    if component.api > API:
        cause = f"it is written for API {component.api} of CoLLiE, and {CORE} {__version__} has API {API}"
        raise broken(entry, cause, f"pip install --upgrade {CORE}")
    return _with_capabilities(entry, component)


def _with_capabilities(entry: Entry, component: Component) -> Component:
    wanted = _CAPABILITIES.get(entry.kind, Can)
    if isinstance(component.can, wanted):
        return component
    if type(component.can) is not Can:
        raise broken(entry, f"can={component.can!r} must be of type {wanted.__name__}")
    return replace(component, can=wanted())  # nothing was declared: the defaults of the kind


def _config_model(entry: Entry, component: Component) -> type[ComponentConfig]:
    from collie_core.config.base import ComponentConfig

    if not component.config:
        return _bare_config(entry)
    resolved = _resolve(entry, component.config, component.hint)
    if not (isinstance(resolved, type) and issubclass(resolved, ComponentConfig)):
        raise broken(entry, f"{component.config} is no subclass of collie_core.api.ComponentConfig")
    model: type[ComponentConfig] = resolved
    written = get_args(model.model_fields["type"].annotation)
    if written and entry.name not in map(normalise, map(str, written)):
        raise broken(entry, f"{component.config} has type {written[0]!r}, its entry point {entry.name!r}")
    return model


def _bare_config(entry: Entry) -> type[ComponentConfig]:
    """The fields that every plugin of the kind has, `type` among them."""
    from typing import Literal

    from pydantic import create_model

    from collie_core.config.base import AdapterConfig, ComponentConfig, OptimizerConfig
    from collie_core.config.evaluation import EvaluatorConfig
    from collie_core.config.server import ServerConfig

    bases: dict[str, type[ComponentConfig]] = {
        "optimizer": OptimizerConfig,
        "adapter": AdapterConfig,
        "evaluator": EvaluatorConfig,
        "server": ServerConfig,
    }
    base = bases.get(entry.kind, ComponentConfig)
    tag: Any = Literal[entry.name]
    title = entry.name.title().replace("-", "") + "Config"
    return create_model(title, __base__=base, type=(tag, entry.name))


def _options(model: type[ComponentConfig]) -> list[str]:
    return [name for name in model.model_fields if name not in model.for_the_core]


# -- hooks --------------------------------------------------------------------------------------------------


class CoreBuilders:
    """The core's own build steps. They are asked last, so that a plugin may answer first or wrap them."""

    def __init__(self) -> None:
        self.result: Any = None  # what was built last; another result means that a plugin substituted it

    def collie_build_model_partition(
        self,
        target: Any,
        config: Any,
        weights: str | None,
        vocabulary: Any,
        topology: Any,
        parallel: Any,
        store: Any,
    ) -> Any:
        from collie_core.model.build import build_model

        options = {"vocabulary": vocabulary, "topology": topology, "parallel": parallel, "store": store}
        self.result = build_model(target, config, weights, **options)
        return self.result

    def collie_build_optimizer(self, target: Any, params: Any, config: Any) -> Any:
        self.result = target(params, **_fields(config))
        return self.result

    def collie_build_adapter(self, target: Any, model: Any, config: Any) -> Any:
        self.result = target.attach(model, config)
        return self.result

    def collie_build_metric(self, target: Any, config: Any) -> Any:
        self.result = target(**_fields(config))
        return self.result

    def collie_build_evaluator(self, target: Any, config: Any) -> Any:
        self.result = target(**_fields(config))
        return self.result

    def collie_build_server(self, target: Any, config: Any) -> Any:
        self.result = target(**_fields(config))
        return self.result


def _fields(config: ComponentConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _options(type(config))}


@functools.cache
def _manager_class() -> type[pluggy.PluginManager]:
    import pluggy

    class Manager(pluggy.PluginManager):
        """Knows hooks by their name, as pytest does: a callback needs no decorator to be heard."""

        def parse_hookspec_opts(self, module_or_class: Any, name: str) -> pluggy.HookspecOpts | None:
            if name not in _HOOK_NAMES:
                return None
            firstresult = name in Hooks.FIRST_RESULT
            return {
                "firstresult": firstresult,
                "historic": False,
                "warn_on_impl": None,
                "warn_on_impl_args": None,
            }

        def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
            marked = super().parse_hookimpl_opts(plugin, name)
            if marked is not None or not _is_hook(plugin, name):
                return marked
            return {
                "wrapper": False,
                "hookwrapper": False,
                "optionalhook": False,
                "tryfirst": False,
                "trylast": isinstance(plugin, CoreBuilders),
                "specname": None,
            }

    return Manager


def _is_hook(plugin: object, name: str) -> bool:
    """Whether an undecorated attribute is meant as a hook. Modules may have helpers that begin alike."""
    alike = name in _HOOK_NAMES or (name.startswith("collie_") and not inspect.ismodule(plugin))
    return alike and inspect.isroutine(inspect.getattr_static(plugin, name, None))


def _new_manager() -> pluggy.PluginManager:
    manager = _manager_class()("collie")
    manager.add_hookspecs(Hooks)
    return manager


def _register_hooks(manager: pluggy.PluginManager, entry: Entry) -> None:
    if reason := entry.incompatible():
        raise broken(entry, reason)
    module = _resolve(entry, entry.value)
    if fault := _register(manager, module, entry.qualified):
        raise broken(entry, fault)


def _register_callback(manager: pluggy.PluginManager, callback: object) -> None:
    label = f"callback {getattr(callback, '__qualname__', type(callback).__qualname__)}"
    if isinstance(callback, type):
        raise PluginError(f"{label} is a class: hand in an instance, {callback.__name__}()")
    if fault := _register(manager, callback, None):
        raise PluginError(f"{label}: {fault}")
    if not manager.get_hookcallers(callback):
        raise PluginError(f"{label} implements no hook. The hooks are {', '.join(_HOOK_NAMES)}.")


def _register(manager: pluggy.PluginManager, plugin: object, name: str | None) -> str:
    """Register and verify one plugin; says what is wrong with its hooks, "" when nothing is."""
    from pluggy import PluginValidationError

    try:
        manager.register(plugin, name)
        manager.check_pending()
    except (PluginValidationError, ValueError) as error:  # ValueError: registered already
        unknown = [hook for hook in vars(manager.hook) if hook.startswith("collie_") and hook not in _HOOK_NAMES]
        return f"{error}{near(unknown[0], _HOOK_NAMES) if unknown else ''}"
    return ""


# -- several processes --------------------------------------------------------------------------------------


def check_agreement(table: list[dict[str, str]], topology: Topology) -> None:
    """Stop when a rank has resolved other plugins than rank 0. Collective: every rank calls it.

    `table` is `Plugins.used()`. Every rank raises the same `PluginError`, so that none waits for another.
    """
    if topology.world_size == 1:
        return
    tables = topology.gather_objects(table)
    for rank, other in enumerate(tables):
        if difference := _difference(tables[0], other, rank):
            raise PluginError(f"{difference} Install the same plugins for every process.")


def _difference(first: list[dict[str, str]], other: list[dict[str, str]], rank: int) -> str:
    ours, theirs = _by_name(first), _by_name(other)
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            kind, name = key
            here, there = ours.get(key, "not loaded"), theirs.get(key, "not loaded")
            return f"rank {rank} disagrees about {kind} {name!r}: {there}; on rank 0: {here}."
    return ""


def _by_name(table: list[dict[str, str]]) -> dict[tuple[str, str], str]:
    origins: dict[tuple[str, str], str] = {}
    for row in table:
        if row["kind"] == "tracker":  # the main rank alone has them
            continue
        key = (row["kind"], row["name"])
        origin = f"{row['distribution']} {row['version']} ({row['value']})"
        origins[key] = f"{origins[key]} and {origin}" if key in origins else origin
    return origins
