"""Composing a config: files with `defaults:`, layers, overrides, the schema's defaults, interpolation, checks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from nemotron_launch.config import tree
from nemotron_launch.config.data_manifest import apply_manifest
from nemotron_launch.config.interpolation import resolve, resolve_at
from nemotron_launch.config.overrides import Override, parse_override
from nemotron_launch.config.schema import Schema, aliases, fill, known_paths, knows, load_schema, suggest
from nemotron_launch.config.tree import COMMAND_LINE, DEFAULT, Node, Source
from nemotron_launch.config.validation import Problem, check
from nemotron_launch.config.yaml_files import load_tree
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen
from nemotron_launch.job import Use
from nemotron_launch.resources import display


@frozen
class Provenance:
    """Where each value of a composed config was written."""

    root: Node

    def where(self, key: str | tuple[str, ...]) -> str:
        """`file:line`, "command line" or "default" for a key; for a key that nobody wrote, of the mapping around it."""
        return str(self.source(key))

    def source(self, key: str | tuple[str, ...]) -> Source:
        path = tuple(key.split(".")) if isinstance(key, str) else key
        return tree.nearest(self.root, path).source


@frozen
class Composed:
    """A config with every layer applied and every interpolation resolved: plain dicts, lists and scalars.

    uses: where artifacts' names stood and their paths stand now.
    """

    name: str
    data: dict[str, Any]
    sources: Provenance
    files: tuple[Path, ...]
    overrides: tuple[str, ...]
    uses: tuple[Use, ...] = ()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a dotted key, or `default` where it or a mapping around it is absent or null."""
        value: Any = self.data
        for segment in key.split("."):
            if isinstance(value, dict):
                value = value.get(segment)
            elif isinstance(value, list) and segment.isdigit() and int(segment) < len(value):
                value = value[int(segment)]
            else:
                return default
            if value is None:
                return default
        return value

    def problem(self, key: str, message: str, hint: str | None = None) -> UserError:
        """A UserError about a key, with the place where its value was written."""
        return UserError(message, where=self.sources.where(key), hint=hint)


def compose(
    config: Path,
    overrides: Sequence[str] = (),
    *,
    schema: Path | None = None,
    step_dir: Path | None = None,
    layers: Sequence[Node] = (),
    env: Mapping[str, str] | None = None,
) -> Composed:
    """Compose one config file. Lowest first: schema defaults, the file's `defaults:`, the file, `layers`, overrides.

    schema: the step's schema.json, or None where everything is allowed. step_dir: what `step://` means in `defaults:`.
    layers: trees between config and command line (a profile's share). Every problem is a UserError with file and line;
    those of the values come all together.
    """
    return composer(config, schema=schema, step_dir=step_dir, layers=layers, env=env)(overrides)


class Composer(Protocol):
    """Composes lists of overrides over what lies below them. adjust: changes the tree before it is resolved."""

    def __call__(self, overrides: Sequence[str], adjust: Callable[[Node], Node] | None = None, /) -> Composed: ...


def composer(
    config: Path,
    *,
    schema: Path | None = None,
    step_dir: Path | None = None,
    layers: Sequence[Node] = (),
    env: Mapping[str, str] | None = None,
) -> Composer:
    """As compose, for many lists of overrides; what lies below them is read and merged once."""
    env = env if env is not None else os.environ
    files: list[Path] = []
    stack = [*_read(config, (), files, step_dir), *layers]
    base = Node({}, stack[-1].source if stack else DEFAULT)
    for layer in stack:
        base = tree.merge(base, layer)
    described = load_schema(schema) if schema else None
    order = {origin: rank for rank, origin in enumerate(_origins(stack))}

    def composed(overrides: Sequence[str], adjust: Callable[[Node], Node] | None = None, /) -> Composed:
        root = _apply_overrides(base, [parse_override(text) for text in overrides], described)
        if described:
            root = _apply_aliases(fill(described, root), described, order, env)
            root = apply_manifest(root, order, env)
        if adjust:
            root = adjust(root)
        data, problems = resolve(root, env)
        if described and not problems:
            problems = check(described, data)
        if problems:
            raise report(problems, root, config)
        return Composed(config.stem, data, Provenance(root), tuple(files), tuple(overrides))

    return composed


# Files -------------------------------------------------------------------------------------------------------------

_trees: dict[Path, tuple[int, str, Node]] = {}


def _load(path: Path) -> Node:
    """Read a file, once for as long as it does not change: a matrix of configs shares its defaults."""
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return load_tree(path)
    shown = display(path)
    known = _trees.get(path)
    if not known or known[:2] != (changed, shown):
        known = _trees[path] = (changed, shown, load_tree(path))
    return known[2]


