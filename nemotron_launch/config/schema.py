"""JSON Schema for configs: reading it, its defaults, the keys that it knows. What is wrong is found in validation.py.

A small reader of draft 2020-12 of its own: it fills defaults (interpolations too), follows relative `$ref`s, knows
`x-unsupported` and `x-alias-of`, and costs a few milliseconds where jsonschema's import alone costs sixty. It refuses
a keyword that it does not know; a test holds it against jsonschema.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from nemotron_launch import cache
from nemotron_launch.config import tree
from nemotron_launch.config.tree import DEFAULT, Node
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import field, frozen
from nemotron_launch.resources import display

_KEYWORDS = frozenset(
    (
        *("$schema", "$id", "$comment", "$defs", "$ref", "title", "description", "examples", "default", "deprecated"),
        *("type", "enum", "const", "anyOf", "oneOf", "allOf"),
        *("properties", "additionalProperties", "propertyNames", "required", "minProperties", "maxProperties"),
        *("items", "minItems", "maxItems", "uniqueItems", "minLength", "maxLength", "pattern"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        *("x-unsupported", "x-alias-of", "x-inert"),
    )
)
_ABSENT: Any = object()


@frozen
class Schema:
    """A schema file with every `$ref` replaced by what it names."""

    path: Path
    tree: dict[str, Any]
    filled: dict[int, Node | None] = field(default_factory=dict, repr=False)
    aliases: list[tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=list, repr=False)


_loaded: dict[Path, tuple[dict[Path, int], Schema]] = {}


def load_schema(path: Path) -> Schema:
    """Read a schema and the files that it names. Kept until one of them changes."""
    path = path.absolute()
    known = _loaded.get(path)
    if known and all(_changed_ns(file) == when for file, when in known[0].items()):
        return known[1]
    kept = cache.remembered("schema", path)
    if kept is not None:
        names, inlined = kept
        read = [Path(name) for name in names]
    else:
        files: dict[Path, Any] = {}
        inlined = _inline(_json(path, files), path, files, ())
        read = list(files)
        cache.remember("schema", path, read, [[str(file) for file in read], inlined])
    schema = Schema(path, inlined)
    _loaded[path] = ({file: _changed_ns(file) for file in read}, schema)
    return schema


def _changed_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1


def _json(path: Path, files: dict[Path, Any]) -> Any:
    if path not in files:
        try:
            files[path] = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(f"the schema cannot be read: {reason}", where=display(path)) from None
        except ValueError as error:
            raise UserError(f"the schema is not JSON: {error}", where=display(path)) from None
    return files[path]


def _inline(part: Any, path: Path, files: dict[Path, Any], chain: tuple[str, ...]) -> Any:
    """Replace `$ref`s. What stands beside one goes over what it names; `properties` and object defaults are joined."""
    if not isinstance(part, dict):
        return part
    unknown = [key for key in part if key not in _KEYWORDS]
    if unknown:
        raise UserError(f"the schema uses {unknown[0]}, which is not understood here", where=display(path))
    done: dict[str, Any] = {}
    for key, value in part.items():
        if key == "properties":
            done[key] = {name: _inline(sub, path, files, chain) for name, sub in value.items()}
        elif key in ("items", "additionalProperties", "propertyNames"):
            done[key] = _inline(value, path, files, chain)
        elif key in ("anyOf", "oneOf", "allOf"):
            done[key] = [_inline(sub, path, files, chain) for sub in value]
        elif key not in ("$ref", "$defs"):
            done[key] = value
    for other in done.pop("allOf", []):
        done = _joined(other, done)
    if "$ref" not in part:
        return done
    file, _, pointer = part["$ref"].partition("#")
    target = Path(os.path.normpath(path.parent / file)) if file else path
    link = f"{target}#{pointer}"
    if link in chain:
        raise UserError(f"the schema refers to itself through {part['$ref']}", where=display(path))
    named = _json(target, files)
    for step in pointer.strip("/").split("/") if pointer.strip("/") else ():
        if not isinstance(named, dict) or step not in named:
            raise UserError(f"the schema refers to {part['$ref']}, which is not there", where=display(path))
        named = named[step]
    return _joined(_inline(named, target, files, (*chain, link)), done)


def _joined(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {**base, **over}
    for key in ("properties", "default"):
        if isinstance(base.get(key), dict) and isinstance(over.get(key), dict):
            both[key] = _deep(base[key], over[key])
    if "required" in base and "required" in over:
        both["required"] = list(dict.fromkeys([*base["required"], *over["required"]]))
    return both


def _deep(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = dict(base)
    for key, value in over.items():
        below = both.get(key)
        both[key] = _deep(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return both


# Defaults ----------------------------------------------------------------------------------------------------------


def fill(schema: Schema, root: Node) -> Node:
    """The config with the schema's defaults wherever a key is missing, keys in the schema's order."""
    return _fill(schema, schema.tree, root) or root


def _fill(schema: Schema, part: Any, node: Node | None) -> Node | None:
    if not isinstance(part, dict):
        return node
    if node is None:
        if id(part) not in schema.filled:
            schema.filled[id(part)] = _absent(schema, part)
        return schema.filled[id(part)]
    if isinstance(node.value, list):
        items = part.get("items")
        if not isinstance(items, dict) or "properties" not in items:
            return node
        return Node([_fill(schema, items, item) or item for item in node.value], node.source)
    if not isinstance(node.value, dict):
        return node
    part = _object_branch(part)
    if isinstance(part.get("default"), dict) and part["default"]:
        node = tree.underlay(tree.from_plain(part["default"], DEFAULT), node)
    given = node.value
    values: dict[str, Node] = {}
    for key, sub in part.get("properties", {}).items():
        below = _fill(schema, sub, given.get(key))
        if below is not None:
            values[key] = below
    extra = part.get("additionalProperties")
    for key, item in given.items():
        if key not in values:
            values[key] = _fill(schema, extra, item) or item
    return Node(values, node.source)


def _absent(schema: Schema, part: dict[str, Any]) -> Node | None:
    """What a key that nobody set becomes; None: it stays absent."""
    default = part.get("default", _ABSENT)
    if default is not _ABSENT:
        node = tree.from_plain(default, DEFAULT)
        return _fill(schema, part, node) if isinstance(default, dict) else node
    if "properties" not in part:
        return None
    node = _fill(schema, part, Node({}, DEFAULT)) or Node({}, DEFAULT)
    return node if node.value else None


def _object_branch(part: dict[str, Any]) -> dict[str, Any]:
    """Of alternatives, the one that describes a mapping."""
    if "properties" not in part:
        for branch in (*part.get("anyOf", ()), *part.get("oneOf", ())):
            if isinstance(branch, dict) and ("properties" in branch or "additionalProperties" in branch):
                return {**part, **branch}
    return part


# Known keys --------------------------------------------------------------------------------------------------------


def knows(schema: Schema, path: tree.Path) -> Literal["known", "free", "unknown"]:
    """Whether the schema names this key; "free" when it lies in a mapping whose keys are the user's own."""
    part: Any = schema.tree
    answer: Literal["known", "free"] = "known"
    for segment in path:
        if not isinstance(part, dict):
            return "free"  # below `additionalProperties: true`
        part = _object_branch(part)
        properties = part.get("properties", {})
        if segment in properties:
            part = properties[segment]
        elif segment.isdigit() and "items" in part:
            part = part["items"]
        elif "properties" in part or "additionalProperties" in part:
            extra = part.get("additionalProperties", True)
            if extra is False:
                return "unknown"
            part, answer = extra, "free"
        elif part.get("type") in (None, "object", "array") or "object" in part.get("type", ()):
            return "free"
        else:
            return "unknown"
    return answer


