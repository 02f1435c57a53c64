"""From a step and its composed config to a job: frozen, complete, the only thing that a backend needs."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_launch.catalog import Port, Step
from nemotron_launch.config import checks
from nemotron_launch.config.compose import Composed, compose, report
from nemotron_launch.config.validation import Problem
from nemotron_launch.config.yaml_files import dump
from nemotron_launch.errors import UserError


@dataclass(frozen=True)
class File:
    """A file to place in the run's folder before the command starts. `path` is relative to that folder."""

    path: str
    text: str


@dataclass(frozen=True)
class Artifact:
    """An artifact of a job: its type, the config key that binds it, and the path or name that the key holds."""

    type: str
    required: bool
    key: str
    value: Any


@dataclass(frozen=True)
class Job:
    """One run, described completely. `run_dir` holds `files`; relative paths of the config start at the working folder.

    procs: processes on each node. command: argv. env: set beside what the process inherits.
    """

    run_id: str
    step: str
    config: str
    run_dir: Path
    output_dir: Path
    nodes: int
    procs: int
    command: tuple[str, ...]
    files: tuple[File, ...]
    env: Mapping[str, str]
    consumes: tuple[Artifact, ...]
    produces: tuple[Artifact, ...]


def compose_for(step: Step, config: Path, overrides: Sequence[str] = ()) -> Composed:
    """A config of this step, composed with its schema."""
    return compose(config, overrides, schema=step.schema, step_dir=step.folder)


def plan_job(
    step: Step, composed: Composed, passthrough: Sequence[str] = (), *, runs: Path, run_id: str | None = None
) -> Job:
    """The job that runs this step with this config on this machine.

    runs: the folder in which each run has its folder. run_id: None derives one from the content, as a dry run wants it.
    UserError: sizes that do not fit each other, arguments that the step does not take.
    """
    check_sizes(step, composed)
    check_passthrough(step, passthrough)
    text = config_text(composed)
    run_id = run_id or _content_id(step, composed, text, passthrough)
    run_dir = runs / run_id
    output_dir = Path(str(composed.get("output_dir", run_dir / "output")))
    procs = processes(step, composed)
    script = [str(step.folder / step.entry.script), "--config", str(run_dir / "config.yaml"), *passthrough]
    if step.entry.launch == "processes":
        spawn = ["-m", "nemotron_launch.trainer.spawn", "--procs", str(procs), "--output-dir", str(output_dir), "--"]
        command = (sys.executable, *spawn, *script)
    else:
        command = (sys.executable, *script)
    return Job(
        run_id=run_id,
        step=step.id,
        config=composed.name,
        run_dir=run_dir,
        output_dir=output_dir,
        nodes=int(composed.get("cluster.num_nodes", 1)),
        procs=procs,
        command=command,
        files=(File("config.yaml", text),),
        env={},
        consumes=tuple(_bind(port, composed) for port in step.consumes),
        produces=tuple(_bind(port, composed) for port in step.produces),
    )


def new_run_id(step: Step, composed: Composed) -> str:
    """A fresh name for a run: when, what, and enough chance that no two are alike."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{_slug(step, composed)}-{secrets.token_hex(3)}"


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


def _bind(port: Port, composed: Composed) -> Artifact:
    return Artifact(port.type, port.required, port.key, composed.get(port.key))


def _content_id(step: Step, composed: Composed, text: str, passthrough: Sequence[str]) -> str:
    content = json.dumps([step.id, composed.name, text, list(passthrough)])
    return f"{_slug(step, composed)}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def _slug(step: Step, composed: Composed) -> str:
    tail = step.id.rpartition("/")[2]
    return re.sub(r"[^a-z0-9]+", "-", f"{tail}-{composed.name}".lower()).strip("-")[:40]