def _read(path: Path, chain: tuple[Path, ...], files: list[Path], step_dir: Path | None) -> list[Node]:
    """The trees of a file and of what its `defaults:` name, lowest first."""
    path = Path(os.path.normpath(path.absolute()))
    if path in chain:
        names = " → ".join(display(p) for p in (*chain[chain.index(path) :], path))
        raise UserError(f"defaults in a circle: {names}", where=display(chain[-1]))
    body = _load(path)
    files.append(path)
    listed = body.value.get("defaults")
    if listed is None:
        return [body]
    own = Node({key: item for key, item in body.value.items() if key != "defaults"}, body.source, body.replaces)
    trees: list[Node] = []
    placed = False
    entries = listed.value if isinstance(listed.value, list) else [listed]
    for entry in entries:
        name = entry.value
        if name is None and entry is listed:
            continue
        if not isinstance(name, str) or not name:
            raise UserError(
                "defaults: takes the name of a config, or a list of names",
                where=str(entry.source),
                hint="for example  defaults: default  or  defaults: [default, _self_]",
            )
        if name == "_self_":
            if placed:
                raise UserError("defaults: names _self_ twice", where=str(entry.source))
            trees.append(own)
            placed = True
        else:
            trees.extend(_read(_named(path.parent, name, entry.source, step_dir), (*chain, path), files, step_dir))
    return trees if placed else [*trees, own]


