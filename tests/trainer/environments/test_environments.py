"""Environments together: which one scores a row, order, rows that cannot be scored, workers that fail and end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.environments import Rollout, jail
from nemotron_launch.trainer.environments.workers import Call, WorkerPool

REPOSITORY = Path(__file__).parents[3]
FOR_EVER = {"env_name": "regex", "regex": "(a+)+$"}
BACKTRACKS = "a" * 60 + "b"


def workers() -> list[int]:
    """Processes that verify, below this one."""
    found = []
    for pid in jail.descendants(os.getpid()):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"environments.worker" in line and b"\0" in line:
            found.append(pid)
    return found


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_rows_choose_what_scores_them_and_their_order_is_kept(opened):
    rows = [
        {"expected_answer": "18"},  # data.default.env_name: math
        {"env_name": "exact", "expected_answer": "x"},
        {"env_name": "multiple_choice", "expected_answer": "B"},
        {"env_name": "regex", "regex": r"^\d+$"},
    ]
    texts = ["#### 18.0", "x", "\\boxed{B}", "123", "nothing"]
    scores = opened().score([[Rollout([], text, row) for text in texts] for row in rows])
    assert [[score.reward for score in group] for group in scores] == [
        [1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
    ]


def test_one_group_may_hold_rows_of_several_environments(opened):
    mixed = [
        Rollout([], "x", {"env_name": "exact", "expected_answer": "x"}),
        Rollout([], "#### 3", {"expected_answer": "3"}),
        Rollout([], "y", {"env_name": "exact", "expected_answer": "x"}),
    ]
    assert [score.reward for score in opened().score([mixed])[0]] == [1, 1, 0]


def test_rows_that_cannot_be_scored_are_named_by_file_line_and_field(opened):
    rows = [{"expected_answer": "1"}, {"env_name": "regex"}, {"env_name": "maths"}, {}, {"env_name": "regex"}]
    with pytest.raises(UserError) as refused:
        opened().check(rows, [f"rows.jsonl:{n}" for n in range(1, 6)])
    said = str(refused.value)
    assert said.startswith("error: rows.jsonl:2: 4 of 5 rows cannot be scored: missing key regex or pattern")
    assert "2 × missing key regex or pattern (environment regex): rows.jsonl:2, rows.jsonl:5" in said
    assert "1 × there is no environment maths: rows.jsonl:3" in said
    assert "missing key expected_answer or answer or ground_truth or output (environment math): rows.jsonl:4" in said


def test_a_share_of_rows_may_be_bad_and_is_worth_nothing(defaults, opened):
    environments = opened()
    rows = [{"expected_answer": "1"}] * 99 + [{}]
    environments.check(rows, [f"rows.jsonl:{n}" for n in range(100)])  # data.max_bad_rows: 0.01
    assert environments.problems(rows)[-1]
    ((score,),) = environments.score([[Rollout([], "#### 1", {"env_name": "nothing"})]])
    assert (score.reward, score.error) == (0, "there is no environment nothing")


def test_a_verifier_that_hangs_scores_0_and_the_others_go_on(opened):
    environments = opened(verifiers={"timeout": 1})
    rows = [FOR_EVER, {"env_name": "regex", "regex": "b$"}]
    slow, quick = environments.score([[Rollout([], BACKTRACKS, row)] * 2 for row in rows])
    assert [score.error for score in slow] == ["the verifier took longer than 1 s"] * 2
    assert [score.reward for score in quick] == [1, 1]


FUNCTIONS = """
import os, sys

def parts(text, row, truncated=False):
    return {"form": 0.25, "length": float(truncated)}
parts.fields = ("unit",)

