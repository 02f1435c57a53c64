"""Fixtures of the tests with a real sshd."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.hosts import Host, open_host
from tests.sshd import Sshd, missing, running

# What a login on a cluster may have lying around, and a command must not see.
LEAKS = {"HF_TOKEN": "hf_secret", "SBATCH_PARTITION": "wrong", "SRUN_CPUS": "1", "SLURM_JOB_ID": "7", "EDITOR": "vi"}
WAYS: dict[str, dict[str, Any]] = {
    "here": {},
    "paramiko": {"client": "paramiko"},
    "openssh": {"client": "openssh"},
    "login": {"remote_shell": "login"},
}
NOISE = """\
echo 'Welcome to the cluster'; printf 'no newline at the end'; echo 'quota: 93 %' >&2
read -t 0.01 answer
export HF_TOKEN=from-the-profile SLURM_CONF=/opt/slurm/slurm.conf PATH=$HOME/modules:$PATH SBATCH_ACCOUNT=wrong
"""


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """A private sshd whose user has noisy profile scripts. Fails, and never skips, where there is none."""
    if reason := missing():
        pytest.fail(reason)
    home = tmp_path_factory.mktemp("home")
    (home / ".bash_profile").write_text(NOISE)
    (home / ".bashrc").write_text("echo 'a line from .bashrc'; export SRUN_DEBUG=3\n")
    (home / "modules").mkdir()
    yield from running(tmp_path_factory.mktemp("sshd"), env={**LEAKS, "HOME": str(home), "SLURM_CONF": "/etc/s.conf"})


@pytest.fixture
def at_sshd(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> Sshd:
    """The sshd, where this process's SSH clients find it."""
    for name, value in sshd.environment.items():
        monkeypatch.setenv(name, value)
    return sshd


@pytest.fixture(scope="session")
def opened(sshd: Sshd) -> Iterator[dict[str, Host]]:
    """Hosts whose connections serve many tests."""
    hosts: dict[str, Host] = {}
    yield hosts
    for each in hosts.values():
        each.close()


@pytest.fixture(params=list(WAYS))
def host(
    request: pytest.FixtureRequest, at_sshd: Sshd, opened: dict[str, Host], monkeypatch: pytest.MonkeyPatch
) -> Host:
    """This machine, reached in each way that there is."""
    for name, value in LEAKS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_CONF", "/etc/s.conf")
    way = WAYS[request.param]
    return opened.setdefault(request.param, open_host({**at_sshd.tunnel, **way} if way else {}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a name that no shell likes."""
    made = tmp_path / '-it\'s a "test"\n$HOME;`x` é'
    made.mkdir()
    return made
