"""Runs on the stand-in workspace: their jobs, rows and files, without the compiler."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemotron_launch.backends.lepton_client import LeptonClient
from nemotron_launch.hosts import Upload
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.run import OVER, Run
from nemotron_launch.jobs.settle import Backends
from nemotron_launch.jobs.status import refresh
from nemotron_launch.jobs.submission import new_run, uploads
from nemotron_launch.render import render
from tests.backends.lepton_jobs import lepton_job


def shell(script: str) -> tuple[str, ...]:
    return ("bash", "-c", script)


def planned(remote: Path, run_id: str = "a-run", **changes: Any) -> tuple[Run, list[Upload]]:
    """A run of two replicas unless told otherwise, and its files; needs the workspace's variables."""
    options = {"resource_shape": "cpu.small", "node_group": "my-group", **changes.pop("options", {})}
    job = lepton_job(remote, **{"nodes": 2, **changes, "options": options})
    job = replace(job, run_id=run_id, run_dir=f"{remote}/{run_id}", workdir=str(remote))
    return new_run(job), uploads(job, render(job))


def wait(
    ledger: Ledger, backends: Backends, run_id: str, states: Sequence[str] = tuple(OVER), seconds: float = 60
) -> Run:
    """The run, once it is in one of these states."""
    end = time.monotonic() + seconds
    while True:
        run = ledger.get(run_id)
        assert run
        run = refresh(ledger, backends, [run], fail)[0].run
        if run.state in states:
            return run
        assert time.monotonic() < end, run
        time.sleep(0.1)


def client(run: Run) -> LeptonClient:
    """A client of a run's workspace, as patient as a busy machine needs it."""
    return _client(run.contact, retry_for=5.0, deadline=10.0)


def hasty(run: Run, kind: int | str) -> LeptonClient:
    """A client that soon gives up what always fails in this way."""
    return _client(run.contact, retry_for=0.4, deadline=1.0 if kind == "drip" else 10.0)


def settling(contact: Mapping[str, Any]) -> LeptonClient:
    """In place of open_client, where no job is under way."""
    return _client(contact, retry_for=5.0, deadline=10.0)


def _client(contact: Mapping[str, Any], **limits: float) -> LeptonClient:
    return LeptonClient(contact, settle=0.1, looks=(0.02, 0.05), **limits)


def spec_of(files: Sequence[Upload]) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(next(file.data for file in files if file.path == "job.json"))
    return spec


def fail(text: str) -> None:
    raise AssertionError(text)
