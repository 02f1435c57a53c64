"""From a step, its composed config and a profile to a job: frozen, complete, the only thing that a backend needs."""

from __future__ import annotations

import json
import os
import posixpath
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_launch import bundle, crosschecks
from nemotron_launch.artifacts import names_artifact
from nemotron_launch.catalog import Port, Step
from nemotron_launch.config import checks
from nemotron_launch.config.compose import Composed, Composer, composer, report
from nemotron_launch.config.schema import knows, load_schema
from nemotron_launch.config.tree import DEFAULT, Node, Source, drop, from_plain
from nemotron_launch.config.validation import Problem
from nemotron_launch.config.yaml_files import dump
from nemotron_launch.crosschecks import covers
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen, replace
from nemotron_launch.job import Artifact, Bundle, Container, Executor, File, Job, Mount, Restart, Secret, Service
from nemotron_launch.secret_names import GuardedEnvironment

if TYPE_CHECKING:
    from nemotron_launch.profiles import Profile

RUNS = ".nemotron/runs"  # where runs on this machine have their folders
LONGEST_RUN_ID = 60
_NO_ID = "run-id-to-come"
# What the config's `run` section and a profile can both say. The profile's goes over the config's.
_SHARED = ("time", "image", "python", "env", "mounts", "setup", "services", "max_restarts", "start_timeout")
_CLUSTER = {"nodes": "num_nodes", "gpus_per_node": "gpus_per_node", "procs_per_node": "procs_per_node"}
# Keys of a profile that have a place of their own in the job. The others are the executor's options.
_PLACED = frozenset(
    (*_SHARED, *_CLUSTER, "executor", "extends", "description", "secrets", "config", "template", "runtime")
)


@frozen
class Origin:
    """What a job takes from the machine that compiles it. `steps check` puts in what is the same everywhere.

    python: what runs the trainer here. steps: the folder that shows a step's script here, "" for where it lies.
    bundle: finds the code that travels.
    """

    python: str = sys.executable
    steps: str = ""
    bundle: Callable[[Step, Sequence[str]], Bundle] = bundle.bundle


HERE = Origin()


def compose_for(
    step: Step,
    config: Path,
    overrides: Sequence[str] = (),
    profile: Profile | None = None,
    *,
    env: Mapping[str, str] | None = None,
) -> Composed:
    """A config of this step, composed with its schema and the profile's share. env: this process's, unless given."""
    return composer_for(step, config, profile, env=env)(overrides)


def composer_for(
    step: Step, config: Path, profile: Profile | None = None, *, env: Mapping[str, str] | None = None
) -> Composer:
    """compose_for for many lists of overrides: the points of a sweep."""
    layers = _layers(step, profile) if profile else []
    guarded = _environment(profile, os.environ if env is None else env)
    compose = composer(config, schema=step.schema, step_dir=step.folder, layers=layers, env=guarded)

    def composed(overrides: Sequence[str], adjust: Callable[[Node], Node] | None = None, /) -> Composed:
        made = compose(overrides, adjust)
        if not any(names_artifact(made.get(port.key)) for port in step.consumes):
            return made
        from nemotron_launch.artifacts.references import resolved

        again = lambda change: compose(overrides, lambda root: change(adjust(root) if adjust else root))  # noqa: E731
        return resolved(step, profile, made, again)

    return composed


def plan_job(
    step: Step,
    composed: Composed,
    profile: Profile | None = None,
    passthrough: Sequence[str] = (),
    *,
    run_id: str | None = None,
    attached: bool = True,
    origin: Origin = HERE,
    point: int | None = None,
    made: Collection[str] = (),
) -> Job:
    """The job that runs this step with this config where the profile says; None is this machine.

    composed: by compose_for, so that the profile's share is in it. run_id: None derives one from the content, as a dry
    run wants it. attached: `-r`, not `-b`. made: keys of what another job makes first. UserError: sizes that do not
    fit each other, arguments that the step does not take, and what crosschecks finds.
    """
    check_sizes(step, composed)
    check_passthrough(step, passthrough)
    if run_id is not None:
        check_run_id(run_id)
    job = _job(step, composed, profile, passthrough, run_id or _NO_ID, attached, origin, point)
    if run_id is None:
        job = _named(job, _content_id(job))
    crosschecks.check(job, step, composed, profile)
    if origin is HERE:
        crosschecks.check_artifacts(job, step, composed, made)
    return job


