"""The command of a Lepton job, run for real: by one bash per replica, with the variables that Lepton sets."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch import bundle
from nemotron_launch.backends import lepton
from nemotron_launch.catalog import find_step
from nemotron_launch.config.compose import compose
from nemotron_launch.job import File, Job, Secret, Service
from nemotron_launch.plan import config_text
from nemotron_launch.render import render
from tests.backends.lepton_jobs import lepton_job, small_bundle
from tests.backends.lepton_replicas import Replica, replicas


def shell(script: str, *arguments: str) -> tuple[str, ...]:
    return ("bash", "-c", script, "trainer", *arguments)


def run(job: Job, folder: Path, **kwargs: Any) -> list[Replica]:
    """Run a job to its end."""
    with replicas(render(job).text, folder, **kwargs) as running:
        for replica in running:
            replica.wait()
        return running


def exit_of(replica: Replica, job: Job) -> tuple[int, int, int] | None:
    """(attempt, node, code), as the last line says."""
    return lepton.read_exit(replica.last_line, lepton.nonce(job))


# Training ----------------------------------------------------------------------------------------------------------


def training(remote: Path, **changes: Any) -> Job:
    """Two replicas with a process each that train the tiny model for three steps."""
    step = find_step("sft/megatron")
    overrides = [
        *("sft.max_num_steps=3", "sft.val_at_end=false", "sft.val_generation.num_prompts=0", "cluster.num_nodes=2"),
        *("policy.megatron_cfg.scheduler.lr_warmup_iters=0", f"output_dir={remote}/out"),
        *changes.pop("overrides", ()),
    ]
    composed = compose(step.folder / "config/tiny.yaml", overrides, schema=step.schema, step_dir=step.folder)
    job = lepton_job(remote)
    spawn = (sys.executable, "-m", "nemotron_launch.trainer.spawn", "--procs", "1", "--output-dir", job.output_dir)
    return replace(
        job,
        nodes=2,
        command=(
            *spawn,
            "--",
            f"{job.run_dir}/code/steps/{step.id}/train.py",
            "--config",
            f"{job.run_dir}/config.yaml",
        ),
        files=(File("config.yaml", config_text(composed)),),
        env={"OMP_NUM_THREADS": "1"},
        bundle=bundle.bundle(step),
        **changes,
    )


def test_two_replicas_train_together_with_nothing_but_what_the_spec_carries(tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    job = training(remote)
    done = run(job, tmp_path / "log")
    assert [replica.process.returncode for replica in done] == [0, 0], done[0].text + done[1].text
    assert [exit_of(replica, job) for replica in done] == [(0, 0, 0), (0, 1, 0)]
    steps = [json.loads(line) for line in (remote / "out/metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in steps} == {1, 2, 3}
    assert (remote / "out/exit_code").read_text() == "0\n"
    assert (remote / "out/logs/rank_1.log").exists()
    logs = remote / "r1/logs/attempt-0"
    assert sorted(path.name for path in logs.iterdir()) == [
        *("node-0.exit_code", "node-0.log", "node-1.exit_code", "node-1.log"),
    ]
    assert (logs / "node-0.log").read_text() + done[0].last_line + "\n" == done[0].text


def test_a_signal_to_one_replica_makes_both_save_and_end_with_85(tmp_path: Path) -> None:
    job = training(tmp_path / "remote", overrides=["sft.max_num_steps=100000", "sft.max_num_epochs=100000"])
    metrics = tmp_path / "remote/out/metrics.jsonl"
    with replicas(render(job).text, tmp_path / "log") as running:
        end = time.monotonic() + 60
        while not metrics.exists() or metrics.stat().st_size == 0:
            assert time.monotonic() < end and running[0].process.poll() is None, running[0].text
            time.sleep(0.1)
        running[1].kill(signal.SIGUSR1)
        assert [replica.wait() for replica in running] == [85, 85], running[0].text
    assert list((tmp_path / "remote/out/checkpoints").glob("step_*"))


def test_an_image_without_the_trainers_packages_fails_at_once_with_what_it_lacks(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/bash\nexec {sys.executable} -S "$@"\n')  # -S: without site-packages
    bare.chmod(0o755)
    job = training(tmp_path / "remote")
    job = replace(job, nodes=1, container=replace(job.container, python=str(bare)))
    start = time.monotonic()
    (done,) = run(job, tmp_path / "log")
    assert time.monotonic() - start < 10
    assert done.process.returncode == 1
    assert re.search(r"!!  torch +not installed", done.text) and "!!  megatron-core" in done.text
    assert "the trainer cannot run in this image" in done.text
    assert not (tmp_path / "remote/out").exists()


# The time limit and signals ----------------------------------------------------------------------------------------


STOPS_WHEN_ASKED = """
echo started
trap 'echo got USR1; exit 85' USR1
trap 'echo got TERM; exit 85' TERM
while :; do sleep 0.1; done
"""
DEAF = "echo started; trap '' USR1 TERM; while :; do sleep 0.1; done"


def test_before_the_time_limit_the_trainer_is_asked_to_save(tmp_path: Path) -> None:
    job = lepton_job(tmp_path / "remote", command=shell(STOPS_WHEN_ASKED), options={"time": "00:00:04"})
    (done,) = run(job, tmp_path / "log")
    assert "2 s until the time limit" in done.text and "got USR1" in done.text
    assert exit_of(done, job) == (0, 0, 85)


def test_a_trainer_that_does_not_end_in_time_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lepton, "_KILL_AFTER", 1)
    job = lepton_job(tmp_path / "remote", command=shell(DEAF), options={"time": "00:00:02"})
    (done,) = run(job, tmp_path / "log")
    assert exit_of(done, job) == (0, 0, 137)


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGINT])
def test_a_job_that_is_stopped_lets_the_trainer_save(tmp_path: Path, signo: int) -> None:
    job = lepton_job(tmp_path / "remote", command=shell(STOPS_WHEN_ASKED))
    with replicas(render(job).text, tmp_path / "log") as (replica,):
        replica.wait_for("started")
        replica.kill(signo)
        assert replica.wait() == 85
    assert "got TERM" in replica.text


def test_a_job_that_is_stopped_during_setup_never_starts_the_trainer(tmp_path: Path) -> None:
    job = lepton_job(tmp_path / "remote", command=shell("echo started"), setup=("echo setting up", "sleep 2"))
    with replicas(render(job).text, tmp_path / "log") as (replica,):
        replica.wait_for("setting up")
        replica.kill(signal.SIGTERM)
        assert replica.wait() == 85
    assert "started" not in replica.text


@pytest.mark.parametrize("code", [0, 1, 2, 85])
def test_exit_codes_come_through_three_ways(tmp_path: Path, code: int) -> None:
    job = lepton_job(tmp_path / "remote", command=shell(f"exit {code}"))
    (done,) = run(job, tmp_path / "log", attempt=1)
    assert done.process.returncode == code
    assert exit_of(done, job) == (1, 0, code)
    assert (tmp_path / "remote/r1/logs/attempt-1/node-0.exit_code").read_text() == f"{code}\n"


def test_each_attempt_has_its_own_log(tmp_path: Path) -> None:
    job = lepton_job(tmp_path / "remote", command=shell("echo this is $LEPTON_JOB_FAILURE_COUNT"))
    for attempt in (0, 1):
        run(job, tmp_path / "log", attempt=attempt)
    logs = tmp_path / "remote/r1/logs"
    assert "this is 0" in (logs / "attempt-0/node-0.log").read_text()
    assert "this is 1" in (logs / "attempt-1/node-0.log").read_text()


# Code and config ---------------------------------------------------------------------------------------------------


CODE = small_bundle({"hello.py": b"print('hello from the bundle')"})
HELLO = (sys.executable, "-m", "hello")


@pytest.mark.parametrize("mounted", [True, False])
def test_code_and_config_arrive_as_they_were_compiled(tmp_path: Path, mounted: bool) -> None:
    text = "a: 'ü $$ $(X)'\n" * 10_000  # of more than one part
    files = (File("config.yaml", text), File("data/more.txt", "", 0o644))
    job = lepton_job(tmp_path / "remote", mounted=mounted, bundle=CODE, command=HELLO, files=files)
    (done,) = run(job, tmp_path / "log")
    assert done.process.returncode == 0 and "hello from the bundle" in done.text
    placed = tmp_path / "remote/r1/config.yaml"
    assert placed.read_text() == text
    assert placed.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "remote/r1/data/more.txt").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("variable", ["NEMOTRON_BUNDLE_0", "NEMOTRON_FILE_0_0"])
@pytest.mark.parametrize("damage", ["changed", "lost"])
def test_code_or_config_that_arrives_damaged_fails_loudly(tmp_path: Path, variable: str, damage: str) -> None:
    job = lepton_job(tmp_path / "remote", bundle=CODE, command=HELLO)
    spec = json.loads(render(job).text)
    for env in spec["spec"]["envs"]:
        if env["name"] == variable:
            middle = len(env["value"]) // 2
            other = "B" if env["value"][middle] == "A" else "A"
            env["value"] = env["value"][:middle] + other + env["value"][middle + 1 :] if damage == "changed" else ""
    with replicas(lepton.dump(spec), tmp_path / "log") as (replica,):
        assert replica.wait() == 1
    assert "is not what was sent: its SHA-256 is" in replica.text
    assert "hello" not in replica.text


def test_the_trainer_does_not_inherit_what_carried_code_and_config(tmp_path: Path) -> None:
    job = lepton_job(tmp_path / "remote", bundle=CODE, command=shell("env | wc -c"))
    (done,) = run(job, tmp_path / "log")
    assert "NEMOTRON_FILE" not in done.text and int(done.text.splitlines()[-2]) < 5000


def test_a_bundle_in_the_mounted_folder_is_verified_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lepton, "LARGEST_ENVIRONMENT", 1)
    job = lepton_job(tmp_path / "remote", bundle=CODE, command=HELLO)
    with pytest.raises(Exception, match="a Lepton job carries"):
        render(job)
    monkeypatch.setattr(lepton, "LARGEST_ENVIRONMENT", lepton.environment_size(json.loads(_without_bundle(job))))
    (missing,) = run(job, tmp_path / "log")
    assert f"{CODE.file} is not there: put it into the mounted folder" in missing.text
    place = tmp_path / "remote/r1" / CODE.file
    place.write_bytes(bundle.read(CODE)[:-1])
    (damaged,) = run(job, tmp_path / "log", attempt=1)
    assert damaged.process.returncode == 1 and "is not what was sent" in damaged.text
    place.write_bytes(bundle.read(CODE))
    (done,) = run(job, tmp_path / "log", attempt=2)
    assert done.process.returncode == 0 and "hello from the bundle" in done.text


def _without_bundle(job: Job) -> str:
    """The spec of a job whose bundle lies in the mounted folder."""
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(lepton, "LARGEST_ENVIRONMENT", 10**9)
        size = lepton.environment_size(json.loads(render(job).text))
        context.setattr(lepton, "LARGEST_ENVIRONMENT", size - 1)
        return render(job).text


def test_other_code_under_the_same_run_id_is_refused(tmp_path: Path) -> None:
    job = lepton_job(tmp_path / "remote", bundle=CODE, command=HELLO)
    run(job, tmp_path / "log")
    other = replace(job, bundle=small_bundle({"hello.py": b"print('another')"}))
    (done,) = run(other, tmp_path / "log", attempt=1)
    assert done.process.returncode == 1 and "holds other code: use another run id" in done.text


# Setup, secrets, peers ---------------------------------------------------------------------------------------------


def test_setup_commands_prepare_the_trainers_environment(tmp_path: Path) -> None:
    setup = ('export FROM_SETUP="it\'s $A"', "unset_is_fine=$NOT_SET", "if true; then", "  B=$$", "fi", "export B")
    job = lepton_job(tmp_path / "remote", setup=setup, env={"A": "a"}, command=shell('echo "<$FROM_SETUP> <$B>"; pwd'))
    (done,) = run(job, tmp_path / "log")
    assert f"<it's a> <{done.process.pid}>\n{tmp_path}/remote\n" in done.text


@pytest.mark.parametrize("line", ["false", "echo 'open", "exit 7"])
def test_a_setup_command_that_fails_ends_the_attempt(tmp_path: Path, line: str) -> None:
    job = lepton_job(tmp_path / "remote", setup=(line,), command=shell("echo started"))
    (done,) = run(job, tmp_path / "log")
    assert done.process.returncode not in (0, 85)
    assert "started" not in done.text
    assert exit_of(done, job) == (0, 0, done.process.returncode)


def test_secrets_reach_the_trainer_and_no_file(tmp_path: Path) -> None:
    value = "s3cret-value-17"
    job = lepton_job(
        tmp_path / "remote",
        secrets=(Secret("HF_TOKEN", reference="my-token"),),
        setup=("set -x",),
        command=shell("[[ $HF_TOKEN == s3cret-* ]] && echo it is here"),
    )
    (done,) = run(job, tmp_path / "log", secrets={"my-token": value})
    assert "it is here" in done.text
    for file in [*(tmp_path / "remote").rglob("*"), *(tmp_path / "log").rglob("*")]:
        assert not file.is_file() or value not in file.read_text(errors="replace"), file


def test_a_home_that_cannot_be_written_is_replaced(tmp_path: Path) -> None:
    job = lepton_job(tmp_path / "remote", command=shell('touch "$HOME/x" && echo "models in $HF_HOME"'))
    (done,) = run(job, tmp_path / "log", image_env={"HOME": "/nonexistent"})
    assert f"models in {tmp_path}/remote/hf" in done.text


def test_every_replica_knows_its_place(tmp_path: Path) -> None:
    say = 'echo "[$NODE_RANK of $NNODES at $MASTER_ADDR:$MASTER_PORT]"; getent hosts "$MASTER_ADDR"'
    job = lepton_job(tmp_path / "remote", nodes=3, command=shell(say))
    for replica in run(job, tmp_path / "log"):
        assert f"[{replica.index} of 3 at worker-0.job.svc:29400]" in replica.text


def test_a_replica_that_waits_in_vain_says_for_whom(tmp_path: Path) -> None:
    job = lepton_job(tmp_path / "remote", nodes=2, options={"start_timeout": 1})
    with replicas(render(job).text, tmp_path / "log", names=False, only=1) as (replica,):
        assert replica.wait() == 1
    assert "worker-0.job.svc has no address after 1 s: the first replica is not there" in replica.text


def test_a_wrong_number_of_replicas_is_noticed(tmp_path: Path) -> None:
    spec = json.loads(render(lepton_job(tmp_path / "remote", nodes=2)).text)
    spec["spec"]["completions"] = 1
    with replicas(lepton.dump(spec), tmp_path / "log") as (replica,):
        assert replica.wait() == 1
    assert "the job needs 2 replicas, Lepton gave it 1" in replica.text


# Services ----------------------------------------------------------------------------------------------------------

SERVE = (sys.executable, "-m", "http.server", "8000", "--directory", "/proc/self/fdinfo")
ASK = 'echo "judge at $NEMOTRON_SERVICE_JUDGE"; exec 3<> "/dev/tcp/${NEMOTRON_SERVICE_JUDGE/://}" && echo reached'


def test_a_service_is_up_before_the_trainer_and_gone_after_it(tmp_path: Path) -> None:
    judge = Service("judge", ("bash", "-c", "sleep 1; exec " + " ".join(SERVE)), 8000, health="/0")
    job = lepton_job(tmp_path / "remote", services=(judge,), command=shell(ASK))
    (done,) = run(job, tmp_path / "log")
    assert exit_of(done, job) == (0, 0, 0), done.text
    assert "service judge is ready at 127.0.0.1:8000" in done.text
    assert "judge at 127.0.0.1:8000\nreached" in done.text
    assert not list(_running(str(tmp_path)))


def test_a_service_gets_the_gpus_behind_the_trainers(tmp_path: Path) -> None:
    judge = Service("judge", ("bash", "-c", f'echo "$CUDA_VISIBLE_DEVICES $X"; exec {" ".join(SERVE)}'), 8000, gpus=2)
    judge = replace(judge, env={"X": "it's"})
    job = lepton_job(tmp_path / "remote", services=(judge,), procs=6, gpus_per_node=8)
    run(job, tmp_path / "log")
    assert (tmp_path / "remote/r1/logs/attempt-0/judge-0.log").read_text().startswith("6,7 it's\n")


def test_the_death_of_a_service_ends_the_attempt(tmp_path: Path) -> None:
    judge = Service("judge", ("bash", "-c", f"{' '.join(SERVE)} & sleep 3; echo out of memory; kill $!; exit 9"), 8000)
    job = lepton_job(tmp_path / "remote", services=(judge,), command=shell(STOPS_WHEN_ASKED))
    (done,) = run(job, tmp_path / "log")
    assert exit_of(done, job) == (0, 0, 1)
    assert "service judge ended; the end of its log:" in done.text
    assert "out of memory" in done.text and "got TERM" in done.text


def test_a_service_that_never_answers_is_named(tmp_path: Path) -> None:
    judge = Service("judge", ("sleep", "60"), 8000, start_timeout=1)
    (done,) = run(lepton_job(tmp_path / "remote", services=(judge,)), tmp_path / "log")
    assert done.process.returncode == 1
    assert "service judge was not ready at 127.0.0.1:8000 within 1 s" in done.text


def test_a_service_on_a_replica_of_its_own_ends_with_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lepton, "_BEACON_PERIOD", 0)
    judge = Service("judge", SERVE, 8000, nodes=1)
    job = lepton_job(tmp_path / "remote", services=(judge,), command=shell(ASK + "; sleep 2"))
    trainer, server = run(job, tmp_path / "log")
    assert (exit_of(trainer, job), exit_of(server, job)) == ((0, 0, 0), (0, 1, 0)), trainer.text + server.text
    assert "judge at worker-1.job.svc:8000\nreached" in trainer.text
    assert "the trainer has ended" in server.text


def _running(mark: str) -> list[str]:
    """Command lines of running processes that name `mark` in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found
