"""The services of a job whose nodes all run one command: which nodes start them, and how every process finds them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from nemotron_launch import quoting
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen
from nemotron_launch.job import Job, Service


@frozen
class Placed:
    """A service as the command needs it, all of it text of a shell. here: whether this node starts it."""

    name: str
    variable: str
    address: str
    here: str
    command: str
    health: str
    start_timeout: int


def replicas(job: Job) -> int:
    """Nodes in all: the trainer's come first, then those of services with nodes of their own."""
    return job.nodes + sum(service.nodes for service in job.services)


def place(job: Job, word: Callable[[object, str], str], reserved: Mapping[int, str]) -> list[Placed]:
    """Where each service runs. `$(peer N)` is the name of node N where there are several.

    word: makes a value a word of the shell. reserved: ports of the first node that are taken, and by what.
    UserError: what nodes of one image and one size cannot give.
    """
    return list(_place(job, word, dict(reserved)))


def _place(job: Job, word: Callable[[object, str], str], taken: dict[int, str]) -> Iterator[Placed]:
    next_node, next_gpu = job.nodes, job.procs
    for service in job.services:
        where = f"services.{service.name}"
        _refuse(job, service, where)
        if not service.nodes and service.port in taken:
            raise UserError(f"port {service.port} is taken by {taken[service.port]}", where=f"{where}.port")
        first, here, gpus = 0, "((node == 0))", range(next_gpu, next_gpu + service.gpus)
        if service.nodes:
            first, gpus = next_node, range(service.gpus)
            next_node += service.nodes
            here = f"((node >= {first} && node < {next_node}))"
        else:
            taken[service.port] = where
            next_gpu += service.gpus
            if job.gpus_per_node and next_gpu > job.gpus_per_node:
                hint = "fewer processes (cluster.procs_per_node), or nodes of its own (nodes: 1)"
                message = f"{job.procs} processes and the services beside them need {next_gpu} GPUs"
                raise UserError(f"{message}, a node has {job.gpus_per_node}", where=f"{where}.gpus", hint=hint)
        env = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} if job.gpus_per_node else {}
        env |= service.env
        settings = [word(f"{quoting.name(name, where)}={value}", f"{where}.env.{name}") for name, value in env.items()]
        arguments = [word(argument, f"{where}.command") for argument in service.command]
        yield Placed(
            name=service.name,
            variable="NEMOTRON_SERVICE_" + re.sub(r"[^A-Z0-9]", "_", service.name.upper()),
            address=f"$(peer {first}):{service.port}" if replicas(job) > 1 else f"127.0.0.1:{service.port}",
            here=here,
            command=" ".join(["env", *settings, *arguments] if settings else arguments),
            health=word(service.health, f"{where}.health"),
            start_timeout=service.start_timeout,
        )


def _refuse(job: Job, service: Service, where: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", service.name) or service.name == "beacon":
        raise UserError(f"{service.name!r} is no name for a service", where="services", hint="a-z, 0-9, _ and -")
    if service.image and service.image.removeprefix("docker://") != job.container.image.removeprefix("docker://"):
        hint = "take an image that holds both, or start it on its own and name its address in env"
        raise UserError(f"executor {job.executor} runs one image on all nodes", where=f"{where}.image", hint=hint)
    if not re.fullmatch(r"(/[!-~]*)?", service.health):
        raise UserError(f"{service.health!r} is no path of an address", where=f"{where}.health", hint="as in /health")