def new_run_id(step: Step, composed: Composed) -> str:
    """A fresh name for a run: when, what, and enough chance that no two are alike."""
    import secrets
    import time

    return f"{time.strftime('%Y%m%d-%H%M%S')}-{_slug(step, composed)}-{secrets.token_hex(3)}"


def point_folder(point: int) -> str:
    """The folder of a point in its sweep's."""
    return f"point-{point}"


def check_run_id(run_id: str) -> None:
    """Raise on a run id that cannot be a folder's and a job's name everywhere."""
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", run_id) or len(run_id) > LONGEST_RUN_ID:
        hint = f"small letters, digits and - in between, at most {LONGEST_RUN_ID}"
        raise UserError(f"{run_id!r} cannot be a run id", where="--run-id", hint=hint)


def config_text(composed: Composed) -> str:
    """The config that the step reads: everything but `run`, which is the launcher's."""
    return dump({key: value for key, value in composed.data.items() if key != "run"})


def processes(step: Step, composed: Composed) -> int:
    """Processes on each node: `cluster.procs_per_node`, else one per GPU, else one."""
    if step.entry.launch == "python":
        return 1
    return int(composed.get("cluster.procs_per_node") or composed.get("cluster.gpus_per_node") or 1)


def check_sizes(step: Step, composed: Composed) -> None:
    """Raise what no schema can say: batch sizes, parallel sizes, keys that need each other."""
    found = checks.check(step.id, composed.data)
    if found:
        problems = [Problem(tuple(p.key.split(".")), f"{p.key}: {p.message}", p.hint) for p in found]
        raise report(problems, composed.sources.root, composed.files[0])


def check_passthrough(step: Step, passthrough: Sequence[str]) -> None:
    """Raise on an argument that the step's entry point does not take."""
    taken = step.entry.passthrough
    if passthrough and not taken:
        hint = None if passthrough[0].startswith("-") else "an override is key=value, without blanks around the ="
        raise UserError(f"{step.id} takes no arguments of its own, got {passthrough[0]!r}", hint=hint)
    for argument in passthrough:
        name = argument.partition("=")[0]
        if name.startswith("-") and name not in taken and not re.fullmatch(r"-\d[\d.e+-]*", name):
            hint = f"{step.entry.script} takes: {', '.join(taken)}"
            raise UserError(f"{step.id} takes no argument {name}", hint=hint)


# The profile's share of the config --------------------------------------------------------------------------------


def _layers(step: Step, profile: Profile) -> list[Node]:
    """What a profile says about the config: what the `run` section can say too, with its lines, and its own layer.

    Defaults say nothing. A step without a `cluster` section has its nodes and GPUs in `run`.
    """
    described = load_schema(step.schema) if step.schema else None
    layer = profile.layer
    run: dict[str, Node] = {}
    for key in (*_SHARED, *_CLUSTER):
        written = profile.root.value.get(key)
        value = profile.data.get(key)
        if written is None or written.source == DEFAULT or value is None:
            continue
        if key in _CLUSTER:
            path = ("cluster", _CLUSTER[key])
            if described is None or knows(described, path) != "unknown":
                continue
            layer = drop(layer, path if len(layer.value["cluster"].value) > 1 else path[:1])
        run[key] = from_plain([_as_written(mount) for mount in value] if key == "mounts" else value, written.source)
    if not run:
        return [layer]
    return [Node({"run": Node(run, Source(f"profile {profile.name}"))}, layer.source), layer]


def _as_written(mount: Mapping[str, Any]) -> dict[str, Any]:
    """A mount as a config has it."""
    volume = {"from": mount["volume"]} if mount.get("volume") else {}
    return {"path": mount["source"], "mount_path": mount["target"], "read_only": mount["read_only"], **volume}


