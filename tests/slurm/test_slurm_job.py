"""Rendered jobs on a real Slurm: what arrives, how they end, and what becomes of them when they are interrupted."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_launch.job import Container, Mount, Service
from nemotron_launch.quoting import sbatch
from nemotron_launch.trainer.exit_codes import CLAIMED
from tests.slurm.cluster import Cluster
from tests.slurm.runs import Run, new_run

NewRun = Callable[..., Run]


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path) -> Any:
    """Makes runs, the first of them on the first nodes; cancels what a failed test leaves behind."""
    cluster.until_idle(2)
    made: list[Run] = []

    def make(*arguments: Any, **fields: Any) -> Run:
        folder = tmp_path / f"{tmp_path.name}-{len(made)}"
        made.append(new_run(cluster, folder, *arguments, **fields))
        return made[-1]

    yield make
    for each in made:
        for job in each.jobs:
            cluster.run("scancel", job, check=False)


@pytest.fixture(scope="module", autouse=True)
def short_of_time(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run on the last two nodes with little time. Slurm looks at limits every 30 s, and the other tests go on."""
    # 2 minutes less 115 seconds, and Slurm may be 30 s early: the signal comes at its first look.
    run = new_run(
        cluster,
        tmp_path_factory.mktemp("short-of-time"),
        "if ATTEMPT == 0: time.sleep(300)\nprint(os.environ['API_KEY'])",
        nodes=2, max_restarts=1, secrets={"API_KEY": "kept"},
        options={"time": 2, "signal": "USR1@115", "nodelist": "node[3-4]", "exclusive": True},
    )  # fmt: skip
    run.submit()
    yield run
    cluster.run("scancel", run.jobs[-1], check=False)


# What arrives.


