"""Many submissions at once, on a real Slurm."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from nemotron_launch.hosts import Upload
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.process import identity
from nemotron_launch.jobs.run import Run
from nemotron_launch.jobs.submission import submit
from tests.slurm.cluster import Cluster

PROCESSES, EACH = 8, 25


def _submit(folder: Path, process: int) -> None:
    for number in range(EACH):
        name = f"many-{process}-{number}"
        run_dir = str(folder / "jobs" / name)
        run = Run(
            run_id=name, step="test", config="default", config_sha256="", profile="test", executor="slurm",
            run_dir=run_dir, state_dir=run_dir, workdir=str(folder), output_dir=run_dir, nodes=1, created=time.time(),
            submitter=identity(),
        )  # fmt: skip
        script = f"#!/bin/bash\n#SBATCH --hold\n#SBATCH --job-name={name}\n#SBATCH --comment=nemotron:{name}\ntrue\n"
        with Ledger(folder / "state") as ledger:
            submit(ledger, run, [Upload("job.sbatch", script.encode()), Upload("code-0.tar.gz", b"code")])


@pytest.mark.slow
def test_200_runs_that_8_processes_submit_at_once_are_200_jobs_and_200_rows(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_submit, args=(tmp_path, process)) for process in range(PROCESSES)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=120)
        assert [worker.exitcode for worker in workers] == [0] * PROCESSES
        listed = cluster.run("squeue", "--noheader", "--states=all", "--format=%i %j").splitlines()
        jobs = dict(line.split() for line in listed if " many-" in line)
        with Ledger(tmp_path / "state") as ledger:
            rows = ledger.runs()
        assert len(jobs) == len(rows) == PROCESSES * EACH
        assert {row.job_id: row.run_id for row in rows} == jobs
        assert {row.state for row in rows} == {"pending"}
    finally:
        for worker in workers:
            worker.kill()
        cluster.run("bash", "-c", "squeue -h -o '%i %j' | awk '/ many-/ {print $1}' | xargs -r scancel", check=False)
