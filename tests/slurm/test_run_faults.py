"""What clusters do to a run, over SSH on a real Slurm: one job, a true ledger, and the same losses in the end."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deaths import DIES
from tests.slurm.cluster import Cluster
from tests.slurm.login import Client, client, login
from tests.sshd import Sshd

__all__ = ["client", "login"]
pytestmark = pytest.mark.slow

STEPS = 60
SMALL = [
    "cluster.num_nodes=2", "cluster.procs_per_node=2", f"dpo.max_num_steps={STEPS}", "dpo.val_period=0",
    "dpo.val_at_start=false", "dpo.val_at_end=false", "dpo.val_generation.num_prompts=0",
    "dpo.val_global_batch_size=40", "policy.architecture.num_layers=1", "policy.architecture.hidden_size=32",
    "policy.architecture.num_attention_heads=2", "policy.architecture.intermediate_size=32",
    "policy.train_global_batch_size=8", "policy.train_micro_batch_size=2", "checkpointing.save_period=5",
    "checkpointing.keep_top_k=1", "checkpointing.metric_name=null", "checkpointing.pretrained_checkpoint=null",
]  # fmt: skip


def losses(folder: Path) -> dict[int, float]:
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def jobs_of(cluster: Cluster, run_id: str) -> list[str]:
    """The jobs of this run that are not over."""
    return cluster.run("squeue", "--noheader", f"--name={run_id}", "--Format=JobID").split()


def test_a_run_that_meets_every_fault_ends_like_one_that_met_none(client: Client, cluster: Cluster) -> None:
    """Tiny DPO on two nodes with two processes each: attached over SSH, and detached with faults, then attached."""
    client.env.pop("NEMOTRON_STEPS")
    site = json.loads((client.folder / "site.yaml").read_text())
    (client.folder / "site.yaml").write_text(
        json.dumps({**site, "mem": 3000, "max_restarts": 9, "env": {"OMP_NUM_THREADS": "1"}})
    )
    dpo = ["steps", "run", "rl/nemo_rl/dpo", "-c", "tiny", *SMALL]
    shown = client.run(*dpo, "-r", "site.yaml", "output_dir=whole")
    assert f"saved step {STEPS} in" in shown
    whole = losses(client.folder / "cluster" / "whole")
    assert sorted(whole) == list(range(1, STEPS + 1))

    output = client.folder / "cluster" / "met"
    made = json.loads(client.run(*dpo, "-b", "site.yaml", "output_dir=met", "--json"))
    run_id, job = made["run_id"], made["job_id"]

    def steps_more(number: int = 3) -> None:
        known = max(losses(output), default=0)
        cluster.until(lambda: max(losses(output), default=0) >= min(known + number, STEPS), "some steps", 120)

    def restarted(times: int) -> None:
        cluster.until(lambda: cluster.show(job)["Restarts"] == str(times), f"restart {times}", 90)

    def one_job_and_a_true_row(*states: str) -> None:
        assert jobs_of(cluster, run_id) == [job]
        seen = client.status(run_id)
        assert (seen["job_id"], seen["run_id"]) == (job, run_id)
        assert seen["state"] in states, seen

    steps_more()
    cluster.kill_controller()
    cluster.start_controller()
    one_job_and_a_true_row("running")

    steps_more()
    node = cluster.show(job)["BatchHost"]
    cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    restarted(1)
    cluster.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)  # it may be back by itself
    one_job_and_a_true_row("pending", "running")

    steps_more()
    client.run("jobs", "cancel", run_id)
    client.run("jobs", "wait", run_id, "-q", code=130)
    assert client.status(run_id)["state"] == "cancelled"
    assert jobs_of(cluster, run_id) == []
    again = json.loads(client.run("jobs", "resubmit", run_id, "--json"))
    assert again["job_id"] != job
    job = again["job_id"]
    client.run("jobs", "attach", run_id, "--on-interrupt", "detach")

    seen = client.status(run_id)
    assert (seen["state"], seen["exit_code"]) == ("finished", 0)
    assert losses(output) == whole
    ended = [row["state"] for row in json.loads(client.run("jobs", "list", "--json"))]
    assert ended == ["finished", "finished"]


@pytest.fixture
def behind(cluster: Cluster, tmp_path: Path) -> Iterator[Any]:
    """Puts lines of shell around the login node's sbatch: `real "$@"` is the command."""
    login = _login_with(cluster, tmp_path / "bin", tmp_path / "sshd")
    yield from login


def _login_with(cluster: Cluster, folder: Path, root: Path) -> Iterator[Any]:
    from tests.sshd import running

    folder.mkdir()
    path = f"{folder}:{cluster.env['PATH']}"
    for sshd in running(root, env={"HOME": str(root), "SLURM_CONF": str(cluster.conf), "PATH": path}):

        def around(lines: str) -> None:
            real = shutil.which("sbatch", path=cluster.env["PATH"])
            script = folder / "sbatch"
            script.write_text(f'#!/bin/bash\nreal() {{ {real} "$@"; }}\n{lines}\n')
            script.chmod(0o755)

        yield sshd, around


