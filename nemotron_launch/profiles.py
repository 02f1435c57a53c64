"""Profiles: where and with what a run happens. `load_profile` finds one, and resolves and checks its values."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron_launch import env_toml, profile_files
from nemotron_launch.config import tree
from nemotron_launch.config.compose import report
from nemotron_launch.config.interpolation import UNRESOLVED, resolve, resolve_at
from nemotron_launch.config.overrides import parse_value
from nemotron_launch.config.schema import fill
from nemotron_launch.config.tree import Node
from nemotron_launch.config.validation import Problem, check
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import field, frozen
from nemotron_launch.job import Executor, Secret
from nemotron_launch.profile_files import Layer, executor_schemas
from nemotron_launch.profile_secrets import Secrets, take_secrets
from nemotron_launch.secret_names import GuardedEnvironment

REQUIRED: dict[str, tuple[str, ...]] = {"slurm": ("remote_job_dir",), "lepton": ("remote_job_dir", "resource_shape")}
# Why an executor has no use for a key that another one has.
UNUSED: dict[tuple[str, str], str] = {
    ("local", "nodes"): "this machine is one node",
    ("local", "time"): "nothing ends a run on this machine before its time",
    ("local", "image"): "a run on this machine takes its own Python; python: names another one",
    ("local", "mounts"): "a run on this machine sees its files",
    ("local", "max_restarts"): "the same command resumes a run on this machine",
    ("lepton", "runtime"): "Lepton runs the image itself",
    ("lepton", "requeue"): "max_restarts says how often the job starts again",
    ("lepton", "tunnel"): "Lepton is reached over HTTPS",
    ("lepton", "partition"): "node_group and resource_shape say where a Lepton job runs",
}
_EXAMPLES = {
    "time": "for example 04:00:00, 1-12:00:00 (D-HH:MM:SS) or 90 (minutes)",
    "build_time": "for example 01:00:00, or 90 (minutes)",
    "mem": "for example 500G, 0 (all of the node's), or a number of MiB",
    "signal": "for example USR1@300: the signal, and the seconds before the time limit",
}


@frozen
class Profile:
    """A profile, ready for use.

    data: every key of its executor, defaults filled in, interpolations resolved: `env` is text without the secrets,
    `mounts` are {source, target, read_only, volume}, `tunnel` is {type: local} or {type: ssh, host, port, …},
    `template` is an absolute path, `time`, `build_time` and `mem` are text; `secrets`, `config` and `extends` are not
    in it. file: the profile's own; files: all that took part, lowest first. from_cwd: one of them was found from the
    working directory. public: variables that are no secrets although their names say so. layer: what it says about the
    step's config, to lie over the config file and under the command line. root: every value with its line.
    """

    name: str
    executor: Executor
    data: dict[str, Any]
    file: Path
    from_cwd: bool
    secrets: tuple[Secret, ...]
    warnings: tuple[str, ...]
    files: tuple[Path, ...]
    public: frozenset[str]
    layer: Node = field(repr=False)
    root: Node = field(repr=False)

    def where(self, key: str) -> str:
        """`file:line` of a key's value; for a key that nobody wrote, of what is around it."""
        return str(tree.nearest(self.root, tuple(key.split("."))).source)

    def problem(self, key: str, message: str, hint: str | None = None) -> UserError:
        """A UserError about a key of this profile."""
        return UserError(f"profile {self.name}: {message}", where=self.where(key), hint=hint)


@frozen
class ProfileEntry:
    """A profile as it is listed, nothing of it resolved. problem: why its executor cannot be told; else empty."""

    name: str
    executor: str
    file: Path
    description: str
    extends: tuple[str, ...] = ()
    shipped: bool = False
    problem: str = ""


