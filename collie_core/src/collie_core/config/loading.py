"""YAML to plain data with the line of every key, dotted overrides, and back to YAML.

The scalars are those of YAML 1.2 (the core schema): `1e-5` is a number; `no`, `12:30` and dates are text.
A file can neither make the reader run code nor make it work for long: no tags but the core ones, and limits
on size, on nesting and on what aliases expand to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from collie_core.config import aliases
from collie_core.config.document import Document
from collie_core.config.problems import Guide
from collie_core.errors import MISSING, ConfigError, Problem

MAX_BYTES = 1 << 20
MAX_NODES = 10_000  # after aliases are expanded
MAX_DEPTH = 50
COMMAND_LINE = "command line"

_TAG = "tag:yaml.org,2002:"
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDLESS = re.compile(r"\.(inf|nan)")  # float() wants them without the dot
_CORE_SCHEMA = {
    "null": (r"~|null|Null|NULL|", [*"~nN", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    "float": (_FLOAT.pattern, [*"-+.0123456789"]),
}


def read_file(path: str | PathLike[str]) -> Document:
    """The configuration in a YAML file.

    Raises:
        ConfigError: there is no such file, or it is not a mapping in UTF-8 YAML.
    """
    name = str(path)
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        hint = "`collie init` writes one." if isinstance(error, FileNotFoundError) else ""
        raise _fatal(name, f"cannot be read: {reason}", hint=hint) from error
    if len(raw) > MAX_BYTES:
        raise _fatal(name, f"is larger than {MAX_BYTES >> 20} MiB, which no configuration is")
    try:
        return read_text(raw.decode("utf-8-sig"), name)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise _fatal(name, f"is not UTF-8: byte 0x{raw[error.start]:02x}", line, "Save it as UTF-8.") from error


def read_text(text: str, name: str) -> Document:
    """The configuration in a YAML text; `name` stands for the file in messages."""
    reader = _Constructor(name, Document({}, {"": name}))
    node = reader.compose(text)
    if node is None:
        raise _fatal(name, "is empty", hint="`collie init` writes a configuration to start from.")
    if not isinstance(node, MappingNode):
        raise _fatal(name, "must hold sections such as `model:` and `train:`", node.start_mark.line + 1)
    reader.document.data = reader.construct(node, "")
    return reader.document


def apply_overrides(document: Document, overrides: Iterable[str], guide: Guide) -> None:
    """Set each `dotted.key=value` in the document. Values are YAML; items of lists have their index."""
    for text in overrides:
        key, separator, written = text.partition("=")
        key = key.strip()
        if not separator or not all(key.split(".")):
            rule = "is no override of the form key=value, such as train.max_steps=10"
            document.problems.append(Problem(text, rule, origin=COMMAND_LINE, value=written))
            continue
        try:
            value = _read_value(written)
        except ConfigError as error:
            rule = "is not valid YAML"
            hint = f"Put it in quotes. ({error.problems[0].rule})"
            document.problems.append(Problem(key, rule, written, hint, COMMAND_LINE))
            continue
        _override(document, key, value, guide)


def dump(data: dict[str, Any]) -> str:
    """YAML that both YAML 1.1 and YAML 1.2 readers understand alike."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=100)


