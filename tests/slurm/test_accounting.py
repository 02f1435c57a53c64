"""The Slurm client where the controller forgets a job within seconds: with accounting, and by the folder alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemotron_launch.backends.live import Submission
from nemotron_launch.frozen import replace
from nemotron_launch.jobs.run import Run
from tests.slurm.client_runs import Site, site_of
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slow


@pytest.fixture
def site(accounted: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with site_of(accounted, tmp_path, monkeypatch) as site:
        yield site


def forgotten(site: Site, *runs: Run) -> None:
    """Wait until the controller has forgotten these runs' jobs."""
    site.cluster.until(lambda: not any(site.jobs(run) for run in runs), "jobs older than MinJobAge", 90)


def test_what_the_controller_has_forgotten_is_in_sacct_or_in_the_folder(site: Site) -> None:
    good, bad = site.submit(site.run()), site.submit(site.run("sys.exit(7)"))
    # Ended without its script having a say, as where a folder is lost: only sacct knows.
    gone = site.submit(site.run("time.sleep(300)"))
    waits = site.submit(site.run(options={"sbatch_args": ["--hold"]}))
    lost = site.run()  # its answer never came, and its folder says nothing
    lost_job = site.submit(lost).job_id
    site.until(gone, lambda seen: seen.state == "running")
    site.client.cancel([waits])
    site.cluster.run("scancel", gone.job_id)
    for run in (good, bad, gone, waits):
        site.end(run)
    forgotten(site, good, bad, gone, waits, lost)
    for path in ("exit_code", "claim", "submitted"):
        Path(gone.run_dir, path).unlink(missing_ok=True)
        Path(lost.run_dir, path).unlink(missing_ok=True)

    seen = site.client.poll([good, bad, gone, waits])
    found = [(seen[run.run_id].state, seen[run.run_id].exit_code) for run in (good, bad, gone, waits)]
    assert found == [("finished", 0), ("failed", 7), ("cancelled", None), ("cancelled", None)]
    assert seen[gone.run_id].reason == "by user 0" and seen[good.run_id].nodes == ("node1",)
    ended = seen[good.run_id].ended
    assert ended and abs(ended - time.time()) < 300
    assert site.client.find(lost) == Submission(lost_job)

    # Without accounting the folder is all that is left; where it holds no end, the run is lost.
    site.client._queue.accounting = False
    seen = site.client.poll([good, bad, replace(gone, run_dir="/nowhere", state_dir="/nowhere")])
    assert {run_id: (one.state, one.exit_code) for run_id, one in seen.items()} == {
        good.run_id: ("finished", 0),
        bad.run_id: ("failed", 7),
    }


def test_a_controller_that_was_restarted_finds_its_jobs_and_the_client_waits_for_it(site: Site) -> None:
    run = site.submit(site.run("until(RUN / 'go')"))
    site.until(run, lambda seen: seen.state == "running")
    time.sleep(1)  # what a controller has not saved it forgets
    site.cluster.kill_controller()
    site.client._patience = 60
    Path(run.run_dir, "go").touch()
    back = threading.Timer(1, site.cluster.start_controller)
    back.start()
    try:
        other = site.submit(site.run())
    finally:
        back.join()
    assert site.jobs(other) == [other.job_id]
    assert site.end(run).state == site.end(other).state == "finished"
