"""What must hold between a job's parts before it is rendered: GPUs, services, mounts, paths, time, names.

What a config says for itself is in config/checks.py; whether inputs exist, in inputs.py.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nemotron_launch.artifacts import records_around
from nemotron_launch.catalog import Step
from nemotron_launch.config.compose import Composed
from nemotron_launch.job import Job, Mount
from nemotron_launch.secret_names import is_secret_name

if TYPE_CHECKING:
    from nemotron_launch.profiles import Profile

# Where images keep what is theirs. What lies there needs no mount.
_IMAGES_OWN = ("/opt", "/usr", "/workspace")
_PATH_KEY = re.compile(r"(.*_)?(path|paths|file|dir|folder)\Z")
_MODEL_KEYS = ("model_name", "policy.tokenizer.name")


class ConfigPath(NamedTuple):
    """A path in a config: its key, the path, and whether the run writes it."""

    key: str
    value: str
    written: bool


def check(job: Job, step: Step, composed: Composed, profile: Profile | None) -> None:
    """Raise the first thing that cannot work."""
    _check_environment(job, composed, profile)
    _check_processes(job, composed)
    _check_services(job, composed)
    if profile is None or job.executor == "local":
        return
    _check_job_dir(job, profile)
    _check_shape(job, profile)
    _check_segment(job, profile)
    _check_paths(job, step, composed, profile)
    _check_time(job, composed)


def warnings(job: Job, composed: Composed, profile: Profile | None) -> list[str]:
    """What will run, and perhaps not as it was meant."""
    found = list(profile.warnings) if profile else []
    if job.executor == "slurm":
        found += _unsaved(job, composed)
    if profile is not None and job.container.runtime == "none" and profile.data.get("image"):
        found.append(f"image {profile.data['image']} is not used: the profile's runtime is none")
    if job.executor == "lepton":
        there, used = _shape_gpus(job), job.gpus_per_node
        if there is not None and 0 < used < there:
            found.append(f"{used} of the {there} GPUs of {job.options['resource_shape']} are used on each node")
    return found


def sees_this_machine(job: Job) -> bool:
    """Whether the job sees the files of this machine: it runs here, or on the cluster whose login node this is."""
    tunnel = job.options.get("tunnel") or {}
    login = job.executor == "slurm" and tunnel.get("type") == "local" and Path(job.workdir).is_dir()
    return job.executor == "local" or login


def check_artifacts(job: Job, step: Step, composed: Composed, made: Collection[str] = ()) -> None:
    """Raise where a path leads to what a run has recorded, and that does not fit; what is named has been checked.

    made: keys of what another job makes before: what lies there now says nothing.
    """
    if not sees_this_machine(job):
        return
    checked = {use.key for use in composed.uses} | set(made)
    for port in step.consumes:
        value = composed.get(port.key)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text and port.key not in checked and not text.startswith("step://"):
                path = os.path.join(job.workdir, os.path.expanduser(text))
                if next(records_around(path), None):
                    from nemotron_launch.artifacts.references import check_path

                    check_path(step, composed, port.key, text, Path(path))


def covers(folder: str, path: str) -> bool:
    """Whether a path is this folder or lies in it."""
    folder, path = posixpath.normpath(folder), posixpath.normpath(path)
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def covering(mounts: tuple[Mount, ...], path: str) -> Mount | None:
    """The mount through which the container sees a path: the deepest one whose target holds it."""
    found = [mount for mount in mounts if covers(mount.target, path)]
    return max(found, key=lambda mount: len(posixpath.normpath(mount.target)), default=None)


def config_paths(step: Step, composed: Composed) -> Iterator[ConfigPath]:
    """The paths of a config: what its artifacts are bound to, and every key that is named like one."""
    written = {port.key for port in step.produces}
    bound = written | {port.key for port in step.consumes}

    def walk(value: Any, key: str, is_path: bool) -> Iterator[ConfigPath]:
        if isinstance(value, dict):
            for name, below in value.items():
                at = f"{key}.{name}" if key else name
                if at != "run":
                    named = at in bound or _PATH_KEY.match(name) is not None or at.endswith(_MODEL_KEYS)
                    yield from walk(below, at, named or (is_path and key.endswith("paths")))
        elif isinstance(value, list):
            for item in value:
                yield from walk(item, key, is_path)
        elif is_path and isinstance(value, str) and value:
            yield ConfigPath(key, value, key in written or key.endswith("_dir"))

    return walk(composed.data, "", False)


# Environment, processes, services ----------------------------------------------------------------------------------


def _check_environment(job: Job, composed: Composed, profile: Profile | None) -> None:
    secret = {one.name for one in job.secrets}
    public = profile.public if profile else ()
    for name in job.env:
        if name in secret or (is_secret_name(name) and name not in public):
            raise composed.problem(
                f"run.env.{name}",
                f"run.env.{name}: {name} is a secret, and env is written into the job's files",
                f"name it instead:  run.secrets: [{name}]",
            )


def _check_processes(job: Job, composed: Composed) -> None:
    if job.procs > job.gpus_per_node > 0 and composed.get("policy.device") != "cpu":
        raise composed.problem(
            "cluster.procs_per_node",
            f"{job.procs} processes on each node and {job.gpus_per_node} GPUs: each process takes one",
            f"set cluster.procs_per_node={job.gpus_per_node}, or null; cluster.gpus_per_node=0 trains on CPU",
        )


def _check_services(job: Job, composed: Composed) -> None:
    taken: dict[int, str] = {}
    for service in job.services:
        key = f"run.services.{service.name}"
        if service.nodes and job.executor == "local":
            raise composed.problem(
                f"{key}.nodes", f"{key}.nodes={service.nodes}, but this machine is one node", f"set {key}.nodes=0"
            )
        if service.nodes == 0 and service.port in taken:
            other = taken[service.port]
            raise composed.problem(
                f"{key}.port", f"{key} and run.services.{other} share a node and the port {service.port}"
            )
        if service.nodes == 0:
            taken[service.port] = service.name
    shared = _shared_gpus(job)
    if shared and job.procs + shared > job.gpus_per_node:
        left = job.gpus_per_node - shared
        names = [service.name for service in job.services if service.gpus and not service.nodes]
        own = f"give {' and '.join(names)} nodes of its own (run.services.{names[0]}.nodes=1)"
        raise composed.problem(
            "cluster.gpus_per_node",
            f"{job.procs} processes and the {shared} GPUs of {' and '.join(names)} do not fit into a node of "
            f"{job.gpus_per_node} GPUs",
            f"set cluster.procs_per_node={left}, or {own}" if left > 0 else own,
        )


def _shared_gpus(job: Job) -> int:
    """GPUs that services take on the first node that trains."""
    return sum(service.gpus for service in job.services if service.nodes == 0)


# The target --------------------------------------------------------------------------------------------------------


def _check_job_dir(job: Job, profile: Profile) -> None:
    if job.executor == "lepton" and covering(job.container.mounts, job.workdir) is None:
        raise profile.problem(
            "remote_job_dir",
            f"no mount covers remote_job_dir {job.workdir}: all that the run leaves would be lost",
            f"mounts:\n  - {{path: /, mount_path: {job.workdir}, from: node-nfs:NAME}}",
        )


def _shape_gpus(job: Job) -> int | None:
    """GPUs of a Lepton shape by its name: gpu.8xh100-80gb has 8, gpu.a10 one, cpu.small none; None: not to be told."""
    shape = str(job.options.get("resource_shape") or "")
    if found := re.match(r"gpu\.(?:(\d+)x)?", shape):
        return int(found[1] or 1)
    return 0 if shape.startswith("cpu.") else None


def _check_shape(job: Job, profile: Profile) -> None:
    if job.executor != "lepton":
        return
    there = _shape_gpus(job)
    own = max((service.gpus for service in job.services if service.nodes), default=0)
    used = max(job.gpus_per_node, own)
    if there is not None and used > there:
        raise profile.problem(
            "resource_shape",
            f"{used} GPUs are used on each node, and {job.options['resource_shape']} has {there}",
            f"set cluster.gpus_per_node={there}, or another resource_shape",
        )


def _check_segment(job: Job, profile: Profile) -> None:
    segment = job.options.get("segment")
    nodes = job.nodes + sum(service.nodes for service in job.services)
    if segment and nodes % int(segment):
        raise profile.problem(
            "segment", f"{nodes} nodes are not whole segments of {segment}", "change nodes, or leave segment away"
        )


# Paths -------------------------------------------------------------------------------------------------------------


def _check_paths(job: Job, step: Step, composed: Composed, profile: Profile) -> None:
    for path in config_paths(step, composed):
        if path.value.startswith("~"):
            raise composed.problem(
                path.key,
                f"{path.key}: {path.value} is a home folder, which is another one where the job runs",
                "write an absolute path of the cluster, or one relative to remote_job_dir",
            )
        if not path.value.startswith("/"):
            continue  # relative to remote_job_dir, step://, or a hub id
        if job.container.runtime != "none":
            _check_mounted(job, path, composed)
        elif _is_remote(profile) and not path.written and _is_clients(path.value) and Path(path.value).exists():
            raise composed.problem(
                path.key,
                f"{path.key}: {path.value} lies on this machine, and the job runs on {_host(profile)}",
                f"copy it there, below {job.workdir} for example, and name that path",
            )


def _check_mounted(job: Job, path: ConfigPath, composed: Composed) -> None:
    mount = covering(job.container.mounts, path.value)
    if mount is not None:
        if path.written and mount.read_only:
            raise composed.problem(
                path.key, f"{path.key}: {path.value} is written to, and its mount {mount.target} is read-only"
            )
        return
    if job.executor == "slurm" and covers(job.workdir, path.value):
        return  # the backend mounts it
    if not path.written and any(covers(folder, path.value) for folder in _IMAGES_OWN):
        return
    folder = path.value if path.written else posixpath.dirname(path.value)
    what = "is written to" if path.written else "is read"
    clients = ", a folder of this machine" if _is_clients(path.value) else ""
    if job.executor == "lepton":
        hint = f"add to the profile's mounts:  {{path: …, mount_path: {folder}, from: node-…}}"
    else:
        hint = f"add to the profile's mounts:  {folder}:{folder}"
    raise composed.problem(
        path.key,
        f"{path.key}: {path.value} {what}, and no mount of the container covers it{clients}",
        f"{hint}\nor name a path below {job.workdir}",
    )


def _is_remote(profile: Profile) -> bool:
    """Whether the job's file system is certainly another machine's."""
    return profile.executor == "lepton" or (profile.data.get("tunnel") or {}).get("type") == "ssh"


def _host(profile: Profile) -> str:
    return str((profile.data.get("tunnel") or {}).get("host") or profile.executor)


def _is_clients(path: str) -> bool:
    """Whether a path points into this machine's working directory or home."""
    try:
        return any(covers(str(folder), path) for folder in (Path.cwd(), Path.home()) if str(folder) != "/")
    except (OSError, RuntimeError):
        return False