def test_every_node_starts_the_command_with_its_rank_and_the_same_meeting_point(run: NewRun) -> None:
    names = ["NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "HF_HOME", "TRITON_CACHE_DIR", "COLOUR"]
    job = run(f"print(json.dumps({{name: os.environ[name] for name in {names}}}))", nodes=2, env={"COLOUR": "blue"})
    job.submit()
    assert job.end()["JobState"] == "COMPLETED", job.all()
    first, second = (json.loads(job.log(node).splitlines()[-1]) for node in (0, 1))
    assert (first.pop("NODE_RANK"), second.pop("NODE_RANK")) == ("0", "1")
    assert first == second
    assert first["NNODES"] == "2" and first["MASTER_ADDR"] == "node1" and first["COLOUR"] == "blue"
    # The kernel hands out ports from 32768 on; those below 10000 belong to services.
    assert 10000 <= int(first["MASTER_PORT"]) < 32768
    assert job.exit_code() == job.exit_code(0) == "0"


def test_directives_arrive_as_asked(run: NewRun, cluster: Cluster) -> None:
    job = run(
        nodes=2,
        gpus_per_node=3,
        max_restarts=2,
        options={
            "account": "physics", "partition": "debug", "constraint": "fast", "exclude": "node4", "cpus_per_task": 2,
            "mem": "1G", "time": "00:20:00", "comment": 'he said "50 % #1", naïve \\o/', "exclusive": True,
            "mail": {"user": "a@b.org", "type": ["END", "FAIL"]}, "sbatch_args": ["--nice=7", "--gpu-freq=low"],
        },
    )  # fmt: skip
    job.submit("--hold")
    shown = cluster.show(job.jobs[-1])
    assert {key: shown[key] for key in EXPECTED} == EXPECTED | {
        "JobName": job.job.run_id,
        "Comment": f'he said "50 % #1", naïve \\o/ nemotron:{job.job.run_id}',
        "WorkDir": job.job.workdir,
        "StdOut": str(job.folder / f"slurm-{job.jobs[-1]}.out"),
    }


EXPECTED = {
    "JobName": "", "Comment": "", "WorkDir": "", "StdOut": "",
    "Account": "physics", "Partition": "debug", "Features": "fast", "ExcNodeList": "node4", "NumNodes": "2-2",
    "NtasksPerN:B:S:C": "1:0:*:*", "CPUs/Task": "2", "MinMemoryNode": "1G", "TimeLimit": "00:20:00", "Requeue": "1",
    "TresPerNode": "gres:gpu:3", "OverSubscribe": "NO", "Nice": "7",
}  # fmt: skip


def test_a_command_and_its_environment_arrive_byte_for_byte(run: NewRun) -> None:
    odd = ["", "-n", "--nodes=3", "a b\tc", "$(touch owned)", "`touch owned`", 'it\'s "q"', "ü\n{{ x }} %n %% \\", "*"]
    job = run(command=("python3", "-c", "import os, sys; print(ascii([sys.argv[1:], os.environ['ODD']]))", *odd),
              env={"ODD": "".join(odd)})  # fmt: skip
    job.submit()
    job.end()
    assert job.log().splitlines()[-1] == ascii([odd, "".join(odd)])
    assert not list(job.folder.parent.rglob("owned"))


def test_the_port_moves_when_it_is_taken(run: NewRun, cluster: Cluster) -> None:
    job = run("print(os.environ['MASTER_PORT'])")
    number = int(job.submit("--hold"))
    port = 10000 + number * 16 % (32768 - 10000)  # as the script computes it for the first attempt
    with socket.create_server(("127.0.0.1", port)):
        cluster.run("scontrol", "release", number)
        job.end()
    assert job.log().split()[-1] == str(port + 1)


def test_secrets_reach_the_trainer_and_leave_with_the_run(run: NewRun) -> None:
    value = "s3 'cr\"et' $HOME\n`x`"
    job = run("print(ascii(os.environ['API_KEY']))", secrets={"API_KEY": value})
    assert job.secrets.stat().st_mode & 0o777 == 0o600
    job.submit()
    job.end()
    assert job.log().splitlines()[-1] == ascii(value)
    assert not job.secrets.exists()


# How a run ends.


def test_the_first_node_that_fails_decides_the_exit_code_and_ends_the_others(run: NewRun) -> None:
    job = run("if RANK == 1: sys.exit(7)\ntime.sleep(300)", nodes=2)
    job.submit()
    assert job.end()["ExitCode"] == "7:0", job.all()
    assert job.exit_code() == "7"
    assert "node2 ended with 7" in job.out()


def test_a_failing_setup_command_ends_the_run_and_is_named(run: NewRun) -> None:
    job = run(setup=("export GREETING=hello", "test $GREETING = bye"))
    job.submit()
    assert job.end()["JobState"] == "FAILED"
    assert "error: node1: setup: test $GREETING = bye ended with 1" in job.log()


def test_setup_commands_change_the_environment_of_the_command(run: NewRun) -> None:
    job = run("print(os.environ['GREETING'])", setup=('export GREETING="hello $UNSET_NAME$(hostname)"',))
    job.submit()
    job.end()
    assert job.log().splitlines()[-1] == "hello node1"


def test_a_second_job_of_the_run_does_not_train(run: NewRun, cluster: Cluster) -> None:
    job = run("until(RUN / 'go')", secrets={"API_KEY": "x"})
    first = job.submit()
    job.started()
    job.submit()
    assert job.end()["ExitCode"] == f"{CLAIMED}:0"
    assert f"this run belongs to job {first} already" in job.out()
    assert job.secrets.exists() and job.exit_code() == ""
    (job.folder / "go").touch()
    assert cluster.wait(first)["JobState"] == "COMPLETED"
    assert len(list((job.folder / "logs").iterdir())) == 1 and not job.secrets.exists()


# Interruptions.


def test_max_restarts_is_kept(run: NewRun) -> None:
    job = run("sys.exit(85)", max_restarts=1)
    job.submit()
    ended = job.end()
    assert (ended["Restarts"], ended["ExitCode"]) == ("1", "85:0"), job.all()
    assert [path.name for path in sorted((job.folder / "logs").iterdir())] == ["attempt-0", "attempt-1"]
    assert "no restart is left of 1" in job.out() and job.exit_code() == "85"


def test_a_requeue_by_the_operator_saves_and_goes_on(run: NewRun, cluster: Cluster) -> None:
    job = run("if ATTEMPT == 0: time.sleep(300)", max_restarts=3, secrets={"API_KEY": "x"})
    job.submit()
    job.started()
    cluster.run("scontrol", "requeue", job.jobs[-1])
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.all()
    assert "requeued by Slurm" in job.out() and job.exit_code() == "0" and not job.secrets.exists()


def test_a_node_that_goes_down_restarts_the_run(run: NewRun, cluster: Cluster) -> None:
    body = "if ATTEMPT == 0: time.sleep(300)\nprint(os.environ['API_KEY'])"
    job = run(body, max_restarts=3, secrets={"API_KEY": "x"})
    job.submit()
    job.started()
    cluster.run("scontrol", "update", "nodename=node1", "state=down", "reason=test")
    try:
        ended = job.end()
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.all()
    finally:
        cluster.run("scontrol", "update", "nodename=node1", "state=resume", check=False)  # it may be back already


def test_a_cancelled_run_stays_cancelled_and_loses_its_secrets(run: NewRun, cluster: Cluster) -> None:
    job = run("time.sleep(300)", max_restarts=3, secrets={"API_KEY": "x"})
    job.submit()
    job.started()
    cluster.run("scancel", job.jobs[-1])
    assert job.end()["JobState"] == "CANCELLED"
    cluster.until(lambda: job.exit_code(), "the end of the script", 10)
    assert not job.secrets.exists() and "requeueing" not in job.out()
    time.sleep(2)  # requeue_delay is 1 s here
    assert cluster.state(job.jobs[-1]) == "CANCELLED"


# Services.

SERVER = """
import http.server, os, sys, time
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        ready = time.time() > start + 1 and self.path == "/health"
        self.send_response(200 if ready else 503)
        self.end_headers()
        self.wfile.write(os.environ.get("CUDA_VISIBLE_DEVICES", "").encode() + os.uname().nodename.encode())
start = time.time()
http.server.HTTPServer(("", int(sys.argv[1])), Answer).serve_forever()
"""
ASK = """
import urllib.request
print(os.environ.get("CUDA_VISIBLE_DEVICES"))
for name in sorted(name for name in os.environ if name.startswith("NEMOTRON_SERVICE_")):
    print(name, urllib.request.urlopen(f"http://{os.environ[name]}/health").read().decode())
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def service(name: str, script: str = SERVER, **fields: Any) -> Service:
    port = free_port()
    return Service(name, ("python3", "-c", script, str(port)), port, **fields)


def test_services_are_ready_before_the_trainer_and_have_gpus_of_their_own(run: NewRun) -> None:
    beside = service("judge", gpus=2, health="/health")
    apart = service("reward-model", nodes=1, gpus=5, health="/health")
    job = run(ASK, nodes=1, procs=3, gpus_per_node=5, services=(beside, apart))
    job.submit()
    assert job.end()["JobState"] == "COMPLETED", job.all()
    # 3 GPUs of the trainer and 2 of the judge share node 1; all nodes of an allocation have the same number.
    assert job.log().splitlines()[-3:] == [
        "0,1,2",
        "NEMOTRON_SERVICE_JUDGE 3,4node1",
        "NEMOTRON_SERVICE_REWARD_MODEL 0,1,2,3,4node2",
    ]


def test_the_death_of_a_service_ends_the_attempt(run: NewRun) -> None:
    dying = service("judge", SERVER.replace("serve_forever", "handle_request"))
    job = run("time.sleep(300)", services=(dying,))
    job.submit()
    assert job.end()["ExitCode"] == "1:0", job.all()
    assert "service judge ended" in job.out()


def test_a_service_that_never_answers_ends_the_attempt(run: NewRun) -> None:
    job = run(services=(service("judge", "import time; time.sleep(300)", start_timeout=2),))
    job.submit()
    assert job.end()["ExitCode"] == "1:0", job.all()
    assert "service judge was not ready within 2 s" in job.out()


# Containers, and what users write.


def test_a_charliecloud_image_gives_its_variables_and_ours_win(run: NewRun, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for folder in ("usr", "lib", "lib64", "bin", "etc", "proc", "sys", "dev", "tmp", "root", "ch", str(tmp_path)[1:]):
        (tree / folder).mkdir(parents=True, exist_ok=True)
    for file in ("passwd", "group", "hosts", "resolv.conf"):
        (tree / "etc" / file).touch()
    (tree / "ch" / "environment").write_text("GREETING=good day\nCOLOUR=red\n")
    image = tmp_path / "image.sqsh"
    subprocess.run(["mksquashfs", tree, image, "-quiet", "-no-progress"], check=True, stdout=subprocess.DEVNULL)
    # The machine's own programs, bound into an empty image.
    mounts = tuple(Mount(path, path) for path in ("/usr", "/lib", "/lib64", "/bin", str(tmp_path)))
    show = "print(os.environ['GREETING'], os.environ['COLOUR'], os.getcwd(), os.path.exists('/etc/debian_version'))"
    job = run(command=("/usr/bin/python3", "-c", "import os; " + show), env={"COLOUR": "blue"},
              container=Container("charliecloud", str(image), mounts))  # fmt: skip
    job.submit()
    assert job.end()["JobState"] == "COMPLETED", job.all()
    assert job.log().splitlines()[-1] == f"good day blue {job.job.workdir} False"


def test_a_container_image_that_is_not_there_is_named(run: NewRun) -> None:
    job = run(container=Container("charliecloud", "/nowhere/image.sqsh"))
    job.submit()
    assert job.end()["ExitCode"] == "2:0", job.all()
    assert "error: no image /nowhere/image.sqsh" in job.out()


def test_any_comment_arrives_as_it_was_written(cluster: Cluster, tmp_path: Path) -> None:
    """Slurm's own parser of `#SBATCH` lines, asked instead of read."""
    script = tmp_path / "comment.sbatch"

    @settings(deadline=None, max_examples=40)
    @given(st.text(st.sampled_from(" \\'\"#%$`!&|;{}()[]*?~-=,:/aü漢"), max_size=12).map(lambda text: f"<{text}>"))
    def arrives(comment: str) -> None:
        script.write_text(f"#!/bin/bash\n#SBATCH --hold\n#SBATCH --comment={sbatch(comment)}\n")
        job = cluster.submit(script)
        try:
            shown = cluster.run("squeue", "--noheader", f"--jobs={job}", "--Format=Comment:200")
            assert shown.strip() == comment
        finally:
            cluster.run("scancel", job)

    arrives()


def test_before_the_time_limit_the_trainer_saves_and_the_job_goes_on(short_of_time: Run) -> None:
    job = short_of_time
    ended = job.end(120)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.all()
    assert sorted(path.name for path in job.folder.glob("saved-*")) == ["saved-0-0", "saved-0-1"]
    assert [job.exit_code(0), job.exit_code(1), job.exit_code()] == ["85", "0", "0"]
    assert job.log(attempt=1).split() == ["up", "kept"] and "kept" not in job.log(attempt=0)
    assert not job.secrets.exists()
