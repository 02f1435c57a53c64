"""A run that is asked to stop saves at the next step's end, leaves with 85, and goes on as if it had never stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from runs import REPOSITORY, Run, assert_same_tensors, end, tensors, until

pytestmark = pytest.mark.slow

# Sends a signal at the second step of the attempt, and gives it time to arrive there.
AT_STEP_2 = """
    def ask():
        {ask}
        time.sleep(0.5)
    at_call(policy.Policy, "train_step", 2, ask)
"""


@pytest.fixture(scope="module")
def whole(dpo) -> Run:
    """A run of two ranks that was never asked to stop."""
    run = dpo(procs=2, checkpointing__metric_name=None)
    finished = run.go()
    assert finished.code == 0, finished.said
    return run


@pytest.fixture(scope="module", autouse=True)
def long_save(dpo) -> Iterator[tuple[Run, subprocess.Popen[str]]]:
    """A run that is asked to stop and saves for 31 s, meanwhile: the other tests need not wait for it."""
    run = dpo(procs=2, checkpointing__save_period=100)
    patch = AT_STEP_2.format(ask="if RANK == 0: os.kill(os.getppid(), signal.SIGTERM)")
    patch += """
    at_call(loop.checkpoint, "save", 1, lambda: time.sleep(31))
    """
    process = run.start(patch=patch)
    yield run, process
    process.kill()
    process.communicate()


def assert_asked_to_stop(run: Run, finished) -> int:
    """The attempt ended with 85 and saved its last step, which is returned."""
    assert finished.code == 85, finished.said
    assert (run.out / "exit_code").read_text() == "85\n"
    last = run.metrics()[-1]["step"]
    assert run.saved()[-1] == last
    assert f"stopped after step {last}, ready to resume (exit code 85)" in finished.said
    return last


def test_however_often_it_is_asked_a_run_ends_like_one_that_never_was(whole, tmp_path):
    run = Run("dpo", tmp_path, whole.options, procs=2)
    asked = {
        "TERM to spawn": "if RANK == 0: os.kill(os.getppid(), signal.SIGTERM)",
        "USR1 to one rank": "if RANK == 1: os.kill(PID, signal.SIGUSR1)",
        "TERM to every rank": "os.kill(PID, signal.SIGTERM)",
    }
    steps = [0]
    for how, ask in asked.items():
        steps.append(assert_asked_to_stop(run, run.go(patch=AT_STEP_2.format(ask=ask))))
        assert steps[-2] < steps[-1] < 7, f"{how}: {steps}"
    finished = run.go()
    assert finished.code == 0, finished.said
    assert run.numbers() == whole.numbers()
    assert_same_tensors(run.tensors(7), whole.tensors(7))


def test_usr1_to_the_command_reaches_every_rank(warm_start, tmp_path):
    overrides = [
        f"output_dir={tmp_path / 'out'}",
        "policy.architecture.num_layers=1",
        "policy.architecture.hidden_size=32",
    ]
    overrides += [
        "sft.max_num_steps=100000",
        "sft.max_num_epochs=100000",
        "cluster.procs_per_node=2",
        "sft.val_period=0",
    ]
    overrides += ["sft.val_at_end=false", "checkpointing.metric_name=null"]
    command = [sys.executable, "-m", "nemotron_launch", "steps", "run", "sft/megatron", "-c", "tiny", *overrides]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    run = Run("sft", tmp_path)
    until(lambda: len(run.metrics()) > 2, process)
    process.send_signal(signal.SIGUSR1)
    assert_asked_to_stop(run, end(process))


def test_the_time_to_save_by_stops_a_run_after_a_step(dpo, tmp_path):
    # One second has passed before the first step; each attempt still gets one step further.
    run = dpo(tmp_path).with_(checkpointing__checkpoint_must_save_by="00:00:00:01")
    assert assert_asked_to_stop(run, run.go()) == 1
    assert assert_asked_to_stop(run, run.go()) == 2


def test_a_second_interrupt_kills_a_save_and_the_run_goes_on_from_the_one_before(dpo, tmp_path):
    run = dpo(tmp_path)
    patch = f"""
        def slow():
            Path({str(tmp_path / "saving")!r}).touch()
            time.sleep(100)
        at_call(loop.checkpoint, "save", 2, slow)
    """
    process = run.start(patch=patch)
    until((tmp_path / "saving").exists, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # the first one waits for the save
    process.send_signal(signal.SIGINT)
    finished = end(process)
    assert finished.code == 130
    assert "second interrupt: killing" in finished.said
    assert run.saved() == [2]
    assert (run.checkpoints / "tmp_step_4").exists()
    finished = run.go()
    assert finished.code == 0, finished.said
    assert "removed tmp_step_4, left by an interrupted run" in finished.said
    assert [line["step"] for line in run.metrics()] == list(range(8))


def test_a_stop_while_the_reference_is_computed_keeps_what_was_computed(dpo, whole, tmp_path):
    # Parts of 16 micro-batches of one pair: the 48 training pairs are three of them.
    run = dpo(tmp_path).with_(policy__logprob_batch_size=1)
    patch = """
        from nemotron_launch.trainer import reference
        at_call(reference, "_score", 2, lambda: os.kill(PID, signal.SIGTERM))
    """
    finished = run.go(patch=patch)
    assert finished.code == 85, finished.said
    assert "computing the reference's log-probabilities of 60 pairs" in finished.said
    assert run.saved() == []
    finished = run.go()
    assert finished.code == 0, finished.said
    assert "computing the reference's log-probabilities of 28 pairs" in finished.said  # 60 - 2 · 16
    for step, expected in whole.numbers().items():
        if step:
            assert run.numbers()[step]["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-6)


def test_no_process_of_a_run_outlives_a_kill_of_spawn(dpo, tmp_path):
    run = dpo(tmp_path, procs=2).with_(dpo__max_num_steps=100000, dpo__max_num_epochs=100000)
    process = run.start()
    until(lambda: bool(run.saved()), process)
    process.kill()
    process.communicate()  # returns when the last process has closed the pipe
    finished = run.with_(dpo__max_num_steps=run.metrics()[-1]["step"] + 2).go()  # and nobody holds the folder
    assert finished.code == 0, finished.said
    assert "resumed from" in finished.said


def test_a_save_longer_than_torchrun_would_wait_comes_through_on_every_rank(long_save):
    run, process = long_save
    finished = end(process)
    last = assert_asked_to_stop(run, finished)
    assert float(re.findall(rf"saved step {last} in ([\d.]+) s", finished.said)[0]) >= 31  # torchrun kills after 30
    assert tensors(run.checkpoints / f"step_{last}")
