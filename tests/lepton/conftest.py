"""A workspace of Lepton for each test, and the variables that lead to it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lepton.service import Service, lepton_service


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A workspace whose jobs stay as they are; this process and its children find it."""
    yield from _workspace(tmp_path, monkeypatch, plays=False)


@pytest.fixture
def lepton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A workspace that runs its jobs."""
    own = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    if subprocess.run(["unshare", *own, "--net", "--mount", "true"], capture_output=True).returncode:
        assert "CI" not in os.environ, "network and mount namespaces are needed"
        pytest.skip("needs network and mount namespaces: unshare is not allowed here")
    yield from _workspace(tmp_path, monkeypatch, plays=True)


def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, plays: bool) -> Iterator[Service]:
    with lepton_service(tmp_path / "service", plays=plays) as service:
        for name, value in service.env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("LEPTON_CACHE_DIR", str(tmp_path / "no-login"))
        yield service
