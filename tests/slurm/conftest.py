"""Fixtures of the tests on a real Slurm."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing, running


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real Slurm of four nodes with four cores and eight GPUs each. Fails, and never skips, where there is none."""
    if reason := missing():
        pytest.fail(reason)
    yield from running(tmp_path_factory.mktemp("slurm", numbered=True) / "root")


@pytest.fixture(scope="session")
def accounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real Slurm of two nodes with slurmdbd, so that sacct knows what the controller has forgotten in 2 s."""
    if reason := missing():
        pytest.fail(reason)
    folder = tmp_path_factory.mktemp("slurm", numbered=True) / "root"
    yield from running(folder, nodes=2, accounting=True, keeps=2)
