"""Runs that lose their nodes, their time or their way, on a real Slurm: they go on from where they were, and end."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.backends.live import Refused, Submission
from nemotron_launch.frozen import replace
from nemotron_launch.job import Container
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
pytestmark = pytest.mark.slow


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with site_of(cluster, tmp_path, monkeypatch) as site:
        yield site


@pytest.fixture(scope="module", autouse=True)
def out_of_time(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Run]]:
    """A run on the first node whose time is over. Slurm looks at limits every 30 s, and the other tests go on."""
    with pytest.MonkeyPatch.context() as patch, site_of(cluster, tmp_path_factory.mktemp("time"), patch) as site:
        deaf = "for number in (signal.SIGUSR1, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)\n"
        run = site.submit(site.run(deaf + TRAINS, max_restarts=1, options={"nodelist": "node1"}, config=CONFIG))
        site.until(run, lambda seen: "saved" in site.logs(run))
        cluster.run("scontrol", "update", f"JobId={run.job_id}", "EndTime=now")
        yield site, run


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
    site.until(heir, lambda seen: "restart 1 of 1" in site.logs(run))
    assert made == site.client.submit_successor(run)  # also when it has begun, or is over
    seen = site.end(heir)
    assert (seen.state, seen.attempt) == ("finished", 1), site.logs(run)
    assert begins(site, run) == ["0", "1"] and len(site.jobs(run)) == 2
    with pytest.raises(Refused, match="has had its 1 restarts"):
        site.client.submit_successor(replace(heir, attempt=1))


def test_two_clients_that_submit_a_successor_at_once_make_one(site: Site) -> None:
    denied = 'echo "sbatch: error: Access denied" >&2; exit 1'
    site.fault("sbatch", f'case $(hostname) in node*) {denied} ;; esac; sleep 0.5; real "$@"')
    run = preempted(site, "cheap", max_restarts=1)
    site.until(run, lambda seen: seen.wants_successor)
    with ThreadPoolExecutor(3) as pool:
        made = {each.job_id for each in pool.map(site.client.submit_successor, [run] * 3)}
    assert len(made) == 1 and len(site.jobs(run)) == 2, site.logs(run)
    assert site.end(replace(run, job_id=made.pop())).state == "finished"
    # Nor does a job that claims to succeed without having been named.
    script = Path(run.run_dir, "job.sbatch")
    stranger = site.cluster.submit(f"--export=ALL,NEMOTRON_SUCCEEDS={run.job_id},NEMOTRON_RESTARTS=1", script)
    assert site.cluster.wait(stranger)["ExitCode"] == "86:0"


def test_with_time_left_the_run_saves_and_requeues_itself(site: Site) -> None:
    run = preempted(site, "patient", max_restarts=2)
    seen = site.end(run)
    assert (seen.state, seen.attempt, seen.job_id) == ("finished", 1, run.job_id), site.logs(run)
    assert begins(site, run) == ["0", "1"] and list(Path(run.run_dir).glob("saved-0-0"))


def test_a_site_that_sends_the_chosen_signal_on_preemption_is_understood(site: Site) -> None:
    conf, before = site.cluster.conf, site.cluster.conf.read_text()
    conf.write_text(before + "SlurmctldParameters=preempt_send_user_signal\n")  # PreemptParameters in later versions
    try:
        site.cluster.run("scontrol", "reconfigure")
        run = preempted(site, "patient", max_restarts=2, options={"requeue": False})
        seen = site.until(run, lambda seen: seen.job_id != run.job_id)
    finally:
        conf.write_text(before)
        site.cluster.run("scontrol", "reconfigure")
    assert "got USR1" in site.logs(run) and list(Path(run.run_dir).glob("saved-0-0"))
    assert site.end(replace(run, job_id=seen.job_id)).state == "finished" and begins(site, run) == ["0", "1"]


def test_a_site_that_requeues_is_left_to_it(site: Site) -> None:
    run = preempted(site, "again", max_restarts=2)
    seen = site.end(run)
    assert (seen.state, seen.attempt, seen.job_id) == ("finished", 1, run.job_id), site.logs(run)
    assert begins(site, run) == ["0", "1"] and len(site.jobs(run)) == 1


def test_a_run_that_may_not_be_requeued_saves_and_goes_on_as_another_job(site: Site) -> None:
    body = f"{TRAINS.replace('time.sleep(300)', 'sys.exit(85)')}"
    run = site.submit(site.run(body, max_restarts=2, options={"requeue": False}, config=CONFIG))
    seen = site.until(run, lambda seen: seen.job_id != run.job_id)
    seen = site.end(replace(run, job_id=seen.job_id))
    assert (seen.state, seen.attempt) == ("finished", 1), site.logs(run)
    assert begins(site, run) == ["0", "1"] and len(site.jobs(run)) == 2


def test_a_node_that_dies_without_a_word_is_succeeded_by_the_client(site: Site) -> None:
    run = site.run(TRAINS, max_restarts=2, options={"requeue": False, "nodelist": "node4"}, config=CONFIG)
    run = site.submit(run)
    site.until(run, lambda seen: "saved" in site.logs(run))
    site.cluster.kill_node("node4")
    try:
        site.cluster.run("scontrol", "update", "nodename=node4", "state=down", "reason=test")
        seen = site.until(run, lambda seen: seen.wants_successor)
        assert (seen.state, seen.reason) == ("pending", "a node failed; to be submitted again")
    finally:
        site.cluster.start_node("node4")
        site.cluster.run("scontrol", "update", "nodename=node4", "state=resume", check=False)
    heir = replace(run, job_id=site.client.submit_successor(run).job_id)
    seen = site.end(heir)
    assert (seen.state, seen.attempt) == ("finished", 1), site.logs(run)
    assert begins(site, run) == ["0", "1"]


def test_two_attempts_without_a_checkpoint_end_the_run_with_the_reason(site: Site) -> None:
    run = site.submit(site.run("sys.exit(85)", max_restarts=9, options={"requeue": False}, config=CONFIG))
    seen = site.until(run, lambda seen: seen.job_id != run.job_id)
    seen = site.end(replace(run, job_id=seen.job_id))
    assert (seen.state, seen.exit_code) == ("failed", 1), site.logs(run)
    assert seen.reason == "two attempts without a new checkpoint; the newest is none"
    assert len(site.jobs(run)) == 2


# A process of the real `spawn`, with the trainer's own handling of signals, that stops working.
HANGS = """
import os, time
from nemotron_launch.trainer.signals import StopRequest
with StopRequest():
    def all_reduce_that_never_ends(): time.sleep(300)
    all_reduce_that_never_ends()