def _environment(profile: Profile | None, env: Mapping[str, str]) -> Mapping[str, str]:
    """What `${oc.env:…}` sees: this machine's environment, the profile's over it, no secrets."""
    if profile is None:
        return GuardedEnvironment(env)
    declared = [name for secret in profile.secrets for name in (secret.name, secret.source) if name]
    return GuardedEnvironment({**env, **profile.data.get("env", {})}, declared, profile.public)


# The job -----------------------------------------------------------------------------------------------------------


def _job(
    step: Step,
    composed: Composed,
    profile: Profile | None,
    passthrough: Sequence[str],
    run_id: str,
    attached: bool,
    origin: Origin,
    point: int | None,
) -> Job:
    data = profile.data if profile else {}
    executor: Executor = profile.executor if profile else "local"
    local = executor == "local"
    code = [str(folder) for folder in composed.get("run.code", [])]
    root = str(data.get("remote_job_dir") or RUNS)
    run_dir = posixpath.join(root, run_id)
    own_dir = run_dir if point is None else posixpath.join(run_dir, point_folder(point))
    if local:  # where the points of a sweep share nothing
        run_dir = own_dir
    workdir = "." if local else posixpath.normpath(root)
    output_dir = str(Path(str(composed.get("output_dir", posixpath.join(own_dir, "output")))))
    if local:
        script = posixpath.join(origin.steps, step.id) if origin.steps else str(step.folder)
    else:
        script = posixpath.join(run_dir, "code", "steps", step.id)
        output_dir = posixpath.normpath(posixpath.join(workdir, output_dir))
    container = _container(step, composed, data, executor, origin)
    procs = processes(step, composed)
    command = [posixpath.join(script, step.entry.script), "--config", posixpath.join(own_dir, "config.yaml")]
    if step.entry.launch == "processes":
        spawn = ["-m", "nemotron_launch.trainer.spawn", "--procs", str(procs), "--output-dir", output_dir, "--"]
        command = [*spawn, *command]
    template = os.path.normpath(str(data["template"])) if data.get("template") else ""
    return Job(
        run_id=run_id,
        name=_slug(step, composed),
        step=step.id,
        config=composed.name,
        executor=executor,
        profile=profile.name if profile else "",
        run_dir=run_dir,
        workdir=workdir,
        output_dir=output_dir,
        nodes=int(composed.get("cluster.num_nodes") or composed.get("run.nodes") or 1),
        procs=procs,
        gpus_per_node=int(composed.get("cluster.gpus_per_node") or composed.get("run.gpus_per_node") or 0),
        command=(container.python, *command, *passthrough),
        files=(File("config.yaml", config_text(composed)),),
        env=_env(composed, code if local else []),
        secrets=_secrets(composed, profile),
        container=container,
        services=tuple(_services(composed)),
        setup=tuple(str(line) for line in composed.get("run.setup", [])),
        restart=Restart(int(composed.get("run.max_restarts", 0))),
        bundle=None if local else origin.bundle(step, code),
        consumes=tuple(_bind(port, composed) for port in step.consumes),
        produces=tuple(_bind(port, composed) for port in step.produces),
        options=_options(composed, data, attached),
        template=template,
        template_from_cwd=bool(template) and _below_cwd(Path(template)),
        profile_from_cwd=profile.from_cwd if profile else False,
        artifact=_artifact_name(step, composed, output_dir, point),
        uses=composed.uses,
    )


def _named(job: Job, run_id: str) -> Job:
    """The job under its id, which until now has been _NO_ID."""
    run_dir = posixpath.join(posixpath.dirname(job.run_dir), run_id)

    def moved(text: str) -> str:
        return run_dir + text.removeprefix(job.run_dir) if covers(job.run_dir, text) else text

    command = tuple(moved(word) if _NO_ID in word else word for word in job.command)
    return replace(job, run_id=run_id, run_dir=run_dir, output_dir=moved(job.output_dir), command=command)


def _bind(port: Port, composed: Composed) -> Artifact:
    return Artifact(port.type, port.required, port.key, composed.get(port.key))


