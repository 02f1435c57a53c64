"""Reading and writing YAML: every value with its line, one clear message for everything that can be wrong in a file.

Importing PyYAML costs as much as composing ten configs. So what was read from a file is kept in the user's cache until
the file changes, and data that is plain words and numbers is written here; the rest goes to yaml_reader.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from nemotron_launch import cache
from nemotron_launch.config.tree import Node, Source
from nemotron_launch.errors import UserError
from nemotron_launch.resources import display

# Words that PyYAML writes without quotes and every reader takes for text, unless they are in _NOT_TEXT.
_PLAIN = re.compile(r"(?:[A-Za-z_/]|\./)[\w./@+-]*(?:(?: |:)[\w./@+-]+)*", re.ASCII)
_NOT_TEXT = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null"))


def load_tree(path: Path, name: str = "config") -> Node:
    """Read a YAML mapping with the line of every key. UserError: unreadable, bad YAML, a duplicate key, no mapping."""
    shown = display(path)
    return _kept(
        path,
        "tree",
        lambda: parse_tree(_read(path, name), shown),
        encode=_encode,
        decode=lambda data: _decode(data, shown),
    )


def load_plain(path: Path, name: str = "file") -> Any:
    """Read YAML as plain data, without lines: for manifests, where speed counts."""

    def parse() -> Any:
        from nemotron_launch.config.yaml_reader import parse_plain

        return parse_plain(_read(path, name), display(path))

    return _kept(path, "plain", parse, encode=_json_only, decode=lambda data: data)


def parse_tree(text: str, shown: str) -> Node:
    """As load_tree, for text. `shown` names it in messages."""
    from nemotron_launch.config import yaml_reader

    return yaml_reader.parse_tree(text, shown)


def dump(data: Any) -> str:
    """Write plain data as YAML that every reader, 1.1 or 1.2 or OmegaConf's, reads alike. Keys keep their order."""
    try:
        if isinstance(data, dict) and data:
            return "".join(f"{line}\n" for line in _mapping(data, ""))
    except _NotPlain:
        pass
    from nemotron_launch.config import yaml_reader

    return yaml_reader.dump(data)


def _read(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no such {name} file", where=display(path)) from None
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text (byte {error.start})", where=display(path)) from None
    except OSError as error:
        raise UserError(f"cannot be read: {(error.strerror or str(error)).lower()}", where=display(path)) from None


# Kept trees --------------------------------------------------------------------------------------------------------


class _NotPlain(Exception):
    """Data that JSON, or the writer below, cannot carry as it is."""


def _kept(
    path: Path, kind: str, parse: Callable[[], Any], *, encode: Callable[[Any], Any], decode: Callable[[Any], Any]
) -> Any:
    """What `parse` makes of a file, from the cache where the file is still the same."""
    data = cache.remembered(kind, path)
    if data is not None:
        with suppress(ValueError, TypeError, AttributeError):
            return decode(data)
    value = parse()
    with suppress(_NotPlain):
        cache.remember(kind, path, [path], encode(value))
    return value


def _encode(node: Node) -> list[Any]:
    """[line, value, kind]: 0 a scalar, 1 a list, 2 a mapping, 3 one that replaces."""
    value = node.value
    if isinstance(value, dict):
        return [node.source.line, {key: _encode(item) for key, item in value.items()}, 3 if node.replaces else 2]
    if isinstance(value, list):
        return [node.source.line, [_encode(item) for item in value], 1]
    return [node.source.line, _json_only(value), 0]


def _decode(data: list[Any], shown: str) -> Node:
    line, value, kind = data
    if kind >= 2:
        value = {key: _decode(item, shown) for key, item in value.items()}
    elif kind == 1:
        value = [_decode(item, shown) for item in value]
    return Node(value, Source(shown, line), kind == 3)


def _json_only(value: Any) -> Any:
    """The value, if JSON gives back what it is given."""
    if isinstance(value, dict):
        if not all(type(key) is str for key in value):
            raise _NotPlain
        for item in value.values():
            _json_only(item)
    elif isinstance(value, list):
        for item in value:
            _json_only(item)
    elif value is not None and type(value) not in (str, int, float, bool):
        raise _NotPlain
    return value


# Writing -----------------------------------------------------------------------------------------------------------


def _mapping(data: dict[Any, Any], indent: str) -> Iterator[str]:
    for key, value in data.items():
        head = f"{indent}{_text(key)}:"
        if isinstance(value, dict) and value:
            yield head
            yield from _mapping(value, f"{indent}  ")
        elif isinstance(value, list) and value:
            yield head
            yield from _list(value, indent)
        else:
            yield f"{head} {_scalar(value)}"


def _list(items: list[Any], indent: str) -> Iterator[str]:
    for item in items:
        if isinstance(item, dict) and item:
            lines = list(_mapping(item, f"{indent}  "))
            yield f"{indent}- {lines[0][len(indent) + 2 :]}"
            yield from lines[1:]
        elif isinstance(item, list) and item:
            raise _NotPlain
        else:
            yield f"{indent}- {_scalar(item)}"


def _scalar(value: Any) -> str:
    kind = type(value)
    if kind is str:
        return _text(value) if value else "''"
    if kind is bool:
        return "true" if value else "false"
    if value is None:
        return "null"
    if kind is int:
        return str(value)
    if kind is float and value - value == 0:  # finite
        text = repr(value)
        return text.replace("e", ".0e", 1) if "." not in text and "e" in text else text
    if value == {} and kind is dict:
        return "{}"
    if value == [] and kind is list:
        return "[]"
    raise _NotPlain


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > 100 or not _PLAIN.fullmatch(value) or value.lower() in _NOT_TEXT:
        raise _NotPlain
    return value