def known_paths(schema: Schema) -> Iterator[tuple[tree.Path, dict[str, Any]]]:
    """Every key that the schema names, with its part of the schema, in the schema's order."""

    def walk(part: Any, path: tree.Path) -> Iterator[tuple[tree.Path, dict[str, Any]]]:
        if isinstance(part, dict):
            for key, sub in _object_branch(part).get("properties", {}).items():
                if isinstance(sub, dict):
                    yield (*path, key), sub
                    yield from walk(sub, (*path, key))

    return walk(schema.tree, ())


def aliases(schema: Schema) -> list[tuple[tree.Path, tree.Path]]:
    """The keys that are another name for a key: (alias, the key that it sets)."""
    if not schema.aliases:
        found = [(path, part["x-alias-of"]) for path, part in known_paths(schema) if "x-alias-of" in part]
        schema.aliases.extend((path, tuple(target.split("."))) for path, target in found)
    return schema.aliases


def suggest(known: list[str], unknown: str) -> str | None:
    """`did you mean …?` for a dotted key: a neighbour spelt alike, the same name elsewhere, or a path spelt alike."""
    from difflib import get_close_matches

    parent, _, last = unknown.rpartition(".")
    depth = unknown.count(".")
    beside = [path for path in known if path.rpartition(".")[0] == parent]
    near = get_close_matches(last, [path.rpartition(".")[2] for path in beside], n=1, cutoff=0.6)
    found = [path for path in beside if path.rpartition(".")[2] in near]
    if not found:
        found = get_close_matches(unknown, [path for path in known if path.count(".") == depth], n=1, cutoff=0.8)
    if not found:
        found = [path for path in known if path.endswith("." + last)][:3]
    if not found:
        found = get_close_matches(unknown, known, n=2, cutoff=0.7)
    if not found:
        return None
    return f"did you mean {' or '.join(found)}?"