def load_profile(name: str, *, profiles_path: Path | None = None, env: Mapping[str, str] | None = None) -> Profile:
    """Find a profile by its name, or by its file's path, and resolve it.

    profiles_path: a folder of profiles, a profile's file or an env.toml, looked into before the other places. env: what
    `${oc.env:…}` reads (default: this process's). UserError, with file and line: none of that name, a circle of
    `extends`, a key that is unknown or that the executor does not use, a wrong type, a variable that is not set, the
    value of a secret. All that is wrong with the values comes in one message.
    """
    environ = os.environ if env is None else env
    places = profile_files.places(profiles_path, environ)
    top = profile_files.find(name, places)
    layers = profile_files.layers(top, places)
    try:
        return _resolve(layers, environ)
    except UserError as error:
        error.message = f"profile {top.name}: {error.message}"
        raise


def list_profiles(*, profiles_path: Path | None = None, env: Mapping[str, str] | None = None) -> list[ProfileEntry]:
    """Every profile by name, each as it would be found; interpolations stay as they are."""
    places = profile_files.places(profiles_path, os.environ if env is None else env)
    first = {name: place for place in reversed(places) for name in profile_files.names(place)}
    return [_entry(name, first[name], places) for name in sorted(first)]


def seconds(time: str | int) -> int:
    """A time limit in Slurm's forms (minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS) in seconds."""
    days, dash, rest = str(time).rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, left = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + left


def _entry(name: str, place: profile_files.Place, places: Sequence[profile_files.Place]) -> ProfileEntry:
    file = profile_files.file_of(name, place)
    try:
        layer = profile_files.read(name, place)
        assert layer is not None
        merged = _merged(profile_files.layers(layer, places))
        said = {key: merged.value[key].value for key in ("executor", "description") if key in merged.value}
        own = layer.body.value.get("description")
        return ProfileEntry(
            name=name,
            executor=str(said.get("executor", "")),
            file=file,
            description=str(own.value) if own else "",
            extends=tuple(parent.value for parent in layer.parents),
            shipped=place.shipped,
            problem="" if "executor" in said else "names no executor",
        )
    except UserError as error:
        return ProfileEntry(name, "", file, "", shipped=place.shipped, problem=str(error).removeprefix("error: "))


def _merged(layers: Sequence[Layer]) -> Node:
    merged = Node({}, layers[-1].body.source)
    for layer in layers:
        merged = tree.merge(merged, layer.body)
    return merged


# Resolving ---------------------------------------------------------------------------------------------------------


def _resolve(layers: Sequence[Layer], env: Mapping[str, str]) -> Profile:
    merged = _merged(layers)
    warnings: list[str] = []
    tables = [layer.file for layer in layers if layer.place.kind == "toml"]
    if tables:
        merged, warnings = env_toml.finish(merged, tables[-1])
    executor = _executor(merged, env)
    described = executor_schemas()[executor]
    problems = list(_unused(merged, executor))
    unused = {problem.path[0] for problem in problems}
    known = Node({key: node for key, node in merged.value.items() if key not in unused}, merged.source)
    config = known.value.pop("config", None)
    known, secrets, found = take_secrets(known)
    problems += found
    guarded = GuardedEnvironment(env, secrets.sources, secrets.public)
    root = fill(described, known)
    data, unresolved = resolve(root, guarded)
    problems += [_explained(problem) for problem in unresolved]
    data = _typed(described.tree, root, data)
    told = {problem.path[0] for problem in unresolved}  # what has no value has no type either
    readable = {key: value for key, value in data.items() if key not in told}
    problems += [_explained(problem) for problem in check(described, readable)]
    problems += _missing(data, executor)
    problems += secrets.problems_in(config)
    if not problems:
        problems = _normalise(data, root, layers, executor)
    layer, found = _config_layer(config, data, root) if not problems else (root, [])
    problems += found
    if problems:
        raise report(problems, Node({**root.value, **merged.value}, root.source), layers[-1].file)
    kept, left_out = _usable(secrets, data.pop("secrets"), executor)
    return Profile(
        name=layers[-1].name,
        executor=executor,
        data=data,
        file=layers[-1].file,
        from_cwd=any(one.place.from_cwd for one in layers),
        secrets=kept,
        warnings=(*warnings, *left_out),
        files=tuple(dict.fromkeys(one.file for one in layers)),
        public=secrets.public,
        layer=layer,
        root=Node({**root.value, **({"config": config} if config else {})}, root.source),
    )


