"""The Slurm client on a real Slurm: submitted once, followed, cancelled, however the answers get lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.client_runs import Site, site_of
from tests.slurm.cluster import Cluster

NewSite = Callable[..., Site]


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """The client of this cluster, and runs for it."""
    with site_of(cluster, tmp_path, monkeypatch) as site:
        yield site


def test_a_run_is_submitted_followed_and_read(site: Site) -> None:
    run = site.run("until(RUN / 'go')\nprint('good bye')", nodes=2)
    run = site.submit(run)
    seen = site.until(run, lambda seen: seen.state == "running" and seen.nodes)
    assert len(seen.nodes) == 2 and seen.started and abs(seen.started - time.time()) < 120 and not seen.ended
    Path(run.run_dir, "go").touch()
    seen = site.end(run)
    assert (seen.state, seen.exit_code, seen.attempt, seen.job_id) == ("finished", 0, 0, run.job_id)
    assert seen.ended and seen.started and seen.started <= seen.ended <= time.time() + 1
    sources = site.client.log_sources(run)
    assert [(source.attempt, source.name) for source in sources] == [(0, "job"), (0, "node-0"), (0, "node-1")]
    news = site.client.read_logs(dict.fromkeys(sources, 0))
    assert [news[source].split() for source in sources[1:]] == [[b"up", b"good", b"bye"]] * 2
    assert site.client.read_logs({sources[1]: len(news[sources[1]])}) == {}


def test_the_exit_code_of_the_run_is_seen(site: Site) -> None:
    seen = site.end(site.submit(site.run("sys.exit(7)")))
    assert (seen.state, seen.exit_code, seen.reason) == ("failed", 7, "exit code 7")
