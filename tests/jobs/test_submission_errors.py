"""What stands in the way of a submission over SSH: one clear message each, and nothing half done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.login import Client
from tests.sshd import Sshd, running

Refused = Callable[..., str]


@pytest.fixture
def login(tmp_path: Path) -> Iterator[Sshd]:
    """A host on which sbatch answers with a job id, and two disks: a full one and a read-only one."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sbatch", "squeue", "scontrol", "sacct"):
        (tools / name).write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/calls\n[ {name} != sbatch ] || echo 17\n")
        (tools / name).chmod(0o755)
    system = tmp_path / "system"  # without this machine's own Slurm
    system.mkdir()
    for program in Path("/usr/bin").iterdir():
        if program.name not in ("sbatch", "squeue", "scontrol", "sacct", "scancel", "srun"):
            (system / program.name).symlink_to(program)
    home = tmp_path / "home"
    home.mkdir()
    prefix: list[str] = []
    for disk in ("full", "read-only"):
        (tmp_path / disk).mkdir()
    if not os.geteuid():
        mounts = f"mount -t tmpfs -o size=32k none {tmp_path}/full && mount -t tmpfs -o ro none {tmp_path}/read-only"
        prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c", mounts + ' && exec "$@"', "sh"]
    else:
        (tmp_path / "read-only").chmod(0o500)
    env = {"PATH": f"{tools}:{system}", "HOME": str(home)}
    yield from running(tmp_path / "sshd", env=env, prefix=prefix)


@pytest.fixture
def refused(login: Sshd, tmp_path: Path) -> Refused:
    """The one message of a submission that cannot be, held to leaving no run that works and no process."""
    folder = tmp_path / "client"
    folder.mkdir()
    client = Client(login, folder)

    def refused(*, rows: int = 0, remote_job_dir: Path = tmp_path / "jobs", **tunnel: Any) -> str:
        profile = json.loads((folder / "site.yaml").read_text())
        profile["remote_job_dir"] = str(remote_job_dir)
        profile["tunnel"] = {**login.tunnel, **tunnel}
        (folder / "site.yaml").write_text(json.dumps(profile))
        child = client.start("steps", "run", "sft/small", "-b", "site.yaml", "data.path=x")
        out, errors = child.communicate(timeout=120)
        text = errors.decode()
        assert child.returncode in (1, 2), text
        assert (text.count("error:"), text.count("Traceback"), out) == (1, 0, b""), text
        made = json.loads(client.run("jobs", "list", "--json"))
        assert [row["state"] for row in made] == ["refused"] * rows
        assert not list(remote_job_dir.glob("*/*")) or rows
        return text

    return refused


def key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True, timeout=60)
    return path


def test_a_wrong_key(refused: Refused, login: Sshd, tmp_path: Path) -> None:
    text = refused(host="127.0.0.1", port=login.port, identity=str(key(tmp_path / "other")))
    assert "@127.0.0.1: permission denied" in text and "tunnel.identity" in text


def test_an_unknown_host_key(refused: Refused, login: Sshd) -> None:
    login.known_hosts.write_text("")
    shown = subprocess.run(
        ["ssh-keygen", "-lf", login.root / "host_key.pub"], capture_output=True, text=True, timeout=60
    )
    text = refused()
    assert shown.stdout.split()[1] in text and "connect once by hand" in text


def test_a_host_that_is_down(refused: Refused, login: Sshd) -> None:
    login.kill()
    assert f"127.0.0.1:{login.port} refuses connections" in refused()


def test_no_sbatch_there(refused: Refused, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "tools")
    text = refused(rows=1)
    assert "no sbatch on" in text and "tunnel.remote_shell: login" in text


@pytest.mark.skipif(bool(os.geteuid()), reason="mounting is root's")
def test_no_space(refused: Refused, tmp_path: Path) -> None:
    text = refused(rows=1, remote_job_dir=tmp_path / "full")
    assert f"cannot write to {tmp_path}/full/" in text and "no space left" in text


def test_a_folder_that_is_not_writable(refused: Refused, tmp_path: Path) -> None:
    text = refused(rows=1, remote_job_dir=tmp_path / "read-only")
    assert f"cannot write to {tmp_path}/read-only/" in text
    assert "read-only" in text or "permission denied" in text
    assert not (tmp_path / "calls").exists() or "sbatch" not in (tmp_path / "calls").read_text()