def total(text, row, **more): return {"reward": len(more["messages"]), "half": 0.5}
def raises(text, row): raise ValueError("no unit\\nsecond line")
def leaves(text, row): sys.exit(3)
def dies(text, row): os._exit(4)
def is_killed(text, row): os.kill(os.getpid(), 9)
def is_nothing(text, row): return None
def is_endless(text, row): return float("inf")
def takes_little(text): return 0
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_own_functions_score_with_what_they_ask_for(functions, scored):
    row = {"env_name": "python:rewards_of_mine.parts", "unit": "km"}
    (score,) = scored(row, "5")
    assert (score.reward, score.components) == (0.25, {"form": 0.25, "length": 0.0})
    (score,) = scored({"env_name": "python:rewards_of_mine.total"}, "5")
    assert (score.reward, score.components) == (0, {"half": 0.5})


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("raises", "ValueError: no unit"),
        ("leaves", "SystemExit: 3"),
        ("dies", "the verifier's process ended (exit code 4)"),
        ("is_killed", "the verifier's process ended (signal 9)"),
        ("is_nothing", "TypeError: it returned NoneType, not a number"),
        ("is_endless", "ValueError: it returned inf"),
    ],
)
def test_own_functions_that_fail_score_0_and_are_counted(functions, scored, name, error):
    for score in scored({"env_name": f"python:rewards_of_mine.{name}"}, "5", "6"):
        assert (score.reward, score.error) == (0, error)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("rewards_of_nobody.f", "ModuleNotFoundError: No module named 'rewards_of_nobody'"),
        ("rewards_of_mine.other", "AttributeError: module 'rewards_of_mine' has no attribute 'other'"),
        ("rewards_of_mine.takes_little", "TypeError: it must take (text, row)"),
    ],
)
def test_own_functions_that_cannot_be_used_are_named_before_the_first_rollout(functions, opened, name, why):
    with pytest.raises(UserError) as refused:
        opened().check([{"env_name": f"python:{name}"}], ["rows.jsonl:1"])
    said = (
        f"error: rows.jsonl:1: 1 of 1 rows cannot be scored: python:{name} cannot be used where the trainer runs: {why}"
    )
    assert str(refused.value).startswith(said)


def test_own_functions_say_which_fields_they_need(functions, opened):
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .* missing key unit"):
        opened().check([{"env_name": "python:rewards_of_mine.parts"}], ["rows.jsonl:1"])


def test_the_number_of_workers_changes_no_score(opened):
    texts = [rf"\boxed{{x + {n}}}" for n in range(12)]
    row = {"expected_answer": "x + 3"}
    one, several = opened(math={"num_workers": 1}), opened(math={"num_workers": 4})
    rewards = [
        [score.reward for score in environments.score([[Rollout([], text, row) for text in texts]])[0]]
        for environments in (one, several)
    ]
    assert rewards[0] == rewards[1] == [float(n == 3) for n in range(12)]


def test_no_worker_outlives_its_environments(opened):
    with opened() as environments:
        environments.score([[Rollout([], "x", {"env_name": "regex", "regex": "x"})]])
        assert workers()
    wait_for(lambda: not workers())


def test_an_exception_ends_what_the_workers_are_doing():
    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    pool = WorkerPool(size=2, timeout=600)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(Interrupted):
            pool.run([Call("time:sleep", (600,))] * 3)
        wait_for(lambda: not workers())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        pool.close()


def test_a_trainer_that_is_killed_takes_its_workers_along(tmp_path):
    script = f"""
import sys, threading, time; sys.path.insert(0, {str(REPOSITORY)!r})
from nemotron_launch.trainer.environments.workers import Call, WorkerPool
pool = WorkerPool(size=1, timeout=600)
print(pool.run([Call("os:getpid")])[0].value, flush=True)
pool.run([Call("re:search", ("(a+)+$", "a" * 60 + "b"))])  # holds the interpreter, so that no thread of it can act
"""
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    worker = int(trainer.stdout.readline())
    time.sleep(0.2)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    wait_for(lambda: not is_running(worker))


def test_signals_to_the_job_leave_workers_to_finish(tmp_path):
    pool = WorkerPool(size=1, timeout=60)
    (first,) = pool.run([Call("os:getpid")])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(first.value, number)
    (second,) = pool.run([Call("os:getpid")])
    pool.close()
    assert first.value == second.value


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
