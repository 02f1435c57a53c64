"""Config trees: values that remember the file and line, or the command line, that they came from.

Trees are never changed in place: merging and setting share what they do not touch, so a file is read once however many
configs are composed from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

Path = tuple[str, ...]


class Source(NamedTuple):
    """Where a value was written. `origin` is a file as shown to the user, "command line", or "default"."""

    origin: str
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.origin}:{self.line}" if self.line else self.origin


COMMAND_LINE = Source("command line")
DEFAULT = Source("default")


class Node:
    """One value: a scalar, a dict of nodes or a list of nodes. `replaces`: written with `_override_: true`."""

    __slots__ = ("value", "source", "replaces")

    def __init__(self, value: Any, source: Source, replaces: bool = False) -> None:
        self.value = value
        self.source = source
        self.replaces = replaces


def from_plain(value: Any, source: Source) -> Node:
    """A tree of plain dicts, lists and scalars, every value with the same source."""
    if isinstance(value, dict):
        replaces = value.get("_override_") is True
        items = {str(key): from_plain(item, source) for key, item in value.items() if key != "_override_"}
        return Node(items, source, replaces)
    if isinstance(value, list | tuple):
        return Node([from_plain(item, source) for item in value], source)
    return Node(value, source)


def to_plain(node: Node) -> Any:
    """The tree without its sources, interpolations unresolved."""
    if isinstance(node.value, dict):
        return {key: to_plain(item) for key, item in node.value.items()}
    if isinstance(node.value, list):
        return [to_plain(item) for item in node.value]
    return node.value


def merge(base: Node, top: Node) -> Node:
    """`top` over `base`: mappings merge key by key, everything else, lists too, replaces."""
    if not isinstance(base.value, dict) or not isinstance(top.value, dict) or top.replaces:
        return top
    items = dict(base.value)
    for key, item in top.value.items():
        items[key] = merge(items[key], item) if key in items else item
    return Node(items, top.source)


def underlay(base: Node, top: Node) -> Node:
    """As merge, but `_override_` has had its effect already and counts no more."""
    if not isinstance(base.value, dict) or not isinstance(top.value, dict):
        return top
    items = dict(base.value)
    for key, item in top.value.items():
        items[key] = underlay(items[key], item) if key in items else item
    return Node(items, top.source)


def child(node: Node, segment: str) -> Node | None:
    """What a key, or an index written as text, leads to from here."""
    if isinstance(node.value, dict):
        return node.value.get(segment)
    if isinstance(node.value, list) and segment.isdigit() and int(segment) < len(node.value):
        return node.value[int(segment)]
    return None


def find(root: Node, path: Path) -> Node | None:
    node: Node | None = root
    for segment in path:
        if node is None:
            return None
        node = child(node, segment)
    return node


def nearest(root: Node, path: Path) -> Node:
    """The node at `path`, or the deepest one on the way to it that exists."""
    node = root
    for segment in path:
        below = child(node, segment)
        if below is None:
            break
        node = below
    return node


def put(root: Node, path: Path, new: Node) -> Node:
    """The tree with `new` at `path`. Mappings are made on the way; a scalar on the way is replaced by a mapping.

    IndexError: `path` leads past the end of a list, or names a key in one.
    """
    if not path:
        return new
    segment, rest = path[0], path[1:]
    if isinstance(root.value, list):
        if not segment.isdigit() or int(segment) >= len(root.value):
            raise IndexError(segment)
        index = int(segment)
        changed = [*root.value[:index], put(root.value[index], rest, new), *root.value[index + 1 :]]
        return Node(changed, root.source)
    items = dict(root.value) if isinstance(root.value, dict) else {}
    items[segment] = put(items.get(segment, Node({}, new.source)), rest, new)
    return Node(items, root.source)


def drop(root: Node, path: Path) -> Node:
    """The tree without what is at `path`, which must exist."""
    segment, rest = path[0], path[1:]
    below = child(root, segment)
    assert below is not None
    if isinstance(root.value, list):
        index = int(segment)
        middle = [drop(below, rest)] if rest else []
        return Node([*root.value[:index], *middle, *root.value[index + 1 :]], root.source)
    items = dict(root.value)
    if rest:
        items[segment] = drop(below, rest)
    else:
        del items[segment]
    return Node(items, root.source)


def leaves(node: Node, path: Path = ()) -> Iterator[tuple[Path, Node]]:
    """Every scalar and every empty mapping or list, with its path."""
    items: Any
    if isinstance(node.value, dict):
        items = node.value.items()
    elif isinstance(node.value, list):
        items = ((str(index), item) for index, item in enumerate(node.value))
    else:
        items = ()
    empty = True
    for segment, item in items:
        empty = False
        yield from leaves(item, (*path, segment))
    if empty:
        yield path, node
