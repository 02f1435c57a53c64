"""Following over SSH on a real Slurm: every line of every node, once and in order, through cut connections."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.login import Client, client, login
from tests.sshd import Sshd
from tests.step_trees import add_step

__all__ = ["client", "login"]

# As the trainer's processes of a node do, a step of one process prints to its node's log.
TALKS = """
import os, sys, time
node = os.environ["NODE_RANK"]
for part in range(25):
    sys.stdout.write("".join(f"node {node} line {part * 1000 + n} \\u00e9\\u6f22\\n" for n in range(1000)))
    sys.stdout.flush()
    time.sleep(0.1)
"""
TWICE = """
import os, sys, time
attempt = int(os.environ["NEMOTRON_LOG_DIR"][-1])
for n in range(300):
    print(attempt, n, flush=True)
time.sleep(0 if attempt else 60)
"""


def peak_mib(pid: int) -> int:
    """The most memory of a process that still runs; wait4's count includes the process that it was forked from."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) // 1024 if found else 0


@pytest.mark.slow
def test_100000_lines_of_4_nodes_are_streamed_whole_and_in_order_through_cut_connections(
    client: Client, login: Sshd
) -> None:
    (add_step(client.tree, "sft/talks", consumes=[]) / "train.py").write_text(TALKS)
    child = client.start("steps", "run", "sft/talks", "-r", "site.yaml", "cluster.num_nodes=4")
    assert child.stdout
    lines: dict[str, list[int]] = {str(node): [] for node in range(4)}
    total = peak = cuts = 0

    def connections() -> int:
        return (login.root / "sshd.log").read_text().count("Accepted publickey")

    for raw in child.stdout:
        line = raw.decode()
        if line.startswith("[job] "):
            continue
        found = re.fullmatch(r"\[node-(\d)\] node \1 line (\d+) é漢\n", line)
        assert found, line
        lines[found[1]].append(int(found[2]))
        total += 1
        # What was printed before the last cut may still be read when there is nothing yet to be cut again.
        if total % 1_000 == 1 and total >= cuts * 30_000 and cuts < 3 and connections() > cuts:
            login.cut()
            cuts += 1
        if total % 10_000 == 0:
            peak = max(peak, peak_mib(child.pid))
    assert child.stderr
    errors = child.stderr.read().decode()
    assert child.wait(60) == 0, errors
    assert lines == {str(node): list(range(25_000)) for node in range(4)}
    assert (cuts, connections()) >= (3, 4)  # it came back after each cut
    # A Python with this command's libraries takes 45 MiB; the logs have 3 MiB, and a look brings 4 at most.
    assert 20 < peak < 120


@pytest.mark.slow
def test_a_run_is_detached_attached_cancelled_and_resubmitted_over_ssh(client: Client, cluster: Cluster) -> None:
    made = json.loads(client.run("steps", "run", "sft/small", "-b", "site.yaml", "data.path=x", "wait=true", "--json"))
    assert cluster.show(made["job_id"])["JobName"] == made["run_id"]
    cluster.until(lambda: client.status()["state"] == "running", "a run at work")
    cluster.until(lambda: (client.folder / "cluster/out/sft/ready").exists(), "its trainer")
    seen = client.status()
    assert seen["nodes_at_work"] and seen["host"]
    listed = json.loads(client.run("jobs", "list", "--json", "--state", "running"))
    assert [run["run_id"] for run in listed] == [made["run_id"]]

    attached = client.start("jobs", "attach", made["run_id"][:20], "--on-interrupt", "detach")
    assert attached.stderr and b": running" in attached.stderr.readline()
    attached.send_signal(signal.SIGINT)
    assert attached.wait(30) == 130
    assert client.status()["state"] == "running"

    client.run("jobs", "cancel", "last")
    client.run("jobs", "wait", "last", code=130)
    assert client.status()["state"] == "cancelled"
    (client.folder / "cluster/out/sft/ready").unlink()
    again = json.loads(client.run("jobs", "resubmit", "last", "--json"))
    assert again["job_id"] != made["job_id"]
    cluster.until(lambda: (client.folder / "cluster/out/sft/ready").exists(), "the run, at work again")
    client.run("jobs", "cancel", "last")
    client.run("jobs", "wait", "last", "-q", code=130)


@pytest.mark.slow
def test_the_job_s_exit_code_is_the_command_s_and_a_refusal_names_the_key(client: Client) -> None:
    started = time.monotonic()
    client.run("steps", "run", "sft/small", "-r", "site.yaml", "data.path=x", "exit=7", code=7)
    assert time.monotonic() - started < 60
    site = json.loads((client.folder / "site.yaml").read_text())
    (client.folder / "wrong.yaml").write_text(json.dumps({**site, "partition": "nowhere"}))
    child = client.start("steps", "run", "sft/small", "-b", "wrong.yaml", "data.path=x", "--run-id", "wrong")
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 1 and b"partition" in errors and b"nemotron jobs resubmit wrong" in errors
    seen = client.status("wrong")
    assert (seen["state"], seen["job_id"]) == ("refused", "")


@pytest.mark.slow
def test_a_requeue_is_followed_without_a_gap_or_a_line_twice(client: Client, cluster: Cluster) -> None:
    (add_step(client.tree, "sft/talks", consumes=[]) / "train.py").write_text(TWICE)
    child = client.start("steps", "run", "sft/talks", "-r", "site.yaml", "++run.max_restarts=1", "--run-id", "twice")
    first = client.folder / "cluster/twice/logs/attempt-0/node-0.log"
    cluster.until(lambda: first.exists() and "0 299\n" in first.read_text(), "the first attempt's lines")
    cluster.run("scontrol", "requeue", client.status("twice")["job_id"])
    out, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors.decode()
    lines = [line for line in out.decode().splitlines() if re.fullmatch(r"\d \d+", line)]  # not what Slurm says between
    assert lines == [f"{attempt} {n}" for attempt in (0, 1) for n in range(300)]
    assert b"restarted 1 time" in errors
