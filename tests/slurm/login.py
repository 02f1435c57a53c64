"""The command on a machine that reaches the tests' cluster over SSH, its login node behind a real sshd."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster
from tests.sshd import Sshd, running
from tests.step_trees import REPOSITORY, small_tree


@pytest.fixture(scope="module")
def login(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """The cluster's login node."""
    home = tmp_path_factory.mktemp("home")
    yield from running(tmp_path_factory.mktemp("sshd"), env={"HOME": str(home), "SLURM_CONF": str(cluster.conf)})


class Client:
    """The command, on a machine that reaches the cluster over SSH."""

    def __init__(self, login: Sshd, folder: Path) -> None:
        self.tree = small_tree(folder / "steps")
        self.folder = folder
        keys: dict[str, Any] = {
            "executor": "slurm", "runtime": "none", "python": sys.executable, "mem": 500, "time": 10,
            "remote_job_dir": str(folder / "cluster"), "tunnel": login.tunnel,
        }  # fmt: skip
        (folder / "site.yaml").write_text(json.dumps(keys))
        (folder / "rows.jsonl").write_text("{}\n")
        self.env = {
            **os.environ, **login.environment, "PYTHONPATH": str(REPOSITORY), "NEMOTRON_STEPS": str(self.tree),
            "NEMOTRON_STATE_DIR": str(folder / "state"),
        }  # fmt: skip
        self.env.pop("SLURM_CONF", None)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "nemotron_launch", *arguments]
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=self.folder, env=self.env, **pipes)

    def run(self, *arguments: str, code: int = 0) -> str:
        child = self.start(*arguments)
        out, errors = child.communicate(timeout=120)
        assert child.returncode == code, f"{arguments}: {child.returncode}\n{errors.decode()}\n{out.decode()[-2000:]}"
        return out.decode()

    def status(self, name: str = "last") -> dict[str, Any]:
        data: dict[str, Any] = json.loads(self.run("jobs", "status", name, "--json"))
        return data


@pytest.fixture
def client(login: Sshd, cluster: Cluster, tmp_path: Path) -> Iterator[Client]:
    yield Client(login, tmp_path)
    cluster.run("scancel", "--user=root", check=False)
