"""Whole runs on a workspace that really runs them: followed, in the background, cancelled, failed and gone on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemotron_launch.job import Restart
from nemotron_launch.jobs import actions
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.settle import Backends
from nemotron_launch.jobs.submission import submit
from tests.conftest import Nemotron
from tests.lepton.lepton_runs import planned, shell, wait
from tests.lepton.service import Service

PROFILE = """\
executor: lepton
node_group: my-group
resource_shape: cpu.small
image: nvcr.io/nvidia/nemo-rl:v0.6.0
python: {python}
nodes: 2
gpus_per_node: 0
procs_per_node: 1
remote_job_dir: {remote}
mounts: [{{path: /runs, mount_path: {remote}, from: "node-nfs:lustre"}}]
max_restarts: 2
time: "00:10:00"
env: {{OMP_NUM_THREADS: "1"}}
"""
DPO = ["rl/nemo_rl/dpo", "-c", "tiny"]
STEPS = 150  # long enough for a replica to die in between
SHORT = [
    f"dpo.max_num_steps={STEPS}", "dpo.val_at_start=false", "dpo.val_at_end=false", "dpo.val_generation.num_prompts=0",
    "dpo.val_period=0", "checkpointing.save_period=25", "checkpointing.metric_name=null",
    "checkpointing.pretrained_checkpoint.path=null", "policy.architecture.num_layers=1",
    "policy.architecture.hidden_size=32", "policy.architecture.num_attention_heads=2",
]  # fmt: skip


@pytest.fixture
def site(lepton: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shared volume of a profile `cloud` in ./profiles."""
    remote = tmp_path / "remote"
    work = tmp_path / "work"
    (work / "profiles").mkdir(parents=True)
    (work / "profiles/cloud.yaml").write_text(PROFILE.format(python=sys.executable, remote=remote))
    monkeypatch.chdir(work)
    monkeypatch.setenv("NEMOTRON_STATE_DIR", str(tmp_path / "state"))
    return remote