def _container(
    step: Step, composed: Composed, data: Mapping[str, Any], executor: Executor, origin: Origin
) -> Container:
    runtime = {"local": "none", "lepton": "lepton"}.get(executor) or str(data.get("runtime") or "none")
    python = composed.get("run.python") or (origin.python if executor == "local" else "python3")
    if runtime == "none":
        return Container(python=str(python))
    mounts = tuple(_mount(entry, composed) for entry in composed.get("run.mounts", []))
    return Container(runtime, str(composed.get("run.image") or step.image), mounts, str(python))  # type: ignore[arg-type]


def _mount(entry: Any, composed: Composed) -> Mount:
    """A mount as it is written: host:container[:ro], or a mapping."""
    if isinstance(entry, dict):
        volume = str(entry.get("from") or "")
        return Mount(str(entry["path"]), str(entry["mount_path"]), bool(entry.get("read_only")), volume)
    source, _, rest = str(entry).partition(":")
    target, _, mode = rest.partition(":")
    if not source or not target or mode not in ("", "ro", "rw"):
        hint = "write host:container, or host:container:ro"
        raise composed.problem("run.mounts", f"the mount {entry!r} cannot be read", hint)
    return Mount(source, target, mode == "ro")


def _env(composed: Composed, code: Sequence[str]) -> dict[str, str]:
    env = {name: _text(value) for name, value in (composed.get("run.env") or {}).items() if value is not None}
    if code:  # not in a bundle: found where it lies
        parents = dict.fromkeys(str(Path(folder).expanduser().absolute().parent) for folder in code)
        before = env.get("PYTHONPATH") or os.environ.get("PYTHONPATH")
        env["PYTHONPATH"] = os.pathsep.join([*parents, *([before] if before else [])])
    return env


def _secrets(composed: Composed, profile: Profile | None) -> tuple[Secret, ...]:
    """The profile's secrets, and those that the config names besides."""
    found = {secret.name: secret for secret in (profile.secrets if profile else ())}
    for name in composed.get("run.secrets", []):
        found.setdefault(name, Secret(name, source=name))
    return tuple(found.values())


def _services(composed: Composed) -> Iterator[Service]:
    for name, given in (composed.get("run.services") or {}).items():
        yield Service(
            name=name,
            command=tuple(_text(word) for word in given["command"]),
            port=given["port"],
            nodes=given.get("nodes", 0),
            gpus=given.get("gpus", 0),
            health=given.get("health", ""),
            start_timeout=given.get("start_timeout", 1800),
            image=given.get("image", ""),
            env={key: _text(value) for key, value in (given.get("env") or {}).items()},
        )


def _options(composed: Composed, data: Mapping[str, Any], attached: bool) -> dict[str, Any]:
    """The executor's own keys. The partition is that of the way in which the run is started."""
    options = {key: value for key, value in data.items() if key not in _PLACED}
    for key in ("time", "start_timeout"):
        value = composed.get(f"run.{key}", data.get(key))
        if value is not None:
            options[key] = value
    chosen = options.pop("run_partition", None), options.pop("batch_partition", None)
    if chosen[not attached]:
        options["partition"] = chosen[not attached]
    return options


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _below_cwd(path: Path) -> bool:
    return path.is_relative_to(Path.cwd())


def _content_id(job: Job) -> str:
    """A run id that the same content always gets."""
    # The bundle counts by its name, which is its content's; what is only written down about artifacts does not.
    known = {name: value for name, value in vars(job).items() if name not in ("artifact", "uses")}
    content = json.dumps(known, default=lambda part: part.file if isinstance(part, Bundle) else vars(part))
    if job.template:
        with suppress(OSError, ValueError):  # said when it is rendered
            content += Path(job.template).read_text(encoding="utf-8")
    return f"{job.name}-{sha256(content.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _artifact_name(step: Step, composed: Composed, output_dir: str, point: int | None) -> str:
    """`run.artifact_name`, else its output folder's name; of points, and where that says nothing, the job's."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", posixpath.basename(output_dir)).strip("-.")
    named = composed.get("run.artifact_name")
    return str(named) if named else _slug(step, composed) if point is not None or name in ("", "output") else name


def _slug(step: Step, composed: Composed) -> str:
    tail = step.id.rpartition("/")[2]
    return re.sub(r"[^a-z0-9]+", "-", f"{tail}-{composed.name}".lower())[:36].strip("-")