def _executor(merged: Node, env: Mapping[str, str]) -> Executor:
    node = merged.value.get("executor")
    choices = "local, slurm or lepton"
    if node is None:
        raise UserError("executor is missing", where=str(merged.source), hint=f"executor: {choices}")
    name = resolve_at(merged, ("executor",), GuardedEnvironment(env)) if "${" in str(node.value) else node.value
    for known in ("local", "slurm", "lepton"):
        if name == known:
            return known
    shown = node.value if name is UNRESOLVED else name
    raise UserError(f"the executor {shown} is not supported", where=str(node.source), hint=f"executor: {choices}")


def _unused(merged: Node, executor: str) -> Iterator[Problem]:
    """Keys that only other executors have."""
    schemas = executor_schemas()
    for key in merged.value:
        users = [name for name, part in schemas.items() if key in part.tree["properties"]]
        if users and executor not in users:
            text = f"{key} is a key of {' and '.join(users)}; the executor {executor} does not use it"
            yield Problem((key,), text, UNUSED.get((executor, key)))


def _missing(data: Mapping[str, Any], executor: str) -> Iterator[Problem]:
    for key in REQUIRED.get(executor, ()):
        if data.get(key) is None:
            yield Problem((), f"{key} is missing", f"the executor {executor} needs it")


def _explained(problem: Problem) -> Problem:
    """Advice that only a profile's keys can have."""
    key = problem.path[0] if problem.path else ""
    if key == "setup" and problem.message.endswith("names no key"):
        return Problem(problem.path, problem.message, "a variable of the shell is written $NAME or \\${NAME}")
    if key in _EXAMPLES and " must match " in problem.message:
        got = problem.message.rpartition(", got ")[2]
        return Problem(problem.path, f"{key} cannot be {got}", _EXAMPLES[key])
    if problem.message == "unknown key run":
        return Problem(problem.path, problem.message, "values of the step's config stand under config:")
    return problem


def _typed(part: Any, node: Node, value: Any) -> Any:
    """Text that an interpolation gave, as the number or truth value that its key takes."""
    if not isinstance(part, dict):
        return value
    if isinstance(value, dict) and isinstance(node.value, dict):
        branches = [branch for branch in part.get("anyOf", ()) if "properties" in branch]
        inner = {**part, **(branches[0] if branches else {})}
        extra = inner.get("additionalProperties")
        below = inner.get("properties", {})
        return {key: _typed(below.get(key, extra), node.value[key], item) for key, item in value.items()}
    if not isinstance(value, str) or not isinstance(node.value, str) or "${" not in node.value:
        return value
    kinds: set[str] = set()
    for branch in (part, *part.get("anyOf", ())):
        kind = branch.get("type", ())
        kinds.update([kind] if isinstance(kind, str) else kind)
    if "string" in kinds or not kinds & {"integer", "number", "boolean"}:
        return value
    try:
        read = parse_value(value)
    except UserError:
        return value
    return value if isinstance(read, str | dict | list) else read


# Normalising -------------------------------------------------------------------------------------------------------


