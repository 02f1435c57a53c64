"""What `nemotron steps run … -d --output dir=` writes runs on a real Slurm as it stands."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.config.overrides import dump_value
from tests.conftest import Nemotron
from tests.sites import SLURM, profile_file
from tests.slurm.cluster import ENDED, Cluster


@pytest.fixture
def jobs(tree: Path, tmp_path: Path) -> Path:
    """The folder of all runs, and a profile `cluster` for it."""
    folder = tmp_path / "all jobs"
    folder.mkdir()
    base = {**SLURM, "account": None, "partition": "debug", "mem": 100, "python": sys.executable}
    profile_file(Path("profiles"), "cluster", base, remote_job_dir=str(folder), time="00:30:00")
    return folder


def ended(cluster: Cluster, job: str) -> dict[str, str]:
    end = time.monotonic() + 60
    while (shown := cluster.show(job))["JobState"] not in ENDED:
        assert time.monotonic() < end, shown
        time.sleep(0.2)
    return shown


def written(nemotron: Nemotron, jobs: Path, *arguments: str) -> Path:
    run_dir = jobs / "mine"
    command = ("steps", "run", "small", "-b", "cluster", "-d", "--run-id", "mine", "--output", f"dir={run_dir}")
    done = nemotron(*command, *arguments)
    assert done.returncode == 0, done.stderr
    return run_dir


def test_a_written_job_can_be_submitted_by_hand(cluster: Cluster, jobs: Path, nemotron: Nemotron) -> None:
    value = 'it\'s $(hostname) "100 %" {{ x }} ünï'
    run_dir = written(
        nemotron, jobs, f"+env_vars.A={dump_value(value)}", f"+run.env.B={dump_value(value)}", "--", "--flag", value
    )
    shown = ended(cluster, cluster.submit(run_dir / "job.sbatch"))
    log = "".join(path.read_text() for path in run_dir.rglob("*") if path.suffix in (".log", ".out"))
    assert shown["JobState"] == "COMPLETED", log
    # The config's relative paths start at the folder of all runs.
    seen: dict[str, Any] = json.loads((jobs / "out/sft/seen.json").read_text())
    assert seen["argv"] == ["--flag", value]
    assert seen["config"]["env_vars"] == {"A": value}
    assert seen["env"]["B"] == value
    assert seen["env"]["PYTHONPATH"].split(":")[0] == str(run_dir / "code")
    assert (run_dir / "code/nemotron_launch/trainer/spawn.py").is_file()


def test_the_steps_exit_code_is_the_jobs(cluster: Cluster, jobs: Path, nemotron: Nemotron) -> None:
    run_dir = written(nemotron, jobs, "exit=7")
    assert ended(cluster, cluster.submit(run_dir / "job.sbatch"))["ExitCode"] == "7:0"


def test_check_asks_sbatch(cluster: Cluster, jobs: Path, nemotron: Nemotron) -> None:
    check = ("steps", "check", "small", "--profile", "cluster", "--test-only")
    done = nemotron(*check, **cluster.env)
    assert done.returncode == 0, done.stdout + done.stderr
    profile = Path("profiles/cluster.yaml")
    profile.write_text(profile.read_text().replace("debug", "nowhere"))
    done = nemotron(*check, **cluster.env)
    assert done.returncode == 1
    assert "sbatch --test-only: " in done.stdout
    assert "nvalid partition" in done.stdout
