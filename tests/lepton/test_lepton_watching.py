"""A run on Lepton whose folder cannot be read from here: state and logs are seen live all the same."""

from __future__ import annotations

import http.client
import json
import time
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.job import Restart
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.settle import Backends
from nemotron_launch.jobs.submission import submit
from nemotron_launch.ui.server import Server, open_server, serve
from tests.conftest import Nemotron
from tests.lepton.lepton_runs import planned, shell
from tests.lepton.service import Service


def ask(server: Server, path: str) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", server.gate.port, timeout=60)
    connection.request("GET", path, headers={"Cookie": f"{server.gate.cookie}={server.gate.token}"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer


@pytest.mark.slow
def test_without_the_volume_state_and_logs_are_seen(
    lepton: Service, tmp_path: Path, nemotron: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMOTRON_STATE_DIR", str(tmp_path / "state"))
    with Ledger() as ledger, Backends() as backends:
        command = shell("for n in 1 2 3; do echo line $n; sleep 0.3; done; exit 4")
        run, files = planned(tmp_path / "remote", command=command, restart=Restart(0), nodes=1, mounted=False)
        run = type(run)(**{**vars(run), "contact": {**run.contact, "folder": "/nowhere"}})
        submit(ledger, run, files, backend=backends.of(run))
    server = open_server(0)
    serve(server)
    try:
        end, lines, state = time.monotonic() + 60, "", ""
        while not ("line 3" in lines and state == "failed"):
            assert time.monotonic() < end, (lines, state)
            lines = str(ask(server, "/api/logs?run=a-run&source=0/node-0")["lines"])
            told = ask(server, "/api/report?run=a-run")
            state = told["live"]["a-run"]["state"]
            time.sleep(0.2)
        assert told["live"]["a-run"]["missing"] == "the folder of a-run cannot be read from here"
    finally:
        server.shutdown()
        server.close()
    done = nemotron("jobs", "watch", "a-run")
    assert done.returncode == 4, done.stderr
    assert done.stdout.splitlines()[-1].startswith("a-run: failed, exit code 4")