def _normalise(data: dict[str, Any], root: Node, layers: Sequence[Layer], executor: str) -> list[Problem]:
    """Bring the values into one form each, in place; what cannot be."""
    problems: list[Problem] = []
    for key in ("extends", "config"):
        data.pop(key, None)
    data["env"] = {name: _text(value) for name, value in data["env"].items() if value is not None}
    for service in data["services"].values():
        service["command"] = [_text(word) for word in service["command"]]
        service["env"] = {name: _text(value) for name, value in service["env"].items()}
    for key in ("time", "build_time", "mem"):
        if data.get(key) is not None:
            data[key] = str(data[key])
    if data["template"] is not None:
        data["template"] = str(_written_in("template", root, layers).parent / Path(data["template"]).expanduser())
    if executor != "local":
        mounts = [_mount(mount, index, executor) for index, mount in enumerate(data["mounts"])]
        problems += [mount for mount in mounts if isinstance(mount, Problem)]
        data["mounts"] = mounts
        if not data["remote_job_dir"].startswith("/"):
            text = f"remote_job_dir must be an absolute path, got {data['remote_job_dir']}"
            problems.append(Problem(("remote_job_dir",), text, "every node must find the same folder there"))
    if executor == "slurm":
        tunnel = data["tunnel"]
        if tunnel == "local" or tunnel["type"] == "local":
            data["tunnel"] = {"type": "local"}
        elif not tunnel.get("host"):
            problems.append(Problem(("tunnel",), "tunnel.host is missing", "a tunnel over SSH needs the host's name"))
    if executor == "lepton" and isinstance(data["node_group"], str):
        data["node_group"] = [data["node_group"]]
    return problems


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _written_in(key: str, root: Node, layers: Sequence[Layer]) -> Path:
    """The file in which a key's value was written."""
    origin = root.value[key].source.origin
    return next((one.file for one in layers if one.body.source.origin == origin), layers[-1].file)


def _mount(mount: Any, index: int, executor: str) -> dict[str, Any] | Problem:
    path = ("mounts", str(index))
    if isinstance(mount, str):
        parts = mount.split(":")
        read_only = len(parts) == 3 and parts[2] == "ro"
        if len(parts) not in (2, 3) or (len(parts) == 3 and parts[2] not in ("ro", "rw")):
            hint = f"for one folder at the same place: {mount}:{mount}" if mount.startswith("/") else None
            return Problem(path, f"mounts takes HOST:CONTAINER or HOST:CONTAINER:ro, got {mount!r}", hint)
        source, target, volume = parts[0], parts[1], ""
    else:
        source, target = mount["path"], mount["mount_path"]
        read_only, volume = mount.get("read_only", False), mount.get("from", "")
    for what in (source, target):
        if not what.startswith("/"):
            return Problem(path, f"a mount's folders are absolute paths, got {what!r}")
    if executor == "lepton" and not volume:
        hint = f"{{path: {source}, mount_path: {target}, from: node-nfs:NAME}}, or from: node-local"
        return Problem(path, "on Lepton a mount says which volume it comes from", hint)
    if executor != "lepton" and volume:
        return Problem(path, "from: names a volume of Lepton; a mount on Slurm has none")
    return {"source": source, "target": target, "read_only": read_only, "volume": volume}


def _config_layer(config: Node | None, data: Mapping[str, Any], root: Node) -> tuple[Node, list[Problem]]:
    """`config` with the cluster's size in it, as a layer of the step's config."""
    layer = config or Node({}, root.source)
    problems: list[Problem] = []
    for key, target in (
        ("nodes", "num_nodes"),
        ("gpus_per_node", "gpus_per_node"),
        ("procs_per_node", "procs_per_node"),
    ):
        if data.get(key) is None:
            continue
        there = tree.find(layer, ("cluster", target))
        if there is not None and there.value != data[key]:
            text = f"{key}={data[key]} and config.cluster.{target}={there.value} ({there.source}) are one setting"
            problems.append(Problem((key,), text, "give only one of them"))
        layer = tree.put(layer, ("cluster", target), Node(data[key], root.value[key].source))
    return layer, problems


def _usable(secrets: Secrets, declared: Any, executor: str) -> tuple[tuple[Secret, ...], list[str]]:
    """The secrets that the executor can hand over, and a warning for optional ones that it cannot."""
    found = secrets.all(declared)
    if executor != "lepton":
        return found, []
    without = [secret.name for secret in found if secret.optional and not secret.reference]
    kept = tuple(secret for secret in found if secret.name not in without)
    if not without:
        return kept, []
    names = ", ".join(without)
    remedy = f"secrets: {{{without[0]}: {{reference: NAME}}}}"
    return kept, [f"left out, since no secret of the Lepton workspace is named for it: {names}; name one with {remedy}"]