@pytest.mark.slow
def test_tiny_dpo_on_two_replicas_attached_dies_and_resumes(site: Path, lepton: Service) -> None:
    arguments = ["steps", "run", *DPO, "-r", "cloud", "--run-id", "first", *SHORT, f"output_dir={site}/out"]
    with subprocess.Popen(
        [sys.executable, "-m", "nemotron_launch", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    ) as client:
        end = time.monotonic() + 120
        while not list(site.glob("out/checkpoints/step_25/training_info.json")):
            assert time.monotonic() < end and client.poll() is None, client.communicate()
            time.sleep(0.02)
        _kill_trainer(site)  # as a node that dies
        out, err = client.communicate(timeout=200)
    assert client.returncode == 0, out + err
    assert re.search(r"^\[node-0\] .* run first, attempt 1, node 0 of 2$", out, re.MULTILINE), out
    assert re.search(r"^\[node-1\] .* run first, attempt 1, node 1 of 2$", out, re.MULTILINE), out
    assert re.search(r"^\[node-0\] .*resum", out, re.MULTILINE), out
    steps = [json.loads(line)["step"] for line in (site / "out/metrics.jsonl").read_text().splitlines()]
    assert max(steps) == STEPS
    [job] = lepton.jobs.values()
    assert (job.state, job.attempt) == ("Completed", 1)
    assert {one.index for one in job.replicas} == {0, 1}


def _kill_trainer(site: Path) -> None:
    """Kill the trainer of one replica, with all its workers."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environ = (folder / "environ").read_bytes()
        except OSError:
            continue
        ours = str(site).encode() in environ and b"NODE_RANK=1\0" in environ
        if ours and any(b"train.py" in word for word in words):
            os.kill(int(folder.name), signal.SIGKILL)


def test_in_the_background_it_returns_at_once_and_the_jobs_commands_know_the_rest(
    lepton: Service, tmp_path: Path, nemotron: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMOTRON_STATE_DIR", str(tmp_path / "state"))
    with Ledger() as ledger, Backends() as backends:
        remote = tmp_path / "remote"
        waits = f"until [[ -e {remote}/said ]]; do sleep 0.05; done; exit 3"  # the end of one is the end of both
        says = f"echo the node is $NODE_RANK of $NNODES; [[ $NODE_RANK == 0 ]] || {{ {waits}; }}; touch {remote}/said"
        run, files = planned(remote, command=shell(f"{says}; sleep 60"), restart=Restart(0))
        [run] = submit(ledger, run, files, backend=backends.of(run))
    assert lepton.live_jobs()
    done = nemotron("jobs", "attach", "a-run")
    assert done.returncode == 3, done.stdout + done.stderr
    assert re.search(r"^\[node-0\] the node is 0 of 2$", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^\[node-1\] the node is 1 of 2$", done.stdout, re.MULTILINE), done.stdout
    assert len(re.findall(r"^\[node-\d\] nemotron-exit ", done.stdout, re.MULTILINE)) == 2, done.stdout  # to the end
    assert "a-run: failed, exit code 3" in done.stderr
    found = json.loads(nemotron("jobs", "status", "a-run", "--json").stdout)
    assert (found["state"], found["exit_code"], found["job_id"]) == ("failed", 3, run.job_id)
    logs = nemotron("jobs", "logs", "a-run", "--node", "1").stdout
    assert "the node is 1 of 2" in logs and "node-0" not in logs
    assert not lepton.live_jobs()


def test_a_run_that_is_cancelled_saves_is_stopped_and_goes_on_when_asked(
    lepton: Service, tmp_path: Path, nemotron: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMOTRON_STATE_DIR", str(tmp_path / "state"))
    remote = tmp_path / "remote"
    saves = f"trap 'touch {remote}/saved; exit 85' TERM; [[ -e {remote}/saved ]] && exit 0; while :; do sleep 0.1; done"
    with Ledger() as ledger, Backends() as backends:
        run, files = planned(remote, command=shell(saves), restart=Restart(3), nodes=1)
        [run] = submit(ledger, run, files, backend=backends.of(run))
        first = wait(ledger, backends, "a-run", ["running"]).job_id
        done = nemotron("jobs", "cancel", "a-run")
        assert (done.returncode, done.stderr) == (0, "")
        run = wait(ledger, backends, "a-run")
        assert (run.state, run.exit_code) == ("cancelled", 85)
        assert (remote / "saved").exists() and not lepton.live_jobs()
        [run] = actions.resubmit(ledger, backends, [run])
        assert run.job_id != first
        run = wait(ledger, backends, "a-run")
        assert (run.state, run.exit_code) == ("finished", 0)
        assert [job.state for job in lepton.jobs.values()] == ["Stopped", "Completed"]
    done = nemotron("jobs", "cancel", "a-run", "--purge")
    assert (done.returncode, done.stdout) == (0, "a-run: was over already, finished; its job is deleted\n"), done.stderr
    assert [job.gone for job in lepton.jobs.values()] == [False, True]


def test_exit_codes_come_from_the_last_lines_where_no_volume_is_seen(lepton: Service, tmp_path: Path) -> None:
    command = shell("[[ $NODE_RANK == 0 ]] || exit 7; trap 'exit 85' TERM; while :; do sleep 0.1; done")
    with Ledger(tmp_path / "state") as ledger, Backends() as backends:
        run, files = planned(tmp_path / "remote", command=command, restart=Restart(0), mounted=False)
        run = type(run)(**{**vars(run), "contact": {**run.contact, "folder": "/nowhere"}})
        [run] = submit(ledger, run, files, backend=backends.of(run))
        run = wait(ledger, backends, "a-run")
        assert (run.state, run.exit_code) == ("failed", 7)
        with pytest.raises(Exception, match="the folder of a-run cannot be read from here"):
            actions.fetch(backends.of(run).host, run, tmp_path / "copy")
