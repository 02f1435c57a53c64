"""Fixtures for the launcher's tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.step_trees import small_tree

# Several tests compute at once: threads that wait for each other must not keep the others' cores busy meanwhile.
# Read when torch is imported, here and in every process that a test starts.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

Nemotron = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, in turn from each folder: some wait while others compute, and the short ones
    are left for the end, which no process of several then reaches long before the others."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    turns: dict[tuple[bool, Path], int] = {}
    places = {}
    for file, tests in files.items():
        quick = not any(item.get_closest_marker("slow") for item in tests)
        turn = turns[quick, file.parent] = turns.get((quick, file.parent), 0) + 1
        places[file] = (quick, turn)
    items.sort(key=lambda item: places[item.path])


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the launcher keeps between commands stays with the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("NEMOTRON_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small tree of steps that `nemotron` uses, and a ledger; the working directory is an empty folder."""
    root = small_tree(tmp_path / "steps")
    monkeypatch.setenv("NEMOTRON_STEPS", str(root))
    monkeypatch.setenv("NEMOTRON_STATE_DIR", str(tmp_path / "state"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return root


@pytest.fixture
def nemotron() -> Nemotron:
    """The real command in its own process, with its output in pipes: nemotron("steps", "list")."""

    def nemotron(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nemotron_launch", *arguments]
        path = os.pathsep.join([str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")])
        environ = {**os.environ, "PYTHONPATH": path, **env}
        return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120)

    return nemotron
