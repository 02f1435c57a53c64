"""Where profiles are written: the places in which they are looked for, and what each extends. Used by profiles.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nemotron_launch import env_toml
from nemotron_launch.config.schema import Schema, aliases, load_schema
from nemotron_launch.config.tree import Node
from nemotron_launch.config.yaml_files import load_tree
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen
from nemotron_launch.resources import display, profiles_dir

SUFFIXES = (".yaml", ".yml")


@frozen
class Place:
    """A folder of profiles, one profile's file, or an env.toml ("toml"). rank: 0 is looked into first."""

    rank: int
    path: Path
    kind: str
    from_cwd: bool = False
    shipped: bool = False


@frozen
class Layer:
    """One profile as written. body: its keys under their own names, without `extends`; parents: what that names."""

    name: str
    place: Place
    file: Path
    body: Node
    parents: tuple[Node, ...]


def places(profiles_path: Path | None, env: Mapping[str, str]) -> list[Place]:
    """Where profiles are looked for, first to last. UserError: `profiles_path` does not exist."""
    found: list[tuple[Path, str, bool]] = []
    if profiles_path is not None:
        path = profiles_path.expanduser().absolute()
        if not path.exists():
            raise UserError("there is no such folder or file of profiles", where=str(profiles_path))
        found.append((path, "folder" if path.is_dir() else "toml" if path.suffix == ".toml" else "file", False))
    shipped = profiles_dir()
    here = _here()
    if here is not None and here / "profiles" != shipped:
        found.append((here / "profiles", "folder", True))
    home = env.get("XDG_CONFIG_HOME") or (f"{env['HOME']}/.config" if env.get("HOME") else None)
    if home:
        found.append((Path(home) / "nemotron" / "profiles", "folder", False))
    toml = env_toml.find(here, env)
    if toml is not None:
        found.append((toml, "toml", not env.get("NEMOTRON_ENV_FILE")))
    numbered = [Place(rank, *one) for rank, one in enumerate(found)]
    return [*numbered, Place(len(numbered), shipped, "folder", shipped=True)]


def names(place: Place) -> list[str]:
    """The profiles in a place."""
    if place.kind == "toml":
        return env_toml.names(place.path)
    if place.kind == "file":
        return [place.path.stem]
    if not place.path.is_dir():
        return []
    return sorted({path.stem for path in place.path.iterdir() if path.suffix in SUFFIXES and path.is_file()})


def read(name: str, place: Place) -> Layer | None:
    """The profile of that name in one place."""
    if place.kind == "toml":
        body = env_toml.load(place.path, name)
        return None if body is None else _layer(name, place, place.path, body)
    if place.kind == "file":
        return _layer(name, place, place.path, _load(place.path)) if name == place.path.stem else None
    path = file_of(name, place)
    return _layer(name, place, path, _load(path)) if path.is_file() else None


def file_of(name: str, place: Place) -> Path:
    """The file of a place that holds a profile of that name, if any does."""
    if place.kind != "folder":
        return place.path
    paths = [place.path / f"{name}{suffix}" for suffix in SUFFIXES]
    return next((path for path in paths if path.is_file()), paths[0])


def find(name: str, looked_into: Sequence[Place], asked: Node | None = None, start: int = 0) -> Layer:
    """The first profile of that name from place `start` on, or the one in the file of that path.

    asked: the entry of `extends` that wants it. UserError: there is none; with suggestions.
    """
    path = Path(name).expanduser()
    where = str(asked.source) if asked else None
    if "/" in name or path.suffix in SUFFIXES:
        path = path.absolute()
        if not path.is_file():
            raise UserError(f"there is no profile file {name}", where=where)
        return _layer(path.stem, Place(-1, path, "file", from_cwd=True), path, _load(path))
    for place in looked_into[start:]:
        layer = read(name, place)
        if layer is not None:
            return layer
    if start:
        raise UserError(f"extends names the profile itself, and there is no other {name} after it", where=where)
    raise UserError(f"there is no profile {name}", where=where, hint=_similar(name, looked_into))


