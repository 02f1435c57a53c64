"""The script of a job for this machine: kept and started by itself, it does what running the job does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_launch.backends import local_script
from nemotron_launch.errors import UserError
from nemotron_launch.job import Container, File, Job, Secret, Service
from tests.backends.lepton_jobs import lepton_job
from tests.backends.test_lepton_hostile import DUMP, TEXT, is_carried


def local_job(**changes: Any) -> Job:
    """A job that runs `true` here, with its folder in the working directory."""
    job = lepton_job(executor="local", container=Container(), workdir=".", run_dir=".nemotron/runs/r1")
    return replace(job, **changes)


def start(job: Job, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    script = local_script.render_job(job).text
    environ = {**os.environ, **env}
    return subprocess.run(["bash"], input=script, cwd=folder, env=environ, capture_output=True, text=True, timeout=60)


def test_the_script_places_the_files_and_runs_the_command(tmp_path: Path) -> None:
    files = (File("config.yaml", "a: 1\n"), File("data/last.txt", "no line end"))
    command = ("bash", "-c", "cat .nemotron/runs/r1/*.yaml .nemotron/runs/r1/data/*; exit 85")
    done = start(local_job(files=files, command=command), tmp_path)
    assert done.stdout == "a: 1\nno line end"
    assert done.returncode == 85
    assert (tmp_path / ".nemotron/runs/r1/config.yaml").stat().st_mode & 0o777 == 0o600


def test_the_command_keeps_the_users_umask(tmp_path: Path) -> None:
    wanted = subprocess.run(["bash", "-c", "umask"], capture_output=True, text=True).stdout
    assert start(local_job(command=("bash", "-c", "umask")), tmp_path).stdout == wanted


def test_setup_commands_and_environment_come_before_the_command(tmp_path: Path) -> None:
    job = local_job(env={"A": "$B"}, setup=('export C="$A and $NOT_SET"',), command=("bash", "-c", 'echo "$C"'))
    assert start(job, tmp_path).stdout == "$B and \n"


def test_secrets_come_from_the_environment_and_are_named_only(tmp_path: Path) -> None:
    job = local_job(secrets=(Secret("HF_TOKEN", source="MY_TOKEN"),), command=("bash", "-c", 'echo "$HF_TOKEN"'))
    assert "secrets come from yours: MY_TOKEN" in local_script.render_job(job).text
    assert start(job, tmp_path, MY_TOKEN="s3cret").stdout == "s3cret\n"


def test_a_service_lives_as_long_as_the_trainer(tmp_path: Path) -> None:
    serve = "import http.server as h, os; s = h.HTTPServer(('127.0.0.1', 0), h.SimpleHTTPRequestHandler)"
    port = subprocess.run(
        [sys.executable, "-c", serve + "; print(s.server_port)"], capture_output=True, text=True
    ).stdout.strip()
    judge = Service("judge", (sys.executable, "-m", "http.server", port), int(port), health="/")
    command = ("bash", "-c", 'exec 3<> "/dev/tcp/${NEMOTRON_SERVICE_JUDGE/://}" && echo reached; exit 7')
    done = start(local_job(services=(judge,), command=command), tmp_path)
    assert (done.returncode, done.stdout) == (7, "reached\n"), done.stderr
    with pytest.raises(UserError, match="this machine is one node"):
        local_script.render_job(local_job(services=(replace(judge, nodes=1),)))


@settings(max_examples=40, deadline=None)
@given(config=TEXT | st.sampled_from(["END\n", "END\nEND_\n"]), value=TEXT, arguments=st.lists(TEXT, max_size=5))
def test_whatever_is_written_arrives_as_the_same_bytes(config: str, value: str, arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        env = {"V": value, "DUMP": f"{folder}/dump"}
        command = (sys.executable, "-c", DUMP, *arguments)
        job = local_job(files=(File("config.yaml", config),), env=env, command=command)
        if not all(is_carried(text) for text in (config, value, *arguments)):
            with pytest.raises(UserError):
                local_script.render_job(job)
            return
        assert start(job, Path(folder)).returncode == 0
        got_arguments, got_env = json.loads((Path(folder) / "dump").read_text())
        assert (got_arguments, got_env["V"]) == (arguments, value)
        assert (Path(folder) / ".nemotron/runs/r1/config.yaml").read_bytes() == config.encode()
        assert not list(Path(folder).rglob("RAN"))
