"""Runs that go through the Slurm client: as a submission makes them, with a client that reaches the test's cluster."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.backends.live import Seen
from nemotron_launch.backends.slurm_client import SlurmClient
from nemotron_launch.frozen import replace
from nemotron_launch.hosts import Upload
from nemotron_launch.hosts.here import Here
from nemotron_launch.job import Job
from nemotron_launch.jobs.run import OVER, Run
from nemotron_launch.render import render
from tests.slurm.cluster import WAIT, Cluster
from tests.slurm.runs import new_run


class Site:
    """A cluster with a client for it, its runs in folders of their own."""

    def __init__(self, cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cluster = cluster
        self.monkeypatch = monkeypatch
        self.folder = folder
        self.client = SlurmClient(Here(), patience=20, settle=1)
        self.runs: list[Run] = []
        self.files: dict[str, list[Upload]] = {}
        self.compiled: dict[str, Job] = {}

    def run(self, body: str = "", *, max_restarts: int = 0, **fields: Any) -> Run:
        """A row of the ledger whose files lie ready in `files`; `submit` places and submits them."""
        made = new_run(
            self.cluster,
            self.folder / f"{self.folder.name}-{len(self.runs)}",
            body,
            max_restarts=max_restarts,
            **fields,
        )
        run = Run(
            run_id=made.job.run_id,
            step="test",
            config="default",
            config_sha256="",
            profile="test",
            executor="slurm",
            run_dir=made.job.run_dir,
            state_dir=made.job.run_dir,
            workdir=made.job.workdir,
            output_dir=str(Path(made.job.workdir, made.job.output_dir)),
            nodes=made.job.nodes,
            created=time.time(),
            max_restarts=max_restarts,
            options=made.job.options,
        )
        self.runs.append(run)
        self.compiled[run.run_id] = made.job
        self.files[run.run_id] = [Upload(path.name, path.read_bytes()) for path in sorted(made.folder.iterdir())]
        shutil.rmtree(made.folder)
        return run

    def at(self, folder: Path, run: Run) -> Run:
        """The run, compiled for another folder."""
        job = replace(self.compiled[run.run_id], run_dir=str(folder), workdir=str(folder.parent), run_id=folder.name)
        job = replace(job, command=(*job.command[:-1], str(folder / "trainer.py")))
        moved = replace(run, run_id=job.run_id, run_dir=job.run_dir, state_dir=job.run_dir, workdir=job.workdir)
        self.runs.append(moved)
        self.files[job.run_id] = [Upload(file.path, file.text.encode()) for file in render(job).files]
        return moved

    def submit(self, run: Run, **fields: Any) -> Run:
        made = self.client.submit(run, self.files[run.run_id], **fields)
        return replace(run, job_id=made.job_id, cluster=made.cluster, state="pending")

    def seen(self, run: Run) -> Seen:
        found = self.client.poll([run])
        assert run.run_id in found, f"nothing is known of {run.run_id}"
        return found[run.run_id]

    def until(self, run: Run, holds: Callable[[Seen], object], seconds: float = WAIT) -> Seen:
        end = time.monotonic() + seconds
        while not holds(seen := self.seen(run)):
            assert time.monotonic() < end, f"waited in vain; last: {seen}\n{self.logs(run)}"
            time.sleep(0.1)
        return seen

    def end(self, run: Run, seconds: float = WAIT) -> Seen:
        return self.until(run, lambda seen: seen.state in OVER, seconds)

    def fault(self, command: str, lines: str) -> None:
        """Put lines of shell in the way of a command of Slurm: `real "$@"` is the command, $calls counts from 1."""
        (self.folder / "bin").mkdir(exist_ok=True)
        script = self.folder / "bin" / command
        script.write_text(
            f"#!/bin/bash\ncalls=$(($(cat {script}.calls 2> /dev/null) + 1))\necho $calls > {script}.calls\n"
            f'real() {{ {shutil.which(command, path=self.cluster.env["PATH"])} "$@"; }}\n{lines}\n'
        )
        script.chmod(0o755)
        self.monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")

    def jobs(self, run: Run) -> list[str]:
        """Every job that the controller knows under this run's name."""
        return self.cluster.run(
            "squeue", "--noheader", "--states=all", f"--name={run.sweep or run.run_id}", "--Format=JobArrayID"
        ).split()

    def logs(self, run: Run) -> str:
        paths = [path for path in sorted(Path(run.run_dir).rglob("*")) if path.suffix in (".out", ".log")]
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')}" for path in paths)


@contextlib.contextmanager
def site_of(cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    site = Site(cluster, folder, monkeypatch)
    try:
        yield site
    finally:
        names = ",".join(run.sweep or run.run_id for run in site.runs)
        if names:
            cluster.run("scancel", f"--name={names}", check=False)