def _named(folder: Path, name: str, source: Source, step_dir: Path | None) -> Path:
    """The file that an entry of `defaults:` names, with or without its suffix."""
    if name.startswith("step://") and step_dir is not None:
        base = step_dir / name.removeprefix("step://")
    else:
        base = folder / Path(name).expanduser()
    candidates = [base] if base.suffix in (".yaml", ".yml") else [Path(f"{base}.yaml"), Path(f"{base}.yml")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    there = sorted(path.stem for path in base.parent.glob("*.y*ml")) if base.parent.is_dir() else []
    hint = suggest(there, base.stem) or (f"there are: {', '.join(there)}" if there else None)
    if step_dir is not None and (step_dir / "config" / f"{base.stem}.yaml").is_file():
        hint = f"the step's own is step://config/{base.stem}"
    raise UserError(f"defaults: there is no config {name} in {display(base.parent)}", where=str(source), hint=hint)


def _origins(stack: list[Node]) -> list[str]:
    origins = [DEFAULT.origin]
    for layer in stack:
        if layer.source.origin not in origins:
            origins.append(layer.source.origin)
    return [*origins, COMMAND_LINE.origin]


# Overrides ---------------------------------------------------------------------------------------------------------


def _apply_overrides(root: Node, overrides: list[Override], schema: Schema | None) -> Node:
    problems: list[Problem] = []
    for override in overrides:
        try:
            root = _apply(root, override, schema)
        except _Refused as error:
            problems.append(error.problem)
    if problems:
        raise _together([(COMMAND_LINE, problem) for problem in problems], "command line")
    return root


class _Refused(Exception):
    def __init__(self, override: Override, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.problem = Problem(override.path, message, hint)


def _apply(root: Node, override: Override, schema: Schema | None) -> Node:
    path, key = override.path, override.key
    present = tree.find(root, path)
    if path[0] == "defaults":
        raise _Refused(override, "defaults: stands in a file only", "choose a config with -c")
    _refuse_impossible(root, override)
    if override.operation == "delete":
        return _delete(root, override, present, schema)
    if override.operation == "set" and present is None and not (schema and knows(schema, path) == "known"):
        raise _unknown(root, override, path, schema)
    if override.operation == "add" and present is not None and not isinstance(override.value, dict):
        raise _Refused(override, f"{key} is set already ({present.source})", f"change it with {override.text[1:]}")
    new = tree.from_plain(override.value, COMMAND_LINE)
    if override.operation == "set" and isinstance(override.value, dict):
        for below, _ in tree.leaves(new, path):
            if below == path or (schema and knows(schema, below) != "unknown") or tree.find(root, below):
                continue
            if present is None or not isinstance(present.value, dict):
                continue
            raise _unknown(root, override, below, schema)
    return tree.put(root, path, tree.merge(present, new) if present is not None else new)


def _refuse_impossible(root: Node, override: Override) -> None:
    """A key below a value that has none, or past the end of a list."""
    for depth in range(1, len(override.path)):
        node = tree.find(root, override.path[:depth])
        if node is None:
            return
        name = ".".join(override.path[:depth])
        if isinstance(node.value, list) and tree.child(node, override.path[depth]) is None:
            raise _Refused(
                override,
                f"{name} is a list of {len(node.value)} ({node.source}); there is no {override.key}",
                f"set the whole list: {name}=[…]",
            )
        if isinstance(node.value, dict | list) or node.value is None:
            continue
        raise _Refused(
            override, f"{name} is {node.value!r} ({node.source}), not a mapping: no place for {override.key}"
        )
    parent = tree.find(root, override.path[:-1])
    if parent is not None and isinstance(parent.value, list) and tree.child(parent, override.path[-1]) is None:
        name = ".".join(override.path[:-1])
        raise _Refused(
            override,
            f"{name} is a list of {len(parent.value)} ({parent.source}); there is no {override.key}",
            f"set the whole list: {name}=[…]",
        )


def _delete(root: Node, override: Override, present: Node | None, schema: Schema | None) -> Node:
    if present is None:
        if schema and knows(schema, override.path) == "known":
            raise _Refused(override, f"{override.key} is set nowhere; it has the schema's default")
        raise _unknown(root, override, override.path, schema)
    plain = tree.to_plain(present)
    if override.has_value and plain != override.value:
        raise _Refused(override, f"{override.key} is {plain!r} ({present.source}), not {override.value!r}; not deleted")
    return tree.drop(root, override.path)


def _unknown(root: Node, override: Override, path: tree.Path, schema: Schema | None) -> _Refused:
    name = ".".join(path)
    known = {".".join(p): None for p, _ in known_paths(schema)} if schema else {}
    for leaf, _ in tree.leaves(root):
        for depth in range(1, len(leaf) + 1):
            known[".".join(leaf[:depth])] = None
    hint = suggest(list(known), name)
    # Only where a new key would be taken is it advice to add one.
    if override.operation != "delete" and (schema is None or knows(schema, path) == "free"):
        added = f"(new keys: +{override.text})"
        hint = f"{hint}  {added}" if hint else added
    return _Refused(override, f"unknown key {name}", hint)


# Aliases -----------------------------------------------------------------------------------------------------------


def _apply_aliases(root: Node, schema: Schema, order: dict[str, int], env: Mapping[str, str]) -> Node:
    """Let a key that is another name for a key set it, from the same layer or a higher one."""
    for alias, target in aliases(schema):
        given = tree.find(root, alias)
        if given is None or given.value is None:
            continue
        if knows(schema, target) == "unknown":
            continue
        there = tree.find(root, target)
        alias_rank = order.get(given.source.origin, 1)
        target_rank = order.get(there.source.origin, 1) if there else -1
        alias_key, target_key = ".".join(alias), ".".join(target)
        if there is not None and alias_rank == target_rank:
            same = there.value == f"${{{alias_key}}}" or given.value == f"${{{target_key}}}"
            if not same and resolve_at(root, alias, env) != resolve_at(root, target, env):
                raise UserError(
                    f"{alias_key}={given.value} and {target_key}={there.value} ({there.source}) are one setting",
                    where=str(given.source),
                    hint="give only one of them",
                )
        if given.value == f"${{{target_key}}}":
            continue
        if alias_rank >= target_rank:
            root = tree.put(root, target, Node(f"${{{alias_key}}}", given.source))
        else:
            assert there is not None
            root = tree.put(root, alias, Node(f"${{{target_key}}}", there.source))
    return root


# Messages ----------------------------------------------------------------------------------------------------------


def report(problems: list[Problem], root: Node, file: Path) -> UserError:
    """One error that says all problems of a tree, each with the line of its key. `file` names the whole."""
    sources = Provenance(root)
    placed = [(sources.source(problem.path), problem) for problem in problems]
    # A default goes wrong only through the key that it interpolates, which is reported itself.
    return _together([pair for pair in placed if pair[0] is not DEFAULT] or placed, display(file))


def _together(placed: list[tuple[Source, Problem]], config: str) -> UserError:
    """One error for all problems, each with its place, in the order of files and lines."""
    if len(placed) == 1:
        source, problem = placed[0]
        return UserError(problem.message, where=str(source), hint=problem.hint)
    placed = sorted(placed, key=lambda pair: (pair[0].origin, pair[0].line or 0))
    lines: list[str] = []
    for source, problem in placed:
        lines.append(f"{source}: {problem.message}")
        lines.extend(f"    {line}" for line in (problem.hint or "").splitlines())
    return UserError(f"{len(placed)} problems", where=config, hint="\n".join(lines))
