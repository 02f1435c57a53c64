"""The job: one run of a step, described completely and frozen; the only thing that a backend sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from nemotron_launch.frozen import field, frozen

Executor = Literal["local", "slurm", "lepton"]


@frozen
class File:
    """A file to place in the run's folder before the command starts. `path` is relative to that folder."""

    path: str
    text: str
    mode: int = 0o600


@frozen
class Artifact:
    """An artifact of a job: its type, the config key that binds it, and the path or name that the key holds."""

    type: str
    required: bool
    key: str
    value: Any


@frozen
class Use:
    """An artifact that a config names in place of a path. text: how it does; name, version, run_id: which one that is.

    digest: of the record of the run that made it. place: the path that took the name's place.
    """

    key: str
    type: str
    text: str
    name: str
    version: int
    run_id: str
    digest: str
    place: str


@frozen
class Mount:
    """A folder that the job sees. source: on the node, or Lepton's `node-…` volume path; target: inside the container.

    volume: Lepton's `from` ("node-local", "node-nfs:lustre", …); empty elsewhere.
    """

    source: str
    target: str
    read_only: bool = False
    volume: str = ""


@frozen
class Container:
    """What the processes run in. runtime: pyxis or charliecloud (Slurm), lepton, or none for the node's own Python."""

    runtime: Literal["pyxis", "charliecloud", "lepton", "none"] = "none"
    image: str = ""
    mounts: tuple[Mount, ...] = ()
    python: str = "python3"


@frozen
class Secret:
    """An environment variable whose value stays out of every file that is shown. Only its name is known here.

    source: the client's environment variable that holds the value (Slurm). reference: the workspace's secret (Lepton).
    optional: the job goes without it where the source is not set.
    """

    name: str
    source: str = ""
    reference: str = ""
    optional: bool = False


@frozen
class Service:
    """A server that the trainer needs: started before it, stopped with it; its death ends the attempt.

    command: argv. nodes 0 shares the trainer's first node. gpus: on each of its nodes. health: path of an HTTP GET that
    answers 200 when it is ready, empty for "the port accepts connections". Its address reaches every process as
    NEMOTRON_SERVICE_<NAME>=host:port.
    """

    name: str
    command: tuple[str, ...]
    port: int
    nodes: int = 0
    gpus: int = 0
    health: str = ""
    start_timeout: int = 1800
    image: str = ""
    env: Mapping[str, str] = field(default_factory=dict)


@frozen
class Restart:
    """How an attempt that ended early goes on. resume_code: the trainer's "saved, resume me"."""

    max_restarts: int = 0
    resume_code: int = 85


@frozen
class Bundle:
    """The code that travels, and where it came from.

    file: its name in the run's folder, made of the content's hash. sha256 and size (bytes): of that file.
    """

    file: str
    sha256: str
    size: int
    git_revision: str = ""
    git_dirty: bool = False


@frozen
class Point:
    """A point of a sweep: what it sets, and all that is its own beside the rest of the job.

    config: the text of its config.yaml. produces: as Job.produces.
    """

    overrides: tuple[str, ...]
    output_dir: str
    config: str
    produces: tuple[Artifact, ...]


@frozen
class Job:
    """One run, described completely.

    run_dir: folder of this run's files, on the machine that runs it (`<remote_job_dir>/<run_id>`, or a local one).
    workdir: working directory of the command; relative paths of the config start there, and it outlives the run, so
    that a resubmitted run finds its checkpoints. command: argv on every node, started once a node; it starts the
    node's `procs` processes. gpus_per_node: GPUs of each node that trains; services that share the first have some of
    them, after the first `procs`. env: set last inside the container. setup: shell lines, run on every node before the
    command. options: the profile's executor keys (account, partition, node_group, …), checked by its schema. points:
    of a sweep that is one array job, `max_parallel` of them at a time (0: all); command, output_dir and produces are
    then the first point's, and its folder is `<run_dir>/point-<number>`. artifact: the name under which what it makes
    is registered; uses: where its config names artifacts. Neither changes what runs.
    """

    run_id: str
    name: str
    step: str
    config: str
    executor: Executor
    profile: str
    run_dir: str
    workdir: str
    output_dir: str
    nodes: int
    procs: int
    gpus_per_node: int
    command: tuple[str, ...]
    files: tuple[File, ...]
    env: Mapping[str, str]
    secrets: tuple[Secret, ...] = ()
    container: Container = Container()
    services: tuple[Service, ...] = ()
    setup: tuple[str, ...] = ()
    restart: Restart = Restart()
    bundle: Bundle | None = None
    consumes: tuple[Artifact, ...] = ()
    produces: tuple[Artifact, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    template: str = ""
    template_from_cwd: bool = False
    profile_from_cwd: bool = False
    points: tuple[Point, ...] = ()
    max_parallel: int = 0
    artifact: str = ""
    uses: tuple[Use, ...] = ()