# Time --------------------------------------------------------------------------------------------------------------


def _limit(job: Job) -> int:
    """The time limit in seconds, 0 for none."""
    from nemotron_launch.profiles import seconds

    time = job.options.get("time")
    return seconds(time) if time else 0


def _check_time(job: Job, composed: Composed) -> None:
    given = composed.get("checkpointing.checkpoint_must_save_by")
    limit = _limit(job)
    if given is None or not limit:
        return
    days, hours, minutes, left = (int(part) for part in str(given).split(":"))
    if ((days * 24 + hours) * 60 + minutes) * 60 + left >= limit:
        raise composed.problem(
            "checkpointing.checkpoint_must_save_by",
            f"checkpointing.checkpoint_must_save_by={given} is not before the time limit {job.options['time']}",
            f"set it to {_save_by(limit)}, or raise the limit (run.time=…)",
        )


def _unsaved(job: Job, composed: Composed) -> list[str]:
    limit = _limit(job)
    saves = composed.get("checkpointing.enabled", False) and job.restart.max_restarts == 0
    if not saves or not limit or composed.get("checkpointing.checkpoint_must_save_by") is not None:
        return []
    return [
        f"at the time limit of {job.options['time']} the run saves and is over; max_restarts lets it go on, and "
        f"checkpointing.checkpoint_must_save_by={_save_by(limit)} saves without waiting for a signal"
    ]


def _save_by(limit: int) -> str:
    """A twentieth of the time, and at least five minutes, before the limit, as DD:HH:MM:SS."""
    at = max(limit - max(limit // 20, 300), limit // 2)
    return f"{at // 86400:02}:{at // 3600 % 24:02}:{at // 60 % 60:02}:{at % 60:02}"