def layers(top: Layer, looked_into: Sequence[Place]) -> list[Layer]:
    """The profile and all that it builds on, lowest first; what several extend counts once, where it is first."""
    done: dict[tuple[Path, str], Layer] = {}

    def visit(layer: Layer, chain: tuple[Layer, ...]) -> None:
        for entry in layer.parents:
            start = layer.place.rank + 1 if entry.value == layer.name else 0
            parent = find(entry.value, looked_into, entry, start)
            line = (*chain, layer)
            known = [(one.file, one.name) for one in line]
            key = (parent.file, parent.name)
            if key in known:
                circle = line[known.index(key) :]
                raise UserError(
                    f"extends goes in a circle: {' → '.join(one.name for one in (*circle, parent))}",
                    where=str(entry.source),
                    hint="\n".join(f"{one.name} is {display(one.file)}" for one in circle),
                )
            if key not in done:
                visit(parent, line)
        done[layer.file, layer.name] = layer

    visit(top, ())
    return list(done.values())


def schema() -> Schema:
    """The schema of profiles."""
    return load_schema(profiles_dir() / "schema.json")


_branches: dict[int, tuple[Schema, dict[str, Schema], dict[str, str]]] = {}


def executor_schemas() -> dict[str, Schema]:
    """For each executor the part of the schema that describes its profiles."""
    return _parts()[1]


def _parts() -> tuple[Schema, dict[str, Schema], dict[str, str]]:
    """The schema, its parts by executor, and the names that are other names of a key."""
    whole = schema()
    if id(whole) not in _branches:
        parts = {branch["title"]: Schema(whole.path, branch) for branch in whole.tree["anyOf"]}
        other = {alias[0]: target[0] for part in parts.values() for alias, target in aliases(part)}
        _branches.clear()
        _branches[id(whole)] = (whole, parts, other)
    return _branches[id(whole)]


_loaded: dict[Path, tuple[int, str, Node]] = {}


def _load(path: Path) -> Node:
    """Read a file, once for as long as it does not change: a matrix of jobs shares its profiles."""
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return load_tree(path, "profile")
    shown = display(path)
    known = _loaded.get(path)
    if not known or known[:2] != (changed, shown):
        known = _loaded[path] = (changed, shown, load_tree(path, "profile"))
    return known[2]


def _layer(name: str, place: Place, file: Path, body: Node) -> Layer:
    """Bring a body's keys under their own names and take `extends` out of it."""
    items: dict[str, Node] = {}
    written: dict[str, str] = {}
    other_names = _parts()[2]
    for key, node in body.value.items():
        target = other_names.get(key, key)
        if target in items:
            raise UserError(
                f"{written[target]} and {key} are one setting", where=str(node.source), hint="give only one of them"
            )
        items[target], written[target] = node, key
    if "secrets" in items:  # so that those of several profiles add up
        items["secrets"] = _as_mapping(items["secrets"])
    if "tunnel" in items and items["tunnel"].value in ("local", "ssh"):
        given = items["tunnel"]
        items["tunnel"] = Node({"type": given}, given.source, replaces=given.value == "local")
    extends = items.pop("extends", None)
    entries = [] if extends is None else extends.value if isinstance(extends.value, list) else [extends]
    for entry in entries:
        if not isinstance(entry.value, str) or not entry.value:
            raise UserError(
                "extends takes the name of a profile, or a list of names",
                where=str(entry.source),
                hint="for example  extends: slurm  or  extends: [slurm, big]",
            )
    return Layer(name, place, file, Node(items, body.source, body.replaces), tuple(entries))


def _as_mapping(secrets: Node) -> Node:
    if not isinstance(secrets.value, list) or not all(isinstance(item.value, str) for item in secrets.value):
        return secrets
    return Node({item.value: Node(None, item.source) for item in secrets.value}, secrets.source)


def _similar(name: str, looked_into: Sequence[Place]) -> str:
    from difflib import get_close_matches

    if name in env_toml.RESERVED:
        return f"{name} is a reserved table of env.toml, not a profile"
    known = sorted({known for place in looked_into for known in names(place)})
    near = get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"profiles: {', '.join(known)}"
    return f"{hint}\nlooked into {', '.join(display(place.path) for place in looked_into)}"


def _here() -> Path | None:
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None