SUBMIT = ["steps", "run", "sft/small", "-b", "site.yaml", "data.path=x", "--run-id"]


def submitted_once(client: Client, cluster: Cluster, run_id: str) -> None:
    """The ledger's row, the controller and the run's own traces agree on one job that has trained."""
    client.run("jobs", "wait", run_id, "-q")
    seen = client.status(run_id)
    assert seen["state"] == "finished"
    known = cluster.run("squeue", "--noheader", "--states=all", f"--name={run_id}", "--Format=JobID").split()
    assert known == [seen["job_id"]]
    run_dir = client.folder / "cluster" / run_id
    assert [path.name for path in (run_dir / "logs").iterdir()] == ["attempt-0"]


def test_a_host_that_is_down_leaves_nothing_and_the_same_command_submits(
    client: Client, cluster: Cluster, login: Sshd
) -> None:
    login.kill()
    child = client.start(*SUBMIT, "cut-before")
    _, errors = child.communicate(timeout=90)
    assert child.returncode == 1
    assert b"refuses connections" in errors and b"Traceback" not in errors and b"may have" not in errors, errors
    login.start()
    assert json.loads(client.run("jobs", "list", "--json")) == []
    client.run(*SUBMIT, "cut-before")
    submitted_once(client, cluster, "cut-before")


def test_an_ssh_connection_cut_while_sbatch_runs_submits_once(tmp_path: Path, cluster: Cluster, behind: Any) -> None:
    login, around = behind
    client = Client(login, tmp_path / "client")
    accepted = tmp_path / "accepted"
    around(f'real "$@" > {tmp_path}/answer && touch {accepted} && sleep 3 && cat {tmp_path}/answer')

    def cut() -> None:
        cluster.until(accepted.exists, "an accepted job")
        login.cut()
        around('real "$@"')

    other = threading.Thread(target=cut)
    other.start()
    client.run(*SUBMIT, "cut-during")
    other.join()
    submitted_once(client, cluster, "cut-during")


def test_a_submission_that_times_out_after_it_was_accepted_is_found(
    tmp_path: Path, cluster: Cluster, behind: Any
) -> None:
    login, around = behind
    client = Client(login, tmp_path / "client")
    message = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    around(f'real "$@" > /dev/null; echo "{message}" >&2; exit 1')
    client.run(*SUBMIT, "timed-out")
    submitted_once(client, cluster, "timed-out")


# Where the client dies: before or after a call of one of these.
POINTS = [
    ("before", "nemotron_launch.jobs.submission.place"),
    ("before", "nemotron_launch.backends.slurm_client.SlurmClient.submit"),
    ("before", "nemotron_launch.hosts.session.Remote.put"),
    ("after", "nemotron_launch.hosts.session.Remote.put"),
    ("after", "nemotron_launch.backends.slurm_client.SlurmClient.submit"),
    ("before", "nemotron_launch.jobs.submission.settled"),
    ("after", "nemotron_launch.jobs.submission.settled"),
]
DEADLY = (
    DIES
    + """
from nemotron_launch.cli.main import main
main()
"""
)


def test_a_client_killed_at_any_point_of_a_submission_leaves_one_job_or_none(client: Client, cluster: Cluster) -> None:
    names = [f"killed-{number}" for number in range(len(POINTS))]
    for name, (when, where) in zip(names, POINTS, strict=True):
        command = [sys.executable, "-c", DEADLY, when, where, *SUBMIT, name, f"output_dir={name}"]
        done = subprocess.run(command, cwd=client.folder, env=client.env, capture_output=True, timeout=60)
        assert done.returncode == -signal.SIGKILL, (where, done.stderr)
        client.status(name)
    rows = {row["run_id"]: row for row in json.loads(client.run("jobs", "list", "--json"))}
    assert sorted(rows) == names
    refused = [name for name in names if rows[name]["state"] == "refused"]
    assert refused == names[:4], "those that died before sbatch"
    for name in refused:
        client.run("jobs", "resubmit", name)
    client.run("jobs", "wait", *names, "-q")
    for row in json.loads(client.run("jobs", "list", "--json")):
        assert row["state"] == "finished", row
        known = cluster.run("squeue", "--noheader", "--states=all", f"--name={row['run_id']}", "--Format=JobID")
        assert known.split() == [row["job_id"]]


def test_a_disk_that_is_full_refuses_the_run_and_room_lets_it_go(client: Client, cluster: Cluster) -> None:
    """The job folder on a disk of 16 KiB: nothing is submitted; with room the same run is."""
    folder = client.folder / "cluster"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(folder)], check=True)
    try:
        child = client.start(*SUBMIT, "full-disk")
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 1
        assert re.search(rb"no space left", errors), errors
        assert jobs_of(cluster, "full-disk") == []
        assert client.status("full-disk")["state"] == "refused"
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        time.sleep(0.1)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    client.run("jobs", "resubmit", "full-disk")
    submitted_once(client, cluster, "full-disk")