"""


def test_a_trainer_that_hangs_leaves_every_ranks_stack_and_goes_on(site: Site, tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    root = Path(__file__).resolve().parents[2]
    spawn = [sys.executable, "-m", "nemotron_launch.trainer.spawn", "--procs", "2", "--output-dir", "output", "--"]
    run = site.run(
        command=(*spawn, str(script)), nodes=2, procs=2, max_restarts=1, env={"PYTHONPATH": str(root)},
        options={"hang_timeout": 3, "requeue": False}, config=CONFIG, container=Container(python="true"),
    )  # fmt: skip
    run = site.submit(run)
    site.until(run, lambda seen: seen.job_id != run.job_id)
    assert "error: no step for 3 s" in site.logs(run)
    logs = [Path(run.state_dir, "logs", "attempt-0", "node-0.log")]
    logs += [Path(run.output_dir, "logs", f"rank_{rank}.log") for rank in (1, 2, 3)]
    assert all("in all_reduce_that_never_ends" in log.read_text() for log in logs), site.logs(run)


def test_a_run_that_ends_while_its_nodes_are_taken_needs_no_successor(site: Site) -> None:
    ends = "for number in (signal.SIGUSR1, signal.SIGTERM): signal.signal(number, lambda *_: os._exit(0))\n"
    run = site.run(ends + TRAINS, max_restarts=1, options={"partition": "cheap", "nodelist": "node3"}, config=CONFIG)
    run = site.submit(run)
    site.until(run, lambda seen: "saved" in site.logs(run))
    site.cluster.submit("--partition=urgent", "--nodelist=node3", "--exclusive", "--output=/dev/null", "--wrap=true")
    site.cluster.until(lambda: Path(run.run_dir, "exit_code").exists(), "its end")
    assert Path(run.run_dir, "exit_code").read_text() == "0\n"
    seen = site.end(run)
    assert (seen.state, seen.exit_code) == ("finished", 0), site.logs(run)
    site.cluster.until(lambda: not site.cluster.run("squeue", "-h", f"--name={run.run_id}"), "no job that waits")


def test_a_point_of_a_sweep_goes_on_alone(site: Site) -> None:
    whole = site.run(TRAINS.replace("time.sleep(300)", "sys.exit(85 if RUN.name == 'point-1' else 0)"),
                     max_restarts=1, options={"requeue": False})  # fmt: skip
    site.client.host.put(whole.run_dir, site.files[whole.run_id])
    array = site.cluster.submit("--array=0-1", Path(whole.run_dir, "job.sbatch"))
    points = [
        replace(whole, run_id=f"{whole.run_id}.{n}", sweep=whole.run_id, point=n, job_id=f"{array}_{n}",
                state_dir=f"{whole.run_dir}/point-{n}")
        for n in range(2)
    ]  # fmt: skip
    assert site.client.find(points[1]) == Submission(f"{array}_1")
    seen = site.until(points[1], lambda seen: seen.job_id != points[1].job_id)
    assert re.fullmatch(r"[0-9]+_1", seen.job_id)
    ends = [site.end(points[0]), site.end(replace(points[1], job_id=seen.job_id))]
    assert [(one.state, one.attempt) for one in ends] == [("finished", 0), ("finished", 1)], site.logs(whole)
    assert len(site.jobs(whole)) == 3


def test_a_run_out_of_time_goes_on_without_having_saved(out_of_time: tuple[Site, Run]) -> None:
    site, run = out_of_time
    seen = site.until(run, lambda seen: seen.job_id != run.job_id or seen.wants_successor, 90)
    # On a slow machine Slurm ends the sbatch on the node with the rest of the job; then the client submits.
    heir = site.client.submit_successor(run).job_id if seen.wants_successor else seen.job_id
    seen = site.end(replace(run, job_id=heir))
    assert (seen.state, seen.attempt) == ("finished", 1), site.logs(run)
    assert begins(site, run) == ["0", "1"] and "out of time: " in site.logs(run)
