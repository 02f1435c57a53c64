"""Runs that lose their nodes, their time or their way, on a real Slurm: they go on from where they were, and end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.backends.live import Refused
from nemotron_launch.frozen import replace
from nemotron_launch.jobs.run import Run
from tests.slurm.client_runs import Site, site_of
from tests.slurm.cluster import Cluster

# Saves a checkpoint a moment after its start; the first attempt then works until it is stopped.
TRAINS = """
out = RUN.parent / "output" / "checkpoints"
out.mkdir(parents=True, exist_ok=True)
begun = len(list(out.glob("step_*")))
print("begun at", begun, flush=True)
(out / f"step_{begun + 1}").mkdir()
print("saved", flush=True)
if ATTEMPT == 0: time.sleep(300)
"""
CONFIG = "checkpointing:\n  checkpoint_dir: output/checkpoints\n"


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with site_of(cluster, tmp_path, monkeypatch) as site:
        yield site


def preempted(site: Site, partition: str, **fields: Any) -> Run:
    """A run of `partition` that works, and whose nodes another job takes for a moment."""
    options = {"partition": partition, "nodelist": "node3", "exclusive": True, **fields.pop("options", {})}
    run = site.submit(site.run(TRAINS, options=options, config=CONFIG, **fields))
    site.until(run, lambda seen: "saved" in site.logs(run), 20)
    site.cluster.submit("--partition=urgent", "--nodelist=node3", "--exclusive", "--output=/dev/null", "--wrap=true")
    return run


def begins(site: Site, run: Run) -> list[str]:
    return re.findall(r"begun at (\d+)", site.logs(run))


def test_a_job_that_the_site_cancels_goes_on_as_another(site: Site) -> None:
    run = preempted(site, "cheap", max_restarts=2, secrets={"API_KEY": "x"})
    after = site.submit(site.run(), after=[run])
    seen = site.until(run, lambda seen: seen.job_id != run.job_id)
    assert seen.state in ("pending", "running", "finished")
    heir = replace(run, job_id=seen.job_id)
    seen = site.end(heir)
    assert (seen.state, seen.exit_code, seen.attempt) == ("finished", 0, 1), site.logs(run)
    assert begins(site, run) == ["0", "1"]
    assert "restart 1 of 2" in site.logs(run) and not Path(run.run_dir, "secrets.env").exists()
    # What waited for the first job waits for the second.
    assert site.end(after).state == "finished"
    assert len(site.jobs(run)) == 2


def test_where_nodes_may_not_submit_the_client_does(site: Site) -> None:
    # The wrapper comes first in the job's PATH too.
    denied = 'echo "sbatch: error: Access denied" >&2; exit 1'
    site.fault("sbatch", f'case $(hostname) in node*) {denied} ;; esac; real "$@"')
    run = preempted(site, "cheap", max_restarts=1)
    seen = site.until(run, lambda seen: seen.wants_successor)
    assert (seen.state, seen.reason) == ("pending", "preempted; to be submitted again")
    made = site.client.submit_successor(run)
    assert made == site.client.submit_successor(run)  # whoever asks again gets the same
    heir = replace(run, job_id=made.job_id)
    seen = site.end(heir)
    assert (seen.state, seen.attempt) == ("finished", 1), site.logs(run)
    assert begins(site, run) == ["0", "1"] and len(site.jobs(run)) == 2
    with pytest.raises(Refused, match="has had its 1 restarts"):
        site.client.submit_successor(replace(heir, attempt=1))
