"""Runs on a real Slurm behind a real sshd, seen live from another machine: in the terminal and in the pages."""

from __future__ import annotations

import http.client
import json
import re
import time
from typing import Any

import pytest

from tests.live_runs import STEP, TOTAL, LiveRun, add_live_step
from tests.slurm.cluster import Cluster
from tests.slurm.login import Client, client, login
from tests.sshd import Sshd

__all__ = ["client", "login"]


def ask(address: str, path: str) -> Any:
    found = re.fullmatch(r"http://(127\.0\.0\.1:(\d+))/\?token=(\S+)", address)
    assert found, address
    connection = http.client.HTTPConnection(found[1], timeout=60)
    connection.request("GET", path, headers={"Cookie": f"nemotron-{found[2]}={found[3]}"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer


@pytest.mark.slow
def test_a_run_over_ssh_is_watched_to_its_end(client: Client, cluster: Cluster, login: Sshd) -> None:
    add_live_step(client.tree)
    made = json.loads(client.run("steps", "run", STEP, "-b", "site.yaml", "--json"))
    name = made["run_id"]
    run = LiveRun(made, client.folder / "cluster/out/live")
    watch = client.start("jobs", "watch", name)
    pages = client.start("ui", "--no-browser", "--port", "0")
    try:
        assert watch.stdout and pages.stdout
        address = pages.stdout.readline().decode().strip()
        cluster.until(lambda: (run.output / "metrics.jsonl").exists(), "a run at work")
        run.go_on(7)
        told = _until(
            lambda: (
                (one := ask(address, f"/api/report?run={name}")["report"]["runs"]) and one[0]["last_step"] == 7 and one
            )
        )
        assert told[0]["total_steps"] == TOTAL and told[0]["executor"] == "slurm"
        logs = _until(lambda: (one := ask(address, f"/api/logs?run={name}")) and "step 7 " in str(one["lines"]) and one)
        assert {"attempt": 0, "name": "node-0"} in logs["sources"]
        login.cut()  # both come back
        run.go_on(9)
        _until(lambda: ask(address, f"/api/report?run={name}")["report"]["runs"][0]["last_step"] == 9)
        run.end(3)
        out, errors = watch.communicate(timeout=90)
        assert watch.returncode == 3, errors.decode()
        lines = out.decode().splitlines()
        assert lines[-1].startswith(f"{name}: failed, exit code 3")
        assert any(line.startswith(f"{name}: step 9/{TOTAL}  train/loss ") for line in lines)
        assert _until(lambda: ask(address, "/api/runs")["rows"][0]["state"] == "failed")
    finally:
        for child in (watch, pages):
            child.terminate()
        assert pages.wait(30) == 0


def _until(holds: Any) -> Any:
    end = time.monotonic() + 90
    while not (value := holds()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return value
