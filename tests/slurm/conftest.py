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