def dump_value(value: Any) -> str:
    """A value of a key on one line."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _override(document: Document, key: str, value: Any, guide: Guide) -> None:
    alias = aliases.find(guide, document.data, key)
    if alias is not None:
        document.notes.append(f"{COMMAND_LINE}: {key} is called {alias.target} here")
        key, value = alias.target, aliases.translated(alias, value)
    if key == "model" and isinstance(value, str):
        document.notes.append(f"{COMMAND_LINE}: model is called model.model_name_or_path here")
        value = {"model_name_or_path": value}
    if value is MISSING:
        return
    if value is None and key in guide.root.model_fields:
        document.data.pop(key, None)
        return
    section = key.partition(".")[0]
    if section not in document.data:
        document.origins[section] = COMMAND_LINE
    if fault := _set(document.data, key.split("."), value):
        document.problems.append(Problem(key, fault, value, origin=COMMAND_LINE))
        return
    for below in [name for name in document.origins if name.startswith(f"{key}.")]:
        del document.origins[below]
    document.origins[key] = COMMAND_LINE


def _set(data: dict[str, Any], path: list[str], value: Any) -> str:
    """Set the value at `path`, making the sections on the way; says why not, "" when done."""
    if len(path) > 1 and isinstance(word := data.get(path[0]), str) and path[0] in aliases.SHORT:
        data[path[0]] = {aliases.SHORT[path[0]]: word}
    holder: Any = data
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(holder, list):
            if not part.isdecimal() or int(part) >= len(holder):
                return f"{'.'.join(path[:depth])} is a list of {len(holder)}, with indices from 0"
            index: Any = int(part)
        elif isinstance(holder, dict):
            index = part
        else:
            return f"{'.'.join(path[:depth])} is not a section, so it has no keys"
        if last:
            holder[index] = value
        elif isinstance(holder, dict) and holder.get(index) is None:
            holder[index] = {}
        holder = holder[index]
    return ""


def _read_value(text: str) -> Any:
    reader = _Constructor("value", Document({}))
    node = reader.compose(text)
    value = None if node is None else reader.construct(node, "")
    if reader.document.problems:
        raise ConfigError(reader.document.problems)
    return value


def _fatal(name: str, rule: str, line: int | None = None, hint: str = "") -> ConfigError:
    return ConfigError([Problem("", rule, MISSING, hint, origin=f"{name}:{line}" if line else name)])


class _Constructor:
    """Nodes to plain data. What is wrong with one key is collected; what is wrong with the file is raised."""

    def __init__(self, name: str, document: Document) -> None:
        self.name = name
        self.document = document

    def compose(self, text: str) -> Node | None:
        try:
            node = _Loader(text).get_single_node()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            said = ", ".join(filter(None, (error.context, error.problem)))
            raise _fatal(self.name, f"is not valid YAML: {said}", mark.line + 1 if mark else None) from error
        except ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise _fatal(self.name, f"holds a character that YAML forbids: {error.character!r}", line) from error
        except (ValueError, OverflowError) as error:  # an escape such as "\UFFFFFFFF" names no character
            raise _fatal(self.name, f"is not valid YAML: {error}") from error
        if node is not None:
            self._refuse_bomb(node)
        return node

    def construct(self, node: Node, key: str) -> Any:
        if key:
            self.document.origins.setdefault(key, self._origin(node))
        if isinstance(node, MappingNode):
            self._check_tag(node, key, "map")
            return dict(self._items(node, key))
        if isinstance(node, SequenceNode):
            self._check_tag(node, key, "seq")
            return [self.construct(item, f"{key}.{index}".lstrip(".")) for index, item in enumerate(node.value)]
        assert isinstance(node, ScalarNode)
        return self._scalar(node, key)

    def _items(self, node: MappingNode, key: str) -> Iterator[tuple[str, Any]]:
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            name = key_node.value  # `on: 1` and `1: 1` have the keys "on" and "1", whatever else they look like
            if not isinstance(key_node, ScalarNode) or not _is_text(name):
                self._problem(key_node, key, "has a key that is not plain text")
                continue
            path = f"{key}.{name}" if key else name
            if name == "<<":
                self._problem(key_node, path, "merging with << is not supported", "Write the keys out.")
                continue
            if name in lines:
                rule = f"is written twice: on line {lines[name]} and on line {key_node.start_mark.line + 1}"
                self._problem(key_node, path, rule, "Keep one.")
                continue
            lines[name] = key_node.start_mark.line + 1
            value_line = isinstance(value_node, ScalarNode) and value_node.value
            self.document.origins[path] = self._origin(value_node if value_line else key_node)
            yield name, self.construct(value_node, path)

    def _scalar(self, node: ScalarNode, key: str) -> Any:
        text, kind = node.value, node.tag.removeprefix(_TAG)
        if kind == "str" and _is_text(text):
            return text
        if kind in ("null", "bool") and text.lower() in _WORDS:
            return _WORDS[text.lower()]
        if kind == "int" and re.fullmatch(_CORE_SCHEMA["int"][0], text):
            if len(text) <= 40:
                return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
            self._problem(node, key, "is a number beyond 2^63", value=text)
        elif kind in ("int", "float") and _FLOAT.fullmatch(text):
            return float(_WORDLESS.sub(r"\1", text.lower()))
        elif kind == "str":
            self._problem(node, key, "holds half of a surrogate pair, which is no character", value=text)
        else:
            self._check_tag(node, key, "str")
        return None

    def _check_tag(self, node: Node, key: str, expected: str) -> None:
        if node.tag != _TAG + expected:
            self._problem(node, key, f"has the tag {node.tag}, and tags are not supported", "Leave the tag out.")

    def _problem(self, node: Node, key: str, rule: str, hint: str = "", value: object = MISSING) -> None:
        self.document.problems.append(Problem(key, rule, value, hint, self._origin(node)))

    def _origin(self, node: Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"

    def _refuse_bomb(self, root: Node) -> None:
        """Aliases make a graph of the tree: count what it expands to, before anything is built."""
        sizes: dict[int, int] = {}

        def size(node: Node) -> int:
            if id(node) in sizes:
                if sizes[id(node)] == 0:
                    raise _fatal(self.name, "has an alias that contains itself", node.start_mark.line + 1)
                return sizes[id(node)]
            sizes[id(node)] = 0
            total = 1 + sum(map(size, _children(node)))
            if total > MAX_NODES:
                rule = f"has more than {MAX_NODES} values, aliases expanded"
                raise _fatal(self.name, rule, node.start_mark.line + 1)
            sizes[id(node)] = total
            return total

        size(root)


def _children(node: Node) -> Iterator[Node]:
    if isinstance(node, MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, SequenceNode):
        yield from node.value


def _is_text(text: object) -> bool:
    """Whether UTF-8 can hold it: the escapes of YAML can make half of a surrogate pair."""
    return isinstance(text, str) and not any("\ud800" <= character <= "\udfff" for character in text)


class _CoreResolver(BaseResolver):
    """What a plain scalar is, by YAML 1.2's core schema."""


for _name, (_pattern, _first) in _CORE_SCHEMA.items():
    _CoreResolver.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)


class _Loader(Reader, Scanner, Parser, Composer, _CoreResolver):
    """PyYAML's reader up to the tree of nodes; without a constructor, nothing in a file can be executed."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _CoreResolver.__init__(self)
        self.depth = self.nodes = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        for limit, number, what in ((MAX_DEPTH, self.depth, "levels"), (MAX_NODES, self.nodes, "values")):
            if number > limit:
                mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
                raise yaml.MarkedYAMLError(problem=f"it has more than {limit} {what}", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every text that either version of YAML would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> ScalarNode:
    # PyYAML writes these three as they are outside of double quotes, where they read back as line breaks.
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _represent_text)
for _name, (_pattern, _first) in _CORE_SCHEMA.items():
    _Dumper.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)
