"""What needs PyYAML: text to trees and to plain data, and back. Used through yaml_files, which spares its import."""

from __future__ import annotations

import re
from typing import Any

import yaml

from nemotron_launch.config.tree import Node, Source
from nemotron_launch.errors import UserError

_LoaderBase: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DumperBase: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
# YAML 1.1 reads 1e-6 as text, which OmegaConf and so NeMo-RL's configs do not, and 04:00:00 as a number in base 60.
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF))\Z|\.(?:nan|NaN|NAN)\Z"
)
_INT = re.compile(r"[-+]?(?:0b[01_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)\Z")
_NUMBERS = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:int")
_DEEPEST = 400
_LARGEST = 200_000  # values in one file; more is an alias bomb


def _resolvers(base: Any, gone: tuple[str, ...]) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table = {
        char: [(tag, pattern) for tag, pattern in pairs if tag not in gone]
        for char, pairs in base.yaml_implicit_resolvers.items()
    }
    for tag, pattern, chars in ((_NUMBERS[0], _FLOAT, "-+.0123456789"), (_NUMBERS[1], _INT, "-+0123456789")):
        for char in chars:
            table.setdefault(char, []).append((tag, pattern))
    return table


class _Loader(_LoaderBase):
    yaml_implicit_resolvers = _resolvers(_LoaderBase, (*_NUMBERS, "tag:yaml.org,2002:timestamp"))


class _Dumper(_DumperBase):
    # Text that any of the dialects would read as something else is quoted.
    yaml_implicit_resolvers = _resolvers(_DumperBase, ())

    def ignore_aliases(self, data: Any) -> bool:
        return True


def parse_tree(text: str, shown: str) -> Node:
    """A YAML mapping with the line of every key; `shown` names the file in messages."""
    loader = _Loader(text)
    try:
        _refuse_deep(text, shown)
        root = loader.get_single_node()
        if root is None:
            return Node({}, Source(shown, 1))
        if not isinstance(root, yaml.MappingNode):
            raise UserError(
                f"a mapping (key: value) expected, found {_kind(root)}", where=f"{shown}:{root.start_mark.line + 1}"
            )
        return _Builder(loader, shown).build(root, root.start_mark.line + 1)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, shown) from None
    except yaml.YAMLError as error:
        raise UserError(f"not YAML: {str(error).splitlines()[0]}", where=shown) from None
    finally:
        loader.dispose()


def _refuse_deep(text: str, shown: str) -> None:
    """libyaml's composer recurses without a limit and would take the process with it."""
    if len(text) < 1_000_000 and text.count("[") + text.count("{") + text.count("- ") < _DEEPEST:
        return
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            line = event.start_mark.line + 1 if event.start_mark else None
            raise UserError("nested too deeply", where=str(Source(shown, line)))


def parse_plain(text: str, shown: str) -> Any:
    """YAML as plain data, without lines."""
    try:
        _refuse_deep(text, shown)
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, shown) from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"not YAML: {str(error).splitlines()[0]}", where=shown) from None


def dump(data: Any) -> str:
    """Plain data as YAML that every reader, 1.1 or 1.2 or OmegaConf's, reads alike. Keys keep their order."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)
    return text


def _syntax_error(error: yaml.MarkedYAMLError, text: str, shown: str) -> UserError:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else None
    problem = error.problem or error.context or "not YAML"
    written = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
    if "cannot start any token" in problem and "\t" in written[: len(written) - len(written.lstrip()) + 1]:
        return UserError("a tab in the indentation", where=str(Source(shown, line)), hint="YAML wants blanks there")
    where = str(Source(shown, line))
    hint = written.rstrip() or None
    if error.context and error.context_mark and error.context_mark.line + 1 != line:
        hint = f"{error.context}, line {error.context_mark.line + 1}" + (f"\n{hint}" if hint else "")
    return UserError(f"not YAML: {problem}", where=where, hint=hint)


def _kind(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else repr(node.value)


class _Builder:
    """Turns PyYAML's nodes into ours."""

    def __init__(self, loader: Any, shown: str) -> None:
        self.loader = loader
        self.shown = shown
        self.count = 0
        self.open: set[int] = set()

    def build(self, node: yaml.Node, line: int) -> Node:
        self.count += 1
        if self.count > _LARGEST:
            raise UserError(f"more than {_LARGEST} values", where=f"{self.shown}:{line}", hint="do aliases repeat?")
        source = Source(self.shown, line)
        if isinstance(node, yaml.ScalarNode):
            try:
                return Node(self.loader.construct_object(node), source)
            except ValueError as error:
                raise UserError(f"not a value: {error}", where=str(source)) from None
        if id(node) in self.open:
            raise UserError("an alias that contains itself", where=str(source))
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                items = [self.build(item, item.start_mark.line + 1) for item in node.value]
                return Node(items, source)
            assert isinstance(node, yaml.MappingNode)
            return self._mapping(node, source)
        finally:
            self.open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, source: Source) -> Node:
        items: dict[str, Node] = {}
        inherited: dict[str, Node] = {}
        lines: dict[str, int] = {}
        replaces = False
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                self._inherit(value_node, line, inherited)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError("a key must be text", where=f"{self.shown}:{line}")
            key = key_node.value
            if key in lines:
                raise UserError(f"{key} is set twice, first on line {lines[key]}", where=f"{self.shown}:{line}")
            lines[key] = line
            below = self.build(value_node, line)
            if key == "_override_":
                if not isinstance(below.value, bool):
                    raise UserError("_override_ takes true or false", where=f"{self.shown}:{line}")
                replaces = below.value
            else:
                items[key] = below
        return Node({**inherited, **items} if inherited else items, source, replaces)

    def _inherit(self, node: yaml.Node, line: int, inherited: dict[str, Node]) -> None:
        """YAML's own `<<: *base`. Of several the first wins."""
        for base in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(base, yaml.MappingNode):
                raise UserError("<< takes a mapping or a list of mappings", where=f"{self.shown}:{line}")
            for key, item in self.build(base, line).value.items():
                inherited.setdefault(key, item)
