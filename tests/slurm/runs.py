"""Runs for the tests on a real Slurm: a job, its folder as a submission leaves it, and what is found there later."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemotron_launch import bundle
from nemotron_launch.backends.slurm import SECRETS, secrets_text
from nemotron_launch.catalog import find_config, find_step
from nemotron_launch.job import File, Job, Restart, Secret, Service
from nemotron_launch.plan import compose_for, plan_job
from nemotron_launch.profiles import load_profile
from nemotron_launch.render import Rendered, render
from tests.slurm.cluster import Cluster

# A trainer that needs no torch: `body` runs after these lines.
TRAINER = """
import json, os, signal, sys, time
from pathlib import Path
LOGS = Path(os.environ["NEMOTRON_LOG_DIR"])
RUN = LOGS.parent.parent
RANK = int(os.environ["NODE_RANK"])
ATTEMPT = int(LOGS.name.rpartition("-")[2])
def save(number, frame):
    (RUN / f"saved-{ATTEMPT}-{RANK}").write_text(str(number))
    time.sleep(1)
    sys.exit(85)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, save)
def until(path):
    while not path.exists():
        time.sleep(0.05)
print("up", flush=True)
"""


@dataclass
class Run:
    """A run's folder, filled; `submit` is what a client does next."""

    cluster: Cluster
    job: Job
    rendered: Rendered
    folder: Path
    jobs: list[str] = field(default_factory=list)

    def submit(self, *arguments: object) -> str:
        self.jobs.append(self.cluster.submit(*arguments, self.folder / self.rendered.main))
        return self.jobs[-1]

    def end(self, seconds: float = 60) -> dict[str, str]:
        """What Slurm says of the last job when it has ended for good."""
        return self.cluster.wait(self.jobs[-1], seconds=seconds)

    def started(self, attempt: int = 0, node: int = 0) -> None:
        """Wait until the trainer's node runs in that attempt."""
        log = self.folder / "logs" / f"attempt-{attempt}" / f"node-{node}.log"
        self.cluster.until(lambda: log.exists() and "up" in log.read_text().split(), f"attempt {attempt}: {self.all()}")

    def log(self, node: int = 0, attempt: int = 0) -> str:
        return (self.folder / "logs" / f"attempt-{attempt}" / f"node-{node}.log").read_text()

    def exit_code(self, attempt: int | None = None) -> str:
        """Of the run, or of one of its attempts; empty while there is none."""
        path = self.folder / "exit_code" if attempt is None else self.folder / f"logs/attempt-{attempt}/exit_code"
        return path.read_text().strip() if path.exists() else ""

    def out(self) -> str:
        """What the batch script said, all jobs of the run together."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("slurm-*.out")))

    def all(self) -> str:
        """Every log, for a test that failed."""
        paths = [*sorted(self.folder.glob("slurm-*.out")), self.folder / "exit_code"]
        paths += sorted(self.folder.glob("logs/*/*"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in paths if path.is_file())

    @property
    def secrets(self) -> Path:
        return self.folder / SECRETS


def new_run(
    cluster: Cluster,
    folder: Path,
    body: str = "",
    *,
    command: tuple[str, ...] = (),
    nodes: int = 1,
    max_restarts: int = 0,
    secrets: Mapping[str, str] | None = None,
    services: tuple[Service, ...] = (),
    options: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Run:
    """A run whose nodes execute `body` as Python after TRAINER, or `command`."""
    run_id = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")
    run_dir = folder / "jobs" / run_id
    files = tuple(fields.pop("files", ())) or (File("trainer.py", TRAINER + body),)
    if config := fields.pop("config", ""):
        files += (File("config.yaml", config),)
    job = Job(
        run_id=run_id,
        name=run_id,
        step="test",
        config="default",
        executor="slurm",
        profile="test",
        run_dir=str(run_dir),
        workdir=str(run_dir.parent),
        output_dir="output",
        nodes=nodes,
        procs=fields.pop("procs", 1),
        gpus_per_node=fields.pop("gpus_per_node", 0),
        command=command or (sys.executable, "-S", str(run_dir / "trainer.py")),
        files=files,
        env=fields.pop("env", {}),
        secrets=tuple(Secret(name, source=name) for name in secrets or {}),
        services=services,
        restart=Restart(max_restarts),
        options={"time": 10, "mem": 100, **(options or {})},
        **fields,
    )
    rendered = render(job)
    place(rendered, run_dir)
    if secrets:
        (run_dir / SECRETS).touch(mode=0o600)
        (run_dir / SECRETS).write_text(secrets_text(secrets))
    return Run(cluster, job, rendered, run_dir)


def place(rendered: Rendered, folder: Path) -> None:
    """Write the files of a job into its folder, readable by nobody else."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for file in rendered.files:
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=file.mode)
        path.write_bytes(file.text.encode())


def planned_run(
    cluster: Cluster, folder: Path, step: str, config: str, overrides: Sequence[str], **profile: Any
) -> Run:
    """A step of ours compiled for this cluster, all the way from config and profile, without a container."""
    found = find_step(step)
    keys = {"executor": "slurm", "runtime": "none", "python": sys.executable, "mem": 2000, "time": 10, **profile}
    file = folder / "test.yaml"
    file.write_text(json.dumps({"remote_job_dir": str(folder / "jobs"), **keys}))
    loaded = load_profile(str(file))
    composed = compose_for(found, find_config(found, config), overrides, loaded)
    job = plan_job(found, composed, loaded, run_id="planned", attached=False)
    rendered = render(job)
    place(rendered, Path(job.run_dir))
    assert job.bundle
    Path(job.run_dir, job.bundle.file).write_bytes(bundle.read(job.bundle))
    return Run(cluster, job, rendered, Path(job.run_dir))
