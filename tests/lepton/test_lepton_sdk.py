"""The official SDK against the same stand-in: both mean the same. NEMOTRON_LEPTON_SDK names a Python that has it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.lepton.lepton_runs import planned, spec_of
from tests.lepton.service import TOKEN, WORKSPACE, Service

PYTHON = os.environ.get("NEMOTRON_LEPTON_SDK", "")
SCRIPT = """
import json, sys
from leptonai.api.v2.client import APIClient
from leptonai.api.v2.types.job import LeptonJob
url, workspace, token, path = sys.argv[1:]
spec = json.load(open(path))
job = LeptonJob(**spec)
sent = json.loads(job.model_dump_json(exclude_none=True, by_alias=True))
client = APIClient(workspace, token, url)
made = client.job.create(job)
listed = client.job.list_all(page=1, page_size=10)
replicas = client.job.get_replicas(made.metadata.id_)
client.job.update(made.metadata.id_, spec={"spec": {"stopped": True}})
ended = client.job.get(made.metadata.id_)
groups = [group.metadata.id_ for group in client.nodegroup.list_all()]
print(json.dumps({
    "sent": sent, "id": made.metadata.id_, "listed": [one.metadata.name for one in listed],
    "state": ended.status.state.value, "groups": groups, "secrets": [one.name for one in client.secret.list_all()],
}))
"""


@pytest.mark.skipif(not PYTHON, reason="NEMOTRON_LEPTON_SDK is not set")
def test_the_sdk_takes_our_spec_unchanged_and_reads_what_we_read(workspace: Service, tmp_path: Path) -> None:
    _, files = planned(tmp_path / "remote")
    spec = spec_of(files)
    path = tmp_path / "job.json"
    path.write_text(json.dumps(spec))
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    command = [PYTHON, "-c", SCRIPT, workspace.url, WORKSPACE, TOKEN, str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["sent"] == spec
    assert found["listed"] == [spec["metadata"]["name"]] and found["state"] == "Stopped"
    assert (found["groups"], found["secrets"]) == (["ng-1", "ng-2"], ["hub"])
    assert found["id"] in workspace.jobs
