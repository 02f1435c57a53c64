"""What a job's states, exit codes and history make of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_launch.backends import lepton as render
from nemotron_launch.frozen import replace
from nemotron_launch.hosts import Upload
from nemotron_launch.jobs.run import Run
from tests.lepton.lepton_runs import client, planned, spec_of
from tests.lepton.service import Job, Service


@pytest.fixture
def run(workspace: Service, tmp_path: Path) -> Run:
    made, files = planned(tmp_path / "remote")
    submitted = client(made).submit(made, files)
    return replace(made, job_id=submitted.job_id, state="pending", submitted=made.created)


def only(workspace: Service) -> Job:
    [job] = workspace.jobs.values()
    return job


@pytest.mark.parametrize(
    ("state", "became"),
    [
        *(("Queueing", "pending"), ("Awaiting", "pending"), ("Starting", "pending"), ("Running", "running")),
        *(("Restarting", "pending"), ("PendingRetry", "pending"), ("Stopping", "running"), ("Terminating", "running")),
        *(("Deleting", "running"), ("Completed", "finished"), ("Failed", "failed"), ("Stopped", "stopped")),
        *(
            ("Deleted", "cancelled"),
            ("Archived", "lost"),
            ("UNK", "running"),
            ("Hibernating", "running"),
            ("", "running"),
        ),
    ],
)
def test_every_state_of_lepton_has_one_of_ours_and_unknown_ones_end_nothing(
    workspace: Service, run: Run, state: str, became: str
) -> None:
    only(workspace).state = state
    before = replace(run, state="running", started=run.created)
    assert client(run).poll([before])["a-run"].state == became


def test_restarts_count_as_attempts(workspace: Service, run: Run) -> None:
    only(workspace).state, only(workspace).attempt = "Running", 2
    seen = client(run).poll([run])["a-run"]
    assert (seen.state, seen.attempt) == ("running", 2)


@pytest.mark.parametrize(
    ("codes", "state", "became", "code"),
    [
        ([85, 85], "Failed", "stopped", 85),
        ([3, 137], "Failed", "failed", 3),
        ([85, 143], "Failed", "stopped", 85),
        ([0, 137], "Failed", "failed", 137),
        ([0, 0], "Archived", "finished", 0),
        ([1, 85], "Archived", "failed", 1),
    ],
)
def test_the_exit_code_is_the_cause_s_among_its_effects(
    workspace: Service, tmp_path: Path, codes: list[int], state: str, became: str, code: int
) -> None:
    run, files = planned(tmp_path / "remote")
    run = replace(run, contact={**run.contact, "folder": ""})
    job = workspace.finished(spec_of(files), [_log(files, node, code) for node, code in enumerate(codes)], state)
    job.failed = sum(map(bool, codes))
    seen = client(run).poll([replace(run, job_id=job.id, state="running")])["a-run"]
    assert (seen.state, seen.exit_code) == (became, code)


def _log(files: list[Upload], node: int, code: int) -> bytes:
    from nemotron_launch.backends.lepton_states import nonce_of

    mark = nonce_of(spec_of(files))
    assert mark and render.read_exit(f"nemotron-exit {mark} attempt=0 node={node} code={code}", mark)
    forged = f"nemotron-exit {'0' * 16} attempt=9 node={node} code=0"
    return f"step 1\nnemotron-exit {mark} attempt=0 node={node} code={code}\n{forged}\n".encode()


def test_a_job_that_is_gone_is_lost_only_after_a_while(workspace: Service, run: Run) -> None:
    only(workspace).gone = True
    backend = client(run)
    from time import time

    assert backend.poll([replace(run, submitted=time())]) == {}
    seen = backend.poll([replace(run, submitted=time() - 3600)])["a-run"]
    assert (seen.state, seen.reason) == ("lost", f"Lepton no longer knows the job {run.job_id}")


def test_a_bundle_too_large_for_a_job_goes_onto_the_volume_or_is_refused(workspace: Service, tmp_path: Path) -> None:
    run, files = planned(tmp_path / "remote")
    large = [*files, Upload("code-abc.tar.gz", b"x" * (3 << 20))]
    away = replace(run, contact={**run.contact, "folder": "/nowhere"})
    with pytest.raises(Exception, match=r"the code has 3\.0 MiB, more than a Lepton job carries") as said:
        client(away).check(away, large)
    assert "mount that volume" in str(said.value) and not workspace.jobs
    (tmp_path / "remote").mkdir()
    client(run).submit(run, large)
    assert (tmp_path / "remote/a-run/code-abc.tar.gz").stat().st_size == 3 << 20


def test_a_name_too_long_is_shortened_and_found_again(workspace: Service, tmp_path: Path) -> None:
    run, files = planned(tmp_path / "remote", f"20261121-101500-{'very-' * 10}long-3fa9c1")
    made = client(run).submit(run, files)
    assert len(only(workspace).spec["metadata"]["name"]) <= 36
    assert client(run).find(run) == client(run).submit(run, files) == made
    other = replace(run, run_id=run.run_id.replace("3fa9c1", "3fa9c2"))
    assert client(run).find(other) is None
