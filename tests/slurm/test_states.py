"""What Slurm's commands print, from recorded outputs (see recorded/README.md), and what it means for a run."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_launch.backends.slurm_output import (
    SQUEUE,
    Folder,
    Record,
    folders,
    job_ids,
    newest,
    nodes,
    restarts_before,
    sacct,
    scontrol,
    squeue,
)
from nemotron_launch.backends.slurm_states import judge
from nemotron_launch.jobs.run import LIVE, OVER

RECORDED = Path(__file__).parent / "recorded"


def text(name: str) -> str:
    return (RECORDED / name).read_text()


def by_name(records: list[Record]) -> dict[str, Record]:
    return {record.name: record for record in records}


# What was recorded, 22.05: name → state, restarts, code, signal.
JOBS = {
    "good": ("COMPLETED", 0, 0, 0),
    "bad": ("FAILED", 0, 7, 0),
    "killed": ("FAILED", 0, 0, 9),
    "cancelled": ("CANCELLED", 0, 0, 15),
    "requeued": ("COMPLETED", 1, 0, 0),
    "works": ("RUNNING", 0, 0, 0),
    "nodefail": ("NODE_FAIL", 0, 0, 0),
    "preempted": ("PREEMPTED", 0, 0, 15),
    "held": ("PENDING", 0, 0, 0),
    "waits": ("PENDING", 0, 0, 0),
    "after": ("PENDING", 0, 0, 0),
    "never": ("PENDING", 0, 0, 0),
}


def test_squeue_and_scontrol_tell_the_same() -> None:
    one, other = squeue(text("22.05/squeue.txt")), scontrol(text("22.05/scontrol.txt"))
    for records in (one, other):
        found = by_name(records)
        seen = {name: (found[name].state, found[name].restarts, found[name].code, found[name].signal) for name in JOBS}
        assert seen == JOBS
        assert sorted(record.job_id for record in records if record.name == "points") == [f"14_{n}" for n in range(10)]
        assert found["works"].nodes == ("node2", "node3") and found["works"].comment == "mine nemotron:works"
        assert found["held"].reason == "JobHeldUser" and found["held"].comment == "mine nemotron:held"
        assert found["good"].ended and found["waits"].ended != 0
    ids = {record.job_id: record for record in other}
    for record in one:
        same = ("state", "restarts", "code", "signal", "started", "submitted", "nodes", "comment", "reason", "name")
        assert {key: getattr(record, key) for key in same} == {key: getattr(ids[record.job_id], key) for key in same}


def test_sacct_tells_of_jobs_and_not_of_their_steps() -> None:
    found = by_name(sacct(text("22.05/sacct.txt")))
    assert {name: found[name].state for name in ("good", "bad", "killed", "nodefail", "preempted")} == {
        "good": "COMPLETED", "bad": "FAILED", "killed": "FAILED", "nodefail": "NODE_FAIL", "preempted": "PREEMPTED",
    }  # fmt: skip
    assert (found["cancelled"].state, found["cancelled"].by) == ("CANCELLED", "0")
    assert (found["bad"].code, found["killed"].signal, found["good"].restarts) == (7, 9, None)
    assert found["good"].comment == "mine nemotron:good"
    dated = by_name(sacct(text("22.05/sacct_dates.txt")))
    assert "batch" not in dated and dated["works"].nodes == ("node2", "node3")


def test_other_versions_are_read_as_documented() -> None:
    old = {record.job_id: record for record in sacct(text("21.08/sacct.unverified.txt"))}
    assert old["1001"].nodes == ("gpu001", "gpu002", "gpu010")
    assert old["1001"].started == datetime.datetime(2021, 9, 1, 10).timestamp()
    assert (old["1002"].state, old["1002"].by) == ("CANCELLED", "1000")
    assert old["1003"].state == "OUT_OF_MEMORY"
    assert [job for job in old if job.startswith("1005")] == [f"1005_{n}" for n in (4, 5, 6, 7, 8, 9, 3)]
    assert "1006" in old

    one, *points, failed = scontrol(text("23.11/scontrol.unverified.txt"))
    assert (one.state, one.restarts, one.comment) == ("RUNNING", 2, "x=1 JobState=fake nemotron:works")
    assert [point.job_id for point in points] == [f"2003_{n}" for n in (4, 5, 6, 9)]
    assert (failed.job_id, failed.state, failed.reason) == ("2003_3", "NODE_FAIL", "NodeDown")

    newer = by_name(sacct(text("24.05/sacct.unverified.txt")))
    assert (newer["good"].restarts, newer["good"].comment) == (2, "a | b nemotron:good")

    newest_version = squeue(text("25.05/squeue.unverified.txt"))
    found = by_name(newest_version)
    assert len(found["works"].nodes) == 128 and restarts_before(found["works"].comment) == 1
    assert (found["bad"].code, found["bad"].signal) == (7, 0)
    assert [record.job_id for record in newest_version if record.name == "points"] == ["4004_0", "4004_1", "4004_2"]
    seen = judge(found["new"], Folder())  # a state that we have never heard of
    assert seen and (seen.state, seen.reason) == ("running", "Slurm says EXPEDITING")


def test_a_comment_of_any_text_moves_no_other_field() -> None:
    row = "".join(f"{value:<{width}}" for value, (_, width) in zip(
        ("7_3", "RUNNING", "1", "0", "100", "200", "50", "name", "None", "n1"), SQUEUE, strict=False))  # fmt: skip

    @given(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"])))
    def holds(comment: str) -> None:
        (record,) = squeue(row + comment)
        assert (record.job_id, record.state, record.restarts, record.nodes) == ("7_3", "RUNNING", 1, ("n1",))

    holds()


@given(st.text())
def test_whatever_is_printed_is_read_without_an_error(printed: str) -> None:
    for read in (squeue, scontrol, sacct, folders):
        read(printed)
        read(f"JobId={printed}\n4|{printed}|\n@@{printed}\nsuccessor {printed}")
    list(nodes(printed))
    list(job_ids(printed))
    list(job_ids(f"12_[{printed[:20]}]"))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("123", ["123"]),
        ("123_4", ["123_4"]),
        ("123_[0-2,7%4]", ["123_0", "123_1", "123_2", "123_7"]),
        ("123_[0-8:4]", ["123_0", "123_4", "123_8"]),
        ("123_[5]", ["123_5"]),
        ("123_[1,3,...]", ["123_1", "123_3"]),
        ("123+1", ["123"]),
    ],
)
def test_job_ids_are_spread(written: str, expected: list[str]) -> None:
    assert list(job_ids(written)) == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("node[1-3,07],gpu-a", ["node1", "node2", "node3", "node07", "gpu-a"]),
        ("rack[1-2]n[08-09]", ["rack1n08", "rack1n09", "rack2n08", "rack2n09"]),
        ("node[1-2", ["node1", "node2"]),
        ("None assigned", []),
        ("(null)", []),
    ],
)
def test_nodes_are_spread_as_scontrol_does(written: str, expected: list[str]) -> None:
    assert list(nodes(written)) == expected


# What it means.


def ended(state: str, code: int = 0, signal: int = 0, **fields: object) -> Record:
    return Record("5", state, restarts=0, code=code, signal=signal, ended=100.0, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("record", "folder", "state", "code", "words"),
    [
        (ended("COMPLETED"), Folder(), "finished", 0, ""),
        (ended("FAILED", 7), Folder(), "failed", 7, "exit code 7"),
        (ended("FAILED", signal=9), Folder(), "failed", 137, "signal 9"),
        (ended("FAILED", 1), Folder(exit_code=1, reason="two attempts"), "failed", 1, "two attempts"),
        (ended("FAILED", 85), Folder(exit_code=85), "stopped", 85, "no restart is left"),
        (ended("FAILED", 1, reason="JobLaunchFailure"), Folder(), "failed", None, "remote_job_dir is not seen"),
        (ended("CANCELLED", by="1000"), Folder(), "cancelled", None, "by user 1000"),
        (ended("CANCELLED", reason="DependencyNeverSatisfied"), Folder(), "cancelled", None, "the run before it"),
        (ended("CANCELLED"), Folder(exit_code=0), "finished", 0, ""),  # it had ended when scancel came
        (ended("FAILED", 85), Folder(cancelled=True, exit_code=85), "cancelled", 85, ""),
        (ended("COMPLETED"), Folder(cancelled=True), "finished", 0, ""),
        (ended("TIMEOUT"), Folder(), "failed", None, "out of time"),
        (ended("OUT_OF_MEMORY"), Folder(), "failed", None, "out of memory"),
        (ended("NODE_FAIL"), Folder(), "failed", None, "a node failed"),
        (ended("PREEMPTED"), Folder(), "stopped", None, "preempted"),
        (ended("BOOT_FAIL"), Folder(), "failed", None, "boot fail"),
        (ended("DEADLINE"), Folder(), "failed", None, "deadline"),
        (ended("LAUNCH_FAILED"), Folder(), "failed", None, "launch failed"),
        (Record("5", "REVOKED"), Folder(), "running", None, "another cluster"),
        (Record("5", "PENDING", reason="Priority"), Folder(), "pending", None, "higher priority are first (Priority)"),
        (Record("5", "PENDING", reason="SomethingNew"), Folder(), "pending", None, "SomethingNew"),
        (Record("5", "REQUEUE_HOLD"), Folder(), "pending", None, ""),
        (Record("5", "COMPLETING"), Folder(exit_code=0), "running", None, "COMPLETING"),
        (Record("5", "SUSPENDED"), Folder(), "running", None, "SUSPENDED"),
        (None, Folder(exit_code=3), "failed", 3, "exit code 3"),
        (None, Folder(claims={"": "5"}, quiet=5.0), "running", None, "forgotten"),
        (None, Folder(claims={"": "5"}, quiet=5000.0), "lost", None, "forgotten"),
    ],
)
def test_what_a_job_and_a_folder_mean_for_a_run(
    record: Record | None, folder: Folder, state: str, code: int | None, words: str
) -> None:
    seen = judge(record, folder)
    assert seen and (seen.state, seen.exit_code) == (state, code) and words in seen.reason, seen


def test_nothing_known_is_no_state() -> None:
    assert judge(None, Folder()) is None


@pytest.mark.parametrize("state", ["PREEMPTED", "NODE_FAIL", "BOOT_FAIL"])
def test_a_job_that_lost_its_nodes_wants_a_successor_while_restarts_are_left(state: str) -> None:
    seen = judge(ended(state), Folder(), restarts_left=True)
    assert seen and seen.wants_successor and seen.state == "pending"
    cancelled = judge(ended(state), Folder(cancelled=True), restarts_left=True)
    assert cancelled and not cancelled.wants_successor and cancelled.state == "cancelled"


@given(st.sampled_from([None, *(record[0] for record in JOBS.values()), "SIGNALING", "NEW"]), st.booleans())
def test_every_state_of_slurm_is_one_of_ours(state: str | None, left: bool) -> None:
    record = Record("1", state) if state else None
    seen = judge(record, Folder(exit_code=1), restarts_left=left)
    assert seen and seen.state in LIVE | OVER


def test_the_job_that_counts_is_the_last_of_the_chain() -> None:
    printed = (
        "@@/runs/a\nthere\nclaim: 5 0\nclaim:5 8 1\nsuccessor 8 11 2 preempted\npast 1 2\nattempts 2\nquiet 3\n"
        "submitted 5;east\n@@/runs/none\n"
    )
    found = folders(printed)
    one = found["/runs/a"]
    assert (one.holder, one.heir, one.wants_heir, one.past) == ("8", "11", False, ("1", "2"))
    assert (one.attempts, one.quiet, one.submitted) == (2, 3.0, "5;east")
    assert found["/runs/none"] == Folder()
    open_wish = folders(printed.replace("8 11 2", "8 - 2"))["/runs/a"]
    assert open_wish.wants_heir and not open_wish.heir
    # A job whose nodes did not boot has claimed nothing.
    booting = folders("@@x\nthere\nsuccessor 5 8 1 a node did not boot\n")["x"]
    assert (booting.holder, booting.heir) == ("5", "8")
    assert folders("@@x\nthere\nclaim:5 8 1\n")["x"].holder == "8"
    # One that hands the run on to itself in a circle, as nobody should, is still read.
    assert folders("@@x\nthere\nclaim: 5 0\nclaim:5 5 1\n")["x"].holder == "5"


def test_of_two_jobs_with_one_name_the_one_that_is_not_over_counts() -> None:
    over, live = ended("FAILED", submitted=9.0), Record("6", "PENDING", submitted=1.0)
    assert newest([over, live]) is live and newest([]) is None
